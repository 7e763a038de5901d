"""What must hold on an accelerator: `make gpu` runs this file on one; without one the same checks run small on the CPU.

The device "meta" has shapes and no values: whoever asks it for a value, or mixes it with the CPU, is found there
though no accelerator is at hand.
"""

import itertools
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim import catalogue
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.fedprox import FedProx
from fedsim.clients.moon import Moon
from fedsim.clients.scaffold import Scaffold
from fedsim.contracts import Partition
from fedsim.engine.chunk import Chunk
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.char_gru import char_gru
from fedsim.models.cnn import cnn
from fedsim.models.mlp import mlp
from fedsim.models.resnet import resnet8
from fedsim.peak import Peak

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses to be deterministic
GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES = np.array([7, 1, 20, 13, 4, 4])
N = int(SIZES.sum())
MODELS = {
    "mlp": (lambda: mlp((8,), 5, hidden=(6,)), lambda g: torch.randn(N, 8, generator=g)),
    "cnn": (
        lambda: cnn((1, 12, 12), 5, channels=(3, 4), hidden=6, dropout=(0.2, 0.3)),
        lambda g: torch.randn(N, 1, 12, 12, generator=g),
    ),
    "resnet8": (lambda: resnet8((3, 8, 8), 5), lambda g: torch.randn(N, 3, 8, 8, generator=g)),
    "char_gru": (
        lambda: char_gru((6,), 9, embedding=3, hidden=4),
        lambda g: torch.randint(0, 9, (N, 6), generator=g),
    ),
}
TRAININGS = {
    "sgd": LocalTraining(lr=0.2, batch_size=4, local_epochs=2, weight_decay=0.01),
    "momentum": LocalTraining(lr=0.1, batch_size=5, momentum=0.9, clip_norm=0.5),
    "adamw": LocalTraining(optimizer="adamw", lr=0.01, batch_size=4, weight_decay=0.1),
}
OBJECTIVES = {
    "cross_entropy": CrossEntropy,
    "fedprox": lambda: FedProx(proximal_mu=0.4),
    "moon": Moon,
    "scaffold": Scaffold,
}
ENGINES = {
    "sequential": Sequential,
    "fused": lambda task: Vectorized(task, kernels="fused", chunk=4, threads=2),
    "generic": lambda task: Vectorized(task, kernels="generic", chunk=4, threads=2),
}


@pytest.fixture(autouse=True)
def deterministic():
    """Raise where an operation's order of summation is left to the device."""
    strict = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(GPU)
    yield
    torch.use_deterministic_algorithms(strict[0], warn_only=strict[1])


def make_task(name="mlp", training="sgd", objective="cross_entropy", *, device=DEVICE, dtype=torch.float64):
    make, inputs = MODELS[name]
    torch.manual_seed(1)
    module, generator = make().to(dtype), torch.Generator().manual_seed(0)
    shared = Layout.of(dict(module.named_parameters()))
    loss = OBJECTIVES[objective]()
    first = loss.init_client(shared) if hasattr(loss, "init_client") else {}
    x = inputs(generator)
    task = Task(
        module=module.to(device),
        shared=shared,
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=loss,
        training=TRAININGS[training],
        x=x.to(device, dtype if x.is_floating_point() else x.dtype),
        y=torch.randint(0, 5, (N,), generator=generator).to(device),
        partition=Partition(np.random.default_rng(0).permutation(N), np.concatenate([[0], np.cumsum(SIZES)])),
        store=ClientStore(len(SIZES), {key: value.to(dtype) for key, value in first.items()}),
    )
    weights = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    return task, weights


def make_job(task, weights):
    clients = np.arange(len(SIZES))
    sent = {"control": torch.full_like(weights, 0.01)} if isinstance(task.objective, Scaffold) else {}
    return Job(
        clients=clients,
        received=np.zeros(len(clients), dtype=np.int64),
        models={0: weights},
        broadcasts={0: sent},
        buffers=weights.new_zeros(0),
        state=task.store.get(clients, task.device),
        round=1,
        key=1,
        lr=task.training.lr,
    )


def updates(kind, *what, **where):
    """Return a round's updates (K, D) on the CPU, and the losses."""
    task, weights = make_task(*what, **where)
    engine = ENGINES[kind](task)
    out = torch.empty(len(SIZES), task.shared.size, dtype=weights.dtype, device=weights.device)
    block = engine.train(make_job(task, weights), out)
    engine.close()
    return out.cpu(), block.extras["train_loss"].cpu()


WHAT = [
    *itertools.product(MODELS, ["sgd"], ["cross_entropy"]),
    *itertools.product(["mlp"], ["momentum", "adamw"], ["cross_entropy"]),
    *itertools.product(["mlp"], ["sgd"], ["fedprox", "moon", "scaffold"]),
]


def fits(kind, what):
    return kind != "fused" or what[2] != "moon"  # which has a loss of its own


EVERY = [(kind, what) for kind in ENGINES for what in WHAT if fits(kind, what)]


@pytest.mark.parametrize(
    ("kind", "what"), EVERY, ids=lambda value: "-".join(value) if isinstance(value, tuple) else value
)
def test_every_engine_trains_as_one_client_after_another_on_the_cpu_does(kind, what):
    exact, losses = updates("sequential", *what, device="cpu")
    rows, found = updates(kind, *what)
    # promise 3: 1e-9 in float64 between engines and devices
    torch.testing.assert_close(rows, exact, rtol=0, atol=1e-9 * float(exact.abs().max()))
    torch.testing.assert_close(found, losses, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ENGINES)
@pytest.mark.parametrize("name", MODELS)
def test_twice_the_same_bits(kind, name):
    one, two = (updates(kind, name, dtype=torch.float32)[0] for _ in range(2))
    assert torch.equal(one, two)


def on_meta(task, engine):
    """Move a built engine to a device without values."""
    moved = replace(task, x=task.x.to("meta"), y=task.y.to("meta"))
    engine.task = moved
    for _ in range(engine._lanes.qsize()):
        lane = engine._lanes.get()
        lane.task = moved
        if lane.fused:
            lane.rows.fixed = {name: value.to("meta") for name, value in lane.rows.fixed.items()}
        else:
            lane.model.module.to("meta")
        engine._lanes.put(lane)
    return moved


@pytest.mark.parametrize(
    ("kind", "what"),
    [(kind, what) for kind, what in EVERY if kind != "sequential"],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else value,
)
def test_a_cohort_trains_without_asking_the_device_for_a_value(kind, what):
    task, weights = make_task(*what, device="cpu")
    engine = ENGINES[kind](task)
    moved = on_meta(task, engine)
    weights = weights.to("meta")
    out = torch.empty(len(SIZES), task.shared.size, dtype=weights.dtype, device="meta")
    block = engine.train(make_job(moved, weights), out)
    engine.close()
    assert block.square_norms.device.type == "meta"
    with pytest.raises(RuntimeError):  # the device does notice
        float(block.square_norms[0])


@pytest.mark.parametrize("what", WHAT, ids="-".join)
def test_one_client_after_another_trains_without_asking_the_device_before_the_job_ends(what, monkeypatch):
    ends = []

    def sums(values, offsets):  # which checks its offsets: one question a job
        ends.append(len(offsets))
        return values.new_zeros(len(offsets) - 1)

    monkeypatch.setattr("fedsim.engine.client.segment_sums", sums)
    task, weights = make_task(*what, device="meta")
    out = torch.empty(len(SIZES), task.shared.size, dtype=weights.dtype, device="meta")
    block = Sequential(task).train(make_job(task, weights), out)
    assert block.square_norms.device.type == "meta"
    assert set(ends) == {len(SIZES) + 1}


def test_a_layer_whose_constant_stays_on_the_cpu_is_found_on_meta():
    layer = nn.Linear(3, 2).to("meta")
    with pytest.raises(RuntimeError):
        layer(torch.ones(1, 3))


def run(folder, *words, **settings):
    base = ["data=blobs", "model=mlp", "partition.num_clients=12", "threads=1", f"device={DEVICE}"]
    return fedsim.simulate(*base, *words, folder=folder, **settings)


class Cut(Exception):
    """The run is cut off here."""


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_a_run_that_was_cut_off_ends_with_the_same_bits(engine, tmp_path):
    from fedsim.console import Observer
    from fedsim.simulation import resume

    class Cuts(Observer):
        def round(self, row):
            if row["round"] == 3:
                raise Cut

    words = [f"engine={engine}", "num_rounds=5", "checkpoint.every=1", "strategy=fedadam"]
    whole = run(tmp_path / "whole", *words)
    with pytest.raises(Cut):
        run(tmp_path / "cut", *words, observer=Cuts())
    rest = resume(tmp_path / "cut", [], Observer())
    for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert (tmp_path / "whole/rounds.jsonl").read_bytes() == (tmp_path / "cut/rounds.jsonl").read_bytes()


STRATEGIES = [name for name in catalogue.options("strategy", catalogue.roots()) if not name.startswith("flower")]
ATTACKS = [name for name in catalogue.options("attack", catalogue.roots()) if name != "none"]
FEW = {"fedavg", "krum", "fedld", "alie", "gaussian"}  # the CPU runs all of them in other files


@pytest.mark.parametrize("strategy", [name for name in STRATEGIES if GPU or name in FEW])
def test_a_rule_runs_where_the_updates_are(strategy, tmp_path):
    words = [f"strategy={strategy}", "num_rounds=2", "dtype=float64", "partition.local_test=0.2"]
    there = run(tmp_path / "there", *words)
    here = run(tmp_path / "here", *words, device="cpu") if GPU else run(tmp_path / "here", *words, engine="sequential")
    for a, b in zip(there.model.parameters(), here.model.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b, rtol=1e-6, atol=1e-9)  # rules that select or vote may not differ either


@pytest.mark.parametrize("attack", [name for name in ATTACKS if GPU or name in FEW])
def test_an_attack_runs_where_the_updates_are(attack, tmp_path):
    result = run(tmp_path / "run", f"attack={attack}", "num_rounds=2", "strategy=median")
    assert result.summary["num_rounds"] == 2


def test_several_devices_train_as_one(tmp_path):
    words = ["num_rounds=2", "dtype=float64", "fraction=1.0"]
    devices = list(range(torch.cuda.device_count())) if GPU else ["cpu", "cpu"]
    one = run(tmp_path / "one", *words, "engine=sequential")
    many = run(
        tmp_path / "many", *words, "engine=processes", f"engine.devices={devices}".replace("'", "").replace(" ", "")
    )
    assert many.summary["plan"]["engine"] == "processes"
    for a, b in zip(one.model.parameters(), many.model.parameters(), strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu(), rtol=1e-9, atol=1e-12)


def test_memory_that_runs_out_halves_the_chunk_and_changes_no_bit(tmp_path, monkeypatch):
    words = ["engine=vectorized", "engine.chunk=6", "fraction=1.0", "num_rounds=2", "dtype=float64"]
    whole = run(tmp_path / "whole", *words)
    original = Chunk.train

    def train(self, out, block):
        if len(self.rows) > 3:
            raise torch.OutOfMemoryError("CUDA out of memory")
        original(self, out, block)

    monkeypatch.setattr(Chunk, "train", train)
    halved = run(tmp_path / "halved", *words)
    for a, b in zip(whole.model.parameters(), halved.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)  # chunks are other products, in float64
    assert halved.summary["plan"]["changes"]


def test_streaming_never_holds_the_matrix():
    torch.manual_seed(0)
    module = mlp((400,), 10, hidden=(1000,))
    count, shared = 64, Layout.of(dict(module.named_parameters()))
    task = Task(
        module=module.to(DEVICE),
        shared=shared,
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=CrossEntropy(),
        training=LocalTraining(lr=0.1, batch_size=4),
        x=torch.randn(count * 4, 400, device=DEVICE),
        y=torch.zeros(count * 4, dtype=torch.int64, device=DEVICE),
        partition=Partition(np.arange(count * 4), np.arange(count + 1) * 4),
        store=ClientStore(count, {}),
    )
    weights = torch.cat([p.detach().flatten().clone() for p in module.parameters()])
    clients = np.arange(count)
    engine = Vectorized(task, chunk=1, threads=1)
    trainer = Trainer(engine)
    job = Job(clients=clients, received=np.zeros(count, dtype=np.int64), models={0: weights}, broadcasts={},
              buffers=weights.new_zeros(0), state={}, round=1, key=1, lr=0.1)  # fmt: skip
    trainer.stream(job, lambda cohort: cohort.weights)
    with Peak(DEVICE) as peak:
        trainer = Trainer(engine)
        trainer.stream(job, lambda cohort: cohort.weights)
    engine.close()
    if peak.bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert peak.bytes < count * shared.size * 4 / 3  # the matrix would be 105 MB


@pytest.fixture
def benchmarks(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks import gpu, harness, loops, workloads

    return SimpleNamespace(gpu=gpu, harness=harness, loops=loops, workloads=workloads)


def test_a_graphed_loop_trains_as_the_tight_loop_does(benchmarks):
    work = benchmarks.gpu.Placed.at(DEVICE, benchmarks.workloads.b4(samples=12))  # batches of 10 and 2
    tight, graphed = benchmarks.loops.TightLoop(work), benchmarks.loops.GraphedLoop(work)
    for number in (1, 2):  # recorded, then replayed
        torch.testing.assert_close(graphed(number), tight(number), rtol=1e-5, atol=1e-7)
    assert list(graphed.graphs) == [(10, 2)]


def test_a_placed_workload_is_the_same_workload(benchmarks):
    work = benchmarks.workloads.b4(samples=12)
    placed = benchmarks.gpu.Placed.at(DEVICE, work)
    for mine, theirs in zip(placed.batches(3), work.batches(3), strict=True):
        assert [a.tolist() for a in mine] == [b.tolist() for b in theirs]
    assert torch.equal(placed.samples(3).cpu(), work.samples(3))


def test_the_benchmarks_of_a_gpu_run_small_and_fill_the_page(benchmarks):
    gpu = benchmarks.gpu
    result = {"ratios": {}, "figures": {}, "plans": {}, "left_out": {}}
    options = benchmarks.harness.Options(rounds=1)
    gpu._section(result, "B4", benchmarks.workloads.b4(samples=10), options, DEVICE, variants=True)
    result["notes"] = gpu._profile(benchmarks.workloads.b4(samples=10), DEVICE)
    result["figures"]["B1 end to end"] = gpu.end_to_end(DEVICE, 2, 1, 1, 10)
    result["machine"] = benchmarks.harness.machine()
    assert {"B4: auto", "B4: sequential bf16", "B4: plain_loop", "B4: limit"} <= set(result["figures"])
    assert result["ratios"]["B4: auto/plain_loop"]["median"] > 0
    text = gpu.page(result)
    assert all(f"| {name} |" in text for name in result["figures"] if name != "B1 end to end")
    assert "1 rounds of B1 end to end" in text


def test_a_side_that_computes_something_else_is_found(benchmarks):
    sides = {"plain_loop": lambda _: torch.ones(3), "auto": lambda _: torch.tensor([1.0, 1.0, 1.1])}
    with pytest.raises(RuntimeError, match="auto computes another update"):
        benchmarks.gpu._check(sides)
