"""A workload in Flower's own simulation on Ray: the stock FedAvg, and a client of `flower_client.py`.

    flower_sim.py WORK [--registered N] [--style tutorial]           one round a line
    flower_sim.py --dataset FILE --rounds N       N rounds end to end (B2), then ends

One core an actor, as many actors as cores. Every actor keeps the data after its first client.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable

import numpy as np
import protocol
import torch
from flower_client import client_app, dataset, workload
from flwr.app import ArrayRecord, ConfigRecord, Context, Message
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from flwr.simulation import run_simulation

parser = argparse.ArgumentParser()
parser.add_argument("work", nargs="?")
parser.add_argument("--registered", type=int, help="clients there are; those beyond the workload's own repeat them")
parser.add_argument("--style", choices=("lean", "tutorial"), default="lean", help="how clients train")
parser.add_argument("--dataset")
parser.add_argument("--rounds", type=int)
given = parser.parse_args()
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def strategy(share: float, cohort: int) -> FedAvg:
    """Return Flower's FedAvg, without evaluation."""
    return FedAvg(
        fraction_train=share, fraction_evaluate=0.0, min_train_nodes=cohort, min_evaluate_nodes=0,
        min_available_nodes=cohort,
    )  # fmt: skip


def server_app(path: str, registered: int) -> ServerApp:
    """Return a server that does a round for every line it is sent."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        module, _, _, order, _ = workload(path)
        start = {name: value.clone() for name, value in module.state_dict().items()}
        rule = strategy(len(order) / registered, len(order))
        _one(rule, grid, start)  # actors start, and read the data
        protocol.ready("flwr", "ray", "torch", actors=CORES, registered=registered)
        for update in protocol.commands():
            after = _one(rule, grid, start)
            if update is not None:
                delta = [(after[name] - start[name]).flatten() for name, _ in module.named_parameters()]
                np.save(update, torch.cat(delta).numpy())

    return app


def _one(rule: FedAvg, grid: Grid, start: dict) -> dict:
    messages: Iterable[Message] = rule.configure_train(1, ArrayRecord(start), ConfigRecord(), grid)
    replies = grid.send_and_receive(messages)
    arrays, _ = rule.aggregate_train(1, replies)
    if arrays is None:
        raise RuntimeError("no client answered")
    return arrays.to_torch_state_dict()


def whole_app() -> ServerApp:
    """Return a server that does all rounds of B2 in Flower's own loop."""
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        module, *_ = dataset(given.dataset)
        rule = strategy(0.01, 10)
        rule.start(grid=grid, initial_arrays=ArrayRecord(module.state_dict()), num_rounds=given.rounds)

    return app


def main() -> None:
    """Run the simulation."""
    if given.dataset:
        server, clients, registered = whole_app(), client_app(given.dataset, whole=True), len(dataset(given.dataset)[3])
    else:
        registered = given.registered or len(workload(given.work)[3])
        server, clients = server_app(given.work, registered), client_app(given.work, style=given.style)
    run_simulation(
        server_app=server, client_app=clients, num_supernodes=registered,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            # "local": never a cluster that somebody else has started on this machine.
            "init_args": {"address": "local", "num_cpus": CORES, "include_dashboard": False, "logging_level": "ERROR"},
        },
    )  # fmt: skip


if __name__ == "__main__":
    main()
