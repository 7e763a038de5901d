"""The programs of a local round, recorded as they are met."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.engine.deferred import most
from fedsim.engine.factors import Factors
from fedsim.engine.late import TURNS
from fedsim.engine.native import BUCKETS, GATHERED, Sizes, Steps, batches_of
from fedsim.engine.record import NotRecordable, Program, record
from fedsim.engine.script import compiled
from fedsim.engine.step import Kind, Step
from fedsim.engine.task import Block

LONG = 1000  # operations of a step from which on one costs little more with a few samples than with many


class Play:
    """What a client's round is made of, where the rule sends what has certain names.

    The first steps of a round may differ from the later ones (there is no step state yet): each of the first `TURNS`
    is recorded, and the later ones must all be of one kind.

    Args:
        step: what is recorded.
        sent: an example of what the rule sends.
        pulled: whether shared parameters are pulled towards what was received.

    Raises:
        NotRecordable: a step depends on a tensor's value, on its number, or on a global generator.
        ValueError: a recorded step is not the step itself.

    """

    def __init__(self, step: Step, sent: Mapping[str, Any], *, pulled: bool) -> None:
        self.step, self.pulled, self.sent = step, pulled, dict(sent)
        self.programs: dict[Kind, Program] = {}
        training, sizes = step.training, step.task.partition.sizes
        self.full = min(training.batch_size or int(sizes.max(initial=1)), len(step.task.x))
        self.carried: list[tuple[tuple[str, ...], list[Tensor]]] = [((), [])]  # what each step is given by the last
        self.known: list[Kind] = []
        self._loop: Callable[..., None] | None = None
        self.left = self.carried  # what each of the first steps leaves to the end of the round
        self.defers = True
        self.factors: list[int] = []  # places in the step state of gradients that are handed on as their factors
        turns = self._begin()
        self.factors = self._kept()
        if self.factors:
            turns = self._begin()
        if not self._worth():
            self.defers = False
            turns = self._begin()
        for turn in range(turns + 1):
            self._prove(turn)
        long = self._program(self._kind(self.full)).body.count("\n") > LONG
        buckets = self.full if step.of_batch else 1 if long else BUCKETS
        deferral = self._program(self._kind(self.full)).deferral
        gathered = max(1, GATHERED // max(1, step.task.x[0].numel()))
        gathered = gathered if deferral is None else min(gathered, most(deferral.shape))
        self.sizes = Sizes(self.full, buckets, turns, gathered, step.drops)
        self.ends: list[Program] = []  # of a round whose last step is the first, the second, …
        self.leaves: list[tuple[str, Tensor]] = []  # names and examples of what a round ends with
        if step.finishes:
            self._finish()

    def _kind(self, size: int, *, padded: bool = False, turn: int = 0) -> Kind:
        return Kind(size, padded, self.pulled, tuple(sorted(self.sent)), turn)

    def _program(self, kind: Kind) -> Program:
        if kind not in self.programs:
            names, values = self.carried[min(kind.turn, len(self.carried) - 1)]
            inputs = self.step.example(kind, self.sent, [value.clone() for value in values])
            fixed = len(inputs) - self.step.num_inputs(kind) - len(values)
            samples = fixed if self.defers else None
            handed = tuple(len(inputs) - len(values) + place for place in self.factors) if values else ()
            factors = Factors(handed, tuple(1 + place for place in self.factors))
            program = record(
                lambda given: self.step(given, kind, names), inputs, fixed=fixed, samples=samples, carried=len(values),
                factors=factors,
            )  # fmt: skip
            self.programs[kind] = program
        return self.programs[kind]

    def _begin(self) -> int:
        """Record what a round begins with; return how many first steps are of their own kind."""
        self.programs.clear()
        self.carried = [((), [])]
        if self.step.situated:
            return self._turns()
        self._program(self._kind(self.full))
        return 0

    def _kept(self) -> list[int]:
        """Return the places in the step state of gradients that all steps hand on and only take products of."""
        if len({names for names, _ in self.carried[1:]}) != 1:
            return []
        return sorted(frozenset.intersection(*(program.kept for program in self.programs.values())))

    def _worth(self) -> bool:
        """Say whether what was recorded can stay: all or nothing is deferred, and several steps are where any is."""
        deferrals = {program.deferral for program in self.programs.values()}
        several = all(deferral is None or 2 * self.full <= most(deferral.shape) for deferral in deferrals)
        return several and len(deferrals) == 1

    def _turns(self) -> int:
        """Record the first steps of a round; return how many of them are of their own kind."""
        texts = []
        for turn in range(TURNS + 2):
            kind = self._kind(self.full, turn=turn)
            names, values = self.carried[turn]
            program = self._program(kind)
            with torch.no_grad():
                left = program(self.step.example(kind, self.sent, [value.clone() for value in values]))[1:]
            self.carried.append((self.step.carried[kind], left))
            texts.append((names, program.body, _numbers(program.constants)))
        if texts[-1] != texts[-2]:
            raise NotRecordable("what a step does depends on its number in the round")
        turns = TURNS
        while turns and texts[turns - 1] == texts[-1]:
            turns -= 1
        self.programs = {kind: program for kind, program in self.programs.items() if kind.turn <= turns}
        self.left = self.carried[1 : TURNS + 2]
        # From `turns` on each step is given what the one before it left, whose names are the same.
        self.carried = [*self.carried[:turns], self.carried[-1]]
        return turns

    def _prove(self, turn: int) -> None:
        """Hold a recorded step against the step itself on other samples, weights, state and numbers."""
        kind, (names, values) = self._kind(self.full, turn=turn), self.carried[turn]
        given = self.step.example(kind, self.sent, values, number=1)
        again = [tensor.clone() for tensor in given]
        with torch.no_grad():
            _hold([*self._program(kind)(given), *given], [*self.step(again, kind, names), *again])

    def _finish(self) -> None:
        """Record the ends of rounds of one step, two steps, …; what they leave must be of one form."""
        for turn, (names, values) in enumerate(self.left):
            kind = self._kind(self.full, turn=turn)
            named: list[str] = []

            def end(given: list[Tensor], kind: Kind = kind, names: tuple[str, ...] = names) -> list[Tensor]:
                found, results = self.step.finish(given, kind, names)
                named[:] = found  # noqa: B023  read before the next turn
                return results

            inputs = self._ended(kind, values)
            factors = Factors(tuple(len(inputs) - len(values) + place for place in self.factors))
            program = record(end, inputs, factors=factors)
            given = self._ended(kind, values, number=1)
            with torch.no_grad():
                left = program([tensor.clone() for tensor in given])
                _hold(left, end(given))
            leaves = list(zip(named, left, strict=True))
            if self.leaves and [(n, v.shape) for n, v in leaves] != [(n, v.shape) for n, v in self.leaves]:
                raise NotRecordable("what a round ends with depends on the number of its steps")
            self.ends.append(program)
            self.leaves = leaves

    def _ended(self, kind: Kind, values: list[Tensor], number: int = 0) -> list[Tensor]:
        """Return an example of what a round ends with: a step's list without the inputs of a step."""
        step = self.step
        given = step.example(kind, self.sent, values, number)
        count = len(given) - step.num_inputs(kind) - len(values)
        return [*given[:count], *given[len(given) - len(values) :]]

    @property
    def keeps(self) -> list[str]:
        """Names of the client's state that a round ends with."""
        return [name.removeprefix("state/") for name, _ in self.leaves if name.startswith("state/")]

    def room(self, block: Block) -> list[Tensor]:
        """Return where a round leaves what it ends with, (K, …) each; what is new is made room for in a block."""
        places = []
        for name, value in self.leaves:
            group, _, key = name.partition("/")
            if group == "state":
                places.append(block.state[key])
            elif group == "extra":
                empty = value.new_empty(len(block.weights), *value.shape)
                places.append(block.extras.setdefault(key, empty))
            else:
                places.append(block.weights)
        return places

    def _coming(self) -> list[Kind]:
        """Return the kinds of steps that clients have, of which a cohort may have met some only."""
        if self.sizes.turns or self.step.of_batch:  # many more, few of which ever come
            return []
        first, found = self._program(self._kind(self.full)), []
        for size, padded in batches_of(self.step.task.partition.sizes, self.sizes):
            kind = self._kind(size, padded=padded)
            with contextlib.suppress(NotRecordable):  # who meets it will be told
                program = self._program(kind)
                if (program.deferral, program.seen) == (first.deferral, first.seen):  # what `loop` asks for
                    found.append(kind)
        return found

    def loop(self, steps: Steps) -> Callable[..., None]:
        """Return the loop over all kinds of steps met so far, and number some steps by it.

        Compiling takes 20 ms, whatever there is to compile: kinds that other clients will need are compiled at once.
        """
        kinds = [self._kind(size, padded=padded, turn=turn) for size, padded, turn in steps.kinds]
        new = [kind for kind in kinds if kind not in self.known]
        if new or self._loop is None:
            known = list(dict.fromkeys([*self.known, *new, *self._coming()]))
            programs = [self._program(kind) for kind in known]
            if len({(program.deferral, program.seen) for program in programs}) > 1:
                raise NotRecordable("batches of some sizes do other things than batches of others")
            self._loop, self.known = compiled(programs, [kind.padded for kind in known], self.ends), known
        steps.program = np.array([self.known.index(kind) for kind in kinds], dtype=np.int64)[steps.program]
        return self._loop


def _hold(mine: list[Tensor], theirs: list[Tensor]) -> None:
    """Hold what a program did against what the function itself did.

    Raises:
        ValueError: they differ.

    """
    pairs = zip(mine, theirs, strict=True)
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs):
        raise ValueError("a recorded step differs from the step itself: it depends on more than its inputs")


def _numbers(constants: list[Tensor]) -> list[Any]:
    """Return constants as what can be compared."""
    return [(tuple(value.shape), str(value.dtype), value.flatten()[:64].tolist()) for value in constants]
