"""Memory that a run and its workers map at once."""

from __future__ import annotations

import mmap
import os
import tempfile
import weakref
from multiprocessing.connection import Connection
from multiprocessing.reduction import recv_handle, send_handle
from typing import Self

import torch
from torch import Tensor

_LIVE: weakref.WeakValueDictionary[int, Memory] = weakref.WeakValueDictionary()  # address → what begins there


class Memory(mmap.mmap):
    """Bytes without a name in any file system: no limit of /dev/shm counts, and nothing is left after `kill -9`.

    Lives as long as a tensor over it does.
    """

    handle: int

    @classmethod
    def new(cls, size: int) -> Self:
        """Return zeroed memory of at least one byte; pages cost nothing until they are written."""
        if hasattr(os, "memfd_create"):
            handle = os.memfd_create("fedsim")
        else:
            with tempfile.TemporaryFile() as file:
                handle = os.dup(file.fileno())
        os.ftruncate(handle, max(1, size))
        return cls._over(handle, size)

    @classmethod
    def receive(cls, pipe: Connection, size: int) -> Self:
        """Map the memory that the other end of a pipe sends."""
        return cls._over(recv_handle(pipe), size)

    @classmethod
    def _over(cls, handle: int, size: int) -> Self:
        memory = cls(handle, max(1, size))
        memory.handle = handle
        weakref.finalize(memory, os.close, handle)
        return memory

    def send(self, pipe: Connection, pid: int) -> None:
        """Let the process at the other end of a pipe map the same bytes."""
        send_handle(pipe, self.handle, pid)

    def tensor(self) -> Tensor:
        """Return the bytes (B,) uint8."""
        whole = torch.frombuffer(self, dtype=torch.uint8)
        _LIVE[whole.data_ptr()] = self
        return whole


def share(value: Tensor) -> Tensor:
    """Return a copy of a CPU tensor that workers can map; itself where it is one already."""
    if value.device.type != "cpu" or not value.numel() or memory_of(value) is not None:
        return value
    room = Memory.new(value.numel() * value.element_size()).tensor().view(value.dtype).view(value.shape)
    room.copy_(value)
    return room


def memory_of(value: Tensor) -> Memory | None:
    """Return the memory that a contiguous tensor fills, None where it lies elsewhere."""
    memory = _LIVE.get(value.data_ptr())
    whole = memory is not None and value.is_contiguous() and value.numel() * value.element_size() == len(memory)
    return memory if whole else None
