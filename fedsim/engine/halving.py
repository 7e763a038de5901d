"""Fewer rows at once where the device's memory runs out: a change of the plan, of a known round, and kept from then on.

Which rows train together decides the last bits of a batched product, so a halved chunk is written down with its
round: a run that goes on from an older checkpoint halves in that round again, whether its memory runs out or not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from fedsim.engine.task import Engine

T = TypeVar("T")
Change = dict[str, Any]  # "round", "chunk" and "block_rows" from that round on


class Halving:
    """Tries rounds with ever smaller chunks.

    Args:
        engine: whose `chunk` is halved; one that has none, or a chunk of one client, cannot do with less.
        block_rows: rows of a streamed block in round 1.
        changes: the plan's, ascending by round; what this run adds is appended.

    """

    def __init__(self, engine: Engine, block_rows: int, changes: list[Change]) -> None:
        self.engine, self.block_rows, self.changes = engine, block_rows, changes
        self.told: Callable[[Change], None] = lambda change: None

    @property
    def chunk(self) -> int:
        """Rows that the engine trains at once."""
        return getattr(self.engine, "chunk", None) or 1

    def attempt(self, round: int, train: Callable[[], T]) -> T:
        """Return what training a round returns, with smaller chunks wherever its memory runs out."""
        for change in self.changes:
            if "chunk" in change and change["round"] <= round:
                self._take(change)
        while True:
            try:
                return train()
            except torch.OutOfMemoryError:
                if self.chunk < 2:
                    raise
            # Here, not in the handler: the error's frames would keep the tensors of the failed attempt.
            if self.engine.task.device.type == "cuda":
                torch.cuda.empty_cache()
            change = {"round": round, "chunk": self.chunk // 2, "block_rows": max(1, self.block_rows // 2)}
            self._take(change)
            self.changes.append(change)
            self.told(change)

    def _take(self, change: Change) -> None:
        if change["chunk"] < self.chunk:
            setattr(self.engine, "chunk", change["chunk"])  # noqa: B010 (found by name)
            self.block_rows = change["block_rows"]
