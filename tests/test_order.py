"""Order statistics of columns: networks by the 0-1 principle, values against a float64 sort, rows that are mapped."""

import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from fedsim import linalg, networks, order, products
from fedsim import mapped as mapped_
from fedsim.laws import cohort_of
from fedsim.linalg import beside, combine, gram, mapped, row_norms, square_distances
from fedsim.mapped import taken
from fedsim.strategies.arc import ARC
from fedsim.strategies.bucketing import Bucketing
from fedsim.strategies.clip import Clip
from fedsim.strategies.geometric_median import GeometricMedian
from fedsim.strategies.krum import Krum, MultiKrum
from fedsim.strategies.meamed import MeaMed
from fedsim.strategies.median import Median
from fedsim.strategies.nnm import NNM
from fedsim.strategies.norm_clipping import NormClipping
from fedsim.strategies.trimmed_mean import TrimmedMean

COUNTS = [1, 2, 3, 4, 5, 8, 9, 16, 31, 50, 100, 101, 1000]  # both sides of `NETWORK`


def through(comparators, columns):
    """Apply comparators to columns (K, d); what nobody reads later is spoilt."""
    wires = list(columns.copy())
    for i, j, smaller, larger in comparators:
        low, high = np.minimum(wires[i], wires[j]), np.maximum(wires[i], wires[j])
        wires[i], wires[j] = (low if smaller else low * 0 - 7), (high if larger else high * 0 - 7)
    return np.stack(wires)


@pytest.mark.parametrize("count", range(1, 13))
def test_networks_by_the_0_1_principle(count):
    """What puts all columns of zeros and ones right puts all columns right (Knuth, 5.3.4, theorem Z)."""
    columns = np.array(list(itertools.product([0, 1], repeat=count)), dtype=np.int8).T  # (K, 2^K)
    want = np.sort(columns, axis=0)
    assert np.array_equal(through(networks.network(count, 0, count, True), columns), want)
    middle = slice((count - 1) // 2, count // 2 + 1)
    assert np.array_equal(
        through(networks.network(count, middle.start, middle.stop, True), columns)[middle], want[middle]
    )
    for f in range((count - 1) // 2 + 1):
        got = through(networks.network(count, f, count - f, False), columns)[f : count - f]
        assert np.array_equal(got.sum(0), want[f : count - f].sum(0))


def test_a_network_is_pruned():
    """Fifty rows: 395 comparators put them in order (Knuth, 5.3.4, table 1 has 191 for 32 and 63 for 16)."""
    sizes = [len(networks.network(count, 0, count, True)) for count in (16, 32, 50)]
    assert sizes == [63, 191, 395]
    calls = [sum(a + b for *_, a, b in networks.network(50, *ranks)) for ranks in ((24, 26, True), (10, 40, False))]
    assert max(calls) < 2 * 395 * 0.8


def columns_of(kind, count, dtype, seed=0):
    rng = np.random.default_rng(seed)
    values = rng.normal(size=(count, 90)) * rng.lognormal(size=90)
    if kind == "ties":
        values = np.round(values) + 0.0
        values[:, 0] = 3.0
    if kind == "infinite":
        few = max(0, (count - 1) // 5)
        values[:few, ::3], values[:few, 1::3] = np.inf, -np.inf
    if kind == "nan":
        values[: (count - 1) // 3, ::4] = np.nan
        values[: (count - 1) // 3, 1::4] = -np.nan
    return torch.from_numpy(rng.permutation(values)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["plain", "ties", "infinite", "nan"])
@pytest.mark.parametrize("count", COUNTS)
def test_order_statistics_against_a_sort(count, kind, dtype):
    rows = columns_of(kind, count, dtype)
    before = rows.clone()
    sorted_ = np.sort(rows.double().numpy(), axis=0)  # a NaN last
    low, high = sorted_[(count - 1) // 2], sorted_[count // 2]
    got = order.median(rows)
    assert got.dtype == dtype
    np.testing.assert_array_equal(got.numpy(), (low / 2 + high / 2).astype(got.numpy().dtype))
    f = (count - 1) // 3
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 1e-12, "atol": 1e-12}
    kept = sorted_[f : count - f]
    np.testing.assert_allclose(order.trimmed_mean(rows, f), kept.mean(0), **tolerance)
    nearest = [around(column, count - f) for column in sorted_.T]
    np.testing.assert_allclose(order.mean_around_median(rows, count - f), nearest, **tolerance)
    torch.testing.assert_close(rows, before, rtol=0, atol=0, equal_nan=True)


def around(ascending, kept):
    """Return the mean of the `kept` of some values that are nearest to their median, the lower of equally near ones."""
    count = len(ascending)
    center = ascending[(count - 1) // 2] / 2 + ascending[count // 2] / 2
    return np.mean(sorted(ascending, key=lambda v: (np.inf if np.isnan(v) else abs(v - center), v))[:kept])


def test_of_equal_values_only_so_many_count():
    """−2 −2 0 0 1 about 0: of four, 1 is nearer than the second −2, though a window of both is no wider."""
    rows = torch.tensor([[-2.0], [0.0], [1.0], [0.0], [-2.0]])
    assert order.mean_around_median(rows, 4).tolist() == [-0.25]


@pytest.mark.parametrize("kept", range(1, 12))
def test_windows_shorter_than_what_they_leave_out(kept):
    rows = columns_of("plain", 11, torch.float64, seed=kept)
    want = [around(column, kept) for column in np.sort(rows.numpy(), axis=0).T]
    np.testing.assert_allclose(order.mean_around_median(rows, kept), want, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_short_floats_are_put_in_order_too(dtype):
    rows = columns_of("plain", 9, dtype)
    assert torch.equal(order.median(rows), rows.sort(dim=0).values[4])
    assert torch.equal(order.median(rows.repeat(13, 1)), rows.sort(dim=0).values[4])  # 117 rows: sorted


@pytest.mark.parametrize("rows", [torch.randn(7, 300), mapped(torch.rand(7, 5), torch.randn(5, 300))])
def test_neither_threads_nor_blocks_change_a_bit(monkeypatch, rows):
    found = {}
    for threads, width in itertools.product([1, 2, 3], [11, 300]):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        monkeypatch.setattr(order, "WIDTH", width)
        monkeypatch.setattr(products, "BLOCK", 64)
        found[threads, width] = order.trimmed_mean(rows, 2), gram(rows)
    for part, whole in found.values():
        assert torch.equal(whole, found[1, 300][1])
        torch.testing.assert_close(part, found[1, 300][0])  # a product of another width may round otherwise
        assert torch.equal(whole, whole.T)
    if isinstance(rows, torch.Tensor):
        assert all(torch.equal(part, found[1, 300][0]) for part, _ in found.values())


# --- rows that are mapped -------------------------------------------------------------------------------------------

MAPS = {
    "means": torch.softmax(torch.randn(4, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64), 1),
    "factors": torch.tensor([1.0, 0.5, 2.0, 1.0, 0.0, 0.1], dtype=torch.float64),
}
USES = {
    "combine": lambda x: combine(torch.linspace(-1, 2, len(x)), x),
    "gram": gram,
    "gram of differences": lambda x: gram(x, torch.linspace(-1, 1, x.shape[1], dtype=torch.float64)),
    "square_distances": square_distances,
    "row_norms": row_norms,
    "median": order.median,
    "mean_around_median": lambda x: order.mean_around_median(x, len(x) - 1, torch.arange(len(x)) != 1),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("map_", MAPS)
def test_what_is_mapped_gives_what_is_written(use, map_):
    source = torch.from_numpy(np.random.default_rng(2).normal(size=(6, 50)))
    rows = mapped(MAPS[map_], source)
    by = MAPS[map_] if MAPS[map_].dim() == 2 else MAPS[map_].diag()
    assert rows.shape == (by @ source).shape
    torch.testing.assert_close(rows.written, by @ source, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(USES[use](rows), USES[use](by @ source), rtol=1e-9, atol=1e-9)
    assert beside(rows).dtype == source.dtype


@pytest.mark.parametrize("map_", MAPS)
def test_some_mapped_rows_are_those_of_the_written_matrix(map_):
    rows = mapped(MAPS[map_], torch.from_numpy(np.random.default_rng(4).normal(size=(6, 20))))
    for chosen in (torch.tensor([3, 1, 1]), torch.arange(len(rows)) % 3 == 1):
        some = taken(rows, chosen)
        assert some.source is rows.source
        torch.testing.assert_close(some.written, rows.written[chosen], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("map_", MAPS)
def test_rows_are_written_in_blocks_whatever_the_threads(monkeypatch, map_):
    source, found = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)), []
    monkeypatch.setattr(mapped_, "WIDTH", 16)
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        found.append(mapped(MAPS[map_], source).written)
    assert torch.equal(*found)
    by = MAPS[map_] if MAPS[map_].dim() == 2 else MAPS[map_].diag()
    torch.testing.assert_close(found[0].double(), by @ source.double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("outer", "inner"), list(itertools.product(MAPS, MAPS)))
def test_a_map_of_a_map_is_one(outer, inner):
    source = torch.from_numpy(np.random.default_rng(3).normal(size=(6, 20)))
    first = mapped(MAPS[inner], source)
    by = MAPS[outer][:, : len(first)] if MAPS[outer].dim() == 2 else MAPS[outer][: len(first)]
    both = mapped(by, first)
    assert both.source is source
    torch.testing.assert_close(both.written, (by if by.dim() == 2 else by.diag()) @ first.written)


def test_equal_mixtures_of_float32_rows_are_at_no_distance():
    """The second and third differ by less than float32 can tell from products: they are taken in float64."""
    source = torch.randn(3, 200, generator=torch.Generator().manual_seed(0))
    by = torch.tensor([[1, 0, 0], [0.5, 0.5, 0], [0.5, 0.5, 1e-6], [0.5, 0.5, 0]])
    distances = square_distances(mapped(by, source))
    want = torch.cdist(by.double() @ source.double(), by.double() @ source.double()).square()
    assert distances[1, 3] == distances[3, 1] == 0
    torch.testing.assert_close(distances, want, rtol=1e-4, atol=1e-12)


def opposite_rows():
    """Return rows of float32 of which the second all but takes the first away, and a map that adds them up."""
    generator = torch.Generator().manual_seed(0)
    row = torch.randn(2000, generator=generator)
    other = -row + 1e-4 * torch.randn(2000, generator=generator)
    return torch.stack([row, other]), torch.tensor([[0.5, 0.5], [1.0, 0.0]])


def test_norms_of_mixtures_that_cancel_are_no_rounding_noise():
    source, by = opposite_rows()
    rows, want = mapped(by, source), by.double() @ source.double()
    torch.testing.assert_close(row_norms(rows), want.norm(dim=1), rtol=1e-4, atol=0)
    torch.testing.assert_close(gram(rows).diagonal(), want.square().sum(1), rtol=1e-4, atol=0)


def test_rows_that_cancel_in_a_bucket_are_clipped_all_the_same():
    source, _ = opposite_rows()
    rule = Bucketing(rule=NormClipping(max_norm=1e-3), bucket_size=2)
    cohort = cohort_of(source, torch.ones(2), sizes=[2000])
    step, _, metrics = rule(cohort, rule.init(cohort.layout, 2))
    assert step.norm() <= 1.001e-3
    assert metrics["clipped_fraction"] == 1


def test_equal_mixtures_alone_ask_for_no_more_precision(monkeypatch):
    """They are at no distance whatever the precision: the Gram matrix is not taken once more in float64."""
    taken, real = [], linalg.inner_products
    monkeypatch.setattr(linalg, "inner_products", lambda *given, **named: taken.append(given) or real(*given, **named))
    source = torch.randn(40, 200, generator=torch.Generator().manual_seed(0))
    by = torch.rand(41, 40, generator=torch.Generator().manual_seed(1)).round()
    by[[3, 17, 40]] = by[5].clone()
    distances = square_distances(mapped(by, source))
    assert len(taken) == 1
    assert not distances[[3, 17, 40]][:, [3, 5, 17, 40]].any()
    want = torch.cdist(by.double() @ source.double(), by.double() @ source.double()).square()
    torch.testing.assert_close(distances, want, rtol=1e-4, atol=1e-6)


class Largest(TorchDispatchMode):
    """Notes the most entries of a tensor that an operation returns, but of views."""

    def __init__(self):
        super().__init__()
        self.entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.entries = max(self.entries, out.numel())
        return out


INNER = [
    Median(), TrimmedMean(num_byzantine=1), MeaMed(num_byzantine=1), Krum(num_byzantine=1),
    MultiKrum(num_byzantine=1), GeometricMedian(),
]  # fmt: skip
OUTER = {
    "nnm": lambda rule: NNM(rule=rule, num_byzantine=2),
    "arc": lambda rule: ARC(rule=rule, num_byzantine=2),
    "clip": lambda rule: Clip(rule=rule, max_norm=9.0),
    "bucketing": lambda rule: Bucketing(rule=rule),
    "nested": lambda rule: NNM(rule=ARC(rule=rule, num_byzantine=2), num_byzantine=2),
}


@pytest.mark.parametrize("inner", INNER, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("outer", OUTER)
def test_wrappers_never_write_the_rows(monkeypatch, outer, inner):
    monkeypatch.setattr(order, "WIDTH", 16)
    cohort = cohort_of(np.random.default_rng(5).normal(size=(13, 600)))
    largest = Largest()
    with largest:
        delta, _, _ = OUTER[outer](inner)(cohort, {})
    assert largest.entries <= 600
    mixed, _ = OUTER[outer](inner).mix(cohort) if outer != "bucketing" else (None, None)
    if mixed is not None:
        inside = inner(cohort_of(mixed.rows), {})[0] if outer != "nested" else delta
        torch.testing.assert_close(delta, inside, rtol=1e-9, atol=1e-9)
