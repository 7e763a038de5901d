"""Recorded steps that write a dense layer once for several of them, and hand gradients on as their factors."""

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.clients import fedhyper
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.fedhyper import FedHyper
from fedsim.contracts import Partition
from fedsim.engine.captured import Captured
from fedsim.engine.deferred import most
from fedsim.engine.record import record
from fedsim.engine.sequential import Sequential
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.layout import Layout
from fedsim.local import LocalTraining

SIZES = np.array([7, 1, 30, 13, 4, 9])
N, IN, OUT = int(SIZES.sum()), 40, 30
RNG = torch.Generator().manual_seed(0)
X = torch.randn(N, 1, 5, 8, generator=RNG, dtype=torch.float64)
Y = torch.randint(0, 5, (N,), generator=RNG)


def mlp(bias=True):
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(IN, OUT, bias=bias), nn.ReLU(), nn.Linear(OUT, 5)).double()


class Tied(nn.Module):
    """Reads the weight of its first layer once more."""

    def __init__(self):
        super().__init__()
        self.layers = mlp()

    def forward(self, x):
        return self.layers(x) + self.layers[1].weight.mean()


def make_task(module=None, objective=None, **training):
    module = module or mlp()
    return Task(
        module=module, shared=Layout.of(dict(module.named_parameters())), local=Layout((), ()),
        buffers=Layout((), ()), objective=objective or CrossEntropy(),
        training=LocalTraining(**{"lr": 0.1, "batch_size": 4, "local_epochs": 2, **training}), x=X, y=Y,
        partition=Partition(np.random.default_rng(0).permutation(N), np.concatenate([[0], np.cumsum(SIZES)])),
        store=ClientStore(len(SIZES), {}),
    )  # fmt: skip


def make_job(task, **changes):
    start = torch.cat([p.detach().flatten() for p in task.module.parameters()])
    count = len(SIZES)
    settings = {"clients": np.arange(count), "received": np.zeros(count, dtype=np.int64), "models": {0: start.clone()}}
    settings |= {"broadcasts": {}, "buffers": start[:0], "state": {}, "round": 1, "key": 1, "lr": 0.1}
    return Job(**settings | changes)


def trained(engine, job):
    out = torch.empty(len(job), engine.task.shared.size, dtype=torch.float64)
    left = engine.train(job, out)
    engine.close()
    return out, left


def play_of(engine):
    return next(iter(engine._plays.values()))


def deferrals(engine):
    return {program.deferral for program in play_of(engine).programs.values()}


@pytest.mark.parametrize(
    ("module", "arguments", "deferred"),
    [
        (mlp, {}, True),
        (lambda: mlp(bias=False), {}, True),
        (mlp, {"batch_size": 3, "local_epochs": 5}, True),
        (mlp, {"batch_size": 5}, False),  # two steps have more samples than pay
        (mlp, {"weight_decay": 0.1}, False),
        (mlp, {"momentum": 0.9}, False),
        (Tied, {}, False),
    ],
)  # fmt: skip
def test_a_layer_that_is_written_once_for_several_steps_trains_as_it_does_step_by_step(module, arguments, deferred):
    assert most((OUT, IN)) == 8
    job = make_job(make_task(module(), **arguments))
    one, left = trained(Sequential(make_task(module(), **arguments)), job)
    engine = Captured(make_task(module(), **arguments), threads=2)
    other, also = trained(engine, job)
    assert (deferrals(engine) != {None}) == deferred
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(also.extras["train_loss"], left.extras["train_loss"], rtol=1e-12, atol=0)
    torch.testing.assert_close(also.square_norms, left.square_norms, rtol=1e-12, atol=0)


def test_bits_of_deferred_steps_hang_on_neither_threads_nor_neighbours():
    job, some = make_job(make_task()), np.array([1, 2, 5])
    first = trained(Captured(make_task(), threads=1), job)[0]
    assert torch.equal(trained(Captured(make_task(), threads=3), job)[0], first)
    assert torch.equal(trained(Captured(make_task(), threads=1), job.take(some))[0], first[some])


def told(task):
    return {"previous": 0.1 * torch.randn(task.shared.size, generator=torch.Generator().manual_seed(2)).double()}


@pytest.mark.parametrize("arguments", [{}, {"normalize": "cosine"}, {"preset": "reference"}], ids=str)
def test_a_rate_that_follows_inner_products_of_gradients_is_the_same_from_their_factors(arguments, monkeypatch):
    monkeypatch.setattr(fedhyper, "FEW", IN)  # the layer is not one of a few entries

    def task():
        objective = FedHyper(kappa=0.5, **arguments)
        fresh = make_task(objective=objective)
        return replace(fresh, told={**told(fresh), "num_participants": 3.0})

    job = make_job(task(), broadcasts={0: task().told})
    one, left = trained(Sequential(task()), job)
    engine = Captured(task(), threads=2)
    other, also = trained(engine, job)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-12)
    torch.testing.assert_close(also.extras["lr_scale"], left.extras["lr_scale"], rtol=1e-12, atol=0)
    assert left.extras["lr_scale"].unique().numel() > 2
    play = play_of(engine)
    if not arguments:  # a norm wants a gradient's products with itself, the released code its entries
        assert play.factors, "no gradient was handed on as its factors"
        assert None not in deferrals(engine)
        assert any(program.others for program in play.programs.values())
        assert {program.crossed for kind, program in play.programs.items() if kind.turn} == {0}


@dataclass(frozen=True)
class Looking(CrossEntropy):
    """Asks for entries of the last gradient."""

    def direction(self, grads, params, context):
        name = next(name for name, value in grads.items() if value.shape == (OUT, IN))
        last = context.step_state.get("last", torch.zeros_like(grads[name]))
        scale = 1 + 0.01 * last.abs().sum() + 0 * torch.dot(last.flatten(), grads[name].flatten())
        return grads, {"lr_scale": scale, "last": grads[name]}


def test_a_gradient_whose_entries_are_asked_for_is_handed_on_whole():
    job = make_job(make_task(objective=Looking()))
    one, _ = trained(Sequential(make_task(objective=Looking())), job)
    engine = Captured(make_task(objective=Looking()), threads=1)
    torch.testing.assert_close(trained(engine, job)[0], one, rtol=0, atol=1e-12)
    assert not play_of(engine).factors


def test_what_stays_for_a_client_is_computed_once_and_what_is_written_is_not():
    def function(given):
        weight, kept, x = given
        turned, scaled = weight.t(), kept * 2
        other = kept + 1
        other.mul_(x.sum())
        weight.sub_(scaled * x.sum() + other)
        return [turned @ x]

    def inputs():
        generator = torch.Generator().manual_seed(0)
        return [torch.randn(shape, generator=generator) for shape in ((3, 4), (3, 4), (3, 2))]

    program = record(function, inputs(), fixed=2)
    once = [line.split("aten.")[1].split("(")[0] for line in program.begin.splitlines()[:-1]]
    assert sorted(once) == ["mul", "t"]  # the view of what moves stays a view of it
    mine, theirs = inputs(), inputs()
    for _ in range(2):
        torch.testing.assert_close(program(mine), function(theirs))


def test_the_sum_of_rows_that_moves_a_bias_is_one_product_with_ones():
    def function(given):
        bias, rows = given
        bias.sub_(rows.sum(0, keepdim=True).view(-1))
        return []

    program = record(function, [torch.zeros(3), torch.ones(2, 3)])
    assert "addmv_" in program.body
    assert "sum" not in program.body
    bias, rows = torch.zeros(3), torch.randn(2, 3)
    program([bias, rows])
    torch.testing.assert_close(bias, -rows.sum(0))


def test_a_split_into_one_part_is_that_part():
    program = record(lambda given: list(given[0].split_with_sizes([3])), [torch.ones(3), torch.ones(1)])
    assert torch.equal(program([torch.arange(3.0), torch.ones(1)])[0], torch.arange(3.0))


class ByChannel(nn.Module):
    """A dense layer over each channel's pixels: its rows are channels, not samples."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Linear(20, 90, bias=False).double(), nn.Linear(90, 5).double()

    def forward(self, x):
        rows = x.view(-1, 4, 5).flatten(1)  # (2b, 20)
        return self.head(torch.tanh(self.first(rows)).view(-1, 2, 90).mean(1))


def test_rows_that_are_parts_of_samples_are_not_the_samples():
    module, x = ByChannel(), X[:4].view(4, 2, 4, 5)

    def step(given):
        weight = given[0].detach().requires_grad_()
        with torch.enable_grad():
            logits = torch.func.functional_call(module, {"first.weight": weight}, given[1])
            given[0].sub_(torch.autograd.grad(logits.square().sum(), [weight])[0])
        return [logits.sum().detach()]

    given = [module.first.weight.detach().clone(), x.clone()]
    program = record(step, [v.clone() for v in given], fixed=1, samples=1)
    assert program.deferral is None
    mine, theirs = [v.clone() for v in given], [v.clone() for v in given]
    torch.testing.assert_close(program(mine), step(theirs))
    torch.testing.assert_close(mine, theirs)


class Ends(CrossEntropy):
    """Sends, at its end, a number of what it has trained: of all layers, or of the last one alone."""

    def __init__(self, whole):
        self.__dict__["whole"] = whole

    def finish(self, params, context):
        chosen = params.values() if self.whole else [params["3.weight"]]
        return {}, {"size": torch.stack([p.square().sum() for p in chosen]).sum()}, None


@pytest.mark.parametrize("whole", [True, False])
def test_a_round_may_end_with_the_weight_that_its_steps_defer(whole):
    """Where nobody reads it then, it is never there: the update gets its difference at once."""
    results = []
    for make in (Sequential, lambda task: Captured(task, threads=1)):
        task = make_task(objective=Ends(whole))
        job = make_job(task)
        results.append(trained(make(task), job))
    (want, left), (found, mine) = results
    torch.testing.assert_close(found, want, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(mine.extras["size"], left.extras["size"], rtol=1e-9, atol=1e-12)
    task = make_task(objective=Ends(whole))
    engine = Captured(task, threads=1)
    play = play_of(engine)
    assert play._program(play._kind(play.full)).deferral is not None
    assert any(0 in end.reads for end in play.ends) is whole  # number 0 is the first weight
    engine.close()
