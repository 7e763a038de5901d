"""Randomness as a function of (seed, purpose, key): never of scheduling, worker count or what ran before.

Two forms. `generator` gives a NumPy generator for one key: cohorts, partitions, noise of a round.
`keyed_bits` hashes whole arrays of keys at once, because a round over 1000 clients cannot afford 1000
generators (15 µs each): data order and everything else that is drawn per client and sample. Inside a model,
`uniform_like` draws from a key that is itself a tensor, so that dropout gives equal masks on every engine.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

UInt64 = npt.NDArray[np.uint64]

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)
_MASK_32 = 0xFFFFFFFF


@lru_cache(maxsize=256)
def _purpose_id(purpose: str) -> int:
    return int.from_bytes(hashlib.blake2b(purpose.encode(), digest_size=8).digest(), "little")


def generator(seed: int, purpose: str, *key: int) -> np.random.Generator:
    """Return the generator of (seed, purpose, key); equal arguments give equal streams.

    Args:
        seed: any integer ≥ 0.
        purpose: what the numbers are for ("cohort", "partition", …); two purposes never share a stream.
        key: integers ≥ 0, e.g. the round and the client.

    """
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, _purpose_id(purpose), *key])))


def torch_generator(seed: int, purpose: str, *key: int) -> torch.Generator:
    """Return a CPU `torch.Generator` for (seed, purpose, key)."""
    bits = int(keyed_bits(seed, purpose, *key)) >> 1
    return torch.Generator().manual_seed(bits)


def _mix(x: UInt64) -> UInt64:
    """Finalise 64 bits (SplitMix64, Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_1
    x = (x ^ (x >> np.uint64(27))) * _MIX_2
    return x ^ (x >> np.uint64(31))


def keyed_bits(seed: int | npt.NDArray[np.int64], purpose: str, *keys: Any) -> UInt64:
    """Hash (seed, purpose, keys) to 64 uniform bits each, broadcasting over integer arrays ≥ 0."""
    with np.errstate(over="ignore"):
        state = _mix(np.asarray(seed, dtype=np.uint64) + _GOLDEN)
        state = _mix((state ^ np.uint64(_purpose_id(purpose))) + _GOLDEN)
        for key in keys:
            state = _mix((state ^ np.asarray(key).astype(np.uint64)) + _GOLDEN)
    return state


def keyed_uniform(seed: int, purpose: str, *keys: Any) -> npt.NDArray[np.float64]:
    """Return uniforms in [0, 1), one for each broadcast key."""
    bits = keyed_bits(seed, purpose, *keys) >> np.uint64(11)
    return bits.astype(np.float64) * 2.0**-53


def segment_permutations(keys: UInt64, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Permute every segment of a concatenation independently, each by its own key.

    Args:
        keys: (S,) of `keyed_bits`, e.g. of (seed, "order", round, client, epoch).
        sizes: (S,) lengths ≥ 0; their sum is N. S < 2^24.

    Returns:
        (N,) int64 positions into the concatenation: segment s occupies its own slice, in keyed random order.

    """
    segment = np.repeat(np.arange(len(sizes), dtype=np.uint64), sizes)  # (N,)
    starts = np.cumsum(sizes) - sizes  # (S,)
    position = (np.arange(len(segment), dtype=np.int64) - np.repeat(starts, sizes)).astype(np.uint64)  # (N,)
    with np.errstate(over="ignore"):
        bits = _mix((np.repeat(keys, sizes) ^ position) + _GOLDEN)  # (N,)
    # One sort for all segments: the segment in the high 24 bits, 40 random bits below (ties keep position order).
    return np.argsort((segment << np.uint64(40)) | (bits >> np.uint64(24)), kind="stable")


def _hash_32(x: Tensor) -> Tensor:
    """Hash the low 32 bits held in an int64 tensor ("lowbias32"); batchable and equal on every device."""
    x = x & _MASK_32
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK_32
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK_32
    return x ^ (x >> 16)


def fold_in(key: Tensor, value: int | Tensor) -> Tensor:
    """Derive a new int64 key (32 significant bits) from a key tensor and an integer."""
    return _hash_32(_hash_32(key + 0x9E3779B9) ^ (value * 0x85EBCA6B))


def _hash_int32(x: Tensor) -> Tensor:
    """`_hash_32` on bits held in int32, where products wrap: five times as fast on a CPU's vector units."""
    x = x ^ ((x >> 16) & 0xFFFF)
    x *= 0x7FEB352D
    x ^= (x >> 15) & 0x1FFFF
    x *= 0x846CA68B - (1 << 32)
    x ^= (x >> 16) & 0xFFFF
    return x


def uniform_like(x: Tensor, key: Tensor) -> Tensor:
    """Return uniforms in [0, 1) of the shape of x, a pure function of the int64 tensor `key`: scalar, or broadcast."""
    counter = torch.arange(x.numel(), device=x.device).to(torch.int32).view(x.shape)
    bits = _hash_int32(_hash_int32(counter) ^ key.to(torch.int32))
    return ((bits >> 8) & 0xFFFFFF).to(x.dtype) * 2.0**-24
