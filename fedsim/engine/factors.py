"""Gradients of dense layers as the two factors that they are products of, where a step never needs their entries.

The gradient of a layer's weight (out, in) is DᵀX, D (b, out) and X (b, in) of few rows. Then
    ⟨DᵀX, EᵀZ⟩ = ⟨D, (XZᵀ)E⟩,    ⟨DᵀX, M⟩ = ⟨D, XMᵀ⟩    and    W − ρ DᵀX = W − (ρD)ᵀX,
and a step state that is such a gradient is handed on as D and X.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedsim.engine.deferred import most
from fedsim.engine.operations import Op, Ref, aten, bases, each, read


class Pair(NamedTuple):
    """The factors of DᵀX."""

    d: Ref  # (b, out)
    x: Ref  # (b, in)


class Factors(NamedTuple):
    """Which inputs and results of a program are D instead of DᵀX, with X after all inputs, and after all results.

    An X may be the samples themselves, which lie where the next ones will: who hands it on keeps a copy until then.
    """

    inputs: tuple[int, ...] = ()
    results: tuple[int, ...] = ()

    def spread(self, inputs: list[Tensor]) -> list[Tensor]:
        """Return inputs with factors in the place of matrices: M = 1ᵀM."""
        ones = {k: torch.eye(len(inputs[k]), dtype=inputs[k].dtype) for k in self.inputs}
        return [*(ones.get(k, value) for k, value in enumerate(inputs)), *(inputs[k] for k in self.inputs)]

    def joined(self, results: list[Tensor]) -> list[Tensor]:
        """Return results with matrices in the place of factors."""
        count = len(results) - len(self.results)
        whole = {k: results[k].t() @ x for k, x in zip(self.results, results[count:], strict=True)}
        return [whole.get(k, value) for k, value in enumerate(results[:count])]


class _Writer:
    """Writes operations on new values."""

    def __init__(self, ops: list[Op], least: int) -> None:
        self.ops: list[Op] = []
        self.flat: dict[int, Ref] = {}  # of matrices, as vectors
        self.count = max([least, *(number for op in ops for number in (*read(op), *op.outs) if number is not None)])

    def __call__(self, function: Any, *args: Any, shape: tuple[int, ...], out: int | None = None) -> Ref:
        if out is None:
            self.count += 1
            out = self.count
        first = next(value for value in args if isinstance(value, Ref))
        self.ops.append(Op(function, args, {}, (out,), False))
        return Ref(out, shape, first.dtype)

    def turned(self, value: Ref) -> Ref:
        return self(aten.t.default, value, shape=value.shape[::-1])

    def inner(self, product: Ref, b: Ref, out: int | None) -> None:
        """Write ⟨a, b⟩ of a product, which lies in one piece, and a matrix that nobody writes into."""
        a = self(aten.view.default, product, [-1], shape=(-1,))
        if b.number not in self.flat:
            self.flat[b.number] = self(aten.reshape.default, b, [-1], shape=(-1,))
        self(aten.dot.default, a, self.flat[b.number], shape=(), out=out)


def products(ops: list[Op], results: Sequence[Any]) -> set[int]:
    """Return the places among results of gradients that are worth being two factors."""
    pairs = _pairs(ops)
    return {k for k, value in enumerate(results) if isinstance(value, Ref) and value.number in pairs}


def entries(ops: list[Op], results: Sequence[Any], carried: Sequence[int]) -> set[int]:
    """Return those of some inputs whose entries are asked for, beyond inner products with such gradients."""
    pairs, flat = _pairs(ops), _flat(ops)
    asked = {value.number for value in results if isinstance(value, Ref)}
    for op in ops:
        sides = [flat.get(number, number) for number in read(op)]
        inner = op.function is aten.dot.default and len(set(sides) & pairs.keys()) == 1 and len(set(sides)) == 2
        if not inner and not (op.outs and op.outs[0] in flat):
            asked.update(sides)
    return asked.intersection(carried)


def factored(ops: list[Op], results: list[Any], factors: Factors, given: int) -> tuple[list[Op], list[Any]]:
    """Let gradients be their factors.

    Args:
        ops: of a step.
        results: of the step.
        factors: which ones among inputs and results.
        given: inputs, without those that are X.

    """
    write, pairs, flat = _Writer(ops, given + len(factors.inputs)), _pairs(ops), _flat(ops)
    forms = {value.number: value for op in ops for value in op.args if isinstance(value, Ref)}
    whole = {}
    for place, number in enumerate(factors.inputs, start=given):
        if number in forms:
            wide = forms[number]
            d, x = (Ref(k, (-1, side), wide.dtype) for k, side in zip((number, place), wide.shape, strict=True))
            pairs[number] = Pair(d, x)
            turned = write.turned(pairs[number].d)
            whole[number] = write(aten.mm.default, turned, pairs[number].x, shape=wide.shape)  # for whoever else asks

    def known(value: Any) -> Any:
        return whole.get(value.number, value) if isinstance(value, Ref) else value

    for op in ops:
        if op.function is aten.dot.default and _dotted(write, op, pairs, flat):
            continue
        rate = op.args[2] if op.function is aten.addcmul_.default else None
        if isinstance(rate, Ref) and rate.shape == () and op.args[1].number in pairs and op.kwargs == {"value": -1}:
            d, x = pairs[op.args[1].number]
            turned = write.turned(write(aten.mul.Tensor, d, rate, shape=d.shape))
            args = (op.args[0], turned, x)
            write.ops.append(op._replace(function=aten.addmm_.default, args=args, kwargs={"alpha": -1.0}))
            continue
        write.ops.append(op._replace(args=each(known, op.args), kwargs=each(known, op.kwargs)))
    results = list(results)
    for place in factors.results:
        d, x = pairs[results[place].number]
        results[place] = d
        results.append(x)
    return write.ops, results


def _dotted(write: _Writer, op: Op, pairs: Mapping[int | None, Pair], flat: Mapping[int | None, int]) -> bool:
    """Write an inner product from factors, if a gradient is in it."""
    a, b = op.args if flat.get(op.args[0].number, -1) in pairs else op.args[::-1]
    if flat.get(a.number, -1) not in pairs:
        return False
    d, x = pairs[flat[a.number]]
    other = flat.get(b.number, -1)
    if other in pairs:
        e, z = pairs[other]
        met = write(aten.mm.default, x, write.turned(z), shape=(x.shape[0], z.shape[0]))
        write.inner(write(aten.mm.default, met, e, shape=d.shape), d, op.outs[0])
    else:
        matrix = write(aten.reshape.default, b, [d.shape[1], x.shape[1]], shape=(d.shape[1], x.shape[1]))
        write.inner(write(aten.mm.default, x, write.turned(matrix), shape=d.shape), d, op.outs[0])
    return True


def _pairs(ops: list[Op]) -> dict[int | None, Pair]:
    """Return the factors of the products of few rows that nobody writes into."""
    base = bases(ops)
    written = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    turned = {op.outs[0]: op.args[0] for op in ops if op.function is aten.t.default}
    found: dict[int | None, Pair] = {}
    for op in ops:
        if op.function is aten.mm.default and op.args[0].number in turned and op.outs[0] not in written:
            pair = Pair(turned[op.args[0].number], op.args[1])
            still = not {base.get(factor.number, factor.number) for factor in pair} & written
            if still and 2 * pair.x.shape[0] <= most((pair.d.shape[1], pair.x.shape[1])):
                found[op.outs[0]] = pair
    return found


def _flat(ops: list[Op]) -> dict[int | None, int]:
    """Return, for each matrix as a vector, the matrix."""
    views = [
        op for op in ops if op.function is aten.view.default and len(op.args[0].shape) == 2 and len(op.args[1]) == 1
    ]
    return {op.outs[0]: op.args[0].number for op in views}
