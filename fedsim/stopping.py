"""When a run stops before its last round: from the validation split alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedsim.contracts import State
from fedsim.settings import Run


class Stopping:
    """Watches the evaluated rounds of a run.

    Args:
        settings: target and patience.
        every: rounds between evaluations; a last round out of turn decides nothing, for in a longer run it would not
            have been evaluated.

    """

    def __init__(self, settings: Run, every: int) -> None:
        self.settings, self.every = settings, every
        self.best = {"value": math.inf, "since": 0.0}
        self.reason: str | None = None

    def look(self, round: int, row: Mapping[str, Any]) -> None:
        """Take a round's row and decide whether to go on."""
        target, early = self.settings.target_accuracy, self.settings.early_stopping
        accuracy, loss = row.get("validation_accuracy"), row.get("validation_loss")
        if (round != 1 and round % self.every != 0) or accuracy is None or loss is None:
            return
        if target is not None and accuracy >= target:
            self.reason = f"validation accuracy {accuracy:.4f} reached {target}"
        if early.patience is None:
            return
        value = -accuracy if early.metric == "accuracy" else loss
        if value < self.best["value"] - early.min_delta:
            self.best = {"value": value, "since": 0.0}
            return
        self.best["since"] += 1
        if self.best["since"] >= early.patience:
            self.reason = f"no better validation {early.metric} in {early.patience} evaluations"

    def state(self) -> State:
        """Return what a checkpoint must hold."""
        return {"best": self.best, "reason": self.reason}

    def load(self, state: State) -> None:
        """Take back what `state` returned."""
        self.best, self.reason = state["best"], state["reason"]
