"""What clients keep between their rounds: control variates, personal parameters, error feedback."""

from __future__ import annotations

import math
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.local import Int64

MEMORY = 1 << 30  # bytes of all clients' state up to which it is held in memory


class ClientStore:
    """Per-client tensors, filled on first touch: arrays in memory, or records of a file where those would be too large.

    Clients that were never touched cost nothing: arrays are allocated zeroed, which the operating system does lazily,
    the file is sparse, and a first value that is not zero is put in when the client is seen. The file is read and
    written by records instead of mapped, since pages of a mapping count as the process's memory until somebody else
    wants it. It has no name, so that nothing is left of it when the process is killed: checkpoints hold the truth.

    Args:
        num_clients: all clients that can be sampled.
        first: name → a client's value before its first round, of fixed shape.
        memory: bytes up to which the state of all clients is held in memory, ≥ 0.

    """

    def __init__(self, num_clients: int, first: Mapping[str, Tensor], *, memory: int = MEMORY) -> None:
        self.first = {name: value.detach().cpu() for name, value in first.items()}
        self.touched = np.zeros(num_clients, dtype=bool)
        self.changed = np.zeros(num_clients, dtype=bool)  # since somebody looked last, and made it False
        self.record = sum(value.nbytes for value in self.first.values())  # bytes of a client's state
        self.memory = memory
        self.paged = num_clients * self.record > memory
        self.folder: Path | None = None  # where a file is made; None: the system's for temporary files
        self._file: Any = None
        self.arrays: dict[str, Tensor] = {}  # name → (num_clients, …), where they are in memory
        if not self.paged:
            shapes = {name: (num_clients, *value.shape) for name, value in self.first.items()}
            self.arrays = {name: torch.zeros(shapes[name], dtype=value.dtype) for name, value in self.first.items()}

    @property
    def layouts(self) -> dict[str, tuple[int, ...]]:
        """Shape of each name."""
        return {name: tuple(value.shape) for name, value in self.first.items()}

    def get(self, clients: Int64, device: torch.device) -> dict[str, Tensor]:
        """Return name → (K, …) of clients: what they kept, or the first value."""
        if not self.first:
            return {}
        new = torch.from_numpy(~self.touched[clients])
        kept = self._read(clients) if self.paged else self._rows(clients)
        for name, value in kept.items():
            value[new] = self.first[name]
        return {name: value.to(device) for name, value in kept.items()}

    def put(self, clients: Int64, values: Mapping[str, Tensor]) -> None:
        """Keep name → (K, …) of clients."""
        if not values:
            return
        held = {name: value.detach().to("cpu", self.first[name].dtype) for name, value in values.items()}
        if self.paged:
            known = held if len(held) == len(self.first) else self.get(clients, torch.device("cpu"))
            self._write(clients, known | held)
        else:
            rows = torch.from_numpy(clients)
            for name, value in held.items():
                self.arrays[name][rows] = value
        self.touched[clients] = self.changed[clients] = True

    def rows(self) -> tuple[Int64, dict[str, Tensor]]:
        """Return the clients touched so far (T,) and name → (T, …)."""
        clients = np.flatnonzero(self.touched)
        return clients, self.get(clients, torch.device("cpu"))

    def clear(self) -> None:
        """Forget all clients."""
        self.touched[:] = False
        self.changed[:] = False

    def _rows(self, clients: Int64) -> dict[str, Tensor]:
        rows = torch.from_numpy(clients)
        return {name: array.index_select(0, rows) for name, array in self.arrays.items()}

    def _open(self) -> Any:
        if self._file is None:
            self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115 (open as long as the store)
            weakref.finalize(self, self._file.close)
        return self._file

    def _read(self, clients: Int64) -> dict[str, Tensor]:
        records = np.zeros((len(clients), self.record), dtype=np.uint8)  # (K, bytes)
        file = self._open()
        for row in np.flatnonzero(self.touched[clients]).tolist():
            file.seek(int(clients[row]) * self.record)
            view = memoryview(records[row])
            while view and (count := file.readinto(view)):
                view = view[count:]
        kept, end = {}, 0
        for name, value in self.first.items():
            start, end = end, end + value.nbytes
            mine = torch.from_numpy(np.ascontiguousarray(records[:, start:end]))  # (K, bytes)
            kept[name] = mine.flatten().view(value.dtype).view(len(clients), *value.shape)  # (K, …)
        return kept

    def _write(self, clients: Int64, values: Mapping[str, Tensor]) -> None:
        file = self._open()
        shape = (len(clients), -1) if len(clients) else (0, 0)
        parts = [_bytes(values[name]).reshape(shape) for name in self.first]
        for row, client in enumerate(clients.tolist()):
            file.seek(client * self.record)
            for part in parts:
                view = memoryview(part[row])
                while view:
                    view = view[file.write(view) :]


def _bytes(value: Tensor) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Return a tensor's bytes, flat."""
    flat = value.contiguous().flatten()
    return (flat.view(torch.uint8) if math.prod(value.shape) else flat.new_empty(0, dtype=torch.uint8)).numpy()
