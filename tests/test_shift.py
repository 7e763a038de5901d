"""Samples replaced over time: who, when and by what; equal on every engine, and through every kill."""

import itertools

import numpy as np
import pytest
import torch

import fedsim
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset, Partition
from fedsim.data.digits import digits
from fedsim.data.splits import ClientSplits
from fedsim.engine.evaluate import predict
from fedsim.engine.task import local_round
from fedsim.errors import UserError
from fedsim.loop import Loop
from fedsim.shift.domains import Inverted, Other, Permuted, Rotated
from fedsim.shift.replaced import Replaced
from fedsim.simulation import resume, simulate
from fedsim.study.spec import merged

TINY = (
    "data=blobs", "data.num_samples=240", "partition.num_clients=6", "fraction=1", "model=mlp", "model.hidden=[8]",
    "threads=1", "metrics.every=1", "metrics.clients_every=1", "checkpoint.every=1", "num_rounds=6",
)  # fmt: skip
LATE = ("mode=fixed_delay", "mode.delay=2", "devices=intertwined", "devices.form=most", "devices.num_slow=2",
        "devices.target_class=1")  # fmt: skip
MOVING = ("shift=permuted", "shift.rate=4.5")


def csr(*parts):
    offsets = np.cumsum([0, *map(len, parts)]).astype(np.int64)
    return Partition(np.concatenate([np.asarray(part, dtype=np.int64) for part in parts]), offsets)


def by_hand(seed=0, **how):
    """Two clients, of 2 and 4 training samples; the second tests on 2; 6 test samples on the server."""
    x = torch.arange(16.0)[:, None]
    y = torch.arange(16) % 2
    splits = {"train": np.arange(10), "test": np.arange(10, 16)}
    parts = ClientSplits(csr([0, 1], [2, 3, 4, 5]), csr([], []), csr([], [6, 7]), np.zeros(2, dtype=bool))
    data = Dataset(x, y, splits, num_classes=2)
    return Replaced(domain=Inverted(), **how)(data, y, parts, seed)


def shares(shift, round):
    return [round_to(shift.share(np.arange(*ends), round)) for ends in ((0, 2), (2, 6), (6, 8), (10, 16))]


def round_to(value):
    return round(value, 6)


def test_by_hand():
    dataset, shift = by_hand(rate=1.0, start=1)
    assert dataset.x[16:].flatten().tolist() == [15.0 - i for i in range(16)]
    assert torch.equal(dataset.y[:16], dataset.y[16:])
    #                      client 0, client 1, its tests, the server's
    assert shares(shift, 1) == shares(shift, 2) == [0, 0, 0, 0]
    # One of each client: half of the first's, a quarter of the second's, so that the first of its two tests is due
    # when over 0 of 2 should be, and of the server's 6 two are (2 of 6 training samples).
    assert shares(shift, 3) == [0.5, 0.25, 0.5, round_to(2 / 6)]
    assert shares(shift, 4) == [1, 0.5, 0.5, round_to(4 / 6)]
    assert shares(shift, 5) == [1, 0.75, 1, round_to(5 / 6)]
    assert shares(shift, 6) == [1, 1, 1, 1] == shares(shift, 600)
    assert shift.share(np.array([8, 9]), 600) == 0  # samples of nobody


def test_half_a_sample_a_round_is_one_every_other():
    _, shift = by_hand(rate=0.5)
    assert shift.count(np.arange(1, 7)).tolist() == [0, 0, 1, 1, 2, 2]
    _, shift = by_hand(rate=0.1)  # 0.1 · 10 is 1, whatever floats make of 0.1 · 30
    assert shift.count(np.array([11, 31])).tolist() == [1, 3]


def test_what_is_replaced_stays_so_and_the_order_is_keyed():
    _, shift = by_hand(rate=1.0)
    everyone = np.arange(16)
    moved = [shift(everyone, t) for t in range(1, 8)]
    assert all(((one - everyone) % 16 == 0).all() for one in moved)
    assert all((b >= a).all() for a, b in itertools.pairwise(moved))
    orders = {tuple(by_hand(seed, rate=1.0)[1].due[2:6]) for seed in range(20)}
    assert len(orders) > 5
    assert np.array_equal(shift.due, by_hand(rate=1.0)[1].due)
    each = shift(np.array([2, 3, 4, 5] * 2), np.array([1] * 4 + [9] * 4))  # a round of its own for each
    assert each.tolist() == [2, 3, 4, 5, 18, 19, 20, 21]


def words(*overrides):
    """Return the small run's overrides, later ones in the place of earlier ones of the same setting."""
    return merged(TINY, overrides)


def loop_of(folder, *overrides):
    return Loop(build(compose(words("engine=sequential", *overrides))), folder, Observer())


def closed(loop):
    loop.rounds.close()
    loop.times.close()


BUFFERED = ("mode=async", "mode.buffer=2", "mode.concurrency=4", "devices=lognormal")


@pytest.mark.parametrize(("kernels", "mode"), [("captured", LATE), ("fused", BUFFERED), ("generic", LATE)])
def test_engines_see_the_same_samples(tmp_path, kernels, mode):
    asked = words("dtype=float64", "num_rounds=4", *MOVING, *mode)
    want = simulate(*asked, "engine=sequential", folder=tmp_path / "want")
    got = simulate(*asked, "engine=vectorized", f"engine.kernels={kernels}", folder=tmp_path / "got")
    for a, b in zip(want.rounds, got.rounds, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-9)
        assert a["replaced_share"] == b["replaced_share"]


def test_processes_give_the_same_bits(tmp_path):
    asked = words("num_rounds=4", *MOVING, *LATE)
    with_workers = simulate(*asked, "engine=processes", "engine.workers=2", folder=tmp_path / "workers")
    alone = simulate(*asked, "engine=processes", "engine.workers=1", folder=tmp_path / "alone")
    assert [row["loss"] for row in with_workers.rounds] == [row["loss"] for row in alone.rounds]
    want = simulate(*asked, "engine=sequential", folder=tmp_path / "want")
    assert alone.rounds[-1]["loss"] == pytest.approx(want.rounds[-1]["loss"], rel=1e-4)


def test_a_stale_row_has_the_samples_of_the_round_in_which_it_was_sent_the_model(tmp_path):
    loop = loop_of(tmp_path, *MOVING, *LATE)
    jobs = []
    trained = loop.backend.trainer.collect if loop.plan["rows"] != "streamed" else loop.backend.trainer.stream

    def spy(job, *rest):
        jobs.append(job)
        return trained(job, *rest)

    loop.backend.trainer.collect = loop.backend.trainer.stream = spy
    for t in range(1, 5):
        loop.step(t)
    closed(loop)
    task, job = loop.task, jobs[-1]
    assert sorted(set(job.received.tolist())) == [1, 3]
    order = local_round(task, job, 0, None)
    num = len(task.x) // 2
    for row, (client, version) in enumerate(zip(job.clients.tolist(), job.received.tolist(), strict=True)):
        seen = np.unique(order.positions[order.starts[row] : order.starts[row + 1]])
        mine = np.sort(task.partition.of(client))
        assert set(seen.tolist()) == set(task.shift(mine, version + 1).tolist())
        assert (seen >= num).sum() == min(len(mine), int(4.5 * version))


def test_a_run_goes_on_through_a_kill(tmp_path):
    asked = ("engine=sequential", *MOVING, *LATE)
    whole = simulate(*words(*asked), folder=tmp_path / "whole")
    simulate(*words(*asked, "num_rounds=3"), folder=tmp_path / "cut")
    resume(tmp_path / "cut", ["num_rounds=6"], Observer())
    for name in ("model.safetensors", "rounds.jsonl"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes(), name
    assert 0 < whole.rounds[2]["replaced_share"] < 1


def test_before_it_begins_nothing_is_changed(tmp_path):
    still = simulate(*words("engine=sequential"), folder=tmp_path / "still")
    simulate(*words("engine=sequential", *MOVING, "shift.start=6"), folder=tmp_path / "later")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("still", "later")]
    assert weights[0] == weights[1]
    assert "replaced_share" not in still.rounds[-1]


def test_what_is_tested_moves_with_what_is_trained_on(tmp_path):
    loop = loop_of(tmp_path, "shift=inverted", "shift.rate=1000", *LATE)
    task, test = loop.task, torch.from_numpy(loop.experiment.dataset.splits["test"])
    num = len(task.x) // 2
    for t, at in ((1, test), (2, test + num)):
        loop.step(t)
        figures, _ = loop.figures.measure(t, loop.weights, loop.weights, None)
        want = predict(task, loop.weights, at).correct.double().mean()
        assert figures["accuracy"] == pytest.approx(float(want))
    closed(loop)


def test_replicas_are_runs_alone(tmp_path):
    asked = words(*MOVING, "num_rounds=3", "engine=vectorized", "engine.kernels=fused")
    many = fedsim.simulate(*asked, replicas=2, folder=tmp_path / "many")
    for seed, one in enumerate(many):
        alone = simulate(*asked, f"seed={seed}", folder=tmp_path / f"alone{seed}")
        assert one.rounds[-1]["loss"] == pytest.approx(alone.rounds[-1]["loss"], rel=1e-6)


@pytest.mark.parametrize("asked", [
    ("metrics.finetune_steps=2",), ("sampler=power_of_choice", "fraction=0.5"), ("metrics.decomposition_every=1",),
    ("strategy=fedper",), ("strategy=centralized",), ("strategy=flower/fedavg",), ("partition.held_out_clients=0.2",),
    ("attack=label_flip", "attack.fraction=0.3"), ("client.batch_size=null", "strategy=unstale", *LATE),
])  # fmt: skip
def test_it_composes_with(tmp_path, asked):
    found = simulate(*words("engine=sequential", *MOVING, "num_rounds=3", *asked), folder=tmp_path / "run")
    assert np.isfinite(found.rounds[-1]["loss"])
    assert found.rounds[-1]["replaced_share"] > 0


def test_fine_tuning_adapts_to_the_samples_of_the_round(tmp_path):
    """Far enough replaced, personal steps are those of a run whose data were of the other domain from the start."""
    loop = loop_of(tmp_path, "shift=inverted", "shift.rate=1000", "metrics.finetune_steps=3", "num_rounds=1")
    tuner, num = loop.evaluator.tuner, len(loop.task.x) // 2
    got = tuner.accuracies(loop.weights, loop.backend.buffers, 2)[0]
    task = tuner.engine.task
    swapped = torch.cat([task.x[num:], task.x[:num]])
    task.x.copy_(swapped)
    assert torch.equal(got, tuner.accuracies(loop.weights, loop.backend.buffers, 1)[0])
    closed(loop)


# ---- domains


def images():
    x = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 5.0], [6.0, 7.0]]]])
    return Dataset(x, torch.tensor([0, 1]), {"train": np.array([0]), "test": np.array([1])}, num_classes=2)


def test_domains_by_hand():
    data = images()
    assert Inverted()(data, data.y, 0)[0].flatten().tolist() == [6, 5, 4, 3]
    assert Rotated(turns=1)(data, data.y, 0)[0].flatten().tolist() == [2, 4, 1, 3]
    assert Rotated(turns=2)(data, data.y, 0)[0].flatten().tolist() == [4, 3, 2, 1]
    one, other = Permuted()(data, data.y, 0)
    assert sorted(one.flatten().tolist()) == [1, 2, 3, 4]
    assert other.flatten().tolist() == [[0, 5, 6, 7][int(i) - 1] for i in one.flatten()]  # one order for all
    assert torch.equal(Permuted()(data, data.y, 0), Permuted()(data, data.y, 0))


def test_another_data_set_gives_samples_of_the_class_and_of_the_split():
    mine, x = digits(), torch.arange(40.0)[:, None, None, None].expand(40, 1, 8, 8)
    splits = {"train": np.arange(30), "test": np.arange(30, 40)}
    other = Dataset(x, torch.arange(40) % 10, splits, num_classes=10)
    found = Other(data=other)(mine, mine.y, 0)[:, 0, 0, 0].long()
    assert torch.equal(found % 10, mine.y)
    assert (found[torch.from_numpy(mine.splits["test"])] >= 30).all()
    train = found[torch.from_numpy(mine.splits["train"])]
    assert (train < 30).all()
    counts = torch.bincount(train[train % 10 == 3])[3::10]  # all three of a class, as often as each other
    assert len(counts) == 3
    assert counts.max() - counts.min() <= 1


def test_a_wrong_label_stays_wrong_on_the_other_domain(tmp_path):
    noise = ("partition=label_noise", "partition.max_rate=1", "partition.min_rate=1", "partition.base.num_clients=6")
    data = digits()
    own = build(compose([*noise, "model=mlp", "threads=1"]), {"shift": Replaced(domain=Other(data=data))})
    x, y, num = own.task.x, own.task.y, len(data.y)
    trained = torch.from_numpy(own.splits.train.indices)
    assert (y[trained] != data.y[trained]).all()
    assert torch.equal(y[:num], y[num:])
    true = {tuple(row.flatten().tolist()): int(c) for row, c in zip(data.x, data.y, strict=True)}
    assert all(true[tuple(x[num + int(p)].flatten().tolist())] == int(data.y[p]) for p in trained[:50])


@pytest.mark.parametrize(
    ("asked", "says"),
    [
        (("shift=inverted", "shift.rate=0"), "rate must be > 0"),
        (("shift=inverted", "shift.start=-1"), "start must be >= 0"),
        (("shift=rotated", "shift.domain.turns=4"), "1, 2 or 3"),
        (("shift=rotated", "data=blobs"), "needs images"),
        (("shift=inverted", "attack=backdoor", "attack.fraction=0.2"), "without the mark"),
        (("shift=inverted", "client=flower_app", "client.app=nowhere:app"), "client"),
    ],
)
def test_what_cannot_be_is_refused(asked, says):
    with pytest.raises(UserError, match=says):
        build(compose([*asked, "threads=1"]))


def test_a_domain_must_fit():
    data = images()
    splits = ClientSplits(csr([0]), csr([]), csr([]), np.zeros(1, dtype=bool))
    with pytest.raises(UserError, match="one sample for each"):
        Replaced(domain=lambda dataset, labels, seed: dataset.x[:1])(data, data.y, splits, 0)
    with pytest.raises(UserError, match="no sample of class 1"):
        Other(data=data._replace(y=torch.tensor([0, 0])))(data, data.y, 0)
    with pytest.raises(UserError, match="shape"):
        Other(data=data._replace(x=data.x[..., :1]))(data, data.y, 0)
    tokens = data._replace(x=torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(UserError, match="floating-point"):
        Replaced(domain=Inverted())(tokens, data.y, splits, 0)
