"""Flag Aggregator against explicit subspaces in D dimensions, hand cases and invariants."""

import itertools

import numpy as np
import pytest
import torch

from fedsim.laws import cohort_of
from fedsim.strategies.flag import Flag
from fedsim.testing import apply_rule

EPS = 1e-7


def explicit(rows, rank, *, lam=0.0, steps=1, combine="clipped", reference=False):
    """Build the (D, K + K(K−1)) matrix of scaled columns and take its left singular vectors, as released."""
    count, size = rows.shape
    norms = np.linalg.norm(rows, axis=1)
    g = (rows / np.where(norms > 0, norms, 1)[:, None]).T  # (D, K)
    basis = np.zeros((size, 0))
    if reference:
        drawn = torch.rand(size, rank, generator=torch.Generator().manual_seed(1)) - 0.5
        basis = np.linalg.qr(drawn.double().numpy())[0]
    for _ in range(steps):
        v = basis.T @ g
        columns = [g[:, k] * (abs(1 - v[:, k] @ v[:, k]) + EPS) ** -0.25 for k in range(count)]
        for i in range(count):
            for j in range(count):
                if i == j or not lam:
                    continue
                d, strength = g[:, i] - g[:, j], lam / (count * (count - 1))
                if reference:
                    scale = strength
                else:
                    d, scale = d / np.linalg.norm(d), strength**0.5
                seen = basis.T @ d
                columns.append(d * scale * (abs(1 - seen @ seen) + EPS) ** -0.25)
        basis = np.linalg.svd(np.stack(columns, axis=1), full_matrices=False)[0][:, :rank]
    lengths = {
        "clipped": np.minimum(norms, np.median(norms)) / count,
        "raw": norms / count,
        "reference": np.full(count, 1 / rank),
    }[combine]
    return basis @ (basis.T @ (g @ lengths)), ((basis.T @ g) ** 2).sum(0)


def cohort(seed, num_clients=9, size=40):
    rng = np.random.default_rng(seed)
    scale = rng.lognormal(size=(num_clients, 1))
    return scale * (rng.normal(size=(num_clients, size)) + rng.normal(size=size))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 3, 5])
@pytest.mark.parametrize("lam", [0.0, 3.0])
@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("combine", ["clipped", "raw"])
def test_gram_form_is_the_explicit_subspace(seed, rank, lam, steps, combine):
    rows = cohort(seed)
    rule = Flag(rank=rank, regularization=lam, irls_steps=steps, combine=combine)
    delta, _, metrics = rule(cohort_of(rows, round=2), {})
    want, quality = explicit(rows, rank, lam=lam, steps=steps, combine=combine)
    np.testing.assert_allclose(delta, want, atol=1e-8 * np.linalg.norm(want))
    np.testing.assert_allclose(metrics["quality"], quality, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("lam", [0.0, 8.0])
@pytest.mark.parametrize("steps", [1, 2])
def test_reference_starts_at_the_released_draw(seed, rank, lam, steps):
    rows = cohort(seed, 7)
    got = apply_rule(Flag(preset="reference", rank=rank, regularization=lam, irls_steps=steps), rows)
    want, _ = explicit(rows, rank, lam=lam, steps=steps, combine="reference", reference=True)
    # the released draw and its QR are in float32
    np.testing.assert_allclose(got, want, atol=1e-5 * np.linalg.norm(want))
    single = apply_rule(Flag(preset="reference", rank=rank, regularization=lam, irls_steps=steps), rows.astype("f4"))
    np.testing.assert_allclose(single, want, atol=1e-4 * np.linalg.norm(want))


def test_the_default_rank_is_half_the_clients():
    rows = cohort(0)
    np.testing.assert_array_equal(apply_rule(Flag(), rows), apply_rule(Flag(rank=5), rows))


@pytest.mark.parametrize("rank", [1, 2, 9])
@pytest.mark.parametrize("combine", ["clipped", "raw"])
def test_equal_updates_come_back(rank, combine):
    got = apply_rule(Flag(rank=rank, combine=combine), [[3.0, 4.0, 0.0]] * 5)
    np.testing.assert_allclose(got, [3, 4, 0], atol=1e-12)


def test_hand_cases():
    # five unit updates over r: 5/1 (.6, .8) and 5/2 (.6, .8)
    for rank, want in ((1, [3, 4, 0]), (2, [1.5, 2, 0])):
        got = apply_rule(Flag(preset="reference", rank=rank), [[3.0, 4.0, 0.0]] * 5)
        np.testing.assert_allclose(got, want, atol=1e-6)
    # e1, e1, e2 at r = 1: Y = e1, v = (1, 1, 0): the odd one is out. (1 + 1)/3, and (1 + 1)/1 as released
    delta, _, metrics = Flag(rank=1)(cohort_of([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]]), {})
    np.testing.assert_allclose(delta, [2 / 3, 0], atol=1e-12)
    np.testing.assert_allclose(metrics["quality"], [1, 1, 0], atol=1e-12)
    got = apply_rule(Flag(rank=1, combine="reference"), [[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    np.testing.assert_allclose(got, [2, 0], atol=1e-12)


def test_a_rank_of_all_directions_reconstructs_everything():
    rows = cohort(1, 5)
    delta, _, metrics = Flag(rank=5)(cohort_of(rows), {})
    norms = np.linalg.norm(rows, axis=1)
    clipped = rows * np.minimum(1, np.median(norms) / norms)[:, None]
    np.testing.assert_allclose(delta, clipped.mean(0), atol=1e-10)
    np.testing.assert_allclose(metrics["quality"], 1, atol=1e-10)


@pytest.mark.parametrize("lam", [0.0, 5.0])
def test_a_long_update_moves_clipped_through_the_median_alone(lam):
    rows = cohort(2)
    longest = int(np.argmax(np.linalg.norm(rows, axis=1)))
    louder = rows.copy()
    louder[longest] *= 1e6  # the median norm stays
    rule = Flag(regularization=lam)
    np.testing.assert_allclose(apply_rule(rule, louder), apply_rule(rule, rows), rtol=1e-7, atol=1e-9)
    raw = Flag(regularization=lam, combine="raw")
    assert np.linalg.norm(apply_rule(raw, louder)) > 1e4 * np.linalg.norm(apply_rule(raw, rows))


def test_steps_are_bounded():
    rows = cohort(3)
    assert np.linalg.norm(apply_rule(Flag(), rows)) <= np.median(np.linalg.norm(rows, axis=1))
    assert np.linalg.norm(apply_rule(Flag(combine="reference", rank=3), rows)) <= 9 / 3


def test_quality_does_not_see_signs():
    rows = cohort(4)
    flipped = rows * np.where(np.arange(9) == 2, -1, 1)[:, None]
    before, after = (Flag()(cohort_of(r), {})[2]["quality"] for r in (rows, flipped))
    torch.testing.assert_close(after, before, rtol=1e-9, atol=1e-9)
    assert not np.allclose(apply_rule(Flag(), rows), apply_rule(Flag(), flipped))


def test_the_objective_falls_from_step_to_step():
    def objective(steps):
        return float((1 - Flag(rank=2, irls_steps=steps)(cohort_of(cohort(5)), {})[2]["quality"]).sqrt().sum())

    values = [objective(steps) for steps in range(1, 8)]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(values))


@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_a_client_at_zero_has_no_quality(preset):
    rows = cohort(6)
    rows[3] = 0
    delta, _, metrics = Flag(preset=preset, rank=3, regularization=20.0, irls_steps=2)(cohort_of(rows), {})
    combine = "clipped" if preset == "paper" else "reference"
    want, _ = explicit(rows, 3, lam=20.0, steps=2, combine=combine, reference=preset == "reference")
    # its difference from another's unit update is as long as that one
    np.testing.assert_allclose(delta, want, atol=1e-6 * np.linalg.norm(want))
    assert metrics["quality"][3] < 1e-20  # of eigenvectors: rounding, squared


@pytest.mark.parametrize("lam", [0.0, 8.0])
def test_the_released_step_does_not_see_lengths(lam):
    rows = cohort(7)
    louder = rows * np.where(np.arange(9) == 4, 1e6, 1)[:, None]
    rule = Flag(preset="reference", regularization=lam)
    np.testing.assert_allclose(apply_rule(rule, louder), apply_rule(rule, rows), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("combine", ["clipped", "raw", "reference"])
def test_rotated_updates_give_the_rotated_step(combine):
    rows = cohort(8)
    rotation, _ = np.linalg.qr(np.random.default_rng(0).normal(size=(40, 40)))
    rule = Flag(rank=3, regularization=2.0, irls_steps=3, combine=combine)
    np.testing.assert_allclose(apply_rule(rule, rows @ rotation), apply_rule(rule, rows) @ rotation, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("rank", [1, 3, 9, 12])
def test_quality_is_a_share_and_the_subspace_orthonormal(rank, dtype):
    rows = cohort(9).astype(dtype)
    rule = Flag(rank=rank, irls_steps=2, combine="raw")
    delta, _, metrics = rule(cohort_of(rows), {})
    quality = metrics["quality"].numpy()
    assert quality.min() >= 0
    assert quality.max() <= 1 + 1e-6
    # an orthogonal projection of the mean: ⟨P m, m⟩ = ‖P m‖²
    mean, step = rows.mean(0, dtype=np.float64), delta.double().numpy()
    assert step @ mean == pytest.approx(step @ step, rel=1e-5)


@pytest.mark.parametrize(
    "arguments",
    [
        {"preset": "papr"},
        {"rank": 0},
        {"regularization": -1.0},
        {"irls_steps": 0},
        {"combine": "mean"},
        {"start": "zero"},
    ],
)
def test_arguments_out_of_range_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"Flag.*{name}"):
        Flag(**arguments)
