"""The batched form of an objective's context."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Context
from fedsim.engine.task import Task


class Situation:
    """What the rows of a chunk know beside their batches, stacked: the batched form of `contracts.Context`.

    Args:
        task: what all rounds share.
        number: of the phase.
        lr: this round's local rate.
        stacked: field of a context → (R, …), or names of them.
        broadcast: what the rule sent, where all rows got the same; else it is among what is stacked.

    """

    def __init__(
        self, task: Task, number: int, lr: float, stacked: Mapping[str, Any], broadcast: Mapping[str, Any] | None = None
    ) -> None:
        self.task, self.number, self.lr, self.stacked, self.broadcast = task, number, lr, stacked, broadcast
        self.step_state: dict[str, Tensor] = {}

    def first(self, count: int) -> Any:
        """Return what is stacked, of the first rows."""
        return _first({**self.stacked, "step_state": self.step_state}, count)

    def keep(self, step_state: Mapping[str, Tensor], count: int) -> None:
        """Take the new step state of the first rows; rows that are done keep theirs."""
        old = self.step_state
        self.step_state = {
            n: torch.cat([v, old[n][count:]]) if n in old and len(old[n]) > count else v for n, v in step_state.items()
        }

    def context(self, mine: Mapping[str, Any], step: int) -> Context:
        """Return the context of one row from its slice of what is stacked."""
        return Context(
            received=mine["received"], broadcast=mine["broadcast"] if self.broadcast is None else self.broadcast,
            client_state=mine["client_state"], step_state=mine["step_state"], step=step, num_steps=mine["num_steps"],
            lr=self.lr, num_samples=mine["num_samples"], key=mine["key"], layout=self.task.shared, phase=self.number,
        )  # fmt: skip


def _first(tree: Any, count: int) -> Any:
    if isinstance(tree, Tensor):
        return tree[:count]
    return {name: _first(value, count) for name, value in tree.items()}
