"""FedAdam, FedYogi and FedAdagrad against Algorithm 2 of Reddi et al. in loops over floats."""

import math

import numpy as np
import pytest

from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedopt import FedAdagrad, FedAdam, FedYogi
from fedsim.testing import cohort_of


def run(rule, cohorts):
    state, steps = rule.init(cohorts[0].layout, 4), []
    for cohort in cohorts:
        delta, state, _ = rule(cohort, state)
        steps.append(delta.numpy())
    return np.array(steps)


def algorithm_2(kind, means, *, lr, beta_1, beta_2, tau):
    """Lines 11 to 16, one coordinate at a time."""
    steps = np.zeros_like(means)
    for i in range(means.shape[1]):
        m, v = 0.0, tau**2
        for t, mean in enumerate(means[:, i]):
            m = beta_1 * m + (1 - beta_1) * mean
            if kind is FedAdagrad:
                v = v + mean**2
            elif kind is FedYogi:
                v = v - (1 - beta_2) * mean**2 * math.copysign(1, v - mean**2)
            else:
                v = beta_2 * v + (1 - beta_2) * mean**2
            steps[t, i] = lr * m / (math.sqrt(v) + tau)
    return steps


@pytest.mark.parametrize("kind", [FedAdam, FedYogi, FedAdagrad])
@pytest.mark.parametrize("seed", range(5))
def test_against_the_paper_in_loops(kind, seed):
    rng = np.random.default_rng(seed)
    rows, n = rng.normal(size=(6, 4, 3)), rng.integers(1, 30, (6, 4))
    arguments = {"server_lr": 0.2, "beta_1": 0.8, "tau": 0.05}
    if kind is not FedAdagrad:
        arguments["beta_2"] = 0.7
    steps = run(kind(**arguments), [cohort_of(r, w) for r, w in zip(rows, n, strict=True)])
    means = np.array([(w[:, None] * r).sum(0) / w.sum() for r, w in zip(rows, n, strict=True)])
    want = algorithm_2(kind, means, lr=0.2, beta_1=0.8, beta_2=0.7, tau=0.05)
    np.testing.assert_allclose(steps, want, rtol=1e-12)


def test_fedadam_by_hand():
    # tau = 1: m = .1·2 = .2, v = .99·1 + .01·4 = 1.03, step = .1·.2 / (sqrt(1.03) + 1) = .00992611
    (step,) = run(FedAdam(tau=1.0), [cohort_of(np.array([[2.0]]))])
    assert step == pytest.approx([0.02 / (math.sqrt(1.03) + 1)], rel=1e-14)


@pytest.mark.parametrize("kind", [FedAdam, FedYogi, FedAdagrad])
def test_a_large_tau_is_fedavg_with_a_rate(kind):
    # Δ² is nothing beside τ²: v is τ² (FedAdam's has lost its 1 %), so that η m / (√v + τ) → η/2τ Δ
    cohorts = [cohort_of(np.random.default_rng(0).normal(size=(4, 3)))]
    v = 0.99 if kind is FedAdam else 1.0
    got = run(kind(server_lr=1e6 * (v**0.5 + 1), tau=1e6, beta_1=0.0), cohorts)
    np.testing.assert_allclose(got, run(FedAvg(), cohorts), rtol=1e-9)


def test_the_start_of_v_is_right_in_double_precision():
    assert FedAdam(tau=1e-3).init(cohort_of(np.zeros((1, 1))).layout, 1)["square"].item() == 1e-3**2


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FedAdam, {"server_lr": -1.0}),
        (FedAdam, {"beta_1": 1.0}),
        (FedYogi, {"beta_2": 1.0}),
        (FedAdagrad, {"tau": 0.0}),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{kind.__name__} needs .*{name}"):
        kind(**arguments)
