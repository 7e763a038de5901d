"""Personal methods: what travels, what stays, and the models that clients end up with, against plain PyTorch loops.

The oracles train copies of a module by autograd in float64, full batches, one client after another. Tolerance 1e-10:
engines sum the same float64 terms in another order.
"""

import copy
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from fedsim.build import build
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.ditto import Ditto as DittoClient
from fedsim.clients.fedrep import FedRep
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset
from fedsim.errors import UserError
from fedsim.local import LocalTraining
from fedsim.loop import Loop
from fedsim.models.mlp import LoneBatchNorm1d, mlp
from fedsim.strategies.ditto import Ditto, Twin
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedbn import FedBN
from fedsim.strategies.fedper import FedPer

F, C, LR, STEPS = 3, 4, 0.3, 3
SIZES = (8, 6, 5, 4)  # training samples of the clients
PLAN = {1: [0, 1, 3], 2: [1, 2], 3: [0, 1, 2, 3]}
EXACT = {"rtol": 1e-10, "atol": 1e-12}


@cache
def config(engine):
    alone = ["partition=natural", "partition.local_test=0.2", "data.validation=0", "metrics.clients_every=0"]
    return compose([f"engine={engine}", *alone, "fraction=1", "dtype=float64", "threads=1"])


class Chosen:
    def __call__(self, pool, size, rng, round):
        return PLAN[round]


class Net(nn.Module):
    """logits = head(norm(tanh(body x))), where there is a norm."""

    def __init__(self, norm=None):
        super().__init__()
        self.body = nn.Linear(F, 5)
        self.middle = nn.Identity() if norm is None else norm
        self.head = nn.Linear(5, C)
        rng = np.random.default_rng(2)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(torch.as_tensor(rng.normal(size=p.shape)))
        self.double()

    def forward(self, x):
        return self.head(self.middle(torch.tanh(self.body(x))))


def samples():
    rng = np.random.default_rng(1)
    owner = np.repeat(np.arange(4), [10, 8, 6, 5])  # a fifth of each is its test
    x = torch.as_tensor(rng.normal(size=(len(owner), F)) + 0.4 * owner[:, None])
    return x, torch.as_tensor(rng.integers(0, C, len(owner))), owner


OPEN = []


def own(k):
    """Return client k's training samples: what its local test leaves, the same in every run."""
    task = OPEN[0].task
    return task.x[task.partition.of(k)], task.y[task.partition.of(k)]


@pytest.fixture(autouse=True)
def _logs_are_closed():
    yield
    while OPEN:
        loop = OPEN.pop()
        loop.rounds.close()
        loop.times.close()


def start(folder, strategy, client, model, *, engine="sequential", **training):
    x, y, owner = samples()
    data = Dataset(torch.cat([x, x[:2]]), torch.cat([y, y[:2]]),
                   {"train": np.arange(len(y)), "test": len(y) + np.arange(2)}, C, np.r_[owner, 3, 3])  # fmt: skip
    training = LocalTraining(**{"lr": LR, "batch_size": None, "local_steps": STEPS, **training})
    parts = {"data": data, "model": copy.deepcopy(model), "strategy": strategy, "client": client,
             "training": training, "sampler": Chosen()}  # fmt: skip
    loop = Loop(build(config(engine), parts), folder, Observer())
    assert tuple(loop.task.partition.sizes) == SIZES
    OPEN.append(loop)
    return loop


def descend(module, k, names, steps=STEPS):
    """Take steps of gradient descent on some of a module's parameters, in place."""
    x, y = own(k)
    for _ in range(steps):
        loss = functional.cross_entropy(module(x), y)
        params = [p for n, p in module.named_parameters() if n in names]
        with torch.no_grad():
            for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
                p -= LR * g


def average(modules, clients, names):
    n = torch.tensor([SIZES[k] for k in clients], dtype=torch.float64)
    return {name: sum(w * m.state_dict()[name] for w, m in zip(n / n.sum(), modules, strict=True)) for name in names}


def federate(model, shared, train, rounds=3):
    """Yield each round's global tensors; clients keep all else of their modules."""
    clients = [copy.deepcopy(model) for _ in SIZES]
    w = {name: model.state_dict()[name].clone() for name in shared}
    for t in range(1, rounds + 1):
        for k in PLAN[t]:
            clients[k].load_state_dict(w, strict=False)
            train(clients[k], k)
        w = average([clients[k] for k in PLAN[t]], PLAN[t], shared)
        yield w, clients


def check(loop, rounds, prefix=""):
    """Compare a run with an oracle: the weights after each round, and what clients keep in the end."""
    for t, (w, clients) in enumerate(rounds, start=1):  # noqa: B007  the last ones are wanted
        loop.step(t)
        got = loop.task.shared.split(loop.weights)
        assert set(got) == set(w)
        for name, value in w.items():
            np.testing.assert_allclose(got[name].numpy(), value.numpy(), **EXACT)
    for name in loop.task.local.names:
        want = [client.state_dict()[name.removeprefix(prefix)].numpy() for client in clients]
        np.testing.assert_allclose(loop.task.store.arrays[f"local/{name}"].numpy(), want, **EXACT)
    return clients


BODY, HEAD = ["body.weight", "body.bias"], ["head.weight", "head.bias"]


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_fedper(tmp_path, engine):
    net = Net()
    loop = start(tmp_path, FedPer(), CrossEntropy(), net, engine=engine)
    assert loop.task.local.names == tuple(HEAD)
    check(loop, federate(net, BODY, lambda module, k: descend(module, k, BODY + HEAD)))


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
def test_fedrep_trains_the_head_and_then_the_body(tmp_path, engine):
    net = Net()
    loop = start(tmp_path, FedPer(), FedRep(head_epochs=4, body_epochs=2), net, engine=engine)

    def train(module, k):
        descend(module, k, HEAD, steps=4)  # full batches: an epoch is a step
        descend(module, k, BODY, steps=2)

    check(loop, federate(net, BODY, train))
    assert loop.backend.cohort.num_steps.tolist() == [6] * 4


def test_fedreps_body_is_what_is_not_head():
    import re

    either = (r"^head\.weight|bias", ["body.bias", "head.weight", "head.bias"])
    for head, names in ((r"^head\.", HEAD), ("head", HEAD), ("weight$", ["body.weight", "head.weight"]), either):
        first, second = FedRep(head=head).phases()
        assert [n for n in BODY + HEAD if re.search(first.params, n)] == names
        assert [n for n in BODY + HEAD if re.search(second.params, n)] == [n for n in BODY + HEAD if n not in names]


@pytest.mark.parametrize("engine", ["sequential", "vectorized"])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_ditto(tmp_path, engine, strength):
    net = Net()
    names = BODY + HEAD
    loop = start(tmp_path, Ditto(), DittoClient(ditto_lambda=strength), net, engine=engine)
    personal, received = [copy.deepcopy(net) for _ in SIZES], dict(net.state_dict())
    for t in range(1, 4):
        trained = []
        for k in PLAN[t]:
            mine = copy.deepcopy(net)
            mine.load_state_dict(received)
            trained.append(mine)
            descend(mine, k, names)
            x, y = own(k)
            for _ in range(STEPS):
                v = dict(personal[k].named_parameters())
                pull = sum(((v[n] - received[n]) ** 2).sum() for n in names)
                loss = functional.cross_entropy(personal[k](x), y) + strength / 2 * pull
                with torch.no_grad():
                    for p, g in zip(v.values(), torch.autograd.grad(loss, list(v.values())), strict=True):
                        p -= LR * g
        received = average(trained, PLAN[t], names)
        loop.step(t)
        got = loop.task.shared.split(loop.weights)
        for name in names:
            np.testing.assert_allclose(got[f"shared.{name}"].numpy(), received[name].numpy(), **EXACT)
    for name in names:
        want = [p.state_dict()[name].numpy() for p in personal]
        np.testing.assert_allclose(loop.task.store.arrays[f"local/personal.{name}"].numpy(), want, **EXACT)


def test_dittos_global_model_is_fedavg(tmp_path):
    ditto, plain = (tmp_path / name for name in ("ditto", "plain"))
    ditto.mkdir()
    plain.mkdir()
    loops = [start(ditto, Ditto(), DittoClient(), Net()), start(plain, FedAvg(), CrossEntropy(), Net())]
    for t in (1, 2, 3):
        for loop in loops:
            loop.step(t)
        np.testing.assert_allclose(loops[0].weights.numpy(), loops[1].weights.numpy(), **EXACT)


def test_a_twin_is_evaluated_with_its_personal_half():
    twin = Twin(Net())
    x = samples()[0][:8]
    with torch.no_grad():
        twin.personal.head.bias += 1
    assert twin.eval()(x).shape == (8, C)
    assert torch.equal(twin.eval()(x), twin.personal(x))
    assert torch.equal(twin.train()(x), torch.stack([twin.shared(x), twin.personal(x)]))
    assert not torch.equal(twin.shared(x), twin.personal(x))


def test_fedbn_keeps_norms_and_their_statistics(tmp_path):
    net = Net(nn.BatchNorm1d(5))
    loop = start(tmp_path, FedBN(), CrossEntropy(), net)
    norms = ["middle.weight", "middle.bias"]
    assert loop.task.local.names == tuple(norms)  # found by type: no name says "norm"
    rounds = federate(net, BODY + HEAD, lambda module, k: descend(module.train(), k, BODY + HEAD + norms))
    clients = check(loop, rounds)
    for name in ("running_mean", "running_var"):
        want = [client.state_dict()[f"middle.{name}"].numpy() for client in clients]
        np.testing.assert_allclose(loop.task.store.arrays[f"buffer/middle.{name}"].numpy(), want, **EXACT)
    assert not np.allclose(want[0], want[1])


@pytest.mark.parametrize("norm", [nn.GroupNorm(1, 5), nn.LayerNorm(5), nn.InstanceNorm1d(5, affine=True)])
def test_fedbn_knows_every_kind_of_norm(norm):
    assert FedBN().local_parameters(Net(norm)) == [r"^middle\.weight$", r"^middle\.bias$"]


def test_fedbn_without_norms_says_what_to_do(tmp_path):
    with pytest.raises((ValueError, UserError), match="choose model=mlp_bn"):
        start(tmp_path, FedBN(), CrossEntropy(), Net())


def test_batch_norm_of_a_lone_sample():
    norm = LoneBatchNorm1d(3)
    norm(torch.randn(6, 3, generator=torch.Generator().manual_seed(0)))
    before = norm.running_mean.clone()
    x = torch.tensor([[1.0, 2.0, 3.0]])
    lone = norm.train()(x)
    assert torch.equal(lone, norm.eval()(x))  # by the running statistics
    assert torch.equal(norm.running_mean, before)
    assert [name for name, _ in mlp((4,), 2, hidden=(3,), batch_norm=True).named_buffers()] == [
        f"body.norm1.{name}" for name in ("running_mean", "running_var", "num_batches_tracked")
    ]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (FedRep, {"head_epochs": 0}, "FedRep needs head_epochs >= 1"),
        (FedRep, {"body_epochs": 0}, "FedRep needs body_epochs >= 1"),
        (DittoClient, {"ditto_lambda": -1.0}, "Ditto needs a finite ditto_lambda >= 0"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
