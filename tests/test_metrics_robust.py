"""Accuracy under an adversary: a linear model by hand, its limits, and what a run and its budget make of it."""

import numpy as np
import pytest
import torch
from torch import nn

import fedsim
from fedsim.ascent import Ascent
from fedsim.build import build
from fedsim.config import compose
from fedsim.contracts import Dataset
from fedsim.engine import evaluate
from fedsim.errors import UserError
from fedsim.metrics.budget import Evaluation
from fedsim.metrics.robust import Adversary

W = torch.tensor([[0.0, 0.0], [1.0, -2.0]], dtype=torch.float64)  # margin of class 1: x_0 − 2 x_1


def logits(x):
    return x @ W.T


def adversary(**given):
    return Adversary(Ascent(**{"radius": 0.1, "num_steps": 20, **given}), key=5)


@pytest.mark.parametrize("num_steps", [1, 2, 20])
def test_a_linear_model_by_hand(num_steps):
    """The margin .3 falls by ε ‖w‖₁ = .3 to 0, at (.4, .2); class 0 is moved the other way."""
    x = torch.tensor([[0.5, 0.1], [0.5, 0.1]], dtype=torch.float64)
    moved = adversary(num_steps=num_steps)(logits, x, torch.tensor([1, 0]), 0)
    want = torch.tensor([[0.4, 0.2], [0.6, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(moved, want, rtol=0, atol=1e-12)
    bounded = adversary(num_steps=num_steps, low=0.05, high=0.55)(logits, x, torch.tensor([1, 0]), 0)
    torch.testing.assert_close(bounded[1], want.new_tensor([0.55, 0.05]), rtol=0, atol=1e-12)


def test_starts_are_drawn_once_for_all_rounds_and_apart_for_each_batch():
    x, y = torch.rand(6, 2, dtype=torch.float64), torch.arange(6) % 2
    weak = adversary(num_steps=20)

    def model(x):  # slopes change their sign within the box: where an ascent ends hangs on where it begins
        return torch.sin(80 * x)

    once, again, next_batch = (weak(model, x, y, first) for first in (0, 0, 6))
    assert torch.equal(once, again)
    assert not torch.equal(once, next_batch)
    assert (once - x).abs().max() <= 0.1 + 1e-12


def test_starts_are_each_samples_own_whatever_the_batch():
    x, y = torch.rand(7, 2, 3, dtype=torch.float64), torch.arange(7) % 2

    def model(x):
        return torch.sin(80 * x).sum(2)

    whole = adversary()(model, x, y, 0)
    parts = [adversary()(model, a, b, 3 * k) for k, (a, b) in enumerate(zip(x.split(3), y.split(3), strict=True))]
    assert torch.equal(torch.cat(parts), whole)
    same = adversary()(model, x[:1].expand(2, 2, 3), y[:1].expand(2), 0)
    assert not torch.equal(same[0], same[1])  # and no two samples share one


def test_a_runs_robust_figures_know_no_batch_size(tmp_path, monkeypatch):
    figures = []
    for entries in (1 << 20, 1 << 8):
        monkeypatch.setitem(evaluate.EVALUATION_ENTRIES, "cpu", entries)
        result = fedsim.simulate(
            "data=blobs", "data.num_samples=300", "model=mlp", "dtype=float64", "partition.num_clients=4", "threads=1",
            "metrics.robust_radius=0.8", "metrics.robust_steps=3", "num_rounds=1", folder=tmp_path / str(entries),
        )  # fmt: skip
        figures.append([result.rounds[-1][name] for name in ("robust_accuracy", "robust_loss")])
    np.testing.assert_allclose(figures[0], figures[1], rtol=1e-10)


def test_what_cannot_be_moved_is_refused_before_the_first_round(tmp_path):
    tokens = Dataset(
        torch.randint(0, 5, (60, 4)), torch.arange(60) % 2, {"train": np.arange(40), "test": np.arange(40, 60)}, 2
    )
    model = nn.Sequential(nn.Embedding(5, 3), nn.Flatten(), nn.Linear(12, 2))
    config = compose(["partition.num_clients=4", "partition=iid", "metrics.robust_radius=0.1"])
    with pytest.raises(UserError, match=r"metrics\.robust_radius needs floating-point features, .* torch\.int64"):
        build(config, {"data": tokens, "model": model})


@pytest.mark.parametrize(
    ("name", "value"), [("robust_radius", -0.1), ("robust_radius", float("inf")), ("robust_steps", 0)]
)
def test_settings_out_of_range_are_named(name, value):
    with pytest.raises(ValueError, match=rf"metrics\.{name} must be"):
        Evaluation(**{name: value})


def test_bounds_must_have_room():
    with pytest.raises(ValueError, match=r"metrics\.robust_low must be below robust_high=0.5, got 0.5"):
        Evaluation(robust_low=0.5, robust_high=0.5)


def test_the_adversary_is_paid_from_the_budget():
    """A step is a forward and a backward pass: three forward passes; then one on what was moved, and one without."""
    assert Evaluation().passes == 1
    assert Evaluation(robust_radius=0.1, robust_steps=4).passes == 1 + 3 * 4 + 1


def runs(tmp_path, *overrides, **parts):
    blobs = () if parts else ("data=blobs", "data.num_samples=300", "model=logreg")
    return fedsim.simulate(
        *blobs, "partition.num_clients=4", "fraction=1", "threads=1", "metrics.every=1", "metrics.robust_steps=3",
        "num_rounds=2", *overrides, folder=tmp_path, **parts,
    )  # fmt: skip


def test_a_run_measures_it_on_the_servers_splits_and_says_nothing_unless_asked(tmp_path):
    plain = runs(tmp_path / "a").rounds
    asked = runs(tmp_path / "b", "metrics.robust_radius=0.8").rounds
    tiny = runs(tmp_path / "c", "metrics.robust_radius=1e-9").rounds
    assert not [name for name in plain[-1] if "robust" in name]
    for before, row, same in zip(plain, asked, tiny, strict=True):
        assert {name: row[name] for name in before} == before  # the model and all else stays as it was
        assert row["robust_accuracy"] < row["accuracy"]
        assert row["robust_loss"] > row["loss"]
        assert row["validation_robust_accuracy"] <= row["validation_accuracy"]
        assert same["robust_accuracy"] == same["accuracy"]
        assert same["robust_loss"] == pytest.approx(same["loss"], rel=1e-5)


def test_personal_models_are_attacked_each_for_itself(tmp_path):
    row = runs(tmp_path, "strategy=local", "metrics.robust_radius=0.8").rounds[-1]
    assert row["robust_accuracy"] < row["accuracy"]


def test_a_linear_models_robust_accuracy_is_that_of_its_margins(tmp_path):
    """Two classes: right under the adversary where the margin is more than ε ‖w_y − w_other‖₁."""
    rng = np.random.default_rng(3)
    y = torch.tensor(rng.integers(0, 2, 80))
    x = torch.tensor(rng.normal(size=(80, 5))) + y[:, None]
    data = Dataset(x, y, {"train": np.arange(40), "test": np.arange(40, 80)}, 2)
    result = runs(
        tmp_path, "partition=iid", "data.validation=0", "dtype=float64", "metrics.robust_radius=0.3", data=data,
        model=nn.Linear(5, 2),
    )  # fmt: skip
    weight, bias = (p.detach().double() for p in result.model.parameters())
    scores, mine, other = x[40:] @ weight.T + bias, y[40:, None], 1 - y[40:, None]
    margin = (scores.gather(1, mine) - scores.gather(1, other))[:, 0]
    robust = margin > 0.3 * (weight[1] - weight[0]).abs().sum()
    assert 0 < robust.double().mean() < (margin > 0).double().mean()
    assert result.rounds[-1]["robust_accuracy"] == pytest.approx(robust.double().mean().item(), abs=1e-12)
