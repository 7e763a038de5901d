"""Figures as a person reads them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


def score(name: str, value: float) -> str:
    """Return a figure of a round in a width that does not jump from round to round, unless it must.

    >>> score("accuracy", 0.91234), score("loss", 0.359), score("loss", 1.23456e29), score("loss", 12345.678)
    ('91.23 %', '0.3590', '1.235e+29', '1.235e+04')
    """
    if not name.endswith("loss") or not math.isfinite(value):
        return show(name, value)
    return f"{value:.4f}" if abs(value) < 1e4 else f"{value:.3e}"


def interval(name: str, mean: float, half: float | None) -> str:
    """Return a mean with half of its interval, if it has one.

    >>> interval("accuracy", 0.915, 0.0123), interval("loss", 0.25, 0.125), interval("accuracy", 0.915, None)
    ('91.50 ± 1.23 %', '0.25 ± 0.125', '91.50 %')
    """
    text = show(name, mean)
    if half is None:
        return text
    bare = text.removesuffix(" %")
    return f"{text} ± {show(name, half)}" if bare == text else f"{bare} ± {100 * half:.2f} %"


def flat(summary: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Return (dotted name, value) of nested mappings; lists are left to summary.json."""
    found: list[tuple[str, Any]] = []
    for name, value in summary.items():
        if isinstance(value, Mapping):
            found += flat(value, f"{prefix}{name}.")
        elif value is not None and not isinstance(value, (list, tuple)):
            found.append((prefix + name, value))
    return found


def label(name: str) -> str:
    """Return a summary key as words.

    >>> label("test.worst_accuracy")
    'test worst accuracy'
    """
    return name.replace(".", " ").replace("_", " ")


def show(name: str, value: Any) -> str:
    """Return a value as a person reads it, by the kind of quantity its name says.

    >>> show("accuracy", 0.91234), show("loss", 0.000123456), show("seconds", 75.2), show("bytes_up", 2_500_000)
    ('91.23 %', '0.0001235', '1 min 15 s', '2.5 MB')
    """
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    words = name.replace(".", "_").split("_")
    if not math.isfinite(value):
        return str(value)
    if "accuracy" in words or "recall" in words:
        return f"{100 * value:.2f} %"
    if "seconds" in words:
        return duration(value)
    if "bytes" in words:
        return size(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.4g}"


def counted(number: int, word: str) -> str:
    """Return a number with its word, of which there may be one or several.

    >>> counted(1, "trial"), counted(2, "trial")
    ('1 trial', '2 trials')
    """
    return f"{number} {word}{'' if number == 1 else 's'}"


def duration(seconds: float) -> str:
    """Return a duration in words.

    >>> duration(0.0421), duration(3.27), duration(59.7), duration(125), duration(7384)
    ('42 ms', '3.3 s', '1 min 0 s', '2 min 5 s', '2 h 3 min')
    """
    if seconds < 0.9995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def remaining(seconds: float) -> str:
    """Return how long something will still take, in words.

    >>> remaining(0.3), remaining(3.27), remaining(125)
    ('< 1 s left', '3.3 s left', '2 min 5 s left')
    """
    return f"{'< 1 s' if seconds < 1 else duration(seconds)} left"


def size(num_bytes: float) -> str:
    """Return a number of bytes with a decimal prefix.

    >>> size(999), size(1000), size(3.21e9)
    ('999 B', '1.0 kB', '3.2 GB')
    """
    for prefix in ("", "k", "M", "G", "T"):
        if abs(num_bytes) < 1000 or prefix == "T":
            break
        num_bytes /= 1000
    return f"{num_bytes:.1f} {prefix}B" if prefix else f"{num_bytes:.0f} B"
