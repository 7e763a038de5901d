r"""Client kernels: layers whose weights have a leading axis of clients, and whose backward takes the SGD step.

The batches of R clients are merged into the first axis, (R·B, …), so a module's own forward runs unchanged; only
the layers that carry parameters know that rows belong to clients. In the backward of a linear layer, with the rows'
weights W (R, O, I), inputs x (R, B, I) and output gradients g (R, B, O),

    x̄ = g W,   W ← β W − η gᵀ x          (one `baddbmm_`; β = 1 − η (weight decay + μ))

so the (R, D) gradient is never written. Where an optimiser needs it, it is accumulated instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedsim.engine.rows import Rows


def _own(ctx: Any, layer: Product | FusedConv2d) -> Tensor:
    """Return a layer's weight (R, …); its bias, and which of the two move, are for the backward."""
    weight, ctx.moves = layer.rows.get(layer.weight)
    ctx.layer, (ctx.bias, ctx.bias_moves) = layer, layer.rows.get(layer.bias)
    assert weight is not None  # such a layer has a weight
    return weight


class _Affine(torch.autograd.Function):
    """y (R, B, O) = x (R, B, I) Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, layer: Product) -> Tensor:
        ctx.x, ctx.weight = x, _own(ctx, layer)
        if ctx.bias is None:
            return torch.bmm(x, ctx.weight.transpose(1, 2))
        return torch.baddbmm(ctx.bias.unsqueeze(1), x, ctx.weight.transpose(1, 2))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        g, layer = grads[0], ctx.layer
        back = torch.bmm(g, ctx.weight) if ctx.needs_input_grad[0] else None
        sink = layer.rows.sink
        if ctx.moves:
            sink.product(layer.weight, ctx.weight, g.transpose(1, 2), ctx.x)
        if ctx.bias_moves:
            sink.plain(layer.bias, ctx.bias, g.sum(1))
        return back, None, None


class Product(nn.Module):
    """x Wᵀ + b for merged rows, by the names of W and b; extra middle axes are samples."""

    def __init__(self, rows: Rows, weight: str, bias: str) -> None:
        super().__init__()
        self.rows, self.weight, self.bias = rows, weight, bias

    def forward(self, x: Tensor) -> Tensor:
        """Return (R·B, …, O) of x (R·B, …, I)."""
        y: Tensor = _Affine.apply(x.reshape(self.rows.count, -1, x.shape[-1]), self.rows.token, self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape[:-1], y.shape[-1])


class FusedLinear(Product):
    """`nn.Linear` for merged rows."""

    def __init__(self, rows: Rows, name: str, layer: nn.Linear) -> None:
        super().__init__(rows, f"{name}weight", f"{name}bias")
        self.in_features, self.out_features = layer.in_features, layer.out_features  # which models read


class _Convolve(torch.autograd.Function):
    """y (R, B, O, L) = W (R, O, P) unfolded (R, B, P, L) + b, P the entries of a patch and L the positions."""

    @staticmethod
    def forward(ctx: Any, patches: Tensor, token: Tensor, layer: FusedConv2d) -> Tensor:
        ctx.patches, ctx.weight = patches, _own(ctx, layer).flatten(2)  # (R, O, P), a view
        y = torch.matmul(ctx.weight.unsqueeze(1), patches)  # (R, B, O, L)
        return y if ctx.bias is None else y.add_(ctx.bias[:, None, :, None])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        g, layer = grads[0], ctx.layer
        back = torch.matmul(ctx.weight.transpose(1, 2).unsqueeze(1), g) if ctx.needs_input_grad[0] else None
        sink = layer.rows.sink
        if ctx.moves:
            left = g.transpose(1, 2).flatten(2)  # (R, O, B·L)
            right = ctx.patches.permute(0, 1, 3, 2).flatten(1, 2)  # (R, B·L, P)
            sink.product(layer.weight, ctx.weight, left, right)
        if ctx.bias_moves:
            sink.plain(layer.bias, ctx.bias, g.sum((1, 3)))
        return back, None, None


class _ConvolveOne(torch.autograd.Function):
    """y (B, O, H', W') = W (1, O, C, kh, kw) * x (B, C, H, W) + b of a row alone, by torch's own convolution."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, layer: FusedConv2d) -> Tensor:
        ctx.x, ctx.weight = x, _own(ctx, layer)
        bias = None if ctx.bias is None else ctx.bias[0]
        return functional.conv2d(x, ctx.weight[0], bias, layer.stride, layer.padding, layer.dilation)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        layer, sink = ctx.layer, ctx.layer.rows.sink
        back, weight, bias = torch.ops.aten.convolution_backward(
            grads[0], ctx.x, ctx.weight[0], None if ctx.bias is None else [layer.out_channels], layer.stride,
            layer.padding, layer.dilation, False, [0, 0], 1, [ctx.needs_input_grad[0], ctx.moves, ctx.bias_moves],
        )  # fmt: skip
        if ctx.moves:
            sink.plain(layer.weight, ctx.weight, weight[None])
        if ctx.bias_moves:
            sink.plain(layer.bias, ctx.bias, bias[None])
        return back, None, None


class FusedConv2d(nn.Module):
    """`nn.Conv2d` (one group, zero padding) for merged rows, as unfold and a batched product."""

    def __init__(self, rows: Rows, name: str, layer: nn.Conv2d) -> None:
        super().__init__()
        self.rows, self.weight, self.bias = rows, f"{name}weight", f"{name}bias"
        self.kernel, self.stride, self.padding, self.dilation = (
            layer.kernel_size, layer.stride, layer.padding, layer.dilation,
        )  # fmt: skip
        self.out_channels = layer.out_channels

    def forward(self, x: Tensor) -> Tensor:
        """Return (R·B, O, H', W') of x (R·B, C, H, W)."""
        if self.rows.alone:
            alone: Tensor = _ConvolveOne.apply(x, self.rows.token, self)  # type: ignore[no-untyped-call]
            return alone
        pad = (int(self.padding[0]), int(self.padding[1]))
        height, width = (
            (x.shape[2 + i] + 2 * pad[i] - self.dilation[i] * (self.kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        patches = functional.unfold(x, self.kernel, self.dilation, pad, self.stride)  # (R·B, P, L)
        patches = patches.view(self.rows.count, -1, *patches.shape[1:])
        y: Tensor = _Convolve.apply(patches, self.rows.token, self)  # type: ignore[no-untyped-call]
        return y.view(x.shape[0], self.out_channels, height, width)


class _Scale(torch.autograd.Function):
    """y = x̂ w + b by channel: x̂ (R, B, C, …), w and b (R, C)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, token: Tensor, layer: FusedGroupNorm) -> Tensor:
        ctx.layer, ctx.x = layer, x
        weight, ctx.moves = layer.rows.get(layer.weight)
        bias, ctx.bias_moves = layer.rows.get(layer.bias)
        assert weight is not None  # only affine layers are converted
        assert bias is not None
        ctx.flat, ctx.flat_bias = weight, bias
        shape = (x.shape[0], 1, x.shape[2], *(1,) * (x.dim() - 3))
        ctx.weight = weight.reshape(shape)
        return torch.addcmul(bias.reshape(shape), x, ctx.weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None]:
        g, layer = grads[0], ctx.layer
        back = g * ctx.weight if ctx.needs_input_grad[0] else None
        axes = (1, *range(3, g.dim()))
        sink = layer.rows.sink
        if ctx.moves:
            sink.plain(layer.weight, ctx.flat, (g * ctx.x).sum(axes))
        if ctx.bias_moves:
            sink.plain(layer.bias, ctx.flat_bias, g.sum(axes))
        return back, None, None


class FusedGroupNorm(nn.Module):
    """`nn.GroupNorm` with affine parameters for merged rows."""

    def __init__(self, rows: Rows, name: str, layer: nn.GroupNorm) -> None:
        super().__init__()
        self.rows, self.weight, self.bias = rows, f"{name}weight", f"{name}bias"
        self.num_groups, self.eps = layer.num_groups, layer.eps

    def forward(self, x: Tensor) -> Tensor:
        """Return x (R·B, C, …) normalised and scaled."""
        normal = functional.group_norm(x, self.num_groups, eps=self.eps)
        split = normal.view(self.rows.count, -1, *x.shape[1:])
        y: Tensor = _Scale.apply(split, self.rows.token, self)  # type: ignore[no-untyped-call]
        return y.view(x.shape)


class _Look(torch.autograd.Function):
    """y (R, M, E) = rows of the tables (R, V, E) at indices (R, M)."""

    @staticmethod
    def forward(ctx: Any, token: Tensor, index: Tensor, layer: FusedEmbedding) -> Tensor:
        ctx.layer = layer
        table, ctx.moves = layer.rows.get(layer.weight)
        assert table is not None  # an embedding has a weight
        shift = torch.arange(len(table), device=index.device).unsqueeze(1) * table.shape[1]
        ctx.index, ctx.table = (index + shift).flatten(), table  # (R·M,) into (R·V, E)
        return table.reshape(-1, table.shape[2]).index_select(0, ctx.index).view(*index.shape, -1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        if ctx.moves:
            g = grads[0].flatten(0, 1)  # (R·M, E)
            whole = torch.zeros_like(ctx.table).view(-1, g.shape[1])
            if g.is_cuda:
                whole.index_put_((ctx.index,), g, accumulate=True)  # sorts first: no atomics
            else:
                whole.index_add_(0, ctx.index, g)
            ctx.layer.rows.sink.plain(ctx.layer.weight, ctx.table, whole.view(ctx.table.shape))
        return None, None, None


class FusedEmbedding(nn.Module):
    """`nn.Embedding` for merged rows."""

    def __init__(self, rows: Rows, name: str, layer: nn.Embedding) -> None:
        super().__init__()
        self.rows, self.weight = rows, f"{name}weight"

    def forward(self, x: Tensor) -> Tensor:
        """Return (R·B, …, E) of tokens x (R·B, …)."""
        y: Tensor = _Look.apply(self.rows.token, x.reshape(self.rows.count, -1), self)  # type: ignore[no-untyped-call]
        return y.view(*x.shape, -1)
