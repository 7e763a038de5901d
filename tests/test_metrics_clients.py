"""Hand cases, naive oracles and limits of fairness, drift, decomposition, traffic and the evaluation budget."""

from __future__ import annotations

from dataclasses import fields, replace

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import tensor

from fedsim.contracts import Cohort, Streamed, Sums, row_square_norms
from fedsim.layout import Layout
from fedsim.metrics.budget import Due, Evaluation, evaluation_interval
from fedsim.metrics.classification import head_middle_tail, many_medium_few
from fedsim.metrics.communication import num_bytes, traffic
from fedsim.metrics.decomposition import decompose, subsample
from fedsim.metrics.drift import cosine, dissimilarity, drift_of_rows, drift_of_sums, drift_ratio_by_layer
from fedsim.metrics.fairness import accuracy_by_skew_quartile, fairness
from fedsim.rng import generator


def _cohort(updates, weights=None, dtype=torch.float64, layout=None, **more):
    updates = torch.as_tensor(updates, dtype=dtype)
    k = len(updates)
    zeros = torch.zeros(k, dtype=torch.int64)
    return Cohort(
        updates=updates,
        weights=torch.ones(k) if weights is None else tensor(weights),
        clients=torch.arange(k),
        num_steps=zeros + 1,
        staleness=zeros,
        received=zeros,
        layout=layout or Layout.vector([updates.shape[1]]),
        **more,
    )


def _streamed(cohort):
    p = cohort.weights.double() / cohort.weights.double().sum()
    light = replace(cohort, updates=None)
    sums = Sums(light, cohort.weights, row_square_norms(cohort.rows), {})
    return replace(light, streamed=Streamed(p.to(cohort.rows.dtype) @ cohort.rows, sums))


# Fairness


def test_fairness_by_hand():
    # Ten clients .0 … .9 and one without samples: worst and best are one each (ceil of 1), Jain 4.5²/(10 · 2.85).
    accuracies = tensor([*(i / 10 for i in range(10)), torch.nan], dtype=torch.float64)
    figures = fairness(accuracies, tensor([1] * 9 + [11, 0]))
    expected = {
        "accuracy_mean": 0.45,
        "accuracy_weighted_mean": (3.6 + 11 * 0.9) / 20,
        "accuracy_std": np.sqrt(0.0825),
        "accuracy_min": 0.0,
        "accuracy_worst": 0.0,
        "accuracy_best": 0.9,
        "accuracy_jain": 4.5**2 / 28.5,
    }
    assert figures.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-12, err_msg=name)


@pytest.mark.parametrize(("clients", "tail"), [(1, 1), (10, 1), (11, 2), (20, 2), (30, 3), (31, 4)])
def test_the_tails_are_rounded_up(clients, tail):
    accuracies = torch.arange(clients, dtype=torch.float64) / clients
    figures = fairness(accuracies.flip(0), torch.ones(clients))
    np.testing.assert_allclose(figures["accuracy_worst"], accuracies[:tail].mean(), rtol=1e-12)
    np.testing.assert_allclose(figures["accuracy_best"], accuracies[-tail:].mean(), rtol=1e-12)


def test_fairness_limits():
    one = fairness(tensor([1.0, 0.0, 0.0, 0.0]), torch.ones(4))
    assert one["accuracy_jain"].item() == 0.25
    assert fairness(torch.zeros(4), torch.ones(4))["accuracy_jain"].item() == 1
    assert all(value.isnan() for value in fairness(torch.full((3,), torch.nan), torch.zeros(3)).values())
    with pytest.raises(ValueError, match=r"share must be in \(0, 1\], got 0"):
        fairness(torch.ones(3), torch.ones(3), share=0)


def test_accuracy_by_skew_quartile_by_hand():
    # By skew: clients 4 3 2 1 0 | 5 has no accuracy. Five clients: runs 1, 1, 1, 2.
    accuracies = tensor([0.1, 0.2, 0.3, 0.4, 0.5, torch.nan], dtype=torch.float64)
    skew = tensor([0.9, 0.7, 0.5, 0.3, 0.1, 0.0])
    figures = [round(value.item(), 12) for value in accuracy_by_skew_quartile(accuracies, skew).values()]
    assert figures == [0.5, 0.4, 0.3, 0.15]
    assert list(accuracy_by_skew_quartile(accuracies, skew)) == [f"accuracy_skew_q{q}" for q in (1, 2, 3, 4)]


def test_ties_of_skew_go_by_position_and_few_clients_leave_quarters_empty():
    figures = accuracy_by_skew_quartile(tensor([0.1, 0.2, 0.3, 0.4]), torch.zeros(4))
    np.testing.assert_allclose([float(v) for v in figures.values()], [0.1, 0.2, 0.3, 0.4], rtol=1e-6)
    two = [value.item() for value in accuracy_by_skew_quartile(tensor([0.5, 1.0]), tensor([0.0, 1.0])).values()]
    np.testing.assert_array_equal(two, [np.nan, 0.5, np.nan, 1.0])


# Drift


def test_drift_of_two_orthogonal_clients_by_hand():
    # Mean (½, ½): ‖mean‖² = ½, Σp‖Δ‖² = 1, so ratio ½, B² 2 (algorithm notes §7.4), cosines ½/√½.
    figures = drift_of_rows(_cohort([[1.0, 0.0], [0.0, 1.0]]), previous=tensor([-1.0, -1.0], dtype=torch.float64))
    expected = {
        "update_norm_mean": 1,
        "update_norm_std": 0,
        "mean_norm": 0.5**0.5,
        "drift_ratio": 0.5,
        "dissimilarity": 2,
        "drift_spread": 0.5,
        "cosine_mean": 0.5**0.5,
        "cosine_previous": -1,
    }
    for name, value in expected.items():
        np.testing.assert_allclose(figures[name], value, rtol=1e-12, atol=1e-15, err_msg=name)
    np.testing.assert_allclose(figures["cosine"], [0.5**0.5] * 2, rtol=1e-12)
    assert dissimilarity(tensor([[1.0, 0.0], [0.0, 1.0]]), torch.ones(2)).item() == pytest.approx(2, rel=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_drift_agrees_with_loops(seed):
    rng = generator(seed, "test")
    k, d = 6, 9
    rows, weights, previous = rng.normal(size=(k, d)), rng.uniform(0.1, 5, k), rng.normal(size=d)
    p = [w / sum(weights) for w in weights]
    mean = [sum(p[i] * rows[i][j] for i in range(k)) for j in range(d)]
    norms = [sum(x * x for x in row) ** 0.5 for row in rows]
    length = sum(x * x for x in mean) ** 0.5
    figures = drift_of_rows(_cohort(rows, weights.tolist()), tensor(previous))
    spread = sum(p[i] * sum((rows[i][j] - mean[j]) ** 2 for j in range(d)) for i in range(k))
    total = sum(p[i] * norms[i] ** 2 for i in range(k))
    # 1e-6: the weights are float32.
    np.testing.assert_allclose(figures["update_norm"], norms, rtol=1e-12)
    np.testing.assert_allclose(figures["drift_spread"], spread, rtol=1e-6)
    np.testing.assert_allclose(figures["drift_ratio"], length**2 / total, rtol=1e-6)
    np.testing.assert_allclose(figures["dissimilarity"], total / length**2, rtol=1e-6)
    cosines = [
        sum(a * b for a, b in zip(row, mean, strict=True)) / n / length for row, n in zip(rows, norms, strict=True)
    ]
    np.testing.assert_allclose(figures["cosine"], cosines, rtol=1e-5, atol=1e-7)
    expected = np.dot(mean, previous) / length / np.linalg.norm(previous)
    np.testing.assert_allclose(figures["cosine_previous"], expected, rtol=1e-5)


@settings(derandomize=True, deadline=None, max_examples=30)
@given(seed=st.integers(0, 2**31 - 1), k=st.integers(1, 7), d=st.integers(1, 6))
def test_drift_bounds_and_streaming(seed, k, d):
    rng = generator(seed, "test")
    cohort = _cohort(rng.normal(size=(k, d)) * 10.0 ** rng.integers(-3, 4), rng.integers(1, 9, k).tolist())
    held, streamed = drift_of_rows(cohort), drift_of_sums(_streamed(cohort).streamed)
    assert 0 <= held["drift_ratio"] <= 1
    assert held["dissimilarity"] >= 1
    assert (held["cosine"].abs() <= 1).all()
    assert held.keys() - streamed.keys() == {"cosine", "cosine_mean"}
    for name, value in streamed.items():
        torch.testing.assert_close(value, held[name], rtol=0, atol=0)
    if k == 1:
        # One client is the mean; 1e-12 for the rounding of its square root and division.
        np.testing.assert_allclose([held["drift_ratio"], held["dissimilarity"], held["cosine_mean"]], 1, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_drift_is_finite_when_nothing_moves_and_when_updates_cancel(dtype):
    still = drift_of_rows(_cohort(torch.zeros(3, 4), dtype=dtype), previous=torch.zeros(4, dtype=dtype))
    assert all(value.isfinite().all() for value in still.values())
    assert (still["drift_ratio"], still["dissimilarity"], still["cosine_mean"], still["cosine_previous"]) == (
        1,
        1,
        0,
        0,
    )
    cancel = drift_of_rows(_cohort([[1.0, -2.0], [-1.0, 2.0]], dtype=dtype))
    assert cancel["drift_ratio"] == 0
    assert cancel["dissimilarity"] == 2.0**104
    half = drift_of_rows(_cohort([[0.0, 0.0], [3.0, 4.0]], dtype=dtype))
    np.testing.assert_allclose(half["cosine"], [0, 1], rtol=1e-6)


def test_drift_ratio_by_layer():
    layout = Layout.vector([2, 1])
    figures = drift_ratio_by_layer(_cohort([[1.0, 0.0, 3.0], [0.0, 1.0, 3.0]], layout=layout), layout)
    assert {name: round(v.item(), 12) for name, v in figures.items()} == {"drift_ratio_0": 0.5, "drift_ratio_1": 1.0}


def test_one_full_batch_step_has_the_dissimilarity_of_its_gradients():
    gradients = tensor(generator(3, "test").normal(size=(4, 5)))
    weights = tensor([1.0, 2.0, 3.0, 4.0])
    moved = drift_of_rows(_cohort(-0.1 * gradients, weights.tolist()))
    torch.testing.assert_close(moved["dissimilarity"], dissimilarity(gradients, weights))


def test_cosine_limits():
    a = tensor([3.0, 4.0])
    np.testing.assert_allclose([cosine(a, 2 * a), cosine(a, -a), cosine(a, tensor([-4.0, 3.0]))], [1, -1, 0], atol=1e-7)
    assert cosine(a, torch.zeros(2)) == 0


# Decomposition


def test_decomposition_by_hand():
    # p = (¼, ¾): local ¼·1 + ¾·2 = 1.75; away ¼·3 + ¾·5 = 4.5; shift 2.75; aggregation 4 − 4.5.
    terms = decompose(tensor([1.0, 2.0]), tensor([3.0, 5.0]), tensor(4.0), tensor([10.0, 30.0]))
    values = {name.removeprefix("decomposition_"): value.item() for name, value in terms.items()}
    assert values == {"total": 4.0, "local": 1.75, "shift": 2.75, "aggregation": -0.5}


@pytest.mark.parametrize("seed", range(5))
def test_decomposition_telescopes_and_vanishes_where_it_must(seed):
    rng = generator(seed, "test")
    local, away, weights = (tensor(rng.uniform(0.1, 3, 5)) for _ in range(3))
    terms = decompose(local, away, tensor(1.3), weights)
    total = sum(terms[f"decomposition_{name}"] for name in ("local", "shift", "aggregation"))
    np.testing.assert_allclose(total, terms["decomposition_total"], rtol=1e-14)
    # Clients whose data are the pool's have no shift; one client is its own aggregate.
    assert decompose(local, local, tensor(1.3), weights)["decomposition_shift"] == 0
    assert decompose(local[:1], away[:1], away[0], weights[:1])["decomposition_aggregation"] == 0


def test_a_row_of_weight_zero_takes_no_part_and_shapes_must_agree():
    with_nan = decompose(tensor([1.0, torch.nan]), tensor([2.0, torch.nan]), tensor(2.0), tensor([5.0, 0.0]))
    assert with_nan == decompose(tensor([1.0]), tensor([2.0]), tensor(2.0), tensor([5.0]))
    with pytest.raises(ValueError, match=r"one entry a client.*\(2,\), \(1,\), \(2,\)"):
        decompose(torch.ones(2), torch.ones(1), tensor(1.0), torch.ones(2))


def test_the_subsample_is_keyed_and_without_repeats():
    positions = generator(0, "test").permutation(1000)
    kept = subsample(positions, 100, seed=1)
    assert len(set(kept.tolist())) == 100
    assert np.isin(kept, positions).all()
    np.testing.assert_array_equal(kept, subsample(positions, 100, seed=1))
    assert not np.array_equal(kept, subsample(positions, 100, seed=2))
    np.testing.assert_array_equal(subsample(positions, 1000, seed=1), positions)
    with pytest.raises(ValueError, match="limit must be >= 1, got 0"):
        subsample(positions, 0, seed=1)


# Traffic


def test_traffic_by_hand():
    # D = 10 float32 = 40 bytes down, and a broadcast of 3 float64 and a number: 32. Up 40, weight 8, extra 10 float32.
    extras = {"control": torch.zeros(2, 10)}
    cohort = _cohort(torch.zeros(2, 10), dtype=torch.float32, extras=extras)
    sent = {"c": torch.zeros(3, dtype=torch.float64), "mu": 0.1}
    assert traffic(cohort, sent, num_sent=3) == {"bytes_down": 3 * 72, "bytes_up": 2 * 88}
    assert traffic(cohort, {}, num_sent=3, num_received=3, buffers=5) == {"bytes_down": 3 * 45, "bytes_up": 3 * 93}
    assert traffic(cohort, {}, num_sent=2, update=6) == {"bytes_down": 80, "bytes_up": 2 * (6 + 8 + 40)}


def test_a_streamed_cohort_moves_as_many_bytes():
    cohort = _cohort(torch.zeros(3, 10), extras={"control": torch.zeros(3, 4), "train_loss": torch.zeros(3)})
    light = replace(cohort, updates=None, extras={"train_loss": torch.zeros(3)})
    sums = Sums(light, cohort.weights, torch.zeros(3), {"control": torch.zeros(4)})
    streamed = replace(light, streamed=Streamed(torch.zeros(10, dtype=torch.float64), sums))
    assert traffic(streamed, {}, num_sent=3) == traffic(cohort, {}, num_sent=3)


def test_num_bytes():
    assert (
        num_bytes({"a": [np.zeros(3, np.float32), 1, "é"], "b": torch.zeros(2, dtype=torch.bfloat16)}) == 12 + 8 + 2 + 4
    )
    with pytest.raises(TypeError, match="cannot count the bytes of a set"):
        num_bytes({1})


# Budget


@pytest.mark.parametrize(
    ("train", "evaluated", "share", "interval"),
    [
        (600, 360, 0.2, 1),  # 120 ≤ 120: exactly the budget
        (600, 361, 0.2, 2),
        (100, 3000, 0.2, 50),
        (100, 90, 0.3, 1),  # 30 ≤ 30: the float 0.3 is below 3/10
        (100, 0, 0.2, 1),
        (1, 10**9, 0.1, 3_333_333_334),
    ],
)
def test_evaluation_interval_by_hand(train, evaluated, share, interval):
    assert evaluation_interval(train, evaluated, share) == interval


@settings(derandomize=True, deadline=None)
@given(train=st.integers(1, 10**6), evaluated=st.integers(0, 10**7), share=st.sampled_from([0.05, 0.1, 0.2, 0.3, 1.0]))
def test_the_interval_is_the_least_that_keeps_the_budget(train, evaluated, share):
    interval = evaluation_interval(train, evaluated, share)
    tenths = round(share * 100)
    assert 100 * evaluated <= 3 * tenths * interval * train
    assert interval == 1 or 100 * evaluated > 3 * tenths * (interval - 1) * train


def test_evaluation_resolves_what_is_null_and_keeps_what_is_not():
    null = Evaluation().resolve(600, 360, 3600)
    assert (null.every, null.clients_every) == (2, 20)  # half the share each
    assert Evaluation(every=7).resolve(600, 360, 3600) == Evaluation(every=7, clients_every=10)
    assert Evaluation(clients_every=0).resolve(600, 360, 3600) == Evaluation(every=1, clients_every=0)


def test_the_first_and_the_last_round_have_everything_that_is_ever_measured():
    plan = Evaluation(every=4, clients_every=5, decomposition_every=6)
    due = [plan.due(round, 13) for round in range(1, 14)]
    assert [r + 1 for r, d in enumerate(due) if d.server] == [1, 4, 8, 12, 13]
    assert [r + 1 for r, d in enumerate(due) if d.clients] == [1, 5, 10, 13]
    assert [r + 1 for r, d in enumerate(due) if d.decomposition] == [1, 6, 12, 13]
    assert Evaluation(every=1, clients_every=0).due(1, 1) == Due(True, False, False)
    with pytest.raises(ValueError, match="still null; call resolve"):
        Evaluation().due(1, 2)


@pytest.mark.parametrize(
    ("name", "value"),
    [("every", 0), ("clients_every", -1), ("share", 0.0), ("calibration_bins", 0), ("decomposition_every", -1),
     ("decomposition_samples", 0)],
)  # fmt: skip
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"metrics\.{name} must be .*got {value}"):
        Evaluation(**{name: value})
    with pytest.raises(ValueError, match="train_samples_per_round must be >= 1, got 0"):
        evaluation_interval(0, 5)


def test_the_yaml_lists_every_setting_with_its_default(pytestconfig):
    text = (pytestconfig.rootpath / "configs/metrics/default.yaml").read_text(encoding="utf-8")
    written = yaml.safe_load(text)
    assert written.pop("_target_") == "fedsim.metrics.budget.Evaluation"
    given = {name: tuple(value) if isinstance(value, list) else value for name, value in written.items()}
    assert given == {f.name: f.default for f in fields(Evaluation)}


def test_every_figure_has_its_line_in_the_documentation(pytestconfig):
    text = (pytestconfig.rootpath / "docs/metrics.md").read_text(encoding="utf-8")
    cohort = _cohort([[1.0, 0.0], [0.0, 1.0]])
    two = torch.ones(2)
    figures = (
        drift_of_rows(cohort, torch.ones(2, dtype=torch.float64))
        | fairness(two, two)
        | decompose(two, two, tensor(1.0), two)
        | many_medium_few(two, two)
        | head_middle_tail(two, two)
        | traffic(cohort, {}, num_sent=2)
    )
    assert len(figures) > 25
    assert not [name for name in figures if f"`{name}`" not in text]
