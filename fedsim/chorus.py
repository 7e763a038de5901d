"""Replicas as one run for who watches: a round is told once, when all have done it, as a mean with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fedsim.console import Observer, Row
from fedsim.report.statistics import mean_of

TOLD = ("accuracy", "loss", "validation_accuracy", "validation_loss")


class Chorus:
    """Tells an observer of several runs as of one.

    Args:
        observer: who is told.
        names: of the runs, e.g. "seed 3".

    """

    def __init__(self, observer: Observer, names: list[str]) -> None:
        self.observer = observer
        self.voices = [Voice(self, name) for name in names]
        self._planned = self._began = False
        self._told = 0
        self._held: list[str] = []

    def warn(self, line: str) -> None:
        """Tell a warning, once some run has begun: until then all may be refused for one reason, which is said once."""
        if self._planned:
            self.observer.warn(line)
        else:
            self._held.append(line)

    def release(self) -> None:
        """Tell what was held back."""
        for line in self._held:
            self.observer.warn(line)
        self._held.clear()

    def plan(self, line: str) -> None:
        """Tell the plan of the first run: the others' is the same."""
        if not self._planned:
            self._planned = True
            self.observer.plan(line)
            self.release()

    def hear(self) -> None:
        """Tell the rounds that every run has done that has not ended."""
        living = [voice for voice in self.voices if not voice.ended]
        if any(voice.total is None for voice in living):
            return
        if not self._began:
            self._began = True
            self._told = min((voice.done for voice in self.voices if voice.total is not None), default=0)
            self.observer.start(max(voice.total or 0 for voice in self.voices), self._told)
        last = min((voice.last for voice in living), default=max(voice.last for voice in self.voices))
        while self._told < last:
            self._told += 1
            rows = [voice.rows.pop(self._told) for voice in self.voices if self._told in voice.rows]
            if rows:
                self.observer.round(averaged(self._told, rows))


class Voice(Observer):
    """One of the runs: hears what an observer hears, and passes on what concerns all."""

    def __init__(self, chorus: Chorus, name: str) -> None:
        self._chorus, self.name = chorus, name
        self.total: int | None = None
        self.done = self.last = 0
        self.ended = False
        self.rows: dict[int, Mapping[str, Any]] = {}  # round → row, until all have it

    def plan(self, line: str) -> None:
        """Hear the plan."""
        self._chorus.plan(line)

    def start(self, total: int, done: int) -> None:
        """Hear that rounds begin."""
        self.total, self.done, self.last = total, done, done

    def round(self, row: Row) -> None:
        """Hear the row of a round."""
        self.last = int(row["round"])
        self.rows[self.last] = {name: row.get(name) for name in (*TOLD, "evaluated")}
        self._chorus.hear()

    def note(self, line: str) -> None:
        """Hear a note."""
        self._chorus.observer.note(f"{self.name}: {line}")

    def warn(self, line: str) -> None:
        """Hear a warning."""
        self._chorus.warn(f"{self.name}: {line}")

    def end(self) -> None:
        """Hear that the run is over, however it came: nobody waits for it any more."""
        self.ended = True
        self._chorus.hear()


def averaged(round: int, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a round's row of means, and `NAME_half`, half of their intervals, where several runs have a value."""
    row: dict[str, Any] = {"round": round, "evaluated": any(one.get("evaluated") is not False for one in rows)}
    for name in TOLD:
        known = [float(one[name]) for one in rows if one.get(name) is not None]
        if known:
            over = mean_of(known)
            row |= {name: over.mean, f"{name}_half": over.half}
    return row
