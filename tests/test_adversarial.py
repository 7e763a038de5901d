"""Adversarial training: the moved samples by hand and against plain loops, its limits, and every engine alike."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.clients.adversarial import Adversarial
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Dataset
from fedsim.engine.model import Functional

KEY = SimpleNamespace(key=torch.tensor(7))


def linear(weight, bias=0.0):
    """Two classes whose logits are 0 and w·x + b: the margin of class 1."""
    model = nn.Linear(len(weight), 2, dtype=torch.float64)
    with torch.no_grad():
        model.weight.copy_(torch.stack([torch.zeros(len(weight)), torch.tensor(weight)]))
        model.bias.copy_(torch.tensor([0.0, bias]))
    return model


def moved(objective, model, x, y):
    """Return the samples on which an objective takes its loss."""
    seen = []

    def spied(params, inputs):
        seen.append(inputs)
        return Functional(model)(params, inputs)

    objective.loss(spied, dict(model.named_parameters()), Batch(x, y), KEY)
    return seen[-1]


def pgd_in_loops(weight, bias, x, y, *, radius, step, num_steps, low, high):
    """Ascend the cross-entropy of a softmax regression, one feature at a time."""
    start, x = x.copy(), np.clip(x, low, high)
    for _ in range(num_steps):
        z = weight @ x + bias
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        p[y] -= 1
        for j in range(len(x)):
            slope = sum(p[c] * weight[c, j] for c in range(len(p)))
            x[j] = min(max(x[j] + step * np.sign(slope), start[j] - radius, low), start[j] + radius, high)
    return x


def test_a_linear_model_by_hand():
    # the worst x' is x − ε sign(w) for class 1: (0.5, 0.1) → (0.4, 0.2), where the margin 0.3 is 0
    model, x = linear([1.0, -2.0]), torch.tensor([[0.5, 0.1]], dtype=torch.float64)
    objective = Adversarial(radius=0.1, step_size=0.05, num_steps=2, random_start=False)
    worst = moved(objective, model, x, torch.tensor([1]))
    torch.testing.assert_close(worst, torch.tensor([[0.4, 0.2]], dtype=torch.float64), rtol=0, atol=1e-15)
    loss, _ = objective.loss(Functional(model), dict(model.named_parameters()), Batch(x, torch.tensor([1])), KEY)
    assert loss.item() == pytest.approx(np.log(2), rel=1e-14)
    wide = Adversarial(radius=0.1, num_steps=3)  # from anywhere in the box: 2.5 ε of steps reach the corner
    torch.testing.assert_close(moved(wide, model, x, torch.tensor([1])), worst, rtol=0, atol=1e-15)


@pytest.mark.parametrize("bounds", [(-np.inf, np.inf), (-0.5, 0.6)])
def test_against_loops(bounds):
    rng = np.random.default_rng(0)
    model = nn.Linear(6, 4, dtype=torch.float64)
    x, y = rng.normal(size=(9, 6)).clip(*bounds), rng.integers(0, 4, 9)
    low, high = (None if np.isinf(b) else b for b in bounds)
    objective = Adversarial(radius=0.3, step_size=0.07, num_steps=5, random_start=False, low=low, high=high)
    got = moved(objective, model, torch.tensor(x), torch.tensor(y))
    weight, bias = (p.detach().numpy() for p in model.parameters())
    said = {"radius": 0.3, "step": 0.07, "num_steps": 5, "low": bounds[0], "high": bounds[1]}
    want = [pgd_in_loops(weight, bias, a, int(c), **said) for a, c in zip(x, y, strict=True)]
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12, atol=1e-13)


def test_the_box_holds_and_the_parameters_alone_get_gradients():
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3))
    x, y = torch.rand(20, 5), torch.arange(20) % 3
    objective = Adversarial(radius=0.2, num_steps=4, low=0.0, high=1.0)
    worst = moved(objective, model, x, y)
    assert not worst.requires_grad
    assert (worst - x).abs().max() <= 0.2 + 1e-6
    assert worst.min() >= 0
    assert worst.max() <= 1
    clean, worse = (nn.functional.cross_entropy(model(z), y) for z in (x, worst))
    assert worse > clean
    loss, _ = objective.loss(Functional(model), dict(model.named_parameters()), Batch(x, y), KEY)
    grads = torch.autograd.grad(loss, list(model.parameters()))
    want = torch.autograd.grad(nn.functional.cross_entropy(model(worst), y), list(model.parameters()))
    for one, other in zip(grads, want, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    "arguments",
    [{"radius": -0.1}, {"radius": float("nan")}, {"step_size": 0.0}, {"num_steps": -1}, {"low": 1.0, "high": 1.0}],
)
def test_arguments_out_of_range_are_named(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        Adversarial(**arguments)


def _weights(tmp_path, name, client, *overrides):
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 60)
    x = torch.tensor(rng.normal(size=(60, 5)) + y[:, None])
    data = Dataset(x, torch.tensor(y), {"train": np.arange(48), "test": np.arange(48, 60)}, 3)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3))
    result = fedsim.simulate(
        "partition=iid", "partition.num_clients=4", "dtype=float64", "threads=1", "data.validation=0", *overrides,
        f"hydra.run.dir={tmp_path / name}", data=data, model=model, client=client, num_rounds=2,
    )  # fmt: skip
    return torch.cat([p.detach().flatten() for p in result.model.parameters()])


def test_engines_train_alike(tmp_path):
    names = ("sequential", "vectorized", "auto")
    seen = [_weights(tmp_path, name, Adversarial(num_steps=3), f"engine={name}") for name in names]
    for other in seen[1:]:
        torch.testing.assert_close(other, seen[0], rtol=0, atol=1e-9)


@pytest.mark.parametrize("arguments", [{"radius": 0.0}, {"num_steps": 0}], ids=str)
def test_without_a_move_it_is_fedavgs_client(tmp_path, arguments):
    mine = _weights(tmp_path, "mine", Adversarial(**arguments), "engine=sequential")
    assert torch.equal(mine, _weights(tmp_path, "plain", CrossEntropy(), "engine=sequential"))


def test_one_full_batch_step_is_a_step_of_centralised_adversarial_training(tmp_path):
    """Equal clients, K = 1: U - lr mean_c grad L(U; x'), x' found at U itself."""
    objective = Adversarial(radius=0.2, step_size=0.09, num_steps=4, random_start=False)
    words = ("client.local_steps=1", "client.batch_size=null", "client.lr=0.3", "partition.local_test=0", "fraction=1")
    got = _weights(tmp_path, "run", objective, *words)
    rng = np.random.default_rng(3)
    y = rng.integers(0, 3, 60)
    x, y = torch.tensor(rng.normal(size=(60, 5)) + y[:, None])[:48], torch.tensor(y)[:48]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3)).double()
    for _ in range(2):
        worst = moved(objective, model, x, y)
        grads = torch.autograd.grad(nn.functional.cross_entropy(model(worst), y), list(model.parameters()))
        with torch.no_grad():
            for p, g in zip(model.parameters(), grads, strict=True):
                p -= 0.3 * g
    torch.testing.assert_close(got, torch.cat([p.detach().flatten() for p in model.parameters()]), rtol=0, atol=1e-12)


class Batched(nn.Module):
    """A model with batch norm and dropout that keeps the inputs it was given and how it normalised them."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop, self.head = nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.drop(self.norm(x)))


def test_moving_samples_leaves_running_statistics_as_they_were():
    torch.manual_seed(0)
    model = Batched().double()
    x, y = torch.rand(20, 5, dtype=torch.float64) + 1, torch.arange(20) % 3
    before = {name: value.clone() for name, value in model.named_buffers()}
    function, seen = Functional(model), []
    model.norm.register_forward_hook(lambda norm, *_: seen.append((norm.training, model.drop.training)))
    objective = Adversarial(radius=0.1, num_steps=3)
    worst = objective._moved(function, dict(model.named_parameters()), Batch(x, y), KEY)
    assert seen == [(False, True)] * 3
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.norm.training
    objective.loss(function, dict(model.named_parameters()), Batch(x, y), KEY)
    want = nn.BatchNorm1d(5).double()
    want(worst)
    torch.testing.assert_close(model.norm.running_mean, want.running_mean, rtol=0, atol=0.02)  # one step's, not four
    assert model.norm.num_batches_tracked == 1


def test_a_model_with_batch_norm_trains(tmp_path):
    result = fedsim.simulate(
        "data=blobs", "data.num_samples=120", "data.shape=[5]", "data.num_classes=3", "partition=iid", "num_rounds=1",
        "partition.num_clients=4", "client.batch_size=null", "dtype=float64", folder=tmp_path / "run",
        model=Batched(), client=Adversarial(num_steps=2),
    )  # fmt: skip
    assert all(bool(value.isfinite().all()) for value in result.model.state_dict().values())
