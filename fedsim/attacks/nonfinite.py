"""Inf and NaN: updates that no sum survives. What a run must drop and count before its rule sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim.attacks.contract import View
from fedsim.contracts import State

VALUES = {"infinity": float("inf"), "not_a_number": float("nan")}


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """One value in every coordinate.

    Args:
        kind: "infinity" or "not_a_number".

    Raises:
        ValueError: another kind.

    """

    kind: Literal["infinity", "not_a_number"] = "infinity"

    def __post_init__(self) -> None:
        if self.kind not in VALUES:
            raise ValueError(f"kind must be one of {', '.join(VALUES)}, got {self.kind!r}")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return the value, (F, D)."""
        return torch.full_like(view.own, VALUES[self.kind]), state
