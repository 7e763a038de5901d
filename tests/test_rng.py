"""Keyed randomness: a function of (seed, purpose, key) and of nothing else."""

import hashlib
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fedsim.rng import (
    fold_in,
    generator,
    keyed_bits,
    keyed_uniform,
    segment_permutations,
    torch_generator,
    uniform_like,
)

# Uniformity tests run on fixed seeds, so they are exact: a p-value above 1e-4 now is one for ever.
P_VALUE = 1e-4
DERANDOMIZED = settings(derandomize=True, deadline=None, max_examples=50)


@pytest.mark.parametrize("make", [generator, keyed_bits, torch_generator])
def test_equal_keys_give_equal_streams_and_any_other_argument_another(make):
    def first(*key):
        made = make(*key)
        if isinstance(made, np.random.Generator):
            return int(made.integers(2**63))
        return made.initial_seed() if isinstance(made, torch.Generator) else int(made)

    keys = [(0, "cohort", 1, 2), (1, "cohort", 1, 2), (0, "order", 1, 2), (0, "cohort", 2, 2), (0, "cohort", 1, 3)]
    keys += [(0, "cohort", 2, 1), (0, "cohort", 1), (2**63 - 1, "cohort", 1, 2)]
    assert [first(*key) for key in keys] == [first(*key) for key in keys]
    assert len({first(*key) for key in keys}) == len(keys)


def test_streams_are_those_of_the_first_release():
    """A change of any of these changes every result ever published with fedsim: bump the version if it must be."""
    # SplitMix64 by hand, in Python's own integers: an oracle that shares no code with NumPy's wrap-around.
    mask = 2**64 - 1

    def mix(x):
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
        return x ^ (x >> 31)

    golden = 0x9E3779B97F4A7C15
    purpose = int.from_bytes(hashlib.blake2b(b"order", digest_size=8).digest(), "little")
    state = mix((7 + golden) & mask)
    for word in (purpose, 3, 11):
        state = mix(((state ^ word) + golden) & mask)
    assert int(keyed_bits(7, "order", 3, 11)) == state
    sequence = np.random.SeedSequence([7, purpose, 3, 11])
    assert generator(7, "order", 3, 11).random() == np.random.Generator(np.random.PCG64(sequence)).random()


def test_streams_do_not_depend_on_the_process():
    code = "from fedsim.rng import generator, keyed_bits; print(generator(1, 'a', 2).random(), keyed_bits(1, 'a', 2))"
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}  # not this process's salt of `hash`
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == f"{generator(1, 'a', 2).random()} {keyed_bits(1, 'a', 2)}\n"


def test_keyed_bits_broadcast_like_one_call_a_key():
    rounds, clients = np.arange(3)[:, None], np.arange(5)[None, :]
    table = keyed_bits(9, "latency", rounds, clients)  # (3, 5)
    assert table.shape == (3, 5)
    assert all(table[t, k] == keyed_bits(9, "latency", t, k) for t in range(3) for k in range(5))
    seeds = np.array([4, 9])
    assert keyed_bits(seeds, "latency", 1)[1] == keyed_bits(9, "latency", 1)
    assert len(np.unique(table)) == 15


def test_keyed_uniforms_are_uniform_and_independent_of_their_neighbours():
    u = keyed_uniform(0, "x", np.arange(20_000))
    assert u.min() >= 0
    assert u.max() < 1
    assert stats.kstest(u, "uniform").pvalue > P_VALUE
    assert abs(np.corrcoef(u[:-1], u[1:])[0, 1]) < 4 / np.sqrt(len(u))  # four standard errors of zero correlation


@DERANDOMIZED
@given(sizes=st.lists(st.integers(0, 9), max_size=12), seed=st.integers(0, 2**63 - 1))
def test_segment_permutations_permute_every_segment_in_its_own_place(sizes, seed):
    sizes = np.array(sizes, dtype=np.int64)
    keys = keyed_bits(seed, "order", np.arange(len(sizes)))
    order = segment_permutations(keys, sizes)  # (N,)
    ends = np.cumsum(sizes)
    for s, (low, high) in enumerate(zip(ends - sizes, ends, strict=True)):
        assert sorted(order[low:high]) == list(range(low, high))
        alone = segment_permutations(keys[s : s + 1], sizes[s : s + 1])
        np.testing.assert_array_equal(order[low:high] - low, alone)  # whoever else is there


def test_segment_permutations_are_uniform_over_all_orders():
    repeats = 6000
    order = segment_permutations(keyed_bits(1, "order", np.arange(repeats)), np.full(repeats, 3))
    inside = order.reshape(repeats, 3) - 3 * np.arange(repeats)[:, None]
    _, counts = np.unique(inside @ [9, 3, 1], return_counts=True)
    assert len(counts) == 6
    assert stats.chisquare(counts).pvalue > P_VALUE


def test_uniform_like_is_uniform_and_a_pure_function_of_its_key():
    x = torch.empty(100, 200)
    key = fold_in(torch.tensor(12345), 3)
    u = uniform_like(x, key)
    assert u.shape == x.shape
    assert u.dtype == x.dtype
    assert torch.equal(u, uniform_like(x, key))
    assert not torch.equal(u, uniform_like(x, fold_in(torch.tensor(12345), 4)))
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    assert stats.kstest(u.flatten().double().numpy(), "uniform").pvalue > P_VALUE


def test_uniforms_of_the_two_float_types_are_the_same_numbers():
    key = torch.tensor(7)
    single, double = uniform_like(torch.empty(1000), key), uniform_like(torch.empty(1000, dtype=torch.float64), key)
    assert torch.equal(single.double(), double)  # 24 bits fit both


def test_folded_keys_stay_in_32_bits_and_rarely_collide():
    keys = fold_in(torch.arange(300).unsqueeze(1), torch.arange(300))  # (300, 300)
    assert keys.dtype == torch.int64
    assert int(keys.min()) >= 0
    assert int(keys.max()) < 2**32
    # 90,000 draws of 2^32 collide n²/2^33 = 0.94 times on average; 12 has probability below 1e-9 (Poisson).
    assert keys.numel() - len(keys.unique()) < 12


def test_fold_in_is_batchable():
    folded = torch.vmap(lambda key: fold_in(key, 5))(torch.arange(10))
    assert torch.equal(folded, torch.stack([fold_in(torch.tensor(k), 5) for k in range(10)]))
