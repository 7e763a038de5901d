"""The sequential engine against a naive loop with torch.optim over the same samples, in float64.

The engine writes gradients and steps in place over one flat vector; the oracle deep-copies the module for every
client and calls `backward` and an optimiser object. Both sum the same few terms in another order, so they agree to
rounding: 1e-10 relative in float64.
"""

import copy
import itertools
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.fedprox import FedProx
from fedsim.clients.margin import Margin
from fedsim.contracts import Partition, Phase
from fedsim.engine import rounds
from fedsim.engine.failing import AllUpdatesBad, BadUpdate
from fedsim.engine.rounds import Trainer
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import BUFFER, LOCAL, Job, Task
from fedsim.errors import ClientError
from fedsim.local import LocalTraining, schedule
from fedsim.models.dropout import KeyedDropout
from fedsim.models.parameters import split_parameters

TOLERANCE = {"rtol": 1e-10, "atol": 1e-12}
SIZES = (7, 1, 12, 5, 0, 9)  # one sample; none; not multiples of the batch
BATCH = LocalTraining(lr=0.1, batch_size=4)


def mlp():
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))


def conv():
    return nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 3, 1), nn.Flatten(), nn.Linear(48, 3))


class Normed(nn.Module):
    """A batch norm between two layers, and a head by that name."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(4, 5)
        self.norm = nn.BatchNorm1d(5)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.body(x))))


class Headed(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.body(x)))


@dataclass(frozen=True)
class Problem:
    """A task, and what the oracle needs of it."""

    task: Task
    module: nn.Module  # untouched by the engine
    start: torch.Tensor  # (D,)
    buffers: torch.Tensor

    def job(self, clients=None, round=1, **changes):
        clients = np.arange(len(SIZES)) if clients is None else np.asarray(clients)
        job = Job(
            clients=clients, received=np.full(len(clients), round - 1), models={round - 1: self.start},
            broadcasts={round - 1: {}}, buffers=self.buffers, round=round, key=round,
            lr=self.task.training.rate(round), state=self.task.store.get(clients, self.task.device),
        )  # fmt: skip
        return replace(job, **changes)

    def train(self, *args, **kwargs):
        """Return the cohort of a job, rows cloned: the trainer's buffer is used again."""
        cohort, _ = Trainer(Sequential(self.task)).collect(self.job(*args, **kwargs))
        return replace(cohort, updates=cohort.rows.clone())


def problem(
    factory=mlp, objective=None, training=BATCH, *, sizes=SIZES, trainable=None, local=None, views=None,
    personal_buffers=False, dtype=torch.float64,
):  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(3)
        module = factory().to(dtype)
        shape = (2, 4, 4) if any(isinstance(m, nn.Conv2d) for m in module.modules()) else (4,)
        x = torch.randn(sum(sizes) + 5, *shape, dtype=dtype)
        y = torch.randint(0, 3, (len(x),))
    objective = CrossEntropy() if objective is None else objective
    names = split_parameters(module, trainable=trainable, local=local)
    own, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for name, parameter in own.items():
        parameter.requires_grad_(name not in names.frozen)
    first = {LOCAL + name: own[name].detach().clone() for name in names.local.names}
    if personal_buffers:
        first |= {BUFFER + name: buffers[name].detach().clone() for name in names.buffers.names}
    if hasattr(objective, "init_client"):
        first |= objective.init_client(names.shared)
    offsets = np.concatenate([[0], np.cumsum(sizes)])
    partition = Partition(np.random.default_rng(5).permutation(len(x))[: offsets[-1]], offsets)
    start = names.shared.join({name: own[name].detach() for name in names.shared.names}).to(dtype)
    task = Task(
        module=module, shared=names.shared, local=names.local, buffers=names.buffers, objective=objective,
        training=training, x=x, y=y, partition=partition, store=ClientStore(len(sizes), first), seed=11,
        views=views(partition) if views else {},
    )  # fmt: skip
    flat = names.buffers.join({n: buffers[n].detach().to(dtype) for n in names.buffers.names}).to(dtype)
    return Problem(task, copy.deepcopy(module), start, flat)


def naive(problem, client, loss=None, *, round=1, prepare=lambda module: None, start=None):
    """Train one client with torch.optim; return (its module, mean loss over samples, steps).

    loss(module, received parameters by name, x, y, step) -> scalar; cross-entropy if absent.
    """
    task, training = problem.task, problem.task.training
    module = copy.deepcopy(problem.module).train()
    own = dict(module.named_parameters())
    with torch.no_grad():
        for name, value in task.shared.split(problem.start if start is None else start).items():
            own[name].copy_(value)
    prepare(module)
    received = {name: p.detach().clone() for name, p in own.items()}
    moving = [p for p in own.values() if p.requires_grad]
    settings = {"lr": training.lr * training.lr_decay ** ((round - 1) // training.lr_decay_every)}
    if training.optimizer == "adamw":
        optimizer = torch.optim.AdamW(moving, weight_decay=training.weight_decay, **settings)
    else:
        settings |= {"momentum": training.momentum, "weight_decay": training.weight_decay}
        optimizer = torch.optim.SGD(moving, **settings)
    plan = schedule(training, task.partition, np.array([client]), seed=task.seed, round=round)
    total = seen = 0
    for step in range(int(plan.num_steps[0])):
        low, high = plan.bounds(0, step)
        taken = torch.from_numpy(plan.positions[low:high])
        x, y = task.x[taken], task.y[taken]
        value = functional.cross_entropy(module(x), y) if loss is None else loss(module, received, x, y, step)
        optimizer.zero_grad()
        value.backward()
        if training.clip_norm is not None:
            norm = sum(float(p.grad.square().sum()) for p in moving) ** 0.5
            for p in moving:
                p.grad *= min(1.0, training.clip_norm / norm)
        optimizer.step()
        total, seen = total + float(value.detach()) * len(y), seen + len(y)
    return module, total / max(seen, 1), int(plan.num_steps[0])


def flat(layout, module):
    own = dict(module.named_parameters())
    return layout.join({name: own[name].detach() for name in layout.names})


def assert_cohort_is_naive(problem, loss=None, **kwargs):
    cohort = problem.train(**kwargs)
    for k, client in enumerate(cohort.clients.tolist()):
        module, mean, steps = naive(problem, client, loss, **kwargs)
        update = flat(problem.task.shared, module) - problem.start
        assert steps == 0 or float(update.norm()) > 1e-4  # it moved, so that agreement says something
        torch.testing.assert_close(cohort.rows[k], update, **TOLERANCE)
        torch.testing.assert_close(float(cohort.extras["train_loss"][k]), mean, **TOLERANCE)
        assert int(cohort.num_steps[k]) == steps
        assert float(cohort.weights[k]) == SIZES[client]
    return cohort


# --- optimisers ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"batch_size": None},
        {"batch_size": 1},
        {"local_epochs": 3},
        {"local_steps": 5},
        {"momentum": 0.9, "local_epochs": 2},
        {"weight_decay": 0.1},
        {"clip_norm": 0.3},
        {"clip_norm": 1e9},
        {"momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.3, "local_epochs": 2},
        {"optimizer": "adamw", "lr": 0.01, "local_epochs": 2},
        {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.5, "clip_norm": 0.3},
    ],
    ids=str,
)
def test_updates_are_those_of_torch_optim(changes):
    assert_cohort_is_naive(problem(training=replace(BATCH, **changes)))


def test_the_clip_bites_in_the_test_above():
    bound, free = (problem(training=replace(BATCH, clip_norm=c)).train().rows for c in (0.3, None))
    assert bool((bound.norm(dim=1)[:1] < 0.9 * free.norm(dim=1)[:1]).all())


def test_the_rate_decays_by_round_and_the_order_is_the_rounds():
    decaying = problem(training=replace(BATCH, lr_decay=0.5, lr_decay_every=2))
    rows = [assert_cohort_is_naive(decaying, round=t).rows[0] for t in (1, 2, 3)]
    assert not torch.equal(rows[0], rows[1])
    assert float(rows[2].norm()) < 0.7 * float(rows[0].norm())


# --- models -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [True, False])
def test_convolutions_in_either_memory_layout(channels_last):
    images = problem(conv)
    expected = [flat(images.task.shared, naive(images, k)[0]) - images.start for k in range(len(SIZES))]
    engine = Sequential(images.task, channels_last=channels_last)
    assert engine.plan["channels_last"] is channels_last
    cohort, _ = Trainer(engine).collect(images.job())
    torch.testing.assert_close(cohort.rows, torch.stack(expected), **TOLERANCE)


def test_channels_last_is_chosen_for_images_only():
    assert Sequential(problem(conv).task).plan["channels_last"] is True
    assert Sequential(problem(mlp).task).plan["channels_last"] is False


def test_frozen_parameters_neither_move_nor_travel():
    frozen = problem(Headed, trainable="^head")
    assert frozen.task.shared.names == ("head.weight", "head.bias")
    before = {n: p.detach().clone() for n, p in frozen.task.module.named_parameters() if n.startswith("body")}
    assert_cohort_is_naive(frozen)
    assert all(torch.equal(p, before[n]) for n, p in frozen.task.module.named_parameters() if n in before)


def test_a_scalar_parameter_trains_like_any_other():
    class Tempered(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.temperature = nn.Linear(4, 3), nn.Parameter(torch.tensor(1.3))

        def forward(self, x):
            return self.linear(x) * self.temperature

    assert_cohort_is_naive(problem(Tempered))


def test_a_parameter_that_the_loss_does_not_touch_stays():
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.spare = nn.Linear(4, 3), nn.Parameter(torch.ones(2))

        def forward(self, x):
            return self.linear(x)

    spare = problem(Spare)
    assert spare.train().rows[:, spare.task.shared.slices["spare"]].abs().max() == 0


def test_local_parameters_stay_in_the_store_and_are_taken_up_in_the_next_round():
    personal = problem(Headed, local="^head")
    assert personal.task.shared.names == ("body.weight", "body.bias")
    clients, heads = [0, 2, 5], {}
    start = personal.start
    for round in (1, 2):
        cohort = personal.train(clients, round, models={round - 1: start})
        for k, client in enumerate(clients):

            def take_up(module, client=client):
                if client in heads:
                    module.head.load_state_dict(heads[client])

            module, _, _ = naive(personal, client, round=round, prepare=take_up, start=start)
            torch.testing.assert_close(cohort.rows[k], flat(personal.task.shared, module) - start, **TOLERANCE)
            heads[client] = module.head.state_dict()
        start = start + cohort.rows.mean(0)
    kept = personal.task.store.get(np.array([0, 1]), torch.device("cpu"))
    torch.testing.assert_close(kept[LOCAL + "head.weight"][0], heads[0]["weight"], **TOLERANCE)
    assert torch.equal(kept[LOCAL + "head.weight"][1], personal.module.head.weight)  # never trained: as it began
    assert personal.task.store.rows()[0].tolist() == clients


def test_buffers_are_averaged_by_samples():
    normed = problem(Normed, training=replace(BATCH, batch_size=None))
    clients = [0, 2, 3]
    _, buffers = Trainer(Sequential(normed.task)).collect(normed.job(clients))
    expected = torch.zeros_like(buffers)
    for client in clients:
        state = naive(normed, client)[0].state_dict()
        expected += (
            SIZES[client] / 24 * normed.task.buffers.join({n: state[n].double() for n in normed.task.buffers.names})
        )
    torch.testing.assert_close(buffers, expected, **TOLERANCE)
    assert not torch.equal(buffers, normed.buffers)


def test_every_client_starts_from_the_buffers_of_the_job():
    normed = problem(Normed, training=replace(BATCH, batch_size=None))
    both, alone = normed.train([0, 2]), normed.train([2])
    assert torch.equal(both.rows[1], alone.rows[0])
    statistics = normed.task.buffers.split(Trainer(Sequential(normed.task)).collect(normed.job([2]))[1])
    x = normed.task.x[torch.from_numpy(normed.task.partition.of(2))]
    hidden = normed.module.body(x).detach()
    torch.testing.assert_close(statistics["norm.running_mean"], 0.1 * hidden.mean(0), **TOLERANCE)  # from 0, by 0.1
    assert int(statistics["norm.num_batches_tracked"]) == 1


def test_personal_buffers_stay_with_their_client():
    normed = problem(Normed, training=replace(BATCH, batch_size=None), personal_buffers=True)
    for round in (1, 2):
        normed.train([0, 2], round)
    state = naive(normed, 2, round=1)[0].state_dict()
    state = naive(normed, 2, round=2, prepare=lambda m: m.norm.load_state_dict(strip(state, "norm.")))[0].state_dict()
    # The second round started from its own statistics but from the server's weights.
    kept = normed.task.store.get(np.array([2, 3]), torch.device("cpu"))
    torch.testing.assert_close(kept[BUFFER + "norm.running_mean"][0], state["norm.running_mean"], **TOLERANCE)
    assert kept[BUFFER + "norm.num_batches_tracked"].tolist() == [2, 0]


def strip(state, prefix):
    """Return a submodule's buffers; its weights stay the server's."""
    weights = ("norm.weight", "norm.bias")
    initial = {"weight": torch.ones(5), "bias": torch.zeros(5)}
    return initial | {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix) and n not in weights}


def test_dropout_is_keyed_by_client_and_not_by_company():
    def dropping():
        return nn.Sequential(nn.Linear(4, 16), KeyedDropout(0.5), nn.Linear(16, 3))

    dropped = problem(dropping)
    everyone = dropped.train().rows
    torch.manual_seed(99)  # the global generator has no say
    torch.rand(7)
    for clients in ([0], [2, 5], [0, 1, 2, 3]):
        assert torch.equal(dropped.train(clients).rows, everyone[clients])
    assert not torch.equal(dropped.train([0], key=2).rows[0], everyone[0])
    kept = problem(lambda: nn.Sequential(nn.Linear(4, 16), KeyedDropout(0.0), nn.Linear(16, 3)))
    assert not torch.allclose(kept.train([0]).rows[0], everyone[0])  # it does drop
    again = copy.deepcopy(dropped)
    assert torch.equal(again.train([3, 5]).rows, everyone[[3, 5]])


def test_augmentation_is_keyed_by_client_and_sample():
    plain = problem()

    def shifted(x, key):
        return x + (key % 1000).to(x.dtype).view(-1, 1) / 1000

    noisy = replace(plain, task=replace(plain.task, augment=shifted))
    everyone = noisy.train().rows
    assert not torch.allclose(everyone[0], plain.train().rows[0])
    assert torch.equal(noisy.train([0, 3]).rows, everyone[[0, 3]])


# --- objectives ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mu", [0.0, 0.7])
def test_proximal_term(mu):
    def loss(module, received, x, y, step):
        pull = sum((p - received[n]).square().sum() for n, p in module.named_parameters())
        return functional.cross_entropy(module(x), y) + mu / 2 * pull

    training = replace(BATCH, local_epochs=2, clip_norm=0.5)
    pulled = problem(objective=FedProx(proximal_mu=mu), training=training)
    for k in range(len(SIZES)):  # its train_loss leaves the term out, so only updates are compared
        module, _, _ = naive(pulled, k, loss)
        torch.testing.assert_close(
            pulled.train([k]).rows[0], flat(pulled.task.shared, module) - pulled.start, **TOLERANCE
        )
    if mu == 0:
        assert torch.equal(pulled.train().rows, problem(training=training).train().rows)


def test_proximal_mu_may_come_from_the_server():
    told = problem().train(broadcasts={0: {"proximal_mu": 0.7}}).rows
    assert torch.equal(told, problem(objective=FedProx(proximal_mu=0.7)).train().rows)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
def test_margin_objective(reduction):
    def loss(module, received, x, y, step):
        logits = module(x)
        p = torch.exp(logits) / torch.exp(logits).sum(1, keepdim=True)
        if reduction == "batch":
            penalty = torch.log(1 + (p**2).sum())
        else:
            penalty = torch.stack([torch.log(1 + (row**2).sum()) for row in p]).mean()
        return functional.cross_entropy(logits, y) + 0.2 * penalty

    assert_cohort_is_naive(problem(objective=Margin(margin_lambda=0.2, reduction=reduction)), loss)


@dataclass(frozen=True)
class Ridge:
    """A loss of everything that a context has: received weights, broadcast, client state, step, counts."""

    def init_client(self, layout):
        return {"visits": torch.zeros(()), "memory": torch.full((layout.size,), 0.25, dtype=torch.float64)}

    def loss(self, model, params, batch, context):
        h = model.features(params, batch.x)
        value = functional.cross_entropy(model.head(params, h), batch.y)
        pull = sum(((p - context.received[n]) ** 2).sum() for n, p in params.items())
        toward = context.broadcast["rate"] * (context.step + 1) / context.num_steps * pull
        return value + toward + 0.01 * context.client_state[
            "memory"
        ].mean() * context.num_samples * h.square().mean(), {}

    def finish(self, params, context):
        trained = context.layout.join(params)
        moved = trained - context.layout.join(context.received)
        state = {"visits": context.client_state["visits"] + 1, "memory": context.client_state["memory"] + moved}
        return state, {"moved": moved, "last_step": torch.tensor(float(context.step))}, 2.0 * context.num_samples + 1


def test_general_losses_see_their_context_and_keep_their_state():
    ridge = problem(Headed, Ridge(), training=replace(BATCH, local_epochs=2))
    memory = {k: torch.full((ridge.task.shared.size,), 0.25, dtype=torch.float64) for k in range(len(SIZES))}
    clients = [0, 1, 5]
    for round in (1, 2):
        cohort = ridge.train(clients, round, broadcasts={round - 1: {"rate": 0.3}})
        for k, client in enumerate(clients):
            n = SIZES[client]
            steps = 2 * -(-n // 4)

            def loss(module, received, x, y, step, n=n, steps=steps, client=client):
                h = torch.tanh(module.body(x))
                pull = sum((p - received[name]).square().sum() for name, p in module.named_parameters())
                value = functional.cross_entropy(module.head(h), y) + 0.3 * (step + 1) / steps * pull
                return value + 0.01 * memory[client].mean() * n * h.square().mean()

            module, mean, _ = naive(ridge, client, loss, round=round)
            update = flat(ridge.task.shared, module) - ridge.start
            torch.testing.assert_close(cohort.rows[k], update, **TOLERANCE)
            torch.testing.assert_close(cohort.extras["moved"][k], update, **TOLERANCE)
            torch.testing.assert_close(float(cohort.extras["train_loss"][k]), mean, **TOLERANCE)
            assert float(cohort.extras["last_step"][k]) == steps - 1
            assert float(cohort.weights[k]) == 2 * n + 1
            memory[client] = memory[client] + update
    kept = ridge.task.store.get(np.arange(len(SIZES)), torch.device("cpu"))
    assert kept["visits"].tolist() == [2, 2, 0, 0, 0, 2]
    torch.testing.assert_close(kept["memory"][5], memory[5], **TOLERANCE)


@dataclass(frozen=True)
class Controlled(CrossEntropy):
    """A drift-corrected direction with a momentum of its own: d = g + c, v ← v/2 + d."""

    def direction(self, grads, params, context):
        control = context.layout.split(context.broadcast["control"])
        velocity = {
            n: context.step_state.get(n, torch.zeros_like(g)) / 2 + g + control[n] * (context.step + 1) + 0 * params[n]
            for n, g in grads.items()
        }
        return velocity, velocity


def test_directions_replace_the_gradient_and_remember_between_steps():
    controlled = problem(objective=Controlled(), training=replace(BATCH, local_epochs=2))
    control = torch.linspace(-1, 1, controlled.task.shared.size, dtype=torch.float64)
    cohort = controlled.train(broadcasts={0: {"control": control}})
    for client in range(len(SIZES)):
        w, v = controlled.start.clone(), torch.zeros_like(control)
        plan = schedule(controlled.task.training, controlled.task.partition, np.array([client]), seed=11, round=1)
        for step in range(int(plan.num_steps[0])):
            low, high = plan.bounds(0, step)
            taken = torch.from_numpy(plan.positions[low:high])
            leaf = w.clone().requires_grad_()
            logits = torch.func.functional_call(
                controlled.module, controlled.task.shared.split(leaf), (controlled.task.x[taken],)
            )
            (g,) = torch.autograd.grad(functional.cross_entropy(logits, controlled.task.y[taken]), leaf)
            v = v / 2 + g + control * (step + 1)
            w = w - 0.1 * v
        torch.testing.assert_close(cohort.rows[client], w - controlled.start, **TOLERANCE)


@dataclass(frozen=True)
class TwoPhases(CrossEntropy):
    """First the head for three steps on the first samples, then the body for an epoch on all."""

    def phases(self):
        return (Phase(local_steps=3, params="^head", view="first"), Phase(local_epochs=1, params="^body"))


def firsts(partition):
    """Return the view of each client's first three samples."""
    sizes = np.minimum(partition.sizes, 3)
    chosen = [partition.of(k)[:n] for k, n in enumerate(sizes)]
    return {"first": Partition(np.concatenate(chosen), np.concatenate([[0], np.cumsum(sizes)]))}


def test_phases_move_their_own_parameters_on_their_own_samples():
    phased = problem(Headed, TwoPhases(), training=replace(BATCH, batch_size=2, momentum=0.9), views=firsts)
    cohort = phased.train()
    for client in range(len(SIZES)):
        module = copy.deepcopy(phased.module)
        for number, phase in enumerate(TwoPhases().phases()):
            part = phased.task.views["first"] if phase.view else phased.task.partition
            plan = schedule(
                phased.task.training, part, np.array([client]), seed=11, round=1, phase=(number, phase)
            )  # fmt: skip
            moving = module.head if number == 0 else module.body
            optimizer = torch.optim.SGD(moving.parameters(), lr=0.1, momentum=0.9)  # moments begin anew
            for step in range(int(plan.num_steps[0])):
                low, high = plan.bounds(0, step)
                taken = torch.from_numpy(plan.positions[low:high])
                assert set(taken.tolist()) <= set(part.of(client).tolist())
                optimizer.zero_grad()
                functional.cross_entropy(module(phased.task.x[taken]), phased.task.y[taken]).backward()
                optimizer.step()
        torch.testing.assert_close(cohort.rows[client], flat(phased.task.shared, module) - phased.start, **TOLERANCE)
        assert int(cohort.num_steps[client]) == (3 + -(-SIZES[client] // 2) if SIZES[client] else 0)


def test_an_unknown_view_is_refused_by_name():
    with pytest.raises(ValueError, match=r"asks for the samples named 'first'; known: \[\]"):
        problem().task.samples_of(Phase(view="first"))


# --- rows, streams and bad updates --------------------------------------------------------------------------------


def test_rows_start_from_their_own_version_with_its_broadcast():
    apart = problem(objective=Controlled())
    other = apart.start + 0.5
    zero = torch.zeros_like(other)
    models, broadcasts = {3: apart.start, 7: other}, {3: {"control": zero}, 7: {"control": zero + 1}}
    received = np.array([3, 7, 3, 7, 3, 7])
    mixed = apart.train(round=9, received=received, models=models, broadcasts=broadcasts)
    assert mixed.received.tolist() == received.tolist()
    assert mixed.staleness.tolist() == [5, 1, 5, 1, 5, 1]
    for version in (3, 7):
        alone = apart.train(
            round=9, received=np.full(6, version), models={version: models[version]}, broadcasts=broadcasts
        )
        mine = torch.from_numpy(received == version)
        assert torch.equal(mixed.rows[mine], alone.rows[mine])


def test_rows_with_keys_of_their_own_train_as_in_that_round():
    keyed = problem()
    mixed = keyed.train([0, 2, 5], 4, key=np.array([1, 2, 4]))
    for row, (client, key) in enumerate(((0, 1), (2, 2), (5, 4))):
        assert torch.equal(mixed.rows[row], keyed.train([client], 4, key=key).rows[0])


def stateful():
    """Everything that a row may leave: buffers, state, extras; no client of one sample, which batch norm refuses."""
    return problem(
        Normed, RidgeOnLogits(), training=replace(BATCH, batch_size=None, local_epochs=2), sizes=(7, 2, 12, 5, 0, 9)
    )


@dataclass(frozen=True)
class RidgeOnLogits(CrossEntropy):
    def init_client(self, layout):
        return {"sum": torch.zeros(layout.size, dtype=torch.float64)}

    def finish(self, params, context):
        moved = context.layout.join(params) - context.layout.join(context.received)
        return {"sum": context.client_state["sum"] + moved}, {"moved": moved}, None


@pytest.mark.parametrize("cuts", [(3,), (1, 2, 3, 4, 5), (5,)])
def test_any_split_of_a_job_gives_the_same_bits(cuts):
    whole = problem(Headed, RidgeOnLogits(), local="^head.bias")
    job = whole.job()
    engine = Sequential(whole.task)
    out = torch.empty(len(SIZES), whole.task.shared.size, dtype=torch.float64)
    block = engine.train(job, out)
    ends = (0, *cuts, len(SIZES))
    for low, high in itertools.pairwise(ends):
        part = torch.empty(high - low, whole.task.shared.size, dtype=torch.float64)
        left = engine.train(job.part(low, high), part)
        assert torch.equal(part, out[low:high])
        for name in ("square_norms", "weights", "num_steps"):
            assert torch.equal(getattr(left, name), getattr(block, name)[low:high])
        for mine, theirs in ((left.extras, block.extras), (left.state, block.state)):
            assert mine.keys() == theirs.keys()
            assert all(torch.equal(mine[name], theirs[name][low:high]) for name in mine)


@pytest.mark.parametrize(("factory", "channels_last"), [(mlp, None), (conv, True), (conv, False)])
def test_sums_are_those_of_rows_and_leave_out_what_is_not_finite(factory, channels_last):
    c = torch.linspace(0.5, 2.0, len(SIZES), dtype=torch.float64)  # (K,)
    one, other = problem(factory), problem(factory)
    for each in (one, other):
        poison(each.task, 2)
    rows = torch.empty(len(SIZES), one.task.shared.size, dtype=torch.float64)
    block = Sequential(one.task, channels_last=channels_last).train(one.job(), rows)
    total = torch.full_like(rows[0], 3.0)  # it is added to
    summed = Sequential(other.task, channels_last=channels_last).train_sum(other.job(), c, total)
    good = torch.isfinite(block.square_norms)
    assert good.tolist() == [True, True, False, True, True, True]
    torch.testing.assert_close(total, 3.0 + c[good] @ rows[good], **TOLERANCE)
    torch.testing.assert_close(summed.square_norms[good], block.square_norms[good], **TOLERANCE)
    assert not bool(torch.isfinite(summed.square_norms[2]))
    for name in block.extras:
        assert torch.equal(summed.extras[name][good], block.extras[name][good])


def coefficients(cohort):
    return cohort.weights**0.5 + cohort.num_steps


@pytest.mark.parametrize("block", [1, 2, 4, 64])
def test_streamed_rows_are_the_mean_of_held_ones(block, monkeypatch):
    held, streamed = stateful(), stateful()
    monkeypatch.setattr(rounds, "STREAM_BLOCK", block * held.task.shared.size)
    clients = [0, 1, 2, 3, 5]
    cohort, buffers = Trainer(Sequential(held.task)).collect(held.job(clients))
    sums, streamed_buffers = Trainer(Sequential(streamed.task)).stream(streamed.job(clients), coefficients, ("moved",))
    c = coefficients(cohort)
    torch.testing.assert_close(sums.streamed.mean, (c[:, None] * cohort.rows).sum(0) / c.sum(), **TOLERANCE)
    torch.testing.assert_close(sums.streamed.sums.square_norms, cohort.rows.square().sum(1), **TOLERANCE)
    torch.testing.assert_close(sums.streamed.sums.extras["moved"], cohort.rows.mean(0), **TOLERANCE)
    assert torch.equal(sums.streamed.sums.coefficients, c)
    torch.testing.assert_close(streamed_buffers, buffers, **TOLERANCE)
    for name in ("weights", "clients", "num_steps", "staleness", "received"):
        assert torch.equal(getattr(sums, name), getattr(cohort, name))
    assert torch.equal(sums.extras["train_loss"], cohort.extras["train_loss"])
    assert "moved" not in sums.extras
    with pytest.raises(ValueError, match="streamed"):
        _ = sums.rows
    everyone = np.arange(len(SIZES))
    mine, theirs = (p.task.store.get(everyone, torch.device("cpu"))["sum"] for p in (held, streamed))
    assert torch.equal(mine, theirs)
    assert bool(mine[0].any())


def poison(task, client, value=torch.nan):
    task.x[int(task.partition.of(client)[0])] = value


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("how", ["collect", "stream"])
def test_bad_rows_are_dropped_counted_and_leave_no_trace(how, value):
    bad, good = stateful(), stateful()
    poison(bad.task, 2, value)
    trainers = [Trainer(Sequential(p.task)) for p in (bad, good)]
    jobs = bad.job([0, 1, 2, 3]), good.job([0, 1, 3])
    if how == "collect":
        results = [trainer.collect(job) for trainer, job in zip(trainers, jobs, strict=True)]
        torch.testing.assert_close(results[0][0].rows, results[1][0].rows, rtol=0, atol=0)
    else:
        results = [t.stream(job, coefficients, ("moved",)) for t, job in zip(trainers, jobs, strict=True)]
        torch.testing.assert_close(results[0][0].streamed.mean, results[1][0].streamed.mean, **TOLERANCE)
    (mine, buffers), (theirs, expected) = results
    assert mine.clients.tolist() == theirs.clients.tolist() == [0, 1, 3]
    assert torch.equal(mine.extras["train_loss"], theirs.extras["train_loss"])
    torch.testing.assert_close(buffers, expected, **TOLERANCE)
    assert [trainer.dropped for trainer in trainers] == [1, 0]
    assert bad.task.store.rows()[0].tolist() == [0, 1, 3]
    assert torch.isfinite(bad.task.store.rows()[1]["sum"]).all()
    trainers[0].collect(bad.job([0, 1]))
    assert trainers[0].dropped == 0  # of the last job only


def test_bad_rows_may_stop_the_run_instead():
    bad = stateful()
    poison(bad.task, 2)
    with pytest.raises(BadUpdate, match=r"round 1: the update of client \[2\] is not finite"):
        Trainer(Sequential(bad.task), "raise").collect(bad.job([0, 2, 3]))


@dataclass(frozen=True)
class Leaks(CrossEntropy):
    """A finite update beside which something else is not finite."""

    where: str

    def init_client(self, layout):
        return {"kept": torch.zeros(2, dtype=torch.float64)}

    def finish(self, params, context):
        bad = torch.where(torch.as_tensor(context.num_samples == 12), torch.nan, 1.0).double()
        weight = bad if self.where == "weight" else None
        extra, kept = (bad.expand(2) if self.where == name else torch.ones(2).double() for name in ("extra", "kept"))
        return {"kept": kept.clone()}, {"extra": extra}, weight


@pytest.mark.parametrize("where", ["weight", "extra", "kept"])
@pytest.mark.parametrize("how", ["collect", "stream"])
def test_a_finite_update_with_anything_else_bad_is_bad(where, how):
    leaking = problem(objective=Leaks(where))
    trainer = Trainer(Sequential(leaking.task))
    job = leaking.job([0, 2, 3])
    cohort, _ = trainer.collect(job) if how == "collect" else trainer.stream(job, coefficients)
    assert cohort.clients.tolist() == [0, 3]
    assert trainer.dropped == 1
    assert leaking.task.store.rows()[0].tolist() == [0, 3]


@dataclass(frozen=True)
class Fails(CrossEntropy):
    """Raises for the clients of given sizes, in the middle of their round."""

    sizes: tuple[int, ...]

    def loss(self, model, params, batch, context):
        if context.num_samples in self.sizes and context.step == 1:
            raise ZeroDivisionError("no such thing")
        return functional.cross_entropy(model(params, batch.x), batch.y), {}

    def init_client(self, layout):
        return {"visits": torch.zeros(())}

    def finish(self, params, context):
        return {"visits": context.client_state["visits"] + 1}, {}, None


def test_an_error_in_an_objective_names_the_client_and_the_round():
    failing = problem(objective=Fails((12,)))
    with pytest.raises(
        ClientError,
        match=r"client 2 failed in round 1: ZeroDivisionError: no such thing \(.*test_engine_sequential.py:\d+, `raise",
    ) as caught:
        Trainer(Sequential(failing.task)).collect(failing.job())
    assert isinstance(caught.value.__cause__, ZeroDivisionError)  # -v shows where


@pytest.mark.parametrize("how", ["collect", "stream"])
def test_failing_clients_may_be_left_out(how, monkeypatch):
    failing, good = problem(objective=Fails((12, 9))), problem()
    monkeypatch.setattr(rounds, "STREAM_BLOCK", 2 * failing.task.shared.size)
    trainer = Trainer(Sequential(failing.task), on_client_error="drop")
    job = failing.job([0, 1, 2, 3, 5])
    cohort, _ = trainer.collect(job) if how == "collect" else trainer.stream(job, coefficients)
    assert cohort.clients.tolist() == [0, 1, 3]
    assert trainer.failures == dict.fromkeys((2, 5), "ZeroDivisionError: no such thing")
    assert failing.task.store.rows()[0].tolist() == [0, 1, 3]
    expected = good.train([0, 1, 3])
    if how == "collect":
        assert torch.equal(cohort.rows, expected.rows)
    else:
        c = coefficients(expected)
        torch.testing.assert_close(cohort.streamed.mean, (c[:, None] * expected.rows).sum(0) / c.sum(), **TOLERANCE)
    trainer.collect(failing.job([0]))
    assert trainer.failures == {}


@pytest.mark.parametrize("how", ["collect", "stream"])
def test_a_round_without_a_good_update_is_an_error(how):
    hopeless = problem(objective=Fails((12,)))
    poison(hopeless.task, 0)
    trainer = Trainer(Sequential(hopeless.task), on_client_error="drop")
    job = hopeless.job([0, 2])
    message = "round 1: none of 2 updates can be used: 1 are not finite; 1 clients failed, client 2 with ZeroDivision"
    with pytest.raises(AllUpdatesBad, match=message):
        trainer.collect(job) if how == "collect" else trainer.stream(job, coefficients)
    assert not hopeless.task.store.touched.any()


def test_running_out_of_memory_is_no_clients_failure():
    class Full(CrossEntropy):
        def criterion(self, logits, targets, weights):
            raise torch.OutOfMemoryError("full")

    full = problem(objective=Full())
    with pytest.raises(torch.OutOfMemoryError):
        Trainer(Sequential(full.task), on_client_error="drop").collect(full.job())


def test_updates_do_not_depend_on_what_the_engine_did_before():
    used, fresh = problem(), problem()
    engine = Sequential(used.task)
    Trainer(engine).collect(used.job(round=3))
    out = torch.empty(2, used.task.shared.size, dtype=torch.float64)
    engine.train(used.job([2, 5]), out)
    assert torch.equal(out, fresh.train([2, 5]).rows)


def test_single_precision_agrees_with_double():
    """To 1e-4 relative, as the plan promises between engines: a few dozen products of 4 to 16 terms."""
    single, double = problem(dtype=torch.float32), problem()
    task = replace(double.task, x=single.task.x.double(), y=single.task.y)
    double = replace(double, task=task, start=single.start.double())
    error = (single.train().rows.double() - double.train().rows).norm(dim=1)
    assert float((error / double.train().rows.norm(dim=1).clamp(min=1e-9)).max()) < 1e-4
