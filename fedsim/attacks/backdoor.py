r"""Backdoor: attackers teach the model that a trigger in the input means one class.

Trigger: Gu et al., 2017 (BadNets), a bright square in a corner. https://arxiv.org/abs/1708.06733
Boosting: Bagdasaryan et al., AISTATS 2020, eq. 3 (model replacement). https://arxiv.org/abs/1807.00459
    Δ_k = γ Δ_k^{poisoned},   γ = K / η replaces the model, η the server's rate
The test samples of all other classes get triggered copies, the split `backdoor`: its accuracy, `backdoor_accuracy` in
rounds.jsonl, is the attack's success rate. Nothing chooses by it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.attacks.contract import View, positive
from fedsim.contracts import Dataset, Partition, State
from fedsim.errors import UserError
from fedsim.rng import keyed_bits, segment_permutations

SPLIT = "backdoor"


@dataclass(frozen=True, kw_only=True)
class Backdoor:
    """A square of pixels, or the last features of other inputs, means `target`.

    Args:
        target: class ≥ 0 that the trigger means.
        poisoned_fraction: share of each attacker's training samples with the trigger, in (0, 1].
        trigger_size: edge ≥ 1 of the square in the last rows and columns of an image; number of features otherwise.
        trigger_value: what the trigger sets inputs to; None: the largest input of the training samples.
        boost: γ > 0, factor on the attackers' updates; 1 sends them as trained.

    Raises:
        ValueError: an argument out of its range.

    """

    target: int = 0
    poisoned_fraction: float = 0.5
    trigger_size: int = 3
    trigger_value: float | None = None
    boost: float = 1.0

    def __post_init__(self) -> None:
        if self.target < 0:
            raise ValueError(f"target must be a class >= 0, got {self.target}")
        if not 0 < self.poisoned_fraction <= 1:
            raise ValueError(f"poisoned_fraction must be in (0, 1], got {self.poisoned_fraction}")
        if self.trigger_size < 1:
            raise ValueError(f"trigger_size must be >= 1, got {self.trigger_size}")
        if self.trigger_value is not None and not math.isfinite(self.trigger_value):
            raise ValueError(f"trigger_value must be finite, got {self.trigger_value}; null takes the largest input")
        positive("boost", self.boost, "1.0 sends the update as trained")

    @property
    def sends_rows(self) -> bool:
        """Whether updates are changed too."""
        return self.boost != 1.0

    def rows(self, view: View, state: State) -> tuple[Tensor, State]:
        """Return γ times the attackers' updates (F, D)."""
        return self.boost * view.own, state

    def poison(self, dataset: Dataset, partition: Partition, seed: int) -> Dataset:
        """Return the data set with triggered training samples and the split of triggered test samples.

        Raises:
            UserError: the inputs are tokens or smaller than the trigger, or there is no such class.

        """
        self._check(dataset)
        chosen = self._chosen(partition, seed)  # (M,)
        test = dataset.splits["test"]
        others = torch.from_numpy(test[dataset.y.numpy()[test] != self.target])  # (T,)
        value = self.trigger_value
        if value is None:
            value = float(dataset.x[torch.from_numpy(dataset.splits["train"])].max())
        x = torch.cat([dataset.x, dataset.x[others]])  # (N + T, …)
        y = torch.cat([dataset.y, torch.full_like(others, self.target)])  # (N + T,)
        added = np.arange(len(dataset.x), len(x))  # (T,)
        self._stamp(x, torch.cat([chosen, torch.from_numpy(added)]), value)
        y[chosen] = self.target
        columns = {name: getattr(dataset, name) for name in ("client", "domain")}
        grown: dict[str, Any] = {
            n: np.concatenate([c, np.full(len(added), -1)]) for n, c in columns.items() if c is not None
        }
        return dataset._replace(x=x, y=y, splits={**dataset.splits, SPLIT: added}, **grown)

    def _check(self, dataset: Dataset) -> None:
        shape = tuple(dataset.x.shape[1:])
        if not dataset.x.is_floating_point():
            raise UserError("attack=backdoor needs images or features, and this data is tokens")
        if self.trigger_size > min(shape[-2:]):
            raise UserError(f"attack.trigger_size={self.trigger_size} does not fit inputs of shape {shape}")
        if self.target >= dataset.num_classes:
            raise UserError(f"attack.target must be below the number of classes, {dataset.num_classes}")

    def _chosen(self, partition: Partition, seed: int) -> Tensor:
        """Draw each attacker's poisoned samples, keyed by the client; return their positions (M,)."""
        sizes = partition.sizes  # (K,)
        order = segment_permutations(keyed_bits(seed, "backdoor", np.arange(len(sizes))), sizes)
        rank = np.arange(len(order)) - np.repeat(partition.offsets[:-1], sizes)  # within the client
        wanted = np.floor(self.poisoned_fraction * sizes + 0.5)  # (K,)
        return torch.from_numpy(partition.indices[order[rank < np.repeat(wanted, sizes)]])

    def _stamp(self, x: Tensor, samples: Tensor, value: float) -> None:
        """Write the trigger into samples (n,) of x (N, …), in place."""
        size = self.trigger_size
        if x.dim() >= 4:
            x[samples, ..., -size:, -size:] = value
        else:
            x[samples, ..., -size:] = value
