"""Who else is told of a run: experiment trackers. The run folder stays the truth.

A tracker is an observer that is told where the run is written. Any class with these methods is one, named by
`tracker._target_` or given as `fedsim.simulate(tracker=…)`; all of them may be left as they are here:

    open(folder, config)   before round 1: the run folder, and the config as nested dicts
    start(total, done)     rounds done + 1 to total begin; done > 0 where a run is resumed
    round(row)             a round ended; `measured(row)` are its figures
    note(line), warn(line) what the run says
    finish(summary)        the results
    close(error)           the end, however it came: None, or what stopped the run

It must not influence the run, and cannot: what it raises becomes one warning, and it is told nothing more.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from fedsim.console import Observer, Row
from fedsim.errors import UserError


class Tracker(Observer):
    """Told of a run and where it is written; does nothing with it unless a method is overridden."""

    def open(self, folder: Path, config: Mapping[str, Any]) -> None:
        """Hear, before all else, the run folder and the resolved config."""

    def close(self, error: BaseException | None) -> None:
        """Hear that the run has ended, and what stopped it if it is not whole."""


def measured(row: Row) -> dict[str, float]:
    """Return the figures of a round that are new in it: finite numbers, without `round` and repeated values.

    >>> measured({"round": 2, "accuracy": 0.5, "evaluated": False, "lr": 0.1, "ece": None})
    {'lr': 0.1}
    """
    repeated = {"accuracy", "loss"} if row.get("evaluated") is False else set()
    found = {}
    for name, value in row.items():
        if name == "round" or name in repeated or isinstance(value, bool):
            continue
        if (isinstance(value, Tensor) and value.dim() == 0) or isinstance(value, int | float):
            number = float(value)
            if math.isfinite(number):
                found[name] = number
    return found


def flat_config(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return dotted key → value of a config, without Hydra's own node.

    >>> flat_config({"seed": 0, "model": {"hidden": [200]}, "hydra": {}})
    {'seed': 0, 'model.hidden': [200]}
    """
    found: dict[str, Any] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            found |= {} if name == "hydra" and not prefix else flat_config(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found


def need(package: str, tracker: str, extra: str) -> UserError:
    """Return the one clear error for a tracker whose package is not installed."""
    return UserError(f"tracker={tracker} needs the package {package}: pip install 'fedsim[{extra}]'")


class _Both(Observer):
    """Tells an observer and a tracker; a tracker that raises is told nothing more."""

    def __init__(self, observer: Observer, tracker: Any) -> None:
        self._observer, self._tracker, self._works = observer, tracker, True

    def tell(self, name: str, *arguments: Any) -> None:
        """Call a method of the tracker, if it has it."""
        method: Callable[..., None] | None = getattr(self._tracker, name, None)
        if method is None or not self._works:
            return
        try:
            method(*arguments)
        except Exception as error:  # a tracker must not stop a run
            self._works = False
            first = (str(error).splitlines() or [""])[0]
            what = f"{type(self._tracker).__name__}.{name} failed: {type(error).__name__}: {first}"
            self._observer.warn(f"tracker {what}; it is told nothing more, the run folder has everything")

    def plan(self, line: str) -> None:
        self._observer.plan(line)
        self.tell("plan", line)

    def start(self, total: int, done: int) -> None:
        self._observer.start(total, done)
        self.tell("start", total, done)

    def round(self, row: Row) -> None:
        self._observer.round(row)
        self.tell("round", row)

    def note(self, line: str) -> None:
        self._observer.note(line)
        self.tell("note", line)

    def warn(self, line: str) -> None:
        self._observer.warn(line)
        self.tell("warn", line)

    def skew(self, rows: Iterable[Sequence[Any]]) -> None:
        self._observer.skew(rows)

    def finish(self, summary: Row) -> None:
        self._observer.finish(summary)
        self.tell("finish", summary)


@contextmanager
def tracked(observer: Observer, tracker: Any, folder: Path, config: Mapping[str, Any]) -> Iterator[Observer]:
    """Tell a tracker, if there is one, all that an observer is told, from `open` to `close`."""
    if tracker is None:
        yield observer
        return
    both = _Both(observer, tracker)
    both.tell("open", folder, config)
    try:
        yield both
    except BaseException as error:
        both.tell("close", error)
        raise
    both.tell("close", None)
