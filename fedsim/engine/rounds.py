"""From an engine's rows to a cohort: held or streamed, bad rows dropped, client state kept."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim import heap
from fedsim.contracts import Cohort, Streamed, Sums
from fedsim.engine import apart
from fedsim.engine.blocks import concatenate, merge, select
from fedsim.engine.failing import AllUpdatesBad, BadUpdate, failing, none_left
from fedsim.engine.foreseen import before, foreseen
from fedsim.engine.halving import Change, Halving
from fedsim.engine.hosted import Hosted
from fedsim.engine.pool import WorkersLost
from fedsim.engine.task import Block, Engine, Job, Weighed, clock_of
from fedsim.errors import UserError
from fedsim.linalg import finite_rows
from fedsim.local import Int64
from fedsim.threads import one_thread

SMALL = 1 << 24  # bytes of a model up to which rounds are so short that new pages cost something beside training
STREAM_BLOCK = 1 << 22  # entries of a block of streamed rows: what one costs beside its rows should not count


class Trained(NamedTuple):
    """Rows whose clients did not fail."""

    job: Job
    block: Block
    updates: Tensor  # (k, D)


class Trainer:
    """Trains jobs on an engine and hands their cohort to the server.

    Args:
        engine: who trains the rows.
        on_bad_update: "drop" rows of which anything is not finite, or "raise" `BadUpdate`.
        on_client_error: "raise" `ClientError` if an objective raises, or "drop" the client it raised for.
        block: rows of a streamed block, ≥ 1; None: `block_rows` of the engine.
        changes: the plan's, which halved chunks are added to.
        hosted: holds updates in the host's memory; None: they lie on the device.

    """

    def __init__(
        self, engine: Engine, on_bad_update: str = "drop", on_client_error: str = "raise", *, block: int | None = None,
        changes: list[Change] | None = None, hosted: Hosted | None = None,
    ) -> None:  # fmt: skip
        if engine.task.shared.size * engine.task.dtype.itemsize <= SMALL:
            heap.keep()
        self.engine, self.task, self.hosted = engine, engine.task, hosted
        self.on_bad_update, self.on_client_error = on_bad_update, on_client_error
        self.bad: list[int] = []  # clients of the last job whose rows were not finite
        self.failures: dict[int, str] = {}  # client of the last job that raised → what
        self.seconds, self.now = 0.0, clock_of(engine)  # spent in the engine since the trainer was made
        self.halving = Halving(engine, block or block_rows(engine), [] if changes is None else changes)
        self._weighed = False  # whether a client has said what it weighs
        self._rows = torch.empty(0, self.task.shared.size, dtype=self.task.dtype, device=self.task.device)

    def buffer(self, count: int) -> Tensor:
        """Return (count, D) of the one update buffer, grown when a larger cohort comes."""
        if len(self._rows) < count:
            room = getattr(self.engine, "room", None)  # an engine's own, which its workers write into
            self._rows = (
                room(count)
                if room
                else torch.empty(count, self.task.shared.size, dtype=self.task.dtype, device=self.task.device)
            )
        return self._rows[:count]

    @property
    def dropped(self) -> int:
        """How many rows of the last job were bad."""
        return len(self.bad)

    def collect(self, job: Job) -> tuple[Cohort, Tensor]:
        """Train a job and hold its rows; return (cohort, the cohort's mean buffers).

        Raises:
            AllUpdatesBad: no good row is left.

        """
        return self.halving.attempt(job.round, lambda: self._collect(job))

    def _collect(self, job: Job) -> tuple[Cohort, Tensor]:
        if self.hosted is not None:
            return self.hosted.collect(self, job)
        self.bad, self.failures = [], {}
        trained = self._train(job, self.buffer(len(job)))
        if trained is not None:
            part, block, out = trained
            good, kept = self._judge(part, block)
            cohort = self._cohort(part, block, out)
            cohort = cohort if good is None else cohort.take(good)
        if trained is None or not len(cohort):
            raise none_left(job, self.bad, self.failures)
        return cohort, self._buffers(job, kept)

    def screen(self, cohort: Cohort) -> Cohort:
        """Drop held rows that are no longer finite: what attackers sent, or a code that overflowed.

        Raises:
            AllUpdatesBad: no good row is left.

        """
        good = finite_rows(cohort.rows)  # (K,)
        if bool(good.all()):
            return cohort
        bad = cohort.clients[~good].tolist()
        if self.on_bad_update == "raise":
            raise BadUpdate(f"round {cohort.round}: the update of client {bad} is not finite")
        self.bad = sorted([*self.bad, *bad])
        if not bool(good.any()):
            raise AllUpdatesBad(f"round {cohort.round}: none of {len(cohort)} updates is finite")
        return cohort.take(good)

    def stream(
        self, job: Job, coefficients: Callable[[Cohort], Tensor], reduced: tuple[str, ...] = ()
    ) -> tuple[Cohort, Tensor]:
        """Train a job in fixed blocks and sum its rows as they come; return (cohort, mean buffers).

        Blocks go by cohort position and are folded in an order that hangs on the blocks alone, so that the sum does not
        depend on who trained them.

        Args:
            job: the rows.
            coefficients: of a cohort without updates, (K,).
            reduced: names of second uploads of which only the mean is kept.

        Raises:
            AllUpdatesBad: no good row is left.

        """
        return self.halving.attempt(job.round, lambda: self._stream(job, coefficients, reduced))

    def _stream(
        self, job: Job, coefficients: Callable[[Cohort], Tensor], reduced: tuple[str, ...]
    ) -> tuple[Cohort, Tensor]:
        self.bad, self.failures = [], {}
        size = self.halving.block_rows
        if len(self._rows) > size:  # chunks were halved since
            self._rows = self._rows[:0].clone()
        total = torch.zeros(self.task.shared.size, dtype=self.task.dtype, device=self.task.device)
        weight = torch.zeros((), dtype=torch.float64, device=self.task.device)
        folded: dict[int, tuple[Cohort, Tensor, Tensor, Block]] = {}  # by position
        summed = self._summed(job, coefficients, total)
        if summed is not None:
            folded[0] = summed
            weight += summed[2].double().sum()
        parts = [job.part(k, min(k + size, len(job))) for k in range(0, 0 if summed else len(job), size)]
        for number, trained in self._blocks(parts):
            if trained is None:
                continue
            part, block, out = trained
            good, kept = self._judge(part, block)
            cohort = replace(self._cohort(part, block, out), updates=None)
            norm = block.square_norms
            if good is not None:
                cohort, out, norm = cohort.take(good), out[good], norm[good]
            c = coefficients(cohort)  # (k,)
            self._fold(total, out, c)
            weight += c.double().sum()
            folded[number] = (cohort, norm, c, kept)
        if not any(len(cohort) for cohort, *_ in folded.values()):
            raise none_left(job, self.bad, self.failures)
        cohorts, norms, shares, buffers = zip(*(folded[number] for number in sorted(folded)), strict=True)
        cohort = concatenate(list(cohorts))
        means = {name: cohort.extras[name].mean(0) for name in reduced if name in cohort.extras}
        extras = {name: value for name, value in cohort.extras.items() if name not in reduced}
        cohort = replace(cohort, extras=extras)
        with one_thread():
            mean = total.div_(weight.to(total.dtype))
        streamed = Streamed(mean, Sums(cohort, torch.cat(shares), torch.cat(norms), means))
        return replace(cohort, streamed=streamed), self._buffers(job, merge(list(buffers), stored=True))

    def _fold(self, total: Tensor, out: Tensor, c: Tensor) -> None:
        """Add Σ c_k Δ_k of rows (k, D) to total (D,)."""
        if fold := getattr(self.engine, "fold", None):
            fold(total, out, c)
        else:
            total.addmv_(out.T, c.to(total.dtype))

    def _summed(
        self, job: Job, coefficients: Callable[[Cohort], Tensor], total: Tensor
    ) -> tuple[Cohort, Tensor, Tensor, Block] | None:
        """Let the engine add c_k Δ_k of finite rows to a total (D,) as they end; None where that cannot be.

        The coefficients must be known beforehand. Where a client fails, blocks find out who it is.
        """
        train_sum = getattr(self.engine, "train_sum", None)
        plain = apart.settled(job)
        # Blocks bound what clients that keep a state leave at once.
        keeps = self.task.stateful and hasattr(self.task.objective, "finish")
        if train_sum is None or plain is None or keeps or self._weighed:
            return None
        c = foreseen(coefficients, replace(self._cohort(job, before(self.task, job), total), updates=None))
        if c is None:
            return None
        started = self.now()
        try:
            block = train_sum(plain, c, total)
        except (torch.OutOfMemoryError, UserError, WorkersLost):
            raise
        except Exception as error:
            self._weighed = isinstance(error, Weighed)
            total.zero_()
            return None
        finally:
            self.seconds += self.now() - started
        good, kept = self._judge(job, block)
        cohort, norms = replace(self._cohort(job, block, total), updates=None), block.square_norms
        if good is None:
            return cohort, norms, c, kept
        if bool((torch.isfinite(norms) & ~good).any()):  # what else they sent is not finite, but they are in the sum
            total.zero_()
            self.bad = []
            return None
        return cohort.take(good), norms[good], c[good], kept

    def _blocks(self, parts: list[Job]) -> Iterator[tuple[int, Trained | None]]:
        """Train blocks; yield (position, what `_train` returns) in an order that hangs on the blocks alone."""
        stream = getattr(self.engine, "stream", None)
        plain = [apart.settled(part) for part in parts]
        if stream is None or None in plain:
            yield from ((k, self._train(part, self.buffer(len(parts[0]))[: len(part)])) for k, part in enumerate(parts))
            return
        with contextlib.closing(stream(plain)) as blocks:  # side by side, by an engine with workers
            for k, finish in blocks:
                yield k, self._train(parts[k], None, finish)

    def _train(
        self, job: Job, out: Tensor | None, finish: Callable[[], tuple[Block, Tensor]] | None = None
    ) -> Trained | None:
        """Train rows; return the job, block and updates of those whose client did not fail, None if all did.

        Args:
            job: the rows.
            out: where updates go; None where they are in training already.
            finish: what waits for those.

        """
        started = self.now()
        try:
            if finish is not None:
                return Trained(job, *finish())
            assert out is not None  # one of the two is given
            return Trained(job, apart.train(self.engine, job, out), out)
        except (torch.OutOfMemoryError, UserError, WorkersLost):  # the machine's failure or the config's, no client's
            raise
        except Exception:
            out = self.buffer(len(job)) if out is None else out
            found = failing(self.engine, job, out, raises=self.on_client_error == "raise")
            if not found:
                raise
            self.failures |= found
            left = np.flatnonzero([k not in self.failures for k in job.clients.tolist()])
            if not len(left):
                return None
            part, rows = job.take(left), out[: len(left)]
            return Trained(part, apart.train(self.engine, part, rows), rows)
        finally:
            self.seconds += self.now() - started

    def _judge(self, job: Job, block: Block) -> tuple[Tensor | None, Block]:
        """Find rows that are not finite; keep the state of the others. Return (their mask or None, good rows)."""
        good = torch.isfinite(block.square_norms) & torch.isfinite(block.weights)
        uploads = [value for name, value in block.extras.items() if name != "train_loss"]
        for values in (block.buffers, *uploads, *block.state.values()):
            if values.numel() and values.is_floating_point():
                good &= torch.isfinite(values.flatten(1).sum(1)) if values.dim() > 1 else torch.isfinite(values)
        if bool(good.all()):
            self._keep(job.clients, block)
            return None, block
        bad = job.clients[(~good).cpu().numpy()].tolist()
        if self.on_bad_update == "raise":
            raise BadUpdate(f"round {job.round}: the update of client {bad} is not finite")
        self.bad += bad
        kept = select(block, good)
        self._keep(job.clients[good.cpu().numpy()], kept)
        return good, kept

    def _keep(self, clients: Int64, block: Block) -> None:
        if block.state:
            self.task.store.put(clients, block.state)

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


def block_rows(engine: Engine) -> int:
    """Return the rows of a streamed block: the engine's, else from a table of shapes."""
    return engine.block_rows or max(1, min(64, STREAM_BLOCK // max(1, engine.task.shared.size)))
