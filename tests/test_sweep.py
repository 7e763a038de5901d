"""Sweeps: the grammar, the plan, the table, and what is said of them."""

import io
import json
import time

import pyarrow.parquet as pq
import pytest
from rich.console import Console

from fedsim.config import compose, parse
from fedsim.errors import UserError
from fedsim.report.runs import read as read_runs
from fedsim.saved import load
from fedsim.sweep import board, drive, grammar, plan, table
from fedsim.sweep.board import opening
from fedsim.sweep.drive import Machine
from fedsim.sweep.pool import Event


def axes(*words, **kwargs):
    return grammar.read(words, **kwargs).axes


# ---- grammar


@pytest.mark.parametrize(
    ("word", "texts", "values"),
    [
        ("strategy=fedavg,fedld", ("fedavg", "fedld"), ("fedavg", "fedld")),
        ("seed=range(3)", ("0", "1", "2"), (0, 1, 2)),
        ("seed=range(1,7,3)", ("1", "4"), (1, 4)),
        ("client.lr=1e-3,0.1", ("0.001", "0.1"), (0.001, 0.1)),
        ("client.lr=choice(1,2)", ("1", "2"), (1, 2)),
        ("data.path='a b','c,d'", ("'a b'", "'c,d'"), ("a b", "c,d")),
        ("model.hidden=[8],[8,4]", ("[8]", "[8,4]"), ([8], [8, 4])),
        ("client.clip_norm=null,1.0", ("null", "1.0"), (None, 1.0)),
        ("strategy=glob(flower/fedy*)", ("flower/fedyogi",), ("flower/fedyogi",)),
    ],
)
def test_an_axis_keeps_the_text_and_the_value(word, texts, values):
    words = grammar.read([word, "num_rounds=3"])
    (axis,) = words.axes
    assert (axis.key, axis.texts, axis.values) == (word.split("=")[0], texts, values)
    assert words.fixed == ("num_rounds=3",)


def test_what_is_the_sweeps_own_is_no_override():
    words = grammar.read(["sweep.workers=2", "hydra.sweep.dir=runs/x", "seed=1,2"])
    assert (words.own, words.folder, words.fixed) == ({"sweep": {"workers": 2}}, "runs/x", ())
    assert grammar.read(["resume=runs/x"]).resume == "runs/x"
    assert grammar.read(["device=cpu"]).fixed_value("device") == "cpu"
    assert grammar.read(["device=cpu"]).fixed_value("seed") is None


def test_an_interval_says_its_scale_and_its_kind():
    words = grammar.read(["a=interval(0.1,1)", "b=tag(log,interval(0.01,1))", "c=int(interval(1,9))"])
    assert words.intervals == (
        grammar.Interval("a", 0.1, 1.0, False, False),
        grammar.Interval("b", 0.01, 1.0, True, False),
        grammar.Interval("c", 1.0, 9.0, False, True),
    )


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["seed"], "sets nothing"),
        (["seed=range(3),5"], "either a list of values or one range"),
        (["seed=range(0)"], "gives seed no value"),
        (["seed=1,1"], "the value 1 twice"),
        (["seed=1", "seed=2,3"], "given twice"),
        (["seed=shuffle(range(3))"], "leave shuffle out"),
        (["strategy=glob(nix*)"], "gives strategy no value"),
        (["hydra.run.dir=x"], "hydra.sweep.dir"),
        (["sweep.workers=1,2", "seed=1"], None),
        (["sweep.workers=range(2)"], "takes one value"),
        (["a=interval(1,1)"], "low < high"),
        (["a=tag(log,interval(0,1))"], "above 0"),
    ],
)
def test_wrong_words_are_one_line(words, part):
    if part is None:  # a list is the setting's to refuse
        assert grammar.read(words).own["sweep"] == {"workers": [1, 2]}
        return
    with pytest.raises(UserError, match=part) as caught:
        grammar.read(words)
    assert "\n" not in str(caught.value)


def test_a_wrong_setting_of_the_sweep_is_named_in_its_own_words():
    with pytest.raises(UserError, match=r"^sweep has no setting 'workerz'; did you mean 'workers'\?$"):
        grammar.read(["sweep.workerz=2", "seed=1,2"]).settings(Machine, "sweep")
    with pytest.raises(UserError, match=r"^sweep\.workers must be an integer or null, got 'two'$"):
        grammar.read(["sweep.workers=two"]).settings(Machine, "sweep")


# ---- plan


def test_the_last_axis_runs_fastest_and_names_sort():
    points = plan.product(axes("strategy=fedavg,flower/krum", "partition.alpha=0.1,1", "seed=range(3)"))
    trials = plan.trials_of(points, ("num_rounds=3",), 2)
    assert len(trials) == 12
    assert trials[1].values == {"strategy": "fedavg", "partition.alpha": 0.1, "seed": 1}
    assert trials[1].overrides == ("num_rounds=3", "threads=2", "strategy=fedavg", "partition.alpha=0.1", "seed=1")
    assert trials[11].name == "11-flower-krum-alpha-1-seed-2"
    assert [t.name for t in trials] == sorted(t.name for t in trials)
    assert len({t.name for t in trials}) == 12


def test_a_name_is_a_folder_and_an_override_whatever_the_value_is():
    point = (("data.path='/x/y z;$(rm) α'",), {"data.path": "/x/y z;$(rm) α" + "long" * 99})
    (trial,) = plan.trials_of([point], (), None)
    assert trial.name.startswith("0-path-x-y-z-rm-long")
    assert len(trial.name) < 90
    assert trial.overrides == ("data.path='/x/y z;$(rm) α'",)


def test_one_trial_without_any_axis():
    (trial,) = plan.trials_of(plan.product(()), ("seed=3",), None)
    assert (trial.name, trial.overrides, trial.values) == ("0", ("seed=3",), {})


def test_the_plan_comes_back_as_it_was(tmp_path):
    trials = plan.trials_of(plan.product(axes("seed=range(2)", "model.hidden=[8],[8,4]")), ("num_rounds=3",), 1)
    whole = plan.Plan(words=("seed=range(2)",), config_dir=None, threads=1, trials=trials)
    plan.save(whole, tmp_path)
    assert plan.load(tmp_path) == whole


@pytest.mark.parametrize("text", [None, "{", "[]", '{"trials": [{"nix": 1}]}'])
def test_a_folder_that_is_no_sweep(tmp_path, text):
    if text is not None:
        (tmp_path / plan.FILE).write_text(text)
    with pytest.raises(UserError, match=r"is not the folder of a sweep|cannot be read"):
        plan.load(tmp_path)


def test_check_composes_a_sum_not_a_product(monkeypatch):
    asked = []
    monkeypatch.setattr(plan, "compose", lambda overrides, config_dir: asked.append(overrides))
    words = grammar.read(["num_rounds=3", "strategy=fedavg,fedld,krum", "seed=range(50)", "client.lr=interval(0.1,1)"])
    plan.check(words, None)
    first = ["num_rounds=3", "strategy=fedavg", "seed=0", "client.lr=0.1"]
    assert asked == [
        first,
        ["num_rounds=3", "strategy=fedld", "seed=0", "client.lr=0.1"],
        ["num_rounds=3", "strategy=krum", "seed=0", "client.lr=0.1"],
        ["num_rounds=3", "strategy=fedavg", "seed=49", "client.lr=0.1"],
    ]


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["strategy=fedavg,fedldd"], "did you mean 'fedld'"),
        (["seed=0,x"], "seed must be an integer"),
        (["partition.alhpa=0.1,1"], "did you mean 'alpha'"),
        (["num_rounds=range(0,5)"], "num_rounds must be >= 1"),
    ],
)
def test_check_finds_a_wrong_value_anywhere(words, part):
    with pytest.raises(UserError, match=part):
        plan.check(grammar.read(words), None)


def test_claim_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(plan.time, "strftime", lambda form: "2026-01-31|12-00-00-sweep")
    assert [str(plan.claim_folder(None, "sweep")) for _ in range(3)] == [
        f"outputs/2026-01-31/12-00-00-sweep{number}" for number in ("", "-2", "-3")
    ]
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    with pytest.raises(UserError, match="is not empty"):
        plan.claim_folder("full", "sweep")
    with pytest.raises(UserError, match="cannot be made"):
        plan.claim_folder("full/x/y", "sweep")


# ---- the machine


@pytest.mark.parametrize(
    ("settings", "gpus", "expected"),
    [
        ({}, [], [None, None, None]),
        ({"workers": 5}, [], [None] * 5),
        ({}, ["0", "1"], ["0", "1"]),
        ({"trials_per_gpu": 2}, ["0", "3"], ["0", "3", "0", "3"]),  # both GPUs work before one has two
        ({"workers": 3}, ["0", "1"], ["0", "1", "0"]),
    ],
)
def test_every_worker_sees_one_gpu(settings, gpus, expected, monkeypatch):
    monkeypatch.setattr(drive, "_gpus", lambda: gpus)
    monkeypatch.setattr(drive, "num_cores", lambda: 3)
    assert Machine(**settings).devices(cpu=False) == expected
    assert Machine(**settings).devices(cpu=True) == [None] * settings.get("workers", 3)


def test_gpus_that_are_hidden_stay_hidden(monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    assert drive._gpus() == ["5", "7"]
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert drive._gpus() == ["0", "1"]


@pytest.mark.parametrize(
    ("cores", "workers", "words", "threads"),
    [(8, 2, [], 4), (8, 3, [], 2), (2, 8, [], 1), (8, 1, [], None), (8, 2, ["threads=3"], None),
     (8, 2, ["threads=1,2"], None)],
)  # fmt: skip
def test_the_workers_together_have_a_thread_a_core(cores, workers, words, threads, monkeypatch):
    monkeypatch.setattr(drive, "num_cores", lambda: cores)
    assert drive.threads_for(workers, grammar.read(words)) == threads


@pytest.mark.parametrize("settings", [{"workers": 0}, {"trials_per_gpu": 0}])
def test_machine_checks_itself(settings):
    with pytest.raises(ValueError, match=f"{next(iter(settings))} must be >= 1"):
        Machine(**settings)


# ---- the table


def trial(number=0, **values):
    return plan.Trial(name=f"{number}-t", overrides=(), values=values)


def test_a_row_tells_done_failed_and_missing(tmp_path):
    one = trial(seed=3, alpha=0.1)
    assert table.row(one, tmp_path) == {
        "trial": "0-t", "state": "missing", "error": None, "seed": 3, "alpha": 0.1,
    }  # fmt: skip
    folder = tmp_path / "0-t"
    folder.mkdir()
    summary = {"status": "done", "accuracy": 0.5, "seed": 9, "seconds": {"total": 2.0}, "plan": {"engine": "x"},
               "choices": {"data": "digits"}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    row = table.row(one, tmp_path)
    assert row == {
        "trial": "0-t", "state": "done", "error": None, "seed": 3, "alpha": 0.1, "status": "done", "accuracy": 0.5,
        "seconds.total": 2.0,
    }  # fmt: skip
    assert table.row(one, tmp_path, "bad")["state"] == "failed"
    (folder / "summary.json").write_text("{")  # torn
    assert table.row(one, tmp_path)["state"] == "missing"


def test_means_are_over_seeds_of_done_trials():
    rows = [
        {"trial": str(i), "state": "done", "alpha": alpha, "seed": i, "accuracy": accuracy}
        for i, (alpha, accuracy) in enumerate([(0.1, 0.5), (0.1, 0.7), (0.1, 0.9), (1, 0.8)])
    ]
    rows.append({"trial": "4", "state": "failed", "alpha": 1, "seed": 4})
    first, second = table.means(rows, ["alpha", "seed"], ["accuracy", "loss"])
    assert (first["alpha"], first["trials"], first["failed"]) == (0.1, 3, 0)
    # Student's interval of three runs, as in `fedsim report`: t₀.₉₇₅,₂ = 4.302653 of printed tables, s = 0.2.
    assert first["accuracy"] == (pytest.approx(0.7), pytest.approx(4.302653 * 0.2 / 3**0.5, rel=1e-6))
    assert (second["trials"], second["failed"], second["accuracy"]) == (1, 1, (0.8, None))
    assert "loss" not in first


def test_parquet_holds_every_kind_of_value(tmp_path):
    rows = [{"a": 1, "b": 0.5, "c": [8, 4], "d": "x"}, {"a": 2.5, "b": None, "c": None, "d": 3, "e": True}]
    table.write_parquet(tmp_path, rows)
    assert pq.read_table(tmp_path / "sweep.parquet").to_pydict() == {
        "a": [1.0, 2.5], "b": [0.5, None], "c": ["[8, 4]", None], "d": ["x", "3"], "e": [None, True],
    }  # fmt: skip


# ---- on screen


def tell(shown):
    shown.begin(3, 1, 2)
    shown.heard(Event("begin", "1-b", {"folder": "x"}))
    shown.heard(Event("start", "1-b", {"total": 10, "done": 2}))
    shown.heard(Event("round", "1-b", {"round": 4, "accuracy": 0.25, "loss": 2.0}))
    shown.heard(Event("warn", "1-b", {"line": "careful [now]"}))


def test_lines(capsys):
    stream = io.StringIO()
    shown = board.Lines(stream)
    tell(shown)
    shown.ended({"trial": "1-b", "state": "done", "accuracy": 0.5, "loss": 1.25}, 2.0)
    shown.ended({"trial": "2-c", "state": "failed", "error": "no memory"}, None)
    shown.finish(
        [{"client.lr": 0.1, "trials": 2, "failed": 1, "accuracy": (0.5, 0.01)},
         {"client.lr": 1, "trials": 1, "failed": 0, "accuracy": (0.25, None)}], ["client.lr"],
    )  # fmt: skip
    lines = stream.getvalue().splitlines()
    assert lines[0] == "3 trials, 1 done already, 2 at a time"
    assert lines[1].startswith("[2/3]  1-b  accuracy 50.00 %  loss 1.2500  2.0 s  ")
    assert lines[1].endswith(" left")
    assert lines[2] == "[3/3]  2-c  failed: no memory"
    assert lines[3:] == [
        "client lr  trials  failed  accuracy",
        "0.1        2       1       50.00 ± 1.00 %",
        "1          1       0       25.00 %",
        "±: half of the 95 % interval over seeds (Student's t), as in fedsim report",
    ]
    assert capsys.readouterr().err == "warning: 1-b: careful [now]\n"


def test_the_live_table_shows_what_runs():
    stream = io.StringIO()
    shown = board.LiveTable(console=Console(file=stream, force_terminal=True, width=100, color_system=None))
    with shown:
        tell(shown)
        shown.running["1-b"].began -= 4.0
        shown.ended({"trial": "2-c", "state": "failed", "error": "no [memory]"}, None)
        drawn = Console(file=io.StringIO(), width=100)
        drawn.print(shown._draw())
        picture = drawn.file.getvalue()
    (running,) = [line for line in picture.splitlines() if "1-b" in line]
    assert running.split() == ["1-b", "running", "4/10", "25.00", "%", "12", "s", "left"]  # 4 s for two
    assert any(line.split()[:2] == ["2-c", "failed"] for line in picture.splitlines())
    assert "1/3 done" in picture
    assert "1 failed" in picture
    said = stream.getvalue()
    assert "2-c  failed: no [memory]" in said
    assert "warning: 1-b: careful [now]" in said


def test_a_person_is_sent_to_the_command_that_does_it(tmp_path):
    with pytest.raises(
        UserError, match=r"strategy=fedavg,fedld: a run takes one value of strategy; `fedsim sweep` takes"
    ):
        parse("strategy=fedavg,fedld")
    with pytest.raises(UserError) as caught:
        compose(["lr=0.1"])
    assert caught.value.__suppress_context__  # no traceback of Hydra's above the line
    (tmp_path / plan.FILE).write_text("{}")
    with pytest.raises(UserError, match=r"it is a sweep's: fedsim sweep resume="):
        load(tmp_path)


@pytest.mark.parametrize(
    ("file", "words", "said"),
    [
        ("trials.json", ["seed=1,2"], "its sweep ended early, go on with: fedsim sweep resume="),
        ("trials.json", ["seed=1", "replicas=3"], "its replicas ended early, go on with: fedsim run resume="),
        ("search/trials.json", ["client.lr=1,2"], "its search ended early, go on with: fedsim tune resume="),
    ],
)
def test_a_report_of_what_was_killed_early_names_the_command_that_goes_on(tmp_path, file, words, said):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(json.dumps({"words": words}))
    with pytest.raises(UserError, match=f"holds no runs: .*; {said}{tmp_path}$"):
        read_runs([tmp_path])


def test_one_is_not_several():
    assert opening(1, 0, 1) == "1 trial, 1 at a time"
    assert opening(2, 1, 2) == "2 trials, 1 done already, 2 at a time"


def test_the_time_left_counts_the_rounds_of_trials_that_run(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    shown = board.Board()
    shown.begin(4, 1, 2)  # one was done before
    assert shown.left == ""
    for name, done in (("b", 0), ("c", 5)):  # the second goes on from round 5
        shown.heard(Event("start", name, {"total": 10, "done": done}))
    assert shown.left == ""
    now[0] = 30.0
    shown.heard(Event("round", "b", {"round": 2}))
    shown.heard(Event("round", "c", {"round": 8}))
    # Half a trial (2 and 3 of 10 rounds) took 30 s; 8 and 2 rounds and a whole trial are left.
    assert shown.left == "2 min 0 s left"
    shown.ended({"trial": "b", "state": "failed"}, 1.0)
    now[0] = 60.0
    # 1.3 trials took 60 s; 2 rounds and a whole one are left.
    assert shown.left == "55 s left"
