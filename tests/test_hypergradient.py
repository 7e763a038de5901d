"""The exact hypergradient against finite differences and closed forms, and FedHyper-G against it in its limit."""

import numpy as np
import pytest
import torch

from fedsim.hypergradient import round_gradient
from fedsim.local import LocalTraining, rates_of
from fedsim.strategies.fedhyper import FedHyperG
from fedsim.testing import cohort_of


def clients(seed, num_clients=4, size=5, count=9):
    """Return losses (S, D) -> (S,) of logistic regressions on data that differ, and their weights (S,)."""
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(num_clients, count, size, generator=rng, dtype=torch.float64)
    truth = torch.randn(num_clients, size, 1, generator=rng, dtype=torch.float64)
    y = (x @ truth + 0.3 * torch.randn(num_clients, count, 1, generator=rng, dtype=torch.float64) > 0).double()[..., 0]

    def losses(params):
        logits = torch.einsum("snd,sd->sn", x, params)
        return torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)

    return losses, torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)


STEPS = torch.tensor([1, 3, 2, 3])
TRAININGS = [
    LocalTraining(lr=0.3, batch_size=None),
    LocalTraining(lr=0.3, batch_size=None, momentum=0.5),
    LocalTraining(lr=0.3, batch_size=None, clip_norm=0.2),
]


def loss_after(training, losses, weights, start, lr):
    share = weights / weights.sum()
    updates = training.unroll(
        lambda p, _: losses(p), start.expand(4, -1), rates=rates_of(STEPS, lr, start), create_graph=False
    )
    return float(share @ losses((start + share @ updates).expand(4, -1)))


@pytest.mark.parametrize("training", TRAININGS, ids=["sgd", "momentum", "clipped"])
@pytest.mark.parametrize("seed", range(3))
def test_against_finite_differences(seed, training):
    losses, weights = clients(seed)
    rng = torch.Generator().manual_seed(100 + seed)
    start, previous = torch.randn(2, 5, generator=rng, dtype=torch.float64)
    found = round_gradient(training, losses, weights, start, num_steps=STEPS, lr=0.3)
    assert float(found.loss) == pytest.approx(loss_after(training, losses, weights, start, 0.3), rel=1e-12)
    h = 1e-5
    ends = [loss_after(training, losses, weights, start + sign * h * previous, 0.3) for sign in (1, -1)]
    assert float(found.of_rate(previous)) == pytest.approx((ends[0] - ends[1]) / (2 * h), rel=1e-6, abs=1e-9)


def test_quadratic_by_hand():
    """f = w²/2, one step of 1/2: R(w) = w/2, L(α) = (2 − α)²/8 from w = 2 and Δ = −1, so dL/dα = −1/4 at α = 1."""
    found = round_gradient(
        LocalTraining(lr=0.5, batch_size=None), lambda p: p.square().sum(1) / 2, torch.ones(1), torch.tensor([1.0]),
        num_steps=torch.ones(1, dtype=torch.int64), lr=0.5,
    )  # fmt: skip
    assert float(found.of_rate(torch.tensor([-1.0]))) == -0.25
    assert found.update.tolist() == [-0.5]
    assert float(found.loss) == 0.125


def two_rounds(seed, lr, steps):
    """Return FedHyper-G's h of round 2, the exact hypergradient, and η times the mean number of steps."""
    losses, weights = clients(seed)
    training = LocalTraining(lr=lr, batch_size=None)
    start = torch.randn(5, generator=torch.Generator().manual_seed(7 + seed), dtype=torch.float64)
    first = round_gradient(training, losses, weights, start, num_steps=steps, lr=lr).update
    second = round_gradient(training, losses, weights, start + first, num_steps=steps, lr=lr)
    rule = FedHyperG()
    state = rule.init(cohort_of([[0.0] * 5]).layout, 1)
    for number, update in enumerate((first, second.update), 1):
        _, state, metrics = rule(cohort_of(update[None].numpy(), round=number), state)
    return float(metrics["hypergradient"]), float(second.of_rate(first)), lr * float(steps[0])


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("steps", [1, 4])
def test_fedhyper_g_is_its_limit_at_small_rates(seed, steps):
    """Ratio 1 + O(η): halving the rate halves what is missing, and signs agree long before."""
    missing = []
    for lr in (2e-2, 1e-2, 5e-3):
        h, exact, scale = two_rounds(seed, lr, torch.full((4,), steps))
        assert h * exact < 0  # a falling loss asks for a longer step
        missing.append(h / (-scale * exact) - 1)
    assert abs(missing[-1]) < 0.05
    np.testing.assert_allclose(np.divide(missing[1:], missing[:-1]), 0.5, atol=0.06)  # the O(η²) that is left


def test_a_step_too_long_is_told_by_both():
    """f = L w²/2 at ηL = 1.5: the round overshoots, consecutive updates disagree, and a shorter step had been better.

    w: 2 → −1 → 1/2, so Δ = −3 and 3/2, h = −9/2; L(α) = (2 − 3α)²/8 · L, dL/dα = +3/4 L at α = 1.
    """
    found = round_gradient(
        LocalTraining(lr=1.5, batch_size=None), lambda p: p.square().sum(1) / 2, torch.ones(1), torch.tensor([-1.0]),
        num_steps=torch.ones(1, dtype=torch.int64), lr=1.5,
    )  # fmt: skip
    assert float(found.of_rate(torch.tensor([-3.0]))) == pytest.approx(0.75)
    assert float(found.update @ torch.tensor([-3.0])) == pytest.approx(-4.5)


def test_weight_decay_is_refused():
    with pytest.raises(ValueError, match="without weight decay"):
        round_gradient(
            LocalTraining(lr=0.1, weight_decay=0.1), lambda p: p.sum(1), torch.ones(1), torch.ones(2),
            num_steps=torch.ones(1, dtype=torch.int64), lr=0.1,
        )  # fmt: skip
