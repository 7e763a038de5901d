"""What a run says in a Jupyter notebook: one line that is drawn anew, and warnings below it."""

from __future__ import annotations

import html
import sys
import time
from collections.abc import Mapping
from importlib import import_module
from typing import Any

from fedsim.console import Observer, scores
from fedsim.quantities import remaining

_PAUSE = 0.2  # seconds between two drawings


def default_observer() -> Observer:
    """Return what fits: `Notebook` in a notebook, else an observer that says nothing."""
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None  # nothing is imported for it
    return Notebook() if hasattr(shell, "kernel") else Observer()


class Notebook(Observer):
    """Draws a bar and the newest figures in the cell's output.

    Args:
        seconds: between two drawings.

    """

    def __init__(self, seconds: float = _PAUSE) -> None:
        self._seconds, self._drawn, self._handle = seconds, 0.0, None
        self._total = self._first = 0
        self._began = 0.0

    def start(self, total: int, done: int) -> None:
        """Begin the bar."""
        self._total, self._first, self._began = total, done, time.monotonic()
        self._draw(done, "")

    def round(self, row: Mapping[str, Any]) -> None:
        """Move the bar, unless it moved just now."""
        number, now = int(row["round"]), time.monotonic()
        if number < self._total and now - self._drawn < self._seconds:
            return
        self._drawn = now
        left = (now - self._began) / max(1, number - self._first) * (self._total - number)
        more = [remaining(left)] if number < self._total else []
        self._draw(number, "  ".join([*scores(row), *more]))

    def warn(self, line: str) -> None:
        """Show the warning."""
        self._show(f"<b>warning:</b> {html.escape(line)}")

    def note(self, line: str) -> None:
        """Show the note."""
        self._show(f"note: {html.escape(line)}")

    def _draw(self, number: int, text: str) -> None:
        bar = f'<progress value="{number}" max="{self._total}"></progress>'
        drawn = f"{bar} round {number}/{self._total}  {html.escape(text)}"
        if self._handle is None:
            self._handle = self._show(drawn, keep=True)
        else:
            self._handle.update(_html(drawn))

    def _show(self, text: str, *, keep: bool = False) -> Any:
        display = import_module("IPython.display").display  # there, in a notebook; no dependency
        return display(_html(text), display_id=True) if keep else display(_html(text))


def _html(text: str) -> Any:
    return import_module("IPython.display").HTML(f"<pre style='margin:0'>{text}</pre>")
