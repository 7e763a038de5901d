"""Whether two objects that one recipe made hold the same values: what a seed has drawn shows, wherever it lies."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from types import FunctionType, MethodType
from typing import Any
from weakref import ref

import numpy as np
import torch
from torch import Tensor, nn

_LEAVES = {"_parameters", "_buffers", "_modules"}
Seen = dict[tuple[int, int], tuple[Any, Any]]
"""Pairs that are compared elsewhere, by their ids; held, so that no id comes again."""


def alike_modules(a: nn.Module, b: nn.Module, moving: Collection[str]) -> bool:
    """Say whether two modules of one structure compute the same, given the tensors that move.

    Args:
        a: a module.
        b: another one.
        moving: names of parameters and buffers whose values do not count.

    """
    one, other = dict(a.named_modules()), dict(b.named_modules())
    if one.keys() != other.keys():
        return False
    held, its = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (a, b))
    still = held.keys() - set(moving)
    if held.keys() != its.keys() or not all(alike(held[name], its[name]) for name in still):
        return False
    # Modules are looked at one by one, and parameters stand in lists too: an LSTM's `_flat_weights`.
    known = [(one[name], other[name]) for name in one] + [(held[name], its[name]) for name in held]
    seen: Seen = {(id(x), id(y)): (x, y) for x, y in known}
    return all(_alike(_own(one[name]), _own(other[name]), dict(seen)) for name in one)


def alike(a: Any, b: Any) -> bool:
    """Say whether two values are equal: tensors and arrays to the bit, objects of one type by what they hold.

    >>> alike([1.0, {"a": torch.ones(2)}], [1.0, {"a": torch.ones(2)}]), alike(1, 1.0), alike(float("nan"), 1.0)
    (True, False, False)
    """
    return _alike(a, b, {})


def _own(module: nn.Module) -> dict[str, Any]:
    """Return what a module holds beside its parameters, buffers and submodules."""
    return {name: value for name, value in vars(module).items() if name not in _LEAVES}


def _alike(a: Any, b: Any, seen: Seen) -> bool:
    if a is b or (id(a), id(b)) in seen:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.device == b.device and torch.equal(a, b)
    if isinstance(a, np.ndarray) and a.dtype != object:
        return bool(a.dtype == b.dtype and np.array_equal(a, b))
    seen[id(a), id(b)] = a, b  # what holds itself is as alike as the rest of it
    if isinstance(a, Mapping):
        return list(a) == list(b) and all(_alike(a[key], b[key], seen) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(_alike(x, y, seen) for x, y in zip(a, b, strict=True))
    inside = _inside(a), _inside(b)
    if inside[0] is not None:
        return _alike(*inside, seen)
    try:
        return bool(a == b)  # numbers, words, dtypes; of what nobody knows: it is equal to itself alone
    except (RuntimeError, ValueError, TypeError):
        return False


def _inside(value: Any) -> Any:
    """Return all that an object's behaviour hangs on; None where that is not known."""
    if isinstance(value, FunctionType):
        try:
            cells = [cell.cell_contents for cell in value.__closure__ or ()]
        except ValueError:  # one is empty yet
            return None
        return (value.__code__, value.__defaults__, value.__kwdefaults__, cells)
    if isinstance(value, MethodType):
        return (value.__func__, value.__self__)
    if isinstance(value, partial):
        return (value.func, value.args, value.keywords)
    if isinstance(value, ref):
        return (value(),)
    kind: Any = type(value)
    return vars(value) if kind.__eq__ is object.__eq__ and hasattr(value, "__dict__") else None
