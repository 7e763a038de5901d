"""Augmentation as a pure function of samples and keys: on the device, in a batch, equal on every engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from fedsim.rng import fold_in


class Augment(Protocol):
    """Changes training samples as they are gathered; a sample's change depends on its own key alone."""

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        """Return samples of the shape of x (B, …) from keys (B,) int64. Batchable; no branch on a value."""
        ...


@dataclass(frozen=True, kw_only=True)
class CropFlip:
    """Random crop of a padded image, then a mirror image half of the time.

    The usual augmentation of CIFAR (He et al., CVPR 2016, sec. 4.2). Departs from it: the border is 0 in
    normalised units, the mean colour, where padding raw pixels gives black.

    Args:
        padding: pixels added on each side, ≥ 0; the crop has the size of the image. 0 crops nothing.
        flip: mirror left and right with probability ½.

    Raises:
        ValueError: the padding is negative.

    """

    padding: int = 4
    flip: bool = True

    def __post_init__(self) -> None:
        if self.padding < 0:
            raise ValueError(f"padding must be ≥ 0 pixels, got {self.padding}")

    def __call__(self, x: Tensor, key: Tensor) -> Tensor:
        """Return cropped, mirrored images.

        Args:
            x: (B, C, H, W) images.
            key: (B,) int64, one a sample.

        Returns:
            (B, C, H, W)

        """
        height, width = x.shape[-2:]
        rows = torch.arange(height, device=x.device) + self._shift(key, 1)[:, None]  # (B, H)
        columns = torch.arange(width, device=x.device).expand(len(key), width)  # (B, W)
        if self.flip:
            mirrored = (fold_in(key, 3) & 1).bool()[:, None]  # (B, 1)
            columns = torch.where(mirrored, width - 1 - columns, columns)  # (B, W)
        columns = columns + self._shift(key, 2)[:, None]  # (B, W)
        inside = _in_range(rows, height)[:, :, None] & _in_range(columns, width)[:, None, :]  # (B, H, W)
        source = rows.clamp(0, height - 1)[:, :, None] * width + columns.clamp(0, width - 1)[:, None, :]  # (B, H, W)
        source = source.flatten(1)[:, None, :].expand(x.shape[0], x.shape[1], height * width)  # (B, C, HW)
        crop = x.flatten(2).gather(2, source).view(x.shape)  # (B, C, H, W)
        return torch.where(inside[:, None], crop, torch.zeros((), dtype=x.dtype, device=x.device))  # (B, C, H, W)

    def _shift(self, key: Tensor, axis: int) -> Tensor:
        # A 32-bit hash times the number of places, shifted down: uniform to 2⁻³², and without a division.
        return ((fold_in(key, axis) * (2 * self.padding + 1)) >> 32) - self.padding  # (B,)


def _in_range(index: Tensor, size: int) -> Tensor:
    return (index >= 0) & (index < size)
