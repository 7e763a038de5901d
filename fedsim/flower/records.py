"""Flower's records and messages as views of flat tensors that materialise only where somebody reads them.

A message costs 6 µs and a reply 23 µs; serialising arrays costs milliseconds. Flower's own strategies read
NumPy arrays, which come straight from the cohort's rows; fedsim's shell reads the cohort and builds nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, cast, overload

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from torch import Tensor

from fedsim.contracts import Cohort
from fedsim.layout import Layout

NDArray = npt.NDArray[Any]
ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"  # Flower's customary record names
BROADCAST = "broadcast"  # what a rule sends beside the model
NUM_EXAMPLES, SERVER_ROUND = "num-examples", "server-round"


class LazyArray(Array):
    """An `Array` that serialises only when its bytes are read, and hands NumPy a fresh copy without them."""

    def __init__(self, dtype: str, shape: tuple[int, ...], read: Callable[[], NDArray]) -> None:
        self.__dict__.update(dtype=dtype, shape=shape, stype="numpy.ndarray", _read=read, _bytes=None)

    @property
    def data(self) -> bytes:
        """The array in NumPy's file format."""
        if self.__dict__["_bytes"] is None:
            self.__dict__["_bytes"] = Array(self.__dict__["_read"]()).data
        return cast(bytes, self.__dict__["_bytes"])

    @data.setter
    def data(self, value: bytes) -> None:
        self.__dict__.update(_bytes=value, _read=None)

    @property
    def intact(self) -> bool:
        """Whether it is still what it was built over."""
        return self.__dict__["_read"] is not None

    def numpy(self) -> NDArray:
        """Return a copy that the caller owns: some strategies subtract in place."""
        return cast(NDArray, self.__dict__["_read"]()) if self.intact else super().numpy()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Array):
            return NotImplemented
        return (self.dtype, self.shape, self.stype, self.data) == (other.dtype, other.shape, other.stype, other.data)

    __hash__ = None  # type: ignore[assignment]

    def __reduce__(self) -> tuple[type[Array], tuple[Any, ...]]:
        return Array, (self.dtype, self.shape, self.stype, self.data)


class FlatRecord(ArrayRecord):
    """A flat (D,) tensor as an `ArrayRecord`, one lazy array a parameter."""

    def __init__(self, flat: Tensor, layout: Layout) -> None:
        super().__init__()
        _fill(self, layout, flat.dtype, lambda columns: to_numpy(flat[columns]))
        self.__dict__.update(_layout=layout, _flat=flat)

    @property
    def layout(self) -> Layout:
        """Names and shapes as they were built."""
        return cast(Layout, self.__dict__["_layout"])

    @property
    def flat(self) -> Tensor | None:
        """The (D,) tensor, or None once somebody has changed the record."""
        flat = self.__dict__.get("_flat")
        untouched = flat is not None and all(isinstance(a, LazyArray) and a.intact for a in self.values())
        return flat if untouched else None

    def plain(self) -> ArrayRecord:
        """Return an `ArrayRecord` that can leave the process: Flower's wire format names the class."""
        return ArrayRecord({name: Array(array.numpy()) for name, array in self.items()})

    def __setitem__(self, key: str, value: Array) -> None:
        self.__dict__["_flat"] = None
        super().__setitem__(key, value)

    def __delitem__(self, key: str) -> None:
        self.__dict__["_flat"] = None
        super().__delitem__(key)


def row_record(start: Tensor, update: Tensor, layout: Layout) -> ArrayRecord:
    """Return what one client sends: start (D,) plus its update (D,), added when they are read."""
    # Not a FlatRecord: Flower warns when a strategy replaces a record by one of another class.
    record = ArrayRecord()
    _fill(record, layout, update.dtype, lambda columns: to_numpy(start[columns] + update[columns]))
    return record


def _fill(record: ArrayRecord, layout: Layout, dtype: torch.dtype, read: Callable[[slice], NDArray]) -> None:
    def reader(columns: slice, shape: tuple[int, ...]) -> Callable[[], NDArray]:
        return lambda: read(columns).reshape(shape)

    for (name, columns), shape in zip(layout.slices.items(), layout.shapes, strict=True):
        record[name] = LazyArray(str(dtype).removeprefix("torch."), shape, reader(columns, shape))


def to_numpy(tensor: Tensor) -> NDArray:
    """Copy a tensor to a NumPy array that shares no memory with it."""
    return np.array(tensor.detach().cpu().numpy())


def layout_of(record: ArrayRecord) -> Layout:
    """Return names and shapes of a record's arrays, in its order."""
    return Layout(tuple(record), tuple(tuple(array.shape) for array in record.values()))


def flatten(record: ArrayRecord, layout: Layout, like: Tensor | None = None) -> Tensor:
    """Return a record's arrays as a flat (D,) tensor in the order of a layout.

    Args:
        record: any `ArrayRecord` with exactly the layout's names, in any order. An untouched `FlatRecord` gives
            its own tensor, not a copy.
        layout: names and shapes.
        like: a tensor whose dtype and device the result takes; None: as the arrays are, at least float32.

    Raises:
        ValueError: names or shapes differ from the layout's.

    """
    if isinstance(record, FlatRecord) and (flat := record.flat) is not None and record.layout == layout:
        return flat
    if set(record) != set(layout.names):
        missing, unknown = sorted(set(layout.names) - set(record)), sorted(set(record) - set(layout.names))
        raise ValueError(f"arrays must be the model's: missing {missing}, unknown {unknown}")
    arrays = [record[name].numpy() for name in layout.names]
    for name, array, shape in zip(layout.names, arrays, layout.shapes, strict=True):
        if array.shape != shape:
            raise ValueError(f"array {name!r} must have shape {shape}, got {array.shape}")
    dtype = np.result_type(np.float32, *(a.dtype for a in arrays if a.dtype.kind == "f"))
    joined = [array.ravel().astype(dtype, copy=False) for array in arrays]
    flat = torch.from_numpy(np.concatenate([*joined, np.zeros(0, dtype)]))  # (D,)
    return flat if like is None else flat.to(like)


def broadcast_record(broadcast: Mapping[str, Any]) -> ArrayRecord:
    """Return what a rule sends beside the model; a number travels as a 0-d array."""
    return ArrayRecord({name: Array(to_numpy(torch.as_tensor(value))) for name, value in broadcast.items()})


@dataclass(frozen=True, kw_only=True, eq=False)
class TrainMessages(Sequence[Message]):
    """One round's messages to a cohort: all carry the same content, and none is built before it is looked at."""

    round: int
    nodes: Sequence[int]  # (K,) node ids, ascending
    arrays: FlatRecord  # the model
    config: Mapping[str, Any] = field(default_factory=dict)
    broadcast: Mapping[str, Any] = field(default_factory=dict)
    kind: str = MessageType.TRAIN
    _built: dict[int, Message] = field(default_factory=dict, repr=False)

    @cached_property
    def content(self) -> RecordDict:
        """What every client gets."""
        content = RecordDict(
            {ARRAYS: self.arrays.plain(), CONFIG: ConfigRecord({**self.config, SERVER_ROUND: self.round})}
        )
        if self.broadcast:
            content[BROADCAST] = broadcast_record(self.broadcast)
        return content

    def __len__(self) -> int:
        return len(self.nodes)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        index = range(len(self))[index]
        if index not in self._built:
            self._built[index] = Message(self.content, self.nodes[index], self.kind)
        return self._built[index]


@dataclass(frozen=True, kw_only=True, eq=False)
class CohortReplies(Sequence[Message]):
    """A trained cohort as the clients' replies, each built when it is looked at and kept, so that edits stay."""

    cohort: Cohort
    start: Tensor  # (D,) the weights all clients started from, or (K, D) one row a client
    request: Callable[[int], Message]  # k → the message that row k answers
    _built: dict[int, Message] = field(default_factory=dict, repr=False)

    @cached_property
    def _on_host(self) -> tuple[Tensor, Tensor]:
        """Weights sent and updates, brought from the device in one copy each."""
        return self.start.cpu(), self.cohort.rows.cpu()

    @cached_property
    def metrics(self) -> dict[str, list[float]]:
        """Name → (K,) numbers: weights, train_loss and whatever else is one number a client."""
        columns = {name: value.tolist() for name, value in self.cohort.extras.items() if value.dim() == 1}
        # Flower's own clients send counts as ints; an objective's weight may be a fraction.
        return {NUM_EXAMPLES: [int(n) if n.is_integer() else n for n in self.cohort.weights.tolist()], **columns}

    def __len__(self) -> int:
        return len(self.cohort)

    @overload
    def __getitem__(self, index: int) -> Message: ...
    @overload
    def __getitem__(self, index: slice) -> list[Message]: ...
    def __getitem__(self, index: int | slice) -> Message | list[Message]:
        if isinstance(index, slice):
            return [self[i] for i in range(len(self))[index]]
        k = range(len(self))[index]
        if k not in self._built:
            start, updates = self._on_host
            arrays = row_record(start if start.dim() == 1 else start[k], updates[k], self.cohort.layout)
            metrics = MetricRecord({name: values[k] for name, values in self.metrics.items()})
            self._built[k] = Message(RecordDict({ARRAYS: arrays, METRICS: metrics}), reply_to=self.request(k))
        return self._built[k]

    def __iter__(self) -> Iterator[Message]:
        return (self[k] for k in range(len(self)))
