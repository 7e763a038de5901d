"""Other domains: what a sample is replaced by. Called with (data set, true labels (N,), seed), they return x (N, …)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Dataset
from fedsim.errors import UserError
from fedsim.rng import generator


@dataclass(frozen=True, kw_only=True)
class Inverted:
    """Every input x becomes lowest + highest − x over the data: dark digits on light paper."""

    def __call__(self, dataset: Dataset, labels: Tensor, seed: int) -> Tensor:
        """Return the negatives (N, …)."""
        return dataset.x.min() + dataset.x.max() - dataset.x


@dataclass(frozen=True, kw_only=True)
class Rotated:
    """Images turned by quarter turns.

    Args:
        turns: counter-clockwise, in 1 … 3; odd ones need square images.

    Raises:
        ValueError: turns are out of range.

    """

    turns: int = 1

    def __post_init__(self) -> None:
        if self.turns not in (1, 2, 3):
            raise ValueError(f"turns must be 1, 2 or 3 quarter turns, got {self.turns}")

    def __call__(self, dataset: Dataset, labels: Tensor, seed: int) -> Tensor:
        """Return the turned images (N, C, H, W).

        Raises:
            UserError: inputs are no images.

        """
        if dataset.x.dim() != 4:
            shape = tuple(dataset.x.shape[1:])
            raise UserError(f"shift=rotated needs images (C, H, W), inputs have the shape {shape}; use shift=permuted")
        return torch.rot90(dataset.x, self.turns, (-2, -1))


@dataclass(frozen=True, kw_only=True)
class Permuted:
    """The features of all samples in one other order, drawn from the seed: permuted MNIST (Goodfellow et al., 2013)."""

    def __call__(self, dataset: Dataset, labels: Tensor, seed: int) -> Tensor:
        """Return the samples (N, …) with their features permuted, channels included."""
        flat = dataset.x.flatten(1)  # (N, F)
        order = generator(seed, "shift/permuted").permutation(flat.shape[1])  # (F,)
        return flat[:, torch.from_numpy(order)].view_as(dataset.x)


@dataclass(frozen=True, kw_only=True)
class Other:
    """Samples of another data set, of the same class and split: of its test split where a sample is one for testing.

    Within a class samples are dealt out in keyed order, again from the first when they are used up.

    Args:
        data: with samples of the same shape, e.g. {_target_: fedsim.data.npz.npz, path: svhn.npz}.

    """

    data: Dataset

    def __call__(self, dataset: Dataset, labels: Tensor, seed: int) -> Tensor:
        """Return samples (N, …) of the other data set.

        Raises:
            UserError: shapes differ, or it has no sample of a class.

        """
        mine, theirs = tuple(dataset.x.shape[1:]), tuple(self.data.x.shape[1:])
        if mine != theirs:
            raise UserError(f"shift.domain.data has samples of shape {theirs}, the data of shape {mine}; resize them")
        test = np.zeros(len(labels), dtype=bool)  # (N,)
        test[dataset.splits.get("test", [])] = True
        found = torch.empty_like(dataset.x)  # (N, …)
        ours, other = labels.cpu().numpy(), self.data.y.cpu().numpy()
        for number, split in enumerate(("train", "test")):
            pool = np.asarray(self.data.splits[split])  # (M,)
            for c in np.unique(ours):
                wanted = np.flatnonzero((ours == c) & (test == (split == "test")))
                has = pool[other[pool] == c]
                if not len(wanted):
                    continue
                if not len(has):
                    raise UserError(f"shift.domain.data has no sample of class {c} in its split {split}")
                rng = generator(seed, "shift/other", number, int(c))
                dealt = rng.permutation(has)[np.arange(len(wanted)) % len(has)]
                found[torch.from_numpy(wanted)] = self.data.x[torch.from_numpy(dealt)].to(found)
        return found
