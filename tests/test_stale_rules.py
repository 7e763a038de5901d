"""Rules that look at staleness, against loops in float64 and by hand."""

import numpy as np
import pytest
import torch

from fedsim.strategies.asyn_tiers import AsynTiers
from fedsim.strategies.fedasync import FedAsync
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbuff import FedBuff
from fedsim.strategies.first_order import FirstOrder
from fedsim.strategies.median import Median
from fedsim.strategies.scaffold import Scaffold
from fedsim.strategies.stale_weighted import StaleWeighted
from fedsim.strategies.staleness import discount
from fedsim.strategies.w_pred import WPred
from fedsim.testing import cohort_of

EXACT = {"rtol": 1e-13, "atol": 1e-14}


def stale_cohort(staleness, rows=None, weights=None, models=None, seed=0):
    rng = np.random.default_rng(seed)
    count = len(staleness)
    round = 50
    rows = rng.normal(size=(count, 3)) if rows is None else np.asarray(rows, dtype=float)
    received = round - 1 - np.asarray(staleness)
    versions = {*received.tolist(), round - 1}
    models = {v: torch.as_tensor(rng.normal(size=rows.shape[1])) for v in versions} if models is None else models
    return cohort_of(
        rows, rng.integers(1, 9, count).astype(float) if weights is None else weights, round=round,
        staleness=torch.tensor(staleness), received=torch.as_tensor(received), models=models,
    )  # fmt: skip


def step(rule, cohort):
    return rule(cohort, rule.init(cohort.layout, len(cohort)))[0].numpy()


def test_discounts_by_hand():
    age = torch.tensor([0, 3, 4, 6, 8])
    np.testing.assert_allclose(discount("hinge", age, 10.0, 4.0), [1, 1, 1, 1 / 21, 1 / 41], **EXACT)
    np.testing.assert_allclose(discount("polynomial", age, 0.5, 4.0), [1, 1 / 2, 5**-0.5, 7**-0.5, 1 / 3], **EXACT)
    np.testing.assert_array_equal(discount("constant", age, 1.0, 1.0), np.ones(5))


@pytest.mark.parametrize("kind", ["constant", "hinge", "polynomial"])
def test_fedasync_mixes_models_one_after_another_as_one_sum(kind):
    rule = FedAsync(alpha=0.7, discount=kind, a=2.0, b=1.0)
    cohort = stale_cohort([0, 5, 1, 2])
    now = cohort.models[49].numpy()
    s = {
        "constant": lambda t: 1,
        "hinge": lambda t: 1 if t <= 1 else 1 / (2 * (t - 1) + 1),
        "polynomial": lambda t: (t + 1) ** -2.0,
    }
    n = cohort.weights.numpy()
    want = np.zeros(3)
    for k, t in enumerate([0, 5, 1, 2]):
        theirs = cohort.models[49 - t].numpy() + cohort.rows[k].numpy()
        want += n[k] / n.sum() * 0.7 * s[kind](t) * (theirs - now)
    np.testing.assert_allclose(step(rule, cohort), want, **EXACT)


def test_one_reply_is_the_papers_fedasync():
    cohort = stale_cohort([3])
    alpha = 0.6 * 4**-0.5
    now, theirs = cohort.models[49].numpy(), cohort.models[46].numpy() + cohort.rows[0].numpy()
    np.testing.assert_allclose(now + step(FedAsync(), cohort), (1 - alpha) * now + alpha * theirs, **EXACT)


@pytest.mark.parametrize("weighted", [False, True])
def test_fedbuff_divides_by_the_buffer(weighted):
    cohort = stale_cohort([0, 3, 8])
    n = cohort.weights.numpy() if weighted else np.ones(3)
    want = 0.5 * sum(n[k] * cohort.rows[k].numpy() * s for k, s in enumerate([1, 1 / 2, 1 / 3])) / n.sum()
    np.testing.assert_allclose(step(FedBuff(server_lr=0.5, weighted=weighted), cohort), want, **EXACT)


def test_without_staleness_the_rules_are_fedavg():
    cohort = stale_cohort([0, 0, 0])
    want = step(FedAvg(), cohort)
    for rule in (StaleWeighted(), FirstOrder(), FedBuff(weighted=True), FedAsync(alpha=1.0), AsynTiers()):
        np.testing.assert_allclose(step(rule, cohort), want, **EXACT)
    assert np.array_equal(step(FirstOrder(), cohort), want)


def test_forty_rounds_leave_a_quarter():
    cohort = stale_cohort([40], rows=[[4.0, -8.0]])
    np.testing.assert_array_equal(step(StaleWeighted(), cohort), [1, -2])
    two = stale_cohort([40, 0], rows=[[4.0], [1.0]], weights=[1.0, 1.0])
    np.testing.assert_array_equal(step(StaleWeighted(), two), [1.0])  # (1 + 1) / 2: the divisor stays


def test_first_order_by_hand():
    models = {49: torch.tensor([0.5, 1.0], dtype=torch.float64), 9: torch.zeros(2, dtype=torch.float64)}
    cohort = stale_cohort([40], rows=[[0.1, 0.0]], models=models)
    np.testing.assert_allclose(step(FirstOrder(), cohort), [0.08, 0], **EXACT)  # 0.1 − 4 · 0.01 · 0.5
    models = {49: models[49], 9: models[49]}
    cohort = stale_cohort([40], rows=[[0.1, -0.3]], models=models)
    np.testing.assert_array_equal(step(FirstOrder(), cohort), [0.1, -0.3])  # the model has not moved
    np.testing.assert_array_equal(step(FirstOrder(compensation=0.0), stale_cohort([5])), stale_cohort([5]).rows[0])


def test_tiers_by_hand():
    """Two tiers, 3 : 1 updates: the fast tier's model weighs 1/4, the slow one's 3/4."""
    rule = AsynTiers(bounds=(0,))
    state = rule.init(cohort_of(np.zeros((1, 1))).layout, 3)
    state = {"models": {"0": torch.tensor([9.0])}, "counts": {"0": 2}}
    models = {49: torch.tensor([10.0], dtype=torch.float64), 44: torch.tensor([2.0], dtype=torch.float64)}
    cohort = stale_cohort([0, 0, 5], rows=[[1.0], [4.0], [0.5]], weights=[2.0, 1.0, 7.0], models=models)
    delta, state, metrics = rule(cohort, state)
    # the fast tier is at 10 + (2 · 1 + 4) / 3 = 12, the slow one at 2 + 0.5 = 2.5
    np.testing.assert_allclose(delta, [12 / 4 + 3 * 2.5 / 4 - 10], **EXACT)
    assert state["counts"] == {"0": 3, "1": 1}
    assert metrics["num_tiers"] == 2
    # In the next round only the fast tier answers; the slow one's model stays and has weight 4/5.
    models = {50: torch.tensor([20.0], dtype=torch.float64)}
    later = cohort_of([[1.0]], round=51, models=models, received=torch.tensor([50]), staleness=torch.tensor([0]))
    np.testing.assert_allclose(rule(later, state)[0], [21 / 5 + 4 * 2.5 / 5 - 20], **EXACT)


def test_tier_bounds_are_the_last_of_their_tier():
    _, state, _ = AsynTiers(bounds=(0, 20))(stale_cohort([0, 1, 20, 21, 40]), {"models": {}, "counts": {}})
    assert state["counts"] == {"0": 1, "1": 1, "2": 1}
    three = stale_cohort([0, 1, 20])
    _, state, _ = AsynTiers(bounds=(0, 20))(three, {"models": {}, "counts": {}})
    want = sum(
        float(n) * (three.models[49 - t] + row)
        for n, t, row in zip(three.weights[1:], [1, 20], three.rows[1:], strict=True)
    )
    np.testing.assert_allclose(state["models"]["1"], want / float(three.weights[1:].sum()), **EXACT)


def test_weight_prediction_by_hand():
    """Steps 8, 0, 2 with β = 1/2: v = 4, 2, 2; three rounds ahead lie (1/2 + 1/4 + 1/8) · 2."""
    rule = WPred(momentum=0.5)
    state = rule.init(cohort_of(np.zeros((1, 1))).layout, 1)
    for row, velocity in zip([8.0, 0.0, 2.0], [4, 2, 2], strict=True):
        delta, state, metrics = rule(cohort_of([[row]]), state)
        assert (delta.item(), state["velocity"].item(), metrics["velocity_norm"].item()) == (row, velocity, velocity)
    model = torch.tensor([10.0], dtype=torch.float64)
    sent = rule.broadcast(state)
    assert [rule.sent(model, sent, late).item() for late in (0, 1, 2, 3)] == [10, 11, 11.5, 11.75]
    assert WPred(momentum=0.0).sent(model, sent, 5) is model


def test_weight_prediction_keeps_what_the_inner_rule_sends_and_remembers():
    rule = WPred(rule=Scaffold())
    state = rule.init(cohort_of(np.zeros((1, 2))).layout, 7)
    assert set(rule.broadcast(state)) == {"control", "velocity"}
    assert state["rule"]["num_clients"] == 7
    cohort = cohort_of([[1.0, 3.0]], extras={"control_change": torch.tensor([[7.0, 14.0]])})
    _, state, metrics = rule(cohort, state)
    assert state["rule"]["control"].tolist() == [1, 2]  # 1/7 of it: one of seven clients
    assert {"control_norm", "velocity_norm"} <= set(metrics)


def test_they_wrap_any_rule():
    cohort = stale_cohort([0, 20, 40], rows=[[1.0], [4.0], [40.0]])
    assert step(StaleWeighted(rule=Median()), cohort) == 2  # of 1, 2, 10


def test_a_version_that_is_missing_is_named():
    with pytest.raises(ValueError, match="version 46 of the model is not in the cohort"):
        step(FedAsync(), stale_cohort([3], models={49: torch.zeros(3)}))


@pytest.mark.parametrize(
    "make",
    [
        lambda: FedAsync(alpha=0.0), lambda: FedAsync(alpha=1.1), lambda: FedAsync(discount="linear"),
        lambda: FedBuff(server_lr=0.0), lambda: FedBuff(a=0.0), lambda: FedBuff(b=-1.0),
        lambda: StaleWeighted(half_life=0.0), lambda: AsynTiers(bounds=(5, 0)), lambda: AsynTiers(bounds=()),
        lambda: FirstOrder(compensation=-1.0), lambda: WPred(momentum=1.0), lambda: WPred(momentum=-0.1),
    ],
)  # fmt: skip
def test_arguments_out_of_their_range_are_refused(make):
    with pytest.raises(ValueError, match=r"needs|must be"):
        make()
