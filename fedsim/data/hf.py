"""Data sets of Hugging Face, by hub name or from local files: images, or columns of numbers.

`data=mnist data.root=../shared/data` reads `../shared/data/mnist/{train,test}.parquet` with pyarrow alone; the
package `datasets` is imported only for what it must read, because importing it takes a second. Decoded images
are cached (`fedsim.data.cache`): MNIST takes 2 s to decode and 0.1 s to load again.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fedsim.contracts import Dataset
from fedsim.data.augment import Augment
from fedsim.data.cache import cached
from fedsim.data.holdout import stratified_holdout
from fedsim.data.images import decode, normalise_into, statistics
from fedsim.data.tables import Table, check_columns, class_names, open_split
from fedsim.errors import UserError

Int64 = npt.NDArray[np.int64]


def hf(  # noqa: PLR0913  one argument a key of the config
    *,
    name: str | None = None,
    root: str | None = None,
    config: str | None = None,
    image: str | None = None,
    features: Sequence[str] | None = None,
    label: str = "label",
    client: str | None = None,
    domain: str | None = None,
    train_split: str = "train",
    test_split: str | None = "test",
    test_fraction: float = 0.2,
    split_seed: int = 0,
    size: Sequence[int] | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    augment: Augment | None = None,
) -> Dataset:
    """Load a data set of images or of numbers.

    Args:
        name: hub name or folder; see `fedsim.data.tables.open_split` for where it is looked for.
        root: folder of data sets, and nothing else is searched; null: FEDSIM_DATA, else `data`, then the hub.
        config: configuration of a data set that has several.
        image: column of images.
        features: columns of numbers, or of lists of numbers of one length, instead of images.
        label: column of the class: integers from 0, or text, which is numbered in order.
        client: column of the natural client; null: none.
        domain: column of the domain; null: none.
        train_split: name of the split to train on.
        test_split: name of the test split; null: the data has none, and a part of train_split is held out.
        test_fraction: of that part, stratified by (client, class); 0 < test_fraction < 1.
        split_seed: of that split. It is not the run's seed: all runs share one test set.
        size: [height, width] to resize images to; null: as they are.
        mean: of each channel, in units of [0, 1]; null: over the training images.
        std: of each channel; null: over the training images.
        augment: changes training samples when they are gathered; null: none.

    Returns:
        x (N, C, H, W) float32 normalised images or (N, F) numbers as they are, training rows first; y (N,).

    Raises:
        UserError: nothing of that name, no such split or column, an undecodable image, an extra not installed.
        ValueError: an argument is out of its range.

    """
    if not name:
        raise UserError("data.name is needed: a data set of the hub, or a folder in data.root")
    if (image is None) == (features is None):
        raise UserError("data.image or data.features is needed, one of them: the columns that hold the inputs")
    if size is not None and (len(size) != 2 or min(size) < 1):
        raise ValueError(f"size must be [height, width], both ≥ 1, or null; got {list(size)}")
    tables = [open_split(name, config, split, root) for split in (train_split, test_split) if split is not None]
    inputs = [("image", image)] if features is None else [("features", column) for column in features]
    wanted = {"label": label, "client": client, "domain": domain}
    for table in tables:
        check_columns(table, [*wanted.items(), *inputs])

    columns = [_columns(tables, column) for column in wanted.values()]
    y, label_names = _classes(columns[0], label, class_names(tables[0], label))
    (natural, client_names), (domains, _) = (_codes(column) for column in columns[1:])
    num_train = tables[0].num_rows
    if test_split is None:
        strata = [y] if natural is None else [natural, y]
        splits = stratified_holdout(*strata, fraction=test_fraction, seed=split_seed)
    else:
        positions = np.arange(len(y), dtype=np.int64)  # (N,)
        splits = {"train": positions[:num_train], "test": positions[num_train:]}
    return Dataset(
        x=_numbers(tables, features or ())
        if image is None
        else _images(tables, image, splits["train"], size, (mean, std)),
        y=torch.from_numpy(y),
        splits=splits,
        num_classes=len(label_names),
        client=natural,
        domain=domains,
        class_names=label_names,
        client_names=client_names,
        augment=augment,
    )


def _columns(tables: Sequence[Table], name: str | None) -> npt.NDArray[Any] | None:
    """Return one column of all splits (N,), or None without a name."""
    if name is None:
        return None
    parts = [table.columns([name]).column(0) for table in tables]
    if any(part.null_count for part in parts):
        raise UserError(f"data: the column {name!r} has empty rows")
    return np.concatenate([part.to_numpy() for part in parts])


def _classes(
    values: npt.NDArray[Any] | None, label: str, names: tuple[str, ...] | None
) -> tuple[Int64, tuple[str, ...]]:
    if values is None or not len(values):
        raise UserError(f"data.label: the column {label!r} is empty")
    if values.dtype.kind in "iub":
        y = values.astype(np.int64)  # (N,)
        return y, names or tuple(str(c) for c in range(int(y.max()) + 1))
    if values.dtype.kind not in "OUS" or not isinstance(values[0], str):
        raise UserError(f"data.label: the column {label!r} must hold integers or text, got {values.dtype}")
    distinct, y = np.unique(values.astype(str), return_inverse=True)
    return y.astype(np.int64), tuple(str(name) for name in distinct)


def _codes(values: npt.NDArray[Any] | None) -> tuple[Int64 | None, tuple[str, ...] | None]:
    """Return the number (N,) of each value among the distinct ones in order, and their names."""
    if values is None:
        return None, None
    distinct, codes = np.unique(values.astype(str) if values.dtype == object else values, return_inverse=True)
    return codes.astype(np.int64), tuple(str(name) for name in distinct)


def _images(
    tables: Sequence[Table],
    image: str,
    train: Int64,
    size: Sequence[int] | None,
    moments: tuple[Sequence[float] | None, Sequence[float] | None],
) -> Tensor:
    resize = None if size is None else (int(size[0]), int(size[1]))
    parts = []  # each (n, H, W, C) uint8
    for table in tables:
        key = {"rows": table.fingerprint, "image": image, "size": resize, "version": 1}
        parts.append(cached("images", key, partial(_decode, table, image, resize)))
    if len({part.shape[1:] for part in parts}) > 1:
        raise UserError(
            f"data: training and test images differ in shape, {[part.shape[1:] for part in parts]}; set data.size"
        )
    channels = parts[0].shape[-1]
    if None in moments:
        fitted = statistics(parts[0] if len(tables) > 1 else parts[0][train])
        mean, std = (f if m is None else _channel(m, channels) for m, f in zip(moments, fitted, strict=True))
    else:
        mean, std = (_channel(m, channels) for m in moments)
    if not bool((std > 0).all()):
        raise ValueError(f"std must be > 0 in every channel, got {std.tolist()}")
    height, width = parts[0].shape[1:3]
    x = torch.empty(sum(len(part) for part in parts), channels, height, width)  # (N, C, H, W)
    start = 0
    for part in parts:
        normalise_into(x[start : start + len(part)], part, mean, std)
        start += len(part)
    return x


def _decode(table: Table, image: str, size: tuple[int, int] | None) -> npt.NDArray[np.uint8]:
    return decode(table.batches(image), table.num_rows, size)


def _channel(values: Sequence[float] | None, channels: int) -> Tensor:
    if values is None or len(values) != channels:
        raise ValueError(f"mean and std must have {channels} numbers, one a channel; got {values}")
    return torch.tensor([float(value) for value in values])  # (C,)


def _numbers(tables: Sequence[Table], features: Sequence[str]) -> Tensor:
    blocks = []
    for name in features:
        parts = [_matrix(table.columns([name]).column(0).combine_chunks(), name) for table in tables]
        if len({part.shape[1] for part in parts}) > 1:
            raise UserError(f"data.features: {name!r} differs in length between training and test")
        blocks.append(np.concatenate(parts))  # (N, f)
    return torch.from_numpy(np.concatenate(blocks, axis=1))


def _matrix(column: pa.Array, name: str) -> npt.NDArray[np.float32]:
    rows = len(column)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type) or pa.types.is_fixed_size_list(column.type):
        column = column.flatten()
    if not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)):
        raise UserError(f"data.features: {name!r} must hold numbers or lists of numbers, got {column.type}")
    values: npt.NDArray[np.float32] = column.to_numpy(zero_copy_only=False).astype(np.float32)
    if rows == 0 or len(values) % rows:
        raise UserError(f"data.features: the lists in {name!r} must have one length")
    return values.reshape(rows, -1)  # (n, f)
