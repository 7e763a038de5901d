r"""Client kernels of recurrent layers: a whole sequence of products over rows, and its backward written out.

A step's pre-activations are a batched product with the rows' weights. What does not hang on the step before is done
for all T steps at once: the products with the inputs, the slopes of the gates, and the gradient of the recurrent
weights, Σ_t g_tᵀ h_{t−1}, which is one product and moves them in place. Between two steps of the backward there is one
product and three elementwise operations. Arrays are (R, T, B, …): of R rows, T steps, B samples a row.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fedsim.engine.kernels import Product
from fedsim.engine.rows import Rows


class Steps(nn.Module):
    """The recurrent product of one layer, weights (R, G·H, H) and biases (R, G·H) of G gates."""

    function: Any

    def __init__(self, rows: Rows, weight: str, bias: str) -> None:
        super().__init__()
        self.rows, self.weight, self.bias = rows, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return states (R, T, B, H), from zero on, of the inputs' share of the pre-activations x (R, T, B, G·H)."""
        states: Tensor = self.function.apply(x, self.rows.token, self)
        return states

    def product(self, ctx: Any, h: Tensor) -> Tensor:
        """Return h (R, B, H) times the weights, plus the biases."""
        if ctx.bias is None:
            return torch.bmm(h, ctx.weight.transpose(1, 2))
        return torch.baddbmm(ctx.bias.unsqueeze(1), h, ctx.weight.transpose(1, 2))

    def read(self, ctx: Any) -> None:
        """Look the rows' values up for a forward and its backward."""
        ctx.layer = self
        ctx.weight, ctx.moves = self.rows.get(self.weight)
        ctx.bias, ctx.bias_moves = self.rows.get(self.bias)

    def take(self, ctx: Any, g: Tensor, before: Tensor) -> None:
        """Take the gradients of all steps: g (R, T, B, G·H) by pre-activations, before (R, T, B, H) each step's h."""
        if ctx.moves:
            self.rows.sink.product(self.weight, ctx.weight, g.flatten(1, 2).transpose(1, 2), before.flatten(1, 2))
        if ctx.bias_moves:
            self.rows.sink.plain(self.bias, ctx.bias, g.sum((1, 2)))


class _GRUSteps(torch.autograd.Function):
    """r, z = σ(x_rz + W_rz h), n = tanh(x_n + r (W_n h + b_n)), h ← n + z (h − n)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, layer: Steps) -> Tensor:
        layer.read(ctx)
        rows, length, batch, size = *x.shape[:3], x.shape[3] // 3
        h = x.new_zeros(rows, length + 1, batch, size)
        gates, inner = torch.empty_like(x), x.new_empty(rows, length, batch, size)  # r, z, n; W_n h + b_n
        for t in range(length):
            product = layer.product(ctx, h[:, t])
            inner[:, t] = product[..., 2 * size :]
            rz, n = gates[:, t, :, : 2 * size], gates[:, t, :, 2 * size :]
            torch.add(x[:, t, :, : 2 * size], product[..., : 2 * size], out=rz).sigmoid_()
            torch.addcmul(x[:, t, :, 2 * size :], rz[..., :size], product[..., 2 * size :], out=n).tanh_()
            torch.lerp(n, h[:, t], rz[..., size:], out=h[:, t + 1])
        ctx.h, ctx.gates, ctx.inner = h, gates, inner
        return h[:, 1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        out, size = grads[0], ctx.inner.shape[-1]
        before = ctx.h[:, :-1]
        r, z, n = ctx.gates.split(size, dim=-1)
        # Of h by each pre-activation: g_r, g_z and, by W_n h + b_n and by x_n, g_n r and g_n.
        of_n = (1 - z) * (1 - n * n)  # (R, T, B, H)
        g = torch.cat([of_n * ctx.inner * r * (1 - r), (before - n) * z * (1 - z), of_n * r], dim=-1)
        split = g.view(*g.shape[:-1], 3, size)
        carried, whole = None, torch.empty_like(before)
        for t in reversed(range(out.shape[1])):
            mine = whole[:, t]  # (R, B, H), of the loss by h_t
            if carried is None:
                mine.copy_(out[:, t])
            else:
                torch.add(out[:, t], carried, out=mine)
            split[:, t].mul_(mine.unsqueeze(-2))
            carried = torch.baddbmm(mine * z[:, t], g[:, t], ctx.weight)
        ctx.layer.take(ctx, g, before)
        back = g.clone() if ctx.needs_input_grad[0] else None
        if back is not None:
            torch.mul(whole, of_n, out=back[..., 2 * size :])
        return back, None, None


class _LSTMSteps(torch.autograd.Function):
    """i, f, o = σ(x + W h), g = tanh(x + W h), c ← f c + i g, h ← o tanh(c); gates in the order i, f, g, o."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, layer: Steps) -> Tensor:
        layer.read(ctx)
        rows, length, batch, size = *x.shape[:3], x.shape[3] // 4
        h, c = x.new_zeros(2, rows, length + 1, batch, size).unbind(0)
        gates, bent = torch.empty_like(x), x.new_empty(rows, length, batch, size)  # i, f, g, o; tanh(c)
        for t in range(length):
            mine = torch.add(x[:, t], layer.product(ctx, h[:, t]), out=gates[:, t])
            mine[..., : 2 * size].sigmoid_()
            mine[..., 2 * size : 3 * size].tanh_()
            mine[..., 3 * size :].sigmoid_()
            i, f, g, o = mine.chunk(4, dim=-1)
            torch.addcmul(f * c[:, t], i, g, out=c[:, t + 1])
            torch.mul(o, torch.tanh(c[:, t + 1], out=bent[:, t]), out=h[:, t + 1])
        ctx.h, ctx.c, ctx.gates, ctx.bent = h, c, gates, bent
        return h[:, 1:]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        out, size = grads[0], ctx.bent.shape[-1]
        i, f, g, o = ctx.gates.split(size, dim=-1)
        before = ctx.c[:, :-1]
        # Of c by the pre-activations of i, f and g; of h by that of o, and by c.
        slopes = torch.cat([g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), ctx.bent * o * (1 - o)], dim=-1)
        by_cell = o * (1 - ctx.bent * ctx.bent)
        split = slopes.view(*slopes.shape[:-1], 4, size)
        back = torch.zeros_like(by_cell[:, 0])  # of the loss by h_t, through the steps after
        cell = torch.zeros_like(back)  # of the loss by c_t, likewise
        for t in reversed(range(out.shape[1])):
            mine = out[:, t] + back
            cell = torch.addcmul(cell, mine, by_cell[:, t])
            split[:, t, :, :3].mul_(cell.unsqueeze(-2))
            split[:, t, :, 3].mul_(mine)
            back = torch.bmm(slopes[:, t], ctx.weight)
            cell = cell * f[:, t]
        ctx.layer.take(ctx, slopes, ctx.h[:, :-1])
        return slopes, None, None


class _GRUCell(Steps):
    function = _GRUSteps


class _LSTMCell(Steps):
    function = _LSTMSteps


class FusedGRU(nn.Module):
    """`fedsim.models.char_gru.GRU` for merged rows."""

    def __init__(self, rows: Rows, name: str, layer: nn.Module) -> None:
        super().__init__()
        self.rows = rows
        self.input = Product(rows, f"{name}input.weight", f"{name}input.bias")
        self.cell = _GRUCell(rows, f"{name}hidden.weight", f"{name}hidden.bias")

    def forward(self, x: Tensor) -> Tensor:
        """Return the states (R·B, T, H) of x (R·B, T, E)."""
        return _merged(self.cell(self.input(_split(x, self.rows.count))))


class FusedRecurrent(nn.Module):
    """`nn.GRU` or `nn.LSTM` (one direction, no dropout, no projection) for merged rows, from zero states on."""

    def __init__(self, rows: Rows, name: str, layer: nn.GRU | nn.LSTM) -> None:
        super().__init__()
        self.rows, self.batch_first = rows, layer.batch_first
        self.gated = isinstance(layer, nn.GRU)
        kind = _GRUCell if self.gated else _LSTMCell
        numbers = range(layer.num_layers)
        self.inputs = nn.ModuleList(Product(rows, f"{name}weight_ih_l{k}", f"{name}bias_ih_l{k}") for k in numbers)
        self.cells = nn.ModuleList(kind(rows, f"{name}weight_hh_l{k}", f"{name}bias_hh_l{k}") for k in numbers)

    def forward(self, x: Tensor) -> tuple[Tensor, Any]:
        """Return the last layer's states, laid out as the inputs x, (R·B, T, E) or (T, R·B, E), and each layer's last.

        The last ones are (L, R·B, H); of an LSTM the first of two. Its cells are no output here: None stands for them,
        and a model that looks at it is no fused one.
        """
        h = _split(x if self.batch_first else x.transpose(0, 1), self.rows.count)
        last = []
        for inputs, cell in zip(self.inputs, self.cells, strict=True):
            h = cell(inputs(h))
            last.append(h[:, -1].flatten(0, 1))
        states, ends = _merged(h), torch.stack(last)
        return states if self.batch_first else states.transpose(0, 1), ends if self.gated else (ends, None)


def _split(x: Tensor, count: int) -> Tensor:
    """Return (R, T, B, E) of x (R·B, T, E)."""
    return x.reshape(count, -1, *x.shape[1:]).transpose(1, 2)


def _merged(states: Tensor) -> Tensor:
    """Return (R·B, T, H) of states (R, T, B, H)."""
    return states.transpose(1, 2).flatten(0, 1)
