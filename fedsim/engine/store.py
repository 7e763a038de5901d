"""What clients keep between their rounds: control variates, personal parameters, error feedback."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from fedsim.local import Int64


class ClientStore:
    """Per-client tensors, one array a name, filled on first touch.

    Pages of untouched clients cost nothing: arrays are allocated zeroed, which the operating system does lazily,
    and a first value that is not zero is written when the client is first seen.

    Args:
        num_clients: all clients that can be sampled.
        first: name → a client's value before its first round, of fixed shape.

    """

    def __init__(self, num_clients: int, first: Mapping[str, Tensor]) -> None:
        self.first = {name: value.detach().cpu() for name, value in first.items()}
        self.arrays = {
            name: torch.zeros((num_clients, *value.shape), dtype=value.dtype) for name, value in self.first.items()
        }
        self.touched = np.zeros(num_clients, dtype=bool)

    @property
    def layouts(self) -> dict[str, tuple[int, ...]]:
        """Shape of each name."""
        return {name: tuple(value.shape) for name, value in self.first.items()}

    def get(self, clients: Int64, device: torch.device) -> dict[str, Tensor]:
        """Return name → (K, …) of clients: what they kept, or the first value."""
        if not self.first:
            return {}
        new = torch.from_numpy(~self.touched[clients])
        rows = torch.from_numpy(clients)
        values = {}
        for name, array in self.arrays.items():
            value = array[rows]  # (K, …)
            value[new] = self.first[name]
            values[name] = value.to(device)
        return values

    def put(self, clients: Int64, values: Mapping[str, Tensor]) -> None:
        """Keep name → (K, …) of clients."""
        rows = torch.from_numpy(clients)
        for name, value in values.items():
            self.arrays[name][rows] = value.detach().to("cpu", self.arrays[name].dtype)
        if values:
            self.touched[clients] = True

    def rows(self) -> tuple[Int64, dict[str, Tensor]]:
        """Return the clients touched so far (T,) and name → (T, …): all that a checkpoint needs."""
        clients = np.flatnonzero(self.touched)
        rows = torch.from_numpy(clients)
        return clients, {name: array[rows] for name, array in self.arrays.items()}
