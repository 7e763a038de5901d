"""Blocks of rows that workers train: the same bits whoever trains them, in any order, and after any death."""

import itertools
import json
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

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
from fedsim.engine.pool import Event, Rooms, WorkersLost
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.shared import Memory, memory_of, share
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.worker import train_block
from fedsim.engine.workers import AHEAD, Distributed
from fedsim.errors import ClientError, UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.mlp import mlp
from fedsim.models.parameters import split_parameters

BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")
CPU = torch.device("cpu")
TINY = (
    "data=blobs", "data.num_samples=240", "partition=dirichlet", "partition.num_clients=12", "partition.alpha=1",
    "model=mlp", "model.hidden=[8]", "num_rounds=2", "dtype=float64", "metrics.every=1", "metrics.clients_every=1",
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


@pytest.fixture(autouse=True)
def _quick_workers(monkeypatch):
    """Spare every worker the import of this process's main module, pytest."""
    main = sys.modules["__main__"]
    monkeypatch.setattr(main, "__spec__", None)
    monkeypatch.delattr(main, "__file__", raising=False)


def last(words):
    """Return words without those that a later one sets again, or leaves out with a tilde."""
    names = [word.removeprefix("~").split("=")[0] for word in words]
    return [w for k, w in enumerate(words) if names[k] not in names[k + 1 :] and not w.startswith("~")]


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run with given settings in a new folder, without drawing: the picture has its own test."""
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    count = itertools.count()

    def go(*overrides, **given):
        given.setdefault("folder", tmp_path / f"run-{next(count)}")
        return fedsim.simulate(*last((*TINY, *overrides)), **given)

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
        self.pending = dict.fromkeys(range(num_workers))  # worker → what it does
        self.common, self.trained, self.closed = None, [], False
        self.most, self.deaths = 2, {}  # first client of a block → how many it has ended

    def publish(self, job):
        self.common = {"models": job.models, "broadcasts": job.broadcasts, "buffers": job.buffers}

    def give(self, worker, part, place, shares):
        self.pending[worker] = (replace(part, models={}, broadcasts={}), place, shares)

    def wait(self):
        worker = self.rng.choice(sorted(self.pending))
        task = self.pending.pop(worker)
        if task is None:
            return [Event("ready", worker)]
        part, place, shares = task
        rows = self.rooms[place.room][place.low : place.low + (len(part) if shares is None else 1)]
        first = int(part.clients[0])
        if self.deaths.get(first, 0) < self.most and self.rng.random() < self.deadly:
            self.pending[worker] = None
            self.deaths[first] = self.deaths.get(first, 0) + 1
            rows[:] = 1e9  # half done
            return [Event("lost", worker, "killed")]
        try:
            block = train_block(self.engine, replace(part, **self.common), shares, rows)
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


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**31), num_workers=st.integers(1, 4), deadly=st.sampled_from([0.0, 0.3]))
def test_neither_order_nor_deaths_change_a_bit(seed, num_workers, deadly):
    results = []
    for how in ((1, 0, 0.0), (num_workers, seed, deadly)):
        task, weights = make_task()
        trainer = Trainer(distributed(task, *how))
        held, _ = trainer.collect(make_job(task, weights))
        streamed, _ = trainer.stream(make_job(task, weights), coefficients)
        summed, _ = trainer.stream(make_job(task, weights), lambda cohort: cohort.weights)
        means = (streamed.streamed.mean, summed.streamed.mean)
        results.append((held.updates.clone(), held.weights, *means, streamed.clients, summed.clients))
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


def test_sums_come_back_in_place_of_rows_where_coefficients_are_known():
    means = []
    for make in (Sequential, lambda task: distributed(task, 2, seed=3)):
        task, weights = make_task()
        task.x[8] = torch.inf  # of client 2, whose row is dropped
        trainer = Trainer(make(task))
        cohort, _ = trainer.stream(make_job(task, weights), lambda cohort: cohort.weights)
        assert trainer.bad == [2]
        assert cohort.clients.tolist() == [0, 1, 3, 4, 5, 6]
        means.append(cohort.streamed.mean)
    torch.testing.assert_close(*means, rtol=1e-12, atol=1e-14)  # another order of sums
    assert [len(rows) for rows in trainer.engine.pool.rooms._rooms.values()] == [1] * (2 + AHEAD)
    task, weights = make_task(store=ClientStore(len(SIZES), {"memory": torch.zeros(2)}))
    assert distributed(task).train_sum is None  # its state says whether a row is good


def test_a_block_that_ends_every_worker_is_laid_on_its_client():
    task, weights = make_task()
    engine = distributed(task, 2)
    engine.pool.deadly, engine.pool.most = 1.0, 1000
    with pytest.raises(ClientError, match=r"client 0 failed in round 1: .*3 workers ended on clients 0, the last: kil"):
        Trainer(engine).collect(make_job(task, weights))
    assert any("worker" in line and "clients 2, 3 train again" in line for line in engine.warnings)


@pytest.mark.parametrize("how", ["collect", "stream"])
def test_a_client_that_has_ended_three_workers_by_itself_is_not_trained_again_alone(how):
    """Three deaths, of a block that holds nobody else, say whose fault it is; its next round is another matter."""
    task, weights = make_task()
    engine = distributed(task, 2, block=1)
    pool = engine.pool
    pool.most = 1000
    pool.rng = Deadly(pool.rng, pool.pending, 3)
    trainer = Trainer(engine, on_client_error="drop")
    more = () if how == "collect" else (coefficients,)
    cohort = getattr(trainer, how)(make_job(task, weights), *more)[0]
    assert cohort.clients.tolist() == [0, 1, 2, 4, 5, 6]
    assert trainer.failures == {3: "RuntimeError: 3 workers ended on clients 3, the last: killed"}
    assert pool.deaths == {3: 3}
    assert [line.partition("; ")[2] for line in engine.warnings] == ["clients 3 train again"]
    trainer.failures.clear()
    getattr(trainer, how)(make_job(task, weights, round=2, key=2), *more)
    assert pool.deaths == {3: 6}


class Deadly:
    """Chance for `Chaos` by which one client ends every worker, and no other one does."""

    def __init__(self, rng, pending, client):
        self.rng, self.pending, self.client, self.first = rng, pending, client, None

    def choice(self, workers):
        worker = self.rng.choice(workers)
        task = self.pending[worker]
        self.first = None if task is None else int(task[0].clients[0])
        return worker

    def random(self):
        return -1.0 if self.first == self.client else 1.0


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


def test_a_stream_of_no_blocks_ends_at_once():
    # As after `train_sum`, which leaves no block to a stream of 100 clients either.
    engine = distributed(make_task()[0], 2, seed=1)
    assert list(engine.stream([])) == []
    assert engine.pool.closed is False


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
        assert back[name].dtype == value[name].dtype
        assert torch.equal(back[name], value[name])
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
    assert memory_of(x) is None
    assert memory_of(shared[1:]) is None
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


AUTO = ("fedavg", "dropout, fedadam")  # whose workers take what the table says


@pytest.mark.parametrize("name", METHODS)
def test_every_engine_and_any_number_of_workers_gives_the_same_numbers(name, tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    counts = (1, 2, 3) if name in ("fedavg", "scaffold") else (1, 3)
    words = ("engine=processes", "engine.block=2", "engine.inner=auto" if name in AUTO else "engine.inner=sequential")
    engines = {"sequential": ("engine=sequential",)} | {n: (*words, f"engine.workers={n}") for n in counts}
    if name != "running statistics":  # which batched clients would share
        engines["vectorized"] = ("engine=vectorized",)
    models, files = {}, {}
    for engine, words in engines.items():
        folder = tmp_path / str(engine)
        fedsim.simulate(*last((*TINY, *METHODS[name], *words)), folder=folder)
        models[engine], files[engine] = load_file(folder / "model.safetensors"), contents(folder)
    for engine, model in models.items():
        for key, value in model.items():  # promise 3: float64 to 1e-9
            torch.testing.assert_close(value, models["sequential"][key], rtol=1e-9, atol=1e-9, msg=f"{engine} {key}")
    assert all(files[n] == files[1] for n in counts)


# Workers that die, fail, or outlive their run. Objectives stand in a module of the user's, for workers import them.

OBJECTIVES = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
import torch
from fedsim.clients.cross_entropy import CrossEntropy

@dataclass(frozen=True)
class Deadly(CrossEntropy):
    '''Ends its own process, once a file.'''
    folder: str
    times: int = 1

    def criterion(self, logits, targets, weights):
        for k in range(self.times):
            try:
                (Path(self.folder) / f"death-{k}").touch(exist_ok=False)
            except FileExistsError:
                continue
            os.kill(os.getpid(), signal.SIGKILL)
        return super().criterion(logits, targets, weights)

@dataclass(frozen=True)
class Failing(CrossEntropy):
    '''Raises for a client, known by the number of its samples.'''
    num_samples: int
    kind: str = "value"

    def loss(self, model, params, batch, context):
        if context.num_samples == self.num_samples:
            if self.kind == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory")
            raise ValueError("no such samples, please")
        weights = torch.full((len(batch.y),), 1 / len(batch.y), dtype=torch.float64)
        return self.criterion(model(params, batch.x), batch.y, weights), {}

@dataclass(frozen=True)
class Slow(CrossEntropy):
    '''Leaves the number of its process in a folder, and takes its time.'''
    folder: str

    def criterion(self, logits, targets, weights):
        (Path(self.folder) / str(os.getpid())).touch()
        time.sleep(0.002)
        return super().criterion(logits, targets, weights)
"""
PROCESSES = ("engine=processes", "engine.workers=2", "engine.block=2", "engine.inner=sequential")


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder of the user's own with objectives in it, importable here and in workers."""
    (tmp_path / "theirs.py").write_text(OBJECTIVES)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("theirs", None)


def own(name, **arguments):
    """Return the words of a client of the user's own."""
    return (f"client._target_=theirs.{name}", *(f"+client.{n}={v}" for n, v in arguments.items()))


def test_a_worker_that_is_killed_is_replaced_and_its_clients_train_again(run, importable):
    words = (*own("Deadly", folder=importable), *PROCESSES)
    observer = Recorder()
    hurt = run(*words, observer=observer)
    assert (importable / "death-0").exists()
    assert len(observer.warnings) == 1
    assert "round 1: worker" in observer.warnings[0]
    assert "was killed by signal 9; was memory short?) and replaced; clients" in observer.warnings[0]
    assert contents(hurt.folder) == contents(run(*words).folder)


def test_a_client_that_kills_every_worker_is_named(run, importable):
    with pytest.raises(RuntimeError, match=r"client \d+ failed in round 1: RuntimeError: 3 workers ended on clients"):
        run(*own("Deadly", folder=importable, times=1000), *PROCESSES)


def test_clients_errors_come_back_as_themselves(run, importable):
    sizes = build(compose([*TINY, "engine=sequential"])).task.partition.sizes
    unlucky = int(np.flatnonzero(np.bincount(sizes)[sizes] == 1)[0])  # a client whose number of samples is its own
    words = (*own("Failing", num_samples=sizes[unlucky]), "fraction=1", "num_rounds=1")
    with pytest.raises(RuntimeError, match=f"client {unlucky} failed in round 1: ValueError: no such samples, please"):
        run(*words, *PROCESSES)
    observer = Recorder()
    dropped = run(*words, *PROCESSES, "on_client_error=drop", observer=observer)
    assert f"client {unlucky} failed and is left out: ValueError: no such samples" in observer.warnings[0]
    alone = run(*words, "engine=sequential", "on_client_error=drop")
    assert dropped.rounds[0]["num_dropped"] == alone.rounds[0]["num_dropped"] == 1
    for one, other in zip(*(load_file(r.folder / "model.safetensors").values() for r in (dropped, alone)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-14)  # sums of other blocks
    with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
        run(*words, *PROCESSES, "+client.kind=memory", "on_client_error=drop")


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


COMMAND = "import sys; from fedsim.cli import main; sys.exit(main())"


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_killed_run_takes_its_workers_along_and_goes_on_with_others(run, importable, tmp_path):
    words = (*own("Slow", folder=tmp_path / "pids"), *PROCESSES, "num_rounds=8", "checkpoint.every=2")
    (tmp_path / "pids").mkdir()
    whole, folder = run(*words).folder, tmp_path / "cut"
    for file in (tmp_path / "pids").iterdir():
        file.unlink()
    given = last((*TINY, *words, f"hydra.run.dir={folder}"))
    child = subprocess.Popen([sys.executable, "-c", COMMAND, "run", *given], cwd=importable, stdout=subprocess.DEVNULL)
    log = folder / "rounds.jsonl"
    while child.poll() is None and not (log.exists() and log.read_bytes().count(b"\n") >= 3):
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    pids = [int(file.name) for file in (tmp_path / "pids").iterdir()]
    assert len(pids) == 2
    patience = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < patience:
        time.sleep(0.01)
    assert not any(map(alive, pids))
    observer = Recorder()
    simulation.resume(folder, ["engine.workers=3"], observer)
    assert contents(folder) == contents(whole)
    assert observer.warnings == []
    assert "processes, 3 workers" in observer.plans[0]


SIGNALLED = """
import os, signal
from multiprocessing import active_children
import torch
from fedsim.engine.auto import make_engine
from test_workers import make_job, make_task

task, weights = make_task()
engine, _ = make_engine(task, "processes", cohort=7, threads=2, workers=2, block=2, inner="sequential")
out = [torch.empty(7, task.shared.size, dtype=task.dtype) for _ in range(2)]
engine.train(make_job(task, weights), out[0])
workers = active_children()
for worker in workers:
    os.kill(worker.pid, signal.SIGTERM)
engine.train(make_job(task, weights), out[1])
assert torch.equal(*out)
assert len(workers) == 2 and set(active_children()) == set(workers)
print(*(worker.pid for worker in workers))
"""


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_a_schedulers_signal_ends_no_worker_and_an_exit_ends_those_that_nobody_closed():
    done = subprocess.run(
        [sys.executable, "-c", SIGNALLED], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert not any(alive(int(pid)) for pid in done.stdout.split())


def test_devices_are_given_in_turn_and_change_nothing(run):
    one = run(*PROCESSES)
    two = run("engine=processes", "engine.devices=[cpu,cpu]", "engine.block=2", "engine.inner=sequential")
    assert contents(one.folder) == contents(two.folder)
    plan = json.loads((two.folder / "plan.json").read_text())
    assert plan["workers"] == 2
    assert plan["engine_arguments"] == {
        "inner": "sequential", "inner_arguments": {"channels_last": False}, "block": 2, "worker_threads": 1,
    }  # fmt: skip


class Local(nn.Linear):
    """A model that cannot be sent: it holds a function without a name."""

    def __init__(self):
        super().__init__(2, 5)
        self.also = lambda x: x

    def forward(self, x):
        return super().forward(x.flatten(1)[:, :2])


WRONG = {
    "engine.workers=0": "engine.workers must be an integer >= 1, got 0",
    "engine.block=0": "engine.block must be an integer >= 1, got 0",
    "engine.worker_threads=0": "engine.worker_threads must be an integer >= 1, got 0",
    "engine.inner=best": "engine.inner must be auto, sequential or vectorized, got 'best'",
    "engine.devices=0": r"engine.devices must be a list such as \[0,1\] or \[cpu\], got 0",
    "engine.devices=[77]": r"engine.devices: cuda:77 is not here; this machine has \d+ GPUs",
    "engine.devices=[tpu]": "engine.devices: no device is called 'tpu'",
    "engine.devices=[meta]": "engine.devices: meta is not of the run's kind, cpu",
    "+engine.inner_arguments.chunk=3": "engine.inner_arguments {'chunk': 3} need engine.inner to name an engine",
}


@pytest.mark.parametrize("word", WRONG)
def test_wrong_words_are_one_clear_line(word):
    with pytest.raises(UserError, match=WRONG[word]):
        build(compose([*TINY, "device=cpu", "engine=processes", word]))


def test_a_model_that_cannot_be_sent_is_one_clear_line(run):
    with pytest.raises(UserError, match=r"the model cannot be sent to workers \(.*lambda.*\); define it at the top"):
        run(*PROCESSES, model=Local())


def test_a_class_that_workers_cannot_import_is_one_clear_line(run, monkeypatch):
    # A module that exists in this process alone: what stands here is importable where the path has the root.
    monkeypatch.setitem(sys.modules, "here_alone", module := ModuleType("here_alone"))
    exec("from fedsim.clients.cross_entropy import CrossEntropy\nclass Here(CrossEntropy): pass", vars(module))
    with pytest.raises(RuntimeError, match=r"a worker cannot take the task \(.*\); its classes must stand in modules"):
        run(*PROCESSES, client=module.Here())


def test_the_table_of_blocks_knows_no_workers():
    blocks = {}
    for workers in (1, 3):
        engine = build(
            compose([*TINY, "engine=processes", "engine.inner=sequential", f"engine.workers={workers}"])
        ).engine
        blocks[workers] = dict(engine.plan)
        assert engine.workers == workers
    assert blocks[1] == blocks[3]
