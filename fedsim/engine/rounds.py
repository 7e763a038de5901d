"""From an engine's rows to a cohort: held or streamed, bad rows dropped, client state kept."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Streamed, Sums
from fedsim.engine.task import Block, Engine, Job

STREAM_BLOCK = 1 << 18  # entries of a block of streamed rows: it should still be in cache when it is summed


class BadUpdate(RuntimeError):
    """A client's update is not finite."""


class Trainer:
    """Trains jobs on an engine and hands their cohort to the server.

    Args:
        engine: who trains the rows.
        on_bad_update: "drop" rows that are not finite, or "raise" `BadUpdate`.

    """

    def __init__(self, engine: Engine, on_bad_update: str = "drop") -> None:
        self.engine, self.task = engine, engine.task
        self.on_bad_update = on_bad_update
        self.dropped = 0  # bad rows of the last job
        self.seconds = 0.0  # spent in the engine since the trainer was made
        self._rows = torch.empty(0, self.task.shared.size, dtype=self.task.dtype, device=self.task.device)

    def buffer(self, count: int) -> Tensor:
        """Return (count, D) of the one update buffer, grown when a larger cohort comes."""
        if len(self._rows) < count:
            self._rows = torch.empty(count, self.task.shared.size, dtype=self.task.dtype, device=self.task.device)
        return self._rows[:count]

    def collect(self, job: Job) -> tuple[Cohort, Tensor]:
        """Train a job and hold its rows; return (cohort, the cohort's mean buffers)."""
        out = self.buffer(len(job))
        block = self._train(job, out)
        good, kept = self._judge(job, block)
        cohort = self._cohort(job, block, out)
        return (cohort if good is None else cohort.take(good)), self._buffers(job, kept)

    def stream(self, job: Job, coefficients: Callable[[Cohort], Tensor], reduced: tuple[str, ...] = ()) -> Any:
        """Train a job in fixed blocks and sum its rows as they come; return (cohort, mean buffers).

        Blocks go by cohort position and are folded from the first to the last, so that the sum does not depend on
        who trained them.

        Args:
            job: the rows.
            coefficients: of a cohort without updates, (K,).
            reduced: names of second uploads of which only the mean is kept.

        """
        size = max(1, min(64, STREAM_BLOCK // max(1, self.task.shared.size)))
        total = torch.zeros(self.task.shared.size, dtype=self.task.dtype, device=self.task.device)
        weight = torch.zeros((), dtype=torch.float64, device=self.task.device)
        parts: list[Cohort] = []
        norms, shares, buffers = [], [], []
        dropped = 0
        for low in range(0, len(job), size):
            part = job.part(low, min(low + size, len(job)))
            out = self.buffer(size)[: len(part)]
            block = self._train(part, out)
            good, kept = self._judge(part, block)
            dropped += self.dropped
            cohort = replace(self._cohort(part, block, out), updates=None)
            norm = block.square_norms
            if good is not None:
                cohort, out, norm = cohort.take(good), out[good], norm[good]
            c = coefficients(cohort)  # (k,)
            total.addmv_(out.T, c.to(total.dtype))
            weight += c.double().sum()
            parts.append(cohort)
            norms.append(norm)
            shares.append(c)
            buffers.append(kept)
        self.dropped = dropped
        cohort = _concatenate(parts)
        means = {name: cohort.extras[name].mean(0) for name in reduced if name in cohort.extras}
        extras = {name: value for name, value in cohort.extras.items() if name not in reduced}
        cohort = replace(cohort, extras=extras)
        mean = total / weight.to(total.dtype)
        streamed = Streamed(mean, Sums(cohort, torch.cat(shares), torch.cat(norms), means))
        return replace(cohort, streamed=streamed), self._buffers(job, _merge(buffers))

    def _train(self, job: Job, out: Tensor) -> Block:
        started = time.perf_counter()
        block = self.engine.train(job, out)
        self.seconds += time.perf_counter() - started
        return block

    def _judge(self, job: Job, block: Block) -> tuple[Tensor | None, Block]:
        """Find rows that are not finite; keep the state of the others. Return (their mask or None, good rows)."""
        good = torch.isfinite(block.square_norms) & torch.isfinite(block.weights)
        self.dropped = int((~good).sum())
        kept = block
        if self.dropped:
            if self.on_bad_update == "raise":
                bad = job.clients[(~good).cpu().numpy()]
                raise BadUpdate(f"round {job.round}: the update of client {bad.tolist()} is not finite")
            kept = _select(block, good)
        if block.state:
            clients = job.clients if not self.dropped else job.clients[good.cpu().numpy()]
            self.task.store.put(clients, kept.state)
        return (good if self.dropped else None), kept

    def _cohort(self, job: Job, block: Block, out: Tensor) -> Cohort:
        device = self.task.device
        received = torch.from_numpy(job.received).to(device)
        return Cohort(
            updates=out,
            weights=block.weights.to(self.task.dtype),
            clients=torch.from_numpy(job.clients).to(device),
            num_steps=block.num_steps.to(device),
            staleness=job.round - 1 - received,
            received=received,
            models=job.models,
            round=job.round,
            layout=self.task.shared,
            seed=self.task.seed,
            extras=block.extras,
        )

    def _buffers(self, job: Job, block: Block) -> Tensor:
        """Return the weighted mean of the clients' buffers, or the server's where nobody sent any."""
        if not self.task.buffers.size or not len(block.weights) or not bool(block.weights.sum() > 0):
            return job.buffers
        share = block.weights / block.weights.sum()
        return (share.to(block.buffers.dtype) @ block.buffers).to(job.buffers.dtype)


def _select(block: Block, good: Tensor) -> Block:
    return Block(
        block.square_norms[good],
        block.weights[good],
        block.num_steps[good.cpu()],
        {name: value[good] for name, value in block.extras.items()},
        block.buffers[good],
        {name: value[good] for name, value in block.state.items()},
    )


def _merge(blocks: list[Block]) -> Block:
    """Concatenate blocks; their client state has been stored already."""
    return Block(*(torch.cat([block[k] for block in blocks]) for k in range(3)), {}, torch.cat([b.buffers for b in blocks]), {})  # type: ignore[arg-type]  # fmt: skip


def _concatenate(parts: list[Cohort]) -> Cohort:
    names = ("weights", "clients", "num_steps", "staleness", "received")
    joined = {name: torch.cat([getattr(part, name) for part in parts]) for name in names}
    extras = {name: torch.cat([part.extras[name] for part in parts]) for name in parts[0].extras}
    return replace(parts[0], **joined, extras=extras)
