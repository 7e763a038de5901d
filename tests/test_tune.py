"""Tuning: what is tried, what is chosen and from what, what is said of it."""

import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest

from fedsim.errors import UserError
from fedsim.sweep import adaptive, grammar, search, tune
from fedsim.sweep.board import Board

SMALL = ("model=logreg", "partition.num_clients=4", "threads=1", "num_rounds=3")


class Ear(Board):
    def __init__(self):
        super().__init__()
        self.warned, self.opened, self.shown = [], [], []

    def warn(self, line):
        self.warned.append(line)

    def begin(self, total, done, at_once):
        super().begin(total, done, at_once)
        self.opened.append((total, done))

    def finish(self, means, keys):
        self.shown = list(means)


def task(*words):
    return tune.task_of(grammar.read(words, namespaces=tune.NAMESPACES))


# ---- what is tried


def test_a_grid_is_the_same_for_every_method():
    given = task("strategy=fedavg,fedld", "client.lr=0.1,0.3", "client.momentum=0,0.9", "seed=range(3)")
    assert [values for _, values in given.methods] == [{"strategy": "fedavg"}, {"strategy": "fedld"}]
    assert [overrides for overrides, _ in given.points] == [
        ("client.lr=0.1", "client.momentum=0"), ("client.lr=0.1", "client.momentum=0.9"),
        ("client.lr=0.3", "client.momentum=0"), ("client.lr=0.3", "client.momentum=0.9"),
    ]  # fmt: skip
    assert given.report_seeds == (0, 1, 2)
    trials = list(search.with_seeds(given.methods[1], given.points, (7, 8)))
    assert len(trials) == 8
    assert trials[1] == (
        ("strategy=fedld", "client.lr=0.1", "client.momentum=0", "seed=8"),
        {"strategy": "fedld", "client.lr": 0.1, "client.momentum": 0, "seed": 8},
    )


def test_each_combination_may_be_a_method():
    given = task(
        "strategy=fedavg,fedld", "partition.alpha=0.1,1", "client.lr=0.1,0.3", "tune.each=strategy,partition.alpha"
    )
    assert len(given.methods) == 4
    assert len(given.points) == 2
    assert given.report_seeds == (0,)
    assert len(task("client.lr=0.1,0.3").methods) == 1  # one method, the default one


def test_random_points_repeat_and_differ_by_seed():
    words = ("client.lr=tag(log,interval(0.01,1))", "client.local_epochs=int(interval(1,4))", "client.momentum=0,0.9")
    first, again = task(*words).points, task(*words).points
    assert first == again
    assert len(first) == 20
    assert first != task(*words, "tune.seed=1").points
    assert first[:5] == task(*words, "tune.trials=5").points  # a longer search tries the shorter one's points first
    rates = np.array([values["client.lr"] for _, values in task(*words, "tune.trials=400").points])
    assert rates.min() >= 0.01
    assert rates.max() <= 1
    # uniform in log: half of 400 below the geometric mean 0.1, within 4 standard deviations of a fair coin
    assert abs((rates < 0.1).mean() - 0.5) < 4 * math.sqrt(0.25 / 400)
    epochs = [values["client.local_epochs"] for _, values in task(*words, "tune.trials=400").points]
    assert {int(e) for e in epochs} == {1, 2, 3, 4}
    for k in range(1, 5):  # both ends as often as the middle
        assert abs(epochs.count(k) / 400 - 0.25) < 4 * math.sqrt(0.25 * 0.75 / 400)
    overrides, values = first[0]
    assert f"client.lr={values['client.lr']}" in overrides


def test_random_search_of_lists_does_not_repeat():
    words = ("client.lr=0.1,0.2,0.3", "client.momentum=0,0.5,0.9", "tune.search=random")
    five = task(*words, "tune.trials=5").points
    assert len({overrides for overrides, _ in five}) == 5
    assert len(task(*words).points) == 9  # all there are


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["strategy=fedavg,fedld"], "nothing to tune"),
        (["client.lr=0.1,0.3", "seed=1000,1"], "seed 1000 is in seed= and in tune.seeds"),
        (["client.lr=0.1,0.3", "seed=5", "tune.seeds=5"], "seed 5 is in"),
        (["client.lr=0.1,0.3", "tune.each=strategy"], "strategy has not several values"),
        (["client.lr=0.1,0.3", "tune.trials=3"], "tune.trials is for tune.search=random"),
        (["client.lr=interval(0.1,1)", "tune.search=grid"], "client.lr: a grid needs a list"),
        (["client.lr=0.1,0.3", "tune.metric=accuracy"], "tune.metric must be one of validation_accuracy"),
        (["client.lr=0.1,0.3", "tune.seeds=1,1"], "tune.seeds must be one or several different"),
        (["client.lr=0.1,0.3", "tune.trails=3"], "did you mean 'trials'"),
        (["client.lr=interval(0.1,1)", "tune.trials=0"], "tune.trials must be >= 1"),
        (["client.lr=interval(0.1,1)", "tune.seed=-1"], "tune.seed must be >= 0"),
    ],
)
def test_wrong_input_is_one_line(words, part):
    with pytest.raises(UserError, match=part):
        task(*words)


# ---- what is chosen


def rows(*values, metric="validation_accuracy"):
    return [{"state": "failed" if v is None else "done", **({} if v is None else {metric: v})} for v in values]


def test_a_score_is_a_mean_and_a_failure_is_the_worst():
    assert search.score(rows(0.5, 0.75), "validation_accuracy") == 0.625
    assert search.score(rows(0.9, None), "validation_accuracy") == -math.inf
    assert search.score(rows(0.9, None, metric="validation_loss"), "validation_loss") == math.inf
    assert search.score(rows(), "validation_accuracy") == -math.inf


@pytest.mark.parametrize(
    ("scores", "metric", "expected"),
    [
        ([0.5, 0.7, 0.6], "validation_accuracy", 1),
        ([0.5, 0.7, 0.6], "validation_loss", 0),
        ([0.7, 0.5, 0.7], "validation_accuracy", 0),  # the first of equals
        ([-math.inf, 0.1], "validation_accuracy", 1),
        ([math.inf, math.inf], "validation_loss", None),
        ([-math.inf], "validation_accuracy", None),
    ],
)
def test_the_best_is_the_first_of_the_best(scores, metric, expected):
    assert search.best(scores, metric) == expected


@pytest.mark.parametrize(
    ("value", "expected"), [(0.01, "lowest"), (0.1, None), (1.0, "highest")]
)  # fmt: skip
def test_a_grid_has_edges(value, expected):
    axes = grammar.read(["client.lr=0.1,0.01,1.0", "model=mlp,logreg"]).axes
    found = list(search.edges({"client.lr": value, "model": "mlp"}, axes, ()))
    assert found == ([] if expected is None else [("client.lr", value, expected)])


def test_one_value_and_words_have_no_edge():
    axes = grammar.read(["client.lr=choice(0.1)", "model=mlp,logreg", "client.nesterov=true,false"]).axes
    assert list(search.edges({"client.lr": 0.1, "model": "mlp", "client.nesterov": True}, axes, ())) == []


@pytest.mark.parametrize(
    ("word", "value", "expected"),
    [
        ("a=tag(log,interval(0.01,1))", 0.0125, "lowest"),  # log(1.25)/log(100) = 0.048
        ("a=tag(log,interval(0.01,1))", 0.0127, None),  # 0.052
        ("a=interval(0,1)", 0.0127, "lowest"),
        ("a=interval(0,1)", 0.96, "highest"),
        ("a=interval(0,1)", 0.94, None),
    ],
)
def test_an_interval_has_edges_in_its_scale(word, value, expected):
    found = list(search.edges({"a": value}, (), grammar.read([word]).intervals))
    assert [end for _, _, end in found] == ([] if expected is None else [expected])


def test_choose_takes_each_methods_own_rows():
    given = task("strategy=fedavg,fedld", "client.lr=0.1,0.2,0.3", "tune.seeds=7,8")
    found = rows(0.1, 0.2, 0.6, 0.6, 0.5, 0.4, 0.9, None, 0.1, 0.2, 0.3, 0.5)
    first, second = tune.choose(given, found)
    assert (first["values"], first["best"], first["score"]) == ({"strategy": "fedavg"}, {"client.lr": 0.2}, 0.6)
    assert (first["failed"], first["edges"]) == (0, [])
    assert (second["point"], second["failed"]) == (2, 1)  # the 0.9 beside a failure is not taken
    assert second["edges"] == ["strategy=fedld: client.lr=0.3 is the highest that was tried: the best may lie beyond"]
    (lost, _) = tune.choose(given, rows(*[None] * 6, *[0.5] * 6))
    assert (lost["point"], lost["best"], lost["score"], lost["edges"]) == (None, {}, None, [])


# ---- the whole of it


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two files of the same data; in the second the labels of the test samples are noise."""
    from sklearn.datasets import load_digits

    monkeypatch.chdir(tmp_path)
    x, y = load_digits(return_X_y=True)
    x, y = (x[:600] / 16).astype(np.float32), y[:600].astype(np.int64)
    split = {"x_train": x[:400], "y_train": y[:400], "x_test": x[400:]}
    np.savez("clean.npz", **split, y_test=y[400:])
    np.savez("noise.npz", **split, y_test=np.random.default_rng(0).permutation(y[400:]))
    return tmp_path


def test_noise_in_the_test_labels_changes_no_choice_and_no_weight(data):
    """And the search, cut off by a failure of the choice's file, goes on where it was."""
    words = [*SMALL, "data=npz", "strategy=fedavg,fedadam", "client.lr=0.1,0.5", "seed=0", "sweep.workers=2"]
    ears, folders = {}, {}
    for name in ("clean", "noise"):
        ears[name] = Ear()
        folders[name] = tune.tune([*words, f"data.path={name}.npz", f"hydra.sweep.dir={name}"], None, ears[name])
    results = {name: json.loads((folder / "tune.json").read_text()) for name, folder in folders.items()}
    for clean, noise in zip(results["clean"]["methods"], results["noise"]["methods"], strict=True):
        for name in ("values", "point", "best", "score"):
            assert clean[name] == noise[name]
        assert clean["report"]["accuracy"] != noise["report"]["accuracy"]  # the noise is there
    names = [path.parent.name for path in Path("clean/search").glob("*/model.safetensors")]
    assert len(names) == 4
    for part in (
        *(f"search/{name}" for name in names),
        *(f"report/{p.name}" for p in Path("clean/report").glob("*-*")),
    ):
        assert (
            Path(f"clean/{part}/model.safetensors").read_bytes() == Path(f"noise/{part}/model.safetensors").read_bytes()
        )

    budget = results["clean"]["budget"]
    assert budget == {"points": 2, "seeds": [1000], "runs": 2, "report_seeds": [0]}
    assert ears["clean"].opened == [(4, 0), (2, 0)]
    assert len(ears["clean"].warned) == 2  # of two values each is on the edge
    assert {row["strategy"]: row["search_trials"] for row in ears["clean"].shown} == {
        "fedavg": "2 × 1 seed", "fedadam": "2 × 1 seed",
    }  # fmt: skip
    chosen = results["clean"]["methods"][0]
    search_rows = json.loads(Path("clean/search/sweep.json").read_text())["trials"]
    best = max(search_rows[:2], key=lambda row: row["validation_accuracy"])
    assert chosen["best"] == {"client.lr": best["client.lr"]}
    assert chosen["score"] == best["validation_accuracy"]

    before = Path("clean/tune.json").read_bytes()
    ear = Ear()
    tune.tune(["resume=clean"], None, ear)
    assert ear.opened == [(2, 2)]  # nothing is searched again
    assert Path("clean/tune.json").read_bytes() == before


def test_a_method_that_always_fails_is_said_and_the_others_are_reported(data):
    words = [*SMALL, "data=npz", "data.path=clean.npz", "strategy=fedavg,krum", "client.lr=0.1,0.5", "fraction=0.5"]
    ear = Ear()
    with pytest.raises(
        RuntimeError, match=r"^strategy=krum: every trial of the search failed; again: fedsim tune resume=t$"
    ):
        tune.tune([*words, "sweep.workers=2", "hydra.sweep.dir=t"], None, ear)  # two participants: too few for Krum
    first, second = ear.shown
    assert (first["strategy"], first["runs"], first["failed"]) == ("fedavg", 1, 0)
    assert (second["strategy"], second["runs"], second["failed"]) == ("krum", 0, 2)
    assert json.loads(Path("t/search/sweep.json").read_text())["trials"][2]["error"].startswith("strategy: Krum needs")


def test_without_validation_data_there_is_nothing_to_choose_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"data\.validation=0"):
        tune.tune(["client.lr=0.1,0.3", "data.validation=0"], None, Ear())
    assert list(tmp_path.iterdir()) == []


# ---- adaptive search


class FakeRuns:
    """Scores points by a known function: accuracy is highest at lr = 0.03 and local_epochs = 3."""

    def __init__(self):
        self.calls, self.values = [], []

    def __call__(self, listed):
        self.calls.append(len(listed))
        self.values = [values for _, values in listed]
        return [{"state": "done", "validation_accuracy": self.accuracy(values)} for values in self.values]

    @staticmethod
    def accuracy(values):
        if values["strategy"] == "fedadam" and values["client.lr"] > 0.5:
            return None  # failed
        return 1 - 0.1 * abs(np.log10(values["client.lr"] / 0.03)) - 0.05 * abs(values["client.local_epochs"] - 3)


ADAPTIVE = ("strategy=fedavg,fedadam", "client.lr=tag(log,interval(0.001,1))", "client.local_epochs=1,3,9",
            "tune.search=optuna", "tune.trials=23", "tune.seeds=7,8")  # fmt: skip


def explored(*more):
    given, runs = task(*ADAPTIVE, *more), FakeRuns()
    points, found = adaptive.explore(given.tuning, given.methods, (given.axes, given.intervals), runs)
    return given, runs, points, found


def test_an_adaptive_search_gives_each_method_as_many_trials_and_learns():
    pytest.importorskip("optuna")
    given, runs, points, found = explored()
    assert given.num_points == 23
    assert runs.calls == [20, 40, 60, 80, 92]  # two methods × five points × two seeds, and the rest
    assert [len(mine) for mine in points] == [23, 23]
    assert points[0][:5] == points[1][:5]  # random ones, from one seed
    assert points[0][20:] != points[1][20:]
    first = FakeRuns.accuracy({"strategy": "fedavg", **points[0][0][1]})
    assert [row["validation_accuracy"] for row in found[:2]] == [first, first]
    (fedavg, fedadam) = tune.choose(given, found, points)
    assert fedavg["best"]["client.local_epochs"] == 3
    assert 0.01 < fedavg["best"]["client.lr"] < 0.1
    assert fedavg["overrides"] == ["client.local_epochs=3", f"client.lr={fedavg['best']['client.lr']}"]
    assert fedadam["score"] > 0.9
    late = np.mean([FakeRuns.accuracy({"strategy": "fedavg", **values}) for _, values in points[0][13:]])
    early = np.mean([FakeRuns.accuracy({"strategy": "fedavg", **values}) for _, values in points[0][:10]])
    assert late > early


def test_an_adaptive_search_repeats():
    pytest.importorskip("optuna")
    assert explored()[2] == explored()[2]
    assert explored()[2] != explored("tune.seed=3")[2]


def test_without_optuna_is_said(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim\[tune\]'"):
        explored()


def test_an_adaptive_search_runs_and_goes_on(tmp_path, monkeypatch):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    words = [*SMALL[:3], "num_rounds=1", "client.lr=interval(0.01,1)", "tune.search=optuna", "tune.trials=6",
             "tune.seeds=7", "seed=0", "hydra.sweep.dir=s", "sweep.workers=2"]  # fmt: skip
    folder = tune.tune(words, None, Ear())
    found = json.loads((folder / "tune.json").read_text())
    assert found["budget"]["points"] == 6
    names = [trial["trial"] for trial in json.loads((folder / "search" / "sweep.json").read_text())["trials"]]
    assert len(names) == 6
    assert found["methods"][0]["report"]["trials"] == 1
    (folder / "tune.json").unlink()  # as if it had been cut off: what is done is not done again, nor drawn otherwise
    ear = Ear()
    tune.tune(["resume=s"], None, ear)
    assert ear.opened[:2] == [(5, 5), (6, 6)]
    assert json.loads((folder / "tune.json").read_text())["methods"] == found["methods"]
