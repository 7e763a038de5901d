"""A million clients are split and counted some at a time: the same numbers, in little memory."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest

from fedsim.contracts import Partition
from fedsim.data.splits import chosen, is_whole, split_clients
from fedsim.metrics.skew import label_counts, label_tv, skew
from fedsim.partition import csr
from fedsim.partition.iid import IID


def drawn(num_samples: int = 700, num_clients: int = 40) -> tuple[Partition, np.ndarray]:
    """Return clients of unequal sizes, some of them empty, and their samples' labels."""
    rng = np.random.default_rng(0)
    owners = rng.integers(-1, num_clients - 3, num_samples) ** 2 // num_clients
    return csr.from_owners(owners, num_clients), rng.integers(0, 5, num_samples)


@pytest.mark.parametrize("block", [1, 7, 100])
def test_blocks_of_clients_are_whole_and_cover_everybody(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "BLOCK_SAMPLES", block)
    partition, _ = drawn()
    blocks = list(csr.client_blocks(partition))
    assert [low for low, _ in blocks] == [0, *(high for _, high in blocks[:-1])]
    assert blocks[-1][1] == partition.num_clients
    held = [int(partition.sizes[low:high].sum()) for low, high in blocks]
    assert all(n <= block or high == low + 1 for n, (low, high) in zip(held, blocks, strict=True))


@pytest.mark.parametrize("block", [1, 7, 100])
@pytest.mark.parametrize("fractions", [(0.0, 0.2), (0.3, 0.0), (0.25, 0.4)])
def test_blocks_change_no_split_and_no_count(
    block: int, fractions: tuple[float, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    partition, labels = drawn()

    def split() -> tuple[list[np.ndarray], np.ndarray]:
        parts = split_clients(
            partition, labels, held_out_clients=0.1, local_validation=fractions[0], local_test=fractions[1], seed=3
        )
        return [array for part in parts[:3] for array in part], label_counts(labels, parts.train, 5)

    whole, counts = split()
    monkeypatch.setattr(csr, "BLOCK_SAMPLES", block)
    again, recounted = split()
    for a, b in zip(whole, again, strict=True):
        np.testing.assert_array_equal(a, b)
    np.testing.assert_array_equal(counts, recounted)


def test_counts_are_those_of_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "BLOCK_SAMPLES", 50)
    partition, labels = drawn()
    counts = np.zeros((partition.num_clients, 5), dtype=np.int64)  # (K, C)
    for k in range(partition.num_clients):
        for position in partition.of(k):
            counts[k, labels[position]] += 1
    np.testing.assert_array_equal(label_counts(labels, partition, 5), counts)
    p, q = counts / np.maximum(counts.sum(1, keepdims=True), 1), counts.sum(0) / counts.sum()
    tv = np.where(counts.sum(1) > 0, np.abs(p - q).sum(1) / 2, np.nan)  # (K,) ½ Σ_c |p_kc − q_c|
    np.testing.assert_array_equal(label_tv(counts), tv)
    np.testing.assert_array_equal(skew(counts).client_tv, tv)


def test_a_whole_range_is_no_copy() -> None:
    values = np.arange(10, 20)
    assert is_whole(np.arange(10))
    for other in ([0, 2, 1, 3], [1, 2, 3], [0, 1, 3], []):
        assert not is_whole(np.array(other, dtype=np.int64))
    assert np.shares_memory(chosen(values, np.arange(7)), values)
    np.testing.assert_array_equal(chosen(values, np.array([0, 2, 1, 3])), values[[0, 2, 1, 3]])
    partition, labels = drawn()
    splits = split_clients(partition, labels, held_out_clients=0.0, local_validation=0.0, local_test=0.2, seed=0)
    assert splits.at(np.arange(len(labels))) is splits
    moved = splits.at(np.arange(len(labels)) + 5)
    np.testing.assert_array_equal(moved.test.indices, splits.test.indices + 5)


def test_samples_of_many_clients_are_split_in_the_room_of_a_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(csr, "BLOCK_SAMPLES", 1 << 12)
    num_samples = 1 << 18
    labels = np.random.default_rng(0).integers(0, 2, num_samples)
    partition = IID(num_clients=num_samples // 8)(labels, np.random.default_rng(1))

    def peak(function: object) -> float:
        tracemalloc.start()
        try:
            function()  # type: ignore[operator]
            return tracemalloc.get_traced_memory()[1] / (8 * num_samples)
        finally:
            tracemalloc.stop()

    def split() -> None:
        split_clients(partition, labels, held_out_clients=0.0, local_validation=0.0, local_test=0.25, seed=0)

    # In arrays of 8 bytes a sample. The result's two are 1.25 + 2 · 1/8; all at once it was 12, and 5 to count.
    assert peak(split) < 3
    assert peak(lambda: label_counts(labels, partition, 2)) < 1
