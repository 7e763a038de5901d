"""What a Flower strategy remembers between rounds, as plain tensors, numbers and strings, for checkpoints.

Flower's strategies keep their state in attributes (FedAdam's moments, a wrapped strategy, an adaptive clipping
norm) and have no way to save it. Every attribute is stored by value; what is no value (a function, a logger, a
path) is left as the constructor made it, and must still be that when the strategy is stored.
"""

from __future__ import annotations

import enum
import functools
import random
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from torch import Tensor

from fedsim.contracts import State
from fedsim.flower.records import to_numpy

_RECORDS: dict[str, Any] = {kind.__name__: kind for kind in (ArrayRecord, MetricRecord, ConfigRecord, RecordDict)}
_SEQUENCES: dict[str, Any] = {kind.__name__: kind for kind in (list, tuple, set)}
_OPAQUE = (type, enum.Enum, functools.partial, types.FunctionType, types.BuiltinFunctionType, types.MethodType)

Opaque = Callable[[str, object], None]  # told of (path, value) for each part that has no value to store


def initial_parts(strategy: object) -> dict[str, object]:
    """Return the parts of a new strategy that cannot be stored, by path: what `capture` compares with later."""
    parts: dict[str, object] = {}
    _encode_object(strategy, type(strategy).__name__, parts.__setitem__, set())
    return parts


def capture(strategy: object, initial: dict[str, object] | None = None) -> State:
    """Return everything a strategy remembers.

    Args:
        strategy: any object whose state is in its attributes.
        initial: `initial_parts` of it when it was new; None: functions and classes are taken as unchanged, and
            anything else that cannot be stored is an error.

    Returns:
        Nested dicts with string keys of tensors, numbers and strings, copied.

    Raises:
        TypeError: an attribute changed to something that cannot be stored; the message names it.

    """

    def opaque(path: str, value: object) -> None:
        unchanged = isinstance(value, _OPAQUE) if initial is None else initial.get(path, opaque) is value
        if not unchanged:
            raise TypeError(
                f"{path} is a {type(value).__name__}, which a checkpoint cannot hold; keep arrays, numbers, strings, "
                "lists, dicts or Flower records there, or turn checkpoints off"
            )

    return _encode_object(strategy, type(strategy).__name__, opaque, set())


def restore(strategy: object, state: State) -> None:
    """Give a newly built strategy what `capture` returned for one built alike."""
    for name, encoded in state.items():
        setattr(strategy, name, _decode(encoded, getattr(strategy, name, None)))


def capture_record(record: RecordDict) -> State:
    """Return one `RecordDict`, e.g. a client's own state, as plain nested dicts."""
    encoded: State = _encode(record, "state", lambda path, value: None, set())  # records hold values only
    return encoded


def restore_record(state: State) -> RecordDict:
    """Return the `RecordDict` that `capture_record` stored."""
    record: RecordDict = _decode(state, None)
    return record


def _encode_object(value: object, path: str, opaque: Opaque, above: set[int]) -> State:
    if id(value) in above:
        raise TypeError(f"{path} refers back to an object that holds it, which a checkpoint cannot hold")
    return {name: _encode(part, f"{path}.{name}", opaque, above | {id(value)}) for name, part in vars(value).items()}


def _encode(value: Any, path: str, opaque: Opaque, above: set[int]) -> Any:
    """Return a number, string, tensor or {"kind": …} dict."""
    kind = type(value)
    if kind in (int, float, str):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    into = functools.partial(_encode, opaque=opaque, above=above)
    encoded = _encode_leaf(value, path, into) or _encode_items(value, path, into)
    if encoded is not None:
        return encoded
    if isinstance(value, _OPAQUE) or not hasattr(value, "__dict__") or kind.__module__ in sys.stdlib_module_names:
        opaque(path, value)
        return {"kind": "kept"}
    return {"kind": "object", "items": _encode_object(value, path, opaque, above)}


def _encode_leaf(value: Any, path: str, into: Callable[[Any, str], Any]) -> State | None:
    if value is None or isinstance(value, bool):
        return {"kind": "none" if value is None else "bool", "value": int(bool(value))}
    if isinstance(value, bytes):
        return {"kind": "bytes", "value": torch.from_numpy(np.frombuffer(value, np.uint8).copy())}
    if isinstance(value, np.ndarray | np.generic) and _has_tensor_dtype(value):
        kind = "array" if isinstance(value, np.ndarray) else "scalar"
        return {"kind": kind, "value": torch.from_numpy(np.array(value))}
    if isinstance(value, Array):
        return {"kind": "Array", "value": torch.from_numpy(np.array(value.numpy()))}
    if isinstance(value, np.random.Generator):
        return {"kind": "numpy.random", "value": into(value.bit_generator.state, path)}
    if isinstance(value, random.Random):
        return {"kind": "random", "value": into(value.getstate(), path)}
    return None


def _encode_items(value: Any, path: str, into: Callable[[Any, str], Any]) -> State | None:
    for name, record in _RECORDS.items():
        if isinstance(value, record):
            return {"kind": name, "items": {key: into(part, f"{path}[{key!r}]") for key, part in value.items()}}
    if isinstance(value, dict):
        return {"kind": "dict", "keys": _numbered(value, path, into), "items": _numbered(value.values(), path, into)}
    for name, sequence in _SEQUENCES.items():
        if type(value) is sequence:
            ordered = sorted(value, key=repr) if sequence is set else value
            return {"kind": name, "items": _numbered(ordered, path, into)}
    return None


def _numbered(values: Iterable[Any], path: str, into: Callable[[Any, str], Any]) -> dict[str, Any]:
    return {str(i): into(value, f"{path}[{i}]") for i, value in enumerate(values)}


def _has_tensor_dtype(value: Any) -> bool:
    return value.dtype.kind in "fiub" and value.dtype.isnative and value.dtype.itemsize <= 8


def _decode(encoded: Any, current: Any) -> Any:
    """Return the value that was encoded; `current` is what stands in its place now."""
    if not isinstance(encoded, dict):
        return encoded.clone() if isinstance(encoded, Tensor) else encoded
    kind = encoded["kind"]
    if kind in _SEQUENCES or kind in ("dict", "object") or kind in _RECORDS:
        return _decode_container(kind, encoded, current)
    if kind == "numpy.random":
        current.bit_generator.state = _decode(encoded["value"], None)
    elif kind == "random":
        current.setstate(_decode(encoded["value"], None))
    elif kind != "kept":
        return _VALUES[kind](encoded["value"])
    return current


_VALUES: dict[str, Callable[[Any], Any]] = {
    "none": lambda value: None,
    "bool": bool,
    "bytes": lambda value: to_numpy(value).tobytes(),
    "array": to_numpy,
    "scalar": lambda value: to_numpy(value)[()],
    "Array": lambda value: Array(to_numpy(value)),
}


def _decode_container(kind: str, encoded: dict[str, Any], current: Any) -> Any:
    items: dict[str, Any] = encoded["items"]
    if kind == "object":
        restore(current, items)
        return current
    if kind in _RECORDS:
        record = _RECORDS[kind]()
        for name, part in items.items():
            record[name] = _decode(part, None)
        return record
    if kind == "dict":
        keys = [_decode(key, None) for key in encoded["keys"].values()]
        old = current if isinstance(current, dict) else {}
        pairs = {key: _decode(item, old.get(key)) for key, item in zip(keys, items.values(), strict=True)}
        if type(old) is dict:
            return pairs
        old.clear()  # an OrderedDict or defaultdict stays what it is
        old.update(pairs)
        return old
    old_items = current if isinstance(current, list | tuple) and len(current) == len(items) else [None] * len(items)
    return _SEQUENCES[kind](_decode(item, old) for item, old in zip(items.values(), old_items, strict=True))
