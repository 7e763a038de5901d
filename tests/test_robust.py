"""Byzantine-robust rules against numpy, scipy and the papers' definitions in loops; then attacks."""

import itertools

import numpy as np
import pytest
import torch
from scipy import optimize, stats

from fedsim import linalg, order, products
from fedsim.laws import cohort_of
from fedsim.linalg import _distances, square_distances
from fedsim.strategies import centered_clipping
from fedsim.strategies.bulyan import Bulyan
from fedsim.strategies.centered_clipping import CenteredClipping
from fedsim.strategies.dnc import DnC
from fedsim.strategies.geometric_median import GeometricMedian
from fedsim.strategies.krum import Krum, MultiKrum
from fedsim.strategies.meamed import MeaMed
from fedsim.strategies.median import Median
from fedsim.strategies.norm_clipping import NormClipping
from fedsim.strategies.trimmed_mean import TrimmedMean
from fedsim.testing import apply_rule, build_rule

SEEDS = range(8)


def cohort(seed, num_clients=None, size=None):
    rng = np.random.default_rng(seed)
    num_clients = num_clients or int(rng.integers(7, 14))
    return rng.normal(size=(num_clients, size or int(rng.integers(1, 30)))) + rng.normal()


def krum_in_loops(rows, f):
    n = len(rows)
    d = [[sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in rows] for x in rows]
    return [sum(sorted(d[i][:i] + d[i][i + 1 :])[: max(1, n - f - 2)]) for i in range(n)]


def best_in_loops(rows, f):
    """Index of the best score; mutual nearest pairs tie to the bit, and the one nearer to all others wins."""
    if len(rows) == 1:
        return 0
    scores = krum_in_loops(rows, f)
    totals = [sum(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)) for y in rows) for x in rows]
    return min(range(len(rows)), key=lambda i: (scores[i], totals[i]))


def nearest_to_median(column, kept):
    median = np.median(column)
    # ties: the lower value, as the window rule takes it
    return np.mean(sorted(column, key=lambda v: (abs(v - median), v))[:kept])


# --- coordinate-wise rules -------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_median_is_numpys(seed, dtype):
    rows = cohort(seed).astype(dtype)
    np.testing.assert_allclose(apply_rule(Median(), rows), np.median(rows, axis=0), rtol=1e-6)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_trimmed_mean_is_scipys(seed, f):
    rows = cohort(seed)
    want = stats.trim_mean(rows, (f + 0.5) / len(rows), axis=0)  # scipy floors the count: half is for safety
    np.testing.assert_allclose(apply_rule(TrimmedMean(num_byzantine=f), rows), want, rtol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 1, 3])
def test_meamed_against_loops(seed, f):
    rows = cohort(seed)
    want = [nearest_to_median(column, len(rows) - f) for column in rows.T]
    np.testing.assert_allclose(apply_rule(MeaMed(num_byzantine=f), rows), want, rtol=1e-10, atol=1e-12)


def test_meamed_by_hand():
    # median of 0 1 2 3 10 is 2; without the farthest: (0 + 1 + 2 + 3)/4. With 3 kept: 1 2 3
    column = [[3.0], [10.0], [0.0], [2.0], [1.0]]
    assert apply_rule(MeaMed(num_byzantine=1), column).tolist() == [1.5]
    assert apply_rule(MeaMed(num_byzantine=2), column).tolist() == [2.0]
    # median 2: 0 and 4 are equally far, the lower stays: (0 + 1 + 2 + 3)/4
    assert apply_rule(MeaMed(num_byzantine=1), [[0.0], [1.0], [2.0], [3.0], [4.0]]).tolist() == [1.5]


def test_column_blocks_are_joined_in_order():
    rows = cohort(0, 5, 10_000)
    np.testing.assert_array_equal(apply_rule(Median(), rows), np.median(rows, axis=0))


@pytest.mark.parametrize("rule", [Median(), TrimmedMean(), MeaMed(), Bulyan()], ids=lambda r: type(r).__name__)
def test_sorting_leaves_the_updates_as_they_were(rule):
    for shape in ((8, 1), (8, 5)):  # one column is contiguous both ways
        rows = torch.as_tensor(cohort(1, *shape))
        before = rows.clone()
        apply_rule(rule, rows)
        assert torch.equal(rows, before)


def test_median_of_huge_values_does_not_overflow():
    rows = np.full((4, 2), 3e38, np.float32)
    assert apply_rule(Median(), rows).tolist() == rows[0].tolist()


# --- distances -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("offset", [0.0, 1e3])
def test_square_distances_survive_a_common_offset(dtype, offset):
    rows = (torch.as_tensor(cohort(2, 6, 500)) + offset).to(dtype)
    want = torch.cdist(rows.double(), rows.double(), compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(square_distances(rows), want, rtol=1e-4, atol=1e-9)


def test_distances_are_symmetric_whatever_the_gram():
    # a BLAS may round the two halves of X Xᵀ apart; nearest pairs must tie all the same
    inner = torch.as_tensor(cohort(3, 9, 20) @ cohort(3, 9, 20).T)
    upper = torch.triu(torch.nextafter(inner, inner + 1), 1)
    distances, _ = _distances(inner.tril() + upper)
    assert torch.equal(distances, distances.T)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 1, 2])
def test_krum_scores_and_choice_against_loops(seed, f):
    rows = cohort(seed)
    want = krum_in_loops(rows.tolist(), f)
    delta, _, metrics = Krum(num_byzantine=f)(cohort_of(rows), {})
    np.testing.assert_allclose(metrics["krum_score"], want, rtol=1e-10)
    np.testing.assert_array_equal(delta, rows[int(np.argmin(want))])
    assert metrics["selected"].nonzero().flatten().tolist() == [int(np.argmin(want))]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("m", [None, 1, 3])
def test_multi_krum_averages_the_best(seed, m):
    rows, f = cohort(seed), 2
    best = np.argsort(krum_in_loops(rows.tolist(), f))[: m or len(rows) - f]
    got = apply_rule(MultiKrum(num_byzantine=f, num_selected=m), rows)
    np.testing.assert_allclose(got, rows[best].mean(0), rtol=1e-10)


def test_krum_counts_k_minus_f_minus_2_neighbours():
    # K = 5, f = 1: 2 neighbours. Scores of 0 1 3 6 20: 1+9, 1+4, 4+9, 9+25, 196+289; with 3 the order changes
    scores = Krum(num_byzantine=1)(cohort_of([[0.0], [1.0], [3.0], [6.0], [20.0]]), {})[2]["krum_score"]
    assert scores.tolist() == [10, 5, 13, 34, 485]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 1, 2])
def test_bulyan_against_loops(seed, f):
    rows = cohort(seed, 4 * f + 3 + seed % 3)
    left, selected = list(range(len(rows))), []
    for _ in range(len(rows) - 2 * f):
        selected.append(left.pop(best_in_loops(rows[left].tolist(), f)))
    kept = len(rows) - 4 * f
    want = [nearest_to_median(column, kept) for column in rows[selected].T]
    np.testing.assert_allclose(apply_rule(Bulyan(num_byzantine=f), rows), want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_geometric_median_minimises_the_summed_distance(seed):
    rows = cohort(seed, 9, 4)
    got = apply_rule(GeometricMedian(), rows)

    def total(z):
        return np.linalg.norm(rows - z, axis=1).sum()

    best = optimize.minimize(total, rows.mean(0), method="BFGS", options={"gtol": 1e-10})
    assert total(got) <= best.fun * (1 + 1e-9)


@pytest.mark.parametrize("num_iterations", [1, 3])
def test_geometric_median_steps_against_loops(num_iterations):
    rows = cohort(3, 8, 5)
    z = rows.mean(0)
    for _ in range(num_iterations):
        pull = 1 / np.maximum(0.5, np.linalg.norm(rows - z, axis=1))
        z = pull @ rows / pull.sum()
    got = apply_rule(GeometricMedian(num_iterations=num_iterations, smoothing=0.5), rows)
    np.testing.assert_allclose(got, z, rtol=1e-10)


@pytest.mark.parametrize("gram", [0, 1000], ids=["direct", "by gram"])
@pytest.mark.parametrize("start", ["state", "median", "zero"])
@pytest.mark.parametrize("num_iterations", [2, 4])
def test_centered_clipping_against_loops(monkeypatch, gram, start, num_iterations):
    monkeypatch.setattr(centered_clipping, "GRAM", gram)
    rule = CenteredClipping(radius=2.0, num_iterations=num_iterations, start=start)
    previous, state = np.zeros(6), rule.init(cohort_of(np.zeros((1, 6))).layout, 9)
    for seed in range(3):
        rows = cohort(seed, 9, 6)
        v = {"state": previous, "median": np.median(rows, axis=0), "zero": np.zeros(6)}[start]
        for _ in range(num_iterations):
            moves = [(x - v) * min(1, 2.0 / np.linalg.norm(x - v)) for x in rows]
            v = v + np.mean(moves, axis=0)
        delta, state, _ = rule(cohort_of(rows), state)
        np.testing.assert_allclose(delta, v, rtol=1e-10, atol=1e-12)
        previous = v


@pytest.mark.parametrize(("count", "num_iterations", "taken"), [(9, 1, 0), (9, 2, 1), (33, 2, 0), (64, 3, 1)])
def test_centered_clipping_takes_a_gram_matrix_where_it_is_cheaper(monkeypatch, count, num_iterations, taken):
    grams = []
    monkeypatch.setattr(centered_clipping, "gram", lambda *given: grams.append(1) or linalg.gram(*given))
    rows = torch.randn(count, 6, generator=torch.Generator().manual_seed(0))
    apply_rule(CenteredClipping(num_iterations=num_iterations), rows)
    assert len(grams) == taken


def test_dnc_drops_c_f_clients_rounded_up():
    # c f = 1.5: both outliers go, and three clients are needed; with one dropped 40 would stay
    rule = DnC(num_byzantine=1, filter=1.5)
    assert apply_rule(rule, [[0.0], [1.0], [2.0], [3.0], [40.0], [-60.0]]).tolist() == [1.5]
    rule.check(3)
    with pytest.raises(ValueError, match="DnC needs"):
        rule.check(2)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("f", [0, 2])
def test_dnc_scores_and_choice_against_an_svd(seed, f):
    rows = cohort(seed)
    centred = rows - rows.mean(0)
    scores = (centred @ np.linalg.svd(centred, full_matrices=False)[2][0]) ** 2
    kept = np.sort(np.argsort(scores)[: len(rows) - f])
    got = apply_rule(DnC(num_byzantine=f), rows)
    np.testing.assert_allclose(got, rows[kept].mean(0), rtol=1e-9, atol=1e-12)


def test_dnc_finds_who_sticks_out_of_a_common_offset():
    """Float32 products of rows of norm 20 differ by rounding alone where rows do by 0.01."""
    rng = np.random.default_rng(0)
    rows = (rng.normal(size=(9, 400)) * 1e-4 + 1.0).astype(np.float32)
    rows[[2, 5]] += np.float32(5e-4) * np.sign(rng.normal(size=400)).astype(np.float32)
    _, _, metrics = DnC(num_byzantine=2)(cohort_of(torch.from_numpy(rows)), {})
    assert (~metrics["selected"]).nonzero().flatten().tolist() == [2, 5]


def test_dnc_intersects_its_draws():
    rows = np.zeros((6, 2))
    rows[:, 0] = [9, 1, 2, 3, 2, 1]
    rows[:, 1] = [1, 2, 9, 1, 2, 3]
    rule = DnC(num_byzantine=1, num_iterations=8, subsample=1)
    _, _, metrics = rule(cohort_of(rows, seed=3), {})  # draws of both columns: 0 sticks out in one, 2 in the other
    assert metrics["selected"].tolist() == [False, True, False, True, True, True]


def test_dnc_draws_follow_the_seed_and_the_round():
    rows = np.random.default_rng(0).normal(size=(9, 400))
    rule = DnC(num_byzantine=3, subsample=5)
    picks = {
        (seed, t): tuple(rule(cohort_of(rows, seed=seed, round=t), {})[2]["selected"].tolist())
        for seed, t in itertools.product(range(3), range(1, 4))
    }
    assert picks[0, 1] == tuple(rule(cohort_of(rows, seed=0, round=1), {})[2]["selected"].tolist())
    assert len(set(picks.values())) > 3


def test_norm_clipping_by_hand():
    # (3, 4) of norm 5 becomes (.6, .8); (.3, .4) stays; weights 1 and 3
    got = apply_rule(NormClipping(max_norm=1.0), [[3.0, 4.0], [0.3, 0.4]], [1, 3])
    np.testing.assert_allclose(got, [(0.6 + 0.9) / 4, (0.8 + 1.2) / 4], rtol=1e-14)


def test_norm_clipping_above_all_norms_is_fedavg():
    rows, n = cohort(4), np.arange(1, len(cohort(4)) + 1)
    np.testing.assert_allclose(apply_rule(NormClipping(max_norm=1e6), rows, n), n @ rows / n.sum(), rtol=1e-12)


# --- attacks ---------------------------------------------------------------------------------------------------

ROBUST = ["median", "trimmed_mean", "meamed", "krum", "multi_krum", "bulyan", "geometric_median", "dnc"]


@pytest.mark.parametrize("name", [*ROBUST, "centered_clipping", "norm_clipping"])
@pytest.mark.parametrize("scale", [1e3, 1e9, 1e30])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_two_attackers_of_eleven_change_little(name, scale, dtype):
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(9, 40)) * 0.05 + 1.0
    rows = np.concatenate([honest, -scale * np.ones((2, 40))]).astype(dtype)[rng.permutation(11)]
    arguments = {} if name == "median" or "geometric" in name or "clipping" in name else {"num_byzantine": 2}
    got = apply_rule(build_rule(name, **arguments), rows)
    bound = {"centered_clipping": 7.0, "norm_clipping": 7.0}.get(name, 0.5)  # their radius is 1, ‖honest‖ 6.3
    assert np.linalg.norm(got - honest.mean(0)) < bound


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("near", [1e2, 1e6])
@pytest.mark.parametrize("far", [1e9, 1e20, 1e30])
@pytest.mark.parametrize(
    "name", ["median", "trimmed_mean", "meamed", "krum", "multi_krum", "bulyan", "geometric_median"]
)
def test_one_attacker_does_not_hide_another(name, far, near, dtype):
    """Beside the square of a very long row those of all others are rounding noise."""
    rng = np.random.default_rng(0)
    honest = rng.normal(size=(11, 40)) * 0.05 + 1.0
    rows = np.concatenate([honest, -far * np.ones((1, 40)), near * np.ones((1, 40))]).astype(dtype)
    rule = build_rule(name) if "median" in name else build_rule(name, num_byzantine=2)
    assert np.linalg.norm(apply_rule(rule, rows) - honest.mean(0)) < 0.5


@pytest.mark.parametrize("f", [1, 4, 5])
def test_the_geometric_median_forgets_attackers_however_far(f):
    """Each step of Weiszfeld's leaves F / (K - F) of their pull: many are needed where that is near 1."""
    rng = np.random.default_rng(1)
    honest = rng.normal(size=(11 - f, 6))
    wanted, *others = (
        apply_rule(GeometricMedian(), np.concatenate([honest, np.full((f, 6), far)])) for far in (1e6, 1e12, 1e30)
    )
    for other in others:
        np.testing.assert_allclose(other, wanted, rtol=1e-4)  # a direction is that of infinity to 1e-6


@pytest.mark.parametrize("name", ROBUST)
def test_what_dropped_rows_leave_is_still_aggregated(name):
    rule = build_rule(name) if name in {"median", "geometric_median"} else build_rule(name, num_byzantine=2)
    for count in (1, 2, 3, 4):
        delta, _, _ = rule(cohort_of(cohort(0, count, 5), round=2), {})
        assert torch.isfinite(delta).all()


def test_trimmed_mean_of_fewer_rows_than_it_asks_for_trims_all_that_it_can():
    for count in (1, 2, 3, 4, 5):
        rows = cohort(1, count, 6)
        delta, _, _ = TrimmedMean(num_byzantine=2)(cohort_of(rows, round=2), {})
        np.testing.assert_allclose(delta, np.median(rows, axis=0), rtol=1e-12)  # one or two values are left


@pytest.mark.parametrize(
    ("name", "num_byzantine", "least"),
    [("trimmed_mean", 2, 5), ("meamed", 2, 5), ("krum", 2, 7), ("multi_krum", 2, 7), ("bulyan", 2, 11), ("dnc", 2, 5)],
)
def test_a_cohort_too_small_is_refused_before_training(name, num_byzantine, least):
    rule = build_rule(name, num_byzantine=num_byzantine)
    rule.check(least)
    with pytest.raises(ValueError, match=f"got K={least - 1}, f={num_byzantine}; sample more clients or lower"):
        rule.check(least - 1)
    with pytest.raises(ValueError, match="num_byzantine >= 0"):
        build_rule(name, num_byzantine=-1)


def test_multi_krum_cannot_select_more_than_there_are():
    with pytest.raises(ValueError, match="cannot select 9 of K=8"):
        MultiKrum(num_selected=9).check(8)


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (MultiKrum, {"num_selected": 0}),
        (GeometricMedian, {"num_iterations": 0}),
        (GeometricMedian, {"smoothing": 0.0}),
        (CenteredClipping, {"radius": 0.0}),
        (CenteredClipping, {"num_iterations": 0}),
        (CenteredClipping, {"start": "mean"}),
        (DnC, {"num_iterations": 0}),
        (DnC, {"subsample": 0}),
        (DnC, {"filter": 0.0}),
        (NormClipping, {"max_norm": 0.0}),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=f"{kind.__name__}.*{name}"):
        kind(**arguments)


def test_columns_are_reduced_to_the_same_bits_by_any_number_of_threads(monkeypatch):
    monkeypatch.setattr(order, "WIDTH", 7)
    updates = torch.randn(9, 40, generator=torch.Generator().manual_seed(3))
    chosen = torch.tensor([True, False, True, True, False, True, True, True, True])
    found = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(order.mean_around_median(updates, 4, chosen))
    columns = updates[chosen].double().sort(0).values  # (7, 40)
    windows = columns.unfold(0, 4, 1)  # (4, 40, 4)
    ends = (windows[..., 0] - columns[3]).abs().maximum((windows[..., 3] - columns[3]).abs())  # (4, 40)
    expected = windows.mean(2).gather(0, ends.argmin(0)[None])[0]  # (40,)
    assert torch.equal(found[0], found[1])
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)  # float32 sums of four


def test_what_fails_in_a_thread_is_raised(monkeypatch):
    monkeypatch.setattr(order, "WIDTH", 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setattr(order, "walked", lambda statistic: [0, 7, 3])  # there is no wire 7
    with pytest.raises(RuntimeError):
        order.trimmed_mean(torch.zeros(3, 8), 1)


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_distances_to_a_vector(scale, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 5)
    monkeypatch.setattr(products, "PRODUCT", 2)
    rng = torch.Generator().manual_seed(4)
    updates, vector = scale * torch.randn(4, 13, generator=rng), scale * torch.randn(13, generator=rng)
    want = (updates.double() - vector.double()).norm(dim=1)
    torch.testing.assert_close(linalg.distances_to(vector, updates), want, rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [3, 8, 9, 37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_inner_products_of_rows_and_a_vector(dtype, size, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 16)
    monkeypatch.setattr(products, "PRODUCT", 4)
    rng = torch.Generator().manual_seed(4)
    rows = torch.randn(5, size + 2, generator=rng, dtype=torch.float64).to(dtype)[:, 2:]
    vector = torch.randn(size, generator=rng, dtype=torch.float64).to(dtype)
    inner, cross, square = products.inner_products(rows, vector=vector)
    x, v = rows.double(), vector.double()
    tolerance = {"rtol": 0.05, "atol": 0.2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(inner, x @ x.T, **tolerance)
    torch.testing.assert_close(cross, x @ v, **tolerance)
    torch.testing.assert_close(square, v @ v, **tolerance)


def test_differences_that_cancel_are_taken_of_the_rows():
    """Rows within 1e-3 of an origin of length 50: their products know nothing of what is left."""
    rng = torch.Generator().manual_seed(4)
    origin = torch.randn(2500, generator=rng)
    updates = origin + 2e-5 * torch.randn(4, 2500, generator=rng)
    moved = updates.double() - origin.double()
    for rows in (updates, linalg.mapped(torch.eye(4), updates)):
        torch.testing.assert_close(linalg.gram(rows, origin), moved @ moved.T, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gram_of_differences(dtype, monkeypatch):
    monkeypatch.setattr(products, "BLOCK", 5)
    rng = torch.Generator().manual_seed(4)
    updates, origin = torch.randn(4, 13, generator=rng, dtype=dtype), torch.randn(13, generator=rng, dtype=dtype)
    moved = updates - origin
    expected = moved.double() @ moved.double().T
    torch.testing.assert_close(linalg.gram(updates, origin), expected, rtol=1e-5, atol=1e-5)  # float32 products
