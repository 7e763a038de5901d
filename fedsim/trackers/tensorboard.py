"""TensorBoard: every figure of a round as a scalar, in the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from fedsim.console import Row
from fedsim.trackers import Tracker, measured, need


class TensorBoard(Tracker):
    """Writes event files: `tensorboard --logdir outputs` shows all runs in it.

    A resumed run hides what was written after its checkpoint (`purge_step`), so that no round stands twice.

    Args:
        folder: of the event files; a relative one lies in the run folder.
        flush_seconds: between writes to the disk, >= 1.

    Raises:
        UserError: the package tensorboard is not installed.

    """

    def __init__(self, folder: str = "tensorboard", flush_seconds: int = 30) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise need("tensorboard", "tensorboard", "tensorboard") from error
        self._make: Any = SummaryWriter
        self._folder, self._seconds = folder, flush_seconds
        self._config: Mapping[str, Any] = {}
        self._writer: Any = None

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Keep where to write."""
        self._where, self._config = folder / self._folder, config

    def start(self, total: int, done: int) -> None:
        """Open the files and write the config."""
        self._writer = self._make(str(self._where), purge_step=done + 1 if done else None, flush_secs=self._seconds)
        if not done:
            tree = {name: value for name, value in self._config.items() if name != "hydra"}
            self._writer.add_text("config", "```yaml\n" + yaml.safe_dump(tree, sort_keys=False) + "```")

    def round(self, row: Row) -> None:
        """Write the figures of a round."""
        for name, value in measured(row).items():
            self._writer.add_scalar(name, value, int(row["round"]))

    def close(self, error: BaseException | None) -> None:
        """Close the files."""
        if self._writer is not None:
            self._writer.close()
