"""An object apart from its arrays: how a task and a round reach the workers of one run.

What is pickled here goes from a run to its own workers and is never read from a file; arrays travel beside it, through
shared memory or an object store, and nobody copies them into the text.
"""

from __future__ import annotations

import io
import pickle
import traceback
import warnings
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

SMALL = 1 << 12  # bytes of a NumPy array below which it stays in the text


class Parcel(NamedTuple):
    """An object without its arrays, and the arrays."""

    text: bytes
    arrays: list[Tensor]  # on the CPU, contiguous


class _Aside:
    """Of a pickler: puts arrays aside, each once, however often the object holds it."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)  # type: ignore[call-arg]  # the pickler's
        self.arrays: list[Tensor] = []
        self._seen: dict[int, tuple[Any, int]] = {}  # the object too, so that its id stays its own

    def persistent_id(self, value: Any) -> Any:
        """Return what stands for an array in the text, None for anything else."""
        if type(value) is Tensor and value.layout is torch.strided and not value.requires_grad:
            return "tensor", self._aside(value, value), value.device.type != "cpu"
        if type(value) is np.ndarray and value.nbytes >= SMALL and value.dtype.kind in "iufb":
            return "array", self._aside(value, value), False
        return None

    def _aside(self, value: Any, array: Any) -> int:
        if id(value) not in self._seen:
            self._seen[id(value)] = (value, len(self.arrays))
            held = torch.from_numpy(np.array(array)) if isinstance(array, np.ndarray) else array.detach()
            self.arrays.append(held.cpu().contiguous())
        return self._seen[id(value)][1]


class _Unpacker(pickle.Unpickler):
    def __init__(self, parcel: Parcel, device: torch.device) -> None:
        super().__init__(io.BytesIO(parcel.text))
        self._arrays, self._device = parcel.arrays, device

    def persistent_load(self, pid: Any) -> Any:
        """Return an array of the parcel."""
        kind, number, placed = pid
        value = self._arrays[number]
        if kind == "array":
            return value.numpy()
        return value.to(self._device) if placed else value


def pack(value: Any, pickler: type = pickle.Pickler) -> Parcel:
    """Put an object and its arrays apart.

    Args:
        value: the object.
        pickler: what writes the text, e.g. cloudpickle's, which takes lambdas too.

    Raises:
        Exception: something in it cannot be pickled, as pickle says it.

    """
    file = io.BytesIO()
    packer: Any = type("_Packer", (_Aside, pickler), {})(file)
    packer.dump(value)
    return Parcel(file.getvalue(), packer.arrays)


def unpack(parcel: Parcel, device: torch.device) -> Any:
    """Return the object, its arrays views of the parcel's: read-only by agreement.

    Args:
        parcel: from `pack`.
        device: where tensors go that were on an accelerator.

    """
    return _Unpacker(parcel, device).load()


ALIGNMENT = 64  # bytes; kernels may take another path, and give other bits, for arrays that begin elsewhere


class Spec(NamedTuple):
    """Where an array lies in a buffer of bytes."""

    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def specify(arrays: Sequence[Tensor]) -> tuple[list[Spec], int]:
    """Return where arrays lie when stored one after another, and the bytes that they take."""
    specs, end = [], 0
    for array in arrays:
        specs.append(Spec(end, tuple(array.shape), array.dtype))
        end += -(-array.numel() * array.element_size() // ALIGNMENT) * ALIGNMENT
    return specs, end


def view(buffer: Tensor, spec: Spec) -> Tensor:
    """Return an array that lies in a buffer (B,) uint8."""
    count = spec.dtype.itemsize
    for length in spec.shape:
        count *= length
    return buffer[spec.offset : spec.offset + count].view(spec.dtype).view(spec.shape)


Bytes = tuple[np.ndarray[Any, np.dtype[np.uint8]], tuple[int, ...], torch.dtype]


def to_bytes(value: Tensor) -> Bytes:
    """Return a tensor as what any pipe takes; NumPy itself knows no bfloat16."""
    return value.cpu().contiguous().view(-1).view(torch.uint8).numpy(), tuple(value.shape), value.dtype


def from_bytes(sent: Bytes) -> Tensor:
    """Return the tensor of `to_bytes`, over the same memory: read-only by agreement."""
    text, shape, dtype = sent
    if not text.size:
        return torch.empty(shape, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch knows no read-only tensors, an object store gives no other arrays
        return torch.from_numpy(text).view(dtype).view(shape)


def sendable(error: BaseException) -> BaseException:
    """Return an exception that another process can raise again: itself, or its text where it cannot be pickled."""
    trace = "".join(traceback.format_exception(error))
    try:
        again = pickle.loads(pickle.dumps(error))
        whole = type(again) is type(error) and str(again) == str(error)
    except Exception:
        whole = False
    if not whole:
        error = RuntimeError(f"{type(error).__name__}: {error}" if str(error) else type(error).__name__)
    error.__cause__ = error.__context__ = None
    error.add_note(f"in a worker:\n{trace}")
    return error
