"""Mistakes in a user's model or loss are called by their line and in plain words, whatever trains the clients."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.contracts import Dataset, Partition
from fedsim.engine.auto import make_engine
from fedsim.engine.rounds import Trainer
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining

SIZES = np.array([7, 2, 5])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 6), nn.Linear(6, 5)

    def forward(self, x):
        return self.b(self.a(x).relu())


class Asks(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * h.max().item())


class AsksInTraining(Net):
    def forward(self, x):
        h = self.a(x)
        return self.b(h * 2 if self.training and h.norm() > 1 else h)


class Draws(Net):
    def forward(self, x):
        return self.b(self.a(x) + torch.randn(6))


class Fills(Net):
    def forward(self, x):
        h = torch.zeros(len(x), 6)
        h[:, :3] = self.a(x)[:, :3]
        return self.b(h)


class Leaves(Net):
    def forward(self, x):
        return self.b(torch.from_numpy(self.a(x).detach().numpy()))


def cross_entropy(model, params, batch):
    return nn.functional.cross_entropy(model(params, batch.x), batch.y)


@dataclass(frozen=True)
class Peeks:
    def loss(self, model, params, batch, context):
        loss = cross_entropy(model, params, batch)
        return (loss if loss.item() < 9 else 2 * loss), {}


@dataclass(frozen=True)
class Differentiates:
    def loss(self, model, params, batch, context):
        loss = cross_entropy(model, params, batch)
        loss.backward()
        return loss, {}


@dataclass(frozen=True)
class Forgets:
    def loss(self, model, params, batch, context):
        return cross_entropy(model, params, batch) + context.received["nope"].sum(), {}


@dataclass(frozen=True)
class Bare:
    def loss(self, model, params, batch, context):
        return cross_entropy(model, params, batch)


@dataclass(frozen=True)
class Vector:
    def loss(self, model, params, batch, context):
        return nn.functional.cross_entropy(model(params, batch.x), batch.y, reduction="none"), {}


@dataclass(frozen=True)
class Rows:
    def criterion(self, logits, targets, weights):
        return -(logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1) * weights).sum(-1)


@dataclass(frozen=True)
class Branches(Rows):
    def criterion(self, logits, targets, weights):
        return super().criterion(logits if logits.max() > 0 else 2 * logits, targets, weights)


@dataclass(frozen=True)
class Mixes(Rows):
    def criterion(self, logits, targets, weights):
        return nn.functional.cross_entropy(logits.flatten(0, -2), targets.flatten())


@dataclass(frozen=True)
class Partial(Rows):
    def direction(self, grads, params, context):
        return {"a.weight": grads["a.weight"]}, {}


def make_task(model=Net, objective=Rows):
    torch.manual_seed(0)
    module, count = model(), int(SIZES.sum())
    return Task(
        module=module,
        shared=Layout.of(dict(module.named_parameters())),
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=objective(),
        training=LocalTraining(lr=0.1, batch_size=4),
        x=torch.randn(count, 8),
        y=torch.randint(0, 5, (count,)),
        partition=Partition(np.arange(count), np.concatenate([[0], np.cumsum(SIZES)])),
        store=ClientStore(len(SIZES), {}),
    )


def mistake(kernels, **parts):
    """Return what a person reads who made it."""
    task = make_task(**parts)
    weights = torch.cat([p.detach().flatten() for p in task.module.parameters()])
    job = Job(
        clients=np.arange(3), received=np.zeros(3, dtype=np.int64), models={0: weights}, broadcasts={}, state={},
        buffers=weights.new_zeros(0), round=1, key=1, lr=0.1,
    )  # fmt: skip

    def train():
        engine, _ = make_engine(task, "vectorized", cohort=3, threads=1, kernels=kernels)
        Trainer(engine).collect(job)

    with pytest.raises((UserError, RuntimeError)) as caught:
        train()
    return str(caught.value)


MISTAKES = [
    ({"model": Asks}, "h.max().item()", "a tensor's value is asked for"),
    ({"model": AsksInTraining}, "h.norm() > 1", "a tensor's value is asked for"),
    ({"model": Draws}, "torch.randn(6)", "torch's global generator"),
    ({"model": Fills}, "h[:, :3] =", "no axis of clients"),
    ({"model": Leaves}, "torch.from_numpy", "it leaves torch"),
    ({"objective": Peeks}, "loss.item() < 9", "a tensor's value is asked for"),
    ({"objective": Differentiates}, "loss.backward()", "backward() is not for it to call"),
    ({"objective": Branches}, "logits.max() > 0", "a tensor's value is asked for"),
]


@pytest.mark.parametrize("kernels", ["fused", "generic"])
@pytest.mark.parametrize(("parts", "code", "words"), MISTAKES, ids=lambda value: None if isinstance(value, str) else "")
def test_what_cannot_be_batched_is_a_line_and_plain_words(parts, code, words, kernels):
    said = mistake(kernels, **parts)
    assert re.search(rf"test_blame\.py:\d+, `.*{re.escape(code)}.*`", said), said
    assert words in said
    assert "engine=sequential runs it" in said
    assert not re.search("functorch|vmap|file a bug|file an issue", said)


@pytest.mark.parametrize(
    ("objective", "words"),
    [
        (Forgets, r"client 0 failed in round 1.*test_blame\.py:\d+, `.*received\[\"nope\"\].*`: KeyError: 'nope'"),
        (Bare, r"Bare\.loss must return \(loss, extras\), got Tensor"),
        (Vector, "a client's loss must be one number, got a tensor with 1 axes"),
        (Partial, r"Partial\.direction must return a direction for every parameter that moves; a\.bias has none"),
    ],
)
def test_what_is_wrong_in_a_loss_is_said(objective, words):
    said = mistake("generic", objective=objective)
    assert re.search(words, said), said


def test_a_criterion_that_merges_the_rows_it_is_given_is_no_fused_one():
    engine = Vectorized(make_task(objective=Mixes))
    assert engine.plan["kernels"] == "generic"
    engine.close()


class Misfit(Net):
    def __init__(self):
        super().__init__()
        self.b = nn.Linear(7, 5)


def test_a_model_that_does_not_take_the_data_names_its_line(tmp_path):
    data = Dataset(torch.randn(40, 8), torch.arange(40) % 5, {"train": np.arange(30), "test": np.arange(30, 40)}, 5)
    with pytest.raises(UserError, match=r"test_blame\.py:\d+, `return self\.b\(.*`: mat1 and mat2 shapes"):
        fedsim.simulate("partition=iid", "partition.num_clients=3", data=data, model=Misfit, folder=tmp_path / "run")
