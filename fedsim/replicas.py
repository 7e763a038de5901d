"""Replicas: one experiment with several seeds, side by side, as rows of one batched program."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedsim import checkpoint
from fedsim.chorus import Chorus
from fedsim.config import Config, compose, from_tree, parse, plain
from fedsim.console import Observer
from fedsim.data.kept import is_keeping, keeping
from fedsim.engine.replicas import Meeting, Together, why_apart
from fedsim.errors import UserError
from fedsim.experiment import Experiment
from fedsim.folder import locked
from fedsim.misfit import quoted
from fedsim.objects import with_parts
from fedsim.partition.picture import drawn_once
from fedsim.saved import claim_run_dir, has_fixed_folder
from fedsim.simulation import Launch, Result, launch, relaunch
from fedsim.sweep import plan as plans
from fedsim.sweep import table
from fedsim.sweep.board import cell, what_intervals_are
from fedsim.sweep.plan import Plan, Trial

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
    for i, built in waiting.items():
        experiment = built.experiment
        engine: Any = leader.engine if i in shared else experiment.engine
        plan = {**experiment.plan, "replicas": len(shared) if i in shared else 1}
        seated = replace(experiment, engine=meeting.seat(engine, experiment.task), plan=plan)
        bodies.append(partial(_body, i, replace(built, experiment=seated), entrants[i].observer, ended))
    meeting.run(bodies)


def _body(number: int, built: Launch, observer: Observer, ended: Callable[[int, Outcome], None]) -> None:
    torch.set_num_threads(built.experiment.plan["threads"])  # a thread has its own number
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


def run(config: Config, observer: Observer, parts: Mapping[str, Any] | None = None) -> list[Result]:
    """Run `replicas` of a composed config, with the seeds seed, seed + 1, …, in folders of its run folder.

    Raises:
        UserError: none of them can be run.
        RuntimeError: some failed; all others were done.

    """
    parts = dict(parts or {})
    if "tracker" in parts:
        raise UserError("tracker: one object cannot follow several replicas; name its class: tracker._target_=…")
    if callable(parts.get("data")):
        parts["data"] = parts["data"]()
    parent = with_parts(config, parts) if parts else config
    folder = Path(parent.hydra.run.dir)
    if has_fixed_folder(config) and any((folder / name).exists() for name in ("plan.json", plans.FILE)):
        raise UserError(f"{folder} holds runs already; go on with `fedsim run resume={folder}` or choose another")
    folder = claim_run_dir(parent)
    seeds = range(config.seed, config.seed + config.replicas)
    width = len(str(seeds[-1]))
    configs = _configs(config, [(seed, folder / f"seed-{seed:0{width}d}") for seed in seeds])
    trials = tuple(
        Trial(
            name=Path(one.hydra.run.dir).name,
            overrides=tuple(text for text in one.hydra.overrides.task if parse(text).key != "hydra.run.dir"),
            values={"seed": one.seed},
        )
        for one in configs
    )
    words = tuple(text for text in config.hydra.overrides.task if parse(text).key != "hydra.run.dir")
    plan = Plan(
        words=words, config_dir=config.hydra.runtime.config_dir, threads=config.threads, trials=trials,
        parts=tuple(sorted(parts)),
    )  # fmt: skip
    launches = {
        trial.name: partial(_launch, one, parts, len(trials)) for trial, one in zip(trials, configs, strict=True)
    }
    return _drive(plan, folder, launches, observer)


def _launch(config: Config, parts: Mapping[str, Any], beside: int) -> Launch:
    strategy = parts.get("strategy")
    if strategy is not None and not callable(strategy):
        raise UserError("strategy: a Flower strategy keeps state, so replicas cannot share one: name it by its choice")
    return launch(config, parts, beside=beside)


def _configs(config: Config, places: Sequence[tuple[int, Path]]) -> list[Config]:
    """Return the config of each (seed, folder): as it would be composed, at a fraction of the price.

    Only the last one is composed; where it differs in more than its seed, something reads the seed, and all are.
    """
    task = [text for text in config.hydra.overrides.task if _key(text) not in ("seed", "replicas", "hydra.run.dir")]
    config_dir = plans.path(config.hydra.runtime.config_dir)
    lists = [[*task, f"seed={seed}", plans.setting("hydra.run.dir", str(folder))] for seed, folder in places]
    last = compose(lists[-1], config_dir=config_dir)
    if {**plain(config), "hydra": None, "seed": last.seed, "replicas": 1} != {**plain(last), "hydra": None}:
        return [compose(words, config_dir=config_dir) for words in lists]
    configs = []
    for (seed, folder), words in zip(places, lists, strict=True):
        tree = plain(last) | {"seed": seed}
        tree["hydra"] |= {"run": {"dir": str(folder)}, "overrides": {"task": words}}
        configs.append(from_tree(tree))
    return configs


def _key(text: str) -> str:
    return parse(text).key


def is_set(folder: Path) -> bool:
    """Say whether a folder is that of replicas."""
    try:
        return any(_key(word) == "replicas" for word in plans.load(folder).words)
    except UserError:  # a run's, or nothing of fedsim's, or a sweep with several values
        return False


def resume(folder: Path, overrides: Sequence[str], given_dir: Path | None, observer: Observer) -> list[Result]:
    """Go on with the replicas of a folder that are not done, or, for more rounds, with all.

    Args:
        folder: of the replicas.
        overrides: as for one run.
        given_dir: folder of further choices, the same as at first; None: that one.
        observer: who is told.

    Raises:
        UserError: they were made of objects, or cannot be gone on with.
        RuntimeError: some failed; all others were done.

    """
    plan = plans.load(folder)
    if plan.parts:
        raise UserError(
            f"resume={folder}: the replicas were started from Python with objects for {', '.join(plan.parts)}; "
            "call fedsim.simulate again"
        )
    config_dir = plans.path(plan.config_dir)
    if given_dir is not None and (config_dir is None or config_dir.resolve() != given_dir.resolve()):
        raise UserError(f"--config-dir {given_dir}: a resumed run keeps its config, which was made with {config_dir}")
    launches: dict[str, Callable[[], Launch]] = {}
    for trial in plan.trials:
        own = folder / trial.name
        if (own / "plan.json").exists():
            if overrides or table.summary_of(own) is None:
                launches[trial.name] = partial(relaunch, own, overrides)
        else:
            words = [*trial.overrides, plans.setting("hydra.run.dir", str(own)), *overrides]
            launches[trial.name] = partial(_from_words, words, config_dir, len(plan.trials))
    return _drive(plan, folder, launches, observer)


def _from_words(words: Sequence[str], config_dir: Path | None, beside: int) -> Launch:
    return launch(compose(words, config_dir=config_dir), beside=beside)


def _drive(plan: Plan, folder: Path, launches: Mapping[str, Callable[[], Launch]], observer: Observer) -> list[Result]:
    """Run replicas, keep their table, and say what came of all of them."""
    trials = {trial.name: trial for trial in plan.trials}
    rows = {name: table.row(trial, folder) for name, trial in trials.items()}
    names, results = list(launches), dict[str, Result]()
    errors = dict[str, BaseException]()
    chorus = Chorus(observer, [f"seed {trials[name].values['seed']}" for name in names])

    def ended(i: int, outcome: Outcome) -> None:
        name, error = names[i], None
        if isinstance(outcome, BaseException):
            errors[name], error = outcome, str(outcome) or type(outcome).__name__
            chorus.voices[i].warn(error)
        else:
            results[name] = outcome
        rows[name] = table.row(trials[name], folder, error)
        chorus.voices[i].end()

    with locked(folder):
        plans.save(plan, folder)
        table.write(plan, folder, list(rows.values()))
        try:
            entrants = [Entrant(launch=launches[n], observer=v) for n, v in zip(names, chorus.voices, strict=True)]
            with TemporaryDirectory() as pictures, drawn_once(Path(pictures)):  # seeds may share their partition
                together(entrants, ended)
        finally:
            table.write(plan, folder, list(rows.values()))
        if names and len(errors) == len(names) and all(isinstance(error, UserError) for error in errors.values()):
            _forget(folder, names)
            raise next(iter(errors.values()))
        table.write_parquet(folder, list(rows.values()))
    _tell(list(rows.values()), folder, observer)
    if errors:
        raise _failure(errors, plan, folder) from next(iter(errors.values()))
    return [results[name] for name in names]


def _failure(errors: Mapping[str, BaseException], plan: Plan, folder: Path) -> RuntimeError:
    """Return what says how many failed, why the first one did, and what to do."""
    name, first = next(iter(errors.items()))
    why = (str(first).strip().splitlines() or [""])[0] or type(first).__name__
    again = "call fedsim.simulate again" if plan.parts else f"again: fedsim run {quoted('resume', str(folder))}"
    return RuntimeError(f"{len(errors)} of {len(plan.trials)} replicas failed ({name}: {why}); {again}")


def _forget(folder: Path, names: Sequence[str]) -> None:
    """Leave no folder of replicas of which none could be built."""
    if not any((folder / name).exists() for name in names):
        for file in (plans.FILE, "sweep.json", ".lock"):
            (folder / file).unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it
            folder.rmdir()


def _tell(rows: list[table.Row], folder: Path, observer: Observer) -> None:
    means = table.means(rows, ["seed"], table.SHOWN)
    if said := what_intervals_are(means):
        observer.note(said)
    named = {"replicas" if name == "trials" else name: cell(name, value) for name, value in means[0].items() if value}
    observer.finish(named | {"folder": str(folder)})
