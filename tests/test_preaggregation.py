"""Pre-aggregators against the papers' definitions in float64 loops, around several rules."""

import math

import numpy as np
import pytest
import torch

from fedsim import simulate
from fedsim.errors import UserError
from fedsim.laws import cohort_of
from fedsim.strategies.arc import ARC
from fedsim.strategies.bucketing import Bucketing
from fedsim.strategies.clip import Clip
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedexp import FedExP
from fedsim.strategies.krum import Krum
from fedsim.strategies.median import Median
from fedsim.strategies.nnm import NNM
from fedsim.strategies.norm_clipping import NormClipping
from fedsim.strategies.stale_weighted import StaleWeighted
from fedsim.strategies.trimmed_mean import TrimmedMean
from fedsim.testing import apply_rule, build_rule

SEEDS = range(6)
RULES = [FedAvg(), Median(), Krum(num_byzantine=1), TrimmedMean(num_byzantine=1)]
EACH_RULE = pytest.mark.parametrize("rule", RULES, ids=lambda r: type(r).__name__)


def rows_of(seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(int(rng.integers(8, 13)), 7)) * rng.lognormal(size=(1, 1)) + rng.normal()


def clipped(rows, bound):
    return np.array([x * min(1.0, bound / np.linalg.norm(x)) for x in rows])


@EACH_RULE
@pytest.mark.parametrize("seed", SEEDS)
def test_clip_in_loops(rule, seed):
    rows = rows_of(seed)
    bound = float(np.median(np.linalg.norm(rows, axis=1)))
    got = apply_rule(Clip(rule=rule, max_norm=bound), rows)
    np.testing.assert_allclose(got, apply_rule(rule, clipped(rows, bound)), rtol=1e-12)


def test_clip_around_the_mean_is_norm_clipping():
    rows, n = rows_of(0), np.arange(1, 1 + len(rows_of(0)))
    got = apply_rule(Clip(rule=FedAvg(), max_norm=2.0), rows, n)
    np.testing.assert_allclose(got, apply_rule(NormClipping(max_norm=2.0), rows, n), rtol=1e-12)


@EACH_RULE
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_arc_in_loops(rule, seed, f):
    rows = rows_of(seed)
    count = len(rows)
    norms = sorted((np.linalg.norm(x) for x in rows), reverse=True)
    cut = math.floor(2 * f / count * (count - f))
    want = clipped(rows, norms[cut])
    assert (np.linalg.norm(want, axis=1) < np.linalg.norm(rows, axis=1) - 1e-12).sum() == cut
    np.testing.assert_allclose(apply_rule(ARC(rule=rule, num_byzantine=f), rows), apply_rule(rule, want), rtol=1e-12)


def test_arc_by_hand():
    # K = 4, f = 1: ⌊2 · 3/4⌋ = 1 is cut: 10 to 3. Mean of 1 2 3 3
    rows = [[1.0], [10.0], [2.0], [3.0]]
    assert apply_rule(ARC(rule=FedAvg(), num_byzantine=1), rows).tolist() == [9 / 4]
    assert apply_rule(ARC(rule=FedAvg(), num_byzantine=0), rows).tolist() == [4.0]


@EACH_RULE
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_nnm_in_loops(rule, seed, f):
    rows = rows_of(seed)
    kept = len(rows) - f
    nearest = [sorted(range(len(rows)), key=lambda j: (np.linalg.norm(x - rows[j]), j))[:kept] for x in rows]
    want = np.array([rows[chosen].mean(0) for chosen in nearest])
    np.testing.assert_allclose(
        apply_rule(NNM(rule=rule, num_byzantine=f), rows), apply_rule(rule, want), rtol=1e-9, atol=1e-12
    )


def test_nnm_by_hand():
    # f = 1, K = 4: each the mean of three. 0: 0 1 2; 1: 0 1 2; 2: 0 1 2; 9: 1 2 9. Median of 1 1 1 4
    mixed, _ = NNM(num_byzantine=1).mix(cohort_of([[0.0], [1.0], [2.0], [9.0]]))
    assert mixed.rows.flatten().tolist() == [1, 1, 1, 4]
    assert NNM(num_byzantine=0).mix(cohort_of([[0.0], [8.0]]))[0].rows.flatten().tolist() == [4, 4]


def test_nnm_among_twins():
    """Of four equal updates and a far one each keeps four; the far one takes itself and the lowest three."""
    mixed, _ = NNM(num_byzantine=1).mix(cohort_of([[4.0], [0.0], [0.0], [0.0], [0.0]]))
    assert mixed.rows.flatten().tolist() == [1, 0, 0, 0, 0]


@EACH_RULE
@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_bucketing_in_loops(rule, seed, size):
    rows = rows_of(seed)
    cohort = cohort_of(rows, seed=seed, round=4)
    order = cohort.rng("buckets").permutation(len(rows))
    buckets = [order[i : i + size] for i in range(0, len(rows), size)]
    buckets.sort(key=min)
    wanted = cohort_of([rows[b].mean(0) for b in buckets], [len(b) for b in buckets], seed=seed, round=4)
    want, _, _ = rule(wanted, {})
    got, _, metrics = Bucketing(rule=rule, bucket_size=size)(cohort, {})
    np.testing.assert_allclose(got, want, rtol=1e-12)
    assert all(torch.as_tensor(value).shape in {(), (len(rows),)} for value in metrics.values())


def test_bucketing_around_the_mean_is_the_mean_of_all():
    rows = rows_of(1)[:7]  # 3 buckets of 2 and one of 1
    got = apply_rule(Bucketing(rule=FedAvg()), rows, np.arange(1, 8))
    np.testing.assert_allclose(got, rows.mean(0), rtol=1e-12)


def test_buckets_follow_seed_and_round():
    draws = {
        (seed, t): tuple(Bucketing().buckets(cohort_of(np.zeros((9, 2)), seed=seed, round=t)).tolist())
        for seed in range(3)
        for t in (1, 2)
    }
    assert len(set(draws.values())) == 6
    assert all(np.bincount(d).tolist().count(2) == 4 for d in draws.values())


def test_metrics_of_a_bucket_are_said_of_its_clients():
    cohort = cohort_of(rows_of(2)[:8])
    rule = Bucketing(rule=Krum(num_byzantine=0))
    _, _, metrics = rule(cohort, {})
    bucket = rule.buckets(cohort)
    chosen = metrics["selected"].nonzero().flatten()
    assert len(chosen) == 2
    assert bucket[chosen[0]] == bucket[chosen[1]]


def test_second_uploads_are_averaged_with_their_bucket():
    seen = []

    class Spy(FedAvg):
        def __call__(self, cohort, state):
            seen.append(cohort)
            return cohort.rows.mean(0), state, {}

    extras = {"control": torch.arange(12.0).view(6, 2), "loss": torch.arange(6.0)}
    cohort = cohort_of(np.zeros((6, 3)), extras=extras)
    rule = Bucketing(rule=Spy())
    rule(cohort, {})
    bucket = rule.buckets(cohort)
    for b in range(3):
        torch.testing.assert_close(seen[0].extras["control"][b], extras["control"][bucket == b].mean(0))
        torch.testing.assert_close(seen[0].extras["loss"][b], extras["loss"][bucket == b].mean())
    assert seen[0].clients.tolist() == sorted(int((bucket == b).nonzero()[0]) for b in range(3))


def test_memory_checks_and_nesting_are_the_inner_rules():
    rule = NNM(rule=Bucketing(rule=FedAvg(server_momentum=0.5), bucket_size=2), num_byzantine=1)
    rows = rows_of(3)
    cohort = cohort_of(rows)
    state = rule.init(cohort.layout, len(cohort))
    assert state.keys() == {"velocity"}
    first, state, _ = rule(cohort, state)
    second, _, _ = rule(cohort, state)
    np.testing.assert_allclose(second, 1.5 * first, rtol=1e-12)
    with pytest.raises(ValueError, match=r"NNM needs K > 2f clients, got K=2"):
        rule.check(2)
    with pytest.raises(ValueError, match="Krum needs"):  # 8 clients are 4 buckets
        Bucketing(rule=Krum(num_byzantine=1), bucket_size=2).check(8)
    Bucketing(rule=Krum(num_byzantine=1), bucket_size=2).check(9)
    assert not hasattr(Clip(rule=Median()), "check")
    assert not hasattr(Clip(rule=Median()), "broadcast")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (Clip, {"max_norm": 0.0}),
        (ARC, {"num_byzantine": -1}),
        (NNM, {"num_byzantine": -1}),
        (Bucketing, {"bucket_size": 0}),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{name}"):
        kind(**arguments)


@pytest.mark.parametrize("name", ["arc", "nnm"])
@pytest.mark.parametrize("scale", [1e9, 1e30])
def test_two_attackers_of_eleven_change_little(name, scale):
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(9, 40)) * 0.05 + 1.0
    rows = np.concatenate([honest, -scale * np.ones((2, 40))]).astype(np.float32)[rng.permutation(11)]
    rule = build_rule(name, num_byzantine=2, rule=TrimmedMean(num_byzantine=2))
    assert np.abs(apply_rule(rule, rows) - 1).max() < 0.15


def test_an_inner_rule_is_chosen_by_name(tmp_path):
    result = simulate(
        "strategy=nnm", "strategy@strategy.rule=krum", "strategy.rule.num_byzantine=2", "strategy.num_byzantine=2",
        "model=logreg", num_rounds=2, folder=tmp_path / "a",
    )  # fmt: skip
    assert "krum" in (result.folder / "config.yaml").read_text()
    assert result.summary["plan"]["rows"] == "held: NNM"
    with pytest.raises(UserError, match="K > 2f"):
        simulate("strategy=nnm", "strategy.num_byzantine=5", num_rounds=1, folder=tmp_path / "b")


@pytest.mark.parametrize(
    "inner", [FedAvg(), FedExP(), NormClipping(max_norm=2.0)], ids=lambda rule: type(rule).__name__
)
@pytest.mark.parametrize(
    "outer", [Clip, lambda rule: ARC(rule=rule, num_byzantine=2), StaleWeighted], ids=["clip", "arc", "stale_weighted"]
)
def test_a_scaled_mean_is_the_mean_of_scaled_rows(outer, inner):
    """Around a linear rule no scaled row is written; the step, and what is said of the norms, is the same."""
    rows = np.random.default_rng(4).normal(size=(6, 5)) * np.array([[0.1], [1], [2], [9], [0.4], [3]])
    cohort = cohort_of(rows, [3.0, 1.0, 2.0, 5.0, 1.0, 1.0], staleness=torch.tensor([0, 3, 0, 20, 7, 0]))
    rule = outer(rule=inner)
    state = rule.init(cohort.layout, 6)
    delta, _, metrics = rule(cohort, state)
    written, own = rule.mix(cohort)
    want, _, inside = inner(written, state)
    torch.testing.assert_close(delta, want, rtol=1e-13, atol=1e-14)
    assert metrics.keys() == {**inside, **own}.keys()
    for name, value in {**inside, **own}.items():
        torch.testing.assert_close(torch.as_tensor(metrics[name]), torch.as_tensor(value), rtol=1e-13, atol=1e-14)
