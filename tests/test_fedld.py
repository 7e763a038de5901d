"""FedLD against the released function's equation in loops, hand cases and guards."""

import math

import numpy as np
import pytest
import torch

from fedsim.strategies.fedld import FedLD
from fedsim.testing import apply_rule, cohort_of


def released(rows, k_proportion, *, weights=None, calibrate=False):
    """One tensor's aggregate in float64 as svd_tools.py computes it: loops over clients and directions.

    `weights` scales row i by sqrt(n_i m / n) in the spectrum and 1/m to n_i/n in the mean.
    """
    m = len(rows)
    p = np.full(m, 1 / m) if weights is None else np.asarray(weights) / np.sum(weights)
    scaled = rows * np.sqrt(p * m)[:, None]
    s, e = np.linalg.eigh(scaled @ scaled.T / m)
    s, e = s[::-1], e[:, ::-1]
    total = np.zeros(rows.shape[1])
    for j in range(int(m * k_proportion)):
        if s[j] <= 1e-12 * s[0]:
            continue
        v = scaled.T @ e[:, j]
        if calibrate and sum(x @ v < 0 for x in rows) > sum(x @ v >= 0 for x in rows):
            v = -v
        for i in range(m):
            r = (rows[i] @ v) / (v @ v) * v
            total += p[i] * r * (s[j] / s.sum()) * np.linalg.norm(rows[i]) / np.linalg.norm(r)
    return total


def cohorts(seed, num_clients, size):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(num_clients, size)) + 0.7 * rng.normal(size=size)


@pytest.mark.parametrize(("num_clients", "size"), [(5, 200), (10, 1000), (12, 77), (8, 3), (2, 2)])
@pytest.mark.parametrize("k_proportion", [0.3, 0.8, 1.0])
@pytest.mark.parametrize("calibrate", [False, True])
def test_closed_form_is_the_released_loop(num_clients, size, k_proportion, calibrate):
    rows = cohorts(num_clients, num_clients, size)
    want = released(rows, max(k_proportion, 1 / num_clients), calibrate=calibrate)
    got = apply_rule(FedLD(k_proportion=k_proportion), rows)
    np.testing.assert_allclose(got, want, atol=1e-9 * np.abs(want).max())
    single = apply_rule(FedLD(k_proportion=k_proportion), rows.astype(np.float32))
    np.testing.assert_allclose(single, want, atol=1e-5 * np.linalg.norm(want))


@pytest.mark.parametrize("preset", ["paper", "reference"])
@pytest.mark.parametrize("seed", range(10))
def test_every_layer_has_its_own_spectrum(preset, seed):
    rows, sizes = cohorts(seed, 7, 40), (20, 1, 15, 4)
    got = apply_rule(FedLD(preset=preset), rows, sizes=sizes)
    parts = np.split(rows, np.cumsum(sizes)[:-1], axis=1)
    want = [part.mean(0) if part.shape[1] == 1 else released(part, 0.8) for part in parts]
    np.testing.assert_allclose(got, np.concatenate(want), atol=1e-10)
    whole = apply_rule(FedLD(preset=preset, per_layer=False), rows, sizes=sizes)
    np.testing.assert_allclose(whole, released(rows, 0.8), atol=1e-10)


@pytest.mark.parametrize("seed", range(5))
def test_weighted_counts_clients_by_samples(seed):
    rows, n = cohorts(seed, 6, 30), np.random.default_rng(seed).integers(1, 90, 6)
    got = apply_rule(FedLD(weighted=True), rows, n)
    np.testing.assert_allclose(got, released(rows, 0.8, weights=n), atol=1e-10)
    np.testing.assert_allclose(apply_rule(FedLD(weighted=True), rows, np.ones(6)), released(rows, 0.8), atol=1e-10)
    np.testing.assert_allclose(apply_rule(FedLD(), rows, n), released(rows, 0.8), atol=1e-10)
    np.testing.assert_allclose(apply_rule(FedLD(weighted=True), rows, n, round=0), n @ rows / n.sum(), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    ("rows", "k_proportion", "want"),
    [
        # collinear, same direction: rank one, so the weight is 1 and c the mean length
        ([[3, 4]] * 5, 0.8, (3, 4)),
        ([[3, 4], [6, 8], [9, 12]], 0.8, (6, 8)),
        # Gram ((5, 3), (3, 5)) has s = 4, 1 (over m): both lean to u_1 = (1, 0), c_1 = sqrt 5; u_2's signs cancel
        ([[2, 1], [2, -1]], 0.8, (4 / math.sqrt(5), 0)),
        ([[2, 1], [2, -1]], 1.0, (4 / math.sqrt(5), 0)),
        # s = 9, 1: c_1 = 3/2 and c_2 = 1/2, so (.9·1.5, .1·.5)
        ([[3, 0], [0, 1]], 1.0, (1.35, 0.05)),
        ([[3, 0], [0, 1]], 0.8, (1.35, 0)),
        ([[3, 4], [-3, -4]], 0.8, (0, 0)),
        ([[0, 0], [0, 0]], 0.8, (0, 0)),
        ([[3, 4]], 0.8, (3, 4)),
    ],
)
def test_hand_cases(rows, k_proportion, want, dtype):
    got = apply_rule(FedLD(k_proportion=k_proportion), np.array(rows, dtype))
    np.testing.assert_allclose(got, want, atol=1e-6 if dtype == np.float32 else 1e-12)


def test_the_first_round_and_lone_clients_take_the_mean_to_the_bit():
    rows = cohorts(0, 5, 9)
    np.testing.assert_allclose(apply_rule(FedLD(), rows, [1, 2, 3, 4, 5], round=0), rows.mean(0), rtol=1e-14)
    assert apply_rule(FedLD(), rows[:1]).tolist() == rows[0].tolist()
    assert apply_rule(FedLD(), rows, round=1).tolist() != rows.mean(0).tolist()


def test_a_layer_of_zeros_leaves_the_others_alone():
    rows = cohorts(1, 5, 12)
    rows[:, 4:8] = 0
    got = apply_rule(FedLD(), rows, sizes=(4, 4, 4))
    assert got[4:8].tolist() == [0] * 4
    np.testing.assert_allclose(got[:4], released(rows[:, :4], 0.8), atol=1e-12)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_more_clients_than_columns(dtype):
    rows = cohorts(2, 30, 3).astype(dtype)  # rank 3: 27 eigenvalues are rounding noise
    want = released(rows.astype(np.float64), 0.8)
    np.testing.assert_allclose(apply_rule(FedLD(), rows), want, rtol=1e-5 if dtype == np.float32 else 1e-10)


def test_a_nearly_orthogonal_client_has_no_say_in_float32():
    rows = np.array([[3, 0, 0], [2, 0, 0], [1e-9, 1, 0]], np.float32)
    # client 2 has e_1 entry ~ 1e-9 < tol: sign 0, so c_1 = (3 + 2)/3; s = 13, 1
    got = apply_rule(FedLD(k_proportion=0.4), rows)
    np.testing.assert_allclose(got, [13 / 14 * 5 / 3, 0, 0], atol=1e-6)


@pytest.mark.parametrize("scale", [1e-25, 1e15, 1e25])
def test_the_scale_of_float32_updates_does_not_matter(scale):
    rows = cohorts(3, 6, 20)
    got = apply_rule(FedLD(), (rows * scale).astype(np.float32)) / scale
    np.testing.assert_allclose(got, released(rows, 0.8), atol=1e-5)


def test_rotation_of_a_layer_rotates_its_step():
    rows = cohorts(4, 6, 8)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(8, 8)))
    np.testing.assert_allclose(apply_rule(FedLD(), rows @ rotation), apply_rule(FedLD(), rows) @ rotation, atol=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_the_step_is_no_longer_than_the_mean_length(seed):
    rows = cohorts(seed, 9, 6)
    length = np.linalg.norm(apply_rule(FedLD(k_proportion=1.0), rows))
    assert length <= np.linalg.norm(rows, axis=1).mean() * (1 + 1e-12)


def test_it_is_not_robust_and_this_says_so():
    # the loudest client sets the direction and, through c_1, the length: like FedAvg it follows
    rows = cohorts(5, 10, 50)
    calm = np.linalg.norm(apply_rule(FedLD(), rows))
    rows[3] *= 1e3
    assert np.linalg.norm(apply_rule(FedLD(), rows)) > 50 * calm


def test_bugs_of_the_released_code_are_opt_in():
    zero, orthogonal = np.zeros((2, 3)), np.array([[3.0, 0.0], [0.0, 1.0]])
    for preset, finite in (("paper", True), ("reference", False)):
        assert np.isfinite(apply_rule(FedLD(preset=preset), zero)).all() == finite
        assert np.isfinite(apply_rule(FedLD(preset=preset, k_proportion=1.0), orthogonal)).all() == finite
    lone = np.array([[3.0, 4.0]])
    assert apply_rule(FedLD(preset="reference"), lone).tolist() == [0.0, 0.0]
    assert apply_rule(FedLD(preset="reference", min_components=1), lone).tolist() == [3.0, 4.0]
    assert np.isfinite(apply_rule(FedLD(preset="reference", guards=True), zero)).all()


def test_a_one_element_tensor_takes_the_mean_in_the_released_code_too():
    rows = np.array([[3.0, 0.0], [0.0, 0.0], [1.0, 0.0]])  # a client at 0 would be orthogonal, a column of zeros 0/0
    got = apply_rule(FedLD(preset="reference"), rows, sizes=(1, 1))
    np.testing.assert_allclose(got, rows.mean(0), rtol=1e-15)


def test_tol_drops_directions_far_below_the_first():
    # s = 9, 1: the second is 1/9 of the first
    rows = [[3.0, 0.0], [0.0, 1.0]]
    np.testing.assert_allclose(apply_rule(FedLD(k_proportion=1.0, tol=0.1), rows), [1.35, 0.05], atol=1e-12)
    np.testing.assert_allclose(apply_rule(FedLD(k_proportion=1.0, tol=0.12), rows), [1.35, 0.0], atol=1e-12)


def test_presets_are_resolved_when_built():
    assert (FedLD().min_components, FedLD().guards) == (1, True)
    reference = FedLD(preset="reference", guards=True)
    assert (reference.min_components, reference.guards) == (0, True)


def test_metrics_compare_the_step_with_the_mean():
    rows = cohorts(6, 8, 30)
    delta, _, metrics = FedLD(server_lr=0.5)(cohort_of(rows, sizes=(10, 20), round=2), {})
    mean = rows.mean(0)
    step = delta.numpy() / 0.5
    assert metrics["step_to_mean"].item() == pytest.approx(np.linalg.norm(step) / np.linalg.norm(mean))
    want = step @ mean / np.linalg.norm(step) / np.linalg.norm(mean)
    assert metrics["step_cosine"].item() == pytest.approx(want)


def test_a_gram_over_many_column_blocks_is_still_right():
    rows = np.random.default_rng(7).normal(size=(4, 150_000)) + 0.3
    got = apply_rule(FedLD(), rows.astype(np.float32))
    np.testing.assert_allclose(got, apply_rule(FedLD(), rows), atol=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"k_proportion": 0.0},
        {"k_proportion": 1.1},
        {"server_lr": 0.0},
        {"preset": "papr"},
        {"tol": -1.0},
        {"min_components": 2},
    ],
)
def test_arguments_out_of_range_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        FedLD(**arguments)


def test_input_stays_as_it_was():
    rows = torch.as_tensor(cohorts(8, 4, 6))
    before = rows.clone()
    apply_rule(FedLD(), rows)
    assert torch.equal(rows, before)
