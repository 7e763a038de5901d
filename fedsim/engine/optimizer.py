"""Local optimisers on lists of tensors, in place; the same arithmetic for one client and for stacked rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedsim.local import LocalTraining

BETAS, EPS = (0.9, 0.999), 1e-8  # AdamW, as torch.optim


class Optimizer:
    """A client's optimiser for one local round (or a chunk of rows'): its moments start at zero.

    Args:
        training: what clients do.
        params: the tensors to move, in place; each client's own, or rows of many clients (R, …).
        lr: this round's rate.

    """

    def __init__(self, training: LocalTraining, params: Sequence[Tensor], lr: float) -> None:
        self.training, self.lr = training, lr
        self.params = list(params)
        self.reset()

    @property
    def writes(self) -> bool:
        """Whether `step` writes into the gradients."""
        return self.training.optimizer == "sgd" and self.training.weight_decay != 0

    def reset(self) -> None:
        """Forget the moments: another client begins."""
        self.step_count = 0
        self.first: list[Tensor] = []
        self.second: list[Tensor] = []

    def step(self, grads: list[Tensor], count: int | None = None, *, scale: Tensor | None = None) -> None:
        """Move the parameters by one step; may write into the gradients.

        Args:
            grads: one for each parameter; of its first `count` rows where that is given.
            count: rows that have a step left; None: the parameters have no axis of rows, or all do.
            scale: factor on this step's rate: 0-d, or one a row of the gradients; None is 1.

        """
        self.step_count += 1
        params = self.params if count is None else [p[:count] for p in self.params]
        if self.training.optimizer == "adamw":
            self._adamw(params, grads, count, scale)
            return
        if self.training.weight_decay:
            torch._foreach_add_(grads, params, alpha=self.training.weight_decay)
        if self.training.momentum:
            if not self.first:
                self.first = [grad.clone() for grad in grads]
            else:
                self.first = self.first if count is None else [m[:count] for m in self.first]
                torch._foreach_mul_(self.first, self.training.momentum)
                torch._foreach_add_(self.first, grads)
            grads = self.first
        if scale is None or (scale.dim() == 0 and scale.device.type == "cpu"):  # whose value nobody waits for
            torch._foreach_add_(params, grads, alpha=-self.lr * (1.0 if scale is None else float(scale)))
            return
        for param, grad in zip(params, grads, strict=True):
            param.addcmul_(grad, _over(scale, grad), value=-self.lr)

    def _adamw(self, params: list[Tensor], grads: list[Tensor], count: int | None, factor: Tensor | None) -> None:
        if not self.first:
            self.first = [torch.zeros_like(p) for p in params]
            self.second = [torch.zeros_like(p) for p in params]
        elif count is not None:  # rows only ever leave, from the end
            self.first = [m[:count] for m in self.first]
            self.second = [m[:count] for m in self.second]
        decay = self.lr * self.training.weight_decay
        if factor is None:
            torch._foreach_mul_(params, 1 - decay)
        elif decay:
            torch._foreach_sub_(params, _scaled(params, decay * factor))
        torch._foreach_lerp_(self.first, grads, 1 - BETAS[0])
        torch._foreach_mul_(self.second, BETAS[1])
        torch._foreach_addcmul_(self.second, grads, grads, value=1 - BETAS[1])
        scale = 1 - BETAS[0] ** self.step_count
        denominator = torch._foreach_sqrt(self.second)
        torch._foreach_div_(denominator, (1 - BETAS[1] ** self.step_count) ** 0.5)
        torch._foreach_add_(denominator, EPS)
        torch._foreach_addcdiv_(params, _scaled(self.first, factor), denominator, value=-self.lr / scale)


def _scaled(tensors: list[Tensor], factor: Tensor | None) -> list[Tensor]:
    """Return tensors times one factor, or rows times one each; the tensors themselves for None."""
    if factor is None:
        return tensors
    return [tensor * _over(factor, tensor) for tensor in tensors]


def _over(factor: Tensor, tensor: Tensor) -> Tensor:
    """Return one factor, or one a row, in a shape that a tensor is multiplied by."""
    factor = factor.to(tensor.dtype)
    return factor if factor.dim() == 0 else factor.view(-1, *[1] * (tensor.dim() - 1))


def clip(grads: list[Tensor], bound: float) -> None:
    """Scale one client's gradient in place so that its norm is at most `bound`."""
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_mul_(grads, torch.clamp(bound / norm.clamp(min=1e-12), max=1.0))
