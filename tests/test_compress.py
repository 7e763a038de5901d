"""Compressors against their definitions, their bytes against real encodings, EF21 against gradient descent.

Hand cases of EF21 are those of its papers' constants. Sums of a few terms: 1e-10 relative.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fedsim import simulate
from fedsim.build import build
from fedsim.compress import qsgd
from fedsim.compress.contract import Senders, index_bits, num_kept, packed
from fedsim.compress.ef21 import EF21 as EF21Client
from fedsim.compress.error_feedback import ErrorFeedback
from fedsim.compress.qsgd import QSGD
from fedsim.compress.random_k import RandomK
from fedsim.compress.top_k import TopK
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.errors import UserError
from fedsim.laws import cohort_of
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.loop import Loop
from fedsim.metrics.records import RoundLog
from fedsim.strategies.ef21 import EF21, step_size, xi
from fedsim.uplink import Uplink

SEEDS = range(5)


def senders(count, seed=0):
    keys = torch.from_numpy(np.random.default_rng(seed).integers(0, 2**32, count))
    return Senders(torch.arange(count), keys, count)


def rows_of(seed, count=4, size=50):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(count, size)))


def apply(compressor, rows, seed=0, state=None):
    return compressor(rows, senders(len(rows), seed), {} if state is None else state)[0]


# --- top-k and random-k ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("fraction", [0.01, 0.1, 0.5, 1.0])
def test_top_k_in_loops(seed, fraction):
    rows = rows_of(seed)
    k = max(1, round(fraction * 50))
    want = np.zeros(rows.shape)
    for row, out in zip(rows.numpy(), want, strict=True):
        for j in sorted(range(50), key=lambda j: -abs(row[j]))[:k]:
            out[j] = row[j]
    np.testing.assert_array_equal(apply(TopK(fraction=fraction), rows), want)


@pytest.mark.parametrize("seed", SEEDS)
def test_top_k_contracts(seed):
    rows, compressor = rows_of(seed), TopK(fraction=0.2)
    lost = (apply(compressor, rows) - rows).square().sum(1)
    a = compressor.contraction(50)
    assert a == 10 / 50
    assert (lost <= (1 - a) * rows.square().sum(1)).all()
    flat = torch.ones(1, 50) * torch.tensor([1.0, -1.0]).repeat(25)
    assert float((apply(compressor, flat) - flat).square().sum()) == (1 - a) * 50  # the bound is met


@pytest.mark.parametrize(("fraction", "size", "kept"), [(0.01, 10, 1), (0.5, 5, 3), (1.0, 7, 7), (0.24, 10, 2)])
def test_how_many_are_kept(fraction, size, kept):
    assert num_kept(fraction, size) == kept


def test_random_k_is_keyed_and_keeps_k():
    rows, compressor = rows_of(0), RandomK(fraction=0.2, unbiased=False)
    got = apply(compressor, rows)
    assert ((got != 0).sum(1) == 10).all()
    assert torch.equal(got[got != 0], rows[got != 0])
    assert torch.equal(got, apply(compressor, rows))
    assert len({tuple((row != 0).tolist()) for row in got}) == 4  # each client draws its own
    assert not torch.equal(got, apply(compressor, rows, seed=1))


def test_random_k_is_unbiased_and_contracts_without_the_scaling():
    row = rows_of(1, 1, 20).expand(4000, -1)
    scaled = apply(RandomK(fraction=0.25), row)
    # variance of a coordinate: v² (D/k − 1); four standard errors
    bound = 4 * row[0].abs() * math.sqrt(3 / 4000)
    assert ((scaled.mean(0) - row[0]).abs() <= bound).all()
    lost = (apply(RandomK(fraction=0.25, unbiased=False), row) - row).square().sum(1).mean()
    assert math.isclose(float(lost), 0.75 * float(row[0].square().sum()), rel_tol=0.03)
    assert RandomK(fraction=0.25, unbiased=False).contraction(20) == 0.25
    assert RandomK(fraction=0.25).contraction(20) is None
    assert RandomK(fraction=1.0).contraction(20) == 1


# --- QSGD ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [None, 8, 50, 64])
def test_qsgd_rounds_to_neighbouring_levels_of_the_buckets_norm(width):
    rows, s = rows_of(2), 5
    got = apply(QSGD(num_levels=s, bucket_size=width), rows).numpy()
    step = width or 50
    for row, out in zip(rows.numpy(), got, strict=True):
        for low in range(0, 50, step):
            norm = np.linalg.norm(row[low : low + step])
            for v, q in zip(row[low : low + step], out[low : low + step], strict=True):
                level = abs(q) / norm * s
                assert abs(level - round(level)) < 1e-9
                assert math.floor(abs(v) / norm * s) <= round(level) <= math.floor(abs(v) / norm * s) + 1
                assert q == 0 or np.sign(q) == np.sign(v)


def test_qsgd_is_unbiased_within_its_variance():
    row = rows_of(3, 1, 16).expand(6000, -1)
    compressor = QSGD(num_levels=4, bucket_size=None)
    got = apply(compressor, row)
    norm = float(row[0].norm())
    assert ((got.mean(0) - row[0]).abs() <= 4 * norm / 4 * 0.5 / math.sqrt(6000)).all()  # a level's width is ‖v‖/s
    omega = min(16 / 16, 4 / 4)
    assert float((got - row).square().sum(1).mean()) <= omega * norm**2
    assert compressor.contraction(16) is None
    assert QSGD(num_levels=16, bucket_size=None).contraction(16) == 1 - 16 / 256


def test_qsgd_has_no_level_above_its_last(monkeypatch):
    """Norms may be rounded below their one coordinate, and a level s + 1 would not fit the code's bits."""
    monkeypatch.setattr(qsgd, "uniform_like", lambda x, key: torch.full_like(x, 1 - 2**-24))
    rows = torch.rand(1, 512, generator=torch.Generator().manual_seed(0))
    compressor = QSGD(num_levels=15, bucket_size=1)
    monkeypatch.setattr(torch.linalg, "vector_norm", lambda x, **_: x.abs() * (1 - 2**-22))
    sent = apply(compressor, rows)
    assert (sent <= rows).all()


def test_qsgd_leaves_zeros_and_draws_for_each_client():
    zero = torch.zeros(2, 9)
    assert torch.equal(apply(QSGD(), zero), zero)
    got = apply(QSGD(num_levels=2), rows_of(4, 1).expand(3, -1))
    assert len({row.numpy().tobytes() for row in got}) == 3


# --- bytes -----------------------------------------------------------------------------------------------------


def bits_of(values, width):
    return [(int(v) >> b) & 1 for v in values for b in range(width)]


@pytest.mark.parametrize("size", [1, 2, 50, 1000, 1025])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_bytes_are_those_of_a_real_encoding(size, dtype):
    row = rows_of(0, 1, size).to(dtype)
    itemsize = dtype.itemsize
    width = math.ceil(math.log2(size)) if size > 1 else 0
    top = TopK(fraction=0.1)
    (at,) = np.nonzero(apply(top, row)[0].numpy())
    values = np.unpackbits(np.frombuffer(row[0, torch.from_numpy(at)].numpy().tobytes(), np.uint8))
    code = np.packbits([*values, *bits_of(at, width)]).tobytes()
    assert len(code) == top.num_bytes(size, itemsize)

    random = RandomK(fraction=0.1)
    assert random.num_bytes(size, itemsize) == num_kept(0.1, size) * itemsize + 8

    q = QSGD(num_levels=15, bucket_size=64)
    sent = apply(q, row)[0].numpy()
    norms = [np.linalg.norm(row[0, i : i + 64]) for i in range(0, size, 64)]
    levels = np.rint([abs(v) / norms[j // 64] * 15 for j, v in enumerate(sent)])
    code = np.asarray(norms, dtype=sent.dtype).tobytes()
    code += np.packbits([*bits_of(sent < 0, 1), *bits_of(levels, 4)]).tobytes()
    assert len(code) == q.num_bytes(size, itemsize)


def test_bits_by_hand():
    assert [index_bits(n) for n in (1, 2, 3, 4, 5, 1024, 1025)] == [0, 1, 2, 2, 3, 10, 11]
    assert [packed(n) for n in (0, 1, 8, 9)] == [0, 1, 1, 2]
    # K (32 + ⌈log₂ d⌉) bits: 10 of 1000, 420 bits
    assert TopK(fraction=0.01).num_bytes(1000, 4) == 53


# --- error feedback --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("inner", [TopK(fraction=0.1), RandomK(fraction=0.1, unbiased=False)], ids=["top", "random"])
def test_error_feedback_loses_nothing_in_the_end(inner):
    compressor = ErrorFeedback(compressor=inner)
    state = {"error": torch.zeros(4, 50, dtype=torch.float64)}
    wanted, arrived = torch.zeros(4, 50, dtype=torch.float64), torch.zeros(4, 50, dtype=torch.float64)
    for t in range(6):
        rows = rows_of(t)
        error = state["error"]
        sent, state = compressor(rows, senders(4, t), state)
        np.testing.assert_allclose(sent, apply(inner, rows + error, t), rtol=1e-12)
        wanted, arrived = wanted + rows, arrived + sent
        np.testing.assert_allclose(arrived + state["error"], wanted, rtol=1e-10, atol=1e-12)
    assert compressor.num_bytes(50, 4) == inner.num_bytes(50, 4)


@pytest.mark.parametrize("inner", [RandomK(fraction=0.1), QSGD(num_levels=1, bucket_size=None)], ids=["random", "qsgd"])
@pytest.mark.parametrize("kind", [ErrorFeedback, EF21Client])
def test_feedback_refuses_what_is_no_contraction(kind, inner):
    with pytest.raises(ValueError, match="needs a contraction"):
        kind(compressor=inner).init_client(Layout.vector([50]))


# --- EF21 ------------------------------------------------------------------------------------------------------


def test_ef21s_constants_by_hand():
    assert [round(xi(a), 4) for a in (1, 0.5, 0.1, 0.01)] == [0, 2.4142, 18.4868, 198.4987]
    smoothness = (1.0, 1.0, 1.0, 100.0)  # mean 25.75, root mean square 50.0075
    assert math.isclose(step_size(smoothness, 1.0, step="new"), 1 / 25.75)
    assert math.isclose(step_size(smoothness, 0.5, step="new", whole=20.0), 1 / (20 + 25.75 * xi(0.5)))
    root = math.sqrt((3 + 10_000) / 4)
    assert round(root, 4) == 50.0075
    assert math.isclose(step_size(smoothness, 0.5, step="old", whole=20.0), 1 / (20 + root * xi(0.5)))
    rule = EF21(step="new", smoothness=smoothness, alpha=0.5, participation=0.2, client_lr=0.1)
    assert math.isclose(rule.rate, step_size(smoothness, 0.1, step="new") / 0.1)


def test_a_step_by_theory_is_for_clients_of_a_constant_rate():
    rule = EF21(step="new", smoothness=(1.0,))
    assert rule.bind(local_training=LocalTraining()) is rule
    decaying = LocalTraining(lr_decay=0.9)
    assert EF21().bind(local_training=decaying) == EF21()
    with pytest.raises(ValueError, match=r"client\.lr_decay=0\.9"):
        rule.bind(local_training=decaying)
    with pytest.raises(UserError, match=r"client\.lr_decay=0\.9"):
        simulate("strategy=ef21", "strategy.step=old", "strategy.smoothness=[1.0,1.0]", "client.lr_decay=0.9")


class Quadratics:
    """n clients with f_k(x) = ‖A_k x − b_k‖²/2, and EF21 on their gradients."""

    def __init__(self, seed=0, scales=(1.0, 1.0, 5.0, 2.0), size=6):
        rng = np.random.default_rng(seed)
        self.a = [s * rng.normal(size=(8, size)) / 3 for s in scales]
        self.b = [rng.normal(size=8) for _ in scales]
        self.smoothness = tuple(float(np.linalg.eigvalsh(a.T @ a)[-1]) for a in self.a)
        self.whole = float(np.linalg.eigvalsh(sum(a.T @ a for a in self.a) / len(scales))[-1])
        self.size = size

    def gradients(self, x):
        return np.array([a.T @ (a @ x - b) for a, b in zip(self.a, self.b, strict=True)])

    def run(self, compressor, rule, rounds, cohorts=None):
        """Return x, the rule's G, and the clients' weights and estimates after some rounds."""
        n = len(self.a)
        layout = Layout.vector([self.size])
        uplink = Uplink(layout, n, n, dtype=torch.float64, compressor=compressor)
        state, x = rule.init(layout, n), np.zeros(self.size)
        for t in range(rounds):
            ids = np.arange(n) if cohorts is None else cohorts[t]
            rows = -self.gradients(x)[ids]
            cohort = uplink(cohort_of(rows, clients=torch.from_numpy(ids), round=t + 1))
            delta, state, _ = rule(cohort, state)
            x = x + delta.numpy()
        everyone = cohort_of(np.zeros((n, self.size)))
        estimates = uplink.store.get(np.arange(n), torch.device("cpu"))["estimate"].numpy()
        return x, state["sum"].numpy(), rule.coefficients(everyone, state).numpy(), estimates


def test_without_compression_ef21_is_gradient_descent():
    problem = Quadratics()
    gamma = 1 / problem.whole
    x, _, _, estimates = problem.run(EF21Client(compressor=TopK(fraction=1.0)), EF21(server_lr=gamma), 7)
    want = np.zeros(6)
    for _ in range(7):
        before, want = want, want - gamma * problem.gradients(want).mean(0)
    np.testing.assert_allclose(x, want, rtol=1e-10)
    np.testing.assert_allclose(estimates, -problem.gradients(before), rtol=1e-10)


@pytest.mark.parametrize("weighted", [False, True])
def test_ef21_in_loops(weighted):
    problem, gamma, n = Quadratics(), 0.01, 4
    total = sum(problem.smoothness)
    w = [value / total if weighted else 1 / n for value in problem.smoothness]
    g, x = np.zeros((n, 6)), np.zeros(6)
    for _ in range(20):
        for k, gradient in enumerate(problem.gradients(x)):
            gap = -gradient / (n * w[k]) - g[k]
            for j in sorted(range(6), key=lambda j: -abs(gap[j]))[:2]:
                g[k, j] += gap[j]
        x = x + gamma * sum(w[k] * g[k] for k in range(n))
    client = EF21Client(compressor=TopK(fraction=2 / 6), smoothness=problem.smoothness, weighted=weighted)
    rule = EF21(server_lr=gamma, smoothness=problem.smoothness, weighted=weighted)
    got, _, _, estimates = problem.run(client, rule, 20)
    np.testing.assert_allclose(got, x, rtol=1e-9)
    np.testing.assert_allclose(estimates, g, rtol=1e-9)


class Threshold:
    """Send what is above 0.3: a compressor that does not scale with its input."""

    def __call__(self, rows, senders, state):
        return torch.where(rows.abs() > 0.3, rows, 0), state

    def num_bytes(self, size, itemsize):
        return size * itemsize

    def contraction(self, size):
        return 0.1


@pytest.mark.parametrize("compressor", [TopK(fraction=2 / 6), Threshold()], ids=["top_k", "threshold"])
def test_weights_matter_only_to_compressors_that_do_not_scale(compressor):
    problem = Quadratics()
    runs = []
    for weighted in (False, True):
        common = {"smoothness": problem.smoothness, "weighted": weighted}
        runs.append(problem.run(EF21Client(compressor=compressor, **common), EF21(server_lr=0.01, **common), 60)[0])
    difference = np.abs(runs[0] - runs[1]).max()
    assert difference < 1e-12 if isinstance(compressor, TopK) else difference > 1e-4


@pytest.mark.parametrize("compressor", [TopK(fraction=2 / 6), Threshold()], ids=["top_k", "threshold"])
def test_equal_smoothness_makes_the_weights_vanish(compressor):
    problem, common = Quadratics(), {"smoothness": (3.0,) * 4, "weighted": True}
    plain, *_ = problem.run(EF21Client(compressor=compressor), EF21(server_lr=0.01), 30)
    weighted, *_ = problem.run(EF21Client(compressor=compressor, **common), EF21(server_lr=0.01, **common), 30)
    np.testing.assert_allclose(weighted, plain, rtol=1e-12)
    assert step_size((3.0,) * 4, 0.2, step="new") == pytest.approx(step_size((3.0,) * 4, 0.2, step="old"), rel=1e-12)


@pytest.mark.parametrize("weighted", [False, True])
def test_server_and_clients_stay_in_step_whoever_takes_part(weighted):
    problem = Quadratics()
    rng = np.random.default_rng(0)
    cohorts = [np.flatnonzero(rng.random(4) < 0.5) for _ in range(40)]
    cohorts = [ids if len(ids) else np.array([1]) for ids in cohorts]
    common = {"smoothness": problem.smoothness, "weighted": weighted}
    client = EF21Client(compressor=TopK(fraction=2 / 6), **common)
    _, total, w, estimates = problem.run(client, EF21(server_lr=0.01, **common), 40, cohorts)
    np.testing.assert_allclose(total, w @ estimates, rtol=1e-10, atol=1e-12)
    _, _, _, first = problem.run(client, EF21(server_lr=0.01, **common), 1, [np.array([2])])
    assert (np.count_nonzero(first, axis=1) == [0, 0, 2, 0]).all()  # who is skipped keeps what it had


def test_a_far_flatter_client_weighs_a_millionth_on_both_sides():
    """1/(n w) of w = 1e-12 would be beyond float32's digits: no weight is below 1e-6, and the two halves agree."""
    smoothness = (1e-9, 1.0, 1.0, 2.0)
    rule = EF21(smoothness=smoothness, weighted=True)
    cohort = cohort_of(np.zeros((4, 2)))
    weights = rule.coefficients(cohort, rule.init(cohort.layout, 4))
    scale = EF21Client(compressor=TopK(), smoothness=smoothness, weighted=True)._scale(senders(4))
    np.testing.assert_allclose(weights, np.array([1e-6, 0.25, 0.25, 0.5]) / (1 + 1e-6), rtol=1e-6)
    np.testing.assert_allclose(4 * weights * scale, 1, rtol=1e-12)


def test_the_new_step_gains_on_the_old_one():
    problem, rounds = Quadratics(), 300
    norms = {}
    for step in ("new", "old"):
        rule = EF21(step=step, smoothness=problem.smoothness, global_smoothness=problem.whole, alpha=2 / 6)
        x, *_ = problem.run(EF21Client(compressor=TopK(fraction=2 / 6)), rule, rounds)
        norms[step] = float(np.square(problem.gradients(x).mean(0)).sum())
    start = float(np.square(problem.gradients(np.zeros(6)).mean(0)).sum())
    assert norms["new"] < norms["old"] < 1e-3 * start


@pytest.mark.parametrize(
    ("kind", "arguments", "name"),
    [
        (TopK, {"fraction": 0.0}, "fraction"),
        (RandomK, {"fraction": 1.1}, "fraction"),
        (QSGD, {"num_levels": 0}, "num_levels"),
        (QSGD, {"bucket_size": 0}, "bucket_size"),
        (EF21, {"step": "best"}, "step"),
        (EF21, {"server_lr": 0.0}, "server_lr"),
        (EF21, {"step": "new", "server_lr": 1.0, "smoothness": (1.0,)}, "not both"),
        (EF21, {"weighted": True}, "smoothness"),
        (EF21, {"smoothness": (1.0, 0.0)}, "smoothness"),
        (EF21, {"global_smoothness": 0.0}, "global_smoothness"),
        (EF21, {"alpha": 0.0}, "alpha"),
        (EF21, {"participation": 2.0}, "participation"),
        (EF21, {"client_lr": 0.0}, "client_lr"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, name):
    with pytest.raises(ValueError, match=name):
        kind(**arguments)
    with pytest.raises(ValueError, match="smoothness"):
        EF21Client(compressor=TopK(), weighted=True)
    with pytest.raises(ValueError, match="smoothness of all 3 clients"):
        EF21(smoothness=(1.0, 2.0)).init(Layout.vector([2]), 3)


# --- whole runs ------------------------------------------------------------------------------------------------

SMALL = ("model=logreg", "partition.num_clients=8", "fraction=0.5")
SIZE = 64 * 10 + 10


def run(folder, *overrides, num_rounds=3, **settings):
    return simulate(*SMALL, *overrides, num_rounds=num_rounds, folder=folder, **settings)


@pytest.mark.parametrize(
    ("name", "update"),
    [("top_k", TopK()), ("random_k", RandomK()), ("qsgd", QSGD()), ("error_feedback", TopK())],
)
def test_a_run_counts_the_encoded_bytes(tmp_path, name, update):
    result = run(tmp_path / "a", f"compressor={name}", num_rounds=1)
    # beside its update a client sends its weight (8 bytes) and its training loss (4)
    assert result.rounds[0]["bytes_up"] == 4 * (update.num_bytes(SIZE, 4) + 12)
    assert result.rounds[0]["bytes_down"] == 4 * SIZE * 4


def test_whole_updates_change_nothing(tmp_path):
    whole = run(tmp_path / "a", "strategy=median")
    kept = run(tmp_path / "b", "strategy=median", "compressor=top_k", "compressor.fraction=1")
    a, b = (load_file(r.folder / "model.safetensors") for r in (whole, kept))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_a_runs_ef21_is_fedavg_of_equal_clients_where_nothing_is_lost(tmp_path):
    """All clients, all coordinates: G is the plain mean of the updates."""

    class Plain:
        def init(self, layout, num_clients):
            return {}

        def __call__(self, cohort, state):
            return cohort.rows.mean(0), state, {}

    settings = ("fraction=1", "dtype=float64")
    whole = ("strategy=ef21", "compressor.compressor.fraction=1")
    a = simulate(*SMALL[:2], *settings, *whole, num_rounds=3, folder=tmp_path / "a")
    b = simulate(*SMALL[:2], *settings, strategy=Plain(), num_rounds=3, folder=tmp_path / "b")
    left, right = (load_file(r.folder / "model.safetensors") for r in (a, b))
    for name in left:
        torch.testing.assert_close(left[name], right[name], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("name", ["error_feedback", "ef21"])
def test_what_clients_keep_is_resumed(tmp_path, name):
    from fedsim.console import Observer
    from fedsim.simulation import resume

    overrides = ("strategy=ef21",) if name == "ef21" else (f"compressor={name}",)
    whole = run(tmp_path / "a", *overrides, "checkpoint.every=1", num_rounds=4)
    run(tmp_path / "b", *overrides, "checkpoint.every=1", num_rounds=2)
    parts = resume(tmp_path / "b", ["num_rounds=4"], Observer())
    a, b = (load_file(r.folder / "model.safetensors") for r in (whole, parts))
    assert all(torch.equal(a[name], b[name]) for name in a)


class Fails:
    """Cross-entropy that the client with so many samples never ends."""

    def __init__(self, num_samples):
        self.num_samples = num_samples

    def loss(self, model, params, batch, context):
        if int(context.num_samples) == self.num_samples:
            raise RuntimeError("gone")
        return torch.nn.functional.cross_entropy(model(params, batch.x), batch.y), {}


def test_a_client_that_fails_keeps_its_estimate_and_the_sum_stays_that_of_all(tmp_path):
    words = ("strategy=ef21", "compressor.compressor.fraction=0.1", "on_client_error=drop", "engine=sequential")
    words = (*SMALL[:2], *words, "fraction=0.6", "dtype=float64", "num_rounds=5")
    sizes = build(compose(list(words))).splits.train.sizes
    (unlucky,) = np.flatnonzero(sizes == (lost := int(sizes.max())))
    experiment = build(compose(list(words)), {"client": Fails(lost)})
    loop = Loop(experiment, tmp_path, Observer())
    loop.run()
    estimates = loop.uplink.store.get(np.arange(8), torch.device("cpu"))["estimate"]
    assert sum(row["num_dropped"] for row in RoundLog.read(tmp_path / "rounds.jsonl")) > 0
    assert not estimates[unlucky].any()
    assert estimates.any(1).sum() > 3
    np.testing.assert_allclose(loop.strategy.state["sum"], estimates.mean(0), rtol=1e-10, atol=1e-14)


def test_bits_do_not_depend_on_the_cohort():
    """A client's code is a function of (seed, round, client)."""
    rows = rows_of(0, 6)
    layout = Layout.vector([50])
    for compressor, ids in itertools.product((RandomK(fraction=0.1), QSGD()), ([0, 3, 5], [3])):
        everyone = Uplink(layout, 6, 6, dtype=torch.float64, compressor=compressor)(cohort_of(rows.clone(), seed=4))
        some = cohort_of(rows[ids].clone(), clients=torch.tensor(ids), seed=4)
        got = Uplink(layout, 6, 6, dtype=torch.float64, compressor=compressor)(some)
        assert torch.equal(got.rows, everyone.rows[ids])


def test_a_compressor_that_cannot_be_is_one_line(tmp_path):
    with pytest.raises(UserError, match=r"compressor: .* needs a contraction"):
        run(tmp_path / "a", "compressor=error_feedback", "compressor@compressor.compressor=random_k")
    with pytest.raises(UserError, match=r"compressor\.fraction must be in"):
        run(tmp_path / "b", "compressor=top_k", "compressor.fraction=0")
