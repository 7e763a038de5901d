"""Where each parameter of a model stands in a flat vector."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

Params = dict[str, Tensor]


@dataclass(frozen=True)
class Layout:
    """Names and shapes of the D entries of a flat vector, in order.

    A model has three: its *shared* parameters (what travels, the columns of a cohort's updates), its *local*
    ones (they stay in a client's state) and its buffers. Frozen parameters are in none of them.

    >>> layout = Layout(("weight", "bias"), ((2, 3), (2,)))
    >>> layout.size, layout.slices["bias"]
    (8, slice(6, 8, None))
    >>> layout.split(torch.arange(8.0))["bias"]
    tensor([6., 7.])
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]

    def __post_init__(self) -> None:
        if len(self.names) != len(self.shapes):
            raise ValueError(f"a layout needs one shape a name, got {len(self.names)} names, {len(self.shapes)} shapes")

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> Layout:
        """Return the layout of named tensors, in their order."""
        return cls(tuple(tensors), tuple(tuple(t.shape) for t in tensors.values()))

    @classmethod
    def vector(cls, sizes: Iterable[int]) -> Layout:
        """Return a layout of unnamed vectors, for tests and examples: "0", "1", … of the given lengths."""
        sizes = tuple(sizes)
        return cls(tuple(str(i) for i in range(len(sizes))), tuple((n,) for n in sizes))

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Number of entries of each tensor."""
        return tuple(math.prod(shape) for shape in self.shapes)

    @cached_property
    def size(self) -> int:
        """D, the length of the flat vector."""
        return sum(self.sizes)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Column slice of each tensor."""
        slices, start = {}, 0
        for name, size in zip(self.names, self.sizes, strict=True):
            slices[name] = slice(start, start + size)
            start += size
        return slices

    def split(self, flat: Tensor) -> Params:
        """View a flat (…, D) tensor as named tensors (…, *shape)."""
        lead, parts = flat.shape[:-1], flat.split_with_sizes(self.sizes, -1)
        return {
            name: part.view((*lead, *shape)) for name, part, shape in zip(self.names, parts, self.shapes, strict=True)
        }

    def join(self, params: Mapping[str, Tensor], lead: int = 0) -> Tensor:
        """Concatenate named tensors (…, *shape) with `lead` leading axes into a flat (…, D) tensor."""
        if not self.names:
            return torch.zeros(0)
        return torch.cat(
            [
                params[name].flatten(lead) if params[name].dim() > lead else params[name].unsqueeze(-1)
                for name in self.names
            ],
            dim=-1,
        )
