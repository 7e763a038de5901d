"""Runs in virtual time: equal bits for equal plans, resume in mid-flight, and what is refused."""

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.engine import apart
from fedsim.engine.task import Job
from fedsim.errors import UserError
from fedsim.loop import Loop
from fedsim.metrics.reached import reached
from fedsim.report import tables
from fedsim.report.runs import read
from fedsim.simulation import resume, simulate
from fedsim.study.spec import merged
from fedsim.timing import Flops

SMALL = ("partition.num_clients=8", "fraction=1", "model=logreg", "threads=1", "metrics.every=100",
         "checkpoint.every=1")  # fmt: skip


OPEN = []


@pytest.fixture(autouse=True)
def closed_logs():
    yield
    while OPEN:
        loop = OPEN.pop()
        loop.rounds.close()
        loop.times.close()


def loop_of(folder, *overrides):
    OPEN.append(Loop(build(compose(merged(SMALL, ["num_rounds=6"], overrides))), folder, Observer()))
    return OPEN[-1]


def weights_of(folder, *overrides):
    loop = loop_of(folder, *overrides)
    loop.run()
    return loop.weights


@cache
def synchronous(strategy, folder):
    return weights_of(folder, f"strategy={strategy}")


@pytest.mark.parametrize("strategy", ["fedld", "scaffold"])
@pytest.mark.parametrize(
    "mode",
    [
        ("mode=async", "mode.buffer=8", "mode.concurrency=8"),
        # However fast each is: a full buffer waits for all.
        ("mode=async", "mode.buffer=8", "mode.concurrency=8", "devices=lognormal"),
        ("mode=deadline", "mode.late=deliver", "devices=lognormal"),
    ],
    ids=["async", "async-lognormal", "deadline"],
)
def test_modes_that_let_the_same_replies_arrive_give_the_same_bits(tmp_path, tmp_path_factory, strategy, mode):
    folder = tmp_path_factory.getbasetemp() / f"sync-{strategy}"
    assert torch.equal(weights_of(tmp_path, f"strategy={strategy}", *mode), synchronous(strategy, folder))


FLIGHTS = {
    "async": ("mode=async", "mode.buffer=2", "mode.concurrency=5", "devices=lognormal", "devices.dropout=0.2",
              "devices.partial_work=0.3", "availability=markov"),
    "deadline": ("mode=deadline", "mode.late=deliver", "mode.deadline=0.006", "devices=lognormal"),
    "delay": ("mode=fixed_delay", "mode.delay=2", "devices=intertwined", "devices.form=most", "devices.num_slow=2"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "strategy"), [("async", "scaffold"), ("deadline", "fedadam"), ("delay", "fedavg")])
def test_a_run_goes_on_in_mid_flight(tmp_path, name, strategy):
    arguments = (f"strategy={strategy}", *FLIGHTS[name])
    whole = loop_of(tmp_path / "whole", *arguments)
    stale = 0
    for round in range(1, 7):
        whole.step(round)
        stale += 0 if whole.backend.cohort is None else int(whole.backend.cohort.staleness.sum())
    assert stale > 0
    first = loop_of(tmp_path / "cut", *arguments)
    for round in range(1, 4):
        first.step(round)
    first.save()
    assert len(first.dispatcher.flight.clients)  # something is under way
    second = loop_of(tmp_path / "cut", *arguments)
    second.load()
    second.run()
    assert torch.equal(second.weights, whole.weights)
    assert second.dispatcher.flight.now == whole.dispatcher.flight.now


def test_a_stale_row_is_trained_from_the_version_it_was_sent(tmp_path):
    """Against the same loop stepped by hand: version 0's update, added three rounds later."""
    arguments = ("mode=fixed_delay", "mode.delay=3", "devices=intertwined", "devices.form=most", "devices.num_slow=3")
    loop = loop_of(tmp_path / "a", *arguments, "dtype=float64")
    start = loop.weights
    slow = np.flatnonzero(loop.experiment.clock.fleet.slow)
    for round in range(1, 5):
        loop.step(round)
        cohort = loop.backend.cohort
        late = cohort.staleness > 0
        assert late.sum() == (3 if round == 4 else 0)
    assert cohort.staleness[late].tolist() == [3, 3, 3]
    assert set(cohort.clients[late].tolist()) == set(slow.tolist())
    assert torch.equal(cohort.models[0], start)
    fresh = loop_of(tmp_path / "b", "dtype=float64", "strategy=krum")  # a rule that holds rows
    fresh.step(1)
    # The first round's updates of the slow clients, which the delayed run aggregates in its fourth.
    rows = fresh.backend.cohort
    want = rows.updates[torch.isin(rows.clients, torch.from_numpy(slow))]
    again = loop_of(tmp_path / "c", "dtype=float64", "strategy=krum", *arguments)
    for round in range(1, 5):
        again.step(round)
    # Row by row equal; batched kernels may round the last bit with the number of rows.
    torch.testing.assert_close(
        again.backend.cohort.updates[again.backend.cohort.staleness > 0], want, rtol=1e-9, atol=1e-12
    )


def test_late_clients_begin_at_what_the_rule_sends_them(tmp_path):
    """Version 1 was sent with v = (1 − β) δ₁; two rounds late, (β + β²) v lies ahead of it. Fresh ones get w."""
    arguments = ("mode=fixed_delay", "mode.delay=2", "devices=intertwined", "devices.form=most", "devices.num_slow=3")
    loop = loop_of(tmp_path, *arguments, "dtype=float64", "strategy=w_pred", "strategy.momentum=0.5")
    weights = [loop.weights]
    for round in range(1, 5):
        loop.step(round)
        weights.append(loop.weights)
    cohort = loop.backend.cohort  # of round 4: late ones were sent version 1
    assert sorted(set(cohort.received.tolist())) == [1, 3]
    ahead = (0.5 + 0.25) * 0.5 * (weights[1] - weights[0])
    torch.testing.assert_close(cohort.models[1], weights[1] + ahead, rtol=1e-12, atol=1e-14)
    assert torch.equal(cohort.models[3], weights[3])
    assert torch.equal(loop.dispatcher.versions.models[1], weights[1])  # what is kept is the version
    plain = loop_of(tmp_path / "plain", *arguments, "dtype=float64", "strategy=w_pred", "strategy.momentum=0")
    for round in range(1, 5):
        plain.step(round)
    assert not torch.equal(plain.weights, weights[4])
    late = cohort.staleness > 0
    assert torch.equal(plain.backend.cohort.models[1] + 0, plain.dispatcher.versions.models[1])
    assert not torch.equal(plain.backend.cohort.rows[late], cohort.rows[late])


MIXED = ("mode=async", "mode.buffer=5", "mode.concurrency=8", "devices=lognormal", "dtype=float64")


@pytest.mark.parametrize("strategy", ["fedavg", "krum"])  # streamed, and with the matrix
@pytest.mark.parametrize("engine", ["sequential", "vectorized", "processes"])
def test_a_row_trains_at_the_rate_of_its_own_version(tmp_path, engine, strategy):
    """Against each row trained alone, as a job of its own at the rate of the round after its version."""
    chosen = (f"engine={engine}", f"strategy={strategy}")
    loop = loop_of(tmp_path / engine, *MIXED, "client.lr_decay=0.5", *chosen)
    other = loop_of(tmp_path / "alone", *MIXED, "engine=sequential")
    mixed = 0
    try:
        for round in range(1, 5):
            before, versions = loop.weights, loop.dispatcher.versions
            loop.step(round)
            cohort, held = loop.backend.cohort, versions.models
            mixed += len(set(cohort.received.tolist())) > 1
            jobs = zip(cohort.clients.tolist(), cohort.received.tolist(), strict=True)
            rows = torch.stack([alone(other, held, client, version) for client, version in jobs])
            if strategy == "krum":
                torch.testing.assert_close(cohort.rows, rows, rtol=1e-9, atol=1e-12)
            else:
                mean = cohort.weights @ rows / cohort.weights.sum()
                torch.testing.assert_close(loop.weights - before, mean, rtol=1e-9, atol=1e-12)
    finally:
        loop.experiment.engine.close()
    assert mixed > 1


def alone(loop, models, client, version):
    """Train one client from one version at that version's rate."""
    task = loop.task
    clients, received = np.array([client]), np.array([version])
    job = Job(
        clients=clients, received=received, models=models, broadcasts={version: {}}, buffers=loop.backend.buffers,
        state={}, round=version + 1, key=version + 1, lr=0.3 * 0.5**version,
    )  # fmt: skip
    out = torch.empty(1, task.shared.size, dtype=task.dtype)
    loop.experiment.engine.train(job, out)
    return out[0]


def test_a_job_of_one_kind_has_the_rate_of_its_rows():
    """The newest version's rate is the job's; rows of an older one alone bring theirs."""

    def job(*received, sent=({}, {}, {})):
        return Job(
            clients=np.arange(len(received)), received=np.array(received), models={}, broadcasts=dict(enumerate(sent)),
            buffers=torch.empty(0), state={}, round=3, key=3, lr=0.25, rates={0: 1.0, 1: 0.5, 2: 0.25},
        )  # fmt: skip

    assert [apart.settled(job(v, v)).lr for v in (0, 1, 2)] == [1.0, 0.5, 0.25]
    assert apart.settled(job(0, 0)).rates is None
    assert apart.settled(job(0, 1)) is None
    assert [(kind.lr, kind.rows.tolist()) for kind in apart.kinds(job(2, 0, 2, 1))] == [
        (0.25, [0, 2]), (0.5, [3]), (1.0, [1])
    ]  # fmt: skip
    same = replace(job(0, 1, 0, sent=({}, {"previous": 1}, {})), rates=None)
    assert [(kind.lr, kind.rows.tolist()) for kind in apart.kinds(same)] == [(0.25, [0, 2]), (0.25, [1])]


NORMED = ("model=mlp_bn", "model.hidden=[6]", "dtype=float64", "engine=sequential", "client.batch_size=16",
          "metrics.every=1")  # fmt: skip


@pytest.mark.parametrize("flight", ["delay", "async"])
def test_a_stale_row_trains_from_the_running_statistics_of_its_version(tmp_path, flight):
    """Each row against the same client alone, from the weights and the buffers after the round that it was sent."""
    loop = loop_of(tmp_path, "strategy=median", *NORMED, *FLIGHTS[flight][: 4 if flight == "async" else None])
    buffers, models, old = {0: loop.backend.buffers}, {0: loop.weights}, 0
    for round in range(1, 7):
        loop.step(round)
        cohort = loop.backend.cohort
        sent = [] if cohort is None else zip(cohort.clients.tolist(), cohort.received.tolist(), strict=True)
        rows = []
        for k, (client, version) in enumerate(sent):
            out = torch.empty(1, loop.task.shared.size, dtype=loop.task.dtype)
            job = Job(
                clients=np.array([client]), received=np.array([version]), models=models, broadcasts={version: {}},
                buffers=buffers[version], state={}, round=round, key=version + 1, lr=loop.task.training.rate(1),
            )  # fmt: skip
            rows.append(loop.experiment.engine.train(job, out).buffers[0])
            assert torch.equal(out[0], cohort.rows[k])
            old += version < round - 1
        if rows:  # the new statistics are the mean of what they send
            share = (cohort.weights / cohort.weights.sum()).double()
            torch.testing.assert_close(loop.backend.buffers, share @ torch.stack(rows), rtol=1e-12, atol=1e-12)
        buffers[round], models[round] = loop.backend.buffers, loop.weights
        assert set(loop.dispatcher.versions.buffers) == set(loop.dispatcher.versions.models)
    assert old >= 4
    assert not torch.equal(buffers[1], buffers[3])


def test_running_statistics_of_versions_go_through_a_kill_and_other_workers(tmp_path):
    arguments = (*NORMED, *FLIGHTS["async"])
    whole = loop_of(tmp_path / "whole", *arguments)
    for round in range(1, 7):
        whole.step(round)
    first = loop_of(tmp_path / "cut", *arguments)
    for round in range(1, 4):
        first.step(round)
    first.save()
    second = loop_of(tmp_path / "cut", *arguments)
    second.load()
    second.run()
    assert torch.equal(second.weights, whole.weights)
    assert torch.equal(second.backend.buffers, whole.backend.buffers)
    workers = weights_of(tmp_path / "workers", *arguments, "engine=processes", "engine.workers=2")
    torch.testing.assert_close(workers, whole.weights, rtol=1e-9, atol=1e-12)


def test_equal_running_statistics_do_not_part_rows():
    """After a resume every version has a tensor of its own."""
    older = {0: torch.ones(2), 1: torch.zeros(2), 2: torch.zeros(2)}
    job = Job(
        clients=np.arange(4), received=np.array([0, 1, 2, 3]), models={}, broadcasts={v: {} for v in range(4)},
        buffers=torch.zeros(2), state={}, round=4, key=4, lr=0.1, older=older,
    )  # fmt: skip
    found = {tuple(kind.rows.tolist()): kind.buffers.tolist() for kind in apart.kinds(job)}
    assert found == {(0,): [1, 1], (1, 2, 3): [0, 0]}


@pytest.mark.parametrize("kernels", ["captured", "fused"])
def test_a_rule_may_send_more_from_its_second_round_on(tmp_path, kernels):
    """FedHyper-CL sends `previous` with every version but the first."""
    arguments = ("strategy=fedhyper_cl", *MIXED)
    engines = (["engine=sequential"], ["engine=vectorized", f"engine.kernels={kernels}"])
    weights = [weights_of(tmp_path / str(i), *arguments, *engine) for i, engine in enumerate(engines)]
    torch.testing.assert_close(*weights, rtol=1e-9, atol=1e-12)


def test_versions_are_freed_when_nobody_needs_them(tmp_path):
    loop = loop_of(tmp_path, *FLIGHTS["async"])
    for round in range(1, 13):
        loop.step(round)
        held, flight = set(loop.dispatcher.versions.models), loop.dispatcher.flight
        received = set() if loop.backend.cohort is None else set(loop.dispatcher.arrivals.received.tolist())
        assert held == {*flight.versions.tolist(), *received}
    sync = loop_of(tmp_path / "sync")
    sync.step(1)
    assert not sync.dispatcher.versions.models


def test_partial_work_does_its_share_of_the_steps(tmp_path):
    loop = loop_of(tmp_path, "devices.partial_work=0.25", "client.local_steps=8", "strategy=median")
    loop.step(1)
    work = loop.dispatcher.arrivals.work
    np.testing.assert_array_equal(loop.backend.cohort.num_steps.numpy(), np.ceil(8 * work))
    assert len(set(loop.backend.cohort.num_steps.tolist())) > 2


def test_a_lost_round_leaves_the_model_and_is_recorded(tmp_path):
    result = simulate(
        *SMALL, "availability=bernoulli", "availability.probability=0.1", num_rounds=6, folder=tmp_path / "run"
    )
    rows = result.rounds
    empty = [row for row in rows if row["num_participants"] == 0]
    assert empty
    assert len(empty) < len(rows)
    assert [row["simulated_seconds"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_times_follow_from_the_model_and_the_data(tmp_path):
    loop = loop_of(tmp_path, "devices=uniform", "devices.speed=[1000.0,1000.0]", "devices.down_bandwidth=[100.0,100.0]",
                   "devices.up_bandwidth=[10.0,10.0]", "client.local_epochs=3")  # fmt: skip
    sizes = loop.task.partition.sizes
    # logreg on digits: 64 · 10 weights, 10 biases. Forward 2 · 640 operations a sample, and once more for the
    # gradient by the weights; the input needs none.
    seconds = 650 * 4 / 100 + 2 * 1280 * 3 * sizes / 1000 + (650 * 4 + 8 + 4) / 10
    np.testing.assert_allclose(loop.experiment.clock.jobs(np.arange(8), 1).seconds, seconds, rtol=1e-12)
    loop.step(1)
    assert loop.dispatcher.flight.now == pytest.approx(seconds.max(), rel=1e-12)


def test_bytes_are_those_of_the_traffic(tmp_path):
    result = simulate(*SMALL, "strategy=scaffold", "devices=uniform", num_rounds=1, folder=tmp_path / "run")
    clock = build(compose([*SMALL, "strategy=scaffold", "devices=uniform"])).clock
    assert result.rounds[0]["bytes_down"] == 8 * clock.down_bytes
    assert result.rounds[0]["bytes_up"] == 8 * clock.up_bytes


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["mode=fixed_delay"], "needs devices that say who is slow"),
        (["mode=fixed_delay", "devices=uniform"], "none of the 8 slow"),
        (["mode=async", "mode.buffer=9"], "buffer must be <= 8"),
        (["mode=async", "mode.buffer=2", "strategy=flower/fedavg"], "use a fedsim rule"),
        (["devices=intertwined", "devices.target_class=10"], "devices.target_class must be below the data's 10"),
        (["devices.dropout=1"], "devices.dropout must be in"),
        (["devices=trace", "devices.path=none.csv"], "none.csv: no such file"),
        (["devices=trace"], r"devices\.path is needed"),
        (["mode=async", "mode.buffer=2", "strategy=krum", "strategy.num_byzantine=1"], "needs"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_round(overrides, message):
    with pytest.raises(UserError, match=message):
        build(compose([*SMALL, *overrides]))


def test_a_folder_in_mid_flight_is_resumed(tmp_path):
    whole = simulate(*SMALL, *FLIGHTS["async"], num_rounds=6, folder=tmp_path / "whole")
    simulate(*SMALL, *FLIGHTS["async"], num_rounds=3, folder=tmp_path / "run")
    again = resume(tmp_path / "run", ["num_rounds=6"], Observer())
    mine, want = (load_file(result.folder / "model.safetensors") for result in (again, whole))
    assert all(torch.equal(mine[name], want[name]) for name in want)
    for name in ("simulated_seconds", "num_outstanding", "num_lost", "staleness_mean", "train_loss"):
        assert [row.get(name) for row in again.rounds] == [row.get(name) for row in whole.rounds]


def test_what_it_took_to_reach_an_accuracy():
    rows = [
        {"round": 1, "evaluated": True, "accuracy": 0.2, "bytes_up": 1, "bytes_down": 2, "simulated_seconds": 1.0},
        {"round": 2, "evaluated": False, "accuracy": 0.2, "simulated_seconds": 2.0},  # nobody arrived
        {"round": 3, "evaluated": False, "accuracy": 0.9, "bytes_up": 4, "bytes_down": 4, "simulated_seconds": 3.0},
        {"round": 4, "evaluated": True, "accuracy": 0.5, "bytes_up": 1, "bytes_down": 1, "simulated_seconds": 7.5},
        {"round": 5, "evaluated": True, "accuracy": 0.4, "bytes_up": 1, "bytes_down": 1, "simulated_seconds": 9.0},
    ]
    assert reached(rows, (0.2, 0.5, 0.95)) == {
        "0.2": {"rounds": 1, "simulated_seconds": 1.0, "bytes": 3},
        "0.5": {"rounds": 4, "simulated_seconds": 7.5, "bytes": 13},
        "0.95": {"rounds": None, "simulated_seconds": None, "bytes": None},
    }


def test_time_to_accuracy_is_in_the_summary_and_a_metric_of_reports(tmp_path):
    words = merged(SMALL, ["num_rounds=6", "metrics.every=1", "metrics.targets=[0.3,0.999]", "engine=sequential"])
    for seed in (0, 1):
        run = simulate(*words, "devices=lognormal", f"seed={seed}", folder=tmp_path / "runs" / str(seed))
    took = run.summary["reached"]
    first = next(row for row in run.rounds if row["accuracy"] >= 0.3)
    assert took["0.3"]["rounds"] == first["round"]
    assert took["0.3"]["simulated_seconds"] == first["simulated_seconds"] > 0
    assert took["0.999"]["rounds"] is None
    assert tables.lower_is_better("reached.0.3.rounds")
    assert not tables.is_percent("reached.0.3.simulated_seconds")
    known = read([tmp_path / "runs"])[0].results
    assert {"reached.0.3.rounds", "reached.0.3.bytes"} <= set(known)
    with pytest.raises(UserError, match="targets"):
        build(compose(merged(words, ["metrics.targets=[90]"])))


MODELS = {
    "dense": lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 7), nn.ReLU(), nn.Linear(7, 10)),
    "convolutions": lambda: nn.Sequential(
        nn.Conv2d(1, 4, 3, stride=2), nn.GroupNorm(2, 4), nn.ReLU(), nn.ConvTranspose2d(4, 2, 2), nn.Flatten(),
        nn.LazyLinear(10),
    ),
    "attention": lambda: nn.Sequential(
        nn.Flatten(2), nn.TransformerEncoderLayer(64, 2, 16, batch_first=True), nn.Flatten(), nn.Linear(64, 10)
    ),
    "recurrent": lambda: Last(nn.GRU(8, 5, batch_first=True)),
}  # fmt: skip


class Last(nn.Module):
    def __init__(self, cell):
        super().__init__()
        self.cell, self.head = cell, nn.Linear(5, 10)

    def forward(self, x):
        return self.head(self.cell(x.flatten(1, 2))[0][:, -1])


@pytest.mark.parametrize("name", MODELS)
def test_operations_are_those_that_torch_counts(name):
    model = MODELS[name]().eval()
    x = torch.randn(2, 1, 8, 8)
    model(x)
    counts = []
    for counter in (FlopCounterMode(display=False), Flops()):
        with counter:
            model(x).sum().backward()
        counts.append(counter.total if isinstance(counter, Flops) else counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_it_is_said_when_nobody_can_be_late(tmp_path):
    def notes(*overrides):
        return build(compose(merged(SMALL, ["num_rounds=6"], overrides))).notes

    (note,) = notes("strategy=stale_weighted")
    assert "StaleWeighted is made for late updates, and in mode Sync none comes late" in note
    assert notes("strategy=stale_weighted", "mode=deadline", "mode.deadline=1")
    assert not notes("strategy=stale_weighted", "mode=async", "mode.buffer=4")
    assert not notes("strategy=fedavg")
    slow = ("mode=fixed_delay", "devices=tiers", "strategy=stale_weighted")
    (note,) = notes(*slow, "mode.delay=6")
    assert "nothing of the slow clients arrives in 6 rounds" in note
    assert not notes(*slow, "mode.delay=5")


def test_it_is_said_once_that_nobody_answered(tmp_path):
    heard = []

    class Ear(Observer):
        def warn(self, line):
            heard.append(line)

    words = merged(SMALL, ["num_rounds=3", "mode=deadline", "mode.deadline=1e-9", "devices=uniform"])
    loop = Loop(build(compose(words)), tmp_path, Ear())
    first = loop.weights.clone()
    loop.run()
    assert heard == ["round 1: nobody's reply arrived; such rounds leave the model as it is"]
    assert torch.equal(loop.weights, first)
