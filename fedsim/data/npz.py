"""Arrays in a NumPy `.npz` file: the shortest way to bring data of one's own."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fedsim.contracts import Dataset
from fedsim.data.files import find_file
from fedsim.errors import UserError, did_you_mean

REQUIRED = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("client_train", "client_test")


def npz(*, path: str | None = None, root: str | None = None, num_classes: int | None = None) -> Dataset:
    """Load `x_train y_train x_test y_test` and, where the data has natural clients, `client_train client_test`.

    Args:
        path: the file; see `fedsim.data.files.find_file` for where it is looked for. Pickled arrays are refused.
        root: folder of data sets; null: FEDSIM_DATA, else `data`.
        num_classes: C; null: the greatest label plus one.

    Returns:
        x (N, …): uint8 is taken for pixels and divided by 255, other integers for tokens (int64), numbers with
        a point become float32. y (N,). client (N,), numbered in order of the distinct values; test samples
        are −1 without `client_test`.

    Raises:
        UserError: no such file, not an .npz, or arrays that do not fit together.

    """
    file = find_file(path, root)
    arrays = _read(file)
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim < 2 or y.shape != x.shape[:1]:
            raise UserError(f"{file}: x_{part} must be (N, …) and y_{part} (N,), got {x.shape} and {y.shape}")
        if y.dtype.kind not in "iu":
            raise UserError(f"{file}: y_{part} must be integers 0 … C−1, got {y.dtype}")
    one, other = arrays["x_train"], arrays["x_test"]
    if one.shape[1:] != other.shape[1:] or one.dtype != other.dtype:
        raise UserError(
            f"{file}: x_train {one.dtype} {one.shape} and x_test {other.dtype} {other.shape} differ in one sample"
        )
    y = np.concatenate([arrays["y_train"], arrays["y_test"]]).astype(np.int64)  # (N,)
    client, client_names = _clients(file, arrays, len(one), len(other))
    positions = np.arange(len(y), dtype=np.int64)
    return Dataset(
        x=_inputs(file, one, other),
        y=torch.from_numpy(y),
        splits={"train": positions[: len(one)], "test": positions[len(one) :]},
        num_classes=int(y.max(initial=0)) + 1 if num_classes is None else num_classes,
        client=client,
        client_names=client_names,
    )


def _read(file: Path) -> dict[str, npt.NDArray[Any]]:
    try:
        with np.load(file, allow_pickle=False) as archive:
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise UserError(f"{file} holds one array; an .npz with {', '.join(REQUIRED)} is needed")
            for name in REQUIRED:
                if name not in archive.files:
                    raise UserError(f"{file} has no array {name!r}{did_you_mean(name, archive.files)}")
            return {name: archive[name] for name in (*REQUIRED, *OPTIONAL) if name in archive.files}
    except (ValueError, OSError, zipfile.BadZipFile, EOFError) as error:
        if isinstance(error, UserError):
            raise
        # NumPy's own words suggest allow_pickle, which would run whatever code the file holds.
        raise UserError(f"{file} is not a readable .npz archive of arrays (without pickled objects)") from error


def _inputs(file: Path, train: npt.NDArray[Any], test: npt.NDArray[Any]) -> Tensor:
    kind = train.dtype.kind
    if kind not in "fiub":
        raise UserError(f"{file}: x_train must be numbers, got {train.dtype}")
    target = torch.float32 if kind in "fb" or train.dtype == np.uint8 else torch.int64
    # torch's memory, of small pages: NumPy asks for large ones, which a system may first have to put together.
    x = torch.empty((len(train) + len(test), *train.shape[1:]), dtype=target)  # (N, …)
    for given, place in ((train, x[: len(train)]), (test, x[len(train) :])):
        place.numpy()[...] = given
        if train.dtype == np.uint8:
            place.div_(255)
    return x


def _clients(
    file: Path, arrays: dict[str, npt.NDArray[Any]], num_train: int, num_test: int
) -> tuple[npt.NDArray[np.int64] | None, tuple[str, ...] | None]:
    if "client_train" not in arrays:
        return None, None
    given = [arrays[name] for name in OPTIONAL if name in arrays]
    for name, value, length in zip(OPTIONAL, given, (num_train, num_test), strict=False):
        if value.shape != (length,) or value.dtype.kind not in "iuUS":
            raise UserError(f"{file}: {name} must be ({length},) integers or text, got {value.dtype} {value.shape}")
    names, codes = np.unique(np.concatenate(given), return_inverse=True)
    client = np.full(num_train + num_test, -1, dtype=np.int64)  # (N,)
    client[: len(codes)] = codes
    return client, tuple(str(name) for name in names)
