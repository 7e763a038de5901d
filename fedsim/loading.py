"""What makes a command start sooner: garbage that is not looked for, and a library that is linked beside other work."""

from __future__ import annotations

import ctypes
import gc
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


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


def link_torch() -> None:
    """Begin to link torch's library, which needs no lock of Python's, beside what this thread loads meanwhile.

    `import torch` finds it linked, a fifth of a second of its time; where this does not work out, it does as it always
    does.
    """
    if sys.platform != "linux" or "torch" in sys.modules:
        return
    with suppress(ImportError, ValueError):
        found = importlib.util.find_spec("torch")
        for folder in (found.submodule_search_locations or ()) if found else ():
            threading.Thread(target=_link, args=(Path(folder, "lib", "libtorch_cpu.so"),), daemon=True).start()


def _link(file: Path) -> None:
    with suppress(OSError):
        ctypes.CDLL(str(file))
