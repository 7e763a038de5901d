"""Steps along sums, term by term: what is added up to be subtracted from a weight is subtracted at once.

    W − ρ (DᵀX + C)  as  W − (ρD)ᵀX − ρC,    W − ρ (G + μ (W − R))  as  W + ρμ (R − W) − ρG
A sum of a weight's size is then neither written nor read, nor is the product in it.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from fedsim.engine.operations import Op, Ref, aten, bases, read

_SUMS = {aten.add.Tensor: 1, aten.sub.Tensor: -1}


class _Spread:
    """What is known of some operations, and the new ones."""

    def __init__(self, ops: list[Op], results: list[Any]) -> None:
        self.made = {out: (place, op) for place, op in enumerate(ops) for out in op.outs}
        self.readers: Counter[int | None] = Counter(number for op in ops for number in read(op))
        self.readers.update(result.number for result in results if isinstance(result, Ref))
        base = self.base = bases(ops)
        self.writes = [
            (place, base.get(op.args[0].number, op.args[0].number))
            for place, op in enumerate(ops) if op.function._schema.is_mutable and isinstance(op.args[0], Ref)
        ]  # fmt: skip
        self.count = max((number for op in ops for number in (*read(op), *op.outs) if number is not None), default=0)
        self.ops: list[Op] = []

    def terms(self, value: Ref, sign: int, weight: Ref, place: int) -> list[tuple[int, Ref]]:
        """Return the terms of a sum that nobody else reads, with their signs.

        They are read at the step, the later ones after the weight has moved: a sum whose operands are written before
        that, or lie in the weight's own memory, stays one.
        """
        function = self.made[value.number][1].function if value.number in self.made else None
        op = self.late(value, function, place) if function in _SUMS else None
        if op is None or not op.alike:
            return [(sign, value)]
        a, b = op.args
        if not isinstance(a, Ref) or not isinstance(b, Ref) or not self.apart(weight, a, b):
            return [(sign, value)]
        return [*self.terms(a, sign, weight, place), *self.terms(b, sign * _SUMS[op.function], weight, place)]

    def apart(self, weight: Ref, *values: Ref) -> bool:
        """Say whether no value lies in the weight's memory."""
        own = self.base.get(weight.number, weight.number)
        return all(self.base.get(value.number, value.number) != own for value in values)

    def late(self, value: Ref, function: Any, place: int) -> Op | None:
        """Return the operation that made a value for nobody else, if it may be done at a later place as well."""
        since, op = self.made.get(value.number, (0, None))
        if op is None or op.function is not function or op.kwargs or self.readers[value.number] > 1:
            return None
        memory = {self.base.get(number, number) for number in read(op)}
        return None if any(since < at < place and written in memory for at, written in self.writes) else op

    def write(self, function: Any, *args: Any, like: Ref, **kwargs: Any) -> Ref:
        """Write an operation on a new value of another one's form."""
        self.count += 1
        self.ops.append(Op(function, args, kwargs, (self.count,), False))
        return Ref(self.count, like.shape, like.dtype)

    def pull(self, weight: Ref, rate: Ref, term: tuple[int, Ref], place: int) -> bool:
        """Write W + ρμ (R − W) for the term μ (W − R); say whether it is one."""
        scaled = self.late(term[1], aten.mul.Tensor, place)
        gap, mu = scaled.args if scaled is not None else (None, None)
        if term[0] < 0 or not isinstance(gap, Ref) or not isinstance(mu, Ref) or mu.shape != ():
            return False
        moved = self.late(gap, aten.sub.Tensor, place)
        if moved is None or not all(isinstance(value, Ref) for value in moved.args):
            return False
        if moved.args[0].number != weight.number or not self.apart(weight, moved.args[1]):
            return False
        strength = self.write(aten.mul.Tensor, rate, mu, like=rate)
        self.write(aten.lerp_.Tensor, weight, moved.args[1], strength, like=weight)
        return True

    def subtract(self, weight: Ref, rate: Ref, term: tuple[int, Ref], place: int) -> None:
        """Write W ∓ ρ times a term."""
        sign, value = term
        product = self.late(value, aten.mm.default, place)
        if product is not None and not all(isinstance(x, Ref) and self.apart(weight, x) for x in product.args):
            product = None  # it would be of a weight that has moved
        if product is None or math.prod(product.args[0].shape) >= math.prod(value.shape):
            self.write(aten.addcmul_.default, weight, value, rate, like=weight, value=-sign)
            return
        left, right = product.args
        scaled = self.write(aten.mul.Tensor, left, rate, like=left)
        self.write(aten.addmm_.default, weight, scaled, right, like=weight, alpha=float(-sign))


def spread(ops: list[Op], results: list[Any]) -> list[Op]:
    """Let steps along sums be taken term by term."""
    new = _Spread(ops, results)
    for place, op in enumerate(ops):
        terms: list[tuple[int, Ref]] = []
        if op.function is aten.addcmul_.default and op.kwargs == {"value": -1} and not new.readers[op.outs[0]]:
            weight, value, rate = op.args
            if isinstance(value, Ref) and isinstance(rate, Ref) and rate.shape == ():
                terms = new.terms(value, 1, weight, place)
        if len(terms) < 2:
            new.ops.append(op)
            continue
        pulled = next((term for term in terms if new.pull(weight, rate, term, place)), None)  # reads W as it was: first
        for term in terms:
            if term is not pulled:
                new.subtract(weight, rate, term, place)
    return new.ops
