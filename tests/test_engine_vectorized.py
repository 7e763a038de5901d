"""Rows of one batched program train as each client would alone."""

import copy
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.feddyn import FedDyn
from fedsim.clients.fedhyper import FedHyper
from fedsim.clients.fedprox import FedProx
from fedsim.clients.margin import Margin
from fedsim.clients.moon import Moon
from fedsim.clients.scaffold import Scaffold
from fedsim.contracts import Partition, Phase
from fedsim.engine.auto import make_engine
from fedsim.engine.captured import Captured
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import LOCAL, Job, Task
from fedsim.engine.unrolled import Unrolled, unrolled
from fedsim.engine.vectorized import Vectorized
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.char_gru import GRU, char_gru
from fedsim.models.cnn import cnn
from fedsim.models.dropout import KeyedDropout
from fedsim.models.mlp import mlp
from fedsim.models.parameters import split_parameters
from fedsim.models.resnet import resnet8
from fedsim.rng import fold_in

SIZES = np.array([7, 1, 20, 13, 4, 4])  # unequal on purpose: prefixes shrink, last batches are short
N = int(SIZES.sum())
GENERATOR = torch.Generator().manual_seed(0)
MODELS = {
    "mlp": (lambda: mlp((8,), 5, hidden=(6,)), torch.randn(N, 8, generator=GENERATOR), 5),
    "cnn": (
        lambda: cnn((1, 12, 12), 5, channels=(3, 4), hidden=6, dropout=(0.2, 0.3)),
        torch.randn(N, 1, 12, 12, generator=GENERATOR),
        5,
    ),
    "resnet8": (lambda: resnet8((3, 8, 8), 5), torch.randn(N, 3, 8, 8, generator=GENERATOR), 5),
    "char_gru": (
        lambda: char_gru((6,), 9, embedding=3, hidden=4),
        torch.randint(0, 9, (N, 6), generator=GENERATOR),
        9,
    ),
}
TRAININGS = {
    "sgd": LocalTraining(lr=0.2, batch_size=4, local_epochs=2),
    "decay": LocalTraining(lr=0.2, batch_size=4, weight_decay=0.1),
    "momentum": LocalTraining(lr=0.1, batch_size=5, momentum=0.9, weight_decay=0.1),
    "clipped": LocalTraining(lr=0.1, batch_size=4, local_steps=5, clip_norm=0.05),
    "adamw": LocalTraining(optimizer="adamw", lr=0.01, batch_size=4, weight_decay=0.1, local_epochs=2),
    "whole": LocalTraining(lr=0.1, batch_size=None, local_epochs=2),
}


def make_task(
    name="mlp", objective=None, training=None, *, module=None, local=None, trainable=None, dtype=torch.float64
):
    build, x, classes = MODELS[name]
    torch.manual_seed(1)
    module = copy.deepcopy(module or build()).to(dtype)
    parts = split_parameters(module, local=local, trainable=trainable)
    own = dict(module.named_parameters())
    for key in parts.frozen:
        own[key].requires_grad_(False)
    first = {LOCAL + key: own[key].detach().clone() for key in parts.local.names}
    objective = objective or CrossEntropy()
    if hasattr(objective, "init_client"):
        first |= {key: value.to(dtype) for key, value in objective.init_client(parts.shared).items()}
    partition = Partition(np.random.default_rng(0).permutation(N), np.concatenate([[0], np.cumsum(SIZES)]))
    task = Task(
        module=module,
        shared=parts.shared,
        local=parts.local,
        buffers=Layout((), ()),
        objective=objective,
        training=training or TRAININGS["sgd"],
        x=x.to(dtype) if x.is_floating_point() else x,
        y=torch.randint(0, classes, (N,), generator=torch.Generator().manual_seed(2)),
        partition=partition,
        store=ClientStore(len(SIZES), first),
    )
    return task, parts.shared.join({key: own[key].detach().clone() for key in parts.shared.names})


def make_job(task, weights, clients=None, **changes):
    clients = np.arange(len(SIZES)) if clients is None else np.array(clients)
    job = Job(
        clients=clients,
        received=np.zeros(len(clients), dtype=np.int64),
        models={0: weights},
        broadcasts={},
        buffers=weights.new_zeros(0),
        state=task.store.get(clients, torch.device("cpu")),
        round=1,
        key=1,
        lr=task.training.lr,
    )
    return replace(job, **changes)


def train(engine, job, size):
    out = torch.empty(len(job), size, dtype=next(iter(job.models.values())).dtype)
    return out, engine.train(job, out)


def batched(task, kernels, chunk=4):
    if kernels == "captured":
        return Captured(task, threads=2)
    return Vectorized(task, kernels=kernels, chunk=chunk, threads=2)


def compare(make_objective, name="mlp", training=None, kernels="auto", tolerance=1e-9, rounds=1, chunk=4, **changes):
    """Train on both engines and compare everything that rows leave."""
    results = []
    for kind in (Sequential, lambda task: batched(task, kernels, chunk)):
        task, weights = make_task(name, make_objective(), training, **changes)
        trainer = Trainer(kind(task))
        for number in range(1, rounds + 1):
            job = make_job(task, weights, round=number, key=number)
            cohort, _ = trainer.collect(job)
        results.append((cohort, task.store.rows()[1]))
        trainer.engine.close()
    (one, kept), (other, also) = results
    scale = one.rows.abs().max()
    torch.testing.assert_close(one.rows, other.rows, rtol=0, atol=tolerance * float(scale))
    torch.testing.assert_close(one.weights, other.weights)
    assert torch.equal(one.num_steps, other.num_steps)
    assert one.extras.keys() == other.extras.keys()
    for key in one.extras:
        torch.testing.assert_close(one.extras[key], other.extras[key], rtol=tolerance, atol=tolerance)
    assert kept.keys() == also.keys()
    for key in kept:
        torch.testing.assert_close(kept[key], also[key], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("kernels", ["fused", "generic", "captured"])
@pytest.mark.parametrize("training", TRAININGS)
def test_every_optimiser_takes_the_clients_own_steps(training, kernels):
    # 1e-9: promise 3 between engine families in float64
    compare(CrossEntropy, training=TRAININGS[training], kernels=kernels)


@pytest.mark.parametrize("kernels", ["fused", "generic", "captured"])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_as_alone(name, kernels):
    compare(CrossEntropy, name, kernels=kernels)
    compare(CrossEntropy, name, TRAININGS["momentum"], kernels=kernels)


@pytest.mark.parametrize("kernels", ["fused", "generic", "captured"])
@pytest.mark.parametrize("training", ["sgd", "decay", "momentum", "adamw"])
@pytest.mark.parametrize(
    "objective", [lambda: Margin(margin_lambda=0.3), lambda: FedProx(proximal_mu=0.4)], ids=["margin", "fedprox"]
)
def test_margin_and_proximal_terms(objective, training, kernels):
    compare(objective, training=TRAININGS[training], kernels=kernels)


class Recurrent(nn.Module):
    """Tokens through an embedding, a recurrent layer and dropout; `read` says what of the layer's results is used."""

    def __init__(self, layer, read=lambda states, last: states[:, -1], dropout=0.0, calls=1):
        super().__init__()
        self.table, self.layer, self.head = nn.Embedding(9, 4), layer, nn.Linear(4, 9)
        self.drop, self.read, self.calls = KeyedDropout(dropout), read, calls

    def forward(self, x):
        h, last = self.table(x), None
        for _ in range(self.calls):
            results = self.layer(self.drop(h))
            h, last = results if isinstance(results, tuple) else (results, None)
        return self.head(self.read(h, last))


RECURRENT = {
    "own gru": lambda: Recurrent(GRU(4, 4), dropout=0.3),
    "own gru, used twice": lambda: Recurrent(GRU(4, 4), calls=2),
    "gru": lambda: Recurrent(nn.GRU(4, 4, 2, batch_first=True), lambda states, last: states.mean(1) + last[0]),
    "lstm": lambda: Recurrent(nn.LSTM(4, 4, 2, batch_first=True), lambda states, last: states.sum(1) + last[0][-1]),
    "gru without biases": lambda: Recurrent(nn.GRU(4, 4, bias=False, batch_first=True)),
    "lstm, time first": lambda: Recurrent(
        nn.Sequential(Swap(), nn.LSTM(4, 4)), lambda states, last: states[-1], dropout=0.2
    ),
}


class Swap(nn.Module):
    def forward(self, x):
        return x.transpose(0, 1)


@pytest.mark.parametrize("kernels", ["fused", "generic"])
@pytest.mark.parametrize("name", RECURRENT)
def test_recurrent_layers_train_as_alone(name, kernels):
    compare(CrossEntropy, "char_gru", kernels=kernels, module=RECURRENT[name]())


@pytest.mark.parametrize("training", ["decay", "momentum", "clipped", "adamw", "whole"])
@pytest.mark.parametrize("name", ["own gru", "lstm"])
def test_recurrent_kernels_under_every_optimiser(name, training):
    compare(lambda: FedProx(proximal_mu=0.4), "char_gru", TRAININGS[training], "fused", module=RECURRENT[name]())


@pytest.mark.parametrize("name", ["own gru", "lstm"])
def test_recurrent_kernels_with_frozen_and_local_parameters(name):
    module = RECURRENT[name]()
    compare(CrossEntropy, "char_gru", kernels="fused", module=module, trainable=["layer"])
    compare(CrossEntropy, "char_gru", kernels="fused", module=module, trainable=["head", "table"])
    compare(CrossEntropy, "char_gru", kernels="fused", module=module, local="layer", rounds=2)


def test_a_model_that_reads_an_lstms_cells_is_batched_but_not_merged():
    module = Recurrent(nn.LSTM(4, 4, batch_first=True), lambda states, last: last[1][-1])
    task, _ = make_task("char_gru", module=module)
    assert Vectorized(task).plan["kernels"] == "generic"
    compare(CrossEntropy, "char_gru", module=module)


class ReadsAWeight(nn.Module):
    """Uses a layer's weight without the layer."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x):
        return nn.functional.linear(x, 2 * self.layer.weight, self.layer.bias)


def test_a_model_that_reads_a_layers_weight_itself_is_batched_but_not_merged():
    task, _ = make_task(module=ReadsAWeight())
    assert Vectorized(task).plan["kernels"] == "generic"
    compare(CrossEntropy, module=ReadsAWeight())


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
def test_an_unrolled_layer_answers_what_models_ask_of_torchs_own(kind):
    layer = kind(4, 3, num_layers=2, batch_first=True)
    mine = unrolled(nn.Sequential(layer))[0]
    mine.flatten_parameters()
    for name in ("input_size", "hidden_size", "num_layers", "bias", "batch_first", "dropout", "bidirectional", "mode"):
        assert getattr(mine, name) == getattr(layer, name)


@pytest.mark.parametrize("kind", [nn.GRU, nn.LSTM])
@pytest.mark.parametrize("batch_first", [True, False])
def test_an_unrolled_layer_is_torchs_own(kind, batch_first):
    torch.manual_seed(0)
    layer = kind(3, 4, num_layers=2, batch_first=batch_first, dtype=torch.float64)
    x, zero = torch.randn(5, 6, 3, dtype=torch.float64), torch.randn(2, 5 if batch_first else 6, 4, dtype=torch.float64)
    first = zero if kind is nn.GRU else (zero, 2 * zero)
    for state in (None, first):
        torch.testing.assert_close(Unrolled(layer)(x, state), layer(x, state), rtol=1e-12, atol=1e-12)
    assert unrolled(nn.Sequential(layer)).state_dict().keys() == nn.Sequential(layer).state_dict().keys()


def test_float32_agrees_to_its_own_digits():
    compare(CrossEntropy, tolerance=1e-4, dtype=torch.float32)


@pytest.mark.parametrize("kernels", ["fused", "generic", "captured"])
def test_frozen_and_local_parameters(kernels):
    compare(CrossEntropy, kernels=kernels, trainable=["head"], rounds=2)
    compare(CrossEntropy, kernels=kernels, local="head", rounds=2)
    compare(CrossEntropy, "cnn", kernels=kernels, trainable=["head", "conv2"])


class Idle(nn.Module):
    """Has a layer that its forward never reads."""

    def __init__(self):
        super().__init__()
        self.aux, self.head = nn.Linear(3, 3), nn.Linear(8, 5)

    def forward(self, x):
        return self.head(x)


@pytest.mark.parametrize("kernels", ["fused", "generic", "captured"])
def test_pull_and_decay_reach_what_they_should_and_nothing_else(kernels):
    prox = lambda: FedProx(proximal_mu=0.5)  # noqa: E731
    compare(prox, kernels=kernels, local="head", rounds=2)  # nothing pulls a personal head
    compare(prox, training=TRAININGS["decay"], kernels=kernels, module=Idle(), rounds=2)  # decay reaches the idle layer


@pytest.mark.parametrize("kernels", ["fused", "generic", "captured"])
def test_versions_may_come_with_their_own_proximal_strength(kernels):
    results = []
    for kind in (Sequential, lambda task: batched(task, kernels)):
        task, weights = make_task(objective=FedProx())
        received, models = np.array([0, 1, 0, 1, 1, 0]), {0: weights, 1: 1.2 * weights}
        sent = {0: {"proximal_mu": 0.1}, 1: {"proximal_mu": 0.9}}
        job = make_job(task, weights, received=received, models=models, broadcasts=sent)
        results.append(train(kind(task), job, task.shared.size)[0])
    torch.testing.assert_close(*results, rtol=0, atol=1e-12)


@dataclass(frozen=True)
class Uploads(CrossEntropy):
    """Sends its own parameters as they are, without a copy."""

    def finish(self, params, context):
        return {}, {"mine": params["head.bias"]}, None


def test_uploads_are_each_clients_own():
    compare(Uploads)


@dataclass(frozen=True)
class Controlled:
    """A control variate in the clients' state, moved by what the step state saw: every optional member at once."""

    def init_client(self, layout):
        return {"control": torch.zeros(layout.size), "visits": torch.zeros(())}

    def loss(self, model, params, batch, context):
        pull = sum(((params[n] - context.received[n]) ** 2).sum() for n in params if n in context.received)
        noise = fold_in(context.key, context.step).double() / 2**32
        loss = nn.functional.cross_entropy(model(params, batch.x), batch.y) + (0.1 + 0.01 * noise) * pull
        return loss * (1 + 0.001 * context.client_state["visits"]), {}

    def direction(self, grads, params, context):
        control = context.layout.split(context.client_state["control"])
        seen = context.step_state["seen"] if context.step_state else torch.zeros_like(context.key, dtype=torch.float64)
        turned = {n: g - control[n] for n, g in grads.items()}
        return turned, {"seen": seen + 1, "lr_scale": 1 / (1 + 0.1 * seen)}

    def finish(self, params, context):
        moved = context.layout.join({n: params[n] - context.received[n] for n in context.layout.names})
        kept = {"control": 0.1 * moved, "visits": context.client_state["visits"] + 1}
        return kept, {"drift": (moved**2).sum(), "half": 0.5 * moved}, context.num_samples * 2


def test_state_directions_second_uploads_and_weights():
    compare(Controlled, rounds=3)
    compare(Controlled, training=TRAININGS["momentum"], rounds=2, chunk=6)


@dataclass(frozen=True)
class Unnumbered(Controlled):
    """The same, with a loss that does not ask for the number of its step: such a step can be recorded."""

    def loss(self, model, params, batch, context):
        pull = sum(((params[n] - context.received[n]) ** 2).sum() for n in params if n in context.received)
        noise = context.key.double() / 2**32
        loss = nn.functional.cross_entropy(model(params, batch.x), batch.y) + (0.1 + 0.01 * noise) * pull
        return loss * (1 + 0.001 * context.client_state["visits"]), {}


@pytest.mark.parametrize("training", ["sgd", "decay", "momentum", "clipped", "adamw"])
def test_recorded_state_directions_second_uploads_and_weights(training):
    compare(Unnumbered, training=TRAININGS[training], rounds=3, kernels="captured")


def control(weights):
    return {"control": 0.01 * torch.arange(len(weights)).to(weights).cos()}


def previous(weights):
    return {"previous": 0.1 * torch.arange(len(weights)).to(weights).sin(), "num_participants": 6.0}


TOLD = {
    "scaffold": (Scaffold, control),
    "feddyn": (FedDyn, lambda weights: {}),
    "moon": (Moon, lambda weights: {}),
    "fedhyper, first round": (lambda: FedHyper(kappa=0.5), lambda weights: {}),
    "fedhyper": (lambda: FedHyper(kappa=0.5), previous),
    "fedhyper, released": (lambda: FedHyper(kappa=0.5, preset="reference"), previous),
    "fedhyper, cosine": (lambda: FedHyper(kappa=0.5, normalize="cosine"), previous),
    "fedhyper of fedprox": (lambda: FedHyper(objective=FedProx(proximal_mu=0.3)), previous),
}


@pytest.mark.parametrize("training", ["sgd", "momentum", "clipped", "adamw"])
@pytest.mark.parametrize("name", TOLD)
def test_clients_of_two_sided_methods_are_recorded_as_they_are(name, training):
    make_objective, told = TOLD[name]
    results = []
    for kind in (Sequential, lambda task: batched(task, "captured")):
        task, weights = make_task(objective=make_objective(), training=TRAININGS[training])
        engine = kind(task)
        for number in (1, 2, 3):
            job = make_job(task, weights, round=number, key=number, broadcasts={0: told(weights)}, lr=0.1 / number)
            out, block = train(engine, job, task.shared.size)
            task.store.put(job.clients, block.state)
        results.append((out, block))
        engine.close()
    (one, left), (other, also) = results
    torch.testing.assert_close(other, one, rtol=0, atol=1e-9 * float(one.abs().max()))
    for group in ("state", "extras"):
        assert getattr(left, group).keys() == getattr(also, group).keys()
        for key, value in getattr(left, group).items():
            torch.testing.assert_close(getattr(also, group)[key], value, rtol=1e-9, atol=1e-9)


@dataclass(frozen=True)
class HeadThenBody(CrossEntropy):
    """Two phases of unlike lengths that move unlike parameters."""

    def phases(self):
        return (Phase(local_epochs=2, params="head"), Phase(local_steps=3, params="body"))


@pytest.mark.parametrize("kernels", ["fused", "generic"])
def test_phases(kernels):
    compare(HeadThenBody, kernels=kernels, local="head", rounds=2)


def test_rows_may_start_from_their_own_versions():
    for kernels in ("fused", "generic"):
        results = []
        for kind in (Sequential, lambda task, k=kernels: Vectorized(task, kernels=k)):
            task, weights = make_task(objective=FedProx(proximal_mu=0.3))
            models = {3: weights, 5: weights * 1.1, 6: -weights}
            received = np.array([5, 3, 6, 5, 3, 6])
            job = make_job(task, weights, received=received, models=models, key=np.arange(6) + 40)
            results.append(train(kind(task), job, task.shared.size)[0])
        torch.testing.assert_close(*results, rtol=0, atol=1e-9)


def test_rows_may_do_a_share_of_their_steps():
    work = np.array([0.5, 1.0, 0.2, 0.7, 1.0, 0.4])
    results = []
    for kind in (Sequential, Vectorized):
        task, weights = make_task()
        out, block = train(kind(task), make_job(task, weights, work=work), task.shared.size)
        results.append((out, block.num_steps))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=0, atol=1e-12)
    assert torch.equal(results[0][1], results[1][1])
    assert results[0][1].tolist() == [2, 2, 2, 6, 2, 1]  # shares of 4, 2, 10, 8, 2, 2 steps, rounded up


def test_bits_depend_neither_on_threads_nor_on_who_else_trains_in_other_chunks():
    results = []
    for threads in (1, 2, 3):
        task, weights = make_task(dtype=torch.float32)
        results.append(train(Vectorized(task, chunk=2, threads=threads), make_job(task, weights), task.shared.size)[0])
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_row_of_a_smaller_cohort_is_the_same_row():
    task, weights = make_task()
    whole = train(Vectorized(task), make_job(task, weights), task.shared.size)[0]
    part = train(Vectorized(task), make_job(task, weights, clients=(2, 5)), task.shared.size)[0]
    torch.testing.assert_close(part, whole[[2, 5]], rtol=0, atol=1e-12)


def test_streamed_equals_held():
    task, weights = make_task()
    trainer = Trainer(Vectorized(task, chunk=2))
    held, _ = trainer.collect(make_job(task, weights))
    mean = (held.weights @ held.rows) / held.weights.sum()
    streamed, _ = trainer.stream(make_job(task, weights), lambda cohort: cohort.weights)
    torch.testing.assert_close(streamed.streamed.mean, mean, rtol=0, atol=1e-12)


class MixesTheBatch(nn.Module):
    """Looks at other samples of its batch, which merged rows would share."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x):
        return self.layer(x - x.mean(0))


class Branches(nn.Module):
    """Asks for a tensor's value, which no batched program has."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(8, 5)

    def forward(self, x):
        h = self.layer(x)
        return h * 2 if h.sum() > 0 else h


def test_a_model_that_mixes_samples_is_batched_by_rows_and_not_merged():
    task, _ = make_task(module=MixesTheBatch())
    assert Vectorized(task).plan["kernels"] == "generic"
    compare(CrossEntropy, module=MixesTheBatch())


def test_what_cannot_be_batched_is_named_and_auto_falls_back():
    task, _ = make_task(module=Branches())
    with pytest.raises(UserError, match=r"h\.sum\(\) > 0") as caught:
        make_engine(task, "vectorized", cohort=6, threads=1)
    assert "engine=sequential runs it" in str(caught.value)
    engine, reason = make_engine(task, "auto", cohort=6, threads=1)
    assert engine.plan["engine"] == "sequential"
    assert "h.sum() > 0" in reason


@dataclass(frozen=True)
class Peeks:
    """A loss that asks for a tensor's value; `broadcast` hides that until a rule has sent something."""

    hidden: bool = False

    def loss(self, model, params, batch, context):
        loss = nn.functional.cross_entropy(model(params, batch.x), batch.y)
        if self.hidden:
            loss = loss * context.broadcast["factor"]
        return (2 * loss if loss.item() > 1 else loss), {}


def test_an_objective_that_cannot_be_batched_is_named_too():
    task, _ = make_task(objective=Peeks())
    engine, reason = make_engine(task, "auto", cohort=60, threads=1)
    assert engine.plan["engine"] == "sequential"
    assert "loss.item() > 1" in reason


def test_an_objective_that_shows_only_in_training_that_it_cannot_be_batched_is_no_clients_failure():
    task, weights = make_task(objective=Peeks(hidden=True))
    job = make_job(task, weights, broadcasts={0: {"factor": 2.0}})
    with pytest.raises(UserError, match=r"loss\.item\(\) > 1.*engine=sequential runs it"):
        Trainer(Vectorized(task), on_client_error="drop").collect(job)


def test_batch_norm_is_refused_with_the_reason():
    task, _ = make_task()
    task = replace(task, buffers=Layout(("running_mean",), ((3,),)))
    with pytest.raises(ValueError, match="running statistics"):
        Vectorized(task)


@pytest.mark.parametrize(
    ("name", "cohort", "plan"),
    [
        ("mlp", 6, "captured"),
        ("mlp", 1, "captured"),
        ("cnn", 6, "captured"),
        ("mlp", 40, "fused"),
        ("char_gru", 40, "fused"),
    ],
)
def test_auto_follows_its_table(name, cohort, plan):
    task, _ = make_task(name)
    for asked in ("auto", "vectorized"):
        engine, _ = make_engine(task, asked, cohort=cohort, threads=1)
        assert engine.plan["kernels"] == plan
        engine.close()


@pytest.mark.parametrize(("name", "cohort"), [("mlp", 1), ("cnn", 2)])
def test_auto_trains_one_by_one_what_cannot_be_recorded(name, cohort):
    task, _ = make_task(name, HeadThenBody(), local="head")
    engine, _ = make_engine(task, "auto", cohort=cohort, threads=1)
    assert engine.plan["engine"] == "sequential"


@pytest.mark.parametrize("arguments", [{"chunk": 0}, {"kernels": "fast"}])
def test_arguments_are_checked(arguments):
    task, _ = make_task()
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Vectorized(task, **arguments)


@pytest.mark.parametrize("kernels", ["fused", "generic"])
@pytest.mark.parametrize(
    ("make_objective", "name", "training"),
    [
        (CrossEntropy, "cnn", TRAININGS["sgd"]),  # whose dropout is keyed
        (CrossEntropy, "resnet8", TRAININGS["momentum"]),
        (lambda: FedProx(proximal_mu=0.5), "mlp", TRAININGS["adamw"]),
        (FedDyn, "cnn", TRAININGS["clipped"]),
    ],
)
def test_rows_that_are_always_alone_need_no_batching(kernels, make_objective, name, training, monkeypatch):
    if kernels == "generic" and make_objective is CrossEntropy:
        monkeypatch.setattr("fedsim.engine.gradients.vmap", None)
        monkeypatch.setattr("fedsim.engine.gradients.grad_and_value", None)
    compare(make_objective, name, training, kernels, chunk=1)


def test_a_loss_that_depends_on_nothing_that_moves_leaves_a_row_alone_as_it_is():
    @dataclass(frozen=True)
    class Still:
        def criterion(self, logits, targets, weights):
            return (weights * targets.to(weights)).sum(-1)

    task, weights = make_task(objective=Still())
    engine = Vectorized(task, kernels="generic", chunk=1, threads=1)
    updates, _ = train(engine, make_job(task, weights), task.shared.size)
    assert not updates.any()


def test_a_module_lies_in_the_room_of_one_update_and_in_no_larger_one():
    task, _ = make_task()
    engine, module = Vectorized(task, threads=1), task.module
    before = {name: p.detach().clone() for name, p in module.named_parameters()}
    for count, inside in ((3, False), (1, True)):
        room = engine.room(count)
        assert room.shape == (count, task.shared.size)
        for name, parameter in module.named_parameters():
            assert (parameter.untyped_storage().data_ptr() == room.untyped_storage().data_ptr()) is inside
            assert torch.equal(parameter, before[name])
