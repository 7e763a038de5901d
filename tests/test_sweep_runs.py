"""Sweeps as they run: worker processes, failures, kills, resume, and equality with runs alone."""

import io
import json
import os
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

from fedsim.errors import UserError
from fedsim.folder import locked
from fedsim.sweep import plan
from fedsim.sweep.board import Board
from fedsim.sweep.drive import sweep
from fedsim.sweep.pool import Job, Pool

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the workers are forked")

SMALL = ("model=logreg", "partition.num_clients=4", "threads=1")
FILES = ("rounds.jsonl", "clients.parquet", "model.safetensors", "partition.npz", "partition.png", "plan.json")

BOOM = """
import os, time
from pathlib import Path
from fedsim.contracts import LinearRule

class Boom(LinearRule):
    def __init__(self, what="no"):
        self.what = what
    def finish(self, mean, sums, state):
        if self.what == "slow" and not Path("mended").exists():
            time.sleep(0.05)
        if sums.cohort.round == 3 and not Path("mended").exists():
            if self.what == "raise":
                raise ArithmeticError("it is not a good day")
            if self.what == "die":
                os.kill(os.getpid(), 9)
            if self.what == "exit":
                raise SystemExit(3)
        return mean, state, {}
"""


class Ear(Board):
    """Keeps what it hears."""

    def __init__(self):
        super().__init__()
        self.said = []
        self.events = []

    def heard(self, event):
        self.events.append((event.kind, event.name))
        super().heard(event)

    def ended(self, row, seconds):
        self.events.append((row["state"], row["trial"]))
        super().ended(row, seconds)

    def warn(self, line):
        self.said.append(line)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    (tmp_path / "boom_rules.py").write_text(BOOM)
    (tmp_path / "my" / "strategy").mkdir(parents=True)
    (tmp_path / "my" / "strategy" / "boom.yaml").write_text("_target_: boom_rules.Boom\nwhat: 'no'\n")
    return tmp_path


def table(folder):
    return json.loads((Path(folder) / "sweep.json").read_text())["trials"]


def same_files(a, b, names=FILES):
    return [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()]


def test_trials_equal_a_run_alone_and_any_number_of_workers(here):
    """A worker that has done other trials gives the bytes of `fedsim run`: no global state leaks from run to run."""
    same = ("model=logreg", "threads=1", "num_rounds=3")
    words = [*same, "strategy=fedld,flower/fedmedian", "partition=dirichlet,label_noise"]
    one, two = (sweep([*words, f"sweep.workers={n}", f"hydra.sweep.dir=w{n}"], None, Ear()) for n in (1, 2))
    rows = table(one)
    assert [row["state"] for row in rows] == ["done"] * 4
    assert [row["partition"] for row in rows] == ["dirichlet", "label_noise"] * 2
    for row in rows:
        assert same_files(one / row["trial"], two / row["trial"]) == []
    own = ["run", *same, "strategy=flower/fedmedian", "hydra.run.dir=alone"]
    done = subprocess.run([sys.executable, "-m", "fedsim", *own], capture_output=True)
    assert done.returncode == 0, done.stderr
    assert same_files(one / rows[2]["trial"], Path("alone")) == []  # on data that noisy labels were made of before


def test_a_failed_trial_stops_nobody_and_resume_does_the_rest(here):
    ear = Ear()
    words = [*SMALL, "strategy=boom", "strategy.what=no,raise,die,exit", "num_rounds=4", "sweep.workers=2",
             "checkpoint.every=1", "hydra.sweep.dir=s"]  # fmt: skip
    with pytest.raises(RuntimeError, match=r"^3 of 4 trials failed; again: fedsim sweep resume=s$"):
        sweep(words, Path("my"), ear)
    rows = table("s")
    assert [row["state"] for row in rows] == ["done"] + ["failed"] * 3
    errors = [row["error"] for row in rows]
    assert errors[1] == "ArithmeticError: it is not a good day"
    assert errors[2] == "its process was killed by signal 9; was memory short?"
    assert errors[3] == "SystemExit: 3"
    log = (here / "s" / rows[1]["trial"] / "log.txt").read_text()
    assert "round 2/4" in log
    assert "Traceback" in log
    before = (here / "s" / rows[0]["trial"] / "summary.json").stat().st_mtime_ns

    (here / "mended").touch()
    ear = Ear()
    folder = sweep(["resume=s", "sweep.workers=2"], None, ear)
    assert [row["state"] for row in table(folder)] == ["done"] * 4
    assert sorted(name for kind, name in ear.events if kind == "begin") == [row["trial"] for row in rows[1:]]
    assert (here / "s" / rows[0]["trial"] / "summary.json").stat().st_mtime_ns == before
    mended, never = rows[1]["trial"], rows[0]["trial"]  # the same rule once nothing is raised
    assert same_files(folder / mended, folder / never, FILES[:5]) == []
    assert "round 3/4" in (folder / mended / "log.txt").read_text().split("Traceback")[1]  # not from the start
    assert "round 1/4" not in (folder / mended / "log.txt").read_text().split("Traceback")[1]

    ear = Ear()
    sweep(["resume=s"], None, ear)
    assert ear.events == []


def test_every_worker_has_its_own_gpu(here, monkeypatch):
    """Two GPUs on a machine that has none: what trials see is what they were given."""
    (here / "where.py").write_text(
        "import os\nfrom fedsim.contracts import LinearRule\n\n"
        "class Where(LinearRule):\n"
        "    def finish(self, mean, sums, state):\n"
        "        return mean, state, {'gpu': float(os.environ['CUDA_VISIBLE_DEVICES'])}\n"
    )
    (here / "my" / "strategy" / "where.yaml").write_text("_target_: where.Where\n")
    monkeypatch.setattr("fedsim.sweep.drive._gpus", lambda: ["3", "5"])
    words = [*SMALL, "strategy=where", "num_rounds=1", "seed=0,1", "hydra.sweep.dir=s"]
    ear = Ear()
    folder = sweep(words, Path("my"), ear)
    assert [row["state"] for row in table(folder)] == ["done"] * 2
    seen = [json.loads((folder / row["trial"] / "rounds.jsonl").read_text())["gpu"] for row in table(folder)]
    assert sorted(seen) == [3.0, 5.0]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["resume=nix"], "no such folder"),
        (["resume=.", "seed=1"], "keeps its trials"),
        (["resume=."], "is not the folder of a sweep"),
        (["seed=0,1", "sweep.worker=2"], "did you mean 'workers'"),
        (["seed=0,1", "sweep.workers=0"], "sweep.workers must be >= 1"),
        (["seed=0,1", "sweep.workers=1,2"], "sweep.workers must be an integer"),
        (["client.lr=interval(0.1,1)"], "fedsim tune"),
        (["seed=0,1", "device=cuda:1"], "gives each worker its GPU"),
        (["strategy=fedavgg,fedld"], "did you mean 'fedavg'"),
    ],
)
def test_wrong_input_is_found_before_any_trial(words, part, here):
    before = sorted(here.iterdir())
    with pytest.raises(UserError, match=part):
        sweep(words, None, Ear())
    assert sorted(here.iterdir()) == before


def test_a_trial_tells_its_rounds_now_and_then_and_every_warning(monkeypatch):
    from fedsim.sweep import worker

    clock = iter([0.0, 0.0, 0.0, 0.1, 0.1, 0.25, 0.25])  # the log looks at it too
    monkeypatch.setattr(worker.time, "monotonic", lambda: next(clock, 0.3))
    told, log = [], io.StringIO()
    reporter = worker.Reporter(log, lambda kind, content: told.append((kind, content)))
    reporter.start(9, 4)
    for number in (5, 6, 7):
        reporter.round({"round": number, "accuracy": 0.5, "loss": 1.0, "drift": 2.0})
    reporter.warn("client 3 is not finite")
    assert told[0] == ("start", {"total": 9, "done": 4})
    missing = {"validation_accuracy": None, "validation_loss": None}
    assert told[1] == ("round", {"round": 5, "accuracy": 0.5, "loss": 1.0, **missing})
    assert [content.get("round") for kind, content in told if kind == "round"] == [5, 7]
    assert told[-1] == ("warn", {"line": "client 3 is not finite"})
    assert log.getvalue().count("round ") == 3
    assert "warning: client 3 is not finite" in log.getvalue()


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (SystemExit(3), "SystemExit: 3"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (RuntimeError("first line\nsecond"), "first line"),
        (UserError("partition: too few samples"), "partition: too few samples"),
        (ValueError("a bug"), "ValueError: a bug"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_whatever_a_trial_raises_is_one_line(error, line, here, monkeypatch, capsys):
    from fedsim.sweep import worker

    def fail(*_):
        raise error

    told = []
    monkeypatch.setattr(worker, "_run", fail)
    worker._do(Job("0", str(here / "0"), (), None), types.SimpleNamespace(send=told.append))
    ((kind, name, content),) = told
    assert (kind, name, content["error"]) == ("failed", "0", line)
    assert "Traceback" in capsys.readouterr().err  # the log's, but for pytest's own streams


# ---- kills


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def workers(folder):
    """The processes that write trials of a sweep now."""
    locks = [Path(path).read_text() for path in folder.glob("*/.lock")]
    return [int(text) for text in locks if text and alive(int(text))]


def until(holds, seconds=120.0):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.02)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="looks for processes in /proc")
def test_no_worker_outlives_a_killed_sweep_and_its_bytes_are_as_never_killed(here):
    words = [*SMALL, "strategy=boom", "strategy.what=slow", "seed=0,1", "num_rounds=80", "checkpoint.every=4",
             "metrics.every=80", "metrics.clients_every=80", "sweep.workers=2"]  # fmt: skip
    folder = here / "s"
    command = [sys.executable, "-m", "fedsim", "sweep"]

    def under_way():
        return len(workers(folder)) == 2 and all(
            len(list(folder.glob(f"{n}-*/checkpoints/*.json"))) > 0 for n in (0, 1)
        )

    for how, given in (
        (signal.SIGINT, [*words, "hydra.sweep.dir=s", "--config-dir", "my"]),
        (signal.SIGKILL, ["resume=s", "sweep.workers=2"]),
    ):
        process = subprocess.Popen([*command, *given], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        until(under_way)
        theirs = workers(folder)
        process.send_signal(how)
        _, err = process.communicate(timeout=60)
        until(lambda theirs=theirs: not any(map(alive, theirs)), 10)
        if how is signal.SIGINT:
            assert process.returncode == 130
            assert err == "fedsim: interrupted; go on with: fedsim sweep resume=s\n"
            assert [row["state"] for row in table(folder)] == ["missing"] * 2
    (here / "mended").touch()  # from here on it does not dawdle
    sweep(["resume=s"], None, Ear())
    whole = sweep([*words, "hydra.sweep.dir=whole"], Path("my"), Ear())
    for row in table(whole):
        assert same_files(folder / row["trial"], whole / row["trial"]) == []


def test_a_second_sweep_of_the_folder_refuses(here):
    plan.save(plan.Plan(words=(), config_dir=None, threads=None, trials=()), Path("s"))
    with locked(Path("s")), pytest.raises(UserError, match="being written by another"):
        sweep(["resume=s"], None, Ear())


def test_the_pool_ends_its_workers(here):
    jobs = [Job(str(i), str(here / str(i)), (*SMALL, "num_rounds=1"), None) for i in range(2)]
    told = []
    with Pool([None, None]) as pool:
        pool.run(jobs, told.append)
        pids = [worker.process.pid for worker in pool._workers]
        pool.run([Job("2", str(here / "2"), (*SMALL, "num_rounds=1"), None)], told.append)
        assert [worker.process.pid for worker in pool._workers] == pids  # the same, warm
    assert not any(map(alive, pids))
    kinds = [event.kind for event in told if event.name == "2"]
    assert (kinds[0], kinds[-1], kinds.count("done")) == ("begin", "done", 1)
