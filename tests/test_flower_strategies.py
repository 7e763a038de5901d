"""Every Flower strategy that ships, through the grid: it learns, and where its maths is short, it is that maths."""

import functools
import importlib.resources
import random

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from hydra.utils import instantiate
from omegaconf import OmegaConf

from fedsim.contracts import Cohort
from fedsim.flower.grid import SimulationGrid
from fedsim.flower.state import capture, initial_parts, restore
from fedsim.flower.strategy import RuleStrategy, aggregate, evaluate
from fedsim.layout import Layout
from fedsim.strategies.fedavg import FedAvg

NUM_CLIENTS = 12
CONFIGS = sorted(
    path.name.removesuffix(".yaml")
    for path in importlib.resources.files("fedsim.configs").joinpath("strategy/flower").iterdir()
    if not path.name.startswith("_")
)


class Regression:
    """Linear regression on 12 clients whose data share one solution; gradient steps in NumPy."""

    layout = Layout(("head.weight", "head.bias"), ((1, 4), (1,)))

    def __init__(self, dtype=torch.float64):
        rng = np.random.default_rng(3)
        self.sizes = rng.integers(8, 40, NUM_CLIENTS)
        self.x = [np.hstack([rng.normal(size=(n, 4)), np.ones((n, 1))]) for n in self.sizes]
        target = np.array([1.0, -2.0, 0.5, 1.5, -1.0])
        self.y = [x @ target + 0.1 * rng.normal(size=len(x)) for x in self.x]
        self.w0 = torch.zeros(5, dtype=dtype)
        self.configs, self.cohorts = [], []

    def loss(self, w, client):
        return float(np.mean((self.x[client] @ w.double().numpy() - self.y[client]) ** 2))

    def global_loss(self, w):
        return np.average([self.loss(w, k) for k in range(NUM_CLIENTS)], weights=self.sizes)

    def train(self, round, clients, models, broadcast, config):
        self.configs.append(dict(config))
        rows = models.expand(len(clients), -1).clone()
        for k, client in enumerate(clients):
            w = rows[k].double().numpy().copy()
            for _ in range(3):
                w -= 0.1 * self.x[client].T @ (self.x[client] @ w - self.y[client]) / len(self.y[client])
            rows[k] = torch.from_numpy(w)
        ones = torch.ones(len(clients), dtype=torch.int64)
        losses = torch.tensor([self.loss(models if models.dim() == 1 else models[k], c) for k, c in enumerate(clients)])
        self.cohorts.append(
            Cohort(
                updates=rows - models,
                weights=torch.from_numpy(self.sizes[clients]).to(models),
                clients=torch.from_numpy(clients),
                num_steps=3 * ones,
                staleness=0 * ones,
                received=(round - 1) * ones,
                round=round,
                layout=self.layout,
                extras={"train_loss": losses.to(models)},
            )
        )
        return self.cohorts[-1]

    def evaluate(self, round, clients, models):
        losses = np.array([self.loss(models, client) for client in clients])
        return {"num-examples": self.sizes[clients], "eval_loss": losses, "eval_acc": 1 / (1 + losses)}


@functools.cache
def composed(name, *overrides):
    with initialize_config_module("fedsim.configs", version_base=None):
        return compose("config", overrides=[f"strategy=flower/{name}", *overrides]).strategy


def make(name, *overrides):
    arguments = OmegaConf.to_container(composed(name, *overrides), resolve=True)
    if "num_sampled_clients" in arguments:
        arguments["num_sampled_clients"] = NUM_CLIENTS
    return instantiate(arguments)


def run(strategy, num_rounds, backend=None, seed=0, w=None, start=1):
    backend = backend or Regression()
    grid = SimulationGrid(backend, seed=seed)
    grid.cohort = np.arange(NUM_CLIENTS)
    w = backend.w0 if w is None else w
    for round in range(start, start + num_rounds):
        w, metrics = aggregate(strategy, round, w, grid)
    return w, metrics


def test_all_of_flowers_strategies_but_the_trees_are_configured():
    import flwr.serverapp.strategy as flower

    public = {name.lower() for name in flower.__all__ if isinstance(getattr(flower, name), type)}
    assert set(CONFIGS) == public - {"fedxgbbagging", "fedxgbcyclic", "result", "strategy"}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_strategy_learns(name):
    # FedYogi's 0.01 and adaptive clipping's 0.1 bound a round's step: 60 rounds take either well over half-way.
    backend = Regression(torch.float32)
    w, metrics = run(make(name), 60, backend)
    assert w.shape == backend.w0.shape
    assert w.dtype == torch.float32
    assert backend.global_loss(w) < 0.5 * backend.global_loss(backend.w0)
    assert metrics["train_loss"] < 0.5 * backend.global_loss(backend.w0)


def test_flowers_fedavg_equals_fedsims():
    # float32: the two sum K = 12 terms of size ~1 in different orders, so 1e-6 is a few roundings.
    foreign, _ = run(make("fedavg"), 5, Regression(torch.float32))
    own, _ = run(RuleStrategy(FedAvg()), 5, Regression(torch.float32))
    assert not torch.equal(foreign, torch.zeros(5))
    torch.testing.assert_close(foreign, own, rtol=1e-6, atol=1e-6)


def rows_after(backend, w):
    return (w + backend.cohorts[-1].updates).numpy()  # (K, D) what the clients sent


def test_median_and_trimmed_mean_are_numpys():
    backend = Regression()
    w, _ = run(make("fedmedian"), 1, backend)
    np.testing.assert_allclose(w, np.median(rows_after(backend, backend.w0), axis=0), rtol=1e-12)
    w, _ = run(make("fedtrimmedavg"), 1, backend)
    cut = np.sort(rows_after(backend, backend.w0), axis=0)[2:-2]  # ⌊0.2 · 12⌋ from each end
    np.testing.assert_allclose(w, cut.mean(0), rtol=1e-12)


def test_krum_takes_the_row_with_the_smallest_sum_of_distances():
    backend = Regression()
    w, _ = run(make("krum"), 1, backend)
    rows = rows_after(backend, backend.w0)
    scores = [np.sort(((rows - row) ** 2).sum(1))[1 : NUM_CLIENTS - 1 - 2 + 1].sum() for row in rows]  # K − f − 2
    np.testing.assert_allclose(w, rows[np.argmin(scores)], rtol=1e-12)


def test_qfedavg_at_zero_is_the_plain_mean():
    # q = 0: Δ_k = L (w − w_k), h_k = L, so w − ΣΔ/Σh is the mean over clients, not over samples.
    backend = Regression()
    w, _ = run(make("qfedavg", "strategy.q=0.0"), 1, backend)
    np.testing.assert_allclose(w, rows_after(backend, backend.w0).mean(0), rtol=1e-12)


def test_fedprox_reaches_the_clients_config():
    backend = Regression()
    run(make("fedprox", "strategy.proximal_mu=0.25"), 2, backend)
    assert [c["proximal-mu"] for c in backend.configs] == [0.25, 0.25]
    assert [c["server-round"] for c in backend.configs] == [1, 2]


@pytest.mark.parametrize("side", ["server", "client"])
def test_private_mean_without_noise_is_the_mean_of_clipped_updates(side):
    backend = Regression()
    strategy = make(
        f"differentialprivacy{side}sidefixedclipping", "strategy.noise_multiplier=0", "strategy.clipping_norm=0.7"
    )
    w, metrics = run(strategy, 1, backend)
    updates = backend.cohorts[-1].updates.numpy()
    norms = np.linalg.norm(updates, axis=1)
    assert norms.min() < 0.7 < norms.max()  # else the test says little
    clipped = updates * np.minimum(1, 0.7 / norms)[:, None]
    np.testing.assert_allclose(w, np.average(clipped, axis=0, weights=backend.sizes), rtol=1e-12)
    if side == "client":
        assert metrics["norm_bit"] == pytest.approx(np.average(norms > 0.7, weights=backend.sizes))


def test_adaptive_clipping_follows_the_quantile_on_both_sides():
    bounds = {}
    for side in ("server", "client"):
        strategy = make(f"differentialprivacy{side}sideadaptiveclipping", "strategy.noise_multiplier=0")
        run(strategy, 1)
        bounds[side] = strategy.clipping_norm
    # Every update is longer than 0.1, so the clipped fraction is 1: C ← C exp(−0.2 (1 − 0.5)), Flower's sign.
    assert bounds["server"] == bounds["client"] == pytest.approx(0.1 * np.exp(-0.1))


def test_noise_follows_the_seed_and_global_generators_come_back():
    name = "differentialprivacyserversidefixedclipping"
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    expected = (random.random(), np.random.random())  # noqa: NPY002
    random.seed(5), np.random.seed(5)  # noqa: NPY002
    one, _ = run(make(name), 2, seed=1)
    assert (random.random(), np.random.random()) == expected  # noqa: NPY002
    assert torch.equal(one, run(make(name), 2, seed=1)[0])
    assert not torch.equal(one, run(make(name), 2, seed=2)[0])


def test_a_skipped_aggregation_is_an_error_with_flowers_reason():
    with pytest.raises(RuntimeError, match=r"Bulyan returned no arrays in round 1 from 12 replies: .*at least 19"):
        run(make("bulyan", "strategy.num_malicious_nodes=4"), 1)


def test_federated_evaluation_is_weighted_by_samples():
    backend = Regression()
    for strategy in (make("fedavg"), RuleStrategy(FedAvg())):
        grid = SimulationGrid(backend)
        grid.cohort = np.array([2, 5, 9])
        metrics = evaluate(strategy, 1, backend.w0, grid)
        expected = np.average([backend.loss(backend.w0, k) for k in grid.cohort], weights=backend.sizes[grid.cohort])
        assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("name", CONFIGS)
def test_every_strategy_resumes_to_the_bit(name):
    through, _ = run(make(name), 5)
    first = make(name)
    initial = initial_parts(first)
    w, _ = run(first, 3)
    second = make(name)
    restore(second, capture(first, initial))
    resumed, _ = run(second, 2, w=w, start=4)
    assert torch.equal(resumed, through)
