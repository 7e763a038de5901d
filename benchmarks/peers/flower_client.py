"""The Flower clients of B2, B4 and B8: the tight loop, and what tutorials show. For Ray's actors to import."""

from __future__ import annotations

import copy
import functools
from pathlib import Path

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset


@functools.cache
def workload(path: str) -> tuple:
    """Return (module, x, y, order (K, steps, batch), lr), read once by every actor."""
    torch.set_num_threads(1)
    work = np.load(path, allow_pickle=False)
    module = torch.load(Path(path).with_name("module.pt"), weights_only=False)
    return module, torch.from_numpy(work["x"]), torch.from_numpy(work["y"]), work["order"], float(work["lr"])


@functools.cache
def dataset(path: str) -> tuple:
    """Return (module, x, y, positions of each client, lr) of B2's file, read once by every actor."""
    torch.set_num_threads(1)
    arrays = np.load(path, allow_pickle=False)
    x = torch.from_numpy(arrays["x_train"]).flatten(1).float() / 255
    owner = arrays["client_train"]
    clients = [np.flatnonzero(owner == client) for client in range(int(owner.max()) + 1)]
    return torch.nn.Linear(x.shape[1], 10), x, torch.from_numpy(arrays["y_train"]).long(), clients, float(arrays["lr"])


def batches(path: str, whole: bool, partition: int) -> tuple:
    """Return what a client trains: module, x, y, its batches' positions, lr."""
    if not whole:
        module, x, y, order, lr = workload(path)
        return module, x, y, torch.from_numpy(order[partition % len(order)]), lr
    module, x, y, clients, lr = dataset(path)
    mine = torch.from_numpy(np.random.permutation(clients[partition]))  # noqa: NPY002  as a Flower client would
    return module, x, y, torch.split(mine, 10), lr


def lean(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, order, lr: float) -> torch.nn.Module:
    """Train as the tight loop does, in the actor's own module."""
    params = list(module.parameters())
    for chosen in order:
        loss = functional.cross_entropy(module(x[chosen]), y[chosen])
        grads = torch.autograd.grad(loss, params)
        with torch.no_grad():
            torch._foreach_add_(params, grads, alpha=-lr)
    return module


def tutorial(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor, order, lr: float) -> torch.nn.Module:
    """Train as Flower's tutorials do: a model, an optimiser, a criterion and a data loader of the client's own."""
    module = copy.deepcopy(module)
    mine = torch.cat(list(order))
    loader = DataLoader(TensorDataset(x[mine], y[mine]), batch_size=len(order[0]))
    criterion, optimizer = torch.nn.CrossEntropyLoss(), torch.optim.SGD(module.parameters(), lr=lr)
    module.train()
    for images, labels in loader:
        optimizer.zero_grad()
        criterion(module(images), labels).backward()
        optimizer.step()
    return module


def client_app(path: str, whole: bool = False, style: str = "lean") -> ClientApp:
    """Return the client of a workload, or of a whole data set with an order of its own."""
    app = ClientApp()
    local_round = {"lean": lean, "tutorial": tutorial}[style]

    @app.train()
    def train(message: Message, context: Context) -> Message:
        module, x, y, order, lr = batches(path, whole, int(context.node_config["partition-id"]))
        module.load_state_dict(message.content["arrays"].to_torch_state_dict())
        trained = local_round(module, x, y, order, lr)
        seen = sum(len(chosen) for chosen in order)
        content = {"arrays": ArrayRecord(trained.state_dict()), "metrics": MetricRecord({"num-examples": seen})}
        return Message(content=RecordDict(content), reply_to=message)

    return app
