"""Memory that a round lets go of stays with the process, so that the next one needs no new pages.

glibc takes an array of megabytes from the kernel and gives it back when it is freed: each round then waits until its
pages, four kilobytes each, are found and cleared again, which takes longer than to fill them.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

KEPT = 1 << 30  # bytes at the heap's end beyond which they are given back
USUAL = 128 << 10  # glibc's own bound, and the most of its mappings
MAPPINGS = 1 << 16
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4  # of malloc.h
_OWN = ("MALLOC_", "GLIBC_TUNABLES")  # variables by which a person has said it otherwise

_keeping = False  # whether `keep` has set this process so


def keep() -> bool:
    """Let the whole process keep what it frees; say whether it does, which it does not under others than glibc."""
    global _keeping
    _keeping = _set(mappings=0, kept=KEPT)
    return _keeping


def release() -> None:
    """Let a process that keeps free as it does by itself, and give back what is kept; leave others alone."""
    global _keeping
    if _keeping:
        _keeping = not _set(mappings=MAPPINGS, kept=USUAL)
        give_back()


def _set(*, mappings: int, kept: int) -> bool:
    mallopt = _libc("mallopt")
    if mallopt is None or any(name.startswith(_OWN) for name in os.environ):
        return False
    return bool(mallopt(_MMAP_MAX, mappings)) and bool(mallopt(_TRIM_THRESHOLD, kept))


def give_back() -> None:
    """Give back what is kept."""
    trim = _libc("malloc_trim")
    if trim is not None:
        trim(0)


def _libc(name: str) -> Callable[..., Any] | None:
    try:
        return getattr(ctypes.CDLL(None), name, None)
    except (OSError, TypeError):  # TypeError: Windows, which has no library of the process
        return None
