"""Weights & Biases: a run with its config and figures, offline unless asked otherwise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedsim.console import Row
from fedsim.trackers import Tracker, flat_config, measured, need


class WandB(Tracker):
    """Logs to Weights & Biases; `wandb sync FOLDER/wandb/…` uploads what an offline run wrote.

    Args:
        project: name of the project.
        mode: "offline" writes to the run folder, "online" needs an account and the network.

    Raises:
        UserError: the package wandb is not installed.
        ValueError: another mode.

    """

    def __init__(self, project: str = "fedsim", mode: str = "offline") -> None:
        if mode not in ("offline", "online"):
            raise ValueError(f"WandB's mode is offline or online, got {mode!r}")
        try:
            import wandb
        except ImportError as error:
            raise need("wandb", "wandb", "wandb") from error
        self._wandb: Any = wandb
        self._project, self._mode = project, mode
        self._run: Any = None

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Begin the run; its id follows from the folder, so that a resumed run goes on with it."""
        identity = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16]
        self._run = self._wandb.init(
            project=self._project, mode=self._mode, dir=str(folder), name=folder.name, id=identity, resume="allow",
            config=flat_config(config),
        )  # fmt: skip

    def round(self, row: Row) -> None:
        """Log the figures of a round."""
        self._run.log(measured(row), step=int(row["round"]))

    def finish(self, summary: Row) -> None:
        """Keep the results as the run's summary."""
        self._run.summary.update(measured(summary))

    def close(self, error: BaseException | None) -> None:
        """End the run; anything but 0 marks it as failed."""
        if self._run is not None:
            self._run.finish(exit_code=0 if error is None else 1)
