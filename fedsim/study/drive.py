"""An experiment from its YAML to its verdicts: search on validation data, runs of new seeds, tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fedsim.config import compose
from fedsim.errors import UserError
from fedsim.files import atomic
from fedsim.folder import locked
from fedsim.metrics.records import plain
from fedsim.misfit import quoted
from fedsim.study import page, verdict
from fedsim.study.figure import figure
from fedsim.study.spec import FIRST_TUNING_SEED, Arm, Study, build, load, merged
from fedsim.sweep import plan as plans
from fedsim.sweep import search, table
from fedsim.sweep.board import Board
from fedsim.sweep.drive import Machine, execute, threads_for
from fedsim.sweep.grammar import bare, read
from fedsim.sweep.plan import Plan
from fedsim.sweep.pool import Pool, start_server
from fedsim.sweep.search import Point

FILE = "experiment.json"
MOST_RUNS = 10_000  # that the numbers in trials' names are wide enough for
OTHER_SEEDS = 10_000  # added to the seed of a reseeded arm
_PLACE = ("data.root", "device", "threads")  # where it runs, not what
_KEPT = ("partition.seed", "model.seed", "sampler.seed", "++attack.seed")  # an attack of one's own may have none


@dataclass(frozen=True)
class Asked:
    """An experiment as the command line asks for it."""

    name: str
    study: Study
    words: tuple[str, ...]  # overrides of all runs beyond the YAML's
    changed: tuple[str, ...]  # what is not as the YAML has it
    config_dir: Path | None


@dataclass(frozen=True)
class Place:
    """Where an experiment runs."""

    folder: Path
    order: Sequence[str]  # of the arms, as they came: so a trial keeps its name when arms come later
    threads: int | None
    pool: Pool
    board: Board
    machine: Machine


def experiment(name: str, given: Sequence[str], config_dir: Path | None, board: Board) -> tuple[Path, str]:
    """Run an experiment, or go on with it; return its folder and its section of a page of results.

    Args:
        name: of `configs/experiment/NAME.yaml`.
        given: overrides for all runs, `experiment.seeds=…` for what the YAML says, `sweep.…`, `hydra.sweep.dir`.
        config_dir: folder of further choices.
        board: who is told.

    Raises:
        UserError: something is wrong in what was asked, or the folder holds another experiment.
        RuntimeError: runs failed; all others were done.

    """
    words = read(given, config_dir, ("sweep", "experiment"))
    if words.axes or words.intervals:
        raise UserError("an experiment's settings have one value each; several are the YAML's to say")
    machine: Machine = words.settings(Machine, "sweep")
    changes = words.own["experiment"]
    asked = Asked(
        name, build({**load(name, config_dir), **changes}), words.fixed,
        (*(text for text in words.fixed if text.split("=")[0] not in _PLACE),
         *(f"experiment.{key}={value}" for key, value in changes.items())),
        config_dir,
    )  # fmt: skip
    folder = Path(words.folder or f"outputs/experiments/{name}")
    order = _claim_folder(folder, asked)
    start_server()
    cpu = any(text == "device=cpu" for text in (*asked.study.base, *asked.words))
    devices = machine.devices(cpu=cpu)
    threads = threads_for(len(devices), read(merged(asked.study.base, asked.words)))
    try:
        with locked(folder), Pool(devices) as pool:
            place = Place(folder, order, threads, pool, board, machine)
            chosen = _choose(asked, place)
            rows = _runs(asked, chosen, place)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; the same command goes on in {folder}") from error
    failed = sum(row["state"] != "done" for row in rows)
    if failed:
        raise RuntimeError(f"{failed} of {len(rows)} runs failed; the same command tries them again")
    found = _judge(asked, folder, rows)
    text = page.section(name, asked.study, found, chosen, asked.changed)
    _write(folder / "results.json", page.tree(found, chosen))
    (folder / "results.md").write_text(text, encoding="utf-8")
    return folder, text


def _claim_folder(folder: Path, asked: Asked) -> list[str]:
    """Make the folder, or find that it is this experiment's; return its arms in the order in which they came.

    Arms may come later, and what is claimed of them: runs do not depend on it.
    """
    spec = load(asked.name, asked.config_dir)
    tree = {"name": asked.name, "words": list(asked.words), "changed": list(asked.changed), "spec": spec}
    path = folder / FILE
    if path.exists():
        there = json.loads(path.read_text(encoding="utf-8"))
        known = there.pop("arms")
        if not _grown(there, json.loads(json.dumps(tree))):
            raise UserError(
                f"{folder} holds another experiment, or this one as it was; choose {quoted('hydra.sweep.dir', '…')}"
            )
    else:
        known = []
    new = [name for name, arm in asked.study.methods.items() if name not in known and not arm.best]
    arms = [*known, *new]
    for arm in (asked.study.methods[name] for name in new):  # a wrong word is found before anything runs
        compose(_overrides(asked, asked.study.cells[0], arm, arm.points()[0], 0), config_dir=asked.config_dir)
    first = asked.study.methods[arms[0]]
    for cell in asked.study.cells[1:]:
        compose(_overrides(asked, cell, first, first.points()[0], 0), config_dir=asked.config_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if not known and any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and holds no experiment; choose another hydra.sweep.dir")
    _write(path, {**tree, "arms": arms})
    return arms


def _grown(old: dict[str, Any], new: dict[str, Any]) -> bool:
    """Return whether a description is another's with nothing but further arms and other claims."""
    free = ("arms", "claims", "null_control", "positive_control", "smallest", "beside")
    before, after = old.pop("spec"), dict(new)
    spec = after.pop("spec")
    kept = {name: spec["arms"].get(name) for name in before["arms"]} == before["arms"]
    same = {key: before[key] for key in before if key not in free} == {
        key: spec[key] for key in spec if key not in free
    }
    return old == after and kept and same


def _overrides(asked: Asked, cell: Point, arm: Arm, point: Point, seed: int, run: str = ".") -> list[str]:
    """Return the overrides of one run. Partition, initial model and cohorts follow from the seed in every arm.

    What a command changes, it changes in all arms but those that set it themselves: a run cut short stays one.
    """
    own = {_key(text) for text in arm.set}
    words = [text for text in asked.words if _key(text) not in own]
    other, kept = (OTHER_SEEDS, [f"{name}={seed}" for name in _KEPT]) if arm.reseed else (0, [])
    replays = [] if arm.replays is None else [plans.setting("strategy.run", run)]
    return merged(kept, asked.study.base, cell[0], arm.set, point[0], replays, words, [f"seed={seed + other}"])


def _key(text: str) -> str:
    return bare(text.split("=", 1)[0])


def _plan(asked: Asked, listed: Sequence[tuple[str, Point, Point, int]], place: Place, report: Path) -> Plan:
    """Return the plan of runs of (arm, cell, point, seed)."""
    points = [((), {**cell[1], "arm": name, **point[1], "seed": seed}) for name, cell, point, seed in listed]
    names = [trial.name for trial in plans.trials_of(points, (), None, total=MOST_RUNS)]
    where = {(name, id(cell), seed): at for at, (name, cell, _, seed) in zip(names, listed, strict=True)}
    trials = []
    for at, (name, cell, point, seed), (_, values) in zip(names, listed, points, strict=True):
        arm = asked.study.methods[name]
        run = str(report / where[arm.replays, id(cell), seed]) if arm.replays else "."
        own = [] if place.threads is None else [f"threads={place.threads}"]
        trials.append(plans.Trial(
            name=at, overrides=(*own, *_overrides(asked, cell, arm, point, seed, run)), values=values,
        ))  # fmt: skip
    folder = None if asked.config_dir is None else str(asked.config_dir)
    return Plan(words=asked.words, config_dir=folder, threads=place.threads, trials=tuple(trials))


def _choose(asked: Asked, place: Place) -> list[dict[str, Any]]:
    """Return the point of each cell and arm, by the mean of validation figures over the tuning seeds."""
    study, cells = asked.study, asked.study.cells
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + study.tuning_seeds)
    own = {name: study.methods[name] for name in place.order if study.methods[name].like is None}
    figures: dict[tuple[str, int], list[table.Row]] = {}  # (arm, cell) → its runs, point by point
    if study.tuned:
        listed = [
            (name, cell, point, seed)
            for name, arm in own.items() for cell in cells for point in arm.points() for seed in seeds
        ]  # fmt: skip
        plan = _plan(asked, listed, place, place.folder / "search")
        place.board.note(f"search: {len(plan.trials)} runs, chosen by {study.tuning_metric} of the last round")
        (place.folder / "search").mkdir(exist_ok=True)
        rows = execute(plan, place.folder / "search", place.pool, place.board, batch=place.machine.batch)
        for (name, cell, _, _), row in zip(listed, rows, strict=True):
            figures.setdefault((name, cells.index(cell)), []).append(row)
    return [_best(asked, name, number, figures, place) for number in range(len(cells)) for name in own]


def _best(
    asked: Asked, name: str, number: int, figures: Mapping[tuple[str, int], list[table.Row]], place: Place
) -> dict[str, Any]:
    """Return the point that an arm takes in a cell."""
    study, count = asked.study, asked.study.tuning_seeds
    arm, cell = study.methods[name], page.cell_name(study.cells[number][1])
    points, rows = arm.points(), figures.get((name, number), [])
    scores = [search.score(rows[at : at + count], study.tuning_metric) for at in range(0, len(rows), count)]
    best = search.best(scores, study.tuning_metric) if study.tuned else 0
    if best is None:
        raise RuntimeError(f"every run of the search failed for {name} at {cell}")
    words = read(arm.tune)
    near = search.edges(points[best][1], words.axes, words.intervals) if len(points) > 1 else ()
    edges = [f"{key}={value} is the {end} that was tried" for key, value, end in near]
    for line in edges:
        place.board.warn(f"{name}, {cell}: {line}")
    return {
        "cell": cell, "arm": name, "point": points[best][1], "overrides": list(points[best][0]),
        "score": scores[best] if study.tuned else None, "edges": edges,
    }  # fmt: skip


def _runs(asked: Asked, chosen: Sequence[Mapping[str, Any]], place: Place) -> list[table.Row]:
    """Run every arm at its point with the seeds of the report; arms that replay others' runs after those."""
    study, folder = asked.study, place.folder / "report"
    points = {(one["cell"], one["arm"]): (tuple(one["overrides"]), one["point"]) for one in chosen}
    cells = study.cells
    listed = [
        (name, cell, points[page.cell_name(cell[1]), study.methods[name].like or name], seed)
        for name in place.order for cell in cells for seed in range(study.seeds)
    ]  # fmt: skip
    folder.mkdir(exist_ok=True)
    plan = _plan(asked, listed, place, folder)
    alone = tuple(trial for trial in plan.trials if study.methods[trial.values["arm"]].replays is None)
    rows = execute(replace(plan, trials=alone), folder, place.pool, place.board, batch=place.machine.batch)
    if len(alone) == len(plan.trials):
        return rows
    return execute(plan, folder, place.pool, place.board)


def _judge(asked: Asked, folder: Path, rows: Sequence[table.Row]) -> page.Findings:
    """Test all claims, their controls, and the two controls of the experiment itself."""
    study = asked.study
    figures: dict[tuple[str, str], list[float]] = {}
    names = {page.cell_name(cell[1]): cell[1] for cell in study.cells}
    asides = {metric: replace(study, metric=metric, target=None, scale="linear") for metric in study.beside}
    beside: dict[str, dict[tuple[str, str], list[float]]] = {metric: {} for metric in asides}
    for row in rows:
        key = page.cell_name({key: row[key] for key in next(iter(names.values()))}), row["arm"]
        figures.setdefault(key, []).append(figure(study, folder / "report", row))
        for metric, aside in asides.items():
            beside[metric].setdefault(key, []).append(figure(aside, folder / "report", row))

    best = max if study.sign > 0 else min
    for cell in names:
        for name, arm in study.methods.items():
            if arm.best:  # a seed's figure is that of the best of some arms in that seed
                figures[cell, name] = [
                    best(values) for values in zip(*(figures[cell, a] for a in arm.best), strict=True)
                ]

    def effect(cell: str, arm: str, baseline: str) -> verdict.Effect:
        runs = figures[cell, arm], figures[cell, baseline]
        return verdict.effect(cell, (arm, baseline), runs, sign=study.sign, smallest=study.smallest)

    asks = [(claim, cell) for claim in study.questions for cell in names]
    claimed = verdict.adjusted([effect(cell, claim.arm, claim.baseline) for claim, cell in asks])
    pairs = [(i, control) for i, (claim, _) in enumerate(asks) for control in claim.controls]
    against = verdict.adjusted([effect(asks[i][1], asks[i][0].arm, control) for i, control in pairs])
    lines = []
    for i, ((claim, _), one) in enumerate(zip(asks, claimed, strict=True)):
        controls = {control: e for (j, control), e in zip(pairs, against, strict=True) if j == i}
        lines.append(page.Line(claim, one, controls, verdict.verdict(one, controls, study.smallest)))
    checks = {
        role: verdict.adjusted([effect(cell, pair["arm"], pair["baseline"]) for cell in names])
        for role, pair in (("null", study.null_control), ("positive", study.positive_control))
        if pair is not None
    }
    finite = {key: [value for value in values if math.isfinite(value)] for key, values in figures.items()}
    means = {key: sum(values) / len(values) if values else math.nan for key, values in finite.items()}
    diverged = {key: len(values) - len(finite[key]) for key, values in figures.items()}
    others = {metric: {key: sum(v) / len(v) for key, v in values.items()} for metric, values in beside.items()}
    return page.Findings(lines, checks, means, diverged, others)


def _write(path: Path, tree: Any) -> None:
    with atomic(path) as file:
        file.write(json.dumps(plain(tree), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
