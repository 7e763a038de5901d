"""Methods with a server's and a client's side, run by the engines against their papers' algorithms in plain loops.

The oracles see one flat vector w (D,) of a softmax regression, take full-batch gradients by hand in float64, and know
nothing of rules, objectives or contexts. Tolerance 1e-10: engines sum the same float64 terms in another order.
"""

import copy
import shutil
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.build import build
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.feddyn import FedDyn as FedDynClient
from fedsim.clients.fedhyper import FedHyper as FedHyperClient
from fedsim.clients.fedlex import FedLEx as FedLExClient
from fedsim.clients.margin import Margin
from fedsim.clients.moon import Moon
from fedsim.clients.qfedavg import QFedAvg as QFedAvgClient
from fedsim.clients.scaffold import Scaffold as ScaffoldClient
from fedsim.clients.scaffold import ScaffoldI
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Dataset
from fedsim.errors import UserError
from fedsim.laws import cohort_of
from fedsim.local import LocalTraining
from fedsim.loop import Loop
from fedsim.strategies.dp_fedavg import DPFedAvg
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.feddyn import FedDyn
from fedsim.strategies.fedhyper import FedHyperCL, FedHyperG, FedHyperSL
from fedsim.strategies.fedlex import FedLEx
from fedsim.strategies.fednova import FedNova
from fedsim.strategies.qfedavg import QFedAvg
from fedsim.strategies.scaffold import Scaffold

F, C, LR, STEPS = 3, 4, 0.4, 3
SIZES = (9, 7, 5, 3)
ENGINES = ("sequential", "vectorized")
EVERYONE = {t: [0, 1, 2, 3] for t in range(1, 9)}
SOME = {1: [0, 1, 3], 2: [1, 2], 3: [0, 1, 2, 3], 4: [2, 3]}
OPTIMIZERS = [{}, {"momentum": 0.5, "weight_decay": 0.1}, {"optimizer": "adamw", "weight_decay": 0.1, "lr": 0.02}]
EXACT = {"rtol": 1e-10, "atol": 1e-12}


def samples(seed=0):
    rng = np.random.default_rng(seed)
    owner = np.repeat(np.arange(4), SIZES)
    x = rng.normal(size=(len(owner), F)) + 0.5 * owner[:, None]
    return x, rng.integers(0, C, len(owner)), owner


@cache
def config(engine, extra=()):
    alone = ["partition=natural", "partition.local_test=0", "data.validation=0", "metrics.clients_every=0"]
    return compose([f"engine={engine}", *alone, "fraction=1", "dtype=float64", "threads=1", *extra])


class Chosen:
    """Clients by round."""

    def __init__(self, plan):
        self.plan = plan

    def __call__(self, pool, size, rng, round):
        return self.plan[round]


class Regression(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(F, C).double()

    def features(self, x):
        return x

    def forward(self, x):
        return self.head(x)


class Net(nn.Module):
    """logits = head tanh(body x)."""

    def __init__(self):
        super().__init__()
        self.body = nn.Linear(F, 5).double()
        self.head = nn.Linear(5, C).double()

    def features(self, x):
        return torch.tanh(self.body(x))

    def forward(self, x):
        return self.head(self.features(x))


def initial(model, seed=3):
    rng = np.random.default_rng(seed)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.as_tensor(rng.normal(size=p.shape)))
    return model


def start(tmp_path, strategy, client, *, engine="sequential", plan=EVERYONE, model=None, data=None, extra=(),
          **training):  # fmt: skip
    x, y, owner = samples() if data is None else data
    splits = {"train": np.arange(len(y)), "test": len(y) + np.arange(2)}
    x, y, owner = np.concatenate([x, x[:2]]), np.concatenate([y, y[:2]]), np.concatenate([owner, [-1, -1]])
    data = Dataset(torch.as_tensor(x), torch.as_tensor(y), splits, C, owner)
    training = LocalTraining(**{"lr": LR, "batch_size": None, "local_steps": STEPS, **training})
    model = initial(Regression()) if model is None else model
    parts = {"data": data, "model": copy.deepcopy(model), "strategy": strategy, "client": client,
             "training": training, "sampler": Chosen(plan)}  # fmt: skip
    folder = tmp_path / str(len(list(tmp_path.iterdir())))  # a run folder of its own
    folder.mkdir()
    loop = Loop(build(config(engine, extra), parts), folder, Observer())
    OPEN.append(loop)
    return loop


OPEN = []


@pytest.fixture(autouse=True)
def _logs_are_closed():
    yield
    while OPEN:
        loop = OPEN.pop()
        loop.rounds.close()
        loop.times.close()


def models(loop, rounds):
    """Return the weights (rounds + 1, D) before and after each round."""
    seen = [loop.weights.numpy().copy()]
    for t in range(1, rounds + 1):
        loop.step(t)
        seen.append(loop.weights.numpy().copy())
    return np.stack(seen)


def gradient(w, k):
    """∇L_k(w) (D,) of the mean cross-entropy of client k's samples; w = (W (C, F), b (C,)) flat."""
    x, y, owner = samples()
    x, y = x[owner == k], y[owner == k]
    grad_weight, grad_bias = np.zeros((C, F)), np.zeros(C)
    for xi, yi in zip(x, y, strict=True):
        z = w[: C * F].reshape(C, F) @ xi + w[C * F :]
        p = np.exp(z - z.max()) / np.exp(z - z.max()).sum()
        p[yi] -= 1
        grad_weight += np.outer(p, xi) / len(y)
        grad_bias += p / len(y)
    return np.concatenate([grad_weight.ravel(), grad_bias])


def local_sgd(w, k, steps=STEPS, lr=LR, momentum=0.0):
    v, velocity = w.copy(), 0.0
    for _ in range(steps):
        velocity = momentum * velocity + gradient(v, k)
        v = v - lr * velocity
    return v


def average(rows, clients):
    n = np.array([SIZES[k] for k in clients], dtype=float)
    return (n[:, None] * np.array(rows)).sum(0) / n.sum()


def first(model=None):
    model = initial(Regression()) if model is None else model
    return torch.cat([p.detach().flatten() for p in model.parameters()]).numpy()


def test_the_oracle_is_fedavg(tmp_path):
    got = models(start(tmp_path, FedAvg(), CrossEntropy(), plan=SOME), 4)
    w = first()
    for t in range(1, 5):
        w = average([local_sgd(w, k) for k in SOME[t]], SOME[t])
        np.testing.assert_allclose(got[t], w, **EXACT)


# --- q-FedAvg ---------------------------------------------------------------------------------------------------


def mean_loss(w, k):
    """F_k(w): the mean cross-entropy of client k's samples."""
    x, y, owner = samples()
    z = x[owner == k] @ w[: C * F].reshape(C, F).T + w[C * F :]
    return np.mean(np.log(np.exp(z).sum(1)) - z[np.arange(len(z)), y[owner == k]])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("q", [0.0, 0.5, 3.0])
@pytest.mark.parametrize("training", [{}, {"momentum": 0.5, "batch_size": 5, "local_steps": None}])
def test_q_fedavg_against_algorithm_2(tmp_path, engine, q, training):
    """Weighed by n_k where the paper's draw is by n_k; with q = 0 it is FedAvg."""
    rule = QFedAvg(q=q, client_lr=LR)
    got = models(start(tmp_path, rule, QFedAvgClient(), engine=engine, plan=SOME, **training), 4)
    plain = start(tmp_path, FedAvg(), CrossEntropy(), engine=engine, plan=SOME, **training)
    for t in range(1, 5):
        w, top, bottom = got[t - 1], 0.0, 0.0
        alone = [start(tmp_path, FedAvg(), CrossEntropy(), engine=engine, plan={t: [k]}, model=at(w), **training)
                 for k in SOME[t]]  # fmt: skip
        for k, loop in zip(SOME[t], alone, strict=True):
            loop.step(t)
            gradient_like, loss = (w - loop.weights.numpy()) / LR, mean_loss(w, k)
            top = top + SIZES[k] * loss**q * gradient_like
            bottom += SIZES[k] * (q * loss ** (q - 1) * gradient_like @ gradient_like + loss**q / LR)
        np.testing.assert_allclose(got[t], w - top / bottom, **EXACT)
    if q == 0:
        np.testing.assert_allclose(models(plain, 4), got, **EXACT)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", [{"clip_norm": 1e-3}, {"clip_norm": 1e-3, "batch_size": 2, "local_steps": None}])
def test_q_fedavgs_loss_is_not_clipped(tmp_path, engine, training):
    loop = start(tmp_path, QFedAvg(), QFedAvgClient(), engine=engine, plan=SOME, **training)
    loop.step(1)
    losses = [mean_loss(first(), k) for k in SOME[1]]
    assert min(losses) > 1e-3
    assert float(loop.strategy.metrics["received_loss_std"]) == pytest.approx(np.std(losses, ddof=1), rel=1e-9)


@pytest.mark.parametrize("engine", ENGINES)
def test_q_fedavgs_loss_under_partial_work_is_a_mean_over_what_was_seen(tmp_path, engine):
    """All samples of a client are alike, so that the mean over any of them is F_k."""
    x, y, owner = samples()
    alike = np.searchsorted(owner, owner)  # each client's first sample
    rule = QFedAvg(client_lr=LR)
    loop = start(tmp_path, rule, QFedAvgClient(), engine=engine, data=(x[alike], y[alike], owner), batch_size=2,
                 extra=("devices.partial_work=0.1",))  # fmt: skip
    loop.step(1)
    w = first()
    z = x[np.unique(alike)] @ w[: C * F].reshape(C, F).T + w[C * F :]
    losses = np.log(np.exp(z).sum(1)) - z[np.arange(4), y[np.unique(alike)]]
    assert float(loop.strategy.metrics["received_loss_std"]) == pytest.approx(np.std(losses, ddof=1), rel=1e-9)


def test_q_fedavgs_rate_is_the_rounds(tmp_path):
    """One rule that reads the clients' rate is, round by round, one that is told it."""
    decay = {"lr_decay": 0.5, "lr_decay_every": 2}
    got = models(start(tmp_path, QFedAvg(), QFedAvgClient(), plan=SOME, **decay), 4)
    for t in range(1, 5):
        told = QFedAvg(client_lr=LR * 0.5 ** ((t - 1) // 2))
        loop = start(tmp_path, told, QFedAvgClient(), plan=SOME, model=at(got[t - 1]), **decay)
        loop.step(t)
        np.testing.assert_allclose(loop.weights.numpy(), got[t], **EXACT)


def test_q_fedavg_scales_a_late_update_by_the_rate_it_was_made_with():
    rule = QFedAvg().bind(local_training=LocalTraining(lr=0.5, lr_decay=0.5))
    rows, losses = torch.tensor([[-1.0], [-1.0]], dtype=torch.float64), torch.tensor([1.0, 2.0])
    cohort = cohort_of(rows, staleness=torch.tensor([0, 1]), round=2, extras={"received_loss": losses})
    step, _, _ = rule(cohort, {})  # rates 1/4 and 1/2: gradients 4 and 2
    assert step.item() == pytest.approx(-(1 * 4 + 2 * 2) / ((16 + 4) + (4 + 2 * 2)), rel=1e-12)


def at(w):
    """Return the model at w (D,)."""
    model = Regression()
    torch.nn.utils.vector_to_parameters(torch.as_tensor(w), model.parameters())
    return model


# --- FedLEx -----------------------------------------------------------------------------------------------------

SCOUTS = [[1.0, 0.0, 2.0], [1.0, 2.0, 0.0]]  # θ_k − θ₀


def explored(scouts=SCOUTS, sizes=None, **arguments):
    """Return what the first round makes of scouts' moves: the step and G."""
    moves = torch.tensor(scouts, dtype=torch.float64)
    cohort = cohort_of(moves, sizes=sizes, extras={"deviation": moves.square()})
    rule = FedLEx(**arguments)
    step, state, _ = rule(cohort, rule.init(cohort.layout, len(scouts)))
    return step.tolist(), state["guidance"].tolist()


def test_fedlex_by_hand():
    """S = (1, 2, 2) of (1, 0, 4) and (1, 4, 0); the round itself goes nowhere."""
    assert explored() == ([0, 0, 0], [0, 1, 1])
    assert explored([[10 * x for x in row] for row in SCOUTS]) == ([0, 0, 0], [0, 1, 1])
    assert explored(warm_start=True) == ([1, 1, 1], [0, 1, 1])
    assert explored(floor=0.5)[1] == [0.5, 1, 1]
    assert explored(even=True)[1] == [0, 1.5, 1.5]
    assert explored(guide="mean")[1] == pytest.approx([2 / 3] * 3)
    assert explored(sizes=[1, 2])[1] == [1, 1, 1]  # constant tensors are left alone
    assert explored([[1.0, 2.0, 3.0, 4.0, 10.0]], scale="robust")[1] == pytest.approx([0, 0, 0, 7 / 12, 91 / 12])
    moves = np.random.default_rng(0).normal(size=(3, 50)).tolist()
    robust = torch.tensor(explored(moves, scale="robust")[1], dtype=torch.float64)
    squares = torch.tensor(moves, dtype=torch.float64).square().mean(0)
    first, middle, third = squares.quantile(squares.new_tensor([0.25, 0.5, 0.75])).tolist()
    torch.testing.assert_close(robust, ((squares - middle) / (third - first)).clamp_min(0), rtol=1e-12, atol=0)
    permuted, plain = explored(moves, guide="permuted")[1], explored(moves)[1]
    assert permuted != plain
    assert permuted == [plain[i] for i in cohort_of(moves).rng("fedlex guidance").permutation(50)]
    assert sorted(permuted) == sorted(plain)
    assert (min(plain), max(plain)) == (0, 1)


def test_fedlex_takes_quartiles_of_any_size_and_draws_only_to_permute(monkeypatch):
    def refused(*_):
        raise RuntimeError("quantile() input tensor is too large")  # as torch does above 2^24 entries

    monkeypatch.setattr(torch.Tensor, "quantile", refused)
    monkeypatch.setattr(type(cohort_of([[1.0]])), "rng", refused)
    for count in range(1, 9):
        moves = np.random.default_rng(count).normal(size=(1, count))
        first, middle, third = np.quantile(moves[0] ** 2, [0.25, 0.5, 0.75])
        want = (moves[0] ** 2 - middle).clip(0) / (third - first) if count > 1 else [1.0]
        np.testing.assert_allclose(explored(moves.tolist(), scale="robust")[1], want, rtol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_fedlex_against_loops(tmp_path, engine, momentum):
    loop = start(tmp_path, FedLEx(), FedLExClient(), engine=engine, plan=SOME, momentum=momentum)
    got = models(loop, 4)
    w = first()
    np.testing.assert_array_equal(got[1], w)  # nothing of the exploration leaks
    squares = np.mean([(local_sgd(w, k, momentum=momentum) - w) ** 2 for k in SOME[1]], axis=0)
    guidance = np.concatenate([
        (part - part.min()) / (part.max() - part.min()) for part in (squares[: C * F], squares[C * F :])
    ])  # fmt: skip
    np.testing.assert_allclose(loop.strategy.state["guidance"].numpy(), guidance, **EXACT)
    for t in range(2, 5):
        rows = []
        for k in SOME[t]:
            v, velocity = w.copy(), 0.0
            for _ in range(STEPS):
                velocity = momentum * velocity + guidance * gradient(v, k)
                v = v - LR * velocity
            rows.append(v)
        w = average(rows, SOME[t])
        np.testing.assert_allclose(got[t], w, **EXACT)


def test_fedlex_around_another_rule_whose_memory_begins_in_the_second_round(tmp_path):
    inner = FedHyperG(kappa=0.1)
    loop = start(tmp_path, FedLEx(rule=inner, guide="mean", even=True), FedLExClient())
    plain = start(tmp_path, inner, CrossEntropy())
    np.testing.assert_allclose(models(loop, 4)[1:], models(plain, 3), **EXACT)  # G = 1


@pytest.mark.parametrize("inner", [FedNova(), DPFedAvg(max_norm=10.0, noise_multiplier=0.0)])
def test_fedlex_around_rules_that_a_run_binds(tmp_path, inner):
    loop = start(tmp_path, FedLEx(rule=inner), FedLExClient(), momentum=0.9)
    assert len(models(loop, 2)) == 3
    bound = loop.experiment.strategy.rule
    assert bound == (replace(inner, momentum=0.9) if isinstance(inner, FedNova) else inner)


def test_fedlex_refuses_clients_that_undo_it(tmp_path):
    with pytest.raises(UserError, match=r"client\.optimizer=adamw undoes"):
        start(tmp_path, FedLEx(), FedLExClient(), optimizer="adamw")


# --- SCAFFOLD ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_scaffold_against_algorithm_1(tmp_path, engine):
    loop = start(tmp_path, Scaffold(server_lr=0.8), ScaffoldClient(), engine=engine, plan=SOME)
    got = models(loop, 4)
    w, c, mine = first(), 0.0, [np.zeros(16) for _ in range(4)]
    for t in range(1, 5):
        moves, changes = [], []
        for k in SOME[t]:
            y = w.copy()
            for _ in range(STEPS):
                y = y - LR * (gradient(y, k) - mine[k] + c)
            new = mine[k] - c + (w - y) / (STEPS * LR)
            moves.append(y - w)
            changes.append(new - mine[k])
            mine[k] = new
        w = w + 0.8 * sum(moves) / len(moves)  # clients count alike
        c = c + sum(changes) / 4  # |S|/N times the mean over S
        np.testing.assert_allclose(got[t], w, **EXACT)
    np.testing.assert_allclose(loop.strategy.state["control"].numpy(), c, **EXACT)
    np.testing.assert_allclose(loop.task.store.arrays["control"].numpy(), mine, **EXACT)


def test_scaffolds_first_round_has_no_correction(tmp_path):
    # c = c_k = 0: FedAvg's clients; the server's mean is the plain one
    got = models(start(tmp_path, Scaffold(), ScaffoldClient()), 1)
    w = first()
    np.testing.assert_allclose(got[1], np.mean([local_sgd(w, k) for k in range(4)], axis=0), **EXACT)


def test_scaffolds_control_is_a_gradient_after_one_step(tmp_path):
    # one step of SGD: (w − y) / lr = g − c_k + c, so that c_k⁺ = g_k(w) whatever c and c_k were
    # of the round's own lr
    loop = start(tmp_path, Scaffold(), ScaffoldClient(), local_steps=1, lr_decay=0.5)
    seen = models(loop, 3)
    want = [gradient(seen[2], k) for k in range(4)]
    np.testing.assert_allclose(loop.task.store.arrays["control"].numpy(), want, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(loop.strategy.state["control"].numpy(), np.mean(want, axis=0), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", OPTIMIZERS)
def test_scaffolds_option_i_is_the_gradient_at_the_received_model(tmp_path, engine, training):
    # Whatever the optimiser and the batches, 5 + 4 or 3 + 3 + 1 samples: eq. 4's c_k⁺ is the mean over all samples.
    parts = {"batch_size": 5, "local_steps": None, "local_epochs": 2, **training}
    loop = start(tmp_path, Scaffold(server_lr=0.8), ScaffoldI(), engine=engine, plan=SOME, **parts)
    got = models(loop, 4)
    last = {k: t for t in range(1, 5) for k in SOME[t]}  # the round in which a client was seen last
    want = [gradient(got[last[k] - 1], k) for k in range(4)]
    np.testing.assert_allclose(loop.task.store.arrays["control"].numpy(), want, **EXACT)
    np.testing.assert_allclose(loop.strategy.state["control"].numpy(), np.mean(want, axis=0), **EXACT)


@pytest.mark.parametrize("engine", ENGINES)
def test_scaffolds_option_i_against_algorithm_1(tmp_path, engine):
    got = models(start(tmp_path, Scaffold(server_lr=0.8), ScaffoldI(), engine=engine, plan=SOME), 4)
    w, c, mine = first(), 0.0, [np.zeros(16) for _ in range(4)]
    for t in range(1, 5):
        moves, changes = [], []
        for k in SOME[t]:
            y = w.copy()
            for _ in range(STEPS):
                y = y - LR * (gradient(y, k) - mine[k] + c)
            moves.append(y - w)
            changes.append(gradient(w, k) - mine[k])
            mine[k] = gradient(w, k)
        w = w + 0.8 * sum(moves) / len(moves)
        c = c + sum(changes) / 4
        np.testing.assert_allclose(got[t], w, **EXACT)


def test_scaffolds_option_i_by_hand(tmp_path):
    # w = 0: p = ¼ each, so that c_k⁺ for the bias is ¼ less the share of each class among the client's samples
    model = Regression()
    with torch.no_grad():
        [p.zero_() for p in model.parameters()]
    loop = start(tmp_path, Scaffold(), ScaffoldI(), model=model)
    models(loop, 1)
    _, y, owner = samples()
    want = [[0.25 - np.mean(y[owner == k] == c) for c in range(C)] for k in range(4)]
    np.testing.assert_allclose(loop.task.store.arrays["control"].numpy()[:, C * F :], want, **EXACT)


@pytest.mark.parametrize(
    ("strategy", "client", "said"),
    [
        (Scaffold(), CrossEntropy(), "strategy: Scaffold .* choose both: strategy=scaffold client=scaffold"),
        (FedHyperG(rule=Scaffold()), CrossEntropy(), "strategy=scaffold client=scaffold"),
        (FedAvg(), ScaffoldClient(), "client: Scaffold .* strategy=scaffold client=scaffold"),
        (FedAvg(), FedDynClient(), "strategy=feddyn client=feddyn"),
        (FedDyn(), ScaffoldClient(), "choose both"),
        (FedLEx(), CrossEntropy(), "strategy=fedlex client=fedlex"),
        (QFedAvg(), CrossEntropy(), "strategy=qfedavg client=qfedavg"),
        (FedAvg(), QFedAvgClient(), "strategy=qfedavg client=qfedavg"),
    ],
)
def test_half_a_method_is_refused_before_anything_trains(tmp_path, strategy, client, said):
    with pytest.raises(UserError, match=said):
        start(tmp_path, strategy, client)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["strategy=ef21", "compressor=none"], "strategy=ef21 compressor=ef21"),
        (["compressor=ef21"], "compressor: EF21 .* strategy=ef21 compressor=ef21"),
        (
            ["strategy=ef21", "strategy.smoothness=[1.0]", "strategy.weighted=true"],
            "strategy: .* all 20 clients, got 1",
        ),
        (["strategy=fednova", "client=adamw"], "strategy: FedNova counts the steps of SGD"),
        (["strategy=fedbn", "model=mlp"], "strategy: FedBN needs a model with normalisation layers"),
        (["strategy=fedrep", "model=logreg"], "client: the phase moves parameters .* none does"),
    ],
)
def test_parts_that_do_not_fit_are_the_users_to_mend(overrides, said):
    with pytest.raises(UserError, match=said):
        build(compose([*overrides, "threads=1"]))


# --- FedNova ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_fednova_against_eq_6(tmp_path, engine, momentum):
    # batches of 3 in two epochs: 6, 6, 4, 2 steps; the order of batches is the engine's, so Δ_k is taken from it
    loop = start(tmp_path, FedNova(server_lr=0.9), CrossEntropy(), engine=engine, momentum=momentum,
                 batch_size=3, local_steps=None, local_epochs=2)  # fmt: skip
    plain = start(tmp_path, Rows(), CrossEntropy(), engine=engine, momentum=momentum,
                  batch_size=3, local_steps=None, local_epochs=2)  # fmt: skip
    models(plain, 1)
    rows, steps = plain.strategy.rule.seen
    assert steps.tolist() == [6, 6, 4, 2]
    lengths = []
    for tau in steps.tolist():  # a_k: how often each gradient enters the sum of velocities
        velocity, a = [0.0] * tau, [0.0] * tau
        for s in range(tau):
            velocity = [momentum * v for v in velocity]
            velocity[s] += 1
            a = [x + v for x, v in zip(a, velocity, strict=True)]
        lengths.append(sum(a))
    p = np.array(SIZES) / sum(SIZES)
    effective = sum(q * a for q, a in zip(p, lengths, strict=True))
    want = sum(q * r / a for q, r, a in zip(p, rows.numpy(), lengths, strict=True))
    np.testing.assert_allclose(models(loop, 1)[1] - first(), 0.9 * effective * want, **EXACT)


class Rows:
    """Keeps the rows that it sees."""

    def init(self, layout, num_clients):
        return {}

    def __call__(self, cohort, state):
        self.seen = cohort.rows.clone(), cohort.num_steps.clone()
        return cohort.rows.mean(0), state, {}


def test_fednova_with_equal_steps_is_fedavg(tmp_path):
    nova = models(start(tmp_path, FedNova(), CrossEntropy(), momentum=0.5), 3)
    np.testing.assert_allclose(nova, models(start(tmp_path, FedAvg(), CrossEntropy(), momentum=0.5), 3), **EXACT)


# --- FedDyn -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_feddyn_against_algorithm_1(tmp_path, engine):
    alpha = 0.3
    loop = start(tmp_path, FedDyn(), FedDynClient(proximal_mu=alpha), engine=engine, plan=SOME)
    got = models(loop, 4)
    w, h, mine = first(), np.zeros(16), [np.zeros(16) for _ in range(4)]
    for t in range(1, 5):
        ends = []
        for k in SOME[t]:
            theta = w.copy()
            for _ in range(STEPS):
                theta = theta - LR * (gradient(theta, k) - mine[k] + alpha * (theta - w))
            mine[k] = mine[k] - alpha * (theta - w)
            ends.append(theta)
        h = h - alpha / 4 * sum(theta - w for theta in ends)
        w = sum(ends) / len(ends) - h / alpha
        np.testing.assert_allclose(got[t], w, **EXACT)
    np.testing.assert_allclose(alpha * loop.strategy.state["drift"].numpy(), h, **EXACT)
    np.testing.assert_allclose(loop.task.store.arrays["gradient"].numpy(), mine, **EXACT)


def test_feddyn_finds_the_stationary_point_of_the_mean_loss(tmp_path):
    # what FedAvg's clients, running long, do not: the paper's point (its §2). lr is below 2 / curvature
    training = {"weight_decay": 0.05, "local_steps": 15, "lr": 0.2}
    training["plan"] = {t: [0, 1, 2, 3] for t in range(1, 17)}

    def rest(w):
        return np.linalg.norm(np.mean([gradient(w, k) + 0.05 * w for k in range(4)], axis=0))

    dyn = models(start(tmp_path, FedDyn(), FedDynClient(proximal_mu=0.3), **training), 16)
    avg = models(start(tmp_path, FedAvg(), CrossEntropy(), **training), 16)
    assert rest(dyn[-1]) < 0.15 * rest(avg[-1])


# --- MOON -------------------------------------------------------------------------------------------------------


def moon_loss(w, received, previous, x, y, mu, tau):
    def forward(v):
        body = v[: 5 * F].view(5, F), v[5 * F : 5 * F + 5]
        head = v[5 * F + 5 : 5 * F + 5 + C * 5].view(C, 5), v[5 * F + 5 + C * 5 :]
        z = torch.tanh(x @ body[0].T + body[1])
        return z, z @ head[0].T + head[1]

    def sim(a, b):
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))

    z, logits = forward(w)
    positive = torch.exp(sim(z, forward(received)[0].detach()) / tau)
    negative = torch.exp(sim(z, forward(previous)[0].detach()) / tau)
    picked = logits.log_softmax(1).gather(1, y[:, None])[:, 0]
    return (-picked - mu * torch.log(positive / (positive + negative))).mean()


@pytest.mark.parametrize("engine", ENGINES)
def test_moon_against_eq_3(tmp_path, engine):
    mu, tau = 1.5, 0.4
    net = initial(Net())
    loop = start(tmp_path, FedAvg(), Moon(contrastive_mu=mu, temperature=tau), engine=engine, plan=SOME, model=net)
    got = models(loop, 4)
    x, y, owner = samples()
    w, last = torch.as_tensor(first(net)), {}
    for t in range(1, 5):
        ends = []
        for k in SOME[t]:
            mine = torch.as_tensor(x[owner == k]), torch.as_tensor(y[owner == k])
            v, previous = w.clone(), last.get(k, w)
            for _ in range(STEPS):
                v = v - LR * torch.func.grad(moon_loss)(v, w, previous, *mine, mu, tau)
            last[k] = v
            ends.append(v.numpy())
        w = torch.as_tensor(average(ends, SOME[t]))
        np.testing.assert_allclose(got[t], w.numpy(), **EXACT)


def test_moon_without_contrast_is_fedavg(tmp_path):
    net = initial(Net())
    moon = models(start(tmp_path, FedAvg(), Moon(contrastive_mu=0), model=net), 3)
    np.testing.assert_array_equal(moon, models(start(tmp_path, FedAvg(), CrossEntropy(), model=net), 3))


# --- FedHyper ---------------------------------------------------------------------------------------------------


def hyper_cl(w, k, previous, num_participants, *, weight, bounds, form, kappa):
    """One client's round of eq. 20 (additive), or of the released code's update.py (multiplicative)."""
    v, m, path = w.copy(), 1.0, []
    last_g, h_last = None, previous
    for step in range(STEPS):
        g = gradient(v, k)
        if form == "additive" and step:
            m = m + kappa * (g @ last_g - weight / num_participants * (g @ previous))
            m = min(max(m, bounds[0]), bounds[1])
        new = v - LR * m * g
        if form == "multiplicative" and step:  # not after the first batch
            h = new - v
            x, y = weight * (h @ previous) / num_participants, h @ h_last
            m = min(max(min(1.1, 1 + kappa * (x + y)) * m, bounds[0]), bounds[1])
            h_last = h
        v, last_g = new, g
        path.append(m)
    return v, path[-1] if form == "additive" else path[-2]  # the factor of the last step


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("preset", "kappa"), [("paper", 1.0), ("paper", 0.05), ("reference", 1.0), ("reference", 4.0)])
def test_fedhyper_cl_against_loops(tmp_path, engine, preset, kappa):
    loop = start(tmp_path, FedHyperCL(), FedHyperClient(preset=preset, kappa=kappa), engine=engine, plan=SOME)
    got = models(loop, 4)
    w, previous, participants = first(), np.zeros(16), 1
    form, weight = ("additive", 1.0) if preset == "paper" else ("multiplicative", 0.1)
    for t in range(1, 5):
        rounds = [hyper_cl(w, k, previous, participants, weight=weight, bounds=(0.1, 10), form=form, kappa=kappa)
                  for k in SOME[t]]  # fmt: skip
        new = average([v for v, _ in rounds], SOME[t])
        previous, participants, w = new - w, len(SOME[t]), new
        np.testing.assert_allclose(got[t], w, **EXACT)
    scales = loop.backend.cohort.extras["lr_scale"].numpy()  # of the last round
    np.testing.assert_allclose(scales, [m for _, m in rounds], **EXACT)
    assert any(m != 1 for m in scales)  # or the test would see nothing
    assert float(loop.strategy.metrics["lr_scale_mean"]) == pytest.approx(scales.mean(), rel=1e-12)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(
    "rule",
    [FedHyperG(kappa=0), FedHyperSL(kappa=0), FedHyperCL(), FedHyperG(rule=FedHyperCL(), kappa=0)],
    ids=["g", "sl", "cl", "g_cl"],
)
def test_kappa_0_is_fedavg_to_the_bit(tmp_path, engine, rule):
    client = FedHyperClient(kappa=0) if "CL" in repr(rule) else CrossEntropy()
    # momentum and decay would show a factor put in the wrong place
    training = {"momentum": 0.5, "weight_decay": 0.01}
    hyper = models(start(tmp_path, rule, client, engine=engine, **training), 3)
    # the client that changes nothing takes the same path through the engine, so that bits can be equal
    plain = FedHyperClient(kappa=0) if "CL" in repr(rule) else CrossEntropy()
    np.testing.assert_array_equal(hyper, models(start(tmp_path, FedAvg(), plain, engine=engine, **training), 3))
    if engine == "sequential":
        np.testing.assert_array_equal(hyper, models(start(tmp_path, FedAvg(), CrossEntropy(), **training), 3))


@pytest.mark.parametrize("engine", ["sequential", "captured", "fused", "generic"])
def test_fedhyper_g_around_cl_is_both(tmp_path, engine):
    kind = ("sequential", ()) if engine == "sequential" else ("vectorized", (f"engine.kernels={engine}",))
    loop = start(tmp_path, FedHyperG(rule=FedHyperCL(), kappa=0.5), FedHyperClient(), engine=kind[0], extra=kind[1])
    got = models(loop, 3)
    w, previous, participants, alpha = first(), np.zeros(16), 1, 1.0
    for t in range(1, 4):
        ends = [hyper_cl(w, k, previous, participants, weight=1.0, bounds=(0.1, 10), form="additive", kappa=1.0)[0]
                for k in range(4)]  # fmt: skip
        delta = average(ends, range(4)) - w
        alpha = min(max(alpha + 0.5 * (delta @ previous), 1 / 3), 3)
        w, previous, participants = w + alpha * delta, delta, 4
        np.testing.assert_allclose(got[t], w, **EXACT)


def test_fedhypers_rates_go_on_where_a_run_was_cut_off(tmp_path):
    rule, client = FedHyperSL(rule=FedHyperG(rule=FedHyperCL())), FedHyperClient()
    whole, cut, resumed = (start(tmp_path, rule, client, plan=SOME, lr=0.1) for _ in range(3))
    models(whole, 4)
    models(cut, 2)
    cut.save()
    shutil.copytree(cut.folder, resumed.folder, dirs_exist_ok=True)
    resumed.load()
    inner = resumed.strategy.state["rule"]
    assert float(resumed.strategy.state["rate"]) != 1 != float(inner["rate"])
    assert inner["rule"]["num_participants"] == len(SOME[2])
    for t in (3, 4):
        resumed.step(t)
    assert torch.equal(resumed.weights, whole.weights)
    assert float(resumed.strategy.state["rate"]) == float(whole.strategy.state["rate"])


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", OPTIMIZERS, ids=["sgd", "momentum", "adamw"])
def test_fedhyper_sl_is_another_lr(tmp_path, engine, training):
    # bounds that leave no choice: from round 2 on clients train at exactly 3 lr
    rule = FedHyperSL(kappa=1e9, min_rate=1.0, max_rate=3.0)
    loop = start(tmp_path, rule, CrossEntropy(), engine=engine, **training)
    got = models(loop, 2)
    assert float(loop.strategy.state["rate"]) in (1.0, 3.0)
    h = float(loop.strategy.metrics["hypergradient"])
    assert h != 0
    assert float(loop.strategy.metrics["lr_scale"]) == 1  # of round 2: h of round 1 is 0
    loop.step(3)
    rate = 3.0 if h > 0 else 1.0
    assert float(loop.strategy.metrics["lr_scale"]) == rate
    assert h > 0, "choose data on which consecutive updates agree"
    other = start(tmp_path, FedAvg(), CrossEntropy(), engine=engine, **{**training, "lr": 3 * training.get("lr", LR)})
    other.weights = torch.as_tensor(got[2].copy())
    other.step(3)
    np.testing.assert_allclose(loop.weights.numpy(), other.weights.numpy(), **EXACT)


class Constant(CrossEntropy):
    """A client whose every step takes 0.25 lr."""

    def direction(self, grads, params, context):
        return grads, {"lr_scale": next(iter(grads.values())).new_full((), 0.25)}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("training", OPTIMIZERS, ids=["sgd", "momentum", "adamw"])
def test_a_factor_on_each_step_is_another_lr(tmp_path, engine, training):
    scaled = models(start(tmp_path, FedAvg(), Constant(), engine=engine, **training), 2)
    other = models(
        start(tmp_path, FedAvg(), CrossEntropy(), engine=engine, **{**training, "lr": training.get("lr", LR) / 4}), 2
    )
    np.testing.assert_allclose(scaled, other, **EXACT)


@pytest.mark.parametrize("engine", ENGINES)
def test_fedhyper_cl_wraps_any_objective(tmp_path, engine):
    # kappa = 0 around margin is margin; around SCAFFOLD's client, with its state and uploads, SCAFFOLD
    margin = Margin(margin_lambda=0.3)
    got = models(start(tmp_path, FedHyperCL(), FedHyperClient(objective=margin, kappa=0), engine=engine), 2)
    np.testing.assert_allclose(got, models(start(tmp_path, FedAvg(), margin, engine=engine), 2), **EXACT)
    # and where the objective has a factor of its own on the rate: the last passes of these go nowhere
    for rule, inner in ((Scaffold(), ScaffoldClient()), (Scaffold(), ScaffoldI()), (QFedAvg(), QFedAvgClient())):
        inside = FedHyperClient(objective=inner, kappa=0)
        got = models(start(tmp_path, FedHyperCL(rule=rule), inside, engine=engine, plan=SOME), 4)
        plain = models(start(tmp_path, rule, inner, engine=engine, plan=SOME), 4)
        np.testing.assert_allclose(got, plain, **EXACT)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("preset", ["paper", "reference"])
def test_fedhypers_factor_multiplies_the_objectives_own(tmp_path, engine, preset):
    # a quarter of the rate by the objective is a quarter of the rate: m is the same either way
    client = FedHyperClient(objective=Constant(), preset=preset)
    got = models(start(tmp_path, FedHyperCL(), client, engine=engine, plan=SOME), 4)
    plain = start(tmp_path, FedHyperCL(), FedHyperClient(preset=preset), engine=engine, plan=SOME, lr=LR / 4)
    np.testing.assert_allclose(got, models(plain, 4), **EXACT)
    assert any(plain.backend.cohort.extras["lr_scale"] != 1)


def test_fedhyper_g_wraps_rules_with_wishes(tmp_path):
    # FedNova asks for the clients' training, and must get it through the wrapper
    loop = start(tmp_path, FedHyperG(rule=FedNova(), kappa=0), CrossEntropy(), momentum=0.5)
    assert loop.strategy.rule.rule.momentum == 0.5
    np.testing.assert_allclose(models(loop, 2), models(start(tmp_path, FedNova(), CrossEntropy(), momentum=0.5), 2))


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Scaffold, {"server_lr": 0.0}, "Scaffold needs server_lr > 0"),
        (FedNova, {"server_lr": -1.0}, "FedNova needs server_lr > 0"),
        (FedNova, {"momentum": 1.0}, "FedNova needs 0 <= momentum < 1"),
        (FedDynClient, {"proximal_mu": 0.0}, "FedDyn needs a finite proximal_mu > 0"),
        (Moon, {"contrastive_mu": -1.0}, "Moon needs a finite contrastive_mu"),
        (Moon, {"temperature": 0.0}, "Moon needs a finite temperature"),
        (FedHyperClient, {"kappa": -1.0}, "FedHyper needs a finite kappa"),
        (FedHyperClient, {"preset": "code"}, "preset is one of paper, reference"),
        (FedHyperClient, {"recurrence": "other"}, "recurrence is one of"),
        (FedHyperClient, {"min_rate": 2.0}, "min_rate <= 1 <= max_rate"),
    ],
)
def test_arguments_out_of_range_are_named(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)
