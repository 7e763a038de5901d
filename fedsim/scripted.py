"""TorchScript that does its operations one by one as they are written, in threads that hold no lock of Python's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def as_written() -> Iterator[None]:
    """Run programs without autograd and without the optimising executor.

    That one does other operations in its first calls than later, so that bits would depend on a resume.
    """
    with torch.inference_mode(), torch.jit.optimized_execution(False):  # type: ignore[attr-defined]
        yield
