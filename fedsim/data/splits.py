"""Who may look at what: server validation, each client's own splits, and clients that never train."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from fedsim.contracts import Dataset, Partition
from fedsim.errors import UserError
from fedsim.partition.csr import check_fraction, client_blocks
from fedsim.partition.rounding import largest_remainder
from fedsim.rng import generator, keyed_bits

Int = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


class ClientSplits(NamedTuple):
    """Each client's samples in three parts; all parts have the K clients of the partition they were split from."""

    train: Partition
    validation: Partition
    test: Partition
    held_out: Bool  # (K,) clients that never train: no train and no validation part, all they have is test

    def at(self, positions: Int) -> ClientSplits:
        """Return the same splits with index i replaced by positions[i]: from training samples to the data set's."""
        if is_whole(positions):  # a million clients' positions are 80 MB
            return self
        train, validation, test = (p._replace(indices=positions[p.indices]) for p in self[:3])
        return ClientSplits(train, validation, test, self.held_out)

    def join(self, *names: str) -> Partition:
        """Return each client's samples of several parts, e.g. what a partitioner's `corrupts` names."""
        parts = [getattr(self, name) for name in names]
        client = np.concatenate([np.repeat(np.arange(p.num_clients), p.sizes) for p in parts])  # (M,)
        indices = np.concatenate([p.indices for p in parts])  # (M,)
        return Partition(indices[np.argsort(client, kind="stable")], np.sum([p.offsets for p in parts], axis=0))


def is_whole(positions: Int) -> bool:
    """Say whether positions are 0, 1, …, n − 1, so that indexing by them copies a beginning and nothing else."""
    if not len(positions) or positions[0] != 0 or positions[-1] != len(positions) - 1:
        return False
    return bool((positions[1:] > positions[:-1]).all())


def chosen(values: Int, positions: Int) -> Int:
    """Return values[positions], a view where positions are a beginning."""
    return values[: len(positions)] if is_whole(positions) else values[positions]


def validation_split(dataset: Dataset, fraction: float, seed: int) -> Dataset:
    """Move a part of the split "train", with its class proportions, to the split "validation".

    Moved samples join a validation split that the data already has. Class sizes are rounded by largest remainders.

    Args:
        dataset: with a split "train" of n samples.
        fraction: of the training samples, in [0, 1); round(fraction · n) move, and at least one stays.
        seed: the choice is a function of (seed, "validation") alone.

    Returns:
        The data set with other splits, positions ascending; the same object if nothing moves.

    Raises:
        ValueError: fraction is out of range.

    """
    check_fraction("validation", fraction)
    if fraction == 1:
        raise ValueError("validation must be a number in [0, 1), got 1: nothing would be left to train on")
    train = np.asarray(dataset.splits["train"])  # (n,)
    num_moved = min(_nearest(fraction * len(train)), len(train) - 1)
    if num_moved <= 0:
        return dataset
    labels = dataset.y.cpu().numpy()[train]  # (n,)
    moved = _draw_stratified(labels, num_moved, generator(seed, "validation"))  # (n,) bool
    known = dataset.splits.get("validation", np.empty(0, dtype=np.int64))
    validation = np.sort(np.concatenate([known, train[moved]])).astype(np.int64)  # (m,)
    return dataset._replace(splits={**dataset.splits, "train": np.sort(train[~moved]), "validation": validation})


def _nearest(x: float) -> int:
    return int(np.floor(x + 0.5))


def _draw_stratified(labels: Int, number: int, rng: np.random.Generator) -> Bool:
    """Return a mask (N,) of `number` samples with the class proportions of labels (N,)."""
    counts = np.bincount(labels)  # (C,)
    wanted = largest_remainder([number], counts[None])[0]  # (C,)
    shuffled = rng.permutation(len(labels))  # (N,)
    by_class = shuffled[np.argsort(labels[shuffled], kind="stable")]  # (N,)
    rank = np.arange(len(labels)) - np.repeat(np.cumsum(counts) - counts, counts)  # (N,) within the class
    chosen = np.zeros(len(labels), dtype=bool)  # (N,)
    chosen[by_class[rank < np.repeat(wanted, counts)]] = True
    return chosen


def split_clients(
    partition: Partition,
    labels: Int,
    *,
    held_out_clients: float,
    local_validation: float,
    local_test: float,
    seed: int,
) -> ClientSplits:
    r"""Split every client's samples with the client's own label distribution.

    A client of n_k samples gives m_k = round(local_test · n_k) to its test part, and of class c

    .. math:: \lfloor m_k n_{kc} / n_k \rfloor \text{ or } \lceil m_k n_{kc} / n_k \rceil

    by largest remainders; then, of the others, round(local_validation · n_k) to its validation part likewise. A
    client keeps at least one training sample, at the cost of validation before test. Held-out clients, that is
    round(held_out_clients · K) of them and at least one if the fraction is positive, have all their samples in
    test. A larger fraction holds out the same clients and more.

    Args:
        partition: K clients.
        labels: (N,) classes, indexed by `partition.indices`.
        held_out_clients: fraction of clients, in [0, 1); at least one client trains.
        local_validation: fraction of a client's samples, in [0, 1).
        local_test: likewise; the two sum to less than 1.
        seed: who is held out is a function of (seed, K), and which of a client's samples goes where of
            (seed, its samples): not of the other clients.

    Returns:
        Three partitions of K clients over the same positions, and who is held out.

    Raises:
        ValueError: a fraction is out of range, or all clients would be held out.

    """
    for name, value in (
        ("held_out_clients", held_out_clients),
        ("local_validation", local_validation),
        ("local_test", local_test),
    ):
        check_fraction(name, value)
    if local_validation + local_test >= 1:
        raise ValueError(
            f"local_validation + local_test must be < 1, got {local_validation!r} + {local_test!r}: "
            "nothing would be left to train on"
        )
    sizes = partition.sizes  # (K,)
    held_out = _choose_held_out(sizes, held_out_clients, seed)  # (K,)
    num_test = np.minimum(np.floor(local_test * sizes + 0.5), np.maximum(sizes - 1, 0)).astype(np.int64)  # (K,)
    num_test = np.where(held_out, sizes, num_test)
    room = np.maximum(sizes - num_test - 1, 0)  # (K,)
    num_validation = np.minimum(np.floor(local_validation * sizes + 0.5), room).astype(np.int64)  # (K,)
    if not num_test.any() and not num_validation.any():  # sorting a million clients' samples takes seconds and 0.5 GB
        none = Partition(partition.indices[:0], np.zeros_like(partition.offsets))
        return ClientSplits(partition, none, none, held_out)

    part = np.zeros(len(partition.indices), dtype=np.int8)  # (M,) 0 train, 1 validation, 2 test
    for low, high in client_blocks(partition):
        inside = slice(partition.offsets[low], partition.offsets[high])
        some = Partition(partition.indices[inside], partition.offsets[low : high + 1] - inside.start)
        part[inside] = _parts(some, np.asarray(labels), num_test[low:high], num_validation[low:high], seed)
    return _in_parts(partition, part, held_out)


def _parts(partition: Partition, labels: Int, num_test: Int, num_validation: Int, seed: int) -> npt.NDArray[np.int8]:
    """Return the part (M,) of each of a partition's samples: 0 train, 1 validation, 2 test."""
    # Samples in order of (client, class, keyed random bits), and the runs of equal (client, class) in that order.
    client = np.repeat(np.arange(partition.num_clients), partition.sizes)  # (M,)
    classes = labels[partition.indices]  # (M,)
    cell = client * (int(classes.max(initial=0)) + 1) + classes  # (M,)
    order = np.argsort(keyed_bits(seed, "local_split", partition.indices))  # (M,)
    order = order[np.argsort(cell[order], kind="stable")]
    start = np.flatnonzero(np.diff(cell[order], prepend=-1))  # (R,) first sample of each run
    count = np.diff(start, append=len(order))  # (R,)
    owner = client[order[start]]  # (R,) client of each run, ascending
    from_test = _largest_remainder_within(num_test, count, owner)  # (R,)
    from_validation = _largest_remainder_within(num_validation, count - from_test, owner)  # (R,)

    rank = np.arange(len(order)) - np.repeat(start, count)  # (M,) within the run
    part = np.empty(len(order), dtype=np.int8)  # (M,)
    is_test = rank < np.repeat(from_test, count)
    part[order] = np.where(is_test, 2, rank < np.repeat(from_test + from_validation, count))
    return part


def _choose_held_out(sizes: Int, fraction: float, seed: int) -> Bool:
    number = max(_nearest(fraction * len(sizes)), int(fraction > 0))
    held_out = np.zeros(len(sizes), dtype=bool)  # (K,)
    held_out[generator(seed, "held_out").permutation(len(sizes))[:number]] = True
    if not (sizes[~held_out] > 0).any():
        raise ValueError(f"held_out_clients={fraction!r} leaves no client of {len(sizes)} with data to train; lower it")
    return held_out


def _largest_remainder_within(totals: Int, weights: Int, owner: Int) -> Int:
    """Share totals (K,) in proportion to whole weights (R,) among the runs of each owner (R,), ascending.

    The ragged form of `largest_remainder`: a million clients with a few classes each need no (K, C) matrix.
    """
    sums = np.bincount(owner, weights, minlength=len(totals))  # (K,)
    quotas = totals[owner] * weights / np.maximum(sums, 1)[owner]  # (R,)
    shares: Int = np.floor(quotas).astype(np.int64)  # (R,)
    missing = totals - np.bincount(owner, shares, minlength=len(totals)).astype(np.int64)  # (K,)
    by_fraction = np.lexsort((np.round(shares - quotas, 9), owner))  # (R,) within the owner, largest fraction first
    runs = np.bincount(owner, minlength=len(totals))  # (K,)
    rank = np.arange(len(owner)) - np.repeat(np.cumsum(runs) - runs, runs)  # (R,)
    shares[by_fraction] += rank < missing[owner]
    return shares


def _in_parts(partition: Partition, part: npt.NDArray[np.integer[Any]], held_out: Bool) -> ClientSplits:
    """Split a partition by the part (M,) of each of its indices: 0 train, 1 validation, 2 test."""

    def select(number: int) -> Partition:
        mine = part == number  # (M,)
        sizes = np.zeros(partition.num_clients, dtype=np.int64)  # (K,)
        for low, high in client_blocks(partition):
            inside = slice(partition.offsets[low], partition.offsets[high])
            owner = np.repeat(np.arange(high - low), np.diff(partition.offsets[low : high + 1]))  # (M',)
            sizes[low:high] = np.bincount(owner[mine[inside]], minlength=high - low)
        return Partition(partition.indices[mine], np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64))

    return ClientSplits(select(0), select(1), select(2), held_out)


def save_partition(path: str | Path, partition: Partition, splits: ClientSplits | None = None) -> None:
    """Write a partition, and its splits if given, as `.npz` without pickle.

    Arrays: indices (M,) int64, offsets (K+1,) int64; with splits also held_out (K,) bool and part (M,) uint8, the
    part of each of `indices`: 0 train, 1 validation, 2 test.

    Args:
        path: of the file, replaced if it exists.
        partition: over training samples, so that `partition=saved` can read it.
        splits: of that partition, by `split_clients`.

    """
    arrays: dict[str, npt.NDArray[np.generic]] = {"indices": partition.indices, "offsets": partition.offsets}
    if splits is not None:
        part_of = np.zeros(int(partition.indices.max(initial=-1)) + 1, dtype=np.uint8)  # by sample
        part_of[splits.validation.indices] = 1
        part_of[splits.test.indices] = 2
        arrays |= {"part": part_of[partition.indices], "held_out": splits.held_out}
    # At zlib's default level, np.savez_compressed's, a tenth of the speed and files no smaller: positions look random.
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
                np.lib.format.write_array(file, array, allow_pickle=False)


def load_partition(path: str | Path) -> tuple[Partition, ClientSplits | None]:
    """Read what `save_partition` wrote, checking all of it; the splits are None if the file has none.

    Raises:
        UserError: no such file, not an `.npz` of plain arrays, or the arrays are no partition.

    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in ("indices", "offsets", "part", "held_out") if name in file}
    except (OSError, ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} can't be read as a partition (.npz without pickle): {error}") from error
    if "indices" not in arrays or "offsets" not in arrays:
        raise UserError(f"{path} is no partition: it needs arrays 'indices' (M,) and 'offsets' (K+1,)")
    partition = _checked(path, arrays["indices"], arrays["offsets"])
    if "part" not in arrays or "held_out" not in arrays:
        return partition, None
    part, held_out = arrays["part"], arrays["held_out"].astype(bool)
    if part.shape != partition.indices.shape or held_out.shape != (partition.num_clients,) or (part > 2).any():
        raise UserError(f"{path} is no partition with splits: 'part' must be (M,) in 0..2 and 'held_out' (K,)")
    return partition, _in_parts(partition, part, held_out)


def _checked(path: str | Path, indices: npt.NDArray[np.generic], offsets: npt.NDArray[np.generic]) -> Partition:
    for name, array in (("indices", indices), ("offsets", offsets)):
        if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
            raise UserError(f"{path}: {name} must be a vector of integers, got {array.dtype} of shape {array.shape}")
    partition = Partition(indices.astype(np.int64), offsets.astype(np.int64))
    ends_fit = len(offsets) >= 2 and partition.offsets[0] == 0 and partition.offsets[-1] == len(indices)
    if not ends_fit or (partition.sizes < 0).any():
        raise UserError(
            f"{path}: offsets must rise from 0 to the number of indices, {len(indices)}, with K + 1 entries"
        )
    if len(indices) and (partition.indices.min() < 0 or len(np.unique(indices)) < len(indices)):
        raise UserError(f"{path}: indices must be >= 0 and all different: a sample is given to one client only")
    return partition
