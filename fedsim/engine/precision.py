"""What forwards compute in: the run's own dtype, or products in bfloat16 with weights and updates in float32.

bf16: linear layers, convolutions and matrix products read their operands rounded to 8 significant bits and sum in
float32 (`torch.autocast`; Micikevicius et al., ICLR 2018, with bfloat16 for float16, which needs no loss scaling:
Kalamkar et al., 2019). Weights, losses, gradients' sums, steps and updates stay in float32, and so does evaluation.
tf32: float32 products on CUDA with operands rounded to 11 bits; a switch of the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from fedsim.engine.model import Functional
from fedsim.layout import Params

if TYPE_CHECKING:
    from fedsim.engine.task import Task

PRECISIONS = ("fp32", "tf32", "bf16")


def refusal(precision: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """Say why a device does not compute that way; None where it does."""
    if precision == "fp32":
        return None
    if dtype != torch.float32:
        name = str(dtype).removeprefix("torch.")
        return f"precision={precision} is for dtype=float32, got dtype={name}; use precision=fp32, the dtype's own"
    if precision == "tf32" and device.type != "cuda":
        return f"precision=tf32 is a mode of CUDA's products, and device is {device.type}; use fp32 or bf16"
    if device.type not in ("cpu", "cuda"):
        return f"precision={precision} is for cpu and cuda, and device is {device.type}; use fp32"
    return None


def emulated(precision: str, device: torch.device) -> str | None:
    """Say of what has no instructions for a precision, and computes it in software, what that costs; None of others."""
    if precision != "bf16":
        return None
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = not hasattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported") or bool(
            torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
    if native:
        return None
    name = "GPU" if device.type == "cuda" else "CPU"
    return f"this {name} computes precision=bf16 in software, several times slower than precision=fp32"


def set_tf32(precision: str) -> None:
    """Switch CUDA's products of float32 between their own precision and TF32."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"


def forward(task: Task) -> Callable[[Tensor], Tensor]:
    """Return the forward of a task's module, logits in the run's dtype."""
    module = task.module
    if task.precision != "bf16":
        return module
    kind = task.device.type

    def rounded(x: Tensor) -> Tensor:
        # Left at the end of every forward: autocast keeps rounded weights until then, and steps move the weights.
        with torch.autocast(kind, dtype=torch.bfloat16):
            logits: Tensor = module(x)
        return logits.float()

    return rounded


def functional(task: Task, module: nn.Module, own: Params | None = None) -> Functional:
    """Return a module as the function of parameters that objectives see, at the task's precision."""
    return _Rounded(module, own, task.device.type) if task.precision == "bf16" else Functional(module, own)


class _Rounded(Functional):
    """A model whose three forwards run under autocast and return float32."""

    def __init__(self, module: nn.Module, own: Params | None, kind: str) -> None:
        super().__init__(module, own)
        self._kind = kind

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        with torch.autocast(self._kind, dtype=torch.bfloat16):
            return super().__call__(params, x).float()

    def features(self, params: Params, x: Tensor) -> Tensor:
        """Return what the head is applied to, (B, F)."""
        with torch.autocast(self._kind, dtype=torch.bfloat16):
            return super().features(params, x).float()

    def head(self, params: Params, h: Tensor) -> Tensor:
        """Return logits (B, C) from features."""
        with torch.autocast(self._kind, dtype=torch.bfloat16):
            return super().head(params, h).float()
