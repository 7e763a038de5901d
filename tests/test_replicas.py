"""Replicas: each run's numbers are those that it has alone, whatever the others do."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim import checkpoint, replicas, together
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Partition
from fedsim.engine.captured import Captured
from fedsim.engine.laid import Target
from fedsim.engine.meeting import Meeting
from fedsim.engine.replicas import Part, chunks_of, train_together, why_apart
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.report.runs import read
from fedsim.simulation import relaunch, resume
from fedsim.strategies import inversion
from fedsim.strategies.fedavg import FedAvg
from fedsim.sweep.board import Board
from fedsim.sweep.drive import sweep

SMALL = ("model=logreg", "partition.num_clients=6", "num_rounds=4", "threads=1", "checkpoint.every=1")
LONG = tuple(text.replace("num_rounds=4", "num_rounds=6") for text in SMALL)
FUSED = ("engine=vectorized", "engine.kernels=fused")
CAPTURED = ("engine=vectorized", "engine.kernels=captured")  # to the bit those of a run alone, on any machine
FILES = ("rounds.jsonl", "model.safetensors", "partition.npz")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- rows of several tasks


def problem(seed, sizes, **training):
    """Return a task of clients of some sizes, drawn by a seed from samples that all seeds share."""
    rng = np.random.default_rng(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)).double()
    with torch.no_grad():
        for i, p in enumerate(module.parameters()):
            p.copy_(torch.from_numpy(np.random.default_rng([seed, i]).normal(size=p.shape)))
    owners = Partition(rng.permutation(len(X))[: sum(sizes)], np.concatenate([[0], np.cumsum(sizes)]))
    task = Task(
        module=module, shared=Layout.of(dict(module.named_parameters())), local=Layout((), ()), buffers=Layout((), ()),
        objective=CrossEntropy(), training=LocalTraining(**{"batch_size": 4, "lr": 0.1, **training}), x=X, y=Y,
        partition=owners, store=ClientStore(len(sizes), {}), seed=seed,
    )  # fmt: skip
    start = torch.cat([p.detach().flatten() for p in module.parameters()])
    job = Job(
        clients=np.arange(len(sizes)), received=np.zeros(len(sizes), dtype=np.int64), models={0: start}, broadcasts={},
        buffers=torch.empty(0), state={}, round=1, key=1, lr=task.training.lr,
    )  # fmt: skip
    return task, job


X = torch.from_numpy(np.random.default_rng(1).normal(size=(200, 6)))
Y = torch.from_numpy(np.random.default_rng(2).integers(0, 3, 200))


def alone(task, job, **arguments):
    engine = Vectorized(task, threads=1, **arguments)
    out = torch.empty(len(job), task.shared.size, dtype=task.dtype)
    block = engine.train(job, out)
    engine.close()
    return out, block


def beside(problems, **arguments):
    engine = Vectorized(problems[0][0], threads=2, **arguments)
    outs = [torch.empty(len(job), task.shared.size, dtype=task.dtype) for task, job in problems]
    blocks = train_together(engine, [Part(*p, out, engine.chunk) for p, out in zip(problems, outs, strict=True)])
    engine.close()
    return list(zip(outs, blocks, strict=True))


@pytest.mark.parametrize("kernels", ["fused", "generic"])
@pytest.mark.parametrize("chunk", [2, 3, None])
def test_rows_of_several_runs_are_those_of_each_alone_to_the_bit(kernels, chunk):
    """All batches are full, so that no row is padded otherwise than it is alone."""
    problems = [problem(seed, [8, 12, 4, 8, 8]) for seed in (0, 1, 2)]
    for (task, job), (out, block) in zip(problems, beside(problems, kernels=kernels, chunk=chunk), strict=True):
        expected, its = alone(task, job, kernels=kernels, chunk=chunk)
        assert torch.equal(out, expected)
        assert torch.equal(block.square_norms, its.square_norms)
        assert torch.equal(block.extras["train_loss"], its.extras["train_loss"])
        assert torch.equal(block.weights, its.weights)
        assert torch.equal(block.num_steps, its.num_steps)


@pytest.mark.parametrize("training", [{}, {"momentum": 0.9}, {"optimizer": "adamw"}, {"clip_norm": 0.1}])
def test_unequal_batches_and_rates_change_the_last_bits_at_most(training):
    """A short batch is padded as its chunk asks for: sums over samples are longer by zeros, 1e-12 in float64."""
    sizes = ([5, 1, 9], [14, 2, 3, 7], [1, 1])
    problems = [problem(seed, own, lr=0.1 * (1 + seed % 2), **training) for seed, own in enumerate(sizes)]
    for (task, job), (out, _) in zip(problems, beside(problems), strict=True):
        expected, _ = alone(task, job)
        assert float((out - expected).norm() / expected.norm()) < 1e-12


def test_replicas_keep_their_own_versions_pulls_and_work():
    (a, job_a), (b, job_b) = problem(0, [8, 4, 8]), problem(1, [8, 8])
    other = job_a.models[0] + 1
    job_a = replace(
        job_a, received=np.array([0, 1, 1]), models={0: job_a.models[0], 1: other},
        broadcasts={0: {"proximal_mu": 0.5}, 1: {}}, work=np.array([1.0, 1.0, 0.5]),
    )  # fmt: skip
    both = beside([(a, job_a), (b, job_b)])
    for (out, block), (task, job) in zip(both, [(a, job_a), (b, job_b)], strict=True):
        expected, its = alone(task, job)
        assert torch.equal(out, expected)
        assert block.num_steps.tolist() == its.num_steps.tolist()


def test_full_chunks_are_those_of_a_run_alone_and_the_rest_is_shared_out():
    steps = [np.array([1, 3, 2, 9, 9]), np.array([5])]
    assert [c.tolist() for c in chunks_of(steps, 2, None)] == [[3, 4], [1, 2], [5, 0]]
    many = chunks_of([np.ones(10, dtype=np.int64)] * 10, 256, 16)  # 100 rows: four pieces
    assert [len(c) for c in many] == [25] * 4
    assert [len(c) for c in chunks_of([np.ones(3, dtype=np.int64)] * 4, 256, 16)] == [12]
    small = chunks_of([np.ones(10, dtype=np.int64)] * 10, 256, 50)  # of a model so small that calls cost more than rows
    assert [len(c) for c in small] == [50, 50]
    assert sorted(np.concatenate(many).tolist()) == list(range(100))


def test_a_target_is_the_rows_of_several_arrays():
    outs = [torch.zeros(2, 1), torch.zeros(3, 1)]
    target = Target(outs)
    inside = target.room(np.array([2, 3]))
    inside.fill_(7)
    target.put(np.array([2, 3]), inside)
    across = target.room(np.array([1, 2]))  # neighbours, but of two arrays
    across.copy_(torch.tensor([[1.0], [2.0]]))
    target.put(np.array([1, 2]), across)
    mixed = target.room(np.array([4, 0]))
    mixed.copy_(torch.tensor([[4.0], [5.0]]))
    target.put(np.array([4, 0]), mixed)
    assert outs[0].flatten().tolist() == [5, 1]
    assert outs[1].flatten().tolist() == [2, 7, 4]


@pytest.mark.parametrize(
    ("change", "what"),
    [
        (lambda t: replace(t, x=t.x.clone()), "samples"),
        (lambda t: replace(t, y=t.y.clone()), "samples"),
        (lambda t: replace(t, objective=object()), "objectives"),
        (lambda t: replace(t, training=LocalTraining(batch_size=5, lr=0.1)), "training"),
        (lambda t: replace(t, module=nn.Sequential(t.module)), "models"),
        (lambda t: replace(t, shared=Layout(t.shared.names[2:], t.shared.shapes[2:])), "models"),
    ],
)
def test_what_keeps_runs_apart(change, what):
    task, other = problem(0, [4])[0], problem(1, [4], lr=0.2)[0]
    assert why_apart(task, other) is None
    assert what in why_apart(task, change(other))


def test_frozen_parameters_that_differ_keep_runs_apart():
    (one, _), (two, _) = problem(0, [4]), problem(1, [4])
    rest = Layout(one.shared.names[1:], one.shared.shapes[1:])
    assert "frozen" in why_apart(replace(one, shared=rest), replace(two, shared=rest))


# ---- the meeting


class Counting(Vectorized):
    """Notes whose rows it trains at once."""

    seen: list

    def run(self, trainings):
        self.seen.append(len(trainings))
        super().run(trainings)


def meeting_of(engine, problems, rounds):
    """Let runs train some rounds each, and return the order in which they were let."""
    meeting, said = Meeting(), []

    def body(name, seat, job, start, last):
        for number in range(start, last + 1):
            said.append((name, number))
            seat.train(replace(job, round=number), torch.empty(len(job), seat.task.shared.size, dtype=X.dtype))

    bodies = []
    for name, ((task, job), (start, last)) in enumerate(zip(problems, rounds, strict=True)):
        seat = meeting.seat(engine, task)
        bodies.append(lambda n=name, s=seat, j=job, a=start, b=last: body(n, s, j, a, b))
    meeting.run(bodies)
    return said


def test_runs_meet_round_by_round_and_one_that_lags_catches_up():
    problems = [problem(0, [4, 4]), problem(1, [4])]
    engine = Counting(problems[0][0], threads=1)
    engine.seen = []
    said = meeting_of(engine, problems, [(3, 4), (1, 4)])  # the first goes on from round 3
    engine.close()
    assert said == [(0, 3), (1, 1), (1, 2), (1, 3), (0, 4), (1, 4)]
    assert len(engine.seen) == 4  # rounds 1 and 2 of the second, then 3 and 4 of both


def test_a_failure_is_of_the_run_that_it_belongs_to():
    task, job = problem(0, [4])
    bad, its = problem(1, [4])
    its = replace(its, models={7: its.models[0]})  # its rows ask for a version that is not there
    meeting, engine = Meeting(), Vectorized(task, threads=1)
    good, wrong = meeting.seat(engine, task), meeting.seat(engine, bad)
    seen = {}

    def go(name, seat, asked):
        try:
            seen[name] = seat.train(asked, torch.empty(1, task.shared.size, dtype=X.dtype))
        except KeyError as error:
            seen[name] = error

    meeting.run([lambda: go("good", good, job), lambda: go("bad", wrong, its)])
    engine.close()
    assert isinstance(seen["bad"], KeyError)
    assert torch.equal(seen["good"].square_norms, alone(task, job)[1].square_norms)


def test_a_replicas_clock_stands_still_while_others_train_and_has_its_share_of_common_training():
    class Slow(Vectorized):
        def run(self, trainings):
            time.sleep(0.4)
            return super().run(trainings)

    problems = [problem(0, [4]), problem(1, [4])]
    engine, meeting, took = Slow(problems[0][0], threads=1), Meeting(), []
    seats = [meeting.seat(engine, task) for task, _ in problems]

    def body(seat, job, idle):
        started = seat.now()
        time.sleep(idle)
        seat.train(job, torch.empty(1, seat.task.shared.size, dtype=X.dtype))
        took.append(seat.now() - started)

    began = time.perf_counter()
    jobs = [job for _, job in problems]
    meeting.run([lambda s=s, j=j, t=t: body(s, j, t) for s, j, t in zip(seats, jobs, (0.0, 0.3), strict=True)])
    whole = time.perf_counter() - began
    engine.close()
    assert sum(took) <= whole  # 0.7 s and what the machine adds; 0.3 more with the first one's waiting, 0.4 in full
    assert took[0] > 0.19  # half of the training
    assert took[1] > 0.49


def test_an_interrupt_unwinds_all_runs():
    """What stops the meeting itself, as Ctrl-C does, reaches each run where it waits."""

    class Interrupted(Vectorized):
        def run(self, trainings):
            raise KeyboardInterrupt

    problems = [problem(0, [4]), problem(1, [4])]
    engine, meeting, unwound = Interrupted(problems[0][0], threads=1), Meeting(), []

    def body(seat, job):
        try:
            seat.train(job, torch.empty(1, seat.task.shared.size, dtype=X.dtype))
        finally:
            unwound.append(seat)

    seats = [meeting.seat(engine, task) for task, _ in problems]
    with pytest.raises(KeyboardInterrupt):
        meeting.run([lambda s=s, j=j: body(s, j) for s, (_, j) in zip(seats, problems, strict=True)])
    engine.close()
    assert unwound == seats


def test_what_rules_compute_of_rows_is_computed_at_once_and_one_that_lags_catches_up():
    problems = [problem(0, [4]), problem(1, [4])]
    engine, meeting, at_once = Captured(problems[0][0], threads=1), Meeting(), []

    def solve(parts):
        at_once.append(parts)
        if "bad" in parts:
            raise ValueError("a part is wrong")
        return [10 * part for part in parts]

    def body(seat, name, rounds):
        for number in rounds:
            assert seat.solved(number, "key", solve, name) == 10 * name

    def fail(seat):
        with pytest.raises(ValueError, match="a part is wrong"):
            seat.solved(3, "key", solve, "bad")
        assert seat.solved(3, "other", lambda parts: parts, "apart") == "apart"

    seats = [meeting.seat(engine, task) for task, _ in [*problems, problems[0]]]
    meeting.run([lambda: body(seats[0], 1, (2, 3)), lambda: body(seats[1], 2, (1, 2, 3)), lambda: fail(seats[2])])
    engine.close()
    assert at_once == [[2], [1, 2], [1, 2, "bad"], [1], [2], ["bad"]]


UNSTALE = ["strategy=unstale", "strategy.iterations=4", "strategy.uniqueness=false", "partition=classes",
           "partition.num_clients=10", "partition.classes_per_client=1", "fraction=1", "model=logreg", "threads=1",
           "devices=intertwined", "mode=fixed_delay", "mode.delay=2", "num_rounds=4",
           "metrics.every=100"]  # fmt: skip


def test_inversions_of_replicas_are_those_of_runs_alone(here, monkeypatch):
    """To rounding: as many rows as all replicas have late clients are one program."""
    sizes, joined = [], inversion._joined
    monkeypatch.setattr(inversion, "_joined", lambda parts: sizes.append(len(parts)) or joined(parts))
    results = fedsim.simulate(*UNSTALE, replicas=3, folder="set")
    assert sizes == [3, 3]
    for seed, result in enumerate(results):
        own = fedsim.simulate(*UNSTALE, seed=seed, folder=f"alone{seed}")
        mine, theirs = (
            [json.loads(line)["inversion_disparity"] for line in (folder / "rounds.jsonl").read_text().splitlines()[2:]]
            for folder in (result.folder, own.folder)
        )
        assert mine == pytest.approx(theirs, rel=1e-3)
    assert sizes == [3, 3] + 6 * [1]


def test_a_replica_with_inversions_that_goes_on_alone_says_that_bits_may_differ(here):
    """Recorded steps have the same bits for any number of replicas, the rows of an inversion's program have not."""
    result = fedsim.simulate(*UNSTALE, *CAPTURED, replicas=2, folder="set")[0]
    assert plan_of(result.folder)["engine_arguments"]["kernels"] == "captured"
    ear = Ear()
    resume(result.folder, ["num_rounds=5"], ear)
    assert ear.warnings == ["the plan's replicas was 2 and is 1: results may differ in the last bits"]
    assert plan_of(result.folder)["changes"] == [{"round": 5, "replicas": 1}]


def test_recorded_steps_of_another_run_are_its_own_to_the_bit():
    problems = [problem(0, [5, 9, 3]), problem(1, [2, 14], lr=0.3)]
    engine = Captured(problems[0][0], threads=2)
    for task, job in problems:
        outs = [torch.empty(len(job), task.shared.size, dtype=X.dtype) for _ in range(2)]
        own = Captured(task, threads=1)
        blocks = [engine.begin(task, job, outs[0])(), own.train(job, outs[1])]
        own.close()
        assert torch.equal(*outs)
        assert torch.equal(blocks[0].extras["train_loss"], blocks[1].extras["train_loss"])
    engine.close()


# ---- runs


class Ear(Observer):
    """Keeps what it hears."""

    def __init__(self):
        self.rows, self.notes, self.warnings, self.finished = [], [], [], None

    def round(self, row):
        self.rows.append(dict(row))

    def note(self, line):
        self.notes.append(line)

    def warn(self, line):
        self.warnings.append(line)

    def finish(self, summary):
        self.finished = dict(summary)


def plan_of(folder):
    return json.loads((Path(folder) / "plan.json").read_text())


def differing(a, b, names=FILES):
    return [name for name in names if (a / name).read_bytes() != (b / name).read_bytes()]


def test_replicas_write_the_bytes_of_runs_alone(here):
    """On a CPU steps are recorded, and no bit of a recorded step hangs on who else trains."""
    ear = Ear()
    results = fedsim.simulate(*SMALL, replicas=3, seed=4, folder="set", observer=ear)
    assert [result.folder.name for result in results] == ["seed-4", "seed-5", "seed-6"]
    for seed, result in zip((4, 5, 6), results, strict=True):
        own = fedsim.simulate(*SMALL, seed=seed, folder=f"own{seed}")
        assert differing(result.folder, own.folder) == []
        assert result.summary["accuracy"] == own.summary["accuracy"]
        assert plan_of(result.folder) | {"replicas": 1} == plan_of(own.folder)
        assert plan_of(result.folder)["replicas"] == 3
    accuracies = [result.summary["accuracy"] for result in results]
    assert ear.rows[-1]["accuracy"] == pytest.approx(np.mean(accuracies))
    # Student's t with 2 degrees of freedom: 4.3027 s / √3
    half = 4.302653 * np.std(accuracies, ddof=1) / np.sqrt(3)
    assert ear.rows[-1]["accuracy_half"] == pytest.approx(half, rel=1e-5)
    assert [row["round"] for row in ear.rows] == [1, 2, 3, 4]
    assert ear.finished["replicas"] == "3"
    assert ear.finished["folder"] == "set"
    assert len(read([here / "set"])) == 3  # what a report reads
    table = json.loads(Path("set/sweep.json").read_text())["trials"]
    assert [(row["trial"], row["state"], row["replicas"]) for row in table] == [
        (f"seed-{seed}", "done", 3) for seed in (4, 5, 6)
    ]
    assert [row["accuracy"] for row in table] == accuracies


@pytest.mark.parametrize(("strategy", "kernels"), [("fedavg", "fused"), ("krum", "fused"), ("fedhyper_g", "generic")])
def test_replicas_of_a_batched_program_agree_with_runs_alone(here, strategy, kernels):
    """Promise 3: float64 to 1e-9; unequal clients are padded otherwise than alone, so not to the bit."""
    own = ("engine=vectorized", f"engine.kernels={kernels}", f"strategy={strategy}")
    given = (*SMALL, *own, "dtype=float64", "fraction=1")
    for seed, result in enumerate(fedsim.simulate(*given, replicas=3, folder="set")):
        own = fedsim.simulate(*given, seed=seed, folder=f"own{seed}")
        for row, expected in zip(result.rounds, own.rounds, strict=True):
            assert row.keys() == expected.keys()
            for name, value in expected.items():
                assert row[name] == (None if value is None else pytest.approx(value, rel=1e-9, abs=1e-9)), name
        assert plan_of(result.folder)["replicas"] == 3


def test_samples_are_in_memory_once(here, monkeypatch):
    seen, meet = [], together._meet

    def look(waiting, *others):
        seen.extend(built.experiment.task for built in waiting.values())
        meet(waiting, *others)

    monkeypatch.setattr(together, "_meet", look)
    fedsim.simulate(*SMALL, *FUSED, "dtype=float64", replicas=3, folder="set")  # the data are float32: a copy is made
    assert len({task.x.data_ptr() for task in seen}) == len({task.y.data_ptr() for task in seen}) == 1
    assert len({task.partition.indices.tobytes() for task in seen}) == 3


def test_engines_that_do_not_batch_run_one_after_another(here):
    results = fedsim.simulate(*SMALL, "engine=sequential", replicas=2, folder="set")
    own = fedsim.simulate(*SMALL, "engine=sequential", seed=1, folder="own")
    assert differing(results[1].folder, own.folder) == []
    assert plan_of(results[1].folder)["replicas"] == 1


def test_runs_of_differing_samples_train_apart_and_say_so(here):
    ear = Ear()
    given = ("model=logreg", "num_rounds=2", "threads=1", *FUSED, "partition=label_noise")
    results = fedsim.simulate(*given, replicas=2, folder="set", observer=ear)
    own = fedsim.simulate(*given, seed=1, folder="own")
    assert differing(results[1].folder, own.folder) == []
    assert ear.notes[0] == "seed 1: its clients train apart from the other runs': their samples differ"
    assert plan_of(results[1].folder)["replicas"] == 1


def test_each_replica_stops_when_it_is_its_turn(here):
    given = (*LONG, *CAPTURED, "target_accuracy=0.6", "metrics.every=1", "partition.alpha=0.3")
    results = fedsim.simulate(*given, replicas=4, folder="set")
    lengths = [len(result.rounds) for result in results]
    assert len(set(lengths)) > 1, lengths
    for seed in (lengths.index(min(lengths)), lengths.index(max(lengths))):
        own, result = fedsim.simulate(*given, seed=seed, folder=f"own{seed}"), results[seed]
        assert differing(result.folder, own.folder) == []
        assert result.summary["stopped"] == own.summary["stopped"]


BOOM = """
from pathlib import Path
from fedsim.strategies.fedavg import FedAvg


class Boom(FedAvg):
    needs_rows = True

    def __call__(self, cohort, state):
        delta, state, metrics = super().__call__(cohort, state)
        if cohort.seed == 1 and cohort.round == 2 and not Path("mended").exists():
            delta = delta * float("nan")
        return delta, state, metrics
"""


@pytest.fixture
def boom(here, monkeypatch):
    monkeypatch.syspath_prepend(str(here))
    (here / "boom_of_replicas.py").write_text(BOOM)
    (here / "my" / "strategy").mkdir(parents=True)
    (here / "my" / "strategy" / "boom.yaml").write_text("# Boom.\n_target_: boom_of_replicas.Boom\n")
    return here / "my"


@pytest.mark.parametrize("kernels", ["captured", "fused"])
def test_a_replica_that_fails_stops_no_other_and_resume_does_the_rest(boom, kernels):
    words = [*SMALL, "strategy=boom", "engine=vectorized", f"engine.kernels={kernels}", "replicas=3",
             "hydra.run.dir=set"]  # fmt: skip
    ear = Ear()
    with pytest.raises(RuntimeError, match=r"^1 of 3 replicas failed \(seed-1: .+\); again: fedsim run resume=set$"):
        replicas.run(compose(words, config_dir=boom), ear)
    states = [(row["state"], row["error"]) for row in json.loads(Path("set/sweep.json").read_text())["trials"]]
    assert [state for state, _ in states] == ["done", "failed", "done"]
    assert "the new model is not finite" in states[1][1]
    assert any(line.startswith("seed 1: round 2: the new model") for line in ear.warnings)
    assert [row["round"] for row in ear.rows] == [1, 2, 3, 4]  # of those that went on
    before = Path("set/seed-0/summary.json").stat().st_mtime_ns
    Path("mended").touch()
    assert replicas.is_set(Path("set"))
    (result,) = replicas.resume(Path("set"), [], None, ear)
    assert result.folder.name == "seed-1"
    assert Path("set/seed-0/summary.json").stat().st_mtime_ns == before
    assert [row["state"] for row in json.loads(Path("set/sweep.json").read_text())["trials"]] == ["done"] * 3
    with pytest.raises(UserError, match="--config-dir other: a resumed run keeps its config"):
        replicas.resume(Path("set"), [], Path("other"), ear)
    ear.warnings.clear()
    with pytest.raises(UserError, match="cannot go back to num_rounds=2"):
        replicas.resume(Path("set"), ["num_rounds=2"], None, ear)
    assert ear.warnings == []  # what all are refused for is said once


class Cutting(Ear):
    """Interrupts in a round, as Ctrl-C would."""

    def __init__(self, at):
        super().__init__()
        self.at = at

    def round(self, row):
        super().round(row)
        if row["round"] == self.at:
            raise KeyboardInterrupt


@pytest.mark.parametrize("kernels", ["captured", "fused"])
def test_a_set_that_was_cut_off_goes_on_with_the_same_bits(here, kernels):
    words = [*LONG, "engine=vectorized", f"engine.kernels={kernels}", "replicas=3"]
    replicas.run(compose([*words, "hydra.run.dir=whole"]), Observer())
    with pytest.raises(KeyboardInterrupt):
        replicas.run(compose([*words, "hydra.run.dir=cut"]), Cutting(3))
    rounds = [len((here / "cut" / f"seed-{k}" / "rounds.jsonl").read_text().splitlines()) for k in range(3)]
    assert max(rounds) < 6
    results = replicas.resume(Path("cut"), [], None, Observer())
    assert len(results) == 3
    for result in results:
        assert differing(result.folder, here / "whole" / result.folder.name) == []


def test_a_set_goes_on_for_more_rounds(here):
    words = [*SMALL, "replicas=2"]
    replicas.run(compose([*words, "hydra.run.dir=set"]), Observer())
    replicas.run(compose([*LONG, "replicas=2", "hydra.run.dir=long"]), Observer())
    results = replicas.resume(Path("set"), ["num_rounds=6"], None, Observer())
    for result in results:
        assert result.rounds[-1] == {**result.rounds[-1], "round": 6}
        assert differing(result.folder, here / "long" / result.folder.name, ("model.safetensors",)) == []


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["strategy.nonsense=1"], "nonsense"),
        (["partition.num_clients=100000"], "num_clients"),
        (["replicas=0"], "replicas must be >= 1"),
    ],
)
def test_what_cannot_be_run_leaves_nothing(here, words, part):
    with pytest.raises(UserError, match=part):
        replicas.run(
            compose([*words, "replicas=2", "hydra.run.dir=set"] if "replicas=0" not in words else words), Ear()
        )
    assert not Path("set").exists()


@pytest.mark.parametrize("kernels", ["captured", "fused"])
def test_a_replica_that_goes_on_without_the_others_says_so_where_bits_may_differ(here, kernels):
    """No bit of a recorded step hangs on who else trains; a batched program pads short batches as chunks ask for."""
    words = [*SMALL, "engine=vectorized", f"engine.kernels={kernels}"]
    replicas.run(compose([*words, "replicas=2", "hydra.run.dir=set"]), Observer())
    ear = Ear()
    own = relaunch(Path("set/seed-1"), ["num_rounds=6"]).go(ear)
    if kernels == "fused":
        assert ear.warnings == ["the plan's replicas was 2 and is 1: results may differ in the last bits"]
        return
    assert ear.warnings == []
    assert plan_of(own.folder)["changes"] == []
    fedsim.simulate(*LONG, *words[len(SMALL) :], seed=1, folder="alone")
    assert differing(own.folder, here / "alone", ("model.safetensors",)) == []


def test_from_python_what_replicas_cannot_share_is_refused(here):
    with pytest.raises(UserError, match="replicas is an argument here"):
        fedsim.simulate("replicas=2")
    with pytest.raises(UserError, match="one object cannot follow several replicas"):
        fedsim.simulate(*SMALL, replicas=2, tracker=object())
    assert len(fedsim.simulate(*SMALL, replicas=1, strategy=FedAvg(), folder="set")) == 1
    with pytest.raises(UserError, match="holds runs already"):
        fedsim.simulate(*SMALL, replicas=2, folder="set")


def broken_model():
    raise OSError("no such weights")


def test_replicas_of_objects_that_fail_early_say_why_and_are_not_gone_on_with(here):
    with pytest.raises(
        RuntimeError, match=r"^2 of 2 replicas failed \(seed-0: .*no such weights.*\); call fedsim.simula"
    ):
        fedsim.simulate(*SMALL, replicas=2, model=broken_model, folder="set")
    with pytest.raises(UserError, match=r"resume=set: .* objects for model; call fedsim\.simulate again"):
        replicas.resume(Path("set"), [], None, Observer())
    assert not any(Path("set").glob("seed-*"))


def test_a_config_that_reads_the_seed_is_composed_for_each(here):
    (here / "my" / "client").mkdir(parents=True)
    (here / "my" / "client" / "seeded.yaml").write_text("# S.\ndefaults: [sgd, _self_]\nbatch_size: ${seed}\n")
    given = compose([*SMALL, "client=seeded", "seed=3", "replicas=2"], config_dir=here / "my")
    configs = replicas._configs(given, [(3, Path("a")), (4, Path("b"))])
    assert [config.client.batch_size for config in configs] == [3, 4]
    quick = replicas._configs(compose([*SMALL, "seed=3", "replicas=2"]), [(3, Path("a")), (4, Path("b"))])
    for config, (seed, folder) in zip(quick, [(3, "a"), (4, "b")], strict=True):
        assert config == compose([*SMALL, f"seed={seed}", f"hydra.run.dir={folder}"])


# ---- sweeps


def test_trials_that_differ_in_seeds_and_rates_are_one_program(here):
    words = [*SMALL, *FUSED, "dtype=float64", "seed=0,1", "client.lr=0.1,0.3", "strategy=fedavg,fedavgm"]
    one = sweep([*words, "sweep.batch=true", "sweep.workers=1", "hydra.sweep.dir=batch"], None, Board())
    rows = json.loads((one / "sweep.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["done"] * 8
    assert [row["replicas"] for row in rows] == [4] * 8
    for row in rows[1:3]:
        given = [text for text in words if "," not in text]
        swept = [f"{key}={row[key]}" for key in ("seed", "client.lr", "strategy")]
        own = fedsim.simulate(*given, *swept, folder=f"own-{row['trial']}")
        assert row["accuracy"] == own.summary["accuracy"]
        assert row["loss"] == pytest.approx(own.summary["loss"], rel=1e-9)
        assert f"round 4/4  accuracy {100 * row['accuracy']:.2f} %" in (one / row["trial"] / "log.txt").read_text()


def test_a_batch_reports_each_failure_and_a_killed_worker_fails_all_of_it(boom):
    words = [*SMALL, "strategy=boom", "seed=0,1,2", "sweep.batch=true", "hydra.sweep.dir=s"]
    with pytest.raises(RuntimeError, match="1 of 3 trials failed"):
        sweep(words, boom, Board())
    rows = json.loads(Path("s/sweep.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["done", "failed", "done"]
    assert "Traceback" in (Path("s") / rows[1]["trial"] / "log.txt").read_text()
    assert "Traceback" not in (Path("s") / rows[2]["trial"] / "log.txt").read_text()
    Path("mended").touch()
    sweep(["resume=s", "sweep.batch=true"], None, Board())
    assert [row["state"] for row in json.loads(Path("s/sweep.json").read_text())["trials"]] == ["done"] * 3


def test_runs_that_were_cut_off_in_different_rounds_go_on_from_one_that_all_have(here):
    for name, rounds in (("a", (2, 3)), ("b", (1, 2)), ("c", ())):
        for number in rounds:
            checkpoint.save(Path(name) / "checkpoints", number, {"x": number})
    together._rewind([Path("a"), Path("b")])
    assert [checkpoint.rounds(Path(name) / "checkpoints") for name in "ab"] == [[2], [1, 2]]
    together._rewind([Path("a"), Path("c")])  # none in common: each from its own
    assert checkpoint.rounds(Path("a") / "checkpoints") == [2]
