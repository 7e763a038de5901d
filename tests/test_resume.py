"""Runs that are killed with SIGKILL in the middle of anything, and go on: their files are those of a whole run.

A child process runs the experiment and is killed when rounds.jsonl shows a given round, so at a moment that the
machine's load decides but the clock does not: between a row and its checkpoint, within a checkpoint, within a round.
What comes out must not depend on it.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
from safetensors import SafetensorError

from fedsim import simulation
from fedsim.config import compose
from fedsim.console import Observer

pytestmark = pytest.mark.skipif(not hasattr(os, "kill") or os.name == "nt", reason="SIGKILL is POSIX's")

BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")

# Slow enough a round (some 10 ms) that a kill lands inside; checkpoints in every third round, so that rows lie ahead
# of the newest checkpoint when the kill comes.
BASE = (
    "data=blobs", "data.num_samples=600", "partition.num_clients=10", "model=mlp", "num_rounds=24",
    "checkpoint.every=3", "metrics.every=2", "metrics.clients_every=2", "threads=1",
)  # fmt: skip

OBJECTIVE = """
from dataclasses import dataclass
import torch
from fedsim.clients.cross_entropy import CrossEntropy

@dataclass(frozen=True)
class Remembering(CrossEntropy):
    '''Holds a client near the mean of all that it ever sent: state of the client's own.'''

    def init_client(self, layout):
        return {"mean": torch.zeros(layout.size), "visits": torch.zeros(())}

    def direction(self, grads, params, context):
        mean = context.layout.split(context.client_state["mean"])
        seen = (context.client_state["visits"] > 0).float()
        return {n: g + 0.1 * seen * (params[n] - mean[n]) for n, g in grads.items()}, {}

    def finish(self, params, context):
        visits = context.client_state["visits"] + 1
        mean = context.client_state["mean"]
        return {"mean": mean + (context.layout.join(params) - mean) / visits, "visits": visits}, {}, None
"""

RUNS = {
    "fedld": ((5, 13), "strategy=fedld", "partition.alpha=0.1"),
    "fedadam": ((8,), "strategy=fedadam", "sampler=power_of_choice"),
    "flower/fedadam": ((5,), "strategy=flower/fedadam", "partition=iid"),
    "stateful client": ((4, 11), "client._target_=remembering.Remembering", "client.momentum=0.5"),
    "personal heads": ((7,), "model.local=head", "client.lr_decay=0.9"),
}
"""After which rounds each run is killed: first itself, then its resumption; and its settings."""


class Warnings(Observer):
    def __init__(self):
        self.lines = []

    def warn(self, line):
        self.lines.append(line)


@pytest.fixture
def importable(tmp_path, monkeypatch):
    """A folder of the user's own with an objective in it, importable here and in children."""
    (tmp_path / "remembering.py").write_text(OBJECTIVE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    yield tmp_path
    sys.modules.pop("remembering", None)


CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from fedsim import simulation
from fedsim.config import compose
from fedsim.console import Observer
simulation.draw = lambda *_, **__: None
if sys.argv[2] == "run":
    simulation.run(compose(sys.argv[3:]), Observer())
else:
    simulation.resume(Path(sys.argv[3]), [], Observer())
"""


def killed(importable, folder, round, *words):
    """Start a child and kill it once rounds.jsonl has `round` complete rows; say whether the kill came in time."""
    log = folder / "rounds.jsonl"
    child = subprocess.Popen([sys.executable, "-c", CHILD, str(importable), *words], stderr=subprocess.PIPE)
    try:
        while child.poll() is None:
            if log.exists() and log.read_bytes().count(b"\n") >= round:
                child.send_signal(signal.SIGKILL)
                break
            time.sleep(0.0005)
        _, errors = child.communicate()
    finally:
        child.kill()
    assert child.returncode in (-signal.SIGKILL, 0), errors.decode()
    return child.returncode != 0


def contents(folder):
    return {name: (folder / name).read_bytes() for name in BYTES}


@pytest.mark.parametrize("name", RUNS)
def test_killed_runs_go_on_to_the_same_bytes(importable, name):
    (first, *later), *own = RUNS[name]
    settings = [*BASE, *own]
    whole = importable / "whole"
    simulation.run(compose([*settings, f"hydra.run.dir={whole}"]), Observer())
    folder = importable / "killed"
    assert killed(importable, folder, first, "run", *settings, f"hydra.run.dir={folder}")
    for round in later:  # beyond a checkpoint that the resumed run itself wrote
        assert killed(importable, folder, round, "resume", str(folder))
    assert (folder / "rounds.jsonl").read_bytes().count(b"\n") < 24
    assert not (folder / "summary.json").exists()
    heard = Warnings()
    simulation.resume(folder, [], heard)
    assert heard.lines == []  # the plan is the first run's
    assert contents(folder) == contents(whole)
    assert len((whole / "rounds.jsonl").read_bytes().splitlines()) == 24


def test_a_kill_before_the_first_row(importable):
    settings = [*BASE[:4], "num_rounds=12", *BASE[-4:], "strategy=fedadam"]
    whole, folder = importable / "whole", importable / "killed"
    simulation.run(compose([*settings, f"hydra.run.dir={whole}"]), Observer())
    words = [sys.executable, "-c", CHILD, str(importable), "run", *settings, f"hydra.run.dir={folder}"]
    child = subprocess.Popen(words, stderr=subprocess.DEVNULL)
    while not (folder / "plan.json").exists():
        assert child.poll() is None
        time.sleep(0.0005)
    child.kill()
    child.wait()
    heard = Warnings()
    simulation.resume(folder, [], heard)
    assert heard.lines == []
    assert contents(folder) == contents(whole)


# --- kills at moments that no signal would hit often enough --------------------------------------------------------


class Killed(BaseException):
    """Stands for SIGKILL at a line: nothing catches it but `finally`."""


MOMENTS = [
    ("fedsim.checkpoint.save", 2),  # a row that has no checkpoint yet, its clients' rows flushed
    ("fedsim.checkpoint.save_tensors", 2),
    ("fedsim.metrics.client_log.ClientLog.flush", 2),
    ("fedsim.metrics.records.RoundLog.append", 9),  # rounds and timings: between the two files of a round
    ("fedsim.metrics.client_log.ClientLog.append", 4),
    ("fedsim.metrics.client_log.ClientLog.merge", 1),
    ("fedsim.simulation._write_model", 1),
    ("fedsim.simulation.write_json", 2),  # summary.json; the first is plan.json
]


@pytest.mark.parametrize(("where", "nth"), MOMENTS, ids=[where for where, _ in MOMENTS])
def test_a_kill_at_any_line_that_writes(importable, monkeypatch, where, nth):
    settings = [*BASE[:3], "model=logreg", "num_rounds=8", *BASE[-4:], "strategy=fedadam"]
    whole, folder = importable / "whole", importable / "killed"
    simulation.run(compose([*settings, f"hydra.run.dir={whole}"]), Observer())
    target, _, name = where.rpartition(".")
    owner = owner_of(target)
    real, calls = getattr(owner, name), []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == nth:
            raise Killed
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying)
        with pytest.raises(Killed):
            simulation.run(compose([*settings, f"hydra.run.dir={folder}"]), Observer())
    assert not (folder / "summary.json").exists()
    simulation.resume(folder, [], Observer())
    assert contents(folder) == contents(whole)
    assert (folder / "summary.json").exists()


def owner_of(path):
    import importlib

    parts = path.split(".")
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError:
        return getattr(importlib.import_module(".".join(parts[:-1])), parts[-1])


def test_a_newest_checkpoint_that_is_torn_costs_its_rounds_only(importable):
    settings = [*BASE[:3], "model=logreg", "num_rounds=8", *BASE[-4:], "strategy=fedadam"]
    whole, folder = importable / "whole", importable / "torn"
    for run_dir in (whole, folder):
        simulation.run(compose([*settings, f"hydra.run.dir={run_dir}"]), Observer())
    newest = max((folder / "checkpoints").glob("*.safetensors"))
    newest.write_bytes(newest.read_bytes()[:-1])
    with (folder / "rounds.jsonl").open("ab") as log:
        log.write(b'{"round": 9, "accur')  # and a torn row
    simulation.resume(Path(folder), [], Observer())
    assert contents(folder) == contents(whole)


def test_no_space_left_loses_no_finished_round(importable, monkeypatch):
    import errno

    from fedsim import checkpoint

    settings = [*BASE[:3], "model=logreg", "num_rounds=8", *BASE[-4:], "strategy=fedadam"]
    whole, folder = importable / "whole", importable / "full"
    simulation.run(compose([*settings, f"hydra.run.dir={whole}"]), Observer())
    real, calls = safetensors.torch.save_file, []

    def full(tensors, path):
        calls.append(1)
        if len(calls) == 2:
            Path(path).write_bytes(b"\0" * 100)
            raise SafetensorError(f"Error while serializing: I/O error: No space left (os error {errno.ENOSPC})")
        real(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(safetensors.torch, "save_file", full)
        with pytest.raises(RuntimeError, match=r"no space left on the device of .*full.*fedsim run resume="):
            simulation.run(compose([*settings, f"hydra.run.dir={folder}"]), Observer())
    assert checkpoint.rounds(folder / "checkpoints") == [3]
    assert not list((folder / "checkpoints").glob("*.partial"))  # what was half-written would fill the disk
    simulation.resume(folder, [], Observer())
    assert contents(folder) == contents(whole)
