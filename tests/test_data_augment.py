"""CropFlip: a pure function of samples and keys, equal to a naive loop, in a batch and under vmap."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fedsim.data.augment import CropFlip
from fedsim.rng import fold_in

KEYS = torch.arange(1000, dtype=torch.int64) * 7919 % 2**32


def images(num: int, channels: int = 3, height: int = 6, width: int = 5) -> Tensor:
    return 1 + torch.rand(num, channels, height, width, generator=torch.Generator().manual_seed(0))


def naive(x: Tensor, key: Tensor, padding: int, flip: bool) -> Tensor:
    """Pad, crop at the keyed place, mirror if the key says so: one sample at a time."""
    rows = []
    for image, k in zip(x, key, strict=True):
        places = 2 * padding + 1
        top, left = (int(fold_in(k, axis)) * places // 2**32 for axis in (1, 2))
        height, width = image.shape[-2:]
        padded = torch.nn.functional.pad(image, [padding] * 4)
        crop = padded[:, top : top + height, left : left + width]
        rows.append(crop.flip(-1) if flip and int(fold_in(k, 3)) % 2 else crop)
    return torch.stack(rows)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("padding", [0, 1, 4, 9])
def test_equals_a_naive_loop(padding, flip):
    x = images(64)
    augment = CropFlip(padding=padding, flip=flip)
    assert torch.equal(augment(x, KEYS[:64]), naive(x, KEYS[:64], padding, flip))


def test_a_samples_change_depends_on_its_own_key_alone():
    x, augment = images(64), CropFlip()
    whole = augment(x, KEYS[:64])
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    assert torch.equal(augment(x[order], KEYS[:64][order]), whole[order])
    assert torch.equal(augment(x[5:6], KEYS[5:6]), whole[5:6])
    assert not torch.equal(augment(x, KEYS[1:65]), whole)


def test_vmap_over_clients_gives_the_same_bits():
    x, key = images(60).view(6, 10, 3, 6, 5), KEYS[:60].view(6, 10)
    augment = CropFlip(padding=2)
    batched = torch.func.vmap(augment)(x, key)
    assert torch.equal(batched, torch.stack([augment(a, k) for a, k in zip(x, key, strict=True)]))


def test_shifts_and_flips_are_uniform():
    # A picture of its own coordinates: the centre pixel tells the shift, its neighbour the flip.
    grid = torch.arange(1.0, 26.0).view(1, 1, 5, 5).expand(1000, 1, 5, 5)
    out = CropFlip(padding=1)(grid, KEYS)
    centre = out[:, 0, 2, 2].long() - 1
    flipped = out[:, 0, 2, 3] < out[:, 0, 2, 2]
    counts = torch.bincount(centre // 5 * 3 + centre % 5 - 4, minlength=9)
    # Binomial(1000, 1/9): 111 ± 9.9; Binomial(1000, 1/2): 500 ± 15.8; five standard deviations of each.
    assert counts.shape == (9,)
    assert (counts - 1000 / 9).abs().max() < 50
    assert abs(int(flipped.sum()) - 500) < 80


def test_nothing_to_do_changes_nothing_and_the_input_stays():
    x = images(8)
    before = x.clone()
    assert torch.equal(CropFlip(padding=0, flip=False)(x, KEYS[:8]), x)
    CropFlip()(x, KEYS[:8])
    assert torch.equal(x, before)


def test_the_border_is_zero():
    out = CropFlip(padding=4, flip=False)(images(100), KEYS[:100])  # pixels are ≥ 1
    assert (out == 0).any()
    assert ((out == 0) | (out >= 1)).all()


def test_gradients_pass_to_the_pixels_that_are_kept():
    x = images(4).double().requires_grad_()
    out = CropFlip()(x, KEYS[:4])
    (grad,) = torch.autograd.grad(out.sum(), x)
    torch.testing.assert_close((grad * x).sum(), out.sum())
    assert set(grad.unique().tolist()) <= {0.0, 1.0}


def test_a_negative_padding_is_refused():
    with pytest.raises(ValueError, match="padding must be ≥ 0 pixels, got -1"):
        CropFlip(padding=-1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_cuda_gives_the_same_bits():
    x, augment = images(64), CropFlip()
    assert torch.equal(augment(x.cuda(), KEYS[:64].cuda()).cpu(), augment(x, KEYS[:64]))
