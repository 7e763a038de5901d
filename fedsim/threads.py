"""How many threads torch's operations take, by the thread that calls them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


def take_threads(count: int) -> None:
    """Give the operations of the calling thread `count` threads, whatever other threads set for theirs.

    A thread's number is its own, but its first operation sets it to what was set last anywhere; asking for the number
    is such an operation.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the calling thread's operations have one thread, as sums of a few models' sizes want it.

    More save less than they cost to wake, wait for one another, where other work has a core, for as long as that runs,
    and spin for more on cores that train clients meanwhile.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
