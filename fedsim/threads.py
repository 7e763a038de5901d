"""How many threads torch's operations take, by the thread that calls them."""

from __future__ import annotations

import torch


def take_threads(count: int) -> None:
    """Give the operations of the calling thread `count` threads, whatever other threads set for theirs.

    A thread's number is its own, but its first operation sets it to what was set last anywhere; asking for the number
    is such an operation.
    """
    torch.get_num_threads()
    torch.set_num_threads(count)
