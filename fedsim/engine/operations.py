"""Operations of a recorded program, and which tensors they read, write and share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

aten = torch.ops.aten


@dataclass(frozen=True)
class Ref:
    """The value that an operation reads, by number."""

    number: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class Op(NamedTuple):
    """One operation of torch's, on values and constants."""

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...]  # numbers of the tensors it returns, in order; None where it returns none
    alike: bool  # whether what it reads and returns is of one shape and type


def bases(ops: list[Op]) -> dict[int | None, int]:
    """Return, for each tensor that shares another one's memory, the first one's number."""
    base: dict[int | None, int] = {}
    for op in ops:
        first = op.args[0] if op.args else None
        shares = op.function.is_view or op.function._schema.is_mutable or op.function is aten.detach.default
        if shares and isinstance(first, Ref):
            base.update(dict.fromkeys(op.outs, base.get(first.number, first.number)))
    return base


def read(op: Op) -> list[int]:
    """Return the numbers of the tensors that an operation reads."""
    found: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, Ref):
            found.append(value.number)

    each(look, (*op.args, *op.kwargs.values()))
    return found


def each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what lists, tuples and dictionaries hold (torch's own does more, at ten times the cost)."""
    if isinstance(value, (list, tuple)):
        return type(value)(each(function, item) for item in value)
    if isinstance(value, dict):
        return {name: each(function, item) for name, item in value.items()}
    return function(value)
