"""What clients have of their own under a Flower strategy: personal parameters, and running statistics."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import fedsim
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.loop import Loop

SMALL = ("partition.num_clients=4", "fraction=1", "num_rounds=2", "dtype=float64", "data=blobs", "data.num_samples=200")


def norm(input_shape, num_classes):
    return torch.nn.Sequential(torch.nn.Linear(10, 6), torch.nn.BatchNorm1d(6), torch.nn.Linear(6, num_classes))


@pytest.mark.parametrize("buffers", ["average", "server"])
@pytest.mark.parametrize("pair", [("flower/fedavg", "fedavg"), ("flower/fedmedian", "median")], ids="=".join)
def test_running_statistics_are_those_of_the_same_rule(pair, buffers, tmp_path):
    left = []
    for i, strategy in enumerate(pair):
        words = [f"strategy={strategy}", f"buffers={buffers}", "client.batch_size=null", *SMALL]
        folder = fedsim.simulate(*words, model=norm, folder=tmp_path / str(i)).folder
        left.append(load_file(folder / "model.safetensors"))
    for name, value in left[1].items():
        torch.testing.assert_close(left[0][name], value, rtol=1e-9, atol=1e-12)
    moved = left[0]["1.running_mean"].abs().max() > 0
    assert moved == (buffers == "average")


def test_clients_are_evaluated_with_their_own_parameters(tmp_path):
    """A Flower strategy's evaluation messages meet each client's own model, as fedsim's own figures do."""
    loop = Loop(build(compose(["strategy=flower/fedavg", "model.local=head", *SMALL])), tmp_path, Observer())
    loop.run()
    clients = np.flatnonzero(loop.experiment.splits.test.sizes > 0)
    measured = loop.backend.evaluate(2, clients, loop.weights)
    figures = loop.evaluator.client_figures(loop.weights, loop.backend.buffers, loop.round).figures
    assert measured["eval_acc"].mean() == pytest.approx(float(figures["client_accuracy_mean"]), rel=1e-12)
    assert measured["num-examples"].tolist() == loop.experiment.splits.test.sizes[clients].tolist()
    rows = loop.backend.evaluate(2, clients, loop.weights.expand(len(clients), -1))
    np.testing.assert_array_equal(rows["eval_acc"], measured["eval_acc"])
    for value in loop.task.store.arrays.values():
        value.zero_()  # heads that answer nothing: the figures above were theirs
    assert not np.array_equal(loop.backend.evaluate(2, clients, loop.weights)["eval_loss"], measured["eval_loss"])
