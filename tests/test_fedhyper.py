"""FedHyper's rules on hand cases; the clients' side and whole rounds are in test_two_sided.py."""

import copy

import numpy as np
import pytest
import torch

from fedsim.clients.fedhyper import FedHyper as FedHyperClient
from fedsim.contracts import Context, LinearRule
from fedsim.models.parameters import split_parameters
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedhyper import FedHyperCL, FedHyperG, FedHyperSL, hypergradient
from fedsim.strategies.fedper import FedPer
from fedsim.strategies.krum import Krum
from fedsim.strategies.median import Median
from fedsim.strategies.qfedavg import QFedAvg
from fedsim.strategies.scaffold import Scaffold
from fedsim.testing import cohort_of


def run(rule, deltas):
    """Return the steps (T,) and the metrics of a rule that one client sends deltas (T,)."""
    state, steps, seen = rule.init(cohort_of([[0.0]]).layout, 1), [], []
    for t, delta in enumerate(deltas, start=1):
        step, state, metrics = rule(cohort_of([[float(delta)]], round=t), state)
        steps.append(step.item())
        seen.append({name: float(value) for name, value in metrics.items()})
    return np.array(steps), seen


def deltas_with(products):
    """Return Δ⁰ = 1, Δ¹, … such that consecutive products are the given ones."""
    deltas = [1.0]
    for h in products:
        deltas.append(h / deltas[-1])
    return deltas


PRODUCTS = [0.5, 0.5, 0.5, 0.5, 0.5, -0.5, -10]


@pytest.mark.parametrize(
    ("preset", "rates"),
    [
        ("paper", [1, 1.5, 2, 2.5, 3, 3, 2.5, 1 / 3]),  # clipped at [1/3, 3]
        ("reference", [1, 1.5, 2, 2.5, 3, 3.5, 3, 0.2]),  # 1 + clip(sum, −0.8, 4)
    ],
)
def test_g_by_hand(preset, rates):
    deltas = deltas_with(PRODUCTS)
    steps, seen = run(FedHyperG(preset=preset), deltas)
    np.testing.assert_allclose([m["server_rate"] for m in seen], rates, rtol=1e-12)
    np.testing.assert_allclose([m["hypergradient"] for m in seen], [0, *PRODUCTS], rtol=1e-12)
    np.testing.assert_allclose(steps, np.array(rates) * deltas, rtol=1e-12)  # the new rate, on the same Δ


@pytest.mark.parametrize(("kind", "rate"), [(FedHyperG, "server_rate"), (FedHyperSL, "lr_scale")])
def test_kappa_multiplies_each_product(kind, rate):
    _, seen = run(kind(kappa=0.25), deltas_with([4 * h for h in PRODUCTS]))
    _, plain = run(kind(), deltas_with(PRODUCTS))
    for name in ("hypergradient", rate):
        np.testing.assert_allclose([m[name] for m in seen], [m[name] for m in plain], rtol=1e-12)


def test_the_release_computes_1_plus_a_clipped_sum():
    agg, want = 0.0, []
    for h in [0, *PRODUCTS, 7, -1]:
        agg = min(max(agg + h, -0.8), 4.0)
        want.append(1 + agg)
    _, seen = run(FedHyperG(preset="reference"), deltas_with([*PRODUCTS, 7, -1]))
    np.testing.assert_allclose([m["server_rate"] for m in seen], want, rtol=1e-12)


def test_g_on_a_quadratic_by_hand():
    # f = w²/2, one step of lr .5 from w = 2: Δ = −1, w = 1; Δ = −.5, h = .5, α = 1.5, w = .25; Δ = −.125, h = .0625
    rule, w, path = FedHyperG(), 2.0, []
    state = rule.init(cohort_of([[0.0]]).layout, 1)
    for t in range(1, 4):
        step, state, metrics = rule(cohort_of([[-0.5 * w]], round=t), state)
        w += step.item()
        path.append((w, float(metrics["server_rate"])))
    np.testing.assert_allclose(path, [(1, 1), (0.25, 1.5), (0.25 - 1.5625 * 0.125, 1.5625)], rtol=1e-14)


SUM = [0.5, 0.5, 0.5, 0.5, 30, -10, -10, -11]


def test_sl_leaves_its_bound_at_once_and_the_release_winds_up():
    # factors on lr; the release's .015 .02 .025 .03 .1 .1 .1 .02 at lr 0.01
    _, wound = run(FedHyperSL(preset="reference"), [*deltas_with(SUM), 1])
    np.testing.assert_allclose([m["lr_scale"] for m in wound][2:], [1.5, 2, 2.5, 3, 10, 10, 10, 2], rtol=1e-10)
    # clipped: 3 + 30 → 10, 10 − 10 → .1 (the lower bound), and stays
    _, clipped = run(FedHyperSL(), [*deltas_with(SUM), 1])
    np.testing.assert_allclose([m["lr_scale"] for m in clipped][2:], [1.5, 2, 2.5, 3, 10, 0.1, 0.1, 0.1], rtol=1e-10)


def test_sl_leaves_steps_alone_and_sends_the_factor():
    rule = FedHyperSL()
    deltas = deltas_with(PRODUCTS)
    steps, _ = run(rule, deltas)
    np.testing.assert_array_equal(steps, deltas)
    state = rule.init(cohort_of([[0.0]]).layout, 1)
    assert float(rule.broadcast(state)["lr_scale"]) == 1
    for delta in (1.0, 0.5):
        _, state, _ = rule(cohort_of([[delta]]), state)
    assert float(rule.broadcast(state)["lr_scale"]) == 1.5  # for the next round


@pytest.mark.parametrize("kind", [FedHyperG, FedHyperSL])
def test_rates_never_leave_their_bounds(kind):
    rng = np.random.default_rng(0)
    _, seen = run(kind(kappa=3.0), rng.normal(size=200) * 10 ** rng.uniform(-3, 3, 200))
    rates = np.array([m["server_rate" if kind is FedHyperG else "lr_scale"] for m in seen])
    low, high = (1 / 3, 3) if kind is FedHyperG else (0.1, 10)
    assert low <= rates.min() < 1 < rates.max() <= high
    assert {low, high} <= set(np.round(rates, 12)) | {low, high}


@pytest.mark.parametrize("kind", [FedHyperG, FedHyperSL])
def test_orthogonal_updates_change_nothing(kind):
    rng = np.random.default_rng(1)
    rule, plain = kind(), FedAvg()
    rows = [np.r_[rng.normal(size=3), np.zeros(3)], np.r_[np.zeros(3), rng.normal(size=3)]]
    state = rule.init(cohort_of([rows[0]]).layout, 1)
    for t in range(1, 7):
        cohort = cohort_of([rows[t % 2]], round=t)
        step, state, _ = rule(cohort, state)
        assert torch.equal(step, plain(cohort, {})[0])


def test_the_memory_is_the_unscaled_step_of_the_inner_rule():
    rule = FedHyperG(rule=FedAvg(server_momentum=0.5))
    rng = np.random.default_rng(2)
    rows = rng.normal(size=(5, 3, 4))
    state = rule.init(cohort_of(rows[0]).layout, 3)
    v, previous, alpha = np.zeros(4), np.zeros(4), 1.0
    for t, updates in enumerate(rows, start=1):
        step, state, _ = rule(cohort_of(updates, [1, 2, 3], round=t), state)
        v = 0.5 * v + np.array([1, 2, 3]) @ updates / 6
        alpha = min(max(alpha + v @ previous, 1 / 3), 3)
        previous = v
        np.testing.assert_allclose(step.numpy(), alpha * v, rtol=1e-12)


def test_cosines_do_not_depend_on_scale():
    a, b = torch.tensor([3.0, 4.0]), torch.tensor([4.0, 3.0])
    assert float(hypergradient(a, b)) == 24
    assert float(hypergradient(a, b, "cosine")) == pytest.approx(24 / 25)
    assert float(hypergradient(1e-8 * a, 1e6 * b, "cosine")) == pytest.approx(24 / 25)
    assert float(hypergradient(a, 0 * b, "cosine")) == 0
    assert float(hypergradient(-a, -b)) == 24  # gradients for updates in both factors: the same


def test_products_are_summed_in_float64():
    # 2²⁴ + 1 has no float32: a sum there would lose the last term
    a = torch.tensor([4096.0, 1.0])
    assert float(hypergradient(a, a)) == 2**24 + 1


def test_cl_remembers_and_sends():
    rule = FedHyperCL()
    state = rule.init(cohort_of([[0.0, 0.0]]).layout, 4)
    assert not rule.broadcast(state)["previous"].any()
    scales = torch.tensor([1.0, 2.0, 6.0])
    cohort = cohort_of([[1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], extras={"lr_scale": scales})
    step, state, metrics = rule(cohort, state)
    sent = rule.broadcast(state)
    assert torch.equal(sent["previous"], step)
    assert sent["num_participants"] == 3
    assert float(metrics["lr_scale_mean"]) == 3


def test_cl_is_no_name_for_its_inner_rule():
    rule, cohort = FedHyperG(rule=FedHyperCL(rule=QFedAvg())), cohort_of([[1.0, 0.0]])
    assert rule.uploads == ("lr_scale", "received_loss")
    with pytest.raises(ValueError, match="FedHyperCL needs clients that adapt their rates; choose client=fedhyper"):
        FedHyperCL()(cohort, FedHyperCL().init(cohort.layout, 1))


def released_factors(positions, previous=0.0, num_participants=10):
    """Return the m of each step of `preset=reference` at positions (T,) of one weight, Δ being `previous`."""
    layout, client = cohort_of([[0.0]]).layout, FedHyperClient(preset="reference")
    (name,), state, seen = layout.names, {}, []
    told = {"previous": torch.tensor([previous], dtype=torch.float64), "num_participants": float(num_participants)}
    for step, position in enumerate(positions):
        here = {name: torch.tensor([float(position)], dtype=torch.float64)}
        context = Context(received={}, broadcast=told, client_state={}, step_state=state, step=step, num_steps=9,
                          lr=1.0, num_samples=1, key=torch.tensor(0), layout=layout)  # fmt: skip
        _, state = client.direction(here, here, context)
        seen.append(float(state["lr_scale"]))
    return seen


def test_the_released_clients_factor_by_hand():
    # d = 1, 2, 3 and Δ = 0.05: d_0 is passed over; γ = 1 + 2 Δ + .1/10 · 2 Δ = 1.101, of which 1.1 counts, and again
    np.testing.assert_allclose(released_factors([0, 1, 3, 6], 0.05), [1, 1, 1.1, 1.21], rtol=1e-14)
    np.testing.assert_allclose(released_factors([0, 1, 3], 0.04), [1, 1, 1.0808], rtol=1e-14)
    np.testing.assert_allclose(released_factors([0, 1, 3], 0.04, 2), [1, 1, 1 + 0.08 + 0.1 / 2 * 0.08], rtol=1e-14)
    # products of 0: m stays 1 to the bit
    assert released_factors([0, 1, 1, 1, 2]) == [1, 1, 1, 1, 1]
    # a product of −2 makes γ negative and m its least, from which 1.1 a step leads back; none exceeds its most
    np.testing.assert_allclose(released_factors([0, 0, 1, -1, -11], 1e-9), [1, 1, 1, 0.1, 0.11], rtol=1e-8)
    huge = released_factors(100.0 * np.arange(40) ** 2, 1.0)
    np.testing.assert_allclose(huge[2:], np.minimum(1.1 ** np.arange(1, 39), 10), rtol=1e-12)
    assert huge[-1] == 10


def test_any_rule_fits_inside():
    rng = np.random.default_rng(3)
    cohort = cohort_of(rng.normal(size=(7, 4)))
    for inner in (Median(), Krum(num_byzantine=1)):
        rule = FedHyperG(rule=inner, kappa=0)
        assert rule.needs_rows  # not linear: engines hold the rows
        assert torch.equal(rule(cohort, rule.init(cohort.layout, 7))[0], inner(cohort, inner.init(cohort.layout, 7))[0])
    with pytest.raises(ValueError, match="Krum needs"):
        FedHyperG(rule=Krum(num_byzantine=1)).check(3)
    linear = FedHyperG()
    assert isinstance(linear, LinearRule)
    assert not linear.needs_rows
    assert not hasattr(linear, "check")
    scaffold = FedHyperG(rule=Scaffold())
    assert scaffold.reduced_extras == ("control_change",)
    assert set(scaffold.broadcast(scaffold.init(cohort.layout, 7))) == {"control"}
    personal = FedHyperG(rule=FedPer())
    model = torch.nn.Sequential()
    model.add_module("body", torch.nn.Linear(2, 2))
    model.add_module("head", torch.nn.Linear(2, 2))
    assert split_parameters(model, local=personal.local_parameters).local.names == ("head.weight", "head.bias")
    assert copy.deepcopy(personal) == personal


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FedHyperG, {"kappa": -1.0}, "FedHyperG needs a finite kappa"),
        (FedHyperSL, {"normalize": "l2"}, "FedHyperSL's normalize is one of none, cosine"),
        (FedHyperG, {"preset": "code"}, "FedHyperG's preset is one of paper, reference"),
        (FedHyperG, {"min_rate": 2.0}, "min_rate <= 1 <= max_rate"),
        (FedHyperSL, {"max_rate": 0.5}, "min_rate <= 1 <= max_rate"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
