"""A function of tensors, recorded once as a list of operations and replayed without Python between them."""

from __future__ import annotations

import math
import re
import textwrap
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
_NAME = re.compile(r"\bv\d+\b")  # of a value


class NotRecordable(ValueError):
    """What a function does depends on more than its tensors' shapes."""


@dataclass(frozen=True)
class _Ref:
    """The value that an operation reads, by number."""

    number: int


class _Op(NamedTuple):
    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    outs: tuple[int | None, ...]  # numbers of the tensors it returns, in order; None where it returns none
    alike: bool  # whether what it reads and returns is of one shape and type


class Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Sees every operation below autograd, and does not import torch's compiler to do so, which takes a second."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False


class Recorder(Watch):  # type: ignore[no-untyped-call]
    """Writes down the operations that run inside, forward and backward alike, below autograd.

    A tensor is known by where it lies and how it is laid out, not by its Python object: what autograd saves of an
    output comes back as another object. A storage that was seen is referred to weakly: its memory is free for others as
    soon as the function lets go of it, but its identity is never used twice.
    """

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.ops: list[_Op] = []
        self.seen: dict[int, StorageWeakRef] = {}  # by identity, which its weak reference reserves
        self.numbers: dict[Any, int] = {}
        self.count = 0
        for tensor in inputs:
            self._name(tensor)

    def _name(self, tensor: Tensor) -> int:
        place = _place(tensor)
        if place[0] not in self.seen:
            self.seen[place[0]] = StorageWeakRef(tensor.untyped_storage())  # type: ignore[no-untyped-call]
        self.numbers[place] = self.count
        self.count += 1
        return self.count - 1

    def known(self, value: Any) -> Any:
        """Return the reference of a tensor that was seen; a tensor that was not is a constant."""
        if not isinstance(value, Tensor):
            return value
        number = self.numbers.get(_place(value))
        return value.detach() if number is None else _Ref(number)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and write it down."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordable(f"{func.name()} draws from torch's global generator")
        if func is aten._local_scalar_dense.default:
            raise NotRecordable("a tensor's value is asked for")
        known_args, known_kwargs = _each(self.known, args), _each(self.known, kwargs)
        out = func(*args, **kwargs)
        leaves = tuple(out) if isinstance(out, (list, tuple)) else (out,)
        tensors = [leaf for leaf in (*leaves, *args) if isinstance(leaf, Tensor)]
        alike = len({(leaf.shape, leaf.dtype) for leaf in tensors}) == 1
        outs = tuple(self._name(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
        self.ops.append(_Op(func, known_args, known_kwargs, outs, alike))
        return out


def _place(tensor: Tensor) -> tuple[int, Any]:
    storage: int = tensor.untyped_storage()._cdata
    return storage, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class Program(NamedTuple):
    """A recorded function of tensors, and of the constants that it reads beside them, as TorchScript: Python too."""

    body: str  # statements that read `inputs[i]` and `constants[i]`, and return a list
    constants: list[Tensor]

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Run the statements as Python, which they are as well; values are let go of after their last use."""
        scope: dict[str, Any] = {"torch": torch}
        *lines, end = self.body.splitlines()
        last = {name: k for k, line in enumerate(lines) for name in _NAME.findall(line)}
        done: dict[int, list[str]] = {}
        for name in last.keys() - set(_NAME.findall(end)):
            done.setdefault(last[name], []).append(name)
        text = [f"{line}; del {', '.join(done[k])}" if k in done else line for k, line in enumerate(lines)]
        exec("def run(inputs, constants):\n" + textwrap.indent("\n".join([*text, end]), "    "), scope)
        results: list[Tensor] = scope["run"](inputs, self.constants)
        return results


def record(function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor]) -> Program:
    """Return a program that does what a function does to tensors of these shapes.

    What the function writes into, the program writes into as well. What it reads beside its inputs is a constant.

    Args:
        function: pure but for writing into its inputs; may differentiate.
        inputs: examples; they are written into.

    Raises:
        NotRecordable: what the function does depends on a tensor's value, or on a global generator.

    """
    recorder = Recorder(inputs)
    with recorder:
        results = [recorder.known(result) for result in function(inputs)]
    ops, results = _without_aliases(recorder.ops, results)
    ops = _early(_live(_into_place(_live(ops, results), results), results))
    return _written(ops, results, len(inputs))


def _written(ops: list[_Op], results: list[Any], count: int) -> Program:
    """Write operations as statements, one each."""
    constants: list[Tensor] = []

    def text(value: Any) -> str:
        if isinstance(value, _Ref):
            return f"inputs[{value.number}]" if value.number < count else f"v{value.number}"
        if isinstance(value, Tensor):
            place = next((k for k, known in enumerate(constants) if known is value), len(constants))
            if place == len(constants):
                constants.append(value)
            return f"constants[{place}]"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
            return str(value)
        if isinstance(value, torch.device):
            return f'torch.device("{value}")'
        if isinstance(value, float) and not math.isfinite(value):
            return f'float("{value}")'
        if value is None or isinstance(value, (bool, int, float, str)):
            return repr(value)
        raise NotRecordable(f"an operation takes a {type(value).__name__}")

    lines = []
    for op in ops:
        namespace, name = op.function._schema.name.split("::")
        if namespace != "aten":
            raise NotRecordable(f"{namespace}::{name} is no operation of torch's own")
        args = [text(value) for value in op.args] + [f"{key}={text(value)}" for key, value in op.kwargs.items()]
        call = f"torch.ops.aten.{name}({', '.join(args)})"
        outs = ", ".join("_" if number is None else f"v{number}" for number in op.outs)
        lines.append(f"{outs} = {call}")
    return Program("\n".join([*lines, f"return {text(results)}"]), constants)


def _without_aliases(ops: list[_Op], results: list[Any]) -> tuple[list[_Op], list[Any]]:
    """Leave out what returns its argument: `detach`, a factor 1, and the transposition of a transposition.

    Returns:
        What is left, and the results then.

    """
    same: dict[int | None, _Ref] = {}
    ones: set[int | None] = set()  # where backward begins
    turned: dict[int | None, _Ref] = {}  # number of a transposed matrix → what it is the transposition of
    base = _bases(ops)
    written = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    readers = Counter(number for op in ops for number in _read(op))

    def still(number: int | None) -> bool:  # an alias of memory, not of a value, would be wrong
        return base.get(number, number) not in written

    def root(value: Any) -> Any:
        return same.get(value.number, value) if isinstance(value, _Ref) else value

    kept = []
    for op in ops:
        args, kwargs = _each(root, op.args), _each(root, op.kwargs)
        first, out = args[0] if args else None, op.outs[0] if op.outs else None
        if isinstance(first, _Ref):
            if op.function in (aten.detach.default, aten.alias.default):
                same[out] = first
                continue
            begins = op.function is aten.mul.Tensor and op.alike and first.number in ones and readers[first.number] == 1
            if begins and isinstance(args[1], _Ref) and all(map(still, (first.number, out, args[1].number))):
                same[out] = args[1]
                continue
            if op.function is aten.t.default:
                if first.number in turned:
                    same[out] = turned[first.number]
                    continue
                turned[out] = first
            if op.function is aten.ones_like.default:
                ones.add(out)
        kept.append(op._replace(args=args, kwargs=kwargs))
    return kept, [root(result) for result in results]


def _into_place(ops: list[_Op], results: list[Any]) -> list[_Op]:
    """Let a product that is subtracted from (or added to) a tensor be accumulated there, never written by itself."""
    readers = Counter(number for op in ops for number in _read(op))
    readers.update(result.number for result in results if isinstance(result, _Ref))
    base = _bases(ops)
    # What is written into may have moved on where its product with something stands now.
    moves = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    made = {op.outs[0]: op for op in ops if op.function is aten.mm.default}
    fused = []
    for op in ops:
        if op.function in (aten.sub_.Tensor, aten.add_.Tensor) and isinstance(op.args[1], _Ref) and op.alike:
            product = made.get(op.args[1].number)
            alone = readers[op.args[1].number] == 1
            if product is not None and alone and not op.kwargs and not moves & {base.get(n, n) for n in _read(product)}:
                sign = -1.0 if op.function is aten.sub_.Tensor else 1.0
                args = (op.args[0], *product.args)
                fused.append(op._replace(function=aten.addmm_.default, args=args, kwargs={"alpha": sign}))
                continue
        fused.append(op)
    return fused


def _early(ops: list[_Op]) -> list[_Op]:
    """Let what writes into a tensor do so as soon as nobody before it needs the tensor as it was.

    A gradient is then subtracted when it is known, and not kept until all of them are.
    """
    base = _bases(ops)
    early: list[_Op] = []
    for op in ops:
        place = len(early)
        if op.function._schema.is_mutable:
            read = {base.get(number, number) for number in _read(op)}
            written = base.get(op.args[0].number, op.args[0].number) if isinstance(op.args[0], _Ref) else None
            while place and written is not None and _passes(early[place - 1], read, written, base):
                place -= 1
        early.insert(place, op)
    return early


def _passes(before: _Op, read: set[int], written: int, base: dict[int | None, int]) -> bool:
    """Say whether what reads and writes these tensors may go before an operation instead of after it."""
    if before.function._schema.is_mutable and {base.get(n, n) for n in _read(before)[:1]} & read:
        return False
    touched = {base.get(n, n) for n in (*_read(before), *before.outs) if n is not None}
    made = {base.get(n, n) for n in before.outs if n is not None}
    return written not in touched and not made & read


def _bases(ops: list[_Op]) -> dict[int | None, int]:
    """Return, for each tensor that shares another one's memory, the first one's number."""
    base: dict[int | None, int] = {}
    for op in ops:
        first = op.args[0] if op.args else None
        shares = op.function.is_view or op.function._schema.is_mutable or op.function is aten.detach.default
        if shares and isinstance(first, _Ref):
            base.update(dict.fromkeys(op.outs, base.get(first.number, first.number)))
    return base


def _live(ops: list[_Op], results: list[Any]) -> list[_Op]:
    """Leave out what nobody reads."""
    wanted: set[int | None] = {result.number for result in results if isinstance(result, _Ref)}
    kept = []
    for op in reversed(ops):
        if op.function._schema.is_mutable or wanted.intersection(op.outs):
            kept.append(op)
            wanted.update(_read(op))
    return kept[::-1]


def _read(op: _Op) -> list[int]:
    """Return the numbers of the tensors that an operation reads."""
    found: list[int] = []

    def look(value: Any) -> None:
        if isinstance(value, _Ref):
            found.append(value.number)

    _each(look, (*op.args, *op.kwargs.values()))
    return found


def _each(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what lists, tuples and dictionaries hold (torch's own does more, at ten times the cost)."""
    if isinstance(value, (list, tuple)):
        return type(value)(_each(function, item) for item in value)
    if isinstance(value, dict):
        return {name: _each(function, item) for name, item in value.items()}
    return function(value)
