"""Dropout whose masks are a function of a key, so that they are equal on every engine.

`nn.Dropout` draws from a global generator: its masks depend on what ran before and on how clients are batched.
Here the n-th dropout of a forward draws from fold_in(key, n), and sample b, unit j of it from (b, j): padding a
batch, or merging the batches of many clients, changes no mask. Masks are inverted dropout, Srivastava et al.
(JMLR 2014): kept units are scaled by 1/(1 − p).

>>> model = nn.Sequential(KeyedDropout(0.5))
>>> with dropout_key(torch.tensor(7)):
...     first = model(torch.ones(2, 8))
>>> with dropout_key(torch.tensor(7)):
...     again = model(torch.ones(2, 8))
>>> torch.equal(first, again)
True
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

from fedsim.errors import UserError
from fedsim.rng import fold_in, uniform_like


class _Draws:
    """The key of one forward, and how many dropouts have drawn from it.

    Counting calls, not modules, keeps two uses of one module apart.
    """

    def __init__(self, key: Tensor) -> None:
        self.key = key
        self.count = 0


_draws: ContextVar[_Draws | None] = ContextVar("dropout_draws", default=None)


@contextmanager
def dropout_key(key: Tensor) -> Iterator[None]:
    """Let every `KeyedDropout` that runs inside draw from `key`.

    Open it anew for each evaluation of a loss; inside the mapped function under `torch.vmap`, where the key is
    one client's.

    Args:
        key: int64, () for one batch; or (R,) where axis 0 of the inputs merges R clients' batches of equal
            length, client after client.

    """
    token = _draws.set(_Draws(key))
    try:
        yield
    finally:
        _draws.reset(token)


class KeyedDropout(nn.Module):
    """Zero each unit with probability p and scale the rest by 1/(1 − p); identity in eval mode.

    Args:
        p: probability in [0, 1).
        channelwise: drop whole channels, (B, C, …) → one draw for each (sample, channel), as `nn.Dropout2d`.

    """

    def __init__(self, p: float = 0.5, channelwise: bool = False) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"dropout needs 0 <= p < 1, got p={p}")
        self.p = p
        self.channelwise = channelwise

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, …) masked."""
        if not self.training or self.p == 0:
            return x
        draws = _draws.get()
        if draws is None:
            raise RuntimeError("KeyedDropout has no key: run the forward inside `with dropout_key(key):`, or eval()")
        key = fold_in(draws.key, draws.count)  # () or (R,)
        draws.count += 1
        shape = (*x.shape[:2], *(1,) * (x.dim() - 2)) if self.channelwise else tuple(x.shape)
        if key.dim():
            shape = (x.shape[0] // len(key), *shape[1:])  # one client's
            key = key.view(-1, *(1,) * len(shape))  # (R, 1, …)
        # Drawn as float32 whatever the dtype of x, so that lower precisions give the same mask.
        uniform = uniform_like(torch.empty(shape, device=x.device, dtype=torch.float32), key)  # (B, …) or (R, b, …)
        if key.dim():
            uniform = uniform.flatten(0, 1)  # (B, …)
        return torch.where(uniform >= self.p, x / (1 - self.p), 0.0)  # (B, …)

    def extra_repr(self) -> str:
        """Return the arguments, for `repr(model)`."""
        return f"p={self.p}" + (", channelwise=True" if self.channelwise else "")


_CHANNELWISE = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


def replace_dropout(model: nn.Module) -> nn.Module:
    """Replace, in place, each `nn.Dropout`, `Dropout1d`, `2d` and `3d` of a model by `KeyedDropout`.

    Args:
        model: any module; parameters, buffers and their names stay as they are.

    Returns:
        The model; a new module only if it was itself a dropout.

    Raises:
        UserError: a module that draws from the global generator and cannot be keyed.

    """
    for name, module in list(model.named_modules(remove_duplicate=False)):
        keyed = _keyed(name, module)
        if keyed is None:
            continue
        if not name:
            return keyed
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, keyed)
    return model


def _keyed(name: str, module: nn.Module) -> KeyedDropout | None:
    """Return what stands in for a module, or None if it may stay."""
    if type(module) is nn.Dropout or type(module) in _CHANNELWISE:
        rate = float(getattr(module, "p"))  # noqa: B009 (nn.Module's attributes have no static type)
        return KeyedDropout(rate, channelwise=type(module) in _CHANNELWISE).train(module.training)
    built_in = isinstance(module, (nn.RNNBase, nn.MultiheadAttention)) and float(module.dropout) > 0
    if built_in or isinstance(module, nn.modules.dropout._DropoutNd):
        raise UserError(
            f"model: {name or 'the module'} ({type(module).__name__}) draws dropout masks from torch's global "
            "generator, so results would depend on the engine; set its dropout to 0 or use nn.Dropout layers"
        )
    return None
