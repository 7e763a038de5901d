"""Methods that stretch the contracts, sketched on them and run for two tiny rounds.

Each sketch is checked against what its paper says must hold, written another way. The driver below is the
contract's meaning in the plainest form: clients one after another, full batches, no engine.
"""

import re
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Batch, Cohort, Context, LinearRule, Phase, Streamed, Sums
from fedsim.layout import Layout
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedopt import FedAdam

LR, STEPS = 0.5, 3
GRID = [(k, None) for k in range(4)]


class TwoLayers:
    """logits = head tanh(body x)."""

    def __call__(self, params, x):
        return self.head(params, self.features(params, x))

    def features(self, params, x):
        return torch.tanh(x @ params["body"].T)

    def head(self, params, h):
        return h @ params["head"].T


def problem(num_clients=4, samples=12, seed=0):
    rng = np.random.default_rng(seed)
    params = {"body": torch.as_tensor(rng.normal(size=(5, 3))), "head": torch.as_tensor(rng.normal(size=(2, 5)))}
    x = torch.as_tensor(rng.normal(size=(num_clients, samples, 3)))
    y = torch.as_tensor(rng.integers(0, 2, (num_clients, samples)))
    clients = [{None: Batch(x[k, k:], y[k, k:])} for k in range(num_clients)]  # sizes 12, 11, 10, 9
    return params, clients


def loss_of(objective, params, batch, context):
    if hasattr(objective, "loss"):
        return objective.loss(TwoLayers(), params, batch, context)[0]
    n = len(batch.y)
    return objective.criterion(TwoLayers()(params, batch.x), batch.y, torch.full((n,), 1 / n, dtype=torch.float64))


def train(objective, params, received, views, context):
    """Run one client's phases; return its parameters and the last step's context."""
    phases = objective.phases() if hasattr(objective, "phases") else (Phase(),)
    for number, phase in enumerate(phases):
        steps = phase.local_steps or STEPS
        context = replace(context, phase=number, step_state={}, num_steps=steps)
        moving = [name for name in params if re.search(phase.params or "", name)]
        for step in range(steps):
            context = replace(context, step=step)
            leaves = {name: value.clone().requires_grad_() for name, value in params.items()}
            loss = loss_of(objective, leaves, views[phase.view], context)
            grads = dict(zip(moving, torch.autograd.grad(loss, [leaves[name] for name in moving]), strict=True))
            if hasattr(objective, "direction"):
                grads, step_state = objective.direction(grads, params, context)
                context = replace(context, step_state=step_state)
            params = {name: value - LR * grads[name] if name in grads else value for name, value in params.items()}
    return params, context


def simulate(rule, objective, params, clients, rounds=2, local="$^", plan=lambda t: GRID, stream=False):
    """Return the models [(D,)] of all versions, the clients' personal parameters and states, the rule's state.

    plan(t) -> [(client, version it starts from, None: the newest)], ascending in client.
    """
    shared = Layout.of({name: value for name, value in params.items() if not re.search(local, name)})
    own = {k: {n: v for n, v in params.items() if n not in shared.names} for k in range(len(clients))}
    init = getattr(objective, "init_client", lambda layout: {})
    states = {k: init(shared) for k in range(len(clients))}
    state = rule.init(shared, len(clients))
    versions = [shared.join(params)]
    broadcasts = []
    for t in range(1, rounds + 1):
        broadcasts.append(rule.broadcast(state) if hasattr(rule, "broadcast") else {})
        rows, extras, weights = [], [], []
        jobs = [(k, t - 1 if version is None else version) for k, version in plan(t)]
        for k, version in jobs:
            received = shared.split(versions[version])
            context = Context(
                received=received, broadcast=broadcasts[version], client_state=states[k], step_state={}, step=0,
                num_steps=STEPS, lr=LR, num_samples=len(clients[k][None].y), key=torch.tensor(0), layout=shared,
            )  # fmt: skip
            trained, context = train(objective, {**received, **own[k]}, received, clients[k], context)
            own[k] = {name: trained[name] for name in own[k]}
            upload, weight = {}, None
            if hasattr(objective, "finish"):
                states[k], upload, weight = objective.finish(trained, context)
            rows.append(shared.join(trained) - versions[version])
            extras.append(upload)
            weights.append(float(len(clients[k][None].y) if weight is None else weight))
        received_ids = torch.tensor([version for _, version in jobs])
        cohort = Cohort(
            updates=torch.stack(rows), weights=torch.tensor(weights, dtype=torch.float64),
            clients=torch.tensor([k for k, _ in jobs]), num_steps=torch.full((len(jobs),), STEPS),
            staleness=t - 1 - received_ids, received=received_ids, models=dict(enumerate(versions)), round=t,
            layout=shared, extras={name: torch.stack([e[name] for e in extras]) for name in extras[0]},
        )  # fmt: skip
        delta, state, _ = rule(_streamed(rule, cohort, state) if stream else cohort, state)
        versions.append(versions[-1] + delta)
    return versions, own, states, state


def _streamed(rule, cohort, state):
    """Sum rows as they come: what is left of them is a mean, norms and coefficients."""
    blind = replace(cohort, updates=None)
    total, c = torch.zeros(cohort.layout.size, dtype=torch.float64), rule.coefficients(blind, state)
    for k, row in enumerate(cohort.rows):
        total += c[k] * row
    return replace(blind, streamed=Streamed(total / c.sum(), Sums(blind, c, cohort.rows.square().sum(1), {})))


def gradient(params, batch, layout):
    """Full-batch gradient (D,) of the cross-entropy at flat shared parameters (D,)."""
    return torch.func.grad(lambda w: loss_of(CrossEntropy(), layout.split(w), batch, None))(params)


# --- SCAFFOLD (Karimireddy et al., ICML 2020, Algorithm 1, option II) ------------------------------------------


@dataclass(frozen=True)
class Scaffold(LinearRule):
    reduced_extras = ("control_change",)

    def init(self, layout, num_clients):
        return {"control": torch.zeros(layout.size, dtype=torch.float64), "num_clients": num_clients}

    def broadcast(self, state):
        return {"control": state["control"]}

    def coefficients(self, cohort, state):
        return torch.ones_like(cohort.weights)

    def finish(self, mean, sums, state):
        share = len(sums.cohort) / state["num_clients"]
        return mean, {**state, "control": state["control"] + share * sums.extras["control_change"]}, {}


@dataclass(frozen=True)
class ScaffoldClient(CrossEntropy):
    def init_client(self, layout):
        return {"control": torch.zeros(layout.size, dtype=torch.float64)}

    def direction(self, grads, params, context):
        drift = context.layout.split(context.broadcast["control"] - context.client_state["control"])
        return {name: grad + drift[name] for name, grad in grads.items()}, {}

    def finish(self, params, context):
        moved = context.layout.join(context.received) - context.layout.join(params)
        mine = context.client_state["control"]
        new = mine - context.broadcast["control"] + moved / (context.num_steps * context.lr)
        return {"control": new}, {"control_change": new - mine}, None


def test_scaffold():
    params, clients = problem()
    versions, _, states, state = simulate(Scaffold(), ScaffoldClient(), params, clients, plan=lambda t: GRID[t - 1 :])
    layout = Layout.of(params)
    w, c, c_k = versions[0], torch.zeros(layout.size), [torch.zeros(layout.size)] * 4
    for t in (1, 2):
        ends, changes = [], []
        for k in range(t - 1, 4):  # client 0 rests in round 2
            y = w
            for _ in range(STEPS):
                y = y - LR * (gradient(y, clients[k][None], layout) - c_k[k] + c)
            ends.append(y)
            new = c_k[k] - c + (w - y) / (STEPS * LR)
            changes.append(new - c_k[k])
            c_k[k] = new
        w, c = sum(ends) / len(ends), c + sum(changes) / 4
        torch.testing.assert_close(versions[t], w, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state["control"], sum(c_k) / 4, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(states[2]["control"], c_k[2], rtol=1e-12, atol=1e-12)


# --- FedHyper-CL (Wang et al., ICLR 2024): a client's rate follows the products of consecutive gradients -------


@dataclass(frozen=True)
class Remembers(LinearRule):
    """FedAvg that sends its last step along."""

    def init(self, layout, num_clients):
        return {"previous": torch.zeros(layout.size, dtype=torch.float64)}

    def broadcast(self, state):
        return state

    def finish(self, mean, sums, state):
        return mean, {"previous": mean}, {}


@dataclass(frozen=True)
class HyperClient(CrossEntropy):
    num_participants: int = 4
    bound: float = 10.0

    def direction(self, grads, params, context):
        g = context.layout.join(grads)
        multiplier = context.step_state.get("multiplier", torch.ones((), dtype=g.dtype))
        if context.step:
            towards = -(g @ context.broadcast["previous"]) / self.num_participants
            multiplier = (multiplier + g @ context.step_state["gradient"] + towards).clamp(1 / self.bound, self.bound)
        return context.layout.split(multiplier * g), {"gradient": g, "multiplier": multiplier}


def test_fedhyper_cl():
    params, clients = problem()
    versions, *_ = simulate(Remembers(), HyperClient(), params, clients)
    layout = Layout.of(params)
    w, previous = versions[0], torch.zeros(layout.size, dtype=torch.float64)
    n = torch.tensor([12.0, 11, 10, 9], dtype=torch.float64)
    for t in (1, 2):
        ends = []
        for k in range(4):
            y, m, last = w, 1.0, None
            for step in range(STEPS):
                g = gradient(y, clients[k][None], layout)
                if step:
                    m = min(max(m + float(g @ last) - float(g @ previous) / 4, 0.1), 10)
                y, last = y - LR * m * g, g
            ends.append(y - w)
        previous = (n[:, None] * torch.stack(ends)).sum(0) / n.sum()
        w = w + previous
        torch.testing.assert_close(versions[t], w, rtol=1e-12, atol=1e-12)


# --- FedRep (Collins et al., ICML 2021): the head alone, then the body alone; heads stay at home ---------------


@dataclass(frozen=True)
class FedRepClient(CrossEntropy):
    def phases(self):
        return Phase(local_steps=5, params="^head"), Phase(local_steps=2, params="^body")


def test_fedrep():
    params, clients = problem()
    versions, own, *_ = simulate(FedAvg(), FedRepClient(), params, clients, local="^head")
    assert versions[0].shape == (15,)  # the head does not travel
    body, heads = params["body"], [params["head"]] * 4
    n = torch.tensor([12.0, 11, 10, 9], dtype=torch.float64)
    for _ in range(2):
        bodies = []
        for k, views in enumerate(clients):
            x, y = views[None]
            b = body
            for _ in range(5):
                grad = torch.func.grad(lambda h, b=b, x=x, y=y: functional.cross_entropy(torch.tanh(x @ b.T) @ h.T, y))
                heads[k] = heads[k] - LR * grad(heads[k])
            for _ in range(2):
                h = heads[k]
                grad = torch.func.grad(lambda b, h=h, x=x, y=y: functional.cross_entropy(torch.tanh(x @ b.T) @ h.T, y))
                b = b - LR * grad(b)
            bodies.append(b)
        body = torch.einsum("k,kij->ij", n / n.sum(), torch.stack(bodies))
    torch.testing.assert_close(versions[2], body.flatten(), rtol=1e-11, atol=1e-12)
    for k in range(4):
        torch.testing.assert_close(own[k]["head"], heads[k], rtol=1e-11, atol=1e-12)
    assert not torch.equal(own[0]["head"], own[1]["head"])


# --- FedLabel (Cho et al., ICCV 2023): labelled samples, then pseudo-labels by the more expert of two models ---


@dataclass(frozen=True)
class FedLabelClient:
    """Both stages start at w and their steps add up.

    Stage 2 moves p = w_L + (w_U − w), so that p begins where stage 1 ended and ends at w + Δ_L + Δ_U; its
    student is p − (w_L − w). At step 0 the parameters are the local teacher w_L, which `direction` remembers.
    """

    threshold: float = 0.6

    def phases(self):
        return Phase(view="labelled"), Phase(view="unlabelled")

    def loss(self, model, params, batch, context):
        if context.phase == 0:
            return functional.cross_entropy(model(params, batch.x), batch.y), {}
        start = context.received
        local = {n: p.detach() for n, p in (context.step_state or params).items()}
        logits = torch.stack([model(start, batch.x), model(local, batch.x)])  # (2, B, C)
        chosen = logits.var(-1).argmax(0)  # (B,) 1 where the local model is the more expert
        expert = logits.gather(0, chosen[None, :, None].expand(1, -1, logits.shape[-1]))[0]  # (B, C)
        confidence, label = expert.softmax(-1).max(-1)
        accepted = (confidence > self.threshold).to(confidence)  # (B,)
        student = {n: p - local[n] + start[n] for n, p in params.items()}
        losses = functional.cross_entropy(model(student, batch.x), label, reduction="none")
        return (accepted * losses).sum() / accepted.sum().clamp_min(1), {"accepted": accepted.sum()}

    def direction(self, grads, params, context):
        return grads, (dict(context.step_state or params) if context.phase else {})


@pytest.mark.parametrize("threshold", [0.6, 1.0])
def test_fedlabel(threshold):
    params, clients = problem()
    for views in clients:
        x, y = views[None]
        views.update(labelled=Batch(x[:4], y[:4]), unlabelled=Batch(x[4:], y[4:]))
    versions, *_ = simulate(FedAvg(), FedLabelClient(threshold), params, clients, rounds=1)
    model, rows = TwoLayers(), []
    for views in clients:
        local = params
        for _ in range(STEPS):
            x, y = views["labelled"]
            grads = torch.func.grad(lambda p, x=x, y=y: functional.cross_entropy(model(p, x), y))(local)
            local = {n: local[n] - LR * grads[n] for n in local}
        x, _ = views["unlabelled"]
        pairs = zip(model(params, x), model(local, x), strict=True)
        experts = torch.stack([g if g.var() >= z.var() else z for g, z in pairs])
        confidence, label = experts.softmax(-1).max(-1)
        keep, student = confidence > threshold, params
        for _ in range(STEPS if keep.any() else 0):
            x_u, y_u = x[keep], label[keep]
            grads = torch.func.grad(lambda p, x=x_u, y=y_u: functional.cross_entropy(model(p, x), y))(student)
            student = {n: student[n] - LR * grads[n] for n in student}
        rows.append(torch.cat([(local[n] + student[n] - 2 * params[n]).flatten() for n in params]))
        assert keep.any() == (threshold < 1)
    n = torch.tensor([12.0, 11, 10, 9], dtype=torch.float64)
    want = (n[:, None] * torch.stack(rows)).sum(0) / n.sum()
    torch.testing.assert_close(versions[1] - versions[0], want, rtol=1e-10, atol=1e-12)


# --- FedAdam without rows: the server sees a mean and norms ----------------------------------------------------


def test_streamed_fedadam():
    params, clients = problem()
    rule = FedAdam(server_lr=0.1, tau=0.1)
    held, *_, state = simulate(rule, CrossEntropy(), params, clients)
    streamed, *_, other = simulate(rule, CrossEntropy(), params, clients, stream=True)
    torch.testing.assert_close(streamed[2], held[2], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(other["square"], state["square"], rtol=1e-12, atol=1e-14)


# --- DC-ASGD (Zheng et al., ICML 2017, eq. 10): stale updates corrected from the version they started at -------


@dataclass(frozen=True)
class DelayCompensated:
    lam: float = 4.0

    def init(self, layout, num_clients):
        return {}

    def __call__(self, cohort, state):
        now = cohort.models[cohort.round - 1]  # (D,)
        base = torch.stack([cohort.models[int(version)] for version in cohort.received])  # (K, D)
        rows = cohort.rows - self.lam * cohort.rows.square() * (now - base)  # (K, D)
        return rows.mean(0), state, {"staleness": cohort.staleness}


def test_dc_asgd_from_stored_versions():
    params, clients = problem()
    plan = {1: [(0, None), (1, None)], 2: [(0, None), (2, 0)]}  # client 2's update is one round late
    versions, *_ = simulate(DelayCompensated(), CrossEntropy(), params, clients, plan=plan.get)
    layout = Layout.of(params)
    deltas = []
    for k, base in ((0, versions[1]), (2, versions[0])):
        y = base
        for _ in range(STEPS):
            y = y - LR * gradient(y, clients[k][None], layout)
        deltas.append(y - base)
    deltas[1] = deltas[1] - 4 * deltas[1] ** 2 * (versions[1] - versions[0])
    torch.testing.assert_close(versions[2] - versions[1], sum(deltas) / 2, rtol=1e-11, atol=1e-12)


# --- EF21 (Richtárik et al., NeurIPS 2021) on local updates: g_k ← g_k + TopK(Δ_k − g_k), the server sums ------


@dataclass(frozen=True)
class ErrorFeedback(LinearRule):
    reduced_extras = ("message",)

    def init(self, layout, num_clients):
        return {"sum": torch.zeros(layout.size, dtype=torch.float64), "num_clients": num_clients}

    def finish(self, mean, sums, state):
        change = sums.extras["message"] * (len(sums.cohort) / state["num_clients"])
        return state["sum"] + change, {**state, "sum": state["sum"] + change}, {}


@dataclass(frozen=True)
class TopKClient(CrossEntropy):
    count: int = 3

    def init_client(self, layout):
        return {"estimate": torch.zeros(layout.size, dtype=torch.float64)}

    def finish(self, params, context):
        estimate = context.client_state["estimate"]
        gap = context.layout.join(params) - context.layout.join(context.received) - estimate
        kept = gap.abs().topk(self.count).indices
        message = torch.zeros_like(gap).scatter(0, kept, gap[kept])
        return {"estimate": estimate + message}, {"message": message}, None


def test_ef21_keeps_server_and_clients_in_step():
    params, clients = problem()
    plan = {1: GRID, 2: GRID[1:]}  # client 0 rests: its estimate stays on both sides
    versions, _, states, state = simulate(ErrorFeedback(), TopKClient(), params, clients, plan=plan.get)
    estimates = torch.stack([states[k]["estimate"] for k in range(4)])
    torch.testing.assert_close(state["sum"], estimates.mean(0), rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(versions[2] - versions[1], estimates.mean(0), rtol=1e-12, atol=1e-14)
    assert int((estimates[0] != 0).sum()) == 3
    dense, *_ = simulate(ErrorFeedback(), TopKClient(count=25), params, clients, rounds=2)
    plain, *_ = simulate(FedAvg(), UniformClient(), params, clients, rounds=2)
    torch.testing.assert_close(dense[2], plain[2], rtol=1e-12, atol=1e-13)  # nothing is lost: EF21 is FedAvg


@dataclass(frozen=True)
class UniformClient(CrossEntropy):
    def finish(self, params, context):
        return {}, {}, 1.0
