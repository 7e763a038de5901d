"""The benchmarks' own arithmetic, their checks of the sides, and other frameworks' processes."""

import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch

from fedsim.contracts import Partition
from fedsim.local import LocalTraining

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module", autouse=True)
def _importable():
    """benchmarks/ is run from the repository's root and is no part of the package."""
    sys.path.insert(0, str(ROOT))
    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    threads = torch.get_num_threads()
    yield
    sys.path.remove(str(ROOT))
    torch.set_num_threads(threads)
    if before:
        os.sched_setaffinity(0, before)


def module(name):
    return importlib.import_module(f"benchmarks.{name}")


def tiny(clients=3, samples=20, *, sizes=None, cohort=None, batch_size=10):
    from fedsim.models.logreg import logreg
    from fedsim.models.parameters import initialise

    sizes = [samples] * clients if sizes is None else sizes
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(sum(sizes), 4, generator=generator)
    y = torch.randint(0, 3, (sum(sizes),), generator=generator)
    y[:3] = torch.arange(3)
    partition = Partition(np.arange(sum(sizes)), np.cumsum([0, *sizes]))
    training = LocalTraining(lr=0.1, batch_size=batch_size)
    model = initialise(lambda: logreg((4,), 3), 0)
    return module("workloads").Workload("tiny", model, x, y, partition, training, cohort or len(sizes))


def options(**given):
    return module("harness").Options(**given)


def test_sides_run_in_turn_and_warm_up_is_left_out():
    seen = []
    sides = {"a": lambda number: seen.append(("a", number)), "b": lambda number: seen.append(("b", number))}
    seconds = module("harness").race(sides, options(rounds=3), warm=2)
    assert seen == [(side, number) for number in range(1, 6) for side in "ab"]
    assert [len(values) for values in seconds.values()] == [3, 3]


def test_a_side_may_count_for_itself():
    side = type("Side", (), {"counts": True, "__call__": lambda self, number: 7.0 * number})()
    assert module("harness").race({"a": side}, options(rounds=2), warm=1) == {"a": [14.0, 21.0]}


@pytest.mark.parametrize(("peers", "rounds"), [(None, 3), (Path(), 7)])
def test_slow_rounds_are_fewer_without_peers(peers, rounds):
    assert len(module("harness").race({"a": lambda number: None}, options(peers=peers), budget=-1.0)["a"]) == rounds


def test_a_ratio_is_taken_round_by_round():
    # b/a = 2, 3, 1: median 2; of the medians alone it would be 4/2 = 2 too, of the means 19/7.
    table = module("harness").ratios({"a": [1.0, 2.0, 4.0], "b": [2.0, 6.0, 4.0]}, [("a", "b"), ("a", "absent")])
    assert table == {"a/b": {"median": 2.0, "q1": 1.5, "q3": 2.5, "low": 1.0, "high": 3.0}}


@pytest.mark.parametrize(("count", "left_out"), [(1, 0), (5, 0), (6, 0), (8, 0), (9, 1), (12, 2), (25, 7)])
def test_the_interval_of_a_median_is_the_tabled_one(count, left_out):
    # Conover, Practical Nonparametric Statistics, binomial at 1/2: e.g. n=9 misses by 2·(1 + 9)/512 = 0.039 < 0.05.
    found = module("harness").median_interval(list(range(count)))
    assert found == (left_out, count - 1 - left_out)


def test_every_id_names_a_function():
    for name, place in module("__main__").ALL.items():
        file, function = place.split(":")
        assert callable(getattr(importlib.import_module(file), function)), name


def test_a_benchmark_that_fails_leaves_the_others_and_the_file(tmp_path, monkeypatch, capsys):
    main = module("__main__")
    harness = module("harness")

    def good(options):
        return harness.compare({"a": lambda n: None, "b": lambda n: None}, [("a", "b")], options) | {
            "left_out": {"jax": "needs --peers DIR"}
        }

    def bad(options):
        raise RuntimeError("sides differ")

    monkeypatch.setattr(harness, "good", good, raising=False)
    monkeypatch.setattr(harness, "bad", bad, raising=False)
    monkeypatch.setattr(main, "ALL", {"X1": "benchmarks.harness:bad", "X2": "benchmarks.harness:good"})
    monkeypatch.setattr(sys, "argv", ["x", "--threads", "1", "--rounds", "2", "--json", str(tmp_path / "f.json")])
    with pytest.raises(SystemExit, match="failed: X1"):
        main.main()
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["X1"]["error"] == "RuntimeError: sides differ"
    assert found["X2"]["ratios"]["a/b"]["median"] > 0
    assert {"commit", "versions", "load", "peak_rss_mib", "threads"} <= found["machine"].keys()
    assert "left out: jax: needs --peers DIR" in capsys.readouterr().out


def test_engines_and_baselines_compute_the_same_update():
    training = module("training")
    result = training.compare(tiny(sizes=[20, 35, 10]), options(rounds=1), "tiny", warm=0)
    differences = result["relative_difference_to_tight_loop"]
    assert differences.keys() >= {"tight_loop", "sequential", "vectorized"}
    assert max(differences.values()) < 1e-5
    assert result["plans"]["vectorized"]["kernels"]
    assert "auto/tight_loop" in result["ratios"]


def test_the_hand_loop_computes_the_same_update():
    workloads, loops = module("workloads"), module("loops")
    work = workloads.b4(samples=20, cohort=2)
    exact = loops.TightLoop(work)(1)
    assert float((loops.HandLoop(work)(1) - exact).norm() / exact.norm()) < 1e-5


@pytest.mark.parametrize("wrong", [1.01, float("nan")])
def test_a_side_that_computes_something_else_is_refused(wrong):
    training = module("training")
    exact = torch.ones(5)
    with pytest.raises(RuntimeError, match="do not compute the same update"):
        training.check({"tight_loop": lambda n: exact, "other": lambda n: exact * wrong}, {})


def test_b3_is_what_it_says():
    work = module("workloads").b3()
    sizes = work.partition.sizes
    assert (len(sizes), sizes.min(), sizes.max(), work.cohort) == (3400, 16, 400, 100)
    assert not np.array_equal(work.clients(1), work.clients(2))
    assert (np.diff(work.clients(1)) > 0).all()
    assert float(work.weights(1).sum()) == pytest.approx(1)


def test_idle_samples_are_counted():
    # Batch 20: clients of 30 and 40 samples take two steps each; in the second, 10 samples fill the first row up.
    found = module("training").idle(tiny(sizes=[30, 40], batch_size=20))
    assert found["idle row-steps"] == 0
    assert found["idle samples"] == pytest.approx(10 / 80)


def test_a_whole_round_takes_the_engines_step():
    work = tiny()
    run = module("rounds").WholeRound(work, cohort=3)
    before = run.loop.weights.clone()
    run(1)
    exact = module("loops").TightLoop(work)(1)  # the run's seed is 0, and so is the workload's
    torch.testing.assert_close(run.loop.weights - before, exact, rtol=1e-4, atol=1e-6)
    run.close()


def test_a_rule_is_timed_against_one_read_of_the_matrix():
    aggregation = module("aggregation")
    result = aggregation.measure(["median", "nnm", "fedld", "scaffold"], 11, 2000, options(rounds=1))
    assert result["left_out"].keys() == {"scaffold"}  # it needs the clients' second uploads
    assert {f"{name}/{against}" for name in ("median", "nnm", "fedld") for against in ("limit", "gram")} == set(
        result["ratios"]
    )


def test_rules_are_told_how_many_attack_and_take_their_full_step():
    aggregation = module("aggregation")
    cohort = aggregation.draw(11, 500)
    f = 11 // 5
    ordered = cohort.rows.sort(dim=0).values[f : 11 - f].mean(0)
    torch.testing.assert_close(aggregation.rule_side("trimmed_mean", cohort)(1), ordered, rtol=1e-5, atol=1e-6)
    mean = cohort.rows.mean(0)  # which FedLD takes in a run's first round
    assert float((aggregation.rule_side("fedld", cohort)(1) - mean).norm() / mean.norm()) > 0.01


def test_wrappers_have_a_side_that_writes_their_rows():
    aggregation = module("aggregation")
    cohort = aggregation.draw(11, 500)
    rows = aggregation.rows_side("nnm", cohort)(1)
    nearest = torch.cdist(cohort.rows.double(), cohort.rows.double()).argsort(1)[:, : 11 - 11 // 5]
    torch.testing.assert_close(rows, cohort.rows[nearest].mean(1), rtol=1e-4, atol=1e-5)
    assert aggregation.rows_side("arc", cohort)(1).shape == (11, 500)


def test_a_pipeline_is_a_wrapper_around_the_rule_it_names():
    aggregation = module("aggregation")
    cohort = aggregation.draw(11, 500)
    rows, f = aggregation.rows_side("nnm", cohort)(1), 11 // 5
    mean = cohort.weights @ rows / cohort.weights.sum()
    torch.testing.assert_close(aggregation.rule_side("nnm+fedavg", cohort)(1), mean, rtol=1e-4, atol=1e-5)
    ordered = rows.sort(dim=0).values[f : 11 - f].mean(0)
    torch.testing.assert_close(aggregation.rule_side("nnm+trimmed_mean", cohort)(1), ordered, rtol=1e-4, atol=1e-5)


def test_sides_that_return_something_else_are_not_raced():
    aggregation = module("aggregation")
    cohort = aggregation.draw(11, 500)

    class Theirs:
        def __init__(self, update):
            self.update = lambda: update

        def __call__(self, number):
            return 0.1

    right = aggregation.rule_side("median", cohort)(1)
    part = aggregation._in_turn("median", Theirs(right * (1 + 1e-5)), "byzfl_median", cohort, options(rounds=1))
    assert part["figures"].keys() == {"median", "byzfl_median"}
    assert part["note"] == "byzfl_median: its result differs from that of median by 1.0e-05"
    with pytest.raises(aggregation.PeerError, match=r"differs from ours by 1\.0e-02"):
        aggregation._in_turn("median", Theirs(right * 1.01), "byzfl_median", cohort, options(rounds=1))
    aggregation._in_turn("krum", Theirs(right), "byzfl_krum", cohort, options(rounds=1))  # known to count otherwise


def test_b2s_file_gives_every_client_samples(tmp_path, monkeypatch):
    whole = module("whole")
    monkeypatch.setattr(whole, "NUM_SAMPLES", 5000)
    with np.load(whole.write_data(tmp_path / "b2.npz")) as arrays:
        counts = np.bincount(arrays["client_train"], minlength=whole.NUM_CLIENTS)
        assert len(counts) == whole.NUM_CLIENTS
        assert counts.min() >= 1
        assert counts.sum() == whole.NUM_SAMPLES


PEER = """
import sys
import numpy as np
import protocol
work = protocol.load(sys.argv[1])
print("a framework's chatter")
start = np.concatenate([part.ravel() for part in protocol.split(work)])
protocol.serve(lambda: start + np.float32(work["order"].sum()), "numpy")
"""


@pytest.fixture
def environments(tmp_path):
    (tmp_path / "fake" / "bin").mkdir(parents=True)
    python = tmp_path / "fake" / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return options(peers=tmp_path)


def test_another_frameworks_process_does_rounds_when_asked(environments, tmp_path):
    peer = module("peer")
    script, work = tmp_path / "script.py", tiny()
    script.write_text(PEER)
    with peer.peers_of(work, environments, {"side": ("fake", str(script))}) as (started, left_out):
        assert left_out == {}
        assert started["side"].about["versions"] == {"numpy": np.__version__}
        assert started["side"](1) >= 0
        torch.testing.assert_close(started["side"].update(), work.start + 60 * 59 / 2)
        process = started["side"]._process
    assert process.returncode == 0


def test_a_peer_that_cannot_run_is_left_out_by_name(environments, tmp_path):
    peer = module("peer")
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such rule')")
    wanted = {"broken": ("fake", str(script)), "absent": ("gone", str(script))}
    with peer.peers_of(tiny(), environments, wanted) as (started, left_out):
        assert started == {}
        assert "ended with code 1: no such rule" in left_out["broken"]
        assert "make.sh" in left_out["absent"]
    with peer.peers_of(tiny(), options(), wanted) as (started, left_out):
        assert left_out == dict.fromkeys(wanted, "needs --peers DIR")


RESULTS = {
    "machine": {
        "processor": "P", "threads": 2, "device": "cpu", "python": "3.11", "versions": {"torch": "2", "jax": None},
        "commit": "0123456789abcdef", "load": [0.5, 1, 1], "peak_rss_mib": 10.0,
    },
    "B4": {
        "title": "the dense case",
        "figures": {
            "loop": {"median_ms": 20.0, "q1_ms": 19.0, "q3_ms": 22.0, "min_ms": 18.0},
            "engine": {"median_ms": 10.0, "q1_ms": 9.0, "q3_ms": 11.0, "min_ms": 8.0},
            "auto": {"median_ms": 10.0, "q1_ms": 9.0, "q3_ms": 11.0, "min_ms": 8.0},
        },
        "ratios": {"engine/loop": {"median": 2.0, "q1": 1.9, "q3": 2.1}, "auto/loop": {"median": 2.0}},
        "plans": {"engine": {"engine": "vectorized", "kernels": "captured"}},
        "same_as": {"auto": "engine"},
        "left_out": {"jax": "needs --peers DIR"},
    },
    "B1": {"error": "RuntimeError: sides differ"},
    "after": {"load": [2.0, 1, 1], "peak_rss_mib": 20.0},
}  # fmt: skip


def test_figures_become_a_table():
    text = module("table").markdown(RESULTS)
    assert "commit 012345678" in text
    assert "Provisional" not in text
    assert "| side | ms a round | over loop | plan |" in text
    assert "| engine | 10 (9 – 11) | 2 (1.9 – 2.1) | vectorized captured |" in text
    assert "* auto took the same as engine." in text
    assert "* Left out: jax (needs --peers DIR)." in text
    assert "Failed: RuntimeError: sides differ" in text


def test_figures_of_a_busy_machine_are_marked():
    busy = RESULTS | {"machine": RESULTS["machine"] | {"load": [5.0, 1, 1]}}
    assert "Provisional: the machine was busy" in " ".join(module("table").markdown(busy).split())


def test_tables_go_between_the_marks_of_the_document():
    table = module("table")
    old = f"before\n{table.BEGIN}\nold\n{table.END}\nafter\n"
    assert table.into(old, "new") == f"before\n{table.BEGIN}\n\nnew\n{table.END}\nafter\n"
    with pytest.raises(ValueError, match="needs the lines"):
        table.into("no marks", "new")


def test_the_document_shows_the_loop_that_is_raced():
    loops, document = module("loops"), (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    source = textwrap.dedent(inspect.getsource(loops.TightLoop.__call__))
    assert source in document
    table = module("table")
    assert table.BEGIN in document
    assert table.END in document
    for name in ("B1", "B2", "B3", "B4", "B5", "B7", "B8", "overhead"):
        assert f"| {name} |" in document, name


def test_the_script_of_environments_parses():
    subprocess.run(["sh", "-n", str(ROOT / "benchmarks" / "peers" / "make.sh")], check=True)


@pytest.mark.parametrize("words", [(), ("strategy=median",)], ids=["streamed", "rows"])
def test_an_asynchronous_run_holds_versions_and_a_buffer_and_no_more(tmp_path, words):
    events = module("events")
    size = events.Size(clients=60, concurrency=24, buffer=8, rounds=12, hidden=900)
    loop = events.loop_of(size, tmp_path, "engine=sequential", *words)
    try:
        found = events.held(loop, size.rounds)
    finally:
        events._close(loop)
    assert max(versions for _, versions in found) > 4
    # Beside them three at most, however many clients there are: the module, the last step, one being made.
    assert all(versions < copies <= versions + size.buffer + 3 for copies, versions in found), found
