"""What `engine=auto` takes against the best engine, kernels, chunk and threads found by trying them all.

Twelve situations that nothing else here is tuned on, and twelve that were thought of after the table's costs were
fitted, and raced once. All candidates do one round; those within twice the best go on in
turn; then the best of them and what auto takes are raced by themselves, so that the best of many noisy figures does
not flatter itself.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks import harness
from benchmarks.training import engine_side, threaded
from benchmarks.workloads import Workload
from fedsim.build_model import THREADS_PAY, probe
from fedsim.contracts import Partition
from fedsim.engine.auto import make_engine
from fedsim.engine.task import Engine
from fedsim.errors import UserError
from fedsim.local import LocalTraining
from fedsim.models.char_gru import char_gru
from fedsim.models.cnn import cnn
from fedsim.models.lenet import lenet
from fedsim.models.logreg import logreg
from fedsim.models.mlp import mlp
from fedsim.models.parameters import initialise
from fedsim.models.resnet import resnet8

KERNELS = ("fused", "generic", "captured")
CHUNKS = (1, 8, 32, 128)
NEAR = 2.0  # times the best first round, beyond which a candidate is not raced
CANDIDATE_ROUNDS = 3
LIMIT = 1.15  # of the best's time


@dataclass(frozen=True)
class Situation:
    """A model, its data and its clients."""

    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]
    num_classes: int
    cohort: int
    samples: int  # a client's mean
    training: LocalTraining
    vocabulary: int = 0  # tokens instead of numbers, where > 0
    spread: float = 0.0  # standard deviation of the logarithm of a client's samples

    def work(self) -> Workload:
        """Return it as data and a federation; its clients all train."""
        generator = torch.Generator().manual_seed(0)
        rng = np.random.default_rng(0)
        sizes = np.full(self.cohort, self.samples)
        if self.spread:
            drawn = rng.lognormal(math.log(self.samples), self.spread, self.cohort)
            sizes = np.clip(np.round(drawn), 2, 8 * self.samples).astype(np.int64)  # (K,)
        count = int(sizes.sum())
        x = (
            torch.randint(self.vocabulary, (count, *self.shape), generator=generator)
            if self.vocabulary
            else torch.randn(count, *self.shape, generator=generator)
        )
        y = torch.randint(self.num_classes, (count,), generator=generator)
        partition = Partition(np.arange(count), np.concatenate([[0], np.cumsum(sizes)]))
        return Workload(self.name, initialise(self.make, 0), x, y, partition, self.training, self.cohort)


class Words(nn.Module):
    """The mean of a text's word vectors, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(2000, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 5) of words (B, T)."""
        logits: Tensor = self.head(self.table(x).mean(1))
        return logits


def _normed() -> nn.Module:
    """Return a network with a layer that has no fused kernel."""
    return nn.Sequential(nn.Linear(64, 96), nn.LayerNorm(96), nn.ReLU(), nn.Linear(96, 10))


class Sequences(nn.Module):
    """An LSTM's last output, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(6, 32, batch_first=True), nn.Linear(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 3) of series (B, T, 6)."""
        logits: Tensor = self.head(self.lstm(x)[0][:, -1])
        return logits


class Attention(nn.Module):
    """Words that look at each other once, their mean, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.queries, self.values, self.head = (
            nn.Embedding(100, 32), nn.Linear(32, 64), nn.Linear(32, 32), nn.Linear(32, 4),
        )  # fmt: skip

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, 4) of words (B, T)."""
        words = self.table(x)  # (B, T, 32)
        queries, keys = self.queries(words).chunk(2, dim=-1)
        shares = (queries @ keys.transpose(1, 2) / 32**0.5).softmax(-1)  # (B, T, T)
        logits: Tensor = self.head((words + shares @ self.values(words)).mean(1))
        return logits


def _gated() -> nn.Module:
    """Return a network whose layers are normalised in groups."""
    return nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(3, 12), nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(),
        nn.Linear(12 * 36, 7),
    )  # fmt: skip


def _sgd(batch_size: int, **more: Any) -> LocalTraining:
    return LocalTraining(**{"lr": 0.05, "batch_size": batch_size, **more})


SITUATIONS = (
    Situation("logreg 784, 500 of 10", lambda: logreg((784,), 10), (784,), 10, 500, 10, _sgd(5)),
    Situation("logreg 20, 2 of 200", lambda: logreg((20,), 2), (20,), 2, 2, 200, _sgd(64)),
    Situation("MLP 32-16, 50 unequal", lambda: mlp((32,), 4, hidden=(16,)), (32,), 4, 50, 40, _sgd(8), spread=0.8),
    Situation("MLP 784-64, momentum", lambda: mlp((784,), 10, hidden=(64,)), (784,), 10, 20, 100,
              _sgd(32, momentum=0.9)),
    Situation("MLP 784-1024-512", lambda: mlp((784,), 10, hidden=(1024, 512)), (784,), 10, 5, 60, _sgd(20)),
    Situation("CNN 8-16 on 28x28", lambda: cnn((1, 28, 28), 10, channels=(8, 16), hidden=32), (1, 28, 28), 10, 20, 40,
              _sgd(10)),
    Situation("CNN 16-32 on 3x32x32", lambda: cnn((3, 32, 32), 10, channels=(16, 32), hidden=64), (3, 32, 32), 10, 4,
              128, _sgd(64)),
    Situation("CNN 4-8 on 8x8, 200 of 10", lambda: cnn((1, 8, 8), 10, channels=(4, 8), hidden=16), (1, 8, 8), 10, 200,
              10, _sgd(5)),
    Situation("resnet8 on 3x16x16", lambda: resnet8((3, 16, 16), 10), (3, 16, 16), 10, 3, 32, _sgd(16)),
    Situation("char_gru 64, 10 of 30", lambda: char_gru((40,), 80, embedding=8, hidden=64), (40,), 80, 10, 30, _sgd(10),
              vocabulary=80),
    Situation("word vectors, 100 unequal", Words, (20,), 5, 100, 20, _sgd(10), vocabulary=2000, spread=0.5),
    Situation("MLP with LayerNorm, AdamW", _normed, (64,), 10, 30, 50, _sgd(16, lr=0.003, optimizer="adamw")),
)  # fmt: skip


UNSEEN = (
    Situation("logreg 100, AdamW, 20 of 45", lambda: logreg((100,), 8), (100,), 8, 20, 45,
              _sgd(15, lr=0.003, optimizer="adamw")),
    Situation("MLP 200-100, 3 of 500", lambda: mlp((200,), 12, hidden=(100,)), (200,), 12, 3, 500, _sgd(50)),
    Situation("MLP of five layers, 150 unequal", lambda: mlp((40,), 6, hidden=(32, 24, 24, 16)), (40,), 6, 150, 30,
              _sgd(12), spread=0.7),
    Situation("MLP 3072-256, momentum", lambda: mlp((3072,), 10, hidden=(256,)), (3072,), 10, 8, 60,
              _sgd(20, momentum=0.9)),
    Situation("MLP 30-20, clipped", lambda: mlp((30,), 2, hidden=(20,)), (30,), 2, 80, 36, _sgd(6, clip_norm=1.0)),
    Situation("lenet, 10 of 50", lambda: lenet((1, 28, 28), 10), (1, 28, 28), 10, 10, 50, _sgd(10)),
    Situation("CNN 6-12 on 12x12, 40 unequal", lambda: cnn((1, 12, 12), 5, channels=(6, 12), hidden=24), (1, 12, 12), 5,
              40, 25, _sgd(10, momentum=0.9), spread=0.6),
    Situation("resnet8 on 8x8, 10 of 32", lambda: resnet8((3, 8, 8), 10), (3, 8, 8), 10, 10, 32, _sgd(16)),
    Situation("char_gru of 2 x 128, 2 of 20", lambda: char_gru((80,), 80, hidden=128, num_layers=2), (80,), 80, 2, 20,
              _sgd(10), vocabulary=80),
    Situation("LSTM 32, 20 of 30", Sequences, (12, 6), 3, 20, 30, _sgd(10)),
    Situation("attention, 25 unequal", Attention, (16,), 4, 25, 30, _sgd(8), vocabulary=100, spread=0.5),
    Situation("group norm on 3x12x12, 30 of 24", _gated, (3, 12, 12), 7, 30, 24, _sgd(8)),
)  # fmt: skip


def auto(options: harness.Options) -> dict[str, Any]:
    """Compare auto's choice with the best in every situation."""
    return _all(SITUATIONS, "engine=auto against the best of all engines", options)


def unseen(options: harness.Options) -> dict[str, Any]:
    """Do the same in situations that are unlike those that the table's costs were fitted to."""
    return _all(UNSEEN, "engine=auto against the best, in situations of other kinds", options)


def _all(situations: Sequence[Situation], title: str, options: harness.Options) -> dict[str, Any]:
    result: dict[str, Any] = {"title": title, "ratios": {}, "figures": {}}
    result["notes"], result["plans"] = [], {}
    worst = 0.0
    for situation in situations:
        found = _compare(situation.work(), options)
        result["ratios"][f"{situation.name}: auto/best"] = found["ratio"]
        result["figures"][situation.name] = found["figures"]
        result["plans"][situation.name] = {"auto": found["auto"], "best": found["best"], "tried": found["tried"]}
        result["notes"].append(f"{situation.name}: auto {found['auto']}; best {found['best']}")
        worst = max(worst, 1 / found["ratio"]["median"])
    result["worst"] = worst
    result["notes"].append(f"auto takes at most {worst:.2f} times the best's time; aim {LIMIT}")
    return result


def _compare(work: Workload, options: harness.Options) -> dict[str, Any]:
    """Find the best candidate of a workload and race auto's choice against it."""
    opened: list[Engine] = []
    sides: dict[str, harness.Side] = {}

    def add(threads: int, **arguments: Any) -> str:
        engine, _ = make_engine(work.task(), cohort=work.cohort, threads=options.threads, **arguments)
        # The vectorized engine's threads train chunks of their own; inside an operation there is one.
        threads = threads if engine.plan["engine"] == "sequential" else 1
        key = _label(engine.plan) + (f" on {threads} threads" if threads > 1 else "")
        if key in sides:
            engine.close()
        else:
            opened.append(engine)
            sides[key] = threaded(engine_side(engine, work), threads)
        return key

    chosen = add(_threads(work, options.threads), name="auto")
    for threads in {1, options.threads}:
        add(threads, name="sequential")
    for kernels in KERNELS:
        for chunk in (None, *(c for c in CHUNKS if c <= work.cohort)):
            try:
                add(1, name="vectorized", kernels=kernels, chunk=chunk)
            except (UserError, ValueError):
                break  # that way it cannot be batched
    tried = _rounds(sides, chosen)
    best = min(tried, key=lambda name: tried[name])
    pair = {"auto": sides[chosen], "best": sides[best]}
    seconds = harness.race(pair, options, most=9, warm=1, budget=5.0)
    if best == chosen:
        seconds["best"] = seconds["auto"]
    for engine in opened:
        engine.close()
    return {
        "ratio": harness.ratios(seconds, [("auto", "best")])["auto/best"], "auto": chosen, "best": best,
        "tried": {name: 1e3 * value for name, value in tried.items()},
        "figures": {f"{name}_ms": row["median_ms"] for name, row in harness.figures(seconds).items()},
    }  # fmt: skip


def _rounds(sides: Mapping[str, harness.Side], chosen: str) -> dict[str, float]:
    """Return seconds a round of every side that is near the best, the median of a few in turn."""
    first = {name: _seconds(side, 1) for name, side in sides.items()}
    first |= {name: min(first[name], _seconds(side, 2)) for name, side in sides.items()}  # the first one warms up
    bound = NEAR * min(first.values())
    near = {name: side for name, side in sides.items() if first[name] <= bound or name == chosen}
    taken: dict[str, list[float]] = {name: [] for name in near}
    for number in range(3, 3 + CANDIDATE_ROUNDS):
        for name, side in near.items():
            taken[name].append(_seconds(side, number))
    return {name: statistics.median(values) for name, values in taken.items()}


def _seconds(side: harness.Side, number: int) -> float:
    began = time.perf_counter()
    side(number)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _threads(work: Workload, most: int) -> int:
    """Return the threads inside an operation that a run would have."""
    module = work.task().module
    with torch.no_grad():
        classes = module(work.x[:2]).shape[1]
    operations = probe(module, work.x, classes) * (work.training.batch_size or int(work.partition.sizes.max()))
    return most if operations >= THREADS_PAY else 1


def _label(plan: Mapping[str, Any]) -> str:
    return " ".join(str(plan[key]) for key in ("engine", "kernels", "chunk") if plan.get(key) is not None)
