"""From a module to one whose layers take many clients' weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from fedsim.engine.kernels import FusedConv2d, FusedEmbedding, FusedGroupNorm, FusedLinear
from fedsim.engine.model import sibling
from fedsim.engine.recurrent import FusedGRU, FusedRecurrent
from fedsim.engine.rows import Rows
from fedsim.engine.unrolled import plain_recurrent
from fedsim.models.char_gru import GRU


def _plain_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear


def _plain_convolution(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and layer.groups == 1 and layer.padding_mode == "zeros" and layer.padding != "same"


def _plain_norm(layer: nn.Module) -> bool:
    return type(layer) is nn.GroupNorm and layer.affine


def _plain_embedding(layer: nn.Module) -> bool:
    return type(layer) is nn.Embedding and layer.max_norm is None and layer.padding_idx is None


KERNELS: tuple[tuple[Callable[[nn.Module], bool], Any], ...] = (
    (_plain_linear, FusedLinear),
    (_plain_convolution, FusedConv2d),
    (_plain_norm, FusedGroupNorm),
    (_plain_embedding, FusedEmbedding),
    (plain_recurrent, FusedRecurrent),
    (lambda layer: type(layer) is GRU, FusedGRU),  # with the two linear layers in it
)


def convert(module: nn.Module) -> tuple[nn.Module, Rows] | None:
    """Return a copy of a module whose layers take rows' weights; None where a layer has no kernel.

    Tied parameters, buffers and parameters outside of known layers have none either.
    """
    names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
    if len(names) != len(list(module.parameters())) or list(module.buffers()):
        return None
    rows, fused = Rows(), sibling(module)
    inside: set[nn.Module] = set()  # layers of what has been converted as a whole
    for name, layer in list(fused.named_modules()):
        if layer in inside:
            continue
        kind = next((kernel for fits, kernel in KERNELS if fits(layer)), None)
        if kind is None:
            if list(layer.parameters(recurse=False)):
                return None
            continue
        if not name:
            return kind(rows, "", layer), rows
        inside.update(layer.modules())
        parent, _, child = name.rpartition(".")
        setattr(fused.get_submodule(parent), child, kind(rows, f"{name}.", layer))
    return fused, rows
