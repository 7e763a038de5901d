"""Steps whose dense layer over the samples is written once for several of them.

A plain step subtracts DᵀX from a layer's weight W (out, in), X (b, in) being its samples and D (b, out) the rate times
the gradient at the layer's output. As long as W stays as it was, W₀, a later step's product is
    X_s Wᵀ = X_s W₀ᵀ − Σ_{r<s} (X_s X_rᵀ) D_r.
All samples that are at hand then meet W₀ in one product and each other in one more, and W is written in one: three
products of many rows, which read a weight once, in the place of two a step of few rows.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

from fedsim.engine.operations import Op, Ref, aten, bases, read


class Deferral(NamedTuple):
    """Which inputs of a program are the weight that it does not write, and the samples."""

    weight: int
    samples: int
    shape: tuple[int, ...]  # (out, in)


def most(shape: tuple[int, ...]) -> int:
    """Return the samples up to which what deferring adds, n (in + out) a sample, is half a product, in · out."""
    return math.prod(shape) // (2 * sum(shape))


def deferred(
    ops: list[Op], results: list[Any], samples: int, given: int
) -> tuple[list[Op], list[Any], Deferral | None]:
    """Let a step be given its samples' product with a weight, and return D where it would write the weight.

    Args:
        ops: of a step.
        results: of the step.
        samples: number of the input that is the samples.
        given: number of the input that is to be the product, after all others.

    Returns:
        What is left, the results with D after them, and what is deferred; all as it was, and None, where no weight is
        read for its product with the samples alone and written by the subtraction of DᵀX alone.

    """
    matrices = _matrices(ops, samples)
    made = {op.outs[0]: op for op in ops}
    base = bases(ops)
    moves = Counter(base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable)
    for write in ops:
        if write.function is not aten.addmm_.default or write.kwargs != {"alpha": -1.0}:
            continue
        weight, turned, x = write.args
        turn = made.get(turned.number)
        product = _product(ops, weight, matrices)
        if product is None or turn is None or turn.function is not aten.t.default or x.number not in matrices:
            continue
        rows = turn.args[0]  # D
        handed = any(isinstance(value, Ref) and value.number == weight.number for value in results)
        if handed or weight.number >= given or moves[weight.number] != 1 or moves[base.get(rows.number, rows.number)]:
            continue
        ready = _given(product, Ref(given, rows.shape, rows.dtype))
        left = [ready if op is product else op for op in ops if op is not write]
        return left, [*results, rows], Deferral(weight.number, samples, weight.shape)
    return ops, results, None


def met(ops: list[Op], once: list[Op], samples: int, given: int) -> tuple[list[Op], list[int]]:
    """Let a step be given its samples' products with matrices that a client has once.

    Args:
        ops: of a step.
        once: operations whose results stay while a client trains.
        samples: number of the input that is the samples.
        given: number of the first input that is to be a product, after all others.

    Returns:
        What is left, and the numbers of the matrices (in, out).

    """
    matrices, known = _matrices(ops + once, samples), {number for op in once for number in op.outs}
    others: list[int] = []
    left = []
    for op in ops:
        factors = op.args[-2:] if op.function in (aten.mm.default, aten.addmm.default) and not op.kwargs else ()
        if factors and isinstance(factors[0], Ref) and factors[0].number in matrices and factors[1].number in known:
            x, other = factors
            product = Ref(given + len(others), (x.shape[0], other.shape[1]), x.dtype)
            others.append(other.number)
            op = _given(op, product)
        left.append(op)
    return left, others


def sampled(ops: list[Op], values: Sequence[Ref], samples: int) -> frozenset[int]:
    """Return the places among some values of a step of those that are its samples, as a matrix."""
    flat = {samples} if any(value.number == samples and len(value.shape) == 2 for value in values) else set()
    return frozenset(k for k, value in enumerate(values) if value.number in _matrices(ops, samples) | flat)


def crossed(ops: list[Op], samples: int, before: set[int], given: int) -> tuple[list[Op], int | None]:
    """Let a step be given its samples' product with those of the step before.

    Args:
        ops: of a step.
        samples: number of the input that is the samples.
        before: numbers of inputs that are the samples of the step before, as a matrix.
        given: number of the input that is to be the product, after all others.

    Returns:
        What is left, and the number of the step before's samples; None where their product is not asked for.

    """
    matrices = _matrices(ops, samples)
    turned = {op.outs[0]: op.args[0].number for op in ops if op.function is aten.t.default}
    left, found = [], None
    for op in ops:
        x, z = op.args if op.function is aten.mm.default else (None, None)
        if isinstance(x, Ref) and x.number in matrices and turned.get(z.number) in before:
            found = turned[z.number]
            op = _given(op, Ref(given, (x.shape[0], z.shape[1]), x.dtype))
        left.append(op)
    return left, found


def _given(op: Op, product: Ref) -> Op:
    """Return what is left of a product, with or without a vector added, that is given to be used up."""
    if op.function is aten.addmm.default:
        return op._replace(function=aten.add_.Tensor, args=(product, op.args[0]))
    return op._replace(function=aten.alias.default, args=(product,))


def _matrices(ops: list[Op], samples: int) -> set[int | None]:
    """Return the numbers of the samples as a matrix (b, in)."""
    found: set[int | None] = set()
    views: set[int | None] = {samples}
    for op in ops:
        for value in op.args:
            if isinstance(value, Ref) and value.number == samples and len(value.shape) == 2:
                found.add(samples)
        same = op.function is aten.view.default and op.args[0].number in views and op.args[1]
        if same and op.args[1][0] == op.args[0].shape[0]:  # rows are samples still
            views.add(op.outs[0])
            if len(op.args[1]) == 2:
                found.add(op.outs[0])
    return found


def _product(ops: list[Op], weight: Ref, matrices: set[int | None]) -> Op | None:
    """Return the product of the samples with a weight, X Wᵀ, if the weight is read for it alone."""
    readers = [op for op in ops if weight.number in read(op)]
    turns = [op for op in readers if op.function is aten.t.default]
    if len(readers) != 2 or len(turns) != 1:  # the other one writes
        return None
    products = [op for op in ops if turns[0].outs[0] in read(op)]
    if len(products) != 1 or products[0].kwargs:
        return None
    product = products[0]
    if product.function not in (aten.addmm.default, aten.mm.default) or len(product.args[-1].shape) != 2:
        return None
    x, turned = product.args[-2:]
    known = isinstance(x, Ref) and x.number in matrices and turned.number == turns[0].outs[0]
    return product if known else None
