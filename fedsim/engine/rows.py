"""What the layers of one module share when its weights have a leading axis of clients."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from fedsim.layout import Params


class Sink:
    """Where the gradients of one step go: into the weights at once, or into a buffer.

    Args:
        step: rate η of the in-place step; None accumulates all gradients.
        keep: β in [0, 1] of each name that moves.
        late: names of weights that several layers' calls read: their gradient is accumulated, for a weight must
            not move before the last of them has looked at it.

    """

    def __init__(
        self, step: float | None, keep: Mapping[str, float] | None = None, late: frozenset[str] = frozenset()
    ) -> None:
        self.step, self.keep, self.late = step, keep or {}, late
        self.touched: set[str] = set()  # whose step a backward has taken
        self.params: Params = {}  # of this step, (a, *shape)
        self.grads: Params = {}  # name → (a, *shape), where gradients are accumulated
        self.begun: set[str] = set()

    def begin(self, params: Params) -> None:
        """Begin a step of the rows that have one."""
        self.params = params
        self.begun.clear()
        self.touched.clear()

    def product(self, name: str, weight: Tensor, left: Tensor, right: Tensor) -> None:
        """Take the gradient left (a, O, N) @ right (a, N, I) of weight (a, O, I), a view of the parameter."""
        if self.step is not None and name not in self.late:
            weight.baddbmm_(left, right, beta=self.keep[name], alpha=-self.step)
            self.touched.add(name)
        elif name in self.begun:
            self._room(name).view(weight.shape).baddbmm_(left, right)
        else:
            torch.bmm(left, right, out=self._room(name).view(weight.shape))
            self.begun.add(name)

    def plain(self, name: str, weight: Tensor, grad: Tensor) -> None:
        """Take a gradient of weight's shape (a, …)."""
        if self.step is not None and name not in self.late:
            if self.keep[name] != 1.0:
                weight.mul_(self.keep[name])
            weight.sub_(grad, alpha=self.step)
            self.touched.add(name)
        elif name in self.begun:
            self._room(name).add_(grad)
        else:
            self._room(name).copy_(grad)
            self.begun.add(name)

    def _room(self, name: str) -> Tensor:
        shape = self.params[name].shape
        if name not in self.grads or self.grads[name].shape != shape:
            self.grads[name] = self.params[name].new_empty(shape)
        return self.grads[name]

    def settle(self, moves: frozenset[str]) -> None:
        """End a backward: take the steps that had to wait; without steps, nothing that moves lacks a gradient."""
        if self.step is not None:
            for name in self.begun:
                self.params[name].mul_(self.keep[name]).sub_(self.grads[name], alpha=self.step)
            for name in moves - self.begun - self.touched:  # the loss does not depend on it; decay does
                self.params[name].mul_(self.keep[name])
            return
        for name in moves - self.begun:
            self._room(name).zero_()


class Rows:
    """What the layers of one converted module share: the rows' weights, and where gradients go."""

    def __init__(self) -> None:
        self.count = 0
        self.alone = False  # whether there is never more than one
        self.params: Params = {}  # name → (R, *shape)
        self.fixed: Params = {}  # frozen parameters, (*shape)
        self.moves: frozenset[str] = frozenset()  # names among them that take steps
        self.sink = Sink(None)
        self.calls: Counter[str] = Counter()  # how often a forward read each weight
        # Makes every layer part of the graph, though neither inputs nor weights ask for a gradient.
        self.token = torch.zeros((), requires_grad=True)

    def get(self, name: str) -> tuple[Tensor | None, bool]:
        """Return (rows' values or None, whether they move)."""
        self.calls[name] += 1
        if name in self.params:
            return self.params[name], name in self.moves
        if name in self.fixed:
            value = self.fixed[name]
            return value.expand(self.count, *value.shape), False
        return None, False
