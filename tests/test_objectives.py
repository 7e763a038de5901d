"""What clients minimise: hand cases, padding, leading axes as a loop over clients, limits."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.fedprox import FedProx
from fedsim.clients.margin import Margin

OBJECTIVES = [
    CrossEntropy(),
    FedProx(proximal_mu=0.1),
    Margin(margin_lambda=0.3),
    Margin(margin_lambda=0.3, reduction="sample"),
]
IDS = ["cross_entropy", "fedprox", "margin_batch", "margin_sample"]


def batch(seed, *shape, num_classes=5, dtype=torch.float64):
    rng = np.random.default_rng(seed)
    logits = torch.as_tensor(rng.normal(size=(*shape, num_classes)), dtype=dtype)
    return logits, torch.as_tensor(rng.integers(0, num_classes, shape)), torch.full(shape, 1 / shape[-1], dtype=dtype)


def margin_in_loops(logits, targets, lam, reduction):
    losses, squares = [], []
    for z, y in zip(logits.tolist(), targets.tolist(), strict=True):
        exps = [math.exp(v) for v in z]
        probabilities = [v / sum(exps) for v in exps]
        losses.append(-math.log(probabilities[y]))
        squares.append(sum(p * p for p in probabilities))
    if reduction == "batch":
        return sum(losses) / len(losses) + lam * math.log(1 + sum(squares))
    return sum(c + lam * math.log(1 + q) for c, q in zip(losses, squares, strict=True)) / len(losses)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("seed", range(5))
def test_margin_against_loops(reduction, seed):
    logits, targets, weights = batch(seed, 7)
    got = Margin(margin_lambda=0.2, reduction=reduction).criterion(logits, targets, weights)
    assert got.item() == pytest.approx(margin_in_loops(logits, targets, 0.2, reduction), rel=1e-12)


def test_margin_by_hand():
    # uniform logits, B = 4, C = 10: ‖P‖² = 4/10, so ln 10 + .1 ln 1.4 = 2.336232
    uniform = torch.zeros(4, 10, dtype=torch.float64)
    quarter = torch.full((4,), 0.25, dtype=torch.float64)
    labels = torch.arange(4)
    batched = Margin(margin_lambda=0.1).criterion(uniform, labels, quarter)
    assert batched.item() == pytest.approx(2.336232, abs=5e-7)
    # one sample has ‖p‖² = 1/10: ln 10 + .1 ln 1.1
    each = Margin(margin_lambda=0.1, reduction="sample").criterion(uniform, labels, quarter)
    assert each.item() == pytest.approx(math.log(10) + 0.1 * math.log(1.1), rel=1e-14)
    # confident and right, B = 50: cross-entropy 0, ‖P‖² = 50, so .1 ln 51 = 0.393183
    labels = torch.arange(50) % 10
    confident = 100.0 * functional.one_hot(labels, 10).double()
    loss = Margin(margin_lambda=0.1).criterion(confident, labels, torch.full((50,), 0.02, dtype=torch.float64))
    assert loss.item() == pytest.approx(0.393183, abs=5e-7)


@pytest.mark.parametrize("reduction", ["batch", "sample"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_lambda_0_is_cross_entropy_to_the_bit(reduction, dtype):
    logits, targets, weights = batch(0, 3, 11, dtype=dtype)
    inputs = [logits.clone().requires_grad_() for _ in range(2)]
    losses = [
        objective.criterion(z, targets, weights)
        for objective, z in zip((Margin(margin_lambda=0, reduction=reduction), CrossEntropy()), inputs, strict=True)
    ]
    assert torch.equal(*losses)
    grads = [torch.autograd.grad(loss.sum(), z)[0] for loss, z in zip(losses, inputs, strict=True)]
    assert torch.equal(*grads)


def test_cross_entropy_is_torchs_mean():
    logits, targets, weights = batch(1, 9)
    want = functional.cross_entropy(logits, targets)
    torch.testing.assert_close(CrossEntropy().criterion(logits, targets, weights), want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_padding_does_not_count(objective):
    logits, targets, weights = batch(2, 6)
    padded = torch.cat([logits, 50 * torch.randn(4, 5, generator=torch.Generator().manual_seed(0)).double()])
    labels = torch.cat([targets, torch.zeros(4, dtype=torch.int64)])
    zeros = torch.cat([weights, torch.zeros(4, dtype=torch.float64)])
    got = objective.criterion(padded.requires_grad_(), labels, zeros)
    torch.testing.assert_close(got, objective.criterion(logits, targets, weights), rtol=1e-14, atol=0)
    (grad,) = torch.autograd.grad(got, padded)
    assert (grad[6:] == 0).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_leading_axes_are_a_loop_over_clients(objective):
    logits, targets, weights = batch(3, 2, 4, 6)
    got = objective.criterion(logits, targets, weights)
    assert got.shape == (2, 4)
    for i in range(2):
        for k in range(4):
            one = objective.criterion(logits[i, k], targets[i, k], weights[i, k])
            torch.testing.assert_close(got[i, k], one, rtol=1e-14, atol=0)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=IDS)
def test_vmap_and_gradients(objective):
    logits, targets, weights = batch(4, 3, 5)
    batched = torch.func.vmap(objective.criterion)(logits, targets, weights)
    torch.testing.assert_close(batched, objective.criterion(logits, targets, weights), rtol=1e-14, atol=0)
    assert torch.autograd.gradcheck(lambda z: objective.criterion(z, targets, weights), logits.requires_grad_())


def test_the_margin_pulls_towards_uniform_predictions():
    logits, targets, weights = batch(5, 20)
    plain = torch.autograd.functional.jacobian(lambda z: CrossEntropy().criterion(z, targets, weights), logits)
    pulled = torch.autograd.functional.jacobian(lambda z: Margin().criterion(z, targets, weights), logits)
    entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    moved = logits - 1e-3 * (pulled - plain)
    assert (-(moved.softmax(-1) * moved.log_softmax(-1)).sum(-1) >= entropy).all()


def test_fedprox_keeps_its_mu_where_the_engine_looks():
    assert FedProx(proximal_mu=0.5).proximal_mu == 0.5
    assert not hasattr(CrossEntropy(), "proximal_mu")


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        (FedProx, {"proximal_mu": -1.0}),
        (FedProx, {"proximal_mu": float("nan")}),
        (Margin, {"margin_lambda": -0.1}),
        (Margin, {"reduction": "mean"}),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        kind(**arguments)


@pytest.mark.parametrize(
    "objective",
    [
        CrossEntropy(),
        FedProx(),
        Margin(margin_lambda=0.3),
        Margin(margin_lambda=0.3, reduction="sample"),
        Margin(margin_lambda=0),
    ],
    ids=str,
)
def test_the_mean_criterion_is_the_criterion_of_equal_weights(objective):
    rng = torch.Generator().manual_seed(3)
    for size in (1, 7):
        logits = 3 * torch.randn(size, 5, generator=rng, dtype=torch.float64)
        targets = torch.randint(0, 5, (size,), generator=rng)
        weights = torch.full((size,), 1 / size, dtype=torch.float64)
        expected = objective.criterion(logits, targets, weights)
        torch.testing.assert_close(objective.mean_criterion(logits, targets), expected, rtol=1e-14, atol=1e-14)
