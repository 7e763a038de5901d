"""Samplers: the contract's laws, inclusion probabilities by enumeration, the papers' definitions."""

import inspect
import itertools
import time

import numpy as np
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from scipy import stats

from fedsim import samplers
from fedsim.rng import generator
from fedsim.samplers import AvailabilityBiased, Cyclic, Poisson, Pool, PowerOfChoice, SizeWeighted, Uniform

NAMES = {
    "uniform": Uniform,
    "size_weighted": SizeWeighted,
    "poisson": Poisson,
    "cyclic": Cyclic,
    "power_of_choice": PowerOfChoice,
    "availability_biased": AvailabilityBiased,
}
EVERY = pytest.mark.parametrize("sampler", [*(cls() for cls in NAMES.values()), Cyclic(num_groups=2)], ids=str)


def pool(clients, sizes=None, availability=None, losses=None):
    clients = np.asarray(clients, dtype=np.int64)
    ones = np.ones(len(clients))
    return Pool(
        clients=clients,
        sizes=ones.astype(np.int64) if sizes is None else np.asarray(sizes, dtype=np.int64),
        availability=ones if availability is None else np.asarray(availability, dtype=np.float64),
        losses=(lambda ids: ids.astype(np.float64)) if losses is None else losses,
    )


def draws(sampler, population, num, count):
    return [sampler(population, num, generator(0, "cohort", t), t) for t in range(1, count + 1)]


def inclusion(sampler, population, num, count):
    """Share of `count` rounds that include each client, (P,)."""
    ids = np.concatenate(draws(sampler, population, num, count))
    return np.bincount(np.searchsorted(population.clients, ids), minlength=len(population.clients)) / count


def assert_shares(shares, expected, count):
    """Each share is binomial: within 4.5 standard errors (a false alarm in 150,000; the seed is fixed)."""
    expected = np.asarray(expected)
    assert np.all(np.abs(shares - expected) <= 4.5 * np.sqrt(expected * (1 - expected) / count) + 1e-12), shares


def successive(weights, num):
    """Inclusion probabilities of successive draws ∝ weights without replacement, by enumeration."""
    weights, result = np.asarray(weights, dtype=float), np.zeros(len(weights))
    for order in itertools.permutations(range(len(weights)), num):
        probability, left = 1.0, weights.sum()
        for i in order:
            probability, left = probability * weights[i] / left, left - weights[i]
        result[list(order)] += probability
    return result


@EVERY
def test_ids_are_ascending_unique_members_and_repeatable(sampler):
    population = pool(np.arange(5, 200, 3), sizes=np.arange(65) + 1, availability=np.linspace(0.1, 1, 65))
    for t in range(1, 30):
        ids = sampler(population, 11, generator(7, "cohort", t), t)
        assert ids.dtype == np.int64
        assert np.all(np.diff(ids) > 0)
        assert np.isin(ids, population.clients).all()
        assert len(ids) == 11 or isinstance(sampler, Poisson)
        assert np.array_equal(ids, sampler(population, 11, generator(7, "cohort", t), t))


@pytest.mark.parametrize("name", [n for n in NAMES if n != "cyclic"])
def test_rounds_and_seeds_differ(name):
    population = pool(range(1000))
    sampler = PowerOfChoice(num_candidates=40) if name == "power_of_choice" else NAMES[name]()
    ids = [tuple(sampler(population, 10, generator(s, "cohort", t), t)) for s in (0, 1) for t in (1, 2)]
    assert len(set(ids)) == 4


@EVERY
def test_inputs_are_not_written(sampler):
    population = pool(range(20), sizes=range(1, 21))
    for array in population[:3]:
        array.setflags(write=False)
    sampler(population, 4, generator(0, "cohort", 1), 1)


@EVERY
@pytest.mark.parametrize("num", [0, 21])
def test_impossible_cohorts_name_both_numbers(sampler, num):
    with pytest.raises(ValueError, match=r"larger than the (20|10)|at least 1 client, got 0") as caught:
        sampler(pool(range(20)), num, generator(0, "cohort", 1), 1)
    assert str(num) in str(caught.value)


@pytest.mark.parametrize("cls", [Uniform, SizeWeighted, Cyclic, PowerOfChoice, AvailabilityBiased])
def test_the_whole_pool_is_everyone(cls):
    population = pool([2, 3, 5, 7])
    assert cls()(population, 4, generator(0, "cohort", 1), 1).tolist() == [2, 3, 5, 7]
    assert Poisson()(population, 4, generator(0, "cohort", 1), 1).tolist() == [2, 3, 5, 7]


def test_uniform_cohorts_are_equally_likely():
    cohorts = ["".join(map(str, ids)) for ids in draws(Uniform(), pool(range(5)), 2, 4000)]
    counts = np.unique(cohorts, return_counts=True)[1]
    assert len(counts) == 10
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("num", [1, 2, 3])
def test_size_weighted_inclusion_is_that_of_successive_draws(num):
    sizes = [1, 2, 3, 10]
    shares = inclusion(SizeWeighted(), pool([3, 4, 8, 9], sizes=sizes), num, 6000)
    assert_shares(shares, successive(sizes, num), 6000)


def test_clients_without_samples_are_never_drawn():
    population = pool(range(4), sizes=[0, 1, 0, 1])
    assert SizeWeighted()(population, 2, generator(0, "cohort", 1), 1).tolist() == [1, 3]
    for sampler in (SizeWeighted(), PowerOfChoice()):
        with pytest.raises(ValueError, match=r"cohort of 3 is larger than the 2 clients with samples"):
            sampler(population, 3, generator(0, "cohort", 1), 1)


def test_poisson_includes_clients_independently():
    count, population = 6000, pool(range(6))
    cohorts = draws(Poisson(), population, 3, count)
    sizes = np.bincount([len(ids) for ids in cohorts], minlength=7)
    binomial = stats.binom.pmf(np.arange(7), 6, 0.5)
    binomial[0], nonempty = 0.0, 1 - binomial[0]
    assert sizes[0] == 0  # an empty cohort is drawn again
    assert stats.chisquare(sizes[1:], binomial[1:] / nonempty * count).pvalue > 1e-4
    together = np.mean([{0, 1} <= set(ids.tolist()) for ids in cohorts])
    assert_shares(inclusion(Poisson(), population, 3, count), np.full(6, 0.5 / nonempty), count)
    assert_shares(np.array([together]), [0.25 / nonempty], count)


def test_cyclic_takes_everyone_once_before_anyone_twice():
    population = pool([1, 2, 4, 8, 16])
    cohorts = [ids.tolist() for ids in draws(Cyclic(), population, 2, 5)]
    assert cohorts == [[1, 2], [4, 8], [1, 16], [2, 4], [8, 16]]


def test_cyclic_groups_take_turns():
    population, sampler = pool(range(9)), Cyclic(num_groups=3)
    for t, ids in enumerate(draws(sampler, population, 2, 30)):
        assert set(ids % 3) == {t % 3}
    shares = inclusion(sampler, population, 2, 3000)
    assert_shares(shares * 3, np.full(9, 2 / 3), 1000)
    with pytest.raises(ValueError, match=r"4 is larger than the 3 clients of group 0 \(num_groups=3\)"):
        sampler(population, 4, generator(0, "cohort", 1), 1)


def test_power_of_choice_keeps_the_hardest_candidates():
    seen = []

    def losses(ids):
        seen.append(ids)
        return np.where(ids % 2 == 0, 10.0, 0.0) + ids / 100  # even ones are hard

    population = pool(range(10), sizes=[1] * 10, losses=losses)
    ids = PowerOfChoice(num_candidates=10)(population, 3, generator(0, "cohort", 1), 1)
    assert ids.tolist() == [4, 6, 8]
    for t in range(1, 20):
        ids = PowerOfChoice(num_candidates=5)(population, 2, generator(0, "cohort", t), t)
        candidates = seen[-1]
        assert len(candidates) == 5
        assert np.all(np.diff(candidates) > 0)
        assert ids.tolist() == sorted(sorted(candidates, key=lambda i: (i % 2, -i))[:2])


def test_power_of_choice_with_as_many_candidates_as_clients_wanted_is_size_weighted():
    sizes = [1, 2, 3, 10]
    shares = inclusion(PowerOfChoice(num_candidates=2), pool(range(4), sizes=sizes), 2, 4000)
    assert_shares(shares, successive(sizes, 2), 4000)


def test_power_of_choice_breaks_ties_by_id_and_ranks_nan_last():
    sampler, rng = PowerOfChoice(num_candidates=5), generator(0, "cohort", 1)
    assert sampler(pool(range(5), losses=lambda ids: np.zeros(5)), 2, rng, 1).tolist() == [0, 1]
    values = np.array([np.nan, 1.0, np.inf, np.nan, -1.0])
    assert sampler(pool(range(5), losses=lambda ids: values), 2, rng, 1).tolist() == [1, 2]
    assert sampler(pool(range(5), losses=lambda ids: values), 4, rng, 1).tolist() == [0, 1, 2, 4]


def test_power_of_choice_defaults_to_twice_the_cohort_and_is_cut_at_the_pool():
    asked = []
    population = pool(range(7), losses=lambda ids: asked.append(len(ids)) or ids.astype(float))
    for num in (2, 3, 5):
        PowerOfChoice()(population, num, generator(0, "cohort", 1), 1)
    assert asked == [4, 6, 7]
    with pytest.raises(ValueError, match=r"num_candidates >= the cohort's size 3, got 2"):
        PowerOfChoice(num_candidates=2)(population, 3, generator(0, "cohort", 1), 1)


@pytest.mark.parametrize("exponent", [0.0, 1.0, -1.0])
def test_availability_bias(exponent):
    availability = np.array([0.1, 0.0, 0.5, 1.0])
    shares = inclusion(AvailabilityBiased(exponent=exponent), pool(range(4), availability=availability), 2, 4000)
    expected = np.zeros(4)
    expected[[0, 2, 3]] = successive(availability[[0, 2, 3]] ** exponent, 2)
    assert_shares(shares, expected, 4000)


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: Cyclic(num_groups=0), r"num_groups must be >= 1 or null, got 0"),
        (lambda: PowerOfChoice(num_candidates=0), r"num_candidates must be >= 1 or null, got 0"),
        (lambda: AvailabilityBiased(exponent=float("nan")), r"exponent must be finite, got nan"),
    ],
)
def test_arguments_are_checked_when_built(build, match):
    with pytest.raises(ValueError, match=match):
        build()


def test_a_million_clients_cost_little():
    population = pool(np.arange(10**6))
    seconds = {}
    for cls in (Uniform, Poisson, Cyclic, SizeWeighted):
        start = time.perf_counter()
        cls()(population, 1000, generator(0, "cohort", 1), 1)
        seconds[cls.__name__] = time.perf_counter() - start
    # O(cohort) and O(P): 0.2 and 25 ms alone on a core; the bounds leave room for a busy machine.
    assert max(seconds[n] for n in ("Uniform", "Poisson", "Cyclic")) < 0.1, seconds
    assert seconds["SizeWeighted"] < 1.0, seconds


@pytest.mark.parametrize("name", NAMES)
def test_each_config_lists_its_targets_arguments_and_defaults(name):
    with initialize_config_module("fedsim.configs", version_base="1.3"):
        config = OmegaConf.to_object(compose(f"sampler/{name}")["sampler"])
    assert config.pop("seed", "absent") is None
    module, _, target = config.pop("_target_").rpartition(".")
    assert (module, getattr(samplers, target)) == ("fedsim.samplers", NAMES[name])
    assert config == {n: p.default for n, p in inspect.signature(NAMES[name]).parameters.items()}
