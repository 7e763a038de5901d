"""A run as a Flower app: the server makes its strategy without data, each node trains its own client.

What a node does is what the simulation does for that client: the same engine, objective, optimiser, batches and
randomness, keyed by (seed, round, client). So with all nodes in every round a deployment gives the simulated run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.backend import EngineBackend
from fedsim.build import build
from fedsim.config import from_tree
from fedsim.contracts import Dataset, Partition
from fedsim.engine.rounds import Trainer
from fedsim.experiment import Experiment
from fedsim.flower.client import client_app
from fedsim.flower.deployment import BUFFERS, CLIENT, ClientApp, Context, Served, ServerApp, keep, kept, server_app

OwnData = Callable[[int, int], Dataset | None]


def server_of(run: Path) -> ServerApp:
    """Return the ServerApp of the file `run.json` that `fedsim export flower` wrote."""
    return server_app(lambda: _served(run))


def _served(run: Path) -> Served:
    """Return what the server needs."""
    experiment = _built(run, None)
    task = experiment.task
    averaged = experiment.settings.buffers == "average"
    buffers = experiment.initial_buffers if averaged else experiment.initial_buffers[:0]
    return Served(experiment.strategy, experiment.initial, task.shared, buffers, task.buffers, experiment.settings.seed)


def client_of(run: Path, data: OwnData | None = None) -> ClientApp:
    """Return the ClientApp of an exported run.

    Args:
        run: the file `run.json`.
        data: (client, number of clients) → the node's own data; None, or returning None: its part of the run's.

    """

    def local(client: int, total: int) -> tuple[EngineBackend, int]:
        backend, clients = _backend(run, data, client, total)
        if not 0 <= client < len(clients):
            raise ValueError(f"partition-id must be 0 to {len(clients) - 1}, one of the run's clients; got {client}")
        return backend, clients[client]

    return app_of(local)


def app_of(local: Callable[[int, int], tuple[EngineBackend, int]]) -> ClientApp:
    """Return a ClientApp that trains a run's clients, one a node.

    Args:
        local: (partition-id, number of partitions) → (the backend that trains, its client of that id).

    """

    def mine(context: Context) -> tuple[EngineBackend, int]:
        """Return this node's client with what it kept."""
        asked = context.node_config["partition-id"], context.node_config["num-partitions"]
        backend, client = local(int(asked[0]), int(asked[1]))
        backend.task.store.touched[client] = False  # what this process remembers may be another run's
        if held := kept(context):
            backend.task.store.put(np.array([client]), {name: value[None] for name, value in held.items()})
        return backend, client

    def flat(backend: EngineBackend, weights: Mapping[str, Tensor], broadcast: dict[str, Any]) -> Tensor:
        """Return weights (D,), and give the backend the buffers that came along."""
        if (sent := broadcast.pop(BUFFERS, None)) is not None:
            backend.buffers = torch.as_tensor(sent).reshape(-1).to(backend.buffers)
        return backend.layout.join({name: weights[name] for name in backend.layout.names})

    def train(
        weights: dict[str, Tensor], config: dict[str, Any], context: Context
    ) -> tuple[Mapping[str, Tensor], Mapping[str, Any]]:
        backend, client = mine(context)
        broadcast = config.pop("broadcast", {})
        w = flat(backend, weights, broadcast).to(backend.task.device, backend.task.dtype)
        cohort = backend.train(int(config.pop("server-round")), np.array([client]), w, broadcast, config)
        keep(context, {n: v[0] for n, v in backend.task.store.get(np.array([client]), w.device).items()})
        uploads = {name: value[0] for name, value in cohort.extras.items()}
        if backend.average_buffers and backend.buffers.numel():
            uploads[BUFFERS] = backend.buffers
        metrics = {"num-examples": float(cohort.weights[0]), "num-steps": int(cohort.num_steps[0]), CLIENT: client}
        return backend.layout.split(w + cohort.rows[0]), {**metrics, **uploads}

    def evaluate(weights: dict[str, Tensor], config: dict[str, Any], context: Context) -> Mapping[str, Any]:
        backend, client = mine(context)
        w = flat(backend, weights, config.pop("broadcast", {}))
        measured = backend.evaluate(int(config["server-round"]), np.array([client]), w)
        return {name: values[0].item() for name, values in measured.items()}

    return client_app(train, evaluate)


@cache  # a SuperNode may call its app in one process many times
def _backend(run: Path, data: OwnData | None, client: int, total: int) -> tuple[EngineBackend, list[int]]:
    own = data(client, total) if data is not None else None
    experiment = _built(run, own) if own is not None else build(from_tree(_read(run)["config"]))
    backend = EngineBackend(
        Trainer(experiment.engine, "raise"),
        buffers=experiment.initial_buffers,
        average_buffers=experiment.settings.buffers == "average",
        test=experiment.splits.test,
    )
    return backend, _read(run)["clients"]


def _read(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(run.read_text(encoding="utf-8"))
    return found


def _built(run: Path, own: Dataset | None) -> Experiment:
    """Build a run over a node's own data, or over stand-ins of its shape: all clients then hold the same samples."""
    said = _read(run)
    tree = said["config"]
    tree["data"]["validation"] = 0.0
    tree["partition"] |= {"held_out_clients": 0.0, "local_validation": 0.0}
    tree["target_accuracy"] = tree["early_stopping"]["patience"] = None  # nobody has validation data for all
    if own is None:
        tree["partition"]["local_test"] = 0.5
    number = max(said["clients"]) + 1

    def everybody(labels: np.ndarray[Any, Any], rng: np.random.Generator, natural: Any = None) -> Partition:
        return Partition(np.tile(np.arange(len(labels)), number), np.arange(number + 1) * len(labels))

    return build(from_tree(tree), {"data": own or _stand_in(said), "partition": everybody})


def _stand_in(said: Mapping[str, Any]) -> Dataset:
    """Return a few samples of nothing: the server's model needs their shape and the number of classes."""
    x = torch.zeros(8, *said["input_shape"], dtype=torch.int64 if said["tokens"] else torch.float32)
    splits = {"train": np.arange(6), "test": np.arange(6, 8)}
    return Dataset(x, torch.arange(8) % said["num_classes"], splits, num_classes=said["num_classes"])
