"""Blocks of rows that workers train: the same bits whoever trains them, in any order, and after any death."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn

import fedsim
from fedsim import simulation
from fedsim.build import build
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Partition
from fedsim.engine.parcel import from_bytes, pack, sendable, to_bytes, unpack
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.shared import Memory, memory_of, share
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.workers import AHEAD, Distributed, Event, Rooms, WorkersLost
from fedsim.errors import ClientError, UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.mlp import mlp
from fedsim.models.parameters import split_parameters

BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")
CPU = torch.device("cpu")
TINY = (
    "data=blobs", "data.num_samples=240", "partition=dirichlet", "partition.num_clients=12", "partition.alpha=1",
    "model=mlp", "model.hidden=[8]", "num_rounds=3", "dtype=float64", "metrics.every=1", "metrics.clients_every=1",
    "threads=1",
)  # fmt: skip


class Recorder(Observer):
    """Keeps what a run says."""

    def __init__(self):
        self.warnings, self.plans = [], []

    def warn(self, line):
        self.warnings.append(line)

    def plan(self, line):
        self.plans.append(line)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run with given settings in a new folder, without drawing: the picture has its own test."""
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    count = itertools.count()

    def go(*overrides, **given):
        given.setdefault("folder", tmp_path / f"run-{next(count)}")
        return fedsim.simulate(*TINY, *overrides, **given)

    return go


def contents(folder):
    return {name: (Path(folder) / name).read_bytes() for name in BYTES}


# Blocks and their scheduling, without a process: a pool whose workers finish and die in any order.

SIZES = np.array([7, 1, 20, 13, 4, 4, 9])


def make_task(**changes):
    module = mlp((6,), 4, hidden=(5,)).double()
    total = int(SIZES.sum())
    draw = torch.Generator().manual_seed(3)
    for p in module.parameters():
        p.data = torch.randn(p.shape, generator=draw, dtype=torch.float64)
    parts = split_parameters(module, local=None, trainable=None)
    given = {
        "module": module, "shared": parts.shared, "local": parts.local, "buffers": Layout((), ()),
        "objective": CrossEntropy(), "training": LocalTraining(lr=0.2, batch_size=4, momentum=0.5),
        "x": torch.randn(total, 6, generator=draw, dtype=torch.float64),
        "y": torch.randint(0, 4, (total,), generator=draw),
        "partition": Partition(np.arange(total), np.concatenate([[0], np.cumsum(SIZES)])),
        "store": ClientStore(len(SIZES), {}),
    }  # fmt: skip
    task = Task(**given | changes)
    weights = parts.shared.join({n: p.detach().clone() for n, p in module.named_parameters()})
    return task, weights


def make_job(task, weights, **changes):
    clients = np.arange(len(SIZES))
    job = Job(
        clients=clients, received=np.zeros(len(clients), dtype=np.int64), models={0: weights}, broadcasts={},
        buffers=weights.new_zeros(0), state=task.store.get(clients, CPU), round=1, key=1, lr=0.2,
    )  # fmt: skip
    return replace(job, **changes)


class Chaos:
    """A pool in this process whose workers finish in an order of chance and die with a probability."""

    def __init__(self, task, num_workers, rng, deadly=0.0):
        self.rooms = Rooms(lambda _, count: torch.full((count, task.shared.size), torch.nan, dtype=task.dtype))
        self.engine, self.rng, self.deadly = Sequential(task), rng, deadly
        self.pending = {k: None for k in range(num_workers)}  # worker → what it does
        self.common, self.trained, self.closed = None, [], False
        self.most, self.deaths = 2, {}  # first client of a block → how many it has ended

    def publish(self, job):
        self.common = {"models": job.models, "broadcasts": job.broadcasts, "buffers": job.buffers}

    def give(self, worker, part, place):
        self.pending[worker] = (replace(part, models={}, broadcasts={}), place)

    def wait(self):
        worker = self.rng.choice(sorted(self.pending))
        task = self.pending.pop(worker)
        if task is None:
            return [Event("ready", worker)]
        part, place = task
        first = int(part.clients[0])
        if self.deaths.get(first, 0) < self.most and self.rng.random() < self.deadly:
            self.pending[worker] = None
            self.deaths[first] = self.deaths.get(first, 0) + 1
            # It has written some of its rows.
            self.rooms[place.room][place.low : place.low + len(part)] = 1e9
            return [Event("lost", worker, "killed")]
        out = self.rooms[place.room][place.low : place.low + len(part)]
        try:
            block = self.engine.train(replace(part, **self.common), out)
        except Exception as error:
            return [Event("failed", worker, error)]
        self.trained.append(part.clients.tolist())
        return [Event("done", worker, block)]

    def close(self):
        self.closed = True


def distributed(task, num_workers=2, seed=0, deadly=0.0, block=2):
    pool = Chaos(task, num_workers, np.random.default_rng(seed), deadly)
    return Distributed(task, pool, plan={"inner_arguments": {}, "block": block}, workers=num_workers)


def coefficients(cohort):
    return cohort.weights * (1 + cohort.extras["train_loss"])


@settings(max_examples=25)
@given(seed=st.integers(0, 2**31), num_workers=st.integers(1, 4), deadly=st.sampled_from([0.0, 0.3]))
def test_neither_order_nor_deaths_change_a_bit(seed, num_workers, deadly):
    results = []
    for how in ((1, 0, 0.0), (num_workers, seed, deadly)):
        task, weights = make_task()
        trainer = Trainer(distributed(task, *how))
        held, _ = trainer.collect(make_job(task, weights))
        streamed, _ = trainer.stream(make_job(task, weights), coefficients)
        results.append((held.updates.clone(), held.weights, streamed.streamed.mean, streamed.clients))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)


def test_blocks_give_the_rows_and_sums_of_one_engine_alone():
    held, sums = [], []
    for make in (Sequential, lambda task: distributed(task, 3, seed=5)):
        task, weights = make_task()
        trainer = Trainer(make(task))
        held.append(trainer.collect(make_job(task, weights))[0])
        held[-1] = replace(held[-1], updates=held[-1].updates.clone())
        sums.append(trainer.stream(make_job(task, weights), coefficients)[0])
    assert torch.equal(
        held[0].updates, held[1].updates
    )  # the sequential engine's rows know nothing of their neighbours
    assert torch.equal(held[0].extras["train_loss"], held[1].extras["train_loss"])
    assert torch.equal(sums[0].clients, sums[1].clients)
    torch.testing.assert_close(sums[0].streamed.mean, sums[1].streamed.mean, rtol=1e-12, atol=1e-14)  # order of sums
    assert torch.equal(sums[0].streamed.sums.square_norms, sums[1].streamed.sums.square_norms)


def test_the_longest_block_starts_first_and_few_are_held():
    task, weights = make_task()
    engine = distributed(task, 1, block=1)
    Trainer(engine).stream(make_job(task, weights), coefficients)
    # Samples passed, steps × batch: 20, 16 (of 13), 12 (of 9), 8 (of 7), 4, 4, 1.
    assert engine.pool.trained == [[2], [3], [6], [0], [4], [5], [1]]
    held = sum(len(rows) for rows in engine.pool.rooms._rooms.values())
    assert held == 1 + AHEAD < len(SIZES)


def test_a_block_that_ends_every_worker_is_laid_on_its_client():
    task, weights = make_task()
    engine = distributed(task, 2)
    engine.pool.deadly, engine.pool.most = 1.0, 1000
    with pytest.raises(ClientError, match=r"client 0 failed in round 1: .*3 workers ended on clients 0, the last: kil"):
        Trainer(engine).collect(make_job(task, weights))
    assert any("worker" in line and "clients 2, 3 train again" in line for line in engine.warnings)


def test_pools_that_break_stop_the_run_as_they_are():
    task, weights = make_task()
    engine = distributed(task)
    engine.pool.wait = lambda: [Event("broken", 0, WorkersLost("nobody starts"))]
    with pytest.raises(WorkersLost, match="nobody starts"):
        Trainer(engine, on_client_error="drop").collect(make_job(task, weights))
    assert engine.pool.closed


class Refusing(CrossEntropy):
    """Fails for batches that hold a class."""

    def criterion(self, logits, targets, weights):
        if bool((targets == 2).all()):
            raise ValueError("no class 2, please")
        return super().criterion(logits, targets, weights)


@pytest.mark.parametrize("how", ["collect", "stream"])
def test_failing_clients_are_dropped_as_by_one_engine(how):
    results = []
    for make in (Sequential, lambda task: distributed(task, 3, seed=1)):
        task, weights = make_task(objective=Refusing(), training=LocalTraining(lr=0.2, batch_size=1))
        task.y[:] = 0
        task.y[7] = 2  # the one sample of client 1
        trainer = Trainer(make(task), on_client_error="drop")
        more = () if how == "collect" else (coefficients,)
        cohort = getattr(trainer, how)(make_job(task, weights), *more)[0]
        results.append((cohort.clients.tolist(), trainer.failures))
    assert results[0] == results[1] == ([0, 2, 3, 4, 5, 6], {1: "ValueError: no class 2, please"})


# Parcels and memory.


def test_a_parcel_holds_each_array_once_and_gives_back_what_was_packed():
    weights = torch.arange(6.0).view(2, 3)
    value = {
        "models": {0: weights, 1: weights}, "half": torch.tensor([1.5, -2], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]), "number": torch.tensor(3), "none": torch.empty(0, 4),
        "ids": np.arange(2000), "few": np.arange(3), "text": "x",
    }  # fmt: skip
    parcel = pack(value)
    assert len(parcel.arrays) == 6  # the weights once, the small array in the text
    back = unpack(parcel, CPU)
    assert back["models"][0] is not weights
    assert back["text"] == "x"
    for name in ("half", "flag", "number", "none"):
        assert torch.equal(back[name], value[name]) and back[name].dtype == value[name].dtype
        assert torch.equal(from_bytes(to_bytes(value[name])), value[name])
    assert torch.equal(back["models"][1], weights)
    np.testing.assert_array_equal(back["ids"], value["ids"])
    np.testing.assert_array_equal(back["few"], value["few"])


def test_a_parcel_of_a_module_is_the_module():
    module = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    module[1].num_batches_tracked += 4
    back = unpack(pack(module), CPU)
    assert {n: v.tolist() for n, v in back.state_dict().items()} == {
        n: v.tolist() for n, v in module.state_dict().items()
    }


class Awkward(Exception):
    """Takes other arguments than it keeps."""

    def __init__(self, what, where):
        super().__init__(f"{what} at {where}")


def test_errors_travel_as_themselves_or_as_their_text():
    out = sendable(torch.OutOfMemoryError("CUDA out of memory"))
    assert type(out) is torch.OutOfMemoryError
    assert str(out) == "CUDA out of memory"
    try:
        raise Awkward("nothing", "home")
    except Awkward as error:
        awkward = sendable(error)
    assert (type(awkward), str(awkward)) == (RuntimeError, "Awkward: nothing at home")
    assert "test_workers.py" in awkward.__notes__[0]


def test_shared_tensors_are_one_memory_and_equal():
    x = torch.arange(10, dtype=torch.float64).view(5, 2)
    shared = share(x)
    assert torch.equal(shared, x)
    assert share(shared) is shared
    assert len(memory_of(shared)) == 80
    assert memory_of(x) is None and memory_of(shared[1:]) is None
    assert memory_of(Memory.new(0).tensor()) is not None


# Whole runs on processes.

METHODS = {
    "fedavg": ("strategy=fedavg",),
    "momentum, krum": ("strategy=krum", "client.momentum=0.9"),
    "scaffold": ("strategy=scaffold",),
    "fedld": ("strategy=fedld",),
    "fedhyper_cl": ("strategy=fedhyper_cl",),
    "fedper": ("strategy=fedper", "partition.local_test=0.2"),
    "dropout, fedadam": ("strategy=fedadam", "data=digits", "~data.num_samples", "model=cnn", "~model.hidden",
                         "model.hidden=4", "model.channels=[2,2]", "model.dropout=[0.3,0.3]", "client.local_steps=2"),
    "running statistics": ("strategy=fedavg", "model=mlp_bn", "client.batch_size=null"),
    "several versions": ("strategy=fedbuff", "mode=async", "mode.buffer=4", "mode.concurrency=8",
                         "devices=lognormal"),
}  # fmt: skip


def words_of(name):
    """Return a method's words, and TINY without those that it sets or leaves out."""
    words = METHODS[name]
    gone = {w.removeprefix("~").split("=")[0] for w in words}
    return [w for w in TINY if w.split("=")[0] not in gone] + [w for w in words if not w.startswith("~")]


@pytest.mark.parametrize("name", METHODS)
def test_every_engine_and_any_number_of_workers_gives_the_same_numbers(run, name, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    engines = {"sequential": ("engine=sequential",)} | {
        f"{n} workers": ("engine=processes", f"engine.workers={n}", "engine.block=2") for n in (1, 2, 3)
    }
    if name != "running statistics":  # which batched clients would share
        engines["vectorized"] = ("engine=vectorized",)
    models, files = {}, {}
    for engine, words in engines.items():
        folder = tmp_path / engine
        fedsim.simulate(*words_of(name), *words, folder=folder)
        models[engine], files[engine] = load_file(folder / "model.safetensors"), contents(folder)
    for engine, model in models.items():
        for key, value in model.items():  # promise 3: float64 to 1e-9
            torch.testing.assert_close(value, models["sequential"][key], rtol=1e-9, atol=1e-9, msg=f"{engine} {key}")
    assert files["1 workers"] == files["2 workers"] == files["3 workers"]
