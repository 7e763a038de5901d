"""Whole runs, in this process and tiny: what they compute, repeat, refuse, survive and leave behind."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fedsim
from fedsim import build as building
from fedsim import build_data, simulation
from fedsim.catalogue import options, roots
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset
from fedsim.data.digits import digits
from fedsim.errors import UserError
from fedsim.local import LocalTraining
from fedsim.partition.iid import IID
from fedsim.samplers import Uniform
from fedsim.strategies.fedavg import FedAvg

BLOBS = ("data=blobs", "data.num_samples=120", "partition=iid", "partition.num_clients=6", "model=logreg")
NATURAL = ("data.num_clients=6", "data.num_domains=2")
SMALL_DIGITS = ("partition.num_clients=8", "model=logreg", "metrics.every=1", "metrics.clients_every=1")
BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")


EVERY = ("metrics.every=1", "metrics.clients_every=1", "checkpoint.every=1")


class Recorder(Observer):
    """Keeps what a run says."""

    def __init__(self):
        self.warnings, self.notes = [], []

    def warn(self, line):
        self.warnings.append(line)

    def note(self, line):
        self.notes.append(line)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run with given settings in a new folder, without drawing: the picture has its own test."""
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    count = itertools.count()

    def go(*overrides, **settings):
        settings.setdefault("folder", tmp_path / f"run-{next(count)}")
        return fedsim.simulate(*last(overrides), **settings)

    return go


def last(overrides):
    """Keep the last override of each key: fedsim refuses a key that is given twice."""
    return list({text.partition("=")[0]: text for text in overrides}.values())


def resume(folder, *overrides, observer=None):
    return simulation.resume(Path(folder), list(overrides), observer or Recorder())


def weights(result):
    return load_file(result.folder / "model.safetensors")


def equal_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def contents(result):
    return {name: (result.folder / name).read_bytes() for name in BYTES}


def table(result):
    return pq.read_table(result.folder / "clients.parquet").to_pydict()


def cohorts(result):
    """Return round → the clients that trained in it."""
    columns = table(result)
    rows = zip(columns["round"], columns["client"], columns["num_steps"], strict=True)
    found = {}
    for round, client, steps in rows:
        if steps is not None:
            found.setdefault(round, []).append(client)
    return found


# --- exact tiny rounds --------------------------------------------------------------------------------------------


class Point(nn.Module):
    """A point w in the plane, posed as a model: logits are x ∘ w."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([3.0, -2.0]))

    def forward(self, x):
        return x * self.w


@dataclass(frozen=True)
class Quadratic:
    """½‖w − x̄‖² of a batch: a local step is w ← w − η (w − x̄)."""

    def loss(self, model, params, batch, context):
        return 0.5 * (params["w"] - batch.x).square().sum(1).mean(), {}


SIZES = (5, 1, 9, 3)


def points():
    """Four natural clients of 5, 1, 9 and 3 points in the plane; the test points are nobody's."""
    rng = np.random.default_rng(0)
    x = torch.as_tensor(rng.normal(size=(sum(SIZES) + 4, 2)))
    owner = np.repeat(np.arange(5), (*SIZES, 4))
    owner[-4:] = -1
    splits = {"train": np.arange(sum(SIZES)), "test": np.arange(sum(SIZES), len(x))}
    return Dataset(x=x, y=torch.as_tensor(np.arange(len(x)) % 2), splits=splits, num_classes=2, client=owner)


QUADRATIC = ("data.validation=0", "partition=natural", "partition.local_test=0", "dtype=float64")


def quadratic(run, *overrides, **settings):
    return run(*QUADRATIC, *overrides, data=points(), model=Point, client=Quadratic(), **settings)


def means():
    x = points().x.numpy()
    return np.stack([part.mean(0) for part in np.split(x[: sum(SIZES)], np.cumsum(SIZES)[:-1])])  # (K, 2)


def test_fedavg_on_quadratics_goes_to_the_weighted_mean(run):
    rate, steps, rounds = 0.1, 3, 4
    training = LocalTraining(lr=rate, batch_size=None, local_steps=steps)
    result = quadratic(run, training=training, fraction=1.0, num_rounds=rounds)
    # w_k = x̄_k + (1 − η)^E (w − x̄_k), so w_T = x̄ + (1 − η)^{ET} (w_0 − x̄) with x̄ weighted by samples.
    target = np.average(means(), axis=0, weights=SIZES)
    expected = target + (1 - rate) ** (steps * rounds) * (np.array([3.0, -2.0]) - target)
    # 1e-6 relative: the model starts from float32 weights that are exact, all else is float64.
    np.testing.assert_allclose(weights(result)["w"].numpy(), expected, rtol=1e-12)
    np.testing.assert_allclose(result.model.w.detach().numpy(), expected, rtol=1e-12)


def test_the_local_rate_decays_by_round(run):
    training = LocalTraining(lr=0.4, lr_decay=0.5, lr_decay_every=2, batch_size=None, local_steps=1)
    result = quadratic(run, training=training, fraction=1.0, num_rounds=5)
    target = np.average(means(), axis=0, weights=SIZES)
    expected = target + 0.6 * 0.6 * 0.8 * 0.8 * 0.9 * (np.array([3.0, -2.0]) - target)
    np.testing.assert_allclose(weights(result)["w"].numpy(), expected, rtol=1e-12)
    assert [row["lr"] for row in result.rounds] == [0.4, 0.4, 0.2, 0.2, 0.1]


def test_sampled_cohorts_move_the_model_by_their_own_mean(run):
    training = LocalTraining(lr=0.1, batch_size=None, local_steps=2)
    result = quadratic(run, "strategy.server_lr=0.5", training=training, fraction=0.5, num_rounds=6)
    w, who = np.array([3.0, -2.0]), cohorts(result)
    assert {len(cohort) for cohort in who.values()} == {2}
    assert len({tuple(cohort) for cohort in who.values()}) > 1
    for cohort in who.values():
        local = means()[cohort] + 0.9**2 * (w - means()[cohort])  # (2, 2)
        w = w + 0.5 * (np.average(local, axis=0, weights=np.array(SIZES)[cohort]) - w)
    np.testing.assert_allclose(weights(result)["w"].numpy(), w, rtol=1e-12)


def test_the_centralized_bound_is_descent_on_the_pool(run):
    training = LocalTraining(lr=0.1, batch_size=None, local_steps=2)
    result = quadratic(run, strategy="centralized", training=training, num_rounds=3)
    target = np.average(means(), axis=0, weights=SIZES)
    expected = target + 0.9**6 * (np.array([3.0, -2.0]) - target)
    np.testing.assert_allclose(weights(result)["w"].numpy(), expected, rtol=1e-12)
    assert result.rounds[0]["num_participants"] == 1


def test_the_local_bound_trains_everyone_alone(run):
    training = LocalTraining(lr=0.1, batch_size=None, local_steps=2)
    result = quadratic(
        run, "partition.local_test=0.4", strategy="local", training=training, fraction=1.0, num_rounds=3
    )  # fmt: skip
    assert weights(result) == {}  # nothing is shared, so there is no global model to write
    assert result.summary["bytes_up"] < 200  # a few numbers beside an update of no parameters
    loop_state = load_file(max((result.folder / "checkpoints" / "clients").glob("*.safetensors")))
    personal = next(value for value in loop_state.values() if value.shape == (4, 2))  # (K, 2)
    assert len({tuple(row) for row in personal.tolist()}) == 4
    experiment = building.build(
        compose(last([*QUADRATIC, "partition.local_test=0.4"])),
        {"data": points(), "model": Point, "client": Quadratic()},
    )
    train = experiment.splits.train
    expected = [
        points().x[torch.from_numpy(train.of(k))].mean(0) * (1 - 0.9**6) + 0.9**6 * torch.tensor([3.0, -2.0]).double()
        for k in range(4)
    ]
    torch.testing.assert_close(personal, torch.stack(expected), rtol=1e-12, atol=0)
    assert result.rounds[-1]["client_accuracy_mean"] is not None


# --- repeatable ---------------------------------------------------------------------------------------------------


def test_a_seed_decides_every_byte(run):
    settings = (*SMALL_DIGITS, "strategy=fedld", "partition.alpha=0.1", "num_rounds=3")
    first = run(*settings)
    torch.manual_seed(1)
    np.random.seed(1)  # noqa: NPY002  (that the global generators have no say is the point)
    again, other = run(*settings), run(*settings, seed=1)
    assert contents(first) == contents(again)
    assert all(contents(first)[name] != contents(other)[name] for name in BYTES)


def drawn(*overrides):
    """Return what a config draws before any training, by name."""
    experiment = building.build(compose(last([*BLOBS, "partition=dirichlet", *overrides])))
    cohort = [experiment.sampler_seed, experiment.participants.tolist()]
    return {
        "partition": experiment.splits.train.indices.tolist(),
        "validation": experiment.dataset.splits["validation"].tolist(),
        "model": experiment.initial.tolist(),
        "sampler": cohort,
    }


def test_partition_model_and_cohort_are_seeded_apart():
    base = drawn("seed=3")
    changes = {
        "partition": {"partition", "validation"},
        "model": {"model"},
        "sampler": {"sampler"},
    }
    for group, moved in changes.items():
        assert drawn("seed=3", f"{group}.seed=3") == base
        other = drawn("seed=3", f"{group}.seed=4")
        assert {name for name in base if other[name] != base[name]} == moved
    everything = drawn("seed=4")
    assert all(everything[name] != base[name] for name in base)


def test_runs_with_seeds_apart_differ_in_what_was_seeded_alone(run):
    base = run(*BLOBS, num_rounds=3)
    sampler, model = run(*BLOBS, "sampler.seed=9", num_rounds=3), run(*BLOBS, "model.seed=9", num_rounds=3)
    assert cohorts(base) == cohorts(model) != cohorts(sampler)
    assert not equal_weights(base, model)
    partition = [np.load(result.folder / "partition.npz")["indices"] for result in (base, sampler, model)]
    assert all(np.array_equal(partition[0], other) for other in partition)


@pytest.mark.parametrize(
    "limit",
    [
        ("client=margin", "client.margin_lambda=0"),
        ("client=margin", "client.margin_lambda=0", "client.reduction=sample"),
        ("client=fedprox", "client.proximal_mu=0"),
        ("strategy=fedprox", "client.proximal_mu=0"),
    ],
    ids=" ".join,
)
def test_limits_that_are_fedavg_to_the_bit(run, limit):
    settings = (*SMALL_DIGITS, "model=mlp", "num_rounds=2")
    assert contents(run(*settings)) == contents(run(*settings, *limit))


# --- selection never sees test data -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "stop",
    [
        ("early_stopping.patience=1", "early_stopping.min_delta=0.05"),
        ("target_accuracy=0.7",),
        ("early_stopping.patience=1", "early_stopping.min_delta=0.02", "early_stopping.metric=accuracy"),
        ("sampler=power_of_choice",),
    ],
    ids=" ".join,
)
def test_noise_for_test_labels_changes_no_weight_and_no_stop(run, monkeypatch, stop):
    settings = (*SMALL_DIGITS, "strategy=fedld", "partition.held_out_clients=0.2", "num_rounds=12", *stop)
    honest = run(*settings)
    real = build_data._drawn

    def scrambled(*args):
        dataset, partition, local, labels = real(*args)
        train = dataset.splits["train"]
        test = np.concatenate([dataset.splits["test"], train[local.test.indices]])
        y = dataset.y.clone()
        y[torch.from_numpy(test)] = torch.from_numpy(np.random.default_rng(5).integers(0, 10, len(test)))
        assert len(test) > 500  # the server's, the clients' own and the held-out clients'
        return dataset._replace(y=y), partition, local, labels

    monkeypatch.setattr(build_data, "_drawn", scrambled)
    noisy = run(*settings)
    assert equal_weights(honest, noisy)
    rows = list(zip(honest.rounds, noisy.rounds, strict=True))  # the same number of rounds
    # It was noise, everywhere:
    for name in ("accuracy", "client_accuracy_mean", "held_out_accuracy_mean"):
        assert noisy.rounds[-1][name] < 0.2 < honest.rounds[-1][name]
    of_test = ("accuracy", "loss", "ece", "balanced", "recall", "client_", "held_out_")
    for a, b in rows:
        seen = [name for name in a if not name.startswith(of_test)]
        assert {"validation_accuracy", "train_loss"} <= set(seen)
        assert {n: a[n] for n in seen} == {n: b[n] for n in seen}
    assert honest.summary["stopped"] == noisy.summary["stopped"]
    if stop[0].startswith("sampler"):
        assert honest.summary["stopped"] is None
    else:
        assert 1 < honest.summary["num_rounds"] < 12
    assert cohorts(honest) == cohorts(noisy)


def test_early_stopping_counts_evaluations_without_an_improvement(run):
    result = run(*SMALL_DIGITS, "early_stopping.patience=2", "early_stopping.min_delta=0.05", "client.lr=0.05")
    losses = [row["validation_loss"] for row in result.rounds]
    best, since = losses[0], 0
    counts = []  # evaluations since the last improvement
    for loss in losses[1:]:
        best, since = (loss, 0) if loss < best - 0.05 else (best, since + 1)
        counts.append(since)
    assert counts[-1] == 2 > max(counts[:-1])
    assert len(losses) == result.summary["num_rounds"] < 100
    assert result.summary["status"] == "stopped"
    assert result.summary["stopped"] == "no better validation loss in 2 evaluations"


def test_the_target_is_read_on_validation(run):
    result = run(*SMALL_DIGITS, target_accuracy=0.75)
    accuracies = [row["validation_accuracy"] for row in result.rounds]
    assert accuracies[-1] >= 0.75
    assert all(a < 0.75 for a in accuracies[:-1])
    assert result.summary["stopped"].endswith("reached 0.75")


class Batched(nn.Module):
    """Linear over a batch norm without parameters: all that a client could keep of it are statistics."""

    def __init__(self, input_shape, num_classes):
        super().__init__()
        self.norm = nn.BatchNorm1d(input_shape[0], affine=False, momentum=None)
        self.linear = nn.Linear(input_shape[0], num_classes)

    def forward(self, x):
        return self.linear(self.norm(x))


def test_each_client_is_evaluated_with_the_statistics_that_it_keeps(run):
    settings = (*BLOBS, "buffers=client", "client.batch_size=null", "fraction=1", "dtype=float64")
    result = run(*settings, model=Batched, num_rounds=1)
    experiment = building.build(compose(last([*settings])), {"model": Batched})
    x, y, found = experiment.task.x, experiment.task.y, []
    for k in range(6):
        train, test = (torch.from_numpy(part.of(k)) for part in (experiment.splits.train, experiment.splits.test))
        logits = result.model.linear((x[test] - x[train].mean(0)) / (x[train].var(0) + 1e-5).sqrt())
        found.append((logits.argmax(1) == y[test]).double().mean().item())
    assert len(set(found)) > 1
    measured = [a for a in table(result)["test_accuracy"] if a is not None]
    np.testing.assert_allclose(measured, found, rtol=1e-12)


def test_samplers_that_read_losses_read_each_clients_own_model(run):
    """Else they would read what the client that trained last left in the module, and a resumed run would differ."""
    settings = (*BLOBS, *EVERY, "model=mlp", "model.local=head", "sampler=power_of_choice", "client.lr=0.5")
    short, long = run(*settings, num_rounds=2), run(*settings, num_rounds=5)
    assert len({tuple(cohort) for cohort in cohorts(long).values()}) > 1
    assert contents(resume(short.folder, "num_rounds=5")) == contents(long)


@pytest.mark.parametrize(
    "overrides",
    [("metrics.decomposition_every=1",), ("partition.local_test=0",), ("buffers=client", "partition.local_test=0")],
    ids=str,
)
def test_what_personal_models_cannot_be_evaluated_on_is_refused(run, overrides):
    own = {"model": Batched} if "buffers=client" in overrides else {"strategy": "local"}
    with pytest.raises(UserError, match=r"(decomposition_every|local_test).*|clients keep .*set partition.local_test"):
        run(*BLOBS, *overrides, **own, num_rounds=1)


@pytest.mark.parametrize("stop", ["target_accuracy=0.5", "early_stopping.patience=3"])
@pytest.mark.parametrize("why", ["data.validation=0", "strategy=local", "model.local=bias"])
def test_stops_that_could_never_be_reached_are_refused(run, stop, why):
    with pytest.raises(UserError, match=f"{stop.partition('=')[0]} .*(validation|one global model)"):
        run(*BLOBS, stop, why, num_rounds=1)


# --- every choice runs --------------------------------------------------------------------------------------------

STRATEGIES = options("strategy", roots())
ALL = {
    "model": [name for name in options("model", roots()) if name != "char_gru"],
    "partition": [name for name in options("partition", roots()) if name != "saved"],
    "sampler": options("sampler", roots()),
    "client": [name for name in options("client", roots()) if name != "flower_app"],
    "engine": options("engine", roots()),
}


def assert_ran(result, rounds=1):
    row = result.rounds[-1]
    assert len(result.rounds) == rounds
    assert row["evaluated"] is True
    assert 0 <= row["accuracy"] <= 1
    assert np.isfinite(row["loss"])
    assert all(torch.isfinite(value).all() for value in weights(result).values())
    assert result.summary["status"] == "done"


# What methods need of a model; for all others the smallest.
MODELS = {"fedbn": "mlp_bn", "fedrep": "mlp"}
RULES = {"scaffold_i": "scaffold"}  # of objectives whose rule has another name
YOKED = {"fedld_yoked": "fedld"}  # what reads a finished run, and a strategy of such a run


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_runs(run, strategy):
    # 12 clients a round: what Bulyan's K ≥ 4f + 3 and the trimmed ones need with their defaults.
    settings = [
        "data=blobs", "data.num_samples=240", "partition=iid", "partition.num_clients=12", "fraction=1",
        f"model={MODELS.get(strategy, 'logreg')}", "client.lr=0.05", "num_rounds=1",
    ]  # fmt: skip
    if strategy in YOKED:
        first = run(*settings, f"strategy={YOKED[strategy]}")
        settings.append(f"strategy.run={first.folder}")
    assert_ran(run(*settings, f"strategy={strategy}"))


IMAGES = ("data=blobs", "data.shape=[1,12,12]", "data.num_samples=120", *NATURAL)
RUNS = [pytest.param(group, choice, id=f"{group}={choice}") for group, choices in ALL.items() for choice in choices]


@pytest.mark.parametrize(("group", "choice"), RUNS)
def test_every_choice_runs(run, group, choice):
    if choice == "ray":
        pytest.importorskip("ray", reason="Ray is not installed: pip install 'fedsim[ray]'")
    settings = [*IMAGES, "model=logreg", "partition=iid", f"{group}={choice}", "num_rounds=1", "client.lr=0.01"]
    if group == "model":
        settings += ["client.local_steps=1", "fraction=0.1", "metrics.clients_every=0"]  # one step of one client
    if group == "partition" and choice not in ("natural", "domain"):
        base = "base." if choice in ("feature_noise", "label_noise", "longtail") else ""
        settings.append(f"partition.{base}num_clients=6")
        if choice == "longtail":
            settings.append("partition.imbalance_factor=0.5")
    elif group != "partition":
        settings.append("partition.num_clients=6")
    rule = RULES.get(choice, choice)
    if group == "client" and rule in STRATEGIES:
        # An objective that reads what its own rule sends.
        settings += [f"strategy={rule}", f"model={MODELS.get(choice, 'logreg')}"]
    if choice == "sequential":
        settings.append("engine.channels_last=false")
    assert_ran(run(*settings))


@pytest.mark.parametrize("partition", ["natural", "iid", "dirichlet"])
def test_synthetic_data_runs(run, partition):
    settings = ["data=synthetic", "data.num_clients=5", f"partition={partition}", "model=logreg", "num_rounds=1"]
    assert_ran(run(*settings))


def test_a_saved_partition_runs_as_it_was_drawn(run):
    first = run(*BLOBS, num_rounds=1)
    path = first.folder / "partition.npz"
    second = run(*BLOBS[:2], "model=logreg", "partition=saved", f"partition.path={path}", num_rounds=1)
    assert equal_weights(first, second)


# --- metrics ------------------------------------------------------------------------------------------------------


def test_the_decomposition_telescopes_to_the_global_loss(run):
    result = run(*BLOBS, "metrics.decomposition_every=2", "dtype=float64", num_rounds=4)
    assert "metrics.decomposition_every" in result.summary["plan"]["rows"]
    parts = [name for name in result.rounds[0] if name.startswith("decomposition_")]
    assert parts
    for row in result.rounds:
        assert (row["round"] in (1, 2, 4)) == (parts[0] in row)
    row = result.rounds[-1]
    terms = [row[f"decomposition_{name}"] for name in ("local", "shift", "aggregation")]
    np.testing.assert_allclose(sum(terms), row["decomposition_total"], rtol=1e-12)
    # "global" is over all clients' training data: the final model's loss there, evaluated another way.
    experiment = building.build(compose([*BLOBS, "dtype=float64"]))
    train = torch.from_numpy(experiment.splits.train.indices)
    logits = result.model(experiment.task.x[train]).detach()
    total = nn.functional.cross_entropy(logits, experiment.task.y[train])
    np.testing.assert_allclose(row["decomposition_total"], float(total), rtol=1e-12)


def test_cosines_hold_the_rows_and_change_no_weight(run):
    plain, measured = run(*BLOBS, num_rounds=2), run(*BLOBS, "metrics.cosines=true", num_rounds=2)
    assert plain.summary["plan"]["rows"] == "streamed"
    assert measured.summary["plan"]["rows"] == "held: metrics.cosines"
    new = set(measured.rounds[0]) - set(plain.rounds[0])
    assert any("cosine" in name for name in new)
    for name, value in weights(plain).items():  # another order of the same sum: float32 rounding
        torch.testing.assert_close(value, weights(measured)[name], rtol=1e-5, atol=1e-6)


def test_clients_are_never_evaluated_where_that_is_asked(run):
    result = run(*BLOBS, "metrics.clients_every=0", "metrics.every=2", num_rounds=3)
    assert not any(name.startswith("client_") for row in result.rounds for name in row)
    assert "test_accuracy" not in table(result)
    assert [row["evaluated"] for row in result.rounds] == [True, True, True]  # first, second, last
    silent = run(*BLOBS, "metrics.per_client=false", num_rounds=1)
    assert pq.read_table(silent.folder / "clients.parquet").num_rows == 0


def test_rounds_without_an_evaluation_keep_the_last_known_figures(run):
    result = run(*BLOBS, "metrics.every=3", num_rounds=5)
    rows = result.rounds
    assert [row["evaluated"] for row in rows] == [True, False, True, False, True]
    assert rows[1]["accuracy"] == rows[0]["accuracy"]
    assert rows[3]["loss"] == rows[2]["loss"]
    assert "ece" not in rows[3]


# --- faults -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Poisoned(CrossEntropy):
    """Not a number for clients of some sizes, from their n-th visit on."""

    sizes: tuple[int, ...]
    visits: int = 0

    def init_client(self, layout):
        return {"visits": torch.zeros(())}

    def loss(self, model, params, batch, context):
        value = self.criterion(model(params, batch.x), batch.y, torch.full((len(batch.y),), 1 / len(batch.y)))
        bad = sum(torch.as_tensor(context.num_samples == n) for n in (-1, *self.sizes)) > 0
        return value * torch.where(bad & (context.client_state["visits"] >= self.visits), torch.nan, 1.0), {}

    def finish(self, params, context):
        return {"visits": context.client_state["visits"] + 1}, {}, None


def uneven():
    """Three natural clients of 10, 20 and 30 samples."""
    rng = np.random.default_rng(1)
    x = torch.as_tensor(rng.normal(size=(80, 4)), dtype=torch.float32)
    owner = np.repeat([0, 1, 2, -1], [10, 20, 30, 20])
    splits = {"train": np.arange(60), "test": np.arange(60, 80)}
    return Dataset(x=x, y=torch.as_tensor(rng.integers(0, 3, 80)), splits=splits, num_classes=3, client=owner)


UNEVEN = ("data.validation=0", "partition=natural", "partition.local_test=0", "model=logreg", "fraction=1")


def test_a_round_with_too_few_for_the_rules_guarantee_is_said_once_and_not_the_end(run):
    """8 of 20 are expected, which is enough; a Poisson cohort may be smaller, the first one too."""
    heard = Recorder()
    words = ("strategy=krum", "strategy.num_byzantine=2", "sampler=poisson", "fraction=0.4", "model=logreg", "seed=1")
    result = run(*words, num_rounds=4, observer=heard)
    arrived = [row["num_participants"] for row in result.rounds]
    assert arrived[0] == 6
    said = [line for line in heard.warnings if "guarantee" in line]
    assert len(said) == 1
    assert said[0].startswith("round 1: fewer updates arrived than the rule's guarantee needs, in this round and maybe")
    assert "Krum needs K > 2f + 2 clients, got K=6, f=2" in said[0]
    with pytest.raises(UserError, match=r"Krum needs K > 2f \+ 2 clients, got K=6, f=2"):
        run(*words, "fraction=0.3", num_rounds=1)


@pytest.mark.parametrize("strategy", ["fedavg", "median", "flower/fedavg"])
def test_a_client_that_sends_nan_is_left_out_counted_and_named(run, strategy):
    heard = Recorder()
    settings = {"data": uneven(), "strategy": strategy, "num_rounds": 2}
    result = run(*UNEVEN, client=Poisoned((20,)), observer=heard, **settings)
    assert [row["num_dropped"] for row in result.rounds] == [1, 1]
    assert [row["num_participants"] for row in result.rounds] == [2, 2]
    assert result.summary["num_dropped"] == 2
    assert heard.warnings == [f"round {t}: the update of client 1 is not finite; it is left out" for t in (1, 2)]
    assert all(torch.isfinite(value).all() for value in weights(result).values())
    assert cohorts(result) == {1: [0, 2], 2: [0, 2]}


def test_bad_updates_may_stop_the_run(run, tmp_path):
    with pytest.raises(RuntimeError, match=r"round 1: the update of client \[1\] is not finite"):
        run(*UNEVEN, data=uneven(), client=Poisoned((20,)), on_bad_update="raise", num_rounds=2, folder=tmp_path / "x")


@pytest.mark.parametrize("strategy", ["fedavg", "median", "krum", "flower/fedavg", "flower/fedmedian"])
def test_a_round_of_bad_updates_stops_the_run_and_keeps_the_last_good_model(run, tmp_path, strategy):
    extra = ("strategy.num_byzantine=0",) if strategy == "krum" else ()
    arguments = {"data": uneven(), "strategy": strategy}
    good = run(*UNEVEN, *extra, client=Poisoned(()), num_rounds=2, **arguments)
    broken = Poisoned((10, 20, 30), visits=2)  # all are bad in round 3
    folder = tmp_path / "broken"
    with pytest.raises(RuntimeError, match=r"round 3: none of 3 updates can be used: 3 are not finite"):
        run(*UNEVEN, *extra, client=broken, num_rounds=9, folder=folder, **arguments)
    assert (folder / "model.safetensors").read_bytes() == (good.folder / "model.safetensors").read_bytes()
    assert len((folder / "rounds.jsonl").read_text().splitlines()) == 2


SEQUENTIAL = "engine=sequential"  # the objective below branches on a value, which a batched program cannot


@dataclass(frozen=True)
class Raising(CrossEntropy):
    def loss(self, model, params, batch, context):
        if context.num_samples == 20:
            raise KeyError("missing")
        return self.criterion(model(params, batch.x), batch.y, torch.full((len(batch.y),), 1 / len(batch.y))), {}


def test_an_error_in_an_objective_names_client_and_round(run, tmp_path):
    with pytest.raises(RuntimeError, match="client 1 failed in round 1: KeyError: 'missing'") as caught:
        run(*UNEVEN, SEQUENTIAL, data=uneven(), client=Raising(), num_rounds=1, folder=tmp_path / "x")
    chain, error = [], caught.value
    while error is not None:
        chain.append(type(error))
        error = error.__cause__
    assert KeyError in chain  # -v shows where it was raised
    assert (tmp_path / "x" / "model.safetensors").exists()


def test_failing_clients_may_be_left_out(run):
    heard = Recorder()
    result = run(
        *UNEVEN, SEQUENTIAL, data=uneven(), client=Raising(), on_client_error="drop", observer=heard, num_rounds=2
    )  # fmt: skip
    assert cohorts(result) == {1: [0, 2], 2: [0, 2]}
    assert [row["num_dropped"] for row in result.rounds] == [1, 1]
    assert heard.warnings[0] == "round 1: client 1 failed and is left out: KeyError: 'missing'"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("partition.num_clients=500",), "num_clients"),
        (("partition.held_out_clients=0.99",), "held_out_clients"),
        (("strategy=krum", "strategy.num_byzantine=5"), "strategy.*num_byzantine"),
        (("model=lenet",), "model.*(10,)"),
        (("data.num_classes=1",), "num_classes"),
    ],
    ids=str,
)
def test_what_cannot_run_is_said_before_anything_is_written(run, tmp_path, overrides, message):
    folder = tmp_path / "never"
    with pytest.raises(UserError, match=message):
        run(*BLOBS, *overrides, folder=folder)
    assert not folder.exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_inputs_that_are_not_finite_are_refused(run, value):
    data = uneven()
    data.x[3, 1] = value
    with pytest.raises(UserError, match=r"(?i)nan|finite"):
        run(*UNEVEN, data=data)


def test_labels_out_of_range_are_refused(run):
    data = uneven()
    with pytest.raises(UserError, match="label"):
        run(*UNEVEN, data=data._replace(y=torch.full_like(data.y, 3)))


# --- folders ------------------------------------------------------------------------------------------------------


def test_a_folder_holds_what_was_promised(tmp_path):
    result = fedsim.simulate(*BLOBS, num_rounds=2, folder=tmp_path / "all")
    names = {path.name for path in result.folder.iterdir()}
    assert names >= {
        "config.yaml", "plan.json", "rounds.jsonl", "clients.parquet", "model.safetensors", "checkpoints",
        "summary.json", "partition.npz", "partition.png",
    }  # fmt: skip
    summary = json.loads((result.folder / "summary.json").read_text())
    assert summary["status"] == "done"
    assert summary["num_rounds"] == 2
    assert summary["seed"] == 0
    assert summary["choices"]["strategy"] == "fedavg"
    assert summary["accuracy"] == result.rounds[-1]["accuracy"]
    assert summary["loss"] == result.rounds[-1]["loss"]
    assert summary["bytes_up"] == sum(row["bytes_up"] for row in result.rounds) > 0
    assert summary["bytes_down"] == sum(row["bytes_down"] for row in result.rounds) > 0
    assert summary["best_validation"]["round"] in (1, 2)
    assert set(summary["seconds"]) == {"setup", "train", "aggregate", "evaluate", "record", "total"}
    assert all(value >= 0 for value in summary["seconds"].values())
    plan = json.loads((result.folder / "plan.json").read_text())
    assert {"engine", "rows", "device", "threads", "dtype", "cohort", "versions"} <= set(plan)
    assert not list(result.folder.rglob("*.tmp"))
    assert not list(result.folder.rglob("*.partial"))


def test_a_used_folder_is_refused(run, tmp_path):
    run(*BLOBS, num_rounds=1, folder=tmp_path / "used")
    before = {p.name: p.read_bytes() for p in (tmp_path / "used").iterdir() if p.is_file()}
    with pytest.raises(UserError, match=r"used holds a run already; go on with `fedsim run resume=.*used`"):
        run(*BLOBS, num_rounds=1, folder=tmp_path / "used")
    assert before == {p.name: p.read_bytes() for p in (tmp_path / "used").iterdir() if p.is_file()}


@pytest.mark.parametrize(
    "settings",
    [
        ("strategy=fedadam",),
        ("strategy=fedld", "partition=dirichlet", "partition.num_clients=6"),
        ("model.local=bias",),
    ],
    ids=" ".join,
)
def test_more_rounds_on_resume_are_a_longer_run_to_the_bit(run, settings):
    short, long = run(*BLOBS, *EVERY, *settings, num_rounds=3), run(*BLOBS, *EVERY, *settings, num_rounds=6)
    heard = Recorder()
    resumed = resume(short.folder, "num_rounds=6", observer=heard)
    assert heard.warnings == []
    assert contents(resumed) == contents(long)
    shared = [name for name in long.summary if name not in ("seconds", "plan")]
    assert {n: repr(resumed.summary[n]) for n in shared} == {n: repr(long.summary[n]) for n in shared}


def test_more_rounds_are_a_longer_run_where_evaluation_is_rare_too(run):
    """The last round is always evaluated; that must not show in what a longer run does."""
    losses = [row["validation_loss"] for row in run(*BLOBS, "metrics.every=1", "client.lr=0.1", num_rounds=4).rounds]
    step = losses[0] - losses[3]  # from one regular evaluation to the next; from round 3 to 4 it is less
    delta = (step + losses[2] - losses[3]) / 2
    assert 0 < delta < step
    settings = (*BLOBS, "metrics.every=4", "early_stopping.patience=1", f"early_stopping.min_delta={delta}")
    settings += ("client.lr=0.1",)
    short, long = run(*settings, num_rounds=3), run(*settings, num_rounds=5)
    assert long.summary["stopped"] is None
    resumed = resume(short.folder, "num_rounds=5")
    assert resumed.summary["stopped"] is None
    assert equal_weights(resumed, long)


def test_a_stopped_run_stays_stopped(run):
    settings = (*SMALL_DIGITS, "early_stopping.patience=1", "early_stopping.min_delta=0.1")
    result = run(*settings, num_rounds=30)
    assert result.summary["num_rounds"] < 30
    before = contents(result)
    again = resume(result.folder)
    assert contents(again) == before
    assert again.summary["stopped"] == result.summary["stopped"]
    assert contents(resume(result.folder, "num_rounds=40")) == before


def test_a_finished_run_has_nothing_to_add(run):
    result = run(*BLOBS, num_rounds=2)
    before, heard = contents(result), Recorder()
    again = resume(result.folder, observer=heard)
    assert contents(again) == before
    assert heard.notes == ["the run has its 2 rounds already"]


def test_a_run_cannot_go_back_to_fewer_rounds(run):
    result = run(*BLOBS, num_rounds=3)
    before, config = contents(result), (result.folder / "config.yaml").read_bytes()
    with pytest.raises(UserError, match=r"has 3 rounds, and cannot go back to num_rounds=2"):
        resume(result.folder, "num_rounds=2")
    assert contents(result) == before
    assert (result.folder / "config.yaml").read_bytes() == config


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("client.lr=0.7",), r"differs: client\.lr=0\.3, asked 0\.7$"),
        (("seed=1", "partition.num_clients=5"), r"differs: partition\.num_clients=6, asked 5; seed=0, asked 1$"),
        (("strategy=fedadam",), r"differs: strategy=fedavg, asked fedadam$"),
    ],
)
def test_another_config_is_refused_with_the_keys_that_differ(run, overrides, message):
    result = run(*BLOBS, num_rounds=1)
    before = contents(result)
    with pytest.raises(UserError, match=message):
        resume(result.folder, *overrides)
    assert contents(result) == before
    resume(result.folder, "client.lr=0.3", "num_rounds=1")  # what it has anyway is no change


def test_resume_says_what_is_wrong_with_a_folder(run, tmp_path):
    with pytest.raises(UserError, match=r"nowhere.*not a run folder"):
        resume(tmp_path / "nowhere")
    result = run(*BLOBS, num_rounds=1)
    for path in (result.folder / "checkpoints").glob("*.safetensors"):
        path.write_bytes(b"nothing")
    with pytest.raises(UserError, match=r"no checkpoint in .* can be read \(round 1"):
        resume(result.folder, "num_rounds=3")


def test_a_checkpoint_of_another_model_is_refused(run):
    one, other = run(*BLOBS, num_rounds=1), run(*BLOBS, "data.num_classes=3", num_rounds=1)
    for path in (other.folder / "checkpoints").iterdir():
        (one.folder / "checkpoints" / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match=r"checkpoint.*another"):
        resume(one.folder, "num_rounds=2")


# --- objects ------------------------------------------------------------------------------------------------------


def test_objects_stand_in_for_groups(run):
    named = run(
        "partition=iid", "partition.num_clients=5", "model=logreg", "client.lr=0.1", "client.batch_size=10",
        "strategy.server_lr=0.5", num_rounds=2,
    )  # fmt: skip
    rule, training = FedAvg(server_lr=0.5), LocalTraining(lr=0.1, batch_size=10)
    objects = run(
        data=digits, model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(64, 10)), client=CrossEntropy(),
        training=training, strategy=rule, partition=IID(num_clients=5), sampler=Uniform(), num_rounds=2,
    )  # fmt: skip
    assert [row["num_participants"] for row in objects.rounds] == [row["num_participants"] for row in named.rounds]
    assert cohorts(objects) == cohorts(named)
    plain = [list(weights(result).values()) for result in (objects, named)]
    assert all(torch.equal(a, b) for a, b in zip(*plain, strict=True))


def test_a_module_is_trained_in_place_of_a_named_model(run):
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    before = module[1].weight.detach().clone()
    result = run("partition=iid", data=digits(), model=module, num_rounds=1)
    assert not torch.equal(result.model[1].weight, before)
    assert not result.model.training
    torch.testing.assert_close(result.model[1].weight.detach(), weights(result)["1.weight"], rtol=0, atol=0)


def test_a_run_of_objects_says_that_it_cannot_be_resumed_from_its_folder(run):
    result = run(*BLOBS, strategy=FedAvg(), num_rounds=1)
    with pytest.raises(UserError, match="started from Python with objects for strategy"):
        resume(result.folder, "num_rounds=2")


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"data": (1, 2)}, "data must be a fedsim.contracts.Dataset"),
        ({"client": {"lr": 0.1}}, "client must be an objective"),
        ({"strategy": 3}, "strategy must be a rule"),
        ({"strategy": FedAvg}, "the class FedAvg: call it"),
        ({"model": 3}, "model must be an nn.Module"),
    ],
)
def test_an_object_of_the_wrong_kind_is_refused(wrong, words, tmp_path):
    with pytest.raises(UserError, match=words):
        fedsim.simulate(num_rounds=1, folder=tmp_path / "run", **wrong)
