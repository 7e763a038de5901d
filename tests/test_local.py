"""What a client does in a round, and in which order it sees its samples."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts import Partition, Phase
from fedsim.local import LocalTraining, moving, schedule

DERANDOMIZED = settings(derandomize=True, deadline=None, max_examples=60)
SIZES = st.lists(st.integers(0, 13), min_size=1, max_size=8)
TRAINING = st.builds(
    LocalTraining,
    batch_size=st.none() | st.integers(1, 6),
    local_epochs=st.integers(1, 3),
    local_steps=st.none() | st.integers(1, 9),
)


def partition_of(sizes, seed=0):
    """Return a partition of shuffled positions that start at 100: none is its own index."""
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Partition(100 + np.random.default_rng(seed).permutation(int(offsets[-1])), offsets)


def stream(plan, row):
    return plan.positions[plan.starts[row] : plan.starts[row + 1]]


def batches(plan, row):
    bounds = (plan.bounds(row, step) for step in range(int(plan.num_steps[row])))
    return [stream(plan, row)[low:high] for low, high in bounds]


@DERANDOMIZED
@given(sizes=SIZES, training=TRAINING, seed=st.integers(0, 2**63 - 1))
def test_every_pass_is_a_permutation_of_the_clients_samples_cut_into_batches(sizes, training, seed):
    partition = partition_of(sizes)
    clients = np.arange(len(sizes))
    plan = schedule(training, partition, clients, seed=seed, round=3)
    assert plan.positions.dtype == np.int64
    assert plan.starts[-1] == len(plan.positions)
    for k, n in enumerate(sizes):
        an_epoch = 0 if n == 0 else math.ceil(n / (training.batch_size or n))
        expected = training.local_epochs * an_epoch
        if training.local_steps is not None:
            expected = training.local_steps if n else 0
        assert plan.num_steps[k] == expected
        passes = stream(plan, k).reshape(-1, n) if n else np.zeros((0, 0))
        assert len(passes) == (math.ceil(expected / an_epoch) if n else 0)
        assert all(sorted(one) == sorted(partition.of(k)) for one in passes)
        cut = batches(plan, k)
        size = training.batch_size or n
        lengths = [min(size, n - (step % an_epoch) * size) for step in range(expected)]
        assert [len(batch) for batch in cut] == lengths
        if cut:
            np.testing.assert_array_equal(np.concatenate(cut), stream(plan, k)[: sum(lengths)])


@DERANDOMIZED
@given(sizes=SIZES, training=TRAINING, data=st.data())
def test_a_rows_stream_does_not_depend_on_who_else_is_in_the_cohort(sizes, training, data):
    partition = partition_of(sizes)
    whole = schedule(training, partition, np.arange(len(sizes)), seed=1, round=2)
    some = np.array(sorted(data.draw(st.sets(st.integers(0, len(sizes) - 1), min_size=1))))
    plan = schedule(training, partition, some, seed=1, round=2)
    for row, client in enumerate(some):
        np.testing.assert_array_equal(stream(plan, row), stream(whole, client))
    # nor on the clients' slices of the partition: the same samples elsewhere in it, in the same order
    shifted = Partition(partition.indices, np.concatenate([[0], partition.offsets]))
    moved = schedule(training, shifted, some + 1, seed=1, round=2)
    np.testing.assert_array_equal(moved.num_steps, plan.num_steps)


def test_each_pass_round_client_seed_and_phase_has_its_own_order():
    partition = partition_of([40, 40])
    same = Partition(np.concatenate([partition.indices[:40]] * 2), partition.offsets)  # two clients, equal samples
    training = LocalTraining(local_epochs=2, batch_size=7)
    orders = []
    for seed, round, phase in ((0, 1, 0), (0, 2, 0), (1, 1, 0), (0, 1, 1)):
        plan = schedule(training, same, np.array([0, 1]), seed=seed, round=round, phase=(phase, None))
        orders += [tuple(one) for row in (0, 1) for one in stream(plan, row).reshape(2, 40)]
    assert len(set(orders)) == len(orders) == 16  # 40! orders: no two are equal by chance


def test_more_steps_and_more_epochs_go_on_with_the_same_stream():
    partition = partition_of([10, 3])
    few = schedule(LocalTraining(batch_size=4), partition, np.array([0, 1]), seed=5, round=1)
    many = schedule(LocalTraining(batch_size=4, local_epochs=3), partition, np.array([0, 1]), seed=5, round=1)
    steps = schedule(LocalTraining(batch_size=4, local_steps=5), partition, np.array([0, 1]), seed=5, round=1)
    for row, n in enumerate((10, 3)):
        np.testing.assert_array_equal(stream(few, row), stream(many, row)[:n])
        for mine, theirs in zip(batches(steps, row), batches(many, row), strict=False):
            np.testing.assert_array_equal(mine, theirs)


def test_rows_may_have_their_own_seed_and_round():
    partition = partition_of([9, 9, 9])
    clients = np.array([0, 1, 2])
    training = LocalTraining(batch_size=4, local_epochs=2)
    mixed = schedule(training, partition, clients, seed=np.array([3, 4, 3]), round=np.array([7, 7, 8]))
    for row, (seed, round) in enumerate(((3, 7), (4, 7), (3, 8))):
        alone = schedule(training, partition, clients[row : row + 1], seed=seed, round=round)
        np.testing.assert_array_equal(stream(mixed, row), stream(alone, 0))


def test_phases_have_their_own_length():
    training, sizes = LocalTraining(batch_size=4, local_epochs=2), np.array([10, 0, 1])
    assert training.num_steps(sizes).tolist() == [6, 0, 2]
    assert training.num_steps(sizes, Phase()).tolist() == [6, 0, 2]
    assert training.num_steps(sizes, Phase(local_epochs=1)).tolist() == [3, 0, 1]
    assert training.num_steps(sizes, Phase(local_steps=5)).tolist() == [5, 0, 5]
    stepping = LocalTraining(batch_size=4, local_steps=7)
    assert stepping.num_steps(sizes, Phase(local_epochs=1)).tolist() == [3, 0, 1]
    assert LocalTraining(batch_size=None, local_epochs=3).num_steps(sizes).tolist() == [3, 0, 3]


def test_rate_decays_every_so_many_rounds():
    training = LocalTraining(lr=0.8, lr_decay=0.5, lr_decay_every=2)
    assert [training.rate(t) for t in range(1, 6)] == [0.8, 0.8, 0.4, 0.4, 0.2]  # powers of two: exact
    assert LocalTraining(lr=0.3).rate(10**6) == 0.3


def test_a_phase_moves_the_parameters_its_pattern_finds():
    names = ("body.weight", "body.bias", "head.weight")
    assert moving(names, None) == moving(names, Phase()) == names
    assert moving(names, Phase(params=r"^head\.")) == ("head.weight",)
    with pytest.raises(ValueError, match=r"matching 'tail', but none does; known: \['body.weight'"):
        moving(names, Phase(params="tail"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"optimizer": "sgdm"}, "optimizer must be 'sgd' or 'adamw', got 'sgdm'"),
        ({"lr": 0.0}, "lr must be > 0, got 0.0"),
        ({"lr": math.nan}, "lr must be > 0, got nan"),
        ({"lr": math.inf}, "lr must be > 0, got inf"),
        ({"lr_decay": 1.5}, r"lr_decay must be in \(0, 1\], got 1.5"),
        ({"lr_decay_every": 0}, "lr_decay_every must be an integer >= 1, got 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"momentum": 0.9, "optimizer": "adamw"}, "momentum belongs to optimizer=sgd"),
        ({"weight_decay": -1e-4}, "weight_decay must be >= 0 and finite, got -0.0001"),
        ({"weight_decay": math.inf}, "weight_decay must be >= 0 and finite, got inf"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1, got 0"),
        ({"batch_size": 2.5}, "batch_size must be an integer >= 1, got 2.5"),
        ({"batch_size": True}, "batch_size must be an integer >= 1, got True"),
        ({"local_epochs": 0}, "local_epochs must be an integer >= 1, got 0"),
        ({"local_epochs": None}, "local_epochs must be an integer >= 1, got None"),
        ({"local_steps": -1}, "local_steps must be an integer >= 1, got -1"),
        ({"clip_norm": 0.0}, "clip_norm must be > 0 or null, got 0.0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, message):
    with pytest.raises(ValueError, match=message):
        LocalTraining(**arguments)
