"""What several blocks of rows left, put together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort
from fedsim.engine.task import Block


def select(block: Block, good: Tensor) -> Block:
    """Return the rows of a mask (k,)."""
    return Block(
        block.square_norms[good],
        block.weights[good],
        block.num_steps[good.cpu()],
        {name: value[good] for name, value in block.extras.items()},
        block.buffers[good],
        {name: value[good] for name, value in block.state.items()},
    )


def merge(blocks: list[Block], *, stored: bool = False) -> Block:
    """Concatenate blocks, in memory of their own.

    Args:
        blocks: by position.
        stored: whether second uploads and client state are taken already, and left out here.

    """
    first = blocks[0]
    extras, state = ({}, {}) if stored else (first.extras, first.state)
    return Block(
        torch.cat([block.square_norms for block in blocks]),
        torch.cat([block.weights for block in blocks]),
        torch.cat([block.num_steps for block in blocks]),
        {name: torch.cat([block.extras[name] for block in blocks]) for name in extras},
        torch.cat([block.buffers for block in blocks]),
        {name: torch.cat([block.state[name] for block in blocks]) for name in state},
    )


def moved(block: Block, device: torch.device) -> Block:
    """Bring a block to a device; steps are counted on the CPU."""
    return Block(
        block.square_norms.to(device),
        block.weights.to(device),
        block.num_steps,
        {name: value.to(device) for name, value in block.extras.items()},
        block.buffers.to(device),
        {name: value.to(device) for name, value in block.state.items()},
    )


def concatenate(parts: list[Cohort]) -> Cohort:
    """Concatenate cohorts without updates."""
    names = ("weights", "clients", "num_steps", "staleness", "received")
    joined: dict[str, Any] = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    extras = {name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras}
    return replace(parts[0], **joined, extras=extras)
