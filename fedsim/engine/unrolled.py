"""`nn.GRU` and `nn.LSTM` written through their products: torch's own layers have no rule by which rows are batched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

States = tuple[Tensor, ...]  # of one layer: (h,) or (h, c), (B, H) each


def plain_recurrent(layer: nn.Module) -> bool:
    """Say whether a layer is an `nn.GRU` or `nn.LSTM` of one direction, without dropout and projection."""
    plain = type(layer) in (nn.GRU, nn.LSTM) and not layer.bidirectional and not layer.dropout
    return plain and not getattr(layer, "proj_size", 0)


def unrolled(module: nn.Module) -> nn.Module:
    """Replace such layers of a module in place, under their parameters' names; return it."""
    for name, layer in list(module.named_modules()):
        if isinstance(layer, nn.GRU | nn.LSTM) and plain_recurrent(layer):
            if not name:
                return Unrolled(layer)
            parent, _, child = name.rpartition(".")
            setattr(module.get_submodule(parent), child, Unrolled(layer))
    return module


class Unrolled(nn.Module):
    """A layer's own parameters, its equations step by step; its arguments and results are the layer's."""

    def __init__(self, layer: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        # What models ask of a layer: sizes, `bidirectional`, …
        self.__dict__.update({name: value for name, value in vars(layer).items() if not name.startswith("_")})
        self.gated, self.batch_first, self.num_layers = isinstance(layer, nn.GRU), layer.batch_first, layer.num_layers
        self.hidden_size = layer.hidden_size
        for name, parameter in layer.named_parameters(recurse=False):
            self.register_parameter(name, parameter)

    def flatten_parameters(self) -> None:
        """Do nothing: there is no cuDNN here whose memory would be laid out."""

    def forward(self, x: Tensor, state: Tensor | States | None = None) -> tuple[Tensor, Tensor | States]:
        """Return the last layer's states and, of each layer, the last: (L, B, H), of an LSTM two of them."""
        x = x.transpose(0, 1) if self.batch_first else x  # (T, B, E)
        zero = x.new_zeros(self.num_layers, x.shape[1], self.hidden_size)
        first: States = (zero,) if self.gated else (zero, zero)
        if state is not None:
            first = (state,) if isinstance(state, Tensor) else state
        step: Callable[[Tensor, Tensor, States], States] = _gru if self.gated else _lstm
        ends = []
        for k in range(self.num_layers):
            mine: States = tuple(each[k] for each in first)
            outputs = []
            for x_t in self._product(x, "ih", k).unbind(0):
                mine = step(x_t, self._product(mine[0], "hh", k), mine)
                outputs.append(mine[0])
            x = torch.stack(outputs)  # (T, B, H)
            ends.append(mine)
        last = tuple(torch.stack(each) for each in zip(*ends, strict=True))  # (L, B, H) each
        return x.transpose(0, 1) if self.batch_first else x, last[0] if self.gated else last

    def _product(self, x: Tensor, which: str, number: int) -> Tensor:
        """Return x (…, I) times weights of a layer, plus its biases if it has any."""
        weight: Tensor = getattr(self, f"weight_{which}_l{number}")
        bias: Tensor | None = getattr(self, f"bias_{which}_l{number}", None)
        return functional.linear(x, weight, bias)


def _gru(x: Tensor, product: Tensor, states: States) -> States:
    """Return (h,): r, z = σ(x + W h), n = tanh(x + r W h), h ← n + z (h − n)."""
    x_r, x_z, x_n = x.chunk(3, dim=-1)
    h_r, h_z, h_n = product.chunk(3, dim=-1)
    r, z = torch.sigmoid(x_r + h_r), torch.sigmoid(x_z + h_z)
    return (torch.lerp(torch.tanh(torch.addcmul(x_n, r, h_n)), states[0], z),)


def _lstm(x: Tensor, product: Tensor, states: States) -> States:
    """Return (h, c): i, f, o = σ(x + W h), g = tanh(x + W h), c ← f c + i g, h ← o tanh(c)."""
    i, f, g, o = (x + product).chunk(4, dim=-1)
    c = torch.addcmul(torch.sigmoid(f) * states[1], torch.sigmoid(i), torch.tanh(g))
    return torch.sigmoid(o) * torch.tanh(c), c
