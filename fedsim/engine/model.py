"""A module as the pure function of named parameters that objectives see."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from fedsim.layout import Params


class Functional:
    """`contracts.Model` of a module: what is not among the given parameters is the module's own.

    Args:
        module: any module; `features` and `head` need an attribute `head`.
        own: the very dict of the module's own parameters, if an engine trains those in place. Called with it,
            the module runs as it is, without swapping parameters in and out.

    """

    def __init__(self, module: nn.Module, own: Params | None = None) -> None:
        self.module = module
        self.own = own
        self._features = _Features(module)

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        if params is self.own:
            return _tensor(self.module(x))
        return _tensor(functional_call(self.module, params, (x,)))

    @contextmanager
    def still(self) -> Iterator[None]:
        """Have layers with running statistics take these and leave them as they are, as in evaluation."""
        layers = [m for m in self.module.modules() if m.training and getattr(m, "track_running_stats", False)]
        try:
            for layer in layers:
                layer.training = False
            yield
        finally:
            for layer in layers:
                layer.training = True

    def features(self, params: Params, x: Tensor) -> Tensor:
        """Return what the head is applied to, (B, F)."""
        if params is self.own:
            return _tensor(self._features(x))
        return _tensor(functional_call(self._features, {f"module.{n}": p for n, p in params.items()}, (x,)))

    def head(self, params: Params, h: Tensor) -> Tensor:
        """Return logits (B, C) from features."""
        head = self.module.get_submodule("head")
        if params is self.own:
            return _tensor(head(h))
        mine = {name.removeprefix("head."): p for name, p in params.items() if name.startswith("head.")}
        return _tensor(functional_call(head, mine, (h,)))


class _Features(nn.Module):
    """The forward of a module up to its head."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        features: Any = getattr(self.module, "features", None)
        if features is not None:
            return features(x)
        if not hasattr(self.module, "head"):
            raise ValueError(f"{type(self.module).__name__} has neither `features` nor an attribute `head`")
        seen: list[Tensor] = []
        hook = self.module.get_submodule("head").register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        try:
            self.module(x)
        finally:
            hook.remove()
        return seen[0]


def _tensor(value: Any) -> Tensor:
    if not isinstance(value, Tensor):
        raise TypeError(f"a model must return logits (B, C), got {type(value).__name__}")
    return value


def sibling(module: nn.Module) -> nn.Module:
    """Return a copy of a module that has the very same parameters: for whoever swaps them, or only looks."""
    return copy.deepcopy(module, {id(p): p for p in module.parameters()})
