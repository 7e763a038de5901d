"""Updates that the device has no room for: the same results from column blocks, and never more on it than said."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fedsim
from fedsim import simulation
from fedsim.catalogue import options, roots
from fedsim.config import compose, instantiate
from fedsim.contracts import Cohort
from fedsim.layout import Layout
from fedsim.linalg import (
    against,
    beside,
    combine,
    finite_rows,
    gram,
    largest_entry,
    map_columns,
    row_norms,
    square_distances,
    square_norms,
)
from fedsim.metrics.drift import drift_of_rows
from fedsim.order import mean_around_median, median, trimmed_mean
from fedsim.place import Place, blocks, blockwise, empty

K, D = 12, 1000
BYTES = 16_384  # a third of a float32 matrix, a fifth of a float64 one
PLACE = Place(torch.device("cpu"), BYTES)


def matrix(dtype=torch.float64, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((K, D))).to(dtype)


class Spy(TorchDispatchMode):
    """Notes the bytes of the largest tensor that an operation computes; what is allocated, viewed or moved is not."""

    MOVES = ("empty", "new_empty", "copy_", "_to_copy", "view", "slice", "select", "detach", "alias", "expand", "t",
             "unsqueeze", "squeeze", "as_strided", "transpose", "permute", "split", "_unsafe_view", "lift_fresh",
             "reshape", "unbind", "index_put_")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.largest, self.what = 0, ""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name not in self.MOVES:
            for value in out if isinstance(out, tuple | list) else [out]:
                if isinstance(value, torch.Tensor) and value.nbytes > self.largest:
                    self.largest, self.what = value.nbytes, name
        return out


# --- helpers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_memory_for_a_matrix_begins_where_torchs_does(dtype):
    for count in range(1, 9):
        found = empty(count, matrix(dtype))
        assert (found.shape, found.dtype, found.data_ptr() % 64) == ((count, D), dtype, 0)
        found.fill_(3)  # all of it is there
        assert found.is_contiguous()


@pytest.mark.parametrize("width", [1, 7, 64, 5000])
def test_blocks_cover_each_column_once(width):
    updates = matrix()
    seen = torch.zeros(D)
    for columns, block in blocks(updates, width):
        seen[columns] += 1
        assert torch.equal(block, updates[:, columns])
        assert block.shape[1] <= width
    assert bool((seen == 1).all())
    with blockwise(PLACE):
        widths = {block.shape[1] for _, block in blocks(updates, width)}
    assert max(widths) == min(width, BYTES // (4 * K * 8))


V = torch.from_numpy(np.random.default_rng(5).standard_normal((D, 3)))
HELPERS = {
    "gram": gram,
    "gram of differences": lambda x: gram(x, x.mean(0)),
    "square_distances": square_distances,
    "combine": lambda x: combine(torch.arange(float(K)), x),
    "against": lambda x: against(x, V),
    "against one": lambda x: against(x, V[:, 0]),
    "square_norms": square_norms,
    "row_norms": row_norms,
    "largest_entry": largest_entry,
    "median": median,
    "median of some rows": lambda x: median(x, torch.arange(K) % 3 > 0),
    "trimmed_mean": lambda x: trimmed_mean(x, 2),
    "mean_around_median": lambda x: mean_around_median(x, 8),
    "map_columns": lambda x: map_columns(x, lambda block, columns: block[:5] * V[columns, 0]),
    "finite_rows": finite_rows,
}


@pytest.mark.parametrize("name", HELPERS)
def test_helpers_give_the_same_from_blocks(name):
    updates = matrix()
    whole = HELPERS[name](updates)
    spy = Spy()
    with blockwise(PLACE), spy:
        mine = HELPERS[name](updates)
    torch.testing.assert_close(mine, whole, rtol=1e-12, atol=1e-12)
    assert 0 < spy.largest <= BYTES, spy.what


def test_rows_that_overflow_are_measured_in_blocks_too():
    updates = matrix(torch.float32)
    updates[3] *= 1e30
    updates[4] *= 1e-30
    updates[5, 7] = torch.nan
    whole = row_norms(updates), finite_rows(updates)
    with blockwise(PLACE):
        mine = row_norms(updates), finite_rows(updates)
    torch.testing.assert_close(mine[0], whole[0], rtol=1e-6, atol=0, equal_nan=True)
    assert torch.equal(mine[1], whole[1])
    assert mine[1].tolist() == [k != 5 for k in range(K)]


def test_a_place_ends_with_its_block():
    with pytest.raises(RuntimeError), blockwise(PLACE):
        raise RuntimeError
    assert [columns for columns, _ in blocks(matrix(), 5000)] == [slice(0, D)]
    assert beside(matrix()).shape == (0,)


# --- rules --------------------------------------------------------------------------------------------------------

# Rule → why it may hold more on the device than a block.
WHOLE = {
    "unstale": "trains on stale rows; the plan leaves its updates on the device",
    "fedld_yoked": "reads the folder of another run; the rule inside is FedLD",
    "scaffold": "is linear, and its second uploads (K, D) come from the engine as they are",
}


def rules():
    names = [name for name in options("strategy", roots()) if not name.startswith("flower/")]
    return sorted(set(names) - set(WHOLE))


def cohort(updates, seed=3):
    rng = np.random.default_rng(seed)
    half = D // 2
    layout = Layout.of({"a": torch.zeros(half), "b": torch.zeros(D - half)})
    models = {version: torch.from_numpy(rng.standard_normal(D)).to(updates) for version in range(4)}
    received = torch.tensor([3] * (K - 3) + [0, 1, 2])
    return Cohort(
        updates=updates, weights=torch.from_numpy(rng.integers(1, 9, K)).to(updates.dtype), clients=torch.arange(K),
        num_steps=torch.full((K,), 5), staleness=3 - received, received=received, models=models, round=4,
        layout=layout, seed=1,
    )  # fmt: skip


def rule_of(name):
    rule = instantiate(compose([f"strategy={name}"]).strategy, "strategy")
    needs = getattr(rule, "needs", ())
    if "local_training" in needs:
        from fedsim.local import LocalTraining

        rule = rule.bind(local_training=LocalTraining(lr=0.1))
    return rule


@pytest.mark.parametrize("name", rules())
def test_every_rule_that_holds_a_matrix_gives_the_same_from_blocks(name):
    """That of a linear rule too, which holds it where something else asks for rows."""
    rule, rng = rule_of(name), np.random.default_rng(5)
    sent = {name: torch.from_numpy(rng.standard_normal((K, D))) for name in getattr(rule, "reduced_extras", ())}
    sent |= {name: torch.from_numpy(rng.uniform(0.1, 3.0, K)) for name in getattr(rule, "uploads", ())}
    given = replace(cohort(matrix()), extras=sent)
    state = rule.init(given.layout, 100)
    whole, _, metrics = rule(given, state)
    spy = Spy()
    with blockwise(PLACE), spy:
        delta, _, blockwise_metrics = rule(given, state)
    scale = max(1e-6, float(whole.abs().max()))
    torch.testing.assert_close(delta / scale, whole / scale, rtol=0, atol=1e-6)
    assert set(metrics) == set(blockwise_metrics)
    assert spy.largest <= BYTES, spy.what


def test_the_exceptions_are_rules():
    assert set(WHOLE) <= set(options("strategy", roots()))


def test_drift_is_measured_in_blocks():
    given = cohort(matrix())
    whole = drift_of_rows(given, given.models[0])
    spy = Spy()
    with blockwise(PLACE), spy:
        mine = drift_of_rows(given, given.models[0])
    for name, value in whole.items():
        torch.testing.assert_close(mine[name], value, rtol=1e-9, atol=1e-9)
    assert spy.largest <= BYTES, spy.what


# --- runs ---------------------------------------------------------------------------------------------------------

BASE = (
    "data=blobs", "data.num_samples=200", "partition=iid", "partition.num_clients=10", "model=mlp", "fraction=1.0",
    "dtype=float64", "client.lr=0.1", "metrics.every=1", "metrics.cosines=true", "engine.chunk=1",
)  # fmt: skip


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    count = itertools.count()
    return lambda *given, **settings: fedsim.simulate(*given, folder=tmp_path / f"run-{next(count)}", **settings)


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("strategy", ["fedld", "median", "fedavg", "nnm"])
def test_a_run_with_updates_on_the_host_is_the_same_run(run, monkeypatch, engine, strategy):
    base = [text for text in BASE if text != "engine.chunk=1"] + [f"engine={engine}", f"strategy={strategy}"]
    base += ["engine.chunk=3"] if engine == "vectorized" else []
    given, seen = [], []
    plain = run(*base, num_rounds=3)
    hosted = run(*base, "device_memory=200000", num_rounds=3)
    assert plain.summary["plan"]["updates"] == {"on": "device"}
    assert hosted.summary["plan"]["updates"] == {"on": "host", "block_bytes": 25_000}
    for one, other in zip(plain.rounds, hosted.rounds, strict=True):
        given.append(one["loss"])
        seen.append(other["loss"])
        assert math.isclose(one["cosine_mean"], other["cosine_mean"], rel_tol=1e-6)
    np.testing.assert_allclose(seen, given, rtol=1e-9)


def test_dropped_rows_leave_no_gap(run, monkeypatch):
    """Client 1's update is not finite; the rows of the others stand together on the host."""
    from fedsim.engine.sequential import Sequential

    real = Sequential.train

    def train(self, job, out):
        block = real(self, job, out)
        for row in np.flatnonzero(job.clients == 1).tolist():
            block.square_norms[row] = torch.nan
        return block

    monkeypatch.setattr(Sequential, "train", train)
    monkeypatch.setattr("fedsim.plan.block_rows", lambda engine: 3)  # the gap is in the first of four blocks
    base = [text for text in BASE if text != "engine.chunk=1"] + ["engine=sequential", "strategy=median"]
    plain, hosted = run(*base, num_rounds=2), run(*base, "device_memory=200000", num_rounds=2)
    assert hosted.rounds[1]["num_participants"] == 9
    assert math.isclose(plain.rounds[1]["loss"], hosted.rounds[1]["loss"], rel_tol=1e-9)


def test_where_updates_lie_is_part_of_the_plan(run):
    base = [text for text in BASE if text != "engine.chunk=1"] + ["strategy=median"]
    enough = run(*base, "device_memory=100000000", num_rounds=1)
    assert enough.summary["plan"]["updates"] == {"on": "device"}
    streamed = run(*[t for t in base if "cosines" not in t][:-1], "strategy=fedavg", "device_memory=1", num_rounds=1)
    assert streamed.summary["plan"]["rows"] == "streamed"
    assert streamed.summary["plan"]["updates"] == {"on": "device"}  # there is no matrix
    attacked = run(*base, "attack=sign_flip", "attack.fraction=0.2", "device_memory=1", num_rounds=1)
    assert attacked.summary["plan"]["updates"] == {"on": "device"}  # an attack reads it whole
    with pytest.raises(ValueError, match=r"device_memory must be >= 1 byte.*got 0"):
        run(*base, "device_memory=0", num_rounds=1)
