"""`fedsim bench` measures one's own config on the engines that run it, and writes the winner where auto reads it."""

import json
from dataclasses import replace
from mmap import mmap
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fedsim import bench as module
from fedsim.bench import LEAST, MOST, Report, Side, bench
from fedsim.build import build
from fedsim.cli import main
from fedsim.config import compose
from fedsim.errors import UserError
from fedsim.peak import Peak

TINY = ["data=blobs", "model=logreg", "partition.num_clients=6", "threads=1", "metrics.per_client=false"]


@pytest.fixture(autouse=True)
def place(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "fedsim" / "engines.json"


@pytest.fixture
def few(monkeypatch):
    """Leave out workers, which take seconds to start."""
    monkeypatch.setattr(module, "ENGINES", {k: v for k, v in module.ENGINES.items() if k != "processes"})


@pytest.fixture(scope="module")
def report():
    return bench(compose(TINY), seconds=20.0)


def test_every_engine_that_runs_the_config_is_timed_and_agrees(report):
    named = [side.name for side in report.sides]
    assert named == list(module.ENGINES)
    for side in report.sides:
        assert len(side.seconds) >= LEAST
        assert side.seconds == [s for s in side.seconds if s > 0]
        # one round in float32; the engines' arithmetic differs in order only
        assert report._difference(side) < 1e-5
    assert {side.plan["engine"] for side in report.sides} >= {"sequential", "vectorized"}


def test_time_that_is_up_cuts_and_says_so(report, monkeypatch):
    sides = [Side("a", {}, loop=object(), warm=1.0), Side("b", {}, loop=object(), warm=2.0)]
    monkeypatch.setattr(module, "_round", lambda loop: 0.5)
    assert module._race(sides, 0.0, lambda _: None) is True
    assert [len(side.seconds) for side in sides] == [LEAST, LEAST]  # in any case
    auto = Side("auto", {}, plan={"engine": "sequential", "why": "as it is"})
    for side in sides:
        side.first = torch.ones(2)
    cut = replace(report, sides=sides, auto=auto, cut=True)
    assert cut.lines()[-1] == f"time was short: {LEAST} timed rounds an engine"
    assert not any("time was short" in line for line in replace(cut, cut=False).lines())


def test_the_table_says_what_auto_would_take_as_a_run_does(report):
    experiment = build(compose(TINY))
    experiment.engine.close()
    plan = experiment.plan
    assert f"engine=auto takes {plan['engine']} ({plan['why']})" in report.lines()


def test_figures_of_a_round_by_hand():
    # 6 clients a round, of 10 samples in steps of 4, twice: 3 steps a pass, all samples seen twice
    training = SimpleNamespace(batch_size=4, num_steps=lambda sizes: 2 * np.ceil(sizes / 4))
    task = SimpleNamespace(training=training, partition=SimpleNamespace(sizes=np.full(8, 10)))
    experiment = SimpleNamespace(task=task, participants=np.arange(8), cohort_size=6)
    assert module._samples(experiment) == 6 * 20
    side = Side("sequential", {}, seconds=[0.4, 0.1, 0.2], first=torch.ones(2), memory=3_000_000)
    report = Report(sides=[side], auto=Side("auto", {}, plan={"engine": "sequential", "why": "as it is"}),
                    clients=6, samples=120, situation="here", cut=False, rounding=1e-2)  # fmt: skip
    assert report.lines()[1].split() == ["sequential", "200.00", "30", "600", "3.0", "MB", "0e+00"]


def test_engines_that_differ_are_named(report):
    far = Side("other", {}, seconds=[1.0], first=2 * report.sides[0].first)
    # the same step twice as long: its difference is the step's own norm
    spoilt = replace(report, sides=[*report.sides, far])
    assert spoilt._difference(far) == pytest.approx(1.0)
    assert any(line.startswith("the first round of other differs") for line in spoilt.lines())
    assert not any("differs" in line for line in report.lines())


def test_what_does_not_run_says_why(few, monkeypatch):
    monkeypatch.setitem(module.ENGINES, "vectorized, fused", {"name": "vectorized", "kernels": "none such"})
    found = bench(compose(TINY), seconds=1.0)
    refused = {side.name: side.refusal for side in found.sides if side.refusal}
    assert list(refused) == ["vectorized, fused"]
    assert any(line.startswith("vectorized, fused: does not run: ") and "none such" in line for line in found.lines())


def test_an_engine_that_fails_leaves_the_others_to_be_measured(few, monkeypatch):
    original = module._round

    def fails(loop):
        if loop.experiment.engine.plan["engine"] == "sequential":
            raise ZeroDivisionError("so it is")
        return original(loop)

    monkeypatch.setattr(module, "_round", fails)
    found = bench(compose(TINY), seconds=1.0)
    assert found.sides[0].refusal == "ZeroDivisionError: so it is"
    assert found.best.seconds


def test_an_engine_that_is_asked_for_is_a_side_of_its_own():
    named = module._engines(compose([*TINY, "engine=vectorized", "engine.chunk=2"]))
    assert named["as given"] == {"name": "vectorized", "chunk": 2, "kernels": "auto", "graphs": False}
    assert "as given" not in module._engines(compose(TINY))


def test_slow_sides_are_left_out_where_time_is_short(monkeypatch):
    sides = [Side("a", {}, loop="a", warm=1.0), Side("b", {}, loop="b", warm=9.0)]
    monkeypatch.setattr(module, "_round", lambda loop: {"a": 1.0, "b": 8.0}[loop])
    assert module._race(sides, 5.0, lambda _: None) is False
    assert [len(side.seconds) for side in sides] == [MOST, 0]
    assert module._race(sides, 100.0, lambda _: None) is False
    assert [len(side.seconds) for side in sides] == [2 * MOST, MOST]


def test_a_first_round_that_only_started_workers_is_no_reason_to_leave_a_side_out(monkeypatch):
    sides = [Side("a", {}, loop=object(), warm=1.0), Side("b", {}, loop=object(), warm=9.0)]
    monkeypatch.setattr(module, "_round", lambda loop: 1.5)
    module._race(sides, 4.0, lambda _: None)
    assert [len(side.seconds) for side in sides] == [MOST, MOST]


def test_save_writes_what_auto_then_takes(few, place, capsys):
    assert main(["bench", *TINY, "--save"]) == 0
    out = capsys.readouterr().out
    (row,) = json.loads(place.read_text()).values()
    assert set(row["milliseconds"]) == set(module.ENGINES)
    best = min(row["milliseconds"], key=row["milliseconds"].get)
    assert row["engine"] == module.ENGINES[best]
    assert f"engine=auto takes {best} from now on ({place})" in out
    experiment = build(compose(TINY))
    experiment.engine.close()
    assert experiment.plan["why"] == f"measured on {row['measured']} by fedsim bench"
    assert experiment.plan["engine"] == row["engine"]["name"]


def test_without_save_nothing_is_written_and_no_run_folder_made(few, place, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", *TINY]) == 0
    assert not place.exists()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "part"), [(["resume=x"], "resume is for fedsim run"), (["model=mlpp"], "did you mean 'mlp'")]
)
def test_wrong_input(words, part, capsys):
    assert main(["bench", *words]) == 2
    assert part in capsys.readouterr().err


def test_a_config_that_no_engine_runs_is_one_line(few, monkeypatch):
    for name in list(module.ENGINES):
        monkeypatch.setitem(module.ENGINES, name, {"name": "vectorized", "kernels": "none such"})
    with pytest.raises(UserError, match="no engine runs this config"):
        bench(compose(TINY), seconds=0.0)


def test_peak_counts_what_is_let_go_again():
    with Peak("cpu") as peak:
        block = mmap(-1, 16 << 20)  # new pages: an allocator may have some that were resident before
        np.frombuffer(block, dtype=np.uint8)[:] = 1
        block.close()
    if peak.bytes is None:
        pytest.skip("this system does not tell a process's peak")
    assert 15 << 20 < peak.bytes < 64 << 20
