"""Each partitioner against its definition: closed forms, limits, hand cases."""

import itertools
import time

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedsim.contracts import Dataset, Partition
from fedsim.data.splits import save_partition, split_clients
from fedsim.errors import UserError
from fedsim.metrics.skew import label_counts
from fedsim.partition.classes import Classes
from fedsim.partition.dirichlet import Dirichlet
from fedsim.partition.domain import Domain
from fedsim.partition.feature_noise import FeatureNoise
from fedsim.partition.iid import IID
from fedsim.partition.label_noise import LabelNoise
from fedsim.partition.longtail import LongTail
from fedsim.partition.natural import Natural
from fedsim.partition.quantity import Quantity
from fedsim.partition.saved import Saved
from fedsim.partition.shards import Shards

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=25)


def rng(seed=0):
    return np.random.default_rng(seed)


def balanced(num_samples, num_classes):
    return rng(99).permutation(np.arange(num_samples) % num_classes)


# --- Dirichlet -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("alpha", "expected"), [(0.1, 0.55), (0.5, 0.25), (1.0, 2 / 11)])
def test_per_client_skew_is_the_closed_form(alpha, expected):
    """E Σ_c q² = (α + 1) / (C α + 1) for q ~ Dir(α 1_C), by the second moments of the Dirichlet."""
    assert expected == pytest.approx((alpha + 1) / (10 * alpha + 1))
    # With many clients the demand for each class is near its supply, so that hardly any draw is repeated.
    labels, size = balanced(100_000, 10), 25
    counts = label_counts(labels, Dirichlet(num_clients=4000, alpha=alpha, mode="per_client")(labels, rng()), 10)
    plug_in = ((counts / size) ** 2).sum(1)  # (K,) of mean Σ q² (1 - 1/n) + 1/n, by the multinomial's moments
    simpson = (plug_in - 1 / size) / (1 - 1 / size)
    # Five standard errors of 4000 clients, 0.004 each at most, and as much for the repeated draws.
    assert simpson.mean() == pytest.approx(expected, abs=0.02)


def per_client_by_hand(totals, num_clients, alpha, generator):
    """One sample after the other, clients in random order, classes that are used up left out of q."""
    q = generator.dirichlet(np.full(len(totals), alpha), size=num_clients)
    supply, counts = totals.copy(), np.zeros((num_clients, len(totals)), dtype=int)
    for client in generator.permutation(np.repeat(np.arange(num_clients), totals.sum() // num_clients)):
        p = q[client] * (supply > 0)
        c = generator.choice(len(totals), p=p / p.sum())
        supply[c] -= 1
        counts[client, c] += 1
    return counts


def test_drawing_all_clients_together_keeps_a_little_more_skew_than_drawing_one_by_one():
    labels = np.repeat(np.arange(4), [40, 20, 10, 10])
    together, alone = [], []
    for seed in range(150):
        part = Dirichlet(num_clients=8, alpha=0.3, mode="per_client")(labels, rng(seed))
        together.append(((label_counts(labels, part, 4) / 10) ** 2).sum(1).mean())
        hand = per_client_by_hand(np.bincount(labels), 8, 0.3, rng(10_000 + seed))
        alone.append(((hand / 10) ** 2).sum(1).mean())
    error = (np.var(together) / 150 + np.var(alone) / 150) ** 0.5
    assert error < 0.01
    # First choices come first: over 3000 seeds Σ q² is 0.544 ± 0.001 against 0.522 ± 0.001.
    assert np.mean(together) - np.mean(alone) == pytest.approx(0.022, abs=4 * error)


@pytest.mark.parametrize(("alpha", "num_clients"), [(0.1, 10), (0.5, 10), (0.1, 100), (1.0, 50)])
def test_per_class_skew_is_the_closed_form(alpha, num_clients):
    """E Σ_k P_ck² = (α + 1) / (K α + 1) for P_c ~ Dir(α 1_K)."""
    labels = balanced(200_000, 200)
    counts = label_counts(labels, Dirichlet(num_clients=num_clients, alpha=alpha, min_size=0)(labels, rng()), 200)
    simpson = ((counts / counts.sum(0)) ** 2).sum(0)  # (C,)
    expected = (alpha + 1) / (num_clients * alpha + 1)
    # 200 classes: five standard errors, plus the rounding of 1000 samples.
    assert simpson.mean() == pytest.approx(expected, abs=5 * simpson.std() / 200**0.5 + 1e-3)


def test_the_total_scale_is_alpha_over_the_number_of_components():
    labels = balanced(20_000, 10)
    for mode, parts in (("per_class", 20), ("per_client", 10)):
        total = Dirichlet(num_clients=20, alpha=0.5, mode=mode, alpha_scale="total")(labels, rng(1))
        component = Dirichlet(num_clients=20, alpha=0.5 / parts, mode=mode)(labels, rng(1))
        np.testing.assert_array_equal(total.indices, component.indices)
        np.testing.assert_array_equal(total.offsets, component.offsets)


def test_large_alpha_per_class_is_iid_to_the_sample():
    labels = balanced(4000, 10)
    counts = label_counts(labels, Dirichlet(num_clients=20, alpha=1e9)(labels, rng()), 10)
    # Shares are 1/20 ± 1/20/√1e9, so a quota of 20 samples is off by 1e-3: one sample by rounding.
    assert np.abs(counts - 20).max() <= 1


def test_large_alpha_per_client_draws_from_the_uniform_or_the_pool():
    labels = np.repeat([0, 1, 2], [6000, 3000, 1000])
    part = Dirichlet(num_clients=10, alpha=1e9, mode="per_client", alpha_scale="total")(labels, rng())
    p = label_counts(labels, part, 3) / 1000
    # Each class share of 1000 draws: five standard errors of at most 0.016.
    np.testing.assert_allclose(p, np.tile([0.6, 0.3, 0.1], (10, 1)), atol=0.08)


def test_small_alpha_gives_each_class_to_one_client():
    labels = balanced(1000, 10)
    counts = label_counts(labels, Dirichlet(num_clients=30, alpha=1e-6, min_size=0)(labels, rng()), 10)
    np.testing.assert_array_equal((counts > 0).sum(0), 1)


def test_small_alpha_gives_each_client_one_class_until_classes_run_out():
    labels = balanced(1000, 10)
    counts = label_counts(labels, Dirichlet(num_clients=100, alpha=1e-6, mode="per_client")(labels, rng()), 10)
    np.testing.assert_array_equal(counts.sum(1), 10)
    # A class is left by those that don't get all of their ten; random askers share what there is of it.
    assert np.median((counts > 0).sum(1)) <= 2


@pytest.mark.parametrize("num_clients", [7, 20])
def test_per_client_sizes_are_equal_or_log_normal(num_clients):
    labels = balanced(2003, 5)
    sizes = Dirichlet(num_clients=num_clients, alpha=0.1, mode="per_client")(labels, rng()).sizes
    assert sizes.max() - sizes.min() <= 1
    spread = Dirichlet(num_clients=num_clients, alpha=0.1, mode="per_client", size_sigma=1.0)(labels, rng()).sizes
    assert spread.max() > 2 * spread.min()


def test_min_size_zero_allows_empty_clients_and_one_does_not():
    labels = balanced(100, 2)
    sizes = [Dirichlet(num_clients=30, alpha=0.01, min_size=m)(labels, rng()).sizes for m in (0, 1)]
    assert sizes[0].min() == 0
    assert sizes[1].min() == 1
    more = Dirichlet(num_clients=30, alpha=1.0, min_size=0)(balanced(5, 2), rng())
    assert more.sizes.sum() == 5


def test_repair_leaves_clients_that_are_large_enough_near_their_draw():
    labels = balanced(5000, 10)
    raw = label_counts(labels, Dirichlet(num_clients=100, alpha=0.05, min_size=0)(labels, rng(3)), 10)
    mended = label_counts(labels, Dirichlet(num_clients=100, alpha=0.05, min_size=10)(labels, rng(3)), 10)
    small = raw.sum(1) < 10
    assert small.sum() > 10  # at which drawing again until it fits would practically never end
    np.testing.assert_array_equal(mended[small].sum(1), 10)
    assert np.abs(mended - raw).sum() == 2 * (10 - raw[small].sum(1)).sum()


def test_a_million_samples_over_a_thousand_clients_take_less_than_a_fifth_of_a_second():
    labels = rng().integers(0, 10, 1_000_000)
    partitioner = Dirichlet(num_clients=1000, alpha=0.1, min_size=10)
    seconds = []
    for _ in range(5):
        start = time.process_time()
        partitioner(labels, rng())
        seconds.append(time.process_time() - start)
    assert (
        min(seconds) < 0.2
    )  # 0.05 on an idle core; processor time and the best of five, since the machine may be busy


# --- shards, classes, quantity, iid ----------------------------------------------------------------------------------


@EXAMPLES
@given(num_clients=st.integers(1, 20), shards=st.integers(1, 4), extra=st.integers(0, 50), seed=st.integers(0, 99))
def test_shards_are_equal_runs_of_sorted_labels(num_clients, shards, extra, seed):
    num_shards = num_clients * shards
    labels = rng(seed).integers(0, 6, num_shards * 3 + extra)
    part = Shards(num_clients=num_clients, shards_per_client=shards)(labels, rng(seed))
    smallest = len(labels) // num_shards * shards
    assert part.sizes.min() >= smallest
    assert part.sizes.max() <= smallest + shards
    # A shard lies in at most the classes that a run of its length can touch.
    sorted_labels = np.sort(labels)
    cuts = -(-np.arange(num_shards + 1) * len(labels) // num_shards)
    classes = [len(np.unique(sorted_labels[a:b])) for a, b in itertools.pairwise(cuts)]
    counts = label_counts(labels, part, 6)
    assert (counts > 0).sum() <= sum(classes)
    assert (counts > 0).sum(1).max() <= shards * max(classes)


def test_shards_of_mcmahan_have_two_classes_at_most():
    labels = balanced(6000, 10)
    counts = label_counts(labels, Shards(num_clients=100)(labels, rng()), 10)
    np.testing.assert_array_equal(counts.sum(1), 60)
    assert set((counts > 0).sum(1)) == {1, 2}


@EXAMPLES
@given(num_clients=st.integers(1, 25), num_classes=st.integers(1, 12), k=st.integers(1, 12), seed=st.integers(0, 10**6))
def test_classes_gives_every_client_k_and_shares_each_class_evenly(num_clients, num_classes, k, seed):
    labels = balanced(1000, num_classes)
    partitioner = Classes(num_clients=num_clients, classes_per_client=k)
    if k > num_classes or k * num_clients < num_classes:
        with pytest.raises(ValueError, match="classes_per_client"):
            partitioner(labels, rng(seed))
        return
    counts = label_counts(labels, partitioner(labels, rng(seed)), num_classes)
    np.testing.assert_array_equal((counts > 0).sum(1), k)
    for column in counts.T:
        assert np.ptp(column[column > 0]) <= 1
    if num_clients >= num_classes:
        assert (counts[np.arange(num_clients), np.arange(num_clients) % num_classes] > 0).all()


def test_few_clients_with_many_classes_each_cover_all_classes():
    labels = balanced(900, 9)
    for seed in range(20):
        counts = label_counts(labels, Classes(num_clients=4, classes_per_client=3)(labels, rng(seed)), 9)
        assert (counts.sum(0) == 100).all()
        np.testing.assert_array_equal((counts > 0).sum(1), 3)


def test_classes_skips_labels_that_do_not_occur():
    labels = np.repeat([1, 5], 10)
    counts = label_counts(labels, Classes(num_clients=4, classes_per_client=1)(labels, rng()), 6)
    np.testing.assert_array_equal(counts[:, [1, 5]], [[5, 0], [0, 5], [5, 0], [0, 5]])


def test_quantity_keeps_the_label_distribution_and_skews_sizes():
    labels = balanced(50_000, 4)
    for law, spread in (("dirichlet", 0.5), ("lognormal", 1.0)):
        counts = label_counts(labels, Quantity(num_clients=10, law=law, spread=spread, min_size=500)(labels, rng()), 4)
        sizes = counts.sum(1)
        assert sizes.max() > 3 * sizes.min()
        # Five standard errors of a share of 1/4 among at least 500 draws.
        np.testing.assert_allclose(counts / sizes[:, None], 0.25, atol=5 * (0.25 * 0.75 / 500) ** 0.5)


def test_quantity_has_equal_sizes_in_its_limits():
    labels = balanced(1000, 4)
    for law, spread in (("dirichlet", 1e9), ("lognormal", 1e-9)):
        np.testing.assert_allclose(Quantity(num_clients=10, law=law, spread=spread)(labels, rng()).sizes, 100, atol=1)


def test_log_normal_sizes_have_the_given_sigma():
    labels = np.zeros(10**6, dtype=np.int64)
    sizes = Quantity(num_clients=1000, law="lognormal", spread=0.7)(labels, rng()).sizes
    # The standard error of a standard deviation of 1000 normals is σ/√2000; five of them.
    assert np.log(sizes).std() == pytest.approx(0.7, abs=5 * 0.7 / 2000**0.5)


def test_iid_deals_by_chance():
    labels = balanced(10_000, 2)
    counts = label_counts(labels, IID(num_clients=10)(labels, rng()), 2)
    np.testing.assert_array_equal(counts.sum(1), 1000)
    # A hypergeometric share: standard deviation √(1000 · ¼ · 0.9) = 15; five of them, and not all equal.
    assert 0 < np.abs(counts - 500).max() < 75


# --- natural, domain, long tail, saved -------------------------------------------------------------------------------

NATURAL = np.array([7, 3, 3, -1, 9, 3, 7, 9, 9, 9])
ZEROS = np.zeros(10, dtype=np.int64)


def clients(partition):
    return [partition.of(k).tolist() for k in range(partition.num_clients)]


def test_natural_clients_stand_in_order_of_their_id():
    assert clients(Natural()(ZEROS, rng(), NATURAL)) == [[1, 2, 5], [0, 6], [4, 7, 8, 9]]


def test_small_natural_clients_are_dropped_or_merged():
    assert clients(Natural(min_size=3)(ZEROS, rng(), NATURAL)) == [[1, 2, 5], [4, 7, 8, 9]]
    assert clients(Natural(min_size=3, rest="merge")(ZEROS, rng(), NATURAL)) == [[0, 1, 2, 5, 6], [4, 7, 8, 9]]


def test_merged_clients_join_the_smallest_largest_first():
    natural = np.repeat([0, 1, 2, 3, 4], [10, 8, 3, 2, 1])
    part = Natural(min_size=8, rest="merge")(np.zeros(24, dtype=np.int64), rng(), natural)
    # 3 joins 8 (then 11), 2 joins 10 (then 12), 1 joins 11.
    assert [sorted(set(natural[part.of(k)])) for k in range(2)] == [[0, 3], [1, 2, 4]]


@EXAMPLES
@given(num_clients=st.integers(1, 12), seed=st.integers(0, 10**6), rest=st.sampled_from(["drop", "merge"]))
def test_a_number_of_natural_clients_is_drawn_and_kept_whole(num_clients, seed, rest):
    natural = rng(seed).integers(0, 12, 300)
    part = Natural(num_clients=num_clients, rest=rest)(np.zeros(300, dtype=np.int64), rng(seed), natural)
    assert part.num_clients == num_clients
    owners = [set(natural[part.of(k)]) for k in range(num_clients)]
    assert sum(map(len, owners)) == len(set().union(*owners)) == (12 if rest == "merge" else num_clients)
    if rest == "merge":
        assert len(part.indices) == 300
    for k, ids in enumerate(owners):
        assert set(np.flatnonzero(np.isin(natural, list(ids)))) == set(part.of(k))


@pytest.mark.parametrize(
    ("partitioner", "natural", "message"),
    [
        (Natural(), None, "partition=natural needs data with natural clients"),
        (Natural(), -np.ones(10, dtype=np.int64), "partition=natural needs data with natural clients"),
        (Natural(num_clients=4), NATURAL, "num_clients=4 but the data has 3 natural clients"),
        (Natural(min_size=5), NATURAL, "no natural client has min_size=5 samples, the largest has 4"),
        (Domain(base=IID(num_clients=1)), None, "partition=domain needs data with domains"),
        (Domain(base=IID(num_clients=3)), NATURAL, "domain 7: num_clients=3"),
    ],
)
def test_data_that_cannot_be_partitioned_naturally_are_the_users_error(partitioner, natural, message):
    with pytest.raises(UserError, match=message):
        partitioner(ZEROS, rng(), natural)


def test_clients_of_a_domain_stand_side_by_side():
    part = Domain(base=IID(num_clients=2))(ZEROS, rng(), NATURAL)
    assert part.num_clients == 6
    assert part.sizes.tolist() == [2, 1, 1, 1, 2, 2]
    assert [set(NATURAL[part.of(k)]) for k in range(6)] == [{3}, {3}, {7}, {7}, {9}, {9}]
    np.testing.assert_array_equal(np.sort(part.indices), np.flatnonzero(NATURAL >= 0))


@pytest.mark.parametrize(
    ("factor", "num_classes", "largest", "total"),
    [(0.01, 10, 5000, 12406), (0.02, 10, 5000, 13996), (0.1, 10, 5000, 20431), (0.01, 100, 500, 10847)],
)
def test_long_tail_counts_are_those_of_the_published_cifar_variants(factor, num_classes, largest, total):
    sizes = LongTail(base=IID(num_clients=1), imbalance_factor=factor).class_sizes(largest, num_classes)
    assert sizes.sum() == total
    if (factor, num_classes) == (0.01, 10):
        assert sizes.tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    if num_classes == 100:
        assert sizes[[0, 1, 2, -3, -2, -1]].tolist() == [500, 477, 455, 5, 5, 5]


def test_long_tail_drops_samples_then_gives_every_kept_one_once():
    labels = balanced(50_000, 10)
    part = LongTail(base=Dirichlet(num_clients=20, alpha=0.5))(labels, rng())
    counts = label_counts(labels, part, 10)
    assert counts.sum(0).tolist() == [5000, 2997, 1796, 1077, 645, 387, 232, 139, 83, 50]
    assert len(np.unique(part.indices)) == len(part.indices) == 12406
    assert part.num_clients == 20
    assert (counts.sum(1) > 0).all()


def test_a_long_tail_takes_natural_clients_along_and_keeps_what_a_class_has():
    labels = np.repeat([0, 1], [60, 20])  # n_max = 40; class 1 wants 40 at factor 1 and has 20
    natural = np.arange(80) % 2
    part = LongTail(base=Natural(), imbalance_factor=1.0)(labels, rng(), natural)
    assert label_counts(labels, part, 2).sum(0).tolist() == [40, 20]
    for k in range(2):
        assert set(natural[part.of(k)]) == {k}
    assert LongTail(base=IID(num_clients=1))(np.zeros(5, dtype=np.int64), rng()).sizes.tolist() == [5]


def test_a_saved_partition_comes_back(tmp_path):
    labels = balanced(100, 4)
    part = Dirichlet(num_clients=7, alpha=0.3)(labels, rng())
    splits = split_clients(part, labels, held_out_clients=0.2, local_validation=0.0, local_test=0.2, seed=0)
    save_partition(tmp_path / "partition.npz", part, splits)
    saved = Saved(path=str(tmp_path / "partition.npz"))
    assert saved.num_clients == 7
    again = saved(labels, rng(5))
    np.testing.assert_array_equal(again.indices, part.indices)
    np.testing.assert_array_equal(again.offsets, part.offsets)
    with pytest.raises(UserError, match="names sample 99, but the data has 50 training samples"):
        saved(labels[:50], rng())


# --- feature and label noise -----------------------------------------------------------------------------------------


def dataset(num_samples=4000, num_classes=5):
    x = torch.zeros(num_samples, 3, 4)
    y = torch.from_numpy(balanced(num_samples, num_classes))
    return Dataset(x=x, y=y, splits={"train": np.arange(num_samples)}, num_classes=num_classes)


def test_feature_noise_grows_linearly_to_sigma():
    data = dataset()
    partitioner = FeatureNoise(base=IID(num_clients=5), sigma=0.8)
    part = partitioner(data.y.numpy()[:3000], rng())
    noisy = partitioner.corrupt(data, part, rng(1))
    stds = [noisy.x[part.of(k)].std().item() for k in range(5)]
    # 7200 numbers a client: five standard errors of 1/√14400 each.
    np.testing.assert_allclose(stds, [0.0, 0.2, 0.4, 0.6, 0.8], rtol=5 / 120)
    assert (noisy.x[part.of(0)] == 0).all()
    assert (noisy.x[3000:] == 0).all()
    assert (data.x == 0).all()
    assert torch.equal(noisy.y, data.y)


def test_a_clients_noise_does_not_depend_on_the_other_clients():
    data = dataset(30)
    partitioner = FeatureNoise(base=IID(num_clients=3), sigma=1.0)
    one = Partition(np.arange(30), np.array([0, 10, 20, 30]))
    other = Partition(np.concatenate([np.arange(5), np.arange(20, 30)]), np.array([0, 5, 5, 15]))
    first, second = (partitioner.corrupt(data, part, rng(1)).x for part in (one, other))
    assert torch.equal(first[20:], second[20:])
    assert (second[5:20] == 0).all()


def test_feature_noise_refuses_tokens_and_leaves_a_single_client_alone():
    data = dataset(10)
    part = IID(num_clients=1)(data.y.numpy(), rng())
    assert torch.equal(FeatureNoise(base=IID(num_clients=1), sigma=1.0).corrupt(data, part, rng()).x, data.x)
    with pytest.raises(UserError, match=r"floating-point features, this data has torch\.int64"):
        FeatureNoise(base=IID(num_clients=1)).corrupt(data._replace(x=data.x.long()), part, rng())


@pytest.mark.parametrize("kind", ["symmetric", "pair"])
def test_label_noise_makes_exactly_the_rate_wrong(kind):
    data = dataset()
    partitioner = LabelNoise(base=Dirichlet(num_clients=7, alpha=0.5), min_rate=0.3, max_rate=0.3, kind=kind)
    part = partitioner(data.y.numpy()[:3500], rng())
    noisy = partitioner.corrupt(data, part, rng(1))
    wrong = (noisy.y != data.y).numpy()
    for k in range(7):
        assert wrong[part.of(k)].sum() == np.floor(0.3 * part.sizes[k] + 0.5)
    assert not wrong[3500:].any()
    shift = ((noisy.y - data.y) % 5).numpy()[wrong]
    if kind == "pair":
        assert set(shift) == {1}
    else:
        # About 1050 wrong labels, a quarter on each other class: five standard deviations of 14.
        assert np.abs(np.bincount(shift, minlength=5)[1:] - wrong.sum() / 4).max() < 70
    assert noisy.y.min() >= 0
    assert noisy.y.max() < 5


def test_label_noise_rates_differ_by_client_within_their_bounds():
    data = dataset(200_000)
    partitioner = LabelNoise(
        base=IID(num_clients=200), noisy_client_fraction=0.5, min_rate=0.2, max_rate=0.8, kind="pair"
    )
    part = partitioner(data.y.numpy(), rng())
    wrong = (partitioner.corrupt(data, part, rng(1)).y != data.y).numpy()
    rates = np.array([wrong[part.of(k)].mean() for k in range(200)])
    noisy = rates > 0
    # Binomial(200, ½): five standard deviations of 7. The mean of ~100 uniforms in [0.2, 0.8]: five of 0.0173.
    assert abs(noisy.sum() - 100) < 36
    assert rates[noisy].min() >= 0.2
    assert rates[noisy].max() <= 0.8
    assert rates[noisy].mean() == pytest.approx(0.5, abs=0.09)


def test_label_noise_is_repeatable_and_zero_is_none():
    data = dataset(100)
    part = IID(num_clients=4)(data.y.numpy(), rng())
    noise = LabelNoise(base=IID(num_clients=4))
    assert torch.equal(noise.corrupt(data, part, rng(1)).y, noise.corrupt(data, part, rng(1)).y)
    assert not torch.equal(noise.corrupt(data, part, rng(1)).y, noise.corrupt(data, part, rng(2)).y)
    none = LabelNoise(base=IID(num_clients=4), min_rate=0.0, max_rate=0.0)
    assert torch.equal(none.corrupt(data, part, rng(1)).y, data.y)
    with pytest.raises(UserError, match="at least 2 classes"):
        noise.corrupt(data._replace(num_classes=1), part, rng())
