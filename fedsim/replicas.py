"""Replicas: one experiment with several seeds, side by side, as rows of one batched program."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from fedsim.chorus import Chorus
from fedsim.config import Config, compose, from_tree, parse, plain
from fedsim.console import Observer
from fedsim.errors import UserError
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
from fedsim.together import Entrant, Outcome, together


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
        chorus.release()
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
