"""Several runs in one process: those that can train as one program do, the others go one after another."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedsim import checkpoint
from fedsim.console import Observer
from fedsim.data.kept import is_keeping, keeping
from fedsim.engine.meeting import Meeting, Together
from fedsim.engine.replay import Replay
from fedsim.engine.replicas import why_apart
from fedsim.errors import UserError
from fedsim.experiment import Experiment
from fedsim.simulation import Launch, Result
from fedsim.threads import take_threads

Outcome = Result | BaseException


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """One of several runs: how to build it, and who is told of it."""

    launch: Callable[[], Launch]
    observer: Observer


def together(entrants: Sequence[Entrant], ended: Callable[[int, Outcome], None]) -> None:
    """Do several runs of one process, and train those as one program that can be.

    A run that fails stops no other. One whose engine does not batch clients is done by itself, one after another, so
    that one alone is in memory; data are shared by all.

    Args:
        entrants: the runs.
        ended: told of each run's number and what came of it, when it ends.

    """
    waiting: dict[int, Launch] = {}
    with nullcontext() if is_keeping() else keeping({}):
        try:
            refused: list[UserError] = []
            for i, entrant in enumerate(entrants):
                same = len({str(error) for error in refused}) == 1 and len(refused) > 1  # so is it with the others
                built = refused[0] if same else _tried(entrant.launch)
                if isinstance(built, BaseException):
                    refused += [built] if isinstance(built, UserError) else []
                    ended(i, built)
                elif isinstance(built.experiment.engine, Together):
                    waiting[i] = built
                else:
                    ended(i, _tried(partial(built.go, entrant.observer)))
                    del built
                    gc.collect()
            _meet(waiting, entrants, ended)
        finally:
            for built in waiting.values():
                built.experiment.engine.close()


def _tried(act: Callable[[], Any]) -> Any:
    try:
        return act()
    except (Exception, SystemExit) as error:  # whatever one run does, the others go on
        return error


def _meet(waiting: Mapping[int, Launch], entrants: Sequence[Entrant], ended: Callable[[int, Outcome], None]) -> None:
    """Run all that wait to their ends, as one program where they fit."""
    if not waiting:
        return
    _rewind([built.folder for built in waiting.values() if built.saved is not None])
    meeting, leader = Meeting(), next(iter(waiting.values())).experiment
    shared: set[int] = set()
    for i, built in waiting.items():
        why = _why_apart(leader, built.experiment)
        if why is None:
            shared.add(i)
        else:
            entrants[i].observer.note(f"its clients train apart from the other runs': {why}")
    bodies = []
    replay = Replay()
    for i, built in waiting.items():
        experiment = built.experiment
        engine: Any = leader.engine if i in shared else experiment.engine
        plan = {**experiment.plan, "replicas": len(shared) if i in shared else 1}
        notes = experiment.notes if experiment is leader else []  # the others' are the same
        seated = replace(experiment, engine=meeting.seat(engine, experiment.task), plan=plan, notes=notes)
        if seated.mimic is not None and i in shared:
            seated.mimic.seat, seated.mimic.replay = seated.engine, replay
        bodies.append(partial(_body, i, replace(built, experiment=seated), entrants[i].observer, ended))
    meeting.run(bodies)


def _body(number: int, built: Launch, observer: Observer, ended: Callable[[int, Outcome], None]) -> None:
    take_threads(built.experiment.plan["threads"])
    ended(number, _tried(partial(built.go, observer)))


def _why_apart(leader: Experiment, other: Experiment) -> str | None:
    if dict(leader.engine.plan) != dict(other.engine.plan):
        return "their engines differ"
    return why_apart(leader.task, other.task)


def _rewind(folders: Sequence[Path]) -> None:
    """Let runs that were cut off go on from one round, so that they meet as they did before: their bits ask for it."""
    known = [set(checkpoint.rounds(folder / "checkpoints")) for folder in folders]
    common = set.intersection(*known) if known else set()
    for folder in folders if common else ():
        checkpoint.forget(folder / "checkpoints", max(common))
