"""How near gradient inversion comes to the update that a late client would send now.

The toy of docs/results.md at the rate .1: digits, an MLP 64-32-10, 20 clients of one class each, five full batches a
round, the two that hold class 5 always τ = 40 rounds late. In round 60 their stale updates are made fresh from a cold
start, and compared with what they would have sent from the newest model: 1 − cos, by client.
`python -m benchmarks.staleness` prints it.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.engine.mimic import Mimic
from fedsim.engine.task import Job
from fedsim.loop import Loop
from fedsim.strategies.first_order import FirstOrder
from fedsim.strategies.unstale import Unstale

RUN = ("data=digits", "partition=classes", "partition.num_clients=20", "partition.classes_per_client=1",
       "partition.local_test=0", "fraction=1", "model=mlp", "model.hidden=[32]", "client=full_batch",
       "client.local_epochs=5", "mode=fixed_delay", "devices=intertwined", "strategy=first_order",
       "strategy.compensation=0", "threads=1", "engine=sequential", "metrics.every=1000", "metrics.clients_every=0",
       "checkpoint.every=1000")  # fmt: skip


def errors(
    folder: Path,
    *,
    delay: int = 40,
    round: int = 60,
    iterations: int = 400,
    lr: float = 0.1,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Return 1 − cos to the true update (S,) of the stale update, of its first-order correction and of inversion.

    Args:
        folder: of the run.
        delay: τ.
        round: whose late replies are looked at, > delay.
        iterations: of the search, from a cold start.
        lr: of the clients.
        seed: of the run.

    """
    words = [*RUN, f"mode.delay={delay}", f"num_rounds={round}", f"client.lr={lr}", f"seed={seed}"]
    loop = Loop(build(compose(words)), folder, Observer())
    newest = loop.weights
    for t in range(1, round + 1):
        newest = loop.weights
        loop.step(t)
    loop.rounds.close()
    loop.times.close()
    cohort = loop.backend.cohort
    assert cohort is not None
    late = torch.nonzero(cohort.staleness > 0).flatten()  # (S,)
    stale, clients = cohort.rows[late], cohort.clients[late]
    job = Job(
        clients=clients.numpy(), received=torch.full_like(clients, round - 1).numpy(), models={round - 1: newest},
        broadcasts={round - 1: {}}, buffers=loop.backend.buffers, state={}, round=round, key=round,
        lr=loop.task.training.rate(round),
    )  # fmt: skip
    true = torch.empty_like(stale)  # (S, D)
    loop.experiment.engine.train(job, true)
    rule = Unstale(uniqueness=False, iterations=iterations).bind(mimic=Mimic.of(loop.task))
    mended = rule._mend(cohort, rule.init(cohort.layout, 20), late, 1.0)[0].rows[late]
    corrected = FirstOrder().mix(cohort)[0].rows[late]
    found = {"stale": stale, "first order": corrected, "inversion": mended}
    return {name: 1 - functional.cosine_similarity(update, true, dim=1) for name, update in found.items()}


def main() -> None:
    """Print the errors."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.staleness", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--delay", type=int, default=40)
    parser.add_argument("--round", type=int, default=60)
    parser.add_argument("--iterations", type=int, default=400)
    parser.add_argument("--lr", type=float, default=0.1)
    given = parser.parse_args()
    for seed in range(given.seeds):
        began = time.process_time()
        with tempfile.TemporaryDirectory() as folder:
            found = errors(
                Path(folder), delay=given.delay, round=given.round, iterations=given.iterations, lr=given.lr, seed=seed
            )
        text = "  ".join(f"{name} {value.mean():.3f} (worst {value.max():.3f})" for name, value in found.items())
        print(f"seed {seed}: 1 - cos  {text}  [{time.process_time() - began:.0f} s]", flush=True)


if __name__ == "__main__":
    main()
