"""What objectives around another one share: what they do not define themselves is the inner one's."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Context
from fedsim.layout import Params


@dataclass(frozen=True, kw_only=True)
class Wrapper:
    """An objective around another one.

    Args:
        objective: what is minimised; cross-entropy.

    """

    objective: Any = field(default_factory=CrossEntropy)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "objective":  # asked for before there is one, e.g. by copy
            raise AttributeError(name)
        return getattr(self.objective, name)

    def inner_direction(
        self, grads: Params, params: Mapping[str, Tensor], context: Context
    ) -> tuple[Params, dict[str, Tensor]]:
        """Return the objective's own direction and step state; the gradient, and none, where it has no direction."""
        inner = getattr(self.objective, "direction", None)
        return inner(grads, params, context) if inner else (grads, {})

    def inner_finish(self, params: Params, context: Context) -> tuple[Mapping[str, Tensor], dict[str, Tensor], Any]:
        """Return what the objective ends a client's round with; nothing where it has no `finish`."""
        inner = getattr(self.objective, "finish", None)
        return inner(params, context) if inner else ({}, {}, None)
