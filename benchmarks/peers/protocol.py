"""What every other framework's script shares: one round a line on standard input, one line of JSON back.

Run by that framework's own interpreter, so this file needs NumPy alone. The commands: `round` does one; `update FILE`
does one and saves its mean update (D,); the end of the input ends the script.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import Any

import numpy as np

BEGAN = time.perf_counter()
_out = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # whatever a framework prints must not be taken for an answer


def load(path: str) -> dict[str, Any]:
    """Return a workload's arrays: x, y, order (K, steps, batch), start (D,), shapes, lr."""
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files}


def split(work: dict[str, Any]) -> list[np.ndarray]:
    """Return the start weights as tensors, in the order of the model's parameters."""
    shapes = [tuple(shape) for shape in json.loads(str(work["shapes"]))]
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(np.split(work["start"], ends[:-1]), shapes, strict=True)]


def ready(*packages: str, **known: Any) -> None:
    """Say that rounds may be asked for."""
    _say({"versions": {name: version(name) for name in packages}, "start_s": time.perf_counter() - BEGAN, **known})


def commands(before: Callable[[], object] | None = None) -> Any:
    """Yield what each line asks for: None, or the file for the update. What was asked is done when resumed.

    Args:
        before: done before each, and not counted.

    """
    for line in sys.stdin:
        words = line.split(maxsplit=1)
        if before is not None:
            before()
        began = time.perf_counter()
        yield words[1].strip() if words[0] == "update" else None
        _say({"seconds": time.perf_counter() - began})


def serve(
    round: Callable[[], np.ndarray], *packages: str, before: Callable[[], object] | None = None, **known: Any
) -> None:
    """Answer until the input ends.

    Args:
        round: does one round and returns the mean update (D,), computed and not merely promised.
        packages: whose versions are told.
        before: done before each round, and not counted.
        known: what else is worth knowing of this side.

    """
    ready(*packages, **known)
    for path in commands(before):
        update = round()
        if path is not None:
            np.save(path, update)


def _say(answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=_out, flush=True)
