"""A function of tensors, recorded once as a list of operations and replayed without Python between them."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim.engine.deferred import Deferral, crossed, deferred, met, sampled
from fedsim.engine.factors import Factors, entries, factored, products
from fedsim.engine.operations import Op, Ref, aten, each, read
from fedsim.engine.rewrite import ahead, biases, early, into_place, live, ones, unread, without_aliases
from fedsim.engine.spread import spread

_NAME = re.compile(r"\bv\d+\b")  # of a value


class NotRecordable(ValueError):
    """What a function does depends on more than its tensors' shapes."""


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
        self.ops: list[Op] = []
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
        return value.detach() if number is None else Ref(number, tuple(value.shape), value.dtype)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and write it down."""
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise NotRecordable(f"{func.name()} draws from torch's global generator")
        if func is aten._local_scalar_dense.default:
            raise NotRecordable("a tensor's value is asked for")
        known_args, known_kwargs = each(self.known, args), each(self.known, kwargs)
        out = func(*args, **kwargs)
        leaves = tuple(out) if isinstance(out, (list, tuple)) else (out,)
        tensors = [leaf for leaf in (*leaves, *args) if isinstance(leaf, Tensor)]
        alike = len({(leaf.shape, leaf.dtype) for leaf in tensors}) == 1
        outs = tuple(self._name(leaf) if isinstance(leaf, Tensor) else None for leaf in leaves)
        self.ops.append(Op(func, known_args, known_kwargs, outs, alike))
        return out


def _place(tensor: Tensor) -> tuple[int, Any]:
    storage: int = tensor.untyped_storage()._cdata
    return storage, (tensor.storage_offset(), tuple(tensor.shape), tensor.stride(), tensor.dtype)


class Program(NamedTuple):
    """A recorded function of tensors, and of the constants that it reads beside them, as TorchScript: Python too.

    Where it defers a weight, `engine/deferred.py`, its last input is that weight's product with the samples, and its
    last result what the weight is still to be written from.
    """

    body: str  # statements that read `inputs[i]`, `constants[i]` and `ahead[i]`, and return a list
    constants: list[Tensor]
    begin: str = "return []"  # statements that return `ahead`, and hang on inputs that stay alone
    deferral: Deferral | None = None
    factors: Factors = Factors()
    others: tuple[int, ...] = ()  # places in `ahead` of matrices whose products with the samples are inputs, after all
    seen: frozenset[int] = frozenset()  # places among the X of factors of the samples themselves
    crossed: int | None = None  # of them, at which the step before's are given; their product is the last input
    kept: frozenset[int] = frozenset()  # places among what is carried of gradients that could be factors
    reads: frozenset[int] = frozenset()  # numbers of the inputs that it reads, writes or returns

    def __call__(self, inputs: list[Tensor]) -> list[Tensor]:
        """Do what the function does, by the statements as Python, which they are as well."""
        ahead = _run(self.begin, inputs, self.constants, [])
        given = self.factors.spread(inputs)
        if self.deferral is None:
            return self.factors.joined(_run(self.body, given, self.constants, ahead))
        weight, x = inputs[self.deferral.weight], inputs[self.deferral.samples].flatten(1)
        given += [x @ weight.t(), *(x @ ahead[k] for k in self.others)]
        given += [x @ given[len(inputs) + self.crossed].t()] if self.crossed is not None else []
        *results, rows = _run(self.body, given, self.constants, ahead)
        weight.addmm_(rows.t(), x, alpha=-1)
        return self.factors.joined(results)


def _run(body: str, *given: list[Tensor]) -> list[Tensor]:
    """Run statements; values are let go of after their last use."""
    scope: dict[str, Any] = {"torch": torch}
    *lines, end = body.splitlines()
    last = {name: k for k, line in enumerate(lines) for name in _NAME.findall(line)}
    done: dict[int, list[str]] = {}
    for name in last.keys() - set(_NAME.findall(end)):
        done.setdefault(last[name], []).append(name)
    text = [f"{line}; del {', '.join(done[k])}" if k in done else line for k, line in enumerate(lines)]
    exec("def run(inputs, constants, ahead):\n" + textwrap.indent("\n".join([*text, end]), "    "), scope)
    results: list[Tensor] = scope["run"](*given)
    return results


def record(
    function: Callable[[list[Tensor]], list[Tensor]], inputs: list[Tensor], *,
    fixed: int = 0, samples: int | None = None, carried: int = 0, factors: Factors | None = None,
) -> Program:  # fmt: skip
    """Return a program that does what a function does to tensors of these shapes.

    What the function writes into, the program writes into as well. What it reads beside its inputs is a constant.

    Args:
        function: pure but for writing into its inputs; may differentiate.
        inputs: examples; they are written into.
        fixed: inputs, from the first, that are the same tensors whenever the program runs for one client.
        samples: number of the input whose dense layer may be deferred; None: none is.
        carried: inputs, from the last, that are the last results, all but the first, of another program.
        factors: which inputs and results are to be factors; none.

    Raises:
        NotRecordable: what the function does depends on a tensor's value, or on a global generator.

    """
    recorder = Recorder(inputs)
    with recorder:
        results = [recorder.known(result) for result in function(inputs)]
    ops, results = without_aliases(unread(recorder.ops, inputs), results)
    ops = spread(into_place(live(ops, results), results), results)
    ops = early(live(biases(live(ops, results)), results))
    first = len(inputs) - carried
    asked = {number - first for number in entries(ops, results, range(first, len(inputs)))}
    kept = frozenset({place - 1 for place in products(ops, results) if place} - asked)
    count, deferral, factors = len(inputs), None, factors or Factors()
    if factors != Factors():
        ops, results = factored(ops, results, factors, count)
        count += len(factors.inputs)
        ops = live(ops, results)
    if samples is not None:
        ops, results, deferral = deferred(ops, results, samples, count)
        count += deferral is not None
    once, always = ahead(live(ops, results), results, fixed)
    others: list[int] = []
    before, seen = None, frozenset[int]()
    if deferral is not None:
        always, others = met(always, once, deferral.samples, count)
        count += len(others)
        seen = sampled(always, results[len(results) - 1 - len(factors.results) : -1], deferral.samples)
        handed = {len(inputs) + k for k in seen if factors.inputs}
        always, before = crossed(always, deferral.samples, handed, count)
        if before is not None:
            before, count = before - len(inputs), count + 1
    always, results = without_aliases(ones(always, results), results)
    always = live(always, results)
    program = _written(once, always, results, count, others)
    return program._replace(deferral=deferral, factors=factors, kept=kept, crossed=before, seen=seen)


def _written(once: list[Op], always: list[Op], results: list[Any], count: int, others: list[int]) -> Program:
    """Write operations as statements, one each."""
    constants: list[Tensor] = []
    wanted = {number for op in always for number in read(op)}
    wanted |= {result.number for result in results if isinstance(result, Ref)}
    handed = [number for op in once for number in op.outs if number in wanted.union(others)]
    names = {number: f"inputs[{number}]" for number in range(count)}

    def text(value: Any) -> str:
        if isinstance(value, Ref):
            return names.get(value.number, f"v{value.number}")
        if isinstance(value, Tensor):
            place = next((k for k, known in enumerate(constants) if known is value), len(constants))
            if place == len(constants):
                constants.append(value)
            return f"constants[{place}]"
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(text, value))}]"
        return _literal(value)

    begin = [_statement(op, text) for op in once]
    begin.append(f"return [{', '.join(f'v{number}' for number in handed)}]")
    names |= {number: f"ahead[{k}]" for k, number in enumerate(handed) if number is not None}
    body = []
    if count > 1:  # once for all, for each look into a list costs as much as a small operation
        names |= {number: f"i{number}" for number in range(count)}
        body = [f"{', '.join(map(names.__getitem__, range(count)))} = inputs"]
    body += [*(_statement(op, text) for op in always), f"return {text(results)}"]
    reads = wanted.union(number for op in once for number in read(op)) & set(range(count))
    return Program(
        "\n".join(body), constants, "\n".join(begin), others=tuple(map(handed.index, others)), reads=frozenset(reads)
    )


def _literal(value: Any) -> str:
    if isinstance(value, (torch.dtype, torch.memory_format, torch.layout)):
        return str(value)
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if value is None or isinstance(value, (bool, int, float, str)):
        return repr(value)
    raise NotRecordable(f"an operation takes a {type(value).__name__}")


def _statement(op: Op, text: Callable[[Any], str]) -> str:
    namespace, name = op.function._schema.name.split("::")
    if namespace != "aten":
        raise NotRecordable(f"{namespace}::{name} is no operation of torch's own")
    args = [text(value) for value in op.args] + [f"{key}={text(value)}" for key, value in op.kwargs.items()]
    outs = ", ".join("_" if number is None else f"v{number}" for number in op.outs)
    only = (
        "[0]" if len(op.outs) == 1 and str(op.function._schema.returns[0].type).startswith("List") else ""
    )  # of a list
    return f"{outs} = torch.ops.aten.{name}({', '.join(args)}){only}"
