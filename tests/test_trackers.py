"""Trackers: told of everything, in order, and never in the way. Real packages are not needed: stand-ins are told."""

import doctest
import sys
import types
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

import fedsim
from fedsim import trackers
from fedsim.console import Observer
from fedsim.errors import UserError
from fedsim.metrics.records import RoundLog
from fedsim.simulation import resume
from fedsim.trackers import Tracker, measured, tracked


class Recorder(Tracker):
    """Keeps what it is told; raises in the method that it is told to."""

    def __init__(self, fails_in: str = "") -> None:
        self.calls: list[tuple] = []
        self.fails_in = fails_in

    def __getattribute__(self, name):
        if name not in {"open", "start", "plan", "round", "note", "warn", "finish", "close"}:
            return object.__getattribute__(self, name)

        def told(*arguments):
            self.calls.append((name, *arguments))
            if name == self.fails_in:
                raise ConnectionError("no network\nand more")

        return told

    def of(self, name):
        return [call[1:] for call in self.calls if call[0] == name]


class Listener(Observer):
    def __init__(self):
        self.warnings = []

    def warn(self, line):
        self.warnings.append(line)


def run(folder, **settings):
    return fedsim.simulate(**{"num_rounds": 3, "data": "blobs", "model": "logreg", "folder": folder} | settings)


def test_examples():
    assert doctest.testmod(trackers).failed == 0


def test_it_is_told_all_in_order(tmp_path):
    recorder = Recorder()
    result = run(tmp_path / "run", tracker=recorder)
    names = [call[0] for call in recorder.calls]
    assert names == ["open", "plan", "start", "round", "round", "round", "finish", "close"]
    ((folder, config),) = recorder.of("open")
    assert folder == tmp_path / "run"
    assert config["model"]["_target_"].endswith("logreg")
    assert recorder.of("start") == [(3, 0)]
    assert recorder.of("close") == [(None,)]
    for (row,), written in zip(recorder.of("round"), result.rounds, strict=True):
        for name, value in measured(row).items():
            if name != "seconds":
                assert value == written[name]
    assert recorder.of("finish")[0][0]["accuracy"] == result.summary["accuracy"]


@pytest.mark.parametrize("method", ["open", "start", "round", "finish", "close"])
def test_one_that_fails_is_one_warning_and_the_run_is_the_same(method, tmp_path):
    plain, listener, recorder = run(tmp_path / "plain"), Listener(), Recorder(fails_in=method)
    result = run(tmp_path / "run", tracker=recorder, observer=listener)
    (warning,) = listener.warnings
    assert warning.startswith(f"tracker Recorder.{method} failed: ConnectionError: no network; it is told nothing more")
    assert recorder.calls[-1][0] == method
    for name in ("rounds.jsonl", "model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "plain" / name).read_bytes()
    assert result.summary["accuracy"] == plain.summary["accuracy"]


def test_close_hears_what_stopped_the_run():
    recorder = Recorder()
    with pytest.raises(KeyboardInterrupt), tracked(Observer(), recorder, Path("x"), {}):
        raise KeyboardInterrupt
    assert isinstance(recorder.of("close")[0][0], KeyboardInterrupt)


def test_measured_is_what_is_new_and_finite():
    row = {
        "round": 4, "accuracy": 0.5, "loss": 1.0, "evaluated": False, "lr": torch.tensor(0.25), "scores": torch.ones(3),
        "ece": None, "bad": float("nan"), "why": "text", "flag": True, "count": 3,
    }  # fmt: skip
    assert measured(row) == {"lr": 0.25, "count": 3.0}
    assert measured(row | {"evaluated": True}) == {"accuracy": 0.5, "loss": 1.0, "lr": 0.25, "count": 3.0}


# ---- the three that ship


@pytest.mark.parametrize(
    ("name", "package"),
    [("tensorboard", "torch.utils.tensorboard"), ("mlflow", "mlflow"), ("wandb", "wandb")],
)
def test_a_missing_package_is_one_clear_error_before_anything_is_written(name, package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UserError, match=rf"tracker={name} needs the package {name}: pip install 'fedsim\[{name}\]'"):
        run(tmp_path / "run", tracker=name)
    assert not (tmp_path / "run").exists()


class Writer:
    made: ClassVar[list["Writer"]] = []

    def __init__(self, folder, *, purge_step, flush_secs):
        self.folder, self.purge_step, self.scalars, self.texts, self.closed = folder, purge_step, [], [], False
        Writer.made.append(self)

    def add_scalar(self, name, value, step):
        self.scalars.append((name, value, step))

    def add_text(self, name, text):
        self.texts.append(text)

    def close(self):
        self.closed = True


def test_tensorboard(tmp_path, monkeypatch):
    fake = types.ModuleType("torch.utils.tensorboard")
    fake.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, fake.__name__, fake)
    monkeypatch.setattr(Writer, "made", [])
    result = run(tmp_path / "run", tracker="tensorboard")
    (writer,) = Writer.made
    assert (writer.folder, writer.purge_step, writer.closed) == (str(tmp_path / "run" / "tensorboard"), None, True)
    assert "num_rounds: 3" in writer.texts[0]
    losses = [(row["train_loss"], row["round"]) for row in result.rounds]
    assert [(value, step) for name, value, step in writer.scalars if name == "train_loss"] == losses
    resume(tmp_path / "run", ["num_rounds=4"], Observer())
    again = Writer.made[1]
    assert (again.purge_step, again.texts) == (4, [])  # rounds after the checkpoint are written anew
    assert {step for _, _, step in again.scalars} == {4}


class Store:
    """What of MlflowClient is used."""

    runs: ClassVar[dict[str, SimpleNamespace]] = {}

    def __init__(self, tracking_uri):
        self.uri = tracking_uri

    def get_experiment_by_name(self, name):
        return SimpleNamespace(experiment_id=name) if Store.runs else None

    def create_experiment(self, name):
        return name

    def search_runs(self, experiments, filter_string, max_results):
        return [run for run in Store.runs.values() if run.tags["fedsim.folder"] in filter_string]

    def create_run(self, experiment, tags, run_name):
        info = SimpleNamespace(run_id=run_name)
        Store.runs[run_name] = SimpleNamespace(info=info, tags=tags, params={}, metrics=[], status="RUNNING")
        return Store.runs[run_name]

    def update_run(self, run_id, status):
        Store.runs[run_id].status = status

    set_terminated = update_run

    def log_batch(self, run_id, params=(), metrics=()):
        assert len(params) <= 100
        assert len(metrics) <= 1000
        Store.runs[run_id].params |= dict(params)
        Store.runs[run_id].metrics += metrics


def test_mlflow(tmp_path, monkeypatch):
    fake, entities, exceptions = (types.ModuleType(f"mlflow{part}") for part in ("", ".entities", ".exceptions"))
    fake.MlflowClient, exceptions.MlflowException = Store, RuntimeError
    entities.Param, entities.Metric = lambda *pair: pair, lambda *parts: parts
    for module in (fake, entities, exceptions):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(Store, "runs", {})
    result = run(tmp_path / "run", tracker="mlflow")
    stored = Store.runs["run"]
    assert stored.status == "FINISHED"
    assert stored.params["model._target_"].endswith("logreg")
    assert stored.params["num_rounds"] == "3"
    losses = [(row["train_loss"], row["round"]) for row in result.rounds]
    assert [(value, step) for name, value, _, step in stored.metrics if name == "train_loss"] == losses
    assert [value for name, value, *_ in stored.metrics if name == "final.accuracy"] == [result.summary["accuracy"]]
    resume(tmp_path / "run", ["num_rounds=4"], Observer())
    assert len(Store.runs) == 1  # the same entry goes on
    assert max(step for *_, step in stored.metrics) == 4


def test_wandb(tmp_path, monkeypatch):
    told: list[tuple] = []

    def init(**settings):
        told.append(("init", settings))
        return SimpleNamespace(
            log=lambda figures, step: told.append(("log", figures, step)),
            summary=SimpleNamespace(update=lambda figures: told.append(("summary", figures))),
            finish=lambda exit_code: told.append(("finish", exit_code)),
        )

    fake = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    result = run(tmp_path / "run", tracker="wandb")
    settings = told[0][1]
    assert (settings["mode"], settings["resume"], settings["dir"]) == ("offline", "allow", str(tmp_path / "run"))
    assert settings["config"]["num_rounds"] == 3
    logged = [(figures["train_loss"], step) for kind, figures, step in (t for t in told if t[0] == "log")]
    assert logged == [(row["train_loss"], row["round"]) for row in result.rounds]
    assert told[-2][1]["accuracy"] == result.summary["accuracy"]
    assert told[-1] == ("finish", 0)
    resume(tmp_path / "run", ["num_rounds=4"], Observer())
    assert [t[1]["id"] for t in told if t[0] == "init"] == [settings["id"]] * 2
    with pytest.raises(UserError, match="mode is offline or online, got 'disabled'"):
        fedsim.simulate("tracker=wandb", "tracker.mode=disabled", folder=tmp_path / "other")


def test_the_tracker_may_change_on_resume(tmp_path):
    run(tmp_path / "run")
    resume(tmp_path / "run", ["num_rounds=4", "tracker=none"], Observer())
    assert [row["round"] for row in RoundLog.read(tmp_path / "run" / "rounds.jsonl")] == [1, 2, 3, 4]
