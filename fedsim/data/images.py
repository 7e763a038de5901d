"""Encoded images (PNG, JPEG, …) to one array of pixels."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor

from fedsim.errors import UserError

UInt8 = npt.NDArray[np.uint8]


def decode(batches: Iterable[pa.Array], num_images: int, size: tuple[int, int] | None) -> UInt8:
    """Decode a column of images.

    Args:
        batches: of structs {bytes, path}, the image column of Hugging Face data sets.
        num_images: N, in all batches.
        size: (height, width) to resize to, bilinear; None: as they are, and all must be alike.

    Returns:
        (N, H, W, C) uint8, C = 1 if the first image is grey, else 3.

    Raises:
        UserError: Pillow is not installed, an image is damaged or missing, or sizes differ.

    """
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError("images are decoded by Pillow, which is not installed: pip install 'fedsim[data]'") from error

    mode, pixels = "", np.empty((0, 0, 0, 1), dtype=np.uint8)
    for i, source in enumerate(_sources(batches)):
        try:
            image: Image.Image = Image.open(source)
            mode = mode or _mode(image.mode)
            if image.mode != mode:
                image = image.convert(mode)
            if size is not None and image.size != size[::-1]:
                image = image.resize(size[::-1], Image.Resampling.BILINEAR)
            array = np.asarray(image)  # (H, W) or (H, W, 3)
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"data: image {i} cannot be decoded: {error}") from error
        if i == 0:
            pixels = np.empty((num_images, *array.shape[:2], 1 if mode == "L" else 3), dtype=np.uint8)  # (N, H, W, C)
        if array.shape[:2] != pixels.shape[1:3]:
            raise UserError(
                f"data: image {i} is {array.shape[0]}×{array.shape[1]}, the first is {pixels.shape[1]}×"
                f"{pixels.shape[2]} (height × width); set data.size=[height,width] to resize"
            )
        pixels[i] = array.reshape(pixels.shape[1:])
    return pixels


def _mode(mode: str) -> str:
    if mode.startswith(("I", "F")):
        raise UserError(f"data: images of mode {mode} (more than 8 bits) are not read; convert them to 8 bits")
    return "L" if mode in ("1", "L", "LA") else "RGB"


def _sources(batches: Iterable[pa.Array]) -> Iterator[Any]:
    for batch in batches:
        for image in batch.to_pylist():
            if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
                raise UserError("data: the image column must hold images as structs of bytes and path")
            yield io.BytesIO(image["bytes"]) if image.get("bytes") else image["path"]


def normalise_into(x: Tensor, pixels: UInt8, mean: Tensor, std: Tensor) -> None:
    """Write (pixels / 255 − mean) / std into x, a channel at a time.

    Args:
        x: (N, C, H, W) float32, written.
        pixels: (N, H, W, C) uint8.
        mean: (C,) in units of [0, 1].
        std: (C,) > 0.

    """
    channels_first = torch.from_numpy(pixels).permute(0, 3, 1, 2)  # (N, C, H, W)
    offset, scale = (255 * mean)[:, None, None], (255 * std)[:, None, None]  # (C, 1, 1)
    for start in range(0, len(x), 256):  # in blocks that stay in the cache: three times as fast as in one go
        block = x[start : start + 256]  # (b, C, H, W)
        block.copy_(channels_first[start : start + 256]).sub_(offset).div_(scale)


def statistics(pixels: UInt8) -> tuple[Tensor, Tensor]:
    """Return mean (C,) and standard deviation (C,) of pixels (N, H, W, C) in units of [0, 1], exactly."""
    values = np.arange(256) / 255  # (256,)
    counts = np.stack([np.bincount(c.ravel(), minlength=256) for c in np.moveaxis(pixels, -1, 0)])  # (C, 256)
    share = counts / counts.sum(1, keepdims=True)  # (C, 256)
    mean = share @ values  # (C,)
    std = np.sqrt((share * (values - mean[:, None]) ** 2).sum(1))  # (C,)
    return torch.from_numpy(mean).float(), torch.from_numpy(np.where(std > 0, std, 1.0)).float()
