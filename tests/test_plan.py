"""The plan decides the bits: a resumed run keeps it, names what it cannot keep, and halved chunks are part of it."""

import itertools
import json

import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedsim
from fedsim import plan as planning
from fedsim import simulation
from fedsim.backend import EngineBackend
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.engine import auto, vectorized
from fedsim.engine.halving import Halving
from fedsim.errors import UserError
from fedsim.loop import Loop
from fedsim.strategies.fedavg import FedAvg

BLOBS = (
    "data=blobs", "data.num_samples=120", "partition=iid", "partition.num_clients=8", "model=logreg", "fraction=1.0",
    "threads=1", "client.lr=0.1",
)  # fmt: skip
BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")


class Heard(Observer):
    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    count = itertools.count()

    def go(*overrides, observer=None, **settings):
        folder = tmp_path / f"run-{next(count)}"
        return fedsim.simulate(*overrides, observer=observer, folder=folder, **settings)

    return go


def resumed(result, *overrides):
    heard = Heard()
    return simulation.resume(result.folder, list(overrides), heard), heard.warnings


def contents(result):
    return {name: (result.folder / name).read_bytes() for name in BYTES}


def plan_of(result):
    return json.loads((result.folder / "plan.json").read_text())


# --- what is kept -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["auto", "sequential", "vectorized"])
def test_a_resumed_run_resolves_nothing_anew(run, monkeypatch, engine):
    """Every table and budget says something else by then: another machine's row, other constants, another version."""
    settings = (*BLOBS, f"engine={engine}", "strategy=fedadam")
    long = run(*settings, num_rounds=6)
    short = run(*settings, num_rounds=3)
    before = plan_of(short)
    monkeypatch.setattr(auto, "_by_table", None)
    monkeypatch.setattr(vectorized, "CHUNK_ROWS", {"cpu": 3, "cuda": 3})
    monkeypatch.setattr(planning, "block_rows", lambda engine: 1)
    monkeypatch.setattr(planning.CheckpointCost, "every", lambda self: 17)
    monkeypatch.setattr("fedsim.metrics.budget.evaluation_interval", lambda *_: 5)
    after, warnings = resumed(short, "num_rounds=6")
    assert warnings == []
    assert plan_of(after) == before == plan_of(long)
    assert contents(after)["model.safetensors"] == contents(long)["model.safetensors"]


def test_the_engine_is_made_from_the_plan(run, monkeypatch):
    result = run(*BLOBS, "engine=auto", num_rounds=2)
    plan = plan_of(result)
    assert plan["engine"] == "vectorized"
    plan["engine_arguments"] |= {"chunk": 3, "kernels": "generic"}
    (result.folder / "plan.json").write_text(json.dumps({**plan, "block_rows": 5, "threads": 1}))
    seen = []
    real = vectorized.Vectorized.train

    def spy(self, job, out):
        seen.append((self.chunk, len(job)))
        return real(self, job, out)

    monkeypatch.setattr(vectorized.Vectorized, "train", spy)
    _, warnings = resumed(result, "num_rounds=3")
    assert warnings == []
    assert seen == [(3, 5), (3, 3)]


def test_what_cannot_be_kept_is_named_once_and_written_down(run, monkeypatch):
    result = run(*BLOBS, num_rounds=2)
    old = plan_of(result)["versions"]["numpy"]
    monkeypatch.setattr(planning.np, "__version__", "9.9")
    _, warnings = resumed(result, "num_rounds=4")
    assert warnings == [f"the plan's versions.numpy was {old} and is 9.9: results may differ in the last bits"]
    assert plan_of(result)["changes"] == [{"round": 3, "versions.numpy": "9.9"}]
    assert plan_of(result)["versions"]["numpy"] == old
    assert resumed(result, "num_rounds=5")[1] == []
    monkeypatch.undo()
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    assert resumed(result, "num_rounds=6")[1] == [
        f"the plan's versions.numpy was 9.9 and is {old}: results may differ in the last bits"
    ]


def test_another_kind_of_device_takes_an_engine_of_its_own(run):
    result = run(*BLOBS, num_rounds=2)
    plan = plan_of(result)
    foreign = {**plan, "device": "NVIDIA H200", "engine": "sequential", "engine_arguments": {"channels_last": True}}
    (result.folder / "plan.json").write_text(json.dumps(foreign))
    _, warnings = resumed(result, "num_rounds=3")
    assert {line.split(" was ")[0] for line in warnings} == {
        "the plan's device", "the plan's engine", "the plan's engine_arguments",
    }  # fmt: skip
    assert resumed(result, "num_rounds=4")[1] == []


@pytest.mark.parametrize("text", [None, "", "{}", "[1]"])
def test_a_lost_plan_is_in_the_checkpoint_too(run, text):
    short, long = run(*BLOBS, num_rounds=2), run(*BLOBS, num_rounds=4)
    path = short.folder / "plan.json"
    whole = json.loads(path.read_text())
    path.unlink() if text is None else path.write_text(text)
    after, warnings = resumed(short, "num_rounds=4")
    assert warnings == []
    assert plan_of(after) == whole
    assert contents(after)["model.safetensors"] == contents(long)["model.safetensors"]


def test_a_folder_without_any_plan_is_refused(run):
    result = run(*BLOBS, num_rounds=1)
    (result.folder / "plan.json").write_text("{")
    for path in (result.folder / "checkpoints").iterdir():
        path.unlink()
    with pytest.raises(UserError, match=r"resume=.*plan\.json cannot be read"):
        resumed(result)


# --- rounds out of turn -------------------------------------------------------------------------------------------


def test_a_last_evaluation_out_of_turn_is_in_no_later_row(run):
    settings = (*BLOBS, "metrics.every=3", "metrics.clients_every=2", "partition.local_test=0.2")
    long, short = run(*settings, num_rounds=7), run(*settings, num_rounds=5)
    assert short.rounds[4]["evaluated"]
    assert short.rounds[4]["accuracy"] == short.summary["accuracy"]
    after, _ = resumed(short, "num_rounds=7")
    one, other = ((r.folder / "rounds.jsonl").read_bytes().splitlines() for r in (after, long))
    assert one[:4] + one[5:] == other[:4] + other[5:]
    assert after.rounds[4]["evaluated"]  # its own last evaluation stays
    assert not long.rounds[4]["evaluated"]
    trained = {name: value for name, value in after.rounds[4].items() if name in ("train_loss", "update_norm_mean")}
    assert trained == {name: long.rounds[4][name] for name in trained}
    tables = [pq.read_table(r.folder / "clients.parquet").to_pandas() for r in (after, long)]
    tables = [table[table["round"] != 5].reset_index(drop=True) for table in tables]
    assert tables[0].equals(tables[1])
    names = [name for name in long.summary if name not in ("seconds", "plan")]
    assert {n: repr(after.summary[n]) for n in names} == {n: repr(long.summary[n]) for n in names}


def test_a_finished_run_that_is_opened_again_says_the_same(run):
    result = run(*BLOBS, "metrics.every=3", num_rounds=5)
    again, _ = resumed(result)
    names = [name for name in result.summary if name not in ("seconds", "plan")]
    assert {n: repr(again.summary[n]) for n in names} == {n: repr(result.summary[n]) for n in names}


# --- a model that is not finite -----------------------------------------------------------------------------------


class Exploding(FedAvg):
    """Is FedAvg in round 1 and gives no numbers after."""

    def finish(self, mean, sums, state):
        delta, state, metrics = super().finish(mean, sums, state)
        return delta * (torch.nan if sums.cohort.round > 1 else 1.0), state, metrics


def test_the_last_good_model_has_the_buffers_of_its_own_round(run, tmp_path):
    def model():
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8), nn.Linear(8, 10))

    settings = ("partition=iid", "partition.num_clients=4")
    good = run(*settings, num_rounds=1, model=model, strategy=Exploding())
    with pytest.raises(RuntimeError, match="round 2: the new model is not finite"):
        run(*settings, num_rounds=3, model=model, strategy=Exploding())
    kept = load_file(tmp_path / "run-1" / "model.safetensors")
    first = load_file(good.folder / "model.safetensors")
    assert int(first["2.num_batches_tracked"]) > 0
    assert all(torch.equal(kept[name], first[name]) for name in first)


# --- versions -----------------------------------------------------------------------------------------------------


def test_numbers_sent_with_a_version_stay_with_it(tmp_path, monkeypatch):
    """Each round's config has a number of its own; whoever answers a version later trains with that version's."""
    real = EngineBackend.train

    def numbered(self, round, clients, models, broadcast, config):
        return real(self, round, clients, models, broadcast, {**config, "note": float(round)})

    monkeypatch.setattr(EngineBackend, "train", numbered)
    overrides = [*BLOBS, "mode=fixed_delay", "mode.delay=2", "devices=tiers", "strategy=median", "num_rounds=5"]
    loop = Loop(build(compose(overrides)), tmp_path, Observer())
    jobs, train = [], loop.experiment.engine.train
    loop.experiment.engine.train = lambda job, out: jobs.append(job) or train(job, out)
    loop.run()
    sent = {(version, sent["note"]) for job in jobs for version, sent in job.broadcasts.items()}
    assert any(len(job.broadcasts) > 1 for job in jobs)
    assert all(note == version + 1 for version, note in sent)


# --- out of memory ------------------------------------------------------------------------------------------------


def starve(monkeypatch, most, first=1):
    """Let chunks of more than `most` clients find no memory from a round on."""
    real = vectorized.Vectorized.train

    def train(self, job, out):
        if job.round >= first and self.chunk > most:
            out.fill_(torch.nan)  # as a kernel that was cut off leaves it
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(self, job, out)

    monkeypatch.setattr(vectorized.Vectorized, "train", train)


SCAFFOLD = "strategy=scaffold"


@pytest.mark.parametrize("strategy", ["strategy=fedavg", "strategy=krum", SCAFFOLD])
def test_a_starved_run_is_one_of_smaller_chunks(run, monkeypatch, strategy):
    settings = (*BLOBS, "engine=vectorized", strategy, "metrics.every=1")
    small = run(*settings, "engine.chunk=2", num_rounds=3)
    starve(monkeypatch, 2)
    heard = Heard()
    starved = run(*settings, "engine.chunk=8", num_rounds=3, observer=heard)
    assert contents(starved) == contents(small)
    assert plan_of(starved)["engine_arguments"]["chunk"] == 8
    assert plan_of(starved)["changes"] == [
        {"round": 1, "chunk": 4, "block_rows": 16}, {"round": 1, "chunk": 2, "block_rows": 8},
    ]  # fmt: skip
    assert [line.partition(":")[2] for line in heard.warnings] == [
        f" out of memory on the device; chunks of {n} clients from here on" for n in (4, 2)
    ]


def test_halved_chunks_hold_on_resume_from_their_round_on(run, monkeypatch):
    """Killed after the halving, before a checkpoint knows: the round is done again and halves though not starved."""
    settings = (*BLOBS, "engine=vectorized", "engine.chunk=8", "checkpoint.every=2", "metrics.every=1")
    never = run(*settings, num_rounds=6)
    with monkeypatch.context() as patch:
        starve(patch, 2, first=3)
        whole = run(*settings, num_rounds=6)
        short = run(*settings, num_rounds=3)
    assert [change["round"] for change in plan_of(short)["changes"]] == [3, 3]
    newest = max((short.folder / "checkpoints").glob("*.json"))
    newest.unlink()  # back to round 2
    chunks, real = [], vectorized.Vectorized.train

    def spy(self, job, out):
        chunks.append((job.round, self.chunk))
        return real(self, job, out)

    monkeypatch.setattr(vectorized.Vectorized, "train", spy)
    after, warnings = resumed(short, "num_rounds=6")
    assert warnings == []
    assert chunks[0] == (3, 2)
    assert {chunk for _, chunk in chunks} == {2}
    assert contents(after)["model.safetensors"] == contents(whole)["model.safetensors"]
    assert plan_of(after) == plan_of(whole) != plan_of(never)


def test_one_client_at_a_time_that_finds_no_memory_is_an_error():
    class Engine:
        chunk = 4

        class task:
            device = torch.device("cpu")

    tried, engine = [], Engine()

    def train():
        tried.append(engine.chunk)
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Halving(engine, 16, []).attempt(1, train)
    assert tried == [4, 2, 1]
    del Engine.chunk
    changes = []
    with pytest.raises(torch.OutOfMemoryError):  # an engine without chunks
        Halving(Engine(), 16, changes).attempt(1, lambda: (_ for _ in ()).throw(torch.OutOfMemoryError()))
    assert changes == []


def test_a_starved_attempt_leaves_nothing_of_itself(run, monkeypatch):
    """Starved in the third of three blocks: what two left in sums and clients counts for none."""
    blobs = (text.replace("num_clients=8", "num_clients=24") for text in BLOBS)
    settings = (*blobs, "engine=vectorized", SCAFFOLD, "metrics.every=1")
    small = run(*settings, "engine.chunk=1", num_rounds=2)
    real, calls = vectorized.Vectorized.train, []

    def train(self, job, out):
        calls.append((self.chunk, len(job)))
        block = real(self, job, out)
        if len(calls) == 3:
            raise torch.OutOfMemoryError
        return block

    monkeypatch.setattr(vectorized.Vectorized, "train", train)
    starved = run(*settings, "engine.chunk=2", num_rounds=2)
    assert calls == [(2, 8)] * 3 + [(1, 4)] * 12
    assert contents(starved) == contents(small)
