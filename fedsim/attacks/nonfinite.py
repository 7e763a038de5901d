"""Inf and NaN: updates that no sum survives. What a run must drop and count before its rule sees them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fedsim.attacks.contract import View
from fedsim.contracts import State


@dataclass(frozen=True, kw_only=True)
class NonFinite:
    """One value in every coordinate.

    Args:
        value: "inf", "-inf" or "nan".

    Raises:
        ValueError: another value.

    """

    value: Literal["inf", "-inf", "nan"] = "nan"

    def __post_init__(self) -> None:
        if self.value not in ("inf", "-inf", "nan"):
            raise ValueError(f"value must be inf, -inf or nan, got {self.value!r}")

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return the value, (F, D)."""
        return torch.full_like(view.own, float(self.value)), state
