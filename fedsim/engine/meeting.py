"""Replicas: several runs of one shape, whose rows train as one program.

Each run goes on in a thread of its own, of which one runs at a time, so that nothing depends on how threads are
scheduled, and a replica needs no other code than a run alone. A run that asks its engine to train waits. Rows of a
batched program wait until all runs do; then those of the earliest round train together. Recorded steps, of which none
knows who else trains, begin at once, beside whatever the other runs do in Python. What a rule computes of rows, such as
a gradient inversion, waits in the same way.
"""

from __future__ import annotations

import contextvars
import threading
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor

from fedsim.engine.captured import Captured
from fedsim.engine.replicas import Part, outcomes
from fedsim.engine.task import Block, Job, Task
from fedsim.engine.vectorized import Vectorized

Together = Vectorized | Captured
"""Engines that several runs can share."""


class Asked(NamedTuple):
    """What a replica's rule wants computed of its rows."""

    round: int
    key: Hashable  # those of one key are computed together
    solve: Callable[[list[Any]], list[Any]]  # parts → a result each
    part: Any


class Seat:
    """A replica's engine: waits until the others have rows to train too.

    Args:
        meeting: of all replicas.
        engine: that trains the rows; replicas that share one train together.
        task: the replica's own.

    """

    def __init__(self, meeting: Meeting, engine: Together, task: Task) -> None:
        self.engine, self.task, self._meeting = engine, task, meeting
        self.plan: Mapping[str, Any] = engine.plan
        self.block_rows = engine.block_rows
        self.chunk: int = getattr(engine, "chunk", 1)  # its own: halved where memory runs out
        if isinstance(engine, Captured):
            self.train_sum = self._train_sum
        self.part: Part | None = None  # waits to be trained
        self.begun: Callable[[], Block] | None = None  # is being trained
        self.asked: Asked | None = None  # waits to be computed
        self.outcome: Any = None  # of what it waited for, or an exception
        self.error: BaseException | None = None  # that ended the replica
        self.done = False
        self.spent = 0.0  # seconds of what it waited for since it began to: its share of those of a program
        self.away = 0.0  # seconds in which others trained or ran, and this one only waited
        self.go = threading.Semaphore(0)

    def now(self) -> float:
        """Return a clock's seconds, which stands still while the replica waits for others."""
        return time.perf_counter() - self.away

    def train(self, job: Job, out: Tensor) -> Block:
        """Wait until the rows are trained."""
        return self._trained(Part(self.task, job, out, self.chunk))

    def _train_sum(self, job: Job, coefficients: Tensor, total: Tensor) -> Block:
        """Wait until the rows are trained and summed."""
        return self._trained(Part(self.task, job, None, summed=(coefficients.tolist(), total)))

    def solved(self, round: int, key: Hashable, solve: Callable[[list[Any]], list[Any]], part: Any) -> Any:
        """Wait until a part is solved, see `Mimic.together`; parts of other engines' runs are solved apart."""
        self.asked = Asked(round, (id(self.engine), key), solve, part)
        return self._waited()

    def _trained(self, part: Part) -> Block:
        self.part = part
        block: Block = self._waited()
        return block

    def _waited(self) -> Any:
        began = time.perf_counter()
        self._meeting.back.release()
        self.go.acquire()
        self.away += time.perf_counter() - began - self.spent
        self.spent = 0.0
        if self._meeting.stopped:
            raise Stopped
        outcome, self.outcome = self.outcome, None
        if isinstance(outcome, BaseException):
            raise outcome
        assert outcome is not None  # the meeting does what is waited for before it lets a seat go on
        return outcome

    def close(self) -> None:
        """Hold nothing: engines are closed by who made them."""


class Stopped(BaseException):
    """The replicas are ended from outside."""


class Meeting:
    """Lets replicas run in turn, and trains those that wait."""

    def __init__(self) -> None:
        self.back = threading.Semaphore(0)
        self.seats: list[Seat] = []
        self.stopped = False
        self._running: Seat | None = None

    def seat(self, engine: Together, task: Task) -> Seat:
        """Return a further replica's engine."""
        self.seats.append(Seat(self, engine, task))
        return self.seats[-1]

    def run(self, bodies: Sequence[Callable[[], None]]) -> None:
        """Run each replica's body, in the order of the seats, to its end; raise what one of them raises."""
        threads = [
            threading.Thread(target=contextvars.copy_context().run, args=(self._live, seat, body), daemon=True)
            for seat, body in zip(self.seats, bodies, strict=True)
        ]
        for thread in threads:
            thread.start()
        try:
            while not all(seat.done for seat in self.seats):
                if not self._turn():
                    self._serve()
        finally:  # after an interrupt some still live: each unwinds in its turn, so that its files are whole
            self.stopped = True
            if self._running is not None:
                self.back.acquire()
                self._running = None
            for seat in self.seats:
                if not seat.done:
                    self._let(seat)
            for thread in threads:
                thread.join()

    def _turn(self) -> bool:
        """Let each run go on that can, once; say if any could."""
        ready = [seat for seat in self.seats if not seat.done and seat.part is None and seat.asked is None]
        for seat in ready:
            if seat.begun is not None:
                begun, seat.begun, began = seat.begun, None, time.perf_counter()
                seat.outcome = _caught(begun)
                seat.spent += time.perf_counter() - began
            self._let(seat)
            if seat.part is not None and isinstance(seat.engine, Captured):
                part, seat.part, began = seat.part, None, time.perf_counter()
                seat.begun = _begun(seat.engine, part)
                seat.spent += time.perf_counter() - began
        return bool(ready)

    def _let(self, seat: Seat) -> None:
        self._running = seat
        seat.go.release()
        self.back.acquire()
        self._running = None
        if seat.error is not None and not self.stopped:
            raise seat.error

    def _live(self, seat: Seat, body: Callable[[], None]) -> None:
        seat.go.acquire()
        try:
            if not self.stopped:
                body()
        except BaseException as error:
            seat.error = error
        finally:
            seat.done, seat.part, seat.asked = True, None, None
            self.back.release()

    def _serve(self) -> None:
        """Do what those wait for that are in the earliest round: who lags, as after a resume, catches up first."""
        parts = [(seat, seat.part) for seat in self.seats if seat.part is not None]
        asked = [(seat, seat.asked) for seat in self.seats if seat.asked is not None]
        first = min([*(part.job.round for _, part in parts), *(one.round for _, one in asked)], default=None)
        training = [(seat, part) for seat, part in parts if part.job.round == first]
        if training:
            self._train(training)
        else:
            self._solve([(seat, one) for seat, one in asked if one.round == first])

    def _train(self, waiting: Sequence[tuple[Seat, Part]]) -> None:
        for engine in {id(seat.engine): seat.engine for seat, _ in waiting}.values():
            assert isinstance(engine, Vectorized)  # the others' parts do not wait
            mine = [(seat, part) for seat, part in waiting if seat.engine is engine]
            began = time.perf_counter()
            found = outcomes(engine, [part for _, part in mine])
            for (seat, _), outcome in zip(mine, found, strict=True):
                seat.outcome, seat.part = outcome, None
                seat.spent += (time.perf_counter() - began) / len(mine)

    def _solve(self, waiting: Sequence[tuple[Seat, Asked]]) -> None:
        for key in dict.fromkeys(one.key for _, one in waiting):
            mine = [(seat, one) for seat, one in waiting if one.key == key]
            began = time.perf_counter()
            found = _solved([one for _, one in mine])
            for (seat, _), outcome in zip(mine, found, strict=True):
                seat.outcome, seat.asked = outcome, None
                seat.spent += (time.perf_counter() - began) / len(mine)


def _begun(engine: Captured, part: Part) -> Callable[[], Block]:
    try:
        return engine.begin(part.task, part.job, part.out, part.summed)
    except Exception as error:
        failure = error

    def fail() -> Block:
        raise failure

    return fail


def _caught(end: Callable[[], Block]) -> Block | BaseException:
    try:
        return end()
    except Exception as error:
        return error


def _solved(asked: Sequence[Asked]) -> list[Any]:
    """Solve parts together; where that fails each by itself, so that a failure is of those it belongs to."""
    try:
        return asked[0].solve([one.part for one in asked])
    except Exception as error:
        if len(asked) == 1:
            return [error]
    return [outcome for one in asked for outcome in _solved([one])]
