"""Fair tuning: every method is tried at the same points, the choice reads validation data alone, new seeds report it.

    fedsim tune strategy=fedavg,fedld client.lr=0.03,0.1,0.3 seed='range(5)'

The search has seeds of its own (`tune.seeds`), because the best of many trials is best partly by luck: the runs that
are reported are not among those it was chosen from.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from fedsim.errors import UserError
from fedsim.files import atomic
from fedsim.folder import locked
from fedsim.misfit import quoted
from fedsim.quantities import counted
from fedsim.sweep import plan as plans
from fedsim.sweep import search, table
from fedsim.sweep.adaptive import GENERATION, explore
from fedsim.sweep.board import Board
from fedsim.sweep.drive import Machine, check, execute, going_on, resumable, threads_of
from fedsim.sweep.grammar import Axis, Interval, Words, read
from fedsim.sweep.plan import Plan
from fedsim.sweep.pool import start_server
from fedsim.sweep.search import Point, Tuning, with_seeds

NAMESPACES = ("sweep", "tune")
FILE = "tune.json"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is tuned: methods, the points that each is tried at, and the seeds of both halves."""

    tuning: Tuning
    methods: tuple[Point, ...]
    axes: tuple[Axis, ...]  # of the search space
    intervals: tuple[Interval, ...]
    points: tuple[Point, ...]
    report_seeds: tuple[int, ...]

    @property
    def num_points(self) -> int:
        """Points that each method is tried at."""
        return self.tuning.num_trials if self.tuning.search == "optuna" else len(self.points)


def tune(given: Sequence[str], config_dir: Path | None, board: Board) -> Path:
    """Tune methods and report them, or go on with that; return its folder.

    Args:
        given: words in Hydra's sweep grammar: `tune.each` (by default `strategy`) makes the methods, `seed` the
            reported runs, all other swept keys the search space; or `resume=FOLDER`, alone or with `sweep.…`.
        config_dir: folder of further choices of groups.
        board: who is told.

    Raises:
        UserError: something is wrong in what was asked; no trial has begun.
        RuntimeError: a method that failed at every point, or a reported run that failed.
        KeyboardInterrupt: with what to say about going on.

    """
    words = read(given, config_dir, NAMESPACES)
    machine: Machine = words.settings(Machine, "sweep")
    if words.resume is not None:
        folder = resumable(words, config_dir)
        start_server()
        searching = plans.load(folder / "search")
        words = read(searching.words, plans.path(searching.config_dir), NAMESPACES)
        task = task_of(words)
    else:
        task = task_of(words)
        searching = _search_plan(task, words, given, config_dir, machine, board)
        folder = plans.claim_folder(words.folder, "tune")
        plans.save(searching, _made(folder / "search"))
    threads = searching.threads or words.fixed_value("threads")
    pooled = machine.pool(cpu=words.fixed_value("device") == "cpu", threads=threads)
    with going_on(folder, "tune"), locked(folder), pooled as pool:
        chosen = _chosen(folder)
        if chosen is None:
            board.note(budget(task))
            shown, board.figures = board.figures, ("validation_accuracy", "validation_loss")
            chosen = _searched(task, words, searching, folder / "search", partial(execute, pool=pool, board=board))
            board.figures = shown
            _write(folder, task, chosen)
        reporting = _report_plan(task, words, searching, chosen)
        plans.save(reporting, _made(folder / "report"))
        rows = execute(reporting, folder / "report", pool, board)
    _report(folder, task, chosen, rows, board)
    return folder


def _searched(
    task: Task, words: Words, searching: Plan, folder: Path, do: Callable[[Plan, Path], list[table.Row]]
) -> list[dict[str, Any]]:
    """Do the search, and choose."""
    if task.tuning.search != "optuna":
        return choose(task, do(searching, folder))
    total = len(task.methods) * task.num_points * len(task.tuning.tuning_seeds)

    def run(listed: Sequence[Point]) -> list[table.Row]:
        plan = replace(searching, trials=plans.trials_of(listed, _fixed(words), searching.threads, total))
        plans.save(plan, folder)
        return do(plan, folder)

    points, rows = explore(task.tuning, task.methods, (task.axes, task.intervals), run)
    return choose(task, rows, points)


def task_of(words: Words) -> Task:
    """Sort what is swept into methods, search space and seeds of the report.

    Raises:
        UserError: there is nothing to tune, or the seeds of search and report overlap.

    """
    tuning: Tuning = words.settings(Tuning, "tune")
    swept = {axis.key: axis for axis in words.axes}
    unknown = [key for key in tuning.keys if key not in swept]
    if unknown and "each" in words.own["tune"]:
        raise UserError(f"tune.each: {unknown[0]} has not several values, so it makes no methods")
    methods = tuple(plans.product([axis for key, axis in swept.items() if key in tuning.keys]))
    space = tuple(axis for key, axis in swept.items() if key not in (*tuning.keys, "seed"))
    if not space and not words.intervals:
        raise UserError("nothing to tune: give a setting several values, for example client.lr=0.03,0.1,0.3")
    seeds = swept["seed"].values if "seed" in swept else (words.fixed_value("seed") or 0,)
    both = sorted(set(seeds) & set(tuning.tuning_seeds))
    if both:
        raise UserError(f"seed {both[0]} is in seed= and in tune.seeds: the report must not see the runs of the search")
    try:
        points = tuple(search.points(space, words.intervals, tuning))
    except ValueError as error:
        raise UserError(str(error)) from error
    return Task(
        tuning=tuning, methods=methods, axes=space, intervals=words.intervals, points=points, report_seeds=seeds
    )


def _search_plan(
    task: Task, words: Words, given: Sequence[str], config_dir: Path | None, machine: Machine, board: Board
) -> Plan:
    for config in check(words, config_dir, board):
        if not config.data.validation > 0:
            raise UserError("data.validation=0 leaves nothing to choose by; give it a share of the training data")
    listed = [point for method in task.methods for point in with_seeds(method, task.points, task.tuning.tuning_seeds)]
    units = len(listed) or len(task.methods) * GENERATION
    threads = threads_of(machine, units, words)
    trials = plans.trials_of(listed, _fixed(words), threads)
    return Plan(
        words=tuple(given), config_dir=None if config_dir is None else str(config_dir), threads=threads, trials=trials
    )


def _report_plan(task: Task, words: Words, searching: Plan, chosen: Sequence[dict[str, Any]]) -> Plan:
    """Return the runs of each method at its chosen point, with the seeds of the report."""
    listed = [
        point
        for method, choice in zip(task.methods, chosen, strict=True)
        if choice["point"] is not None
        for point in with_seeds(method, [(tuple(choice["overrides"]), choice["best"])], task.report_seeds)
    ]
    trials = plans.trials_of(listed, _fixed(words), searching.threads)
    return Plan(words=searching.words, config_dir=searching.config_dir, threads=searching.threads, trials=trials)


def _fixed(words: Words) -> list[str]:
    return [text for text in words.fixed if not text.startswith("seed=")]


def choose(
    task: Task, rows: Sequence[table.Row], points: Sequence[Sequence[Point]] | None = None
) -> list[dict[str, Any]]:
    """Choose a point for each method from the rows of the search, in the order of its trials.

    Args:
        task: what is tuned.
        rows: method by method, point by point, seed by seed.
        points: of each method; None: the same for all.

    Returns:
        For each method: its `values`, `point` (position, or None if all failed), `best` (the point's values), the
        `score`, `failed` trials, and `edges`, sentences about numbers on the edge of what was tried.

    """
    metric, each = task.tuning.metric, len(task.tuning.tuning_seeds)
    chosen = []
    for m, (_, values) in enumerate(task.methods):
        own = task.points if points is None else points[m]
        mine = rows[m * len(own) * each : (m + 1) * len(own) * each]
        scores = [search.score(mine[i * each : (i + 1) * each], metric) for i in range(len(own))]
        at = search.best(scores, metric)
        overrides, point = ((), {}) if at is None else own[at]
        found = [] if at is None else search.edges(point, task.axes, task.intervals)
        name = _name(values)
        chosen.append({
            "values": values, "point": at, "best": point, "overrides": list(overrides),
            "score": None if at is None else scores[at],
            "failed": sum(row["state"] != "done" for row in mine),
            "edges": [f"{name}{key}={value} is the {end} that was tried: the best may lie beyond"
                      for key, value, end in found],
        })  # fmt: skip
    return chosen


def budget(task: Task) -> str:
    """Say what every method is given."""
    seeds, number = len(task.tuning.tuning_seeds), task.num_points
    return (
        f"search: {counted(len(task.methods), 'method')}, each {counted(number, 'trial')} × {counted(seeds, 'seed')} = "
        f"{counted(number * seeds, 'run')}, chosen by {task.tuning.metric}; "
        f"then {counted(len(task.report_seeds), 'run')} of each with seeds of their own"
    )


def _report(
    folder: Path, task: Task, chosen: Sequence[dict[str, Any]], rows: Sequence[table.Row], board: Board
) -> None:
    """Write and show the results; say what a reader must know of them."""
    each = len(task.report_seeds)
    found = iter(range(0, len(rows), each))
    for choice in chosen:
        own = [] if choice["point"] is None else list(rows[(start := next(found)) : start + each])
        choice["report"] = table.means(own, [], table.SHOWN)[0] if own else None
    _write(folder, task, chosen)
    if rows:
        table.write_parquet(folder / "report", rows)
    board.finish([_line(task, choice) for choice in chosen], [])
    for choice in chosen:
        for line in choice["edges"]:
            board.warn(line)
    board.note(f"{folder}/{FILE}")
    faults = [f"{_name(c['values'])}every trial of the search failed" for c in chosen if c["point"] is None]
    failed = sum(row["state"] != "done" for row in rows)
    faults += [f"{failed} of {len(rows)} reported runs failed"] if failed else []
    if faults:
        raise RuntimeError(f"{'; '.join(faults)}; again: fedsim tune {quoted('resume', str(folder))}")


def _line(task: Task, choice: dict[str, Any]) -> table.Row:
    """Return a method's line of the table: what was chosen, what the search cost, and what the report's runs gave."""
    figures = dict(choice["report"] or {})
    runs = figures.pop("trials", 0)
    figures.pop("failed", None)
    return {
        **choice["values"], **choice["best"],
        "search_trials": f"{task.num_points} × {counted(len(task.tuning.tuning_seeds), 'seed')}",
        "failed": choice["failed"],
        f"search_{task.tuning.metric}": None if choice["score"] is None else (choice["score"], None),
        "runs": runs, **figures,
    }  # fmt: skip


def _write(folder: Path, task: Task, chosen: Sequence[dict[str, Any]]) -> None:
    """Write `tune.json`: how it was tuned, the budget of every method, and what was chosen."""
    tree = {
        "tuning": asdict(task.tuning),
        "budget": {
            "points": task.num_points, "seeds": list(task.tuning.tuning_seeds),
            "runs": task.num_points * len(task.tuning.tuning_seeds), "report_seeds": list(task.report_seeds),
        },
        "methods": list(chosen),
    }  # fmt: skip
    with atomic(folder / FILE) as file:
        file.write(json.dumps(tree, indent=1, ensure_ascii=False).encode() + b"\n")


def _chosen(folder: Path) -> list[dict[str, Any]] | None:
    """Return what was chosen already: then the search is over, whatever its failed trials would give now."""
    path = folder / FILE
    if not path.exists():
        return None
    try:
        chosen: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["methods"]
    except (OSError, ValueError, KeyError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
    return None if any(choice["point"] is None for choice in chosen) else chosen


def _name(values: Mapping[str, Any]) -> str:
    return "".join(f"{key}={value}: " for key, value in values.items())


def _made(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    return folder
