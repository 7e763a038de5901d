"""Rates on the server: FedExP, step decay and FedLD's controls, against loops over floats."""

import json
import math

import numpy as np
import pytest
import torch

from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedexp import FedExP
from fedsim.strategies.fedld import FedLD
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.median import Median
from fedsim.strategies.random_direction import RandomDirection
from fedsim.strategies.step_decay import StepDecay
from fedsim.strategies.yoked import Yoked
from fedsim.testing import cohort_of


def step(rule, cohort):
    return rule(cohort, rule.init(cohort.layout, len(cohort)))[0].numpy()


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("epsilon", [1e-6, 0.5])
def test_fedexp_against_eq_2_in_loops(seed, epsilon):
    rng = np.random.default_rng(seed)
    rows, n = rng.normal(size=(6, 4)) + 0.3 * seed, rng.integers(1, 30, 6)
    mean, spread = [0.0] * 4, 0.0
    for row, weight in zip(rows, n, strict=True):
        p = weight / sum(n)
        spread += p * sum(v * v for v in row)
        mean = [m + p * v for m, v in zip(mean, row, strict=True)]
    rate = max(1.0, spread / (2 * (sum(m * m for m in mean) + epsilon)))
    np.testing.assert_allclose(step(FedExP(epsilon=epsilon), cohort_of(rows, n)), np.array(mean) * rate, rtol=1e-12)


def test_fedexps_limits():
    rng = np.random.default_rng(0)
    agreeing = cohort_of(np.ones((5, 3)) + 0.1 * rng.normal(size=(5, 3)))
    np.testing.assert_array_equal(step(FedExP(), agreeing), step(FedAvg(), agreeing))  # η = 1: never shorter
    apart = cohort_of(rng.normal(size=(5, 3)))
    np.testing.assert_allclose(step(FedExP(epsilon=1e12), apart), step(FedAvg(), apart), rtol=1e-12)


def test_step_decay():
    cohort = cohort_of([[2.0, 4.0]], round=7)
    np.testing.assert_allclose(step(StepDecay(decay=0.5), cohort), [2 / 64, 4 / 64])
    np.testing.assert_allclose(step(StepDecay(decay=0.5, every=3), cohort), [0.5, 1])  # ⌊6/3⌋ = 2
    np.testing.assert_allclose(step(StepDecay(decay=0.5, every=7), cohort), [2, 4])
    rows = np.random.default_rng(0).normal(size=(5, 3))
    first = cohort_of(rows, round=1)
    np.testing.assert_array_equal(step(StepDecay(rule=Median(), decay=0.5), first), step(Median(), first))
    assert (
        FedAvg(server_momentum=0.5).init(first.layout, 5).keys()
        == StepDecay(rule=FedAvg(server_momentum=0.5)).init(first.layout, 5)["rule"].keys()
    )


def test_fednova_by_hand():
    # ρ = .5: one step 1; two 1 + 1.5 = 2.5; three 2.5 + 1.75 = 4.25
    lengths = FedNova(momentum=0.5).lengths(torch.tensor([1, 2, 3]))
    np.testing.assert_allclose(lengths.numpy(), [1, 2.5, 4.25], rtol=1e-14)
    # n = 3, 1; τ = 1, 3: τ_eff = .75 + .75 = 1.5, and .75 · 2/1 + .25 · 6/3 = 2: a step of 3
    cohort = cohort_of([[2.0], [6.0]], [3, 1], num_steps=torch.tensor([1, 3]))
    np.testing.assert_allclose(step(FedNova(), cohort), [3.0], rtol=1e-14)
    np.testing.assert_allclose(step(FedAvg(), cohort), [3.0], rtol=1e-14)  # 2 a step each: here the two agree
    cohort = cohort_of([[2.0], [3.0]], [3, 1], num_steps=torch.tensor([1, 3]))
    np.testing.assert_allclose(step(FedNova(), cohort), [1.5 * (0.75 * 2 + 0.25 * 1)], rtol=1e-14)
    np.testing.assert_allclose(step(FedNova(server_lr=0.5), cohort), [0.75 * (0.75 * 2 + 0.25 * 1)], rtol=1e-14)


# --- FedLD's controls -------------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    rows = [{"round": 1, "step_norm": 2.0, "mean_norm": 4.0}, {"round": 2, "step_norm": 9.0, "mean_norm": 3.0}]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path)


def test_yoked_takes_the_recorded_lengths(recorded):
    rng = np.random.default_rng(0)
    for t, (length, ratio) in enumerate([(2.0, 0.5), (9.0, 3.0)], start=1):
        cohort = cohort_of(rng.normal(size=(5, 3)), rng.integers(1, 9, 5), round=t)
        mean = step(FedAvg(), cohort)
        np.testing.assert_allclose(step(Yoked(run=recorded), cohort), mean * length / np.linalg.norm(mean), rtol=1e-12)
        np.testing.assert_allclose(step(Yoked(run=recorded, length="relative"), cohort), ratio * mean, rtol=1e-12)
    zero = cohort_of(np.zeros((2, 3)), round=2)
    assert not step(Yoked(run=recorded), zero).any()


def test_yoked_to_itself_is_fedavg(tmp_path):
    # a FedAvg run's own lengths give FedAvg back
    cohorts = [cohort_of(np.random.default_rng(t).normal(size=(4, 3)), round=t) for t in (1, 2, 3)]
    norms = [np.linalg.norm(step(FedAvg(), cohort)) for cohort in cohorts]
    rows = [{"round": t, "step_norm": n, "mean_norm": n} for t, n in enumerate(norms, start=1)]
    (tmp_path / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for cohort in cohorts:
        np.testing.assert_allclose(step(Yoked(run=str(tmp_path)), cohort), step(FedAvg(), cohort), rtol=1e-12)


def test_yoked_says_what_is_wrong_with_the_record(recorded, tmp_path):
    with pytest.raises(ValueError, match=r"no round 3: .* records 2; lower num_rounds"):
        step(Yoked(run=recorded), cohort_of([[1.0]], round=3))
    with pytest.raises(ValueError, match="run to be the folder of a finished run"):
        Yoked(run=str(tmp_path / "nothing"))
    (tmp_path / "rounds.jsonl").write_text('{"round": 1, "accuracy": 0.5}\n')
    with pytest.raises(ValueError, match=r"record that run with metrics.drift=true"):
        Yoked(run=str(tmp_path))
    with pytest.raises(ValueError, match="length is one of absolute, relative"):
        Yoked(run=recorded, length="half")


@pytest.mark.parametrize("space", ["span", "full"])
@pytest.mark.parametrize("per_layer", [True, False])
def test_random_directions_have_the_rules_lengths(space, per_layer):
    rng = np.random.default_rng(4)
    rows = rng.normal(size=(4, 9)) + 0.5
    cohort = cohort_of(rows, rng.integers(1, 9, 4), sizes=[5, 3, 1], round=3)
    rule = RandomDirection(space=space, per_layer=per_layer)
    got, wanted = step(rule, cohort), step(FedLD(), cohort)
    mean = step(FedAvg(), cohort)
    for part in [slice(0, 5), slice(5, 8), slice(8, 9)] if per_layer else [slice(0, 9)]:
        assert np.linalg.norm(got[part]) == pytest.approx(np.linalg.norm(wanted[part]), rel=1e-10)
        assert got[part] @ mean[part] >= 0  # oriented
        if space == "span" and part.stop - part.start > 4:
            kept, *_ = np.linalg.lstsq(rows[:, part].T, got[part], rcond=None)
            np.testing.assert_allclose(rows[:, part].T @ kept, got[part], rtol=1e-8, atol=1e-10)
    assert not np.allclose(got, wanted)


@pytest.mark.parametrize("space", ["span", "full"])
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_random_directions_of_tiny_and_huge_float32_updates(space, scale):
    rows = np.random.default_rng(6).normal(size=(4, 9)) + 0.5
    rule = RandomDirection(space=space)
    step, _, metrics = rule(cohort_of((rows * scale).astype(np.float32), round=2), {"rule": {}})
    want, _, plain = rule(cohort_of(rows, round=2), {"rule": {}})
    np.testing.assert_allclose(step.double().numpy() / scale, want.numpy(), atol=1e-5)
    assert metrics["mean_cosine"].item() == pytest.approx(plain["mean_cosine"].item(), abs=1e-5)


def test_random_directions_are_uniform_in_sign_and_keyed():
    rows = np.random.default_rng(5).normal(size=(6, 40)) + 0.2
    free = RandomDirection(oriented=False)
    cohorts = [cohort_of(rows, round=t) for t in range(2, 202)]
    cosines = [free(c, free.init(c.layout, 6))[2]["mean_cosine"].item() for c in cohorts]
    # 200 signs: outside of 100 ± 4·√50 once in 16,000 seeds
    assert abs(sum(c > 0 for c in cosines) - 100) < 4 * math.sqrt(50)
    assert np.array_equal(step(free, cohorts[0]), step(free, cohorts[0]))
    assert not np.array_equal(step(free, cohorts[0]), step(free, cohort_of(rows, round=2, seed=1)))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FedExP, {"epsilon": 0.0}, "FedExP needs a finite epsilon > 0"),
        (StepDecay, {"decay": 1.5}, "StepDecay needs 0 < decay <= 1"),
        (StepDecay, {"every": 0}, "StepDecay needs every >= 1"),
        (RandomDirection, {"space": "rows"}, "space is one of span, full"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
