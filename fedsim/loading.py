"""What a command loads and builds stays to its end: no garbage is looked for there, neither meanwhile nor later."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def loading() -> Iterator[None]:
    """Collect no garbage within, and never look through what is there at the end.

    To import torch makes half a million objects, none of which is ever garbage; to look through them while they come
    takes an eighth of the time.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if collects:
            gc.enable()
