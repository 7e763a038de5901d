"""What every data set must be, whoever made it: checked once, before anything is drawn or trained."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from fedsim.contracts import Dataset
from fedsim.errors import UserError


def check_dataset(dataset: Dataset) -> Dataset:
    """Return the data set if it keeps the contract; its splits may be any sequences of integers, and become arrays.

    One pass over the inputs and no copy of them.

    Raises:
        UserError: the first rule that is broken, with the value that broke it and the cure.

    """
    if not isinstance(dataset, Dataset):
        raise UserError(f"data: a source must return a fedsim.contracts.Dataset, got {type(dataset).__name__}")
    _check_arrays(dataset)
    if not all(isinstance(positions, np.ndarray) for positions in dataset.splits.values()):
        dataset = dataset._replace(splits={name: _positions(name, given) for name, given in dataset.splits.items()})
    _check_splits(dataset)
    _check_labels(dataset)
    _check_inputs(dataset)
    return dataset


def _check_arrays(dataset: Dataset) -> None:
    x, y = dataset.x, dataset.y
    for name, value in (("x", x), ("y", y)):
        if not isinstance(value, torch.Tensor):
            kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
            raise UserError(f"data: {name} must be a torch tensor, got {kind}; write torch.as_tensor({name})")
    if x.dtype not in (torch.float32, torch.float64, torch.int64) or x.dim() < 2:
        raise UserError(
            f"data: x must be a torch tensor (N, …) float32, or int64 tokens; got {tuple(x.shape)} {_name(x.dtype)}"
        )
    if y.dtype != torch.int64 or y.dim() != 1:
        raise UserError(f"data: y must be a torch tensor (N,) int64 classes, got {tuple(y.shape)} {_name(y.dtype)}")
    for name in ("y", "client", "domain"):
        value = getattr(dataset, name)
        if value is not None and len(value) != len(x):
            raise UserError(f"data: {name} must have one entry a sample: x has {len(x)}, {name} {len(value)}")
    for name, names in (("client", dataset.client_names), ("domain", None)):
        value = getattr(dataset, name)
        if value is None:
            continue
        if value.dtype != np.int64 or value.ndim != 1:
            raise UserError(f"data: {name} must be (N,) int64, got {value.shape} {value.dtype}")
        if len(value) and (value.min() < -1 or (names is not None and value.max() >= len(names))):
            limit = "" if names is None else f" … {len(names) - 1}"
            raise UserError(f"data: {name} must be −1 (none) or 0{limit}, got {value.min()} … {value.max()}")


def _positions(name: str, given: Any) -> Any:
    """Return a range, a list or a tensor of positions as an array (n,) int64; an array as it is."""
    if isinstance(given, np.ndarray):
        return given
    try:
        array = np.asarray(given)
    except ValueError:  # of ragged lists
        array = np.empty(0, dtype=object)
    if array.dtype.kind not in "iu" and not (array.size == 0 and array.dtype.kind == "f"):
        raise UserError(f"data: split {name!r} must be (n,) int64 positions, got a {type(given).__name__} of others")
    return array.astype(np.int64)


def _check_splits(dataset: Dataset) -> None:
    num_samples, splits = len(dataset.x), dataset.splits
    for name in ("train", "test"):
        if name not in splits or not len(splits[name]):
            raise UserError(f"data: the split {name!r} is {'empty' if name in splits else 'missing'}")
    owner = np.full(num_samples, -1, dtype=np.int8)  # (N,) number of the split that holds the sample
    names = tuple(splits)
    for number, (name, positions) in enumerate(splits.items()):
        if positions.dtype != np.int64 or positions.ndim != 1:
            raise UserError(f"data: split {name!r} must be (n,) int64 positions, got {positions.dtype}")
        if positions.min(initial=0) < 0 or positions.max(initial=-1) >= num_samples:
            raise UserError(f"data: split {name!r} has a position outside 0 … {num_samples - 1}")
        taken = owner[positions] >= 0  # (n,)
        if taken.any():
            first = names[owner[positions[taken]][0]]
            raise UserError(f"data: the splits {first!r} and {name!r} share sample {positions[taken][0]}")
        owner[positions] = number
        if np.count_nonzero(owner == number) < len(positions):
            raise UserError(f"data: split {name!r} holds a sample twice")


def _check_labels(dataset: Dataset) -> None:
    y, num_classes = dataset.y, dataset.num_classes
    if num_classes < 2:
        raise UserError(f"data: a classification needs at least 2 classes, got num_classes={num_classes}")
    low, high = int(y.min()), int(y.max())
    if low < 0 or high >= num_classes:
        row = int(((y < 0) | (y >= num_classes)).nonzero()[0])
        raise UserError(
            f"data: labels must be in 0 … {num_classes - 1}, got {low} … {high} (first at sample {row}); "
            "number the classes from 0, or set the number of classes"
        )
    if dataset.class_names is not None and len(dataset.class_names) != num_classes:
        raise UserError(f"data: {num_classes} classes but {len(dataset.class_names)} class_names")


def _check_inputs(dataset: Dataset) -> None:
    x = dataset.x
    if not x.numel():
        raise UserError(f"data: samples are empty, x has shape {tuple(x.shape)}")
    low, high = torch.aminmax(x)  # NaN and infinities show in these two, without an (N, …) mask
    if x.dtype == torch.int64:
        if low < 0:
            raise UserError(f"data: tokens must be ≥ 0, got {int(low)}")
    elif not bool(torch.isfinite(low) & torch.isfinite(high)):
        row = int((~torch.isfinite(x.flatten(1))).any(1).nonzero()[0])
        raise UserError(f"data: inputs must be finite: sample {row} holds NaN or infinity; clean or impute it")


def _name(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")
