"""What every partitioner promises: exact cover, no empty client, min_size, repeatability, and clear refusals."""

import inspect
import re
from fractions import Fraction
from math import floor
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf

from fedsim.construct import build, locate
from fedsim.contracts import Partition
from fedsim.errors import UserError
from fedsim.partition.classes import Classes
from fedsim.partition.csr import from_counts
from fedsim.partition.dirichlet import Dirichlet
from fedsim.partition.domain import Domain
from fedsim.partition.feature_noise import FeatureNoise
from fedsim.partition.iid import IID
from fedsim.partition.label_noise import LabelNoise
from fedsim.partition.longtail import LongTail
from fedsim.partition.natural import Natural
from fedsim.partition.quantity import Quantity
from fedsim.partition.repair import repair
from fedsim.partition.rounding import largest_remainder
from fedsim.partition.saved import Saved
from fedsim.partition.shards import Shards

FOLDER = Path(__file__).parents[1] / "configs" / "partition"
CONFIGS = sorted(path.stem for path in FOLDER.glob("[!_]*.yaml"))

EXAMPLES = settings(derandomize=True, deadline=None, max_examples=25)

# (num_clients, min_size) -> partitioner, all that give every sample once and take num_clients.
EXACT = {
    "iid": lambda k, m: IID(num_clients=k),
    "per_class": lambda k, m: Dirichlet(num_clients=k, alpha=0.1, min_size=m),
    "per_class_extreme": lambda k, m: Dirichlet(num_clients=k, alpha=1e-6, min_size=m),
    "per_class_total": lambda k, m: Dirichlet(num_clients=k, alpha=0.5, alpha_scale="total", min_size=m),
    "per_client": lambda k, m: Dirichlet(num_clients=k, alpha=0.1, mode="per_client", min_size=m),
    "per_client_extreme": lambda k, m: Dirichlet(num_clients=k, alpha=1e-6, mode="per_client", min_size=m),
    "per_client_sizes": lambda k, m: Dirichlet(
        num_clients=k, alpha=0.5, mode="per_client", alpha_scale="total", size_sigma=2.0, min_size=m
    ),
    "shards": lambda k, m: Shards(num_clients=k, shards_per_client=1),
    "classes": lambda k, m: Classes(num_clients=k, classes_per_client=1, min_size=m),
    "quantity_dirichlet": lambda k, m: Quantity(num_clients=k, spread=0.1, min_size=m),
    "quantity_lognormal": lambda k, m: Quantity(num_clients=k, law="lognormal", spread=3.0, min_size=m),
    "feature_noise": lambda k, m: FeatureNoise(base=IID(num_clients=k)),
    "label_noise": lambda k, m: LabelNoise(base=Dirichlet(num_clients=k, alpha=0.1, min_size=m)),
}
EVERY = pytest.mark.parametrize("name", EXACT)


def check(partition, num_samples, num_clients, given=None):
    assert isinstance(partition, Partition)
    assert partition.indices.dtype == partition.offsets.dtype == np.int64
    assert partition.num_clients == num_clients
    assert partition.offsets[0] == 0
    assert (partition.sizes >= 0).all()
    np.testing.assert_array_equal(np.sort(partition.indices), np.arange(num_samples) if given is None else given)
    for client in range(num_clients):
        assert (np.diff(partition.of(client)) > 0).all()


@st.composite
def requests(draw):
    """Labels with gaps and rare classes, and a request that is just or amply possible."""
    num_samples = draw(st.integers(1, 120))
    num_classes = draw(st.integers(1, 12))
    labels = np.random.default_rng(draw(st.integers(0, 99))).integers(0, num_classes, num_samples) ** 2 // num_classes
    min_size = draw(st.integers(1, 10))
    most = num_samples // min_size
    return labels, draw(st.integers(1, most)) if most else 0, min_size, draw(st.integers(0, 2**31))


@EVERY
@EXAMPLES
@given(request=requests())
def test_every_sample_is_given_once_and_every_client_has_enough(name, request):
    labels, num_clients, min_size, seed = request
    if num_clients == 0 or (name == "classes" and num_clients < len(np.unique(labels))):
        return
    partitioner = EXACT[name](num_clients, min_size)
    before = labels.copy()
    partition = partitioner(labels, np.random.default_rng(seed))
    check(partition, len(labels), num_clients)
    assert partition.sizes.min() >= (1 if name in ("iid", "shards", "feature_noise") else min_size)
    assert partitioner.num_clients == num_clients
    np.testing.assert_array_equal(labels, before)


@EVERY
def test_a_seed_says_everything(name):
    labels = np.random.default_rng(0).integers(0, 5, 200)
    draw = lambda seed: EXACT[name](20, 2)(labels, np.random.default_rng(seed)).indices  # noqa: E731
    np.testing.assert_array_equal(draw(3), draw(3))
    assert (draw(3) != draw(4)).any()


@EVERY
def test_more_clients_than_samples_is_refused(name):
    with pytest.raises(ValueError, match=r"num_clients=11.*but there are 10"):
        EXACT[name](11, 1)(np.zeros(10, dtype=np.int64), np.random.default_rng(0))


@pytest.mark.parametrize("name", [n for n in EXACT if n not in ("iid", "shards", "feature_noise")])
def test_an_impossible_min_size_is_refused(name):
    with pytest.raises(ValueError, match=r"at least 6 samples each need 12.*10; lower num_clients or min_size"):
        EXACT[name](2, 6)(np.arange(10) % 2, np.random.default_rng(0))


@EVERY
@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([0.0, np.nan]), "integer classes, got float64"),
        (np.array([0, -1]), "labels must be >= 0, got -1"),
        (np.zeros((4, 2), dtype=np.int64), r"vector .* shape \(4, 2\)"),
        (np.zeros(0, dtype=np.int64), r"at least one class, got an array of shape \(0,\)"),
    ],
)
def test_labels_that_are_no_classes_are_refused(name, labels, message):
    with pytest.raises(ValueError, match=message):
        EXACT[name](1, 1)(labels, np.random.default_rng(0))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: IID(num_clients=0), "num_clients must be an integer >= 1, got 0"),
        (lambda: IID(num_clients=2.5), "num_clients must be an integer >= 1, got 2.5"),
        (lambda: IID(num_clients=True), "num_clients must be an integer >= 1, got True"),
        (lambda: Dirichlet(num_clients=2, alpha=0), "alpha must be a finite number > 0, got 0; 0.1 is strong"),
        (lambda: Dirichlet(num_clients=2, alpha=-1), "alpha must be a finite number > 0, got -1"),
        (lambda: Dirichlet(num_clients=2, alpha=float("nan")), "alpha must be a finite number > 0, got nan"),
        (lambda: Dirichlet(num_clients=2, alpha=float("inf")), "alpha must be a finite number > 0, got inf"),
        (lambda: Dirichlet(num_clients=2, alpha="0.1"), "alpha must be a finite number > 0, got '0.1'"),
        (lambda: Dirichlet(num_clients=2, alpha=1e-9), r"alpha must be in \[1e-6, 1e9\], got 1e-09"),
        (lambda: Dirichlet(num_clients=2, alpha=1, mode="x"), "mode must be per_class or per_client, got 'x'"),
        (lambda: Dirichlet(num_clients=2, alpha=1, alpha_scale="x"), "alpha_scale must be component or total"),
        (lambda: Dirichlet(num_clients=2, alpha=1, size_sigma=1), "size_sigma needs mode=per_client"),
        (lambda: Dirichlet(num_clients=2, alpha=1, min_size=-1), "min_size must be an integer >= 0, got -1"),
        (lambda: Shards(num_clients=2, shards_per_client=0), "shards_per_client must be an integer >= 1"),
        (lambda: Classes(num_clients=2, classes_per_client=0), "classes_per_client must be an integer >= 1"),
        (lambda: Quantity(num_clients=2, law="x"), "law must be dirichlet or lognormal, got 'x'"),
        (lambda: Quantity(num_clients=2, spread=0), "spread must be a finite number > 0, got 0"),
        (lambda: Quantity(num_clients=2, law="lognormal", spread=11), r"spread of law=lognormal must be in \[0, 10\]"),
        (lambda: Natural(min_size=0), "min_size must be an integer >= 1, got 0"),
        (lambda: Natural(rest="x"), "rest must be drop or merge, got 'x'"),
        (lambda: LongTail(base=IID(num_clients=1), imbalance_factor=0), r"imbalance_factor must be in \(0, 1\].*got 0"),
        (lambda: LongTail(base=IID(num_clients=1), imbalance_factor=float("nan")), "imbalance_factor must be"),
        (lambda: FeatureNoise(base=IID(num_clients=1), sigma=-1), "sigma must be a number in"),
        (lambda: LabelNoise(base=IID(num_clients=1), max_rate=1.5), r"max_rate must be a number in \[0, 1\], got 1.5"),
        (lambda: LabelNoise(base=IID(num_clients=1), min_rate=0.5), "min_rate must be <= max_rate=0.2, got 0.5"),
        (lambda: LabelNoise(base=IID(num_clients=1), kind="x"), "kind must be symmetric or pair, got 'x'"),
        (lambda: Saved(path="/nowhere.npz"), "path must be that of a partition's .npz file, got '/nowhere.npz'"),
    ],
)
def test_an_argument_out_of_range_is_refused_when_built(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def largest_remainder_by_hand(total, weights):
    quotas = [Fraction(total * w, sum(weights)) for w in weights]
    counts = [floor(q) for q in quotas]
    by_fraction = sorted(range(len(weights)), key=lambda i: counts[i] - quotas[i])
    for i in by_fraction[: total - sum(counts)]:
        counts[i] += 1
    return counts


@EXAMPLES
@given(
    total=st.integers(0, 1000),
    weights=st.lists(st.integers(0, 50), min_size=1, max_size=12).filter(any),
)
def test_largest_remainder_is_the_textbook_method(total, weights):
    rounded = largest_remainder([total, total], [weights, weights])
    np.testing.assert_array_equal(rounded, [largest_remainder_by_hand(total, weights)] * 2)


@EXAMPLES
@given(total=st.integers(0, 10**9), seed=st.integers(0, 10**6), alpha=st.sampled_from([1e-6, 0.05, 1.0, 1e6]))
def test_largest_remainder_keeps_the_total_and_the_quota(total, seed, alpha):
    shares = np.random.default_rng(seed).dirichlet(np.full(50, alpha), size=3)
    rounded = largest_remainder([total] * 3, shares)
    np.testing.assert_array_equal(rounded.sum(1), total)
    # One sample, and what float64 may lose of 1e9 times a share.
    assert np.abs(rounded - total * shares).max() <= 1 + 1e-6
    assert (rounded[shares == 0] == 0).all()


def test_of_equal_fractions_the_lower_column_wins_whatever_their_last_bits():
    # Quotas 1⅓, ⅓, ⅓; in float64 the fraction of the first is the smallest.
    np.testing.assert_array_equal(largest_remainder([2], [[4, 1, 1]]), [[2, 0, 0]])


@pytest.mark.parametrize("weights", [[np.nan, 1.0], [-1.0, 2.0], [np.inf, 1.0], [0.0, 0.0]])
def test_largest_remainder_refuses_what_it_cannot_share_by(weights):
    with pytest.raises(ValueError, match="weights"):
        largest_remainder([1], [weights])


@EXAMPLES
@given(
    seed=st.integers(0, 10**6),
    shape=st.tuples(st.integers(1, 15), st.integers(1, 6)),
    scale=st.integers(1, 40),
    share=st.floats(0, 1),
)
def test_repair_moves_just_the_missing_samples_and_keeps_class_totals(seed, shape, scale, share):
    counts = np.random.default_rng(seed).negative_binomial(0.2, 1 / (1 + scale), shape)
    min_size = int(counts.sum() / shape[0] * share)
    repaired = repair(counts, min_size)
    sizes = counts.sum(1)
    assert (repaired >= 0).all()
    np.testing.assert_array_equal(repaired.sum(0), counts.sum(0))
    assert (repaired.sum(1) >= min_size).all()
    np.testing.assert_array_equal(repaired.sum(1)[sizes < min_size], min_size)
    assert (repaired.sum(1)[sizes >= min_size] <= sizes[sizes >= min_size]).all()
    assert np.abs(repaired.sum(1) - sizes).sum() == 2 * np.maximum(min_size - sizes, 0).sum()


def test_repair_prefers_a_clients_own_class_and_the_largest_donor():
    # Client 0 holds class 1 only and misses 2; client 2 can spare most of class 1, client 3 is larger but has none.
    counts = np.array([[0, 1], [4, 2], [3, 9], [20, 0]])
    np.testing.assert_array_equal(repair(counts, 3), [[0, 3], [4, 2], [3, 7], [20, 0]])
    # An empty client is filled from the largest client.
    np.testing.assert_array_equal(repair(np.array([[0, 0], [4, 2], [20, 0]]), 2), [[2, 0], [4, 2], [18, 0]])
    # Two donors of the class are levelled: 10 and 8 give 3 and 1.
    np.testing.assert_array_equal(repair(np.array([[1], [10], [8]]), 5), [[5], [7], [7]])
    # Nobody can spare class 1 for client 0 without falling below 3 itself: class 0 comes instead.
    np.testing.assert_array_equal(repair(np.array([[0, 2], [0, 3], [9, 0]]), 3), [[1, 2], [0, 3], [8, 0]])


def test_repair_leaves_what_is_large_enough():
    counts = np.array([[3, 0], [0, 3]])
    np.testing.assert_array_equal(repair(counts, 3), counts)


def test_counts_are_dealt_as_asked_and_at_random():
    labels = np.array([2, 0, 0, 2, 0, 2, 0, 2] * 50)
    counts = np.array([[60, 0, 10], [40, 0, 190], [100, 0, 0]])
    partition = from_counts(labels, counts, np.random.default_rng(0))
    check(partition, 400, 3)
    for client in range(3):
        np.testing.assert_array_equal(np.bincount(labels[partition.of(client)], minlength=3), counts[client])
    # 100 of 200 equal samples: their mean position is that of all, 199.5 ± 5 standard errors of 115/√100.
    assert abs(partition.of(2).mean() - 199.5) < 58


@pytest.mark.parametrize("name", CONFIGS)
def test_a_config_lists_every_argument_with_its_default(name):
    with initialize_config_module("fedsim.configs", version_base="1.3"):
        node = OmegaConf.to_container(compose(f"partition/{name}").partition)
    shared = {key: node.pop(key) for key in ("held_out_clients", "local_validation", "local_test")}
    assert node.pop("seed") is None
    assert all(0 <= fraction < 0.5 for fraction in shared.values())
    for part in [node, *([node["base"]] if "base" in node else [])]:
        parameters = inspect.signature(locate(part["_target_"], name)).parameters
        assert parameters.keys() == part.keys() - {"_target_"}
        for argument, parameter in parameters.items():
            assert parameter.default in (inspect.Parameter.empty, part[argument]), argument
    if name == "saved":
        with pytest.raises(UserError, match="path"):
            build(node, "partition")
    else:
        partitioner = build(node, "partition")
        assert {key: getattr(partitioner, key) for key in node.keys() - {"_target_", "base"}} == {
            key: value for key, value in node.items() if key not in ("_target_", "base")
        }


@pytest.mark.parametrize("name", [*CONFIGS, "_shared"])
def test_a_config_says_in_its_first_line_what_it_is_and_comments_every_argument(name):
    first, *rest = (FOLDER / f"{name}.yaml").read_text().splitlines()
    assert re.fullmatch(r"# [A-Z].*\.", first)
    for line in rest:
        assert "#" in line or line.lstrip().startswith(("_target_:", "defaults:")), line


def test_domain_reads_domains_and_wrappers_pass_it_on():
    domain = Domain(base=IID(num_clients=1))
    assert domain.natural_from == "domain"
    for wrapper in (LongTail(base=domain), FeatureNoise(base=domain), LabelNoise(base=domain)):
        assert wrapper.natural_from == "domain"
        assert wrapper.num_clients is None
    assert LabelNoise(base=IID(num_clients=2)).natural_from == "client"
