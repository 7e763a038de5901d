"""Rewriting of recorded operations: fewer of them, sooner, in place, with the same values."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fedsim.engine.operations import Op, Ref, aten, bases, each, read


def without_aliases(ops: list[Op], results: list[Any]) -> tuple[list[Op], list[Any]]:
    """Leave out what returns its argument: `detach`, a factor 1, and the transposition of a transposition.

    Returns:
        What is left, and the results then.

    """
    same: dict[int | None, Ref] = {}
    ones: set[int | None] = set()  # where backward begins
    turned: dict[int | None, Ref] = {}  # number of a transposed matrix → what it is the transposition of
    base = bases(ops)
    written = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    readers = Counter(number for op in ops for number in read(op))

    def still(number: int | None) -> bool:  # an alias of memory, not of a value, would be wrong
        return base.get(number, number) not in written

    def root(value: Any) -> Any:
        return same.get(value.number, value) if isinstance(value, Ref) else value

    kept = []
    for op in ops:
        args, kwargs = each(root, op.args), each(root, op.kwargs)
        first, out = args[0] if args else None, op.outs[0] if op.outs else None
        if isinstance(first, Ref):
            if op.function in (aten.detach.default, aten.alias.default):
                same[out] = first
                continue
            begins = op.function is aten.mul.Tensor and op.alike and first.number in ones and readers[first.number] == 1
            if begins and isinstance(args[1], Ref) and all(map(still, (first.number, out, args[1].number))):
                same[out] = args[1]
                continue
            scaled = op.function is aten.mul.Tensor and op.alike and type(args[1]) is float and args[1] == 1
            if scaled and still(first.number) and still(out):
                same[out] = first
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


def into_place(ops: list[Op], results: list[Any]) -> list[Op]:
    """Let a product that is subtracted from (or added to) a tensor be accumulated there, never written by itself."""
    readers = Counter(number for op in ops for number in read(op))
    readers.update(result.number for result in results if isinstance(result, Ref))
    base = bases(ops)
    # What is written into may have moved on where its product with something stands now.
    moves = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    made = {op.outs[0]: op for op in ops if op.function is aten.mm.default}
    fused = []
    for op in ops:
        if op.function in (aten.sub_.Tensor, aten.add_.Tensor) and isinstance(op.args[1], Ref) and op.alike:
            product = made.get(op.args[1].number)
            alone = readers[op.args[1].number] == 1
            if product is not None and alone and not op.kwargs and not moves & {base.get(n, n) for n in read(product)}:
                sign = -1.0 if op.function is aten.sub_.Tensor else 1.0
                args = (op.args[0], *product.args)
                fused.append(op._replace(function=aten.addmm_.default, args=args, kwargs={"alpha": sign}))
                continue
        fused.append(op)
    return fused


def early(ops: list[Op]) -> list[Op]:
    """Let what writes into a tensor do so as soon as nobody before it needs the tensor as it was.

    A gradient is then subtracted when it is known, and not kept until all of them are.
    """
    base = bases(ops)
    moved: list[Op] = []
    for op in ops:
        place = len(moved)
        if op.function._schema.is_mutable:
            needed = {base.get(number, number) for number in read(op)}
            written = base.get(op.args[0].number, op.args[0].number) if isinstance(op.args[0], Ref) else None
            while place and written is not None and _passes(moved[place - 1], needed, written, base):
                place -= 1
        moved.insert(place, op)
    return moved


def _passes(before: Op, needed: set[int], written: int, base: dict[int | None, int]) -> bool:
    """Say whether what reads and writes these tensors may go before an operation instead of after it."""
    if before.function._schema.is_mutable and {base.get(n, n) for n in read(before)[:1]} & needed:
        return False
    touched = {base.get(n, n) for n in (*read(before), *before.outs) if n is not None}
    made = {base.get(n, n) for n in before.outs if n is not None}
    return written not in touched and not made & needed


def live(ops: list[Op], results: list[Any]) -> list[Op]:
    """Leave out what nobody reads."""
    wanted: set[int | None] = {result.number for result in results if isinstance(result, Ref)}
    kept = []
    for op in reversed(ops):
        if op.function._schema.is_mutable or wanted.intersection(op.outs):
            kept.append(op)
            wanted.update(read(op))
    return kept[::-1]


def biases(ops: list[Op]) -> list[Op]:
    """Let the sum of a matrix's rows that is subtracted from a vector be one product with ones, accumulated there."""
    made = {op.outs[0]: op for op in ops}
    fresh = max((number for op in ops for number in (*read(op), *op.outs) if number is not None), default=0)
    fused = []
    for op in ops:
        view = made.get(op.args[1].number) if _subtracts(op) else None
        total = made.get(view.args[0].number) if view is not None and view.function is aten.view.default else None
        if total is not None and total.function is aten.sum.dim_IntList and total.args[1] == [0]:
            rows = total.args[0]
            if isinstance(rows, Ref) and len(rows.shape) == 2 and not total.kwargs:
                fresh += 1
                turned = Ref(fresh, rows.shape[::-1], rows.dtype)
                ones = torch.ones(rows.shape[0], dtype=rows.dtype)
                fused.append(Op(aten.t.default, (rows,), {}, (fresh,), False))
                args = (op.args[0], turned, ones)
                fused.append(op._replace(function=aten.addmv_.default, args=args, kwargs={"alpha": -1.0}))
                continue
        fused.append(op)
    return fused


def ones(ops: list[Op], results: list[Any]) -> list[Op]:
    """Let what is made of ones, and neither written into nor handed on, be a constant."""
    base = bases(ops)
    used = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    used |= {base.get(result.number, result.number) for result in results if isinstance(result, Ref)}
    made = {op.outs[0]: op.args[0] for op in ops if op.function is aten.ones_like.default and op.outs[0] not in used}
    known = {number: torch.ones(like.shape, dtype=like.dtype) for number, like in made.items()}

    def constant(value: Any) -> Any:
        return known.get(value.number, value) if isinstance(value, Ref) else value

    left = [op for op in ops if op.function is not aten.ones_like.default or op.outs[0] not in made]
    return [op._replace(args=each(constant, op.args), kwargs=each(constant, op.kwargs)) for op in left]


def unread(ops: list[Op], inputs: Sequence[Tensor]) -> list[Op]:
    """Let what is made in a tensor's dtype, of none of its values, be made in that of the smallest input.

    Nobody then computes the tensor for its dtype alone.
    """
    given = [Ref(k, tuple(tensor.shape), tensor.dtype) for k, tensor in enumerate(inputs)]
    kinds = {value.dtype: value for value in sorted(given, key=lambda value: -math.prod(value.shape))}
    return [
        op._replace(args=(kinds.get(op.args[0].dtype, op.args[0]), *op.args[1:]))
        if op.function in (aten.new_ones.default, aten.new_zeros.default) else op
        for op in ops
    ]  # fmt: skip


def _subtracts(op: Op) -> bool:
    return op.function is aten.sub_.Tensor and isinstance(op.args[1], Ref) and op.alike and not op.kwargs


def ahead(ops: list[Op], results: list[Any], fixed: int) -> tuple[list[Op], list[Op]]:
    """Part operations into those that a client needs once and those of every step.

    Args:
        ops: of a step.
        results: of the step.
        fixed: inputs, from the first, that are the same tensors in all steps of a client.

    """
    base = bases(ops)
    written = {base.get(op.args[0].number, op.args[0].number) for op in ops if op.function._schema.is_mutable}
    kept = {base.get(result.number, result.number) for result in results if isinstance(result, Ref)}
    known: set[int | None] = set(range(fixed))
    once, always = [], []
    for op in ops:
        touched = {base.get(number, number) for number in (*read(op), *op.outs)}
        # A view is what it is of; a value must be nobody's to write into, in this step or in the next one.
        stays = op.function.is_view or not touched & (written | kept)
        if fixed and known.issuperset(read(op)) and stays and not op.function._schema.is_mutable:
            known.update(op.outs)
            once.append(op)
        else:
            always.append(op)
    return once, always
