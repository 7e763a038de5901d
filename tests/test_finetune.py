"""Evaluation after local steps: against plain gradient descent, and without a trace in the run."""

import copy

import numpy as np
import pytest
import torch
from torch.nn import functional

from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Partition
from fedsim.data.splits import ClientSplits
from fedsim.finetune import adaptation_splits
from fedsim.loop import Loop

SMALL = ["num_rounds=2", "dtype=float64", "threads=1", "engine=sequential", "client.batch_size=null",
         "partition.num_clients=6", "partition.held_out_clients=0.34", "partition.local_test=0.3",
         "metrics.clients_every=1"]  # fmt: skip


def run(folder, *overrides):
    folder.mkdir()
    loop = Loop(build(compose([*SMALL, *overrides])), folder, Observer())
    rows = []
    for t in (1, 2):
        loop.step(t)
        loop.rounds.sync()
    rows = loop.rounds.read(folder / "rounds.jsonl")
    loop.rounds.close()
    loop.times.close()
    return loop, rows


def module_of(loop, weights, client):
    """Return the run's model with weights (D,) and the head that a client keeps."""
    module = copy.deepcopy(loop.task.module)
    own = dict(module.named_parameters())
    kept = loop.task.store.get(np.array([client]), torch.device("cpu"))
    with torch.no_grad():
        for name, value in loop.task.shared.split(weights).items():
            own[name].copy_(value)
        for name in loop.task.local.names:
            own[name].copy_(kept[f"local/{name}"][0])
    return module


@pytest.mark.parametrize(("strategy", "model"), [("fedavg", "logreg"), ("fedper", "mlp")])
def test_accuracy_after_steps_of_gradient_descent(tmp_path, strategy, model):
    loop, rows = run(tmp_path / "run", "metrics.finetune_steps=4", f"strategy={strategy}", f"model={model}")
    tuner = loop.evaluator.tuner
    adapt, test = adaptation_splits(loop.experiment.splits, 0)
    want = []
    for client in tuner.clients.tolist():
        module = module_of(loop, loop.weights, client)
        x, y = loop.task.x[adapt.of(client)], loop.task.y[adapt.of(client)]
        # personal parameters alone where there are any
        params = [p for n, p in module.named_parameters() if n in loop.task.local.names or not loop.task.local.size]
        for _ in range(4):
            grads = torch.autograd.grad(functional.cross_entropy(module(x), y), params)
            with torch.no_grad():
                for p, g in zip(params, grads, strict=True):
                    p -= 0.3 * g
        logits = module(loop.task.x[test.of(client)])
        want.append((logits.argmax(1) == loop.task.y[test.of(client)]).double().mean().item())
    got, sizes = tuner.accuracies(loop.weights, loop.backend.buffers, 1)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    out = loop.experiment.splits.held_out[tuner.clients]
    assert 0 < out.sum() < len(out)
    row = rows[-1]
    assert row["client_finetuned_accuracy_mean"] == pytest.approx(np.mean(np.array(want)[~out]), rel=1e-12)
    assert row["held_out_finetuned_accuracy_mean"] == pytest.approx(np.mean(np.array(want)[out]), rel=1e-12)
    assert sizes.tolist() == test.sizes[tuner.clients].tolist()


def test_who_never_trained_with_ditto_has_the_global_model_and_adapts_that(tmp_path):
    words = ("metrics.finetune_steps=4", "model=logreg", "sampler=cyclic", "fraction=0.5")
    loop, rows = run(tmp_path / "ditto", *words, "strategy=ditto", "client.ditto_lambda=0")
    plain, others = run(tmp_path / "fedavg", *words, "strategy=fedavg")
    np.testing.assert_allclose(loop.weights.numpy(), plain.weights.numpy(), rtol=1e-12)
    for name in ("held_out_accuracy_mean", "held_out_finetuned_accuracy_mean"):
        assert rows[-1][name] == pytest.approx(others[-1][name], rel=1e-12)
    assert rows[-1]["client_accuracy_mean"] != others[-1]["client_accuracy_mean"]  # who trained has a model of its own


def test_ditto_adapts_with_its_pull(tmp_path):
    """v ← v − lr (∇L(v) + λ (v − w)), from v = w where a client was held out, from its own v where it trained."""
    words = ("metrics.finetune_steps=6", "model=logreg", "fraction=0.5")
    loop, _ = run(tmp_path / "ditto", *words, "strategy=ditto", "client.ditto_lambda=2.5")
    tuner, task = loop.evaluator.tuner, loop.task
    adapt, test = adaptation_splits(loop.experiment.splits, 0)
    w = task.shared.split(loop.weights)
    want, free = [], []
    for client in tuner.clients.tolist():
        for pull, found in ((2.5, want), (0.0, free)):
            module = copy.deepcopy(task.module).personal
            kept = task.store.get(np.array([client]), torch.device("cpu"))
            v = dict(module.named_parameters())
            with torch.no_grad():
                for name, p in v.items():
                    own = kept[f"local/personal.{name}"][0]
                    p.copy_(own if task.store.touched[client] else w[f"shared.{name}"])
            x, y = task.x[adapt.of(client)], task.y[adapt.of(client)]
            for _ in range(6):
                grads = torch.autograd.grad(functional.cross_entropy(module(x), y), list(v.values()))
                with torch.no_grad():
                    for (name, p), g in zip(v.items(), grads, strict=True):
                        p -= 0.3 * (g + pull * (p - w[f"shared.{name}"]))
            logits = module(task.x[test.of(client)])
            found.append((logits.argmax(1) == task.y[test.of(client)]).double().mean().item())
    got, _ = tuner.accuracies(loop.weights, loop.backend.buffers, 1)
    np.testing.assert_allclose(got.numpy(), want, rtol=1e-12)
    out = loop.experiment.splits.held_out[tuner.clients]
    assert all(np.any(np.array(want)[group] != np.array(free)[group]) for group in (out, ~out))  # it can be seen


def test_it_leaves_no_trace(tmp_path):
    tuned, rows = run(tmp_path / "tuned", "metrics.finetune_steps=3", "strategy=fedper", "model=mlp")
    plain, other = run(tmp_path / "plain", "strategy=fedper", "model=mlp")
    assert torch.equal(tuned.weights, plain.weights)
    for name, value in plain.task.store.arrays.items():
        assert torch.equal(tuned.task.store.arrays[name], value)
    kept = [{n: v for n, v in row.items() if "finetuned" not in n} for row in rows]
    assert kept == other


def test_held_out_clients_are_tested_on_what_they_did_not_adapt_to():
    offsets = np.array([0, 4, 9, 16])
    nothing = Partition(np.zeros(0, dtype=np.int64), np.zeros(4, dtype=np.int64))
    train = Partition(np.arange(100, 106), np.array([0, 6, 6, 6]))
    splits = ClientSplits(train, nothing, Partition(np.arange(16), offsets), np.array([False, True, True]))
    adapt, test = adaptation_splits(splits, 0)
    assert adapt.of(0).tolist() == list(range(100, 106))
    assert test.of(0).tolist() == [0, 1, 2, 3]
    for client, size in ((1, 5), (2, 7)):
        assert len(adapt.of(client)) == size // 2
        assert sorted([*adapt.of(client), *test.of(client)]) == splits.test.of(client).tolist()
    again, _ = adaptation_splits(splits, 0)
    assert np.array_equal(again.indices, adapt.indices)
    other, _ = adaptation_splits(splits, 1)
    assert not np.array_equal(other.indices, adapt.indices)


def test_two_models_in_one_are_each_adapted():
    from fedsim.finetune import _Adapt

    logits = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = torch.tensor([0, 1, 2, 0, 1])
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    want = sum(functional.cross_entropy(z, y) for z in logits)
    torch.testing.assert_close(_Adapt(()).criterion(logits, y, weights), want)
