"""An experiment from its YAML to its verdicts: search on validation data, runs of new seeds, tests."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fedsim.config import compose
from fedsim.construct import construct
from fedsim.errors import UserError
from fedsim.files import atomic
from fedsim.folder import locked
from fedsim.metrics.records import plain
from fedsim.misfit import quoted
from fedsim.study import page, verdict
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
OTHER_SEEDS = 10_000  # added to the seed of a reseeded arm
_PLACE = ("data.root", "device", "threads")  # where it runs, not what
_KEPT = ("partition.seed", "model.seed", "sampler.seed")


@dataclass(frozen=True)
class Asked:
    """An experiment as the command line asks for it."""

    name: str
    study: Study
    words: tuple[str, ...]  # overrides of all runs beyond the YAML's
    changed: tuple[str, ...]  # what is not as the YAML has it
    config_dir: Path | None


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
    machine: Machine = construct(Machine, words.own["sweep"], "sweep")
    changes = words.own["experiment"]
    asked = Asked(
        name, build({**load(name, config_dir), **changes}), words.fixed,
        (*(text for text in words.fixed if text.split("=")[0] not in _PLACE),
         *(f"experiment.{key}={value}" for key, value in changes.items())),
        config_dir,
    )  # fmt: skip
    folder = Path(words.folder or f"outputs/experiments/{name}")
    _claim_folder(folder, asked)
    start_server()
    cpu = any(text == "device=cpu" for text in (*asked.study.base, *asked.words))
    devices = machine.devices(cpu=cpu)
    threads = threads_for(len(devices), read(merged(asked.study.base, asked.words)))
    try:
        with locked(folder), Pool(devices) as pool:
            chosen = _choose(asked, folder, threads, pool, board, machine)
            rows = _runs(asked, chosen, folder, threads, pool, board, machine)
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


def _claim_folder(folder: Path, asked: Asked) -> None:
    """Make the folder, or find that it is this experiment's."""
    tree = {"name": asked.name, "words": list(asked.words), "changed": list(asked.changed),
            "spec": load(asked.name, asked.config_dir)}  # fmt: skip
    path = folder / FILE
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != json.loads(json.dumps(tree)):
            raise UserError(
                f"{folder} holds another experiment, or this one as it was; choose {quoted('hydra.sweep.dir', '…')}"
            )
        return
    for arm in asked.study.methods.values():  # a wrong word is found before anything runs
        compose(_overrides(asked, asked.study.cells[0], arm, arm.points()[0], 0), config_dir=asked.config_dir)
    first = next(iter(asked.study.methods.values()))
    for cell in asked.study.cells[1:]:
        compose(_overrides(asked, cell, first, first.points()[0], 0), config_dir=asked.config_dir)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty, and holds no experiment; choose another hydra.sweep.dir")
    _write(path, tree)


def _overrides(asked: Asked, cell: Point, arm: Arm, point: Point, seed: int) -> list[str]:
    """Return the overrides of one run. Partition, initial model and cohorts follow from the seed in every arm.

    What a command changes, it changes in all arms but those that set it themselves: a run cut short stays one.
    """
    own = {_key(text) for text in arm.set}
    words = [text for text in asked.words if _key(text) not in own]
    seeds = [f"seed={seed}"]
    if arm.reseed:
        seeds = [f"seed={seed + OTHER_SEEDS}", *(f"{name}={seed}" for name in _KEPT)]
    return merged(asked.study.base, cell[0], arm.set, point[0], words, seeds)


def _key(text: str) -> str:
    return bare(text.split("=", 1)[0])


def _plan(asked: Asked, listed: Sequence[tuple[Point, str, Point, int]], threads: int | None) -> Plan:
    points = []
    for cell, name, point, seed in listed:
        own = _overrides(asked, cell, asked.study.methods[name], point, seed)
        points.append((tuple(own), {**cell[1], "arm": name, **point[1], "seed": seed}))
    folder = None if asked.config_dir is None else str(asked.config_dir)
    return Plan(words=asked.words, config_dir=folder, threads=threads, trials=plans.trials_of(points, (), threads))


def _choose(
    asked: Asked, folder: Path, threads: int | None, pool: Pool, board: Board, machine: Machine
) -> list[dict[str, Any]]:
    """Return the point of each cell and arm, by the mean of validation figures over the tuning seeds."""
    study = asked.study
    seeds = range(FIRST_TUNING_SEED, FIRST_TUNING_SEED + study.tuning_seeds)
    own = {name: arm for name, arm in study.methods.items() if arm.like is None}
    rows: list[table.Row] = []
    if study.tuned:
        listed = [
            (cell, name, point, seed)
            for cell in study.cells for name, arm in own.items() for point in arm.points() for seed in seeds
        ]  # fmt: skip
        plan = _plan(asked, listed, threads)
        board.note(f"search: {len(plan.trials)} runs, chosen by {study.tuning_metric} of the last round")
        (folder / "search").mkdir(exist_ok=True)
        rows = execute(plan, folder / "search", pool, board, batch=machine.batch)
    chosen, at = [], 0
    for cell in study.cells:
        for name, arm in own.items():
            points, scores = arm.points(), []
            for _ in points:
                mine, at = rows[at : at + len(seeds)], at + len(seeds)
                scores.append(search.score(mine, study.tuning_metric))
            best = search.best(scores, study.tuning_metric) if study.tuned else 0
            if best is None:
                raise RuntimeError(f"every run of the search failed for {name} at {page.cell_name(cell[1])}")
            words = read(arm.tune)
            near = search.edges(points[best][1], words.axes, words.intervals) if len(points) > 1 else ()
            edges = [f"{key}={value} is the {end} that was tried" for key, value, end in near]
            chosen.append({
                "cell": page.cell_name(cell[1]), "arm": name, "point": points[best][1],
                "overrides": list(points[best][0]), "score": scores[best] if study.tuned else None, "edges": edges,
            })  # fmt: skip
            for line in edges:
                board.warn(f"{name}, {page.cell_name(cell[1])}: {line}")
    return chosen


def _runs(  # noqa: PLR0913  as `_choose`
    asked: Asked, chosen: Sequence[Mapping[str, Any]], folder: Path, threads: int | None, pool: Pool, board: Board,
    machine: Machine,
) -> list[table.Row]:  # fmt: skip
    """Run every arm at its point with the seeds of the report."""
    points = {(one["cell"], one["arm"]): (tuple(one["overrides"]), one["point"]) for one in chosen}
    listed = [
        (cell, name, points[page.cell_name(cell[1]), arm.like or name], seed)
        for cell in asked.study.cells
        for name, arm in asked.study.methods.items()
        for seed in range(asked.study.seeds)
    ]
    (folder / "report").mkdir(exist_ok=True)
    return execute(_plan(asked, listed, threads), folder / "report", pool, board, batch=machine.batch)


def _judge(asked: Asked, folder: Path, rows: Sequence[table.Row]) -> page.Findings:
    """Test all claims, their controls, and the two controls of the experiment itself."""
    study = asked.study
    figures: dict[tuple[str, str], list[float]] = {}
    names = {page.cell_name(cell[1]): cell[1] for cell in study.cells}
    for row in rows:
        cell = page.cell_name({key: row[key] for key in next(iter(names.values()))})
        figures.setdefault((cell, row["arm"]), []).append(_figure(study, folder / "report", row))

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
    return page.Findings(lines, checks, means, diverged)


def _figure(study: Study, folder: Path, row: Mapping[str, Any]) -> float:
    """Return what is compared of one run: the worst value, ±∞, where its metric is not finite."""
    lines = (folder / row["trial"] / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    rounds = [json.loads(line) for line in lines]
    if study.target is None:
        ends: list[Mapping[str, Any]] = [row, *reversed(rounds)]
        known: Mapping[str, Any] = next((found for found in ends if study.metric in found), {})
        value = known.get(study.metric, "")
        if value is None:  # what is not finite is written as null
            return -study.sign * math.inf
        if not isinstance(value, int | float):
            raise UserError(f"metric: runs have no {study.metric}; they have {', '.join(sorted({*row, *rounds[-1]}))}")
        return float(value)
    if not any(study.along in found for found in rounds):
        raise UserError(f"along: rounds have no {study.along}; they have {', '.join(sorted(rounds[-1]))}")
    along = 0.0
    for found in rounds:
        step = float(found.get(study.along) or 0.0)  # a round in which nobody arrived has no bytes_up
        along = along + step if study.along == "bytes_up" else max(along, step)
        value = found.get(study.metric)
        reached = value is not None and (value >= study.target if study.better == "higher" else value <= study.target)
        if reached:
            return along
    return along


def _write(path: Path, tree: Any) -> None:
    with atomic(path) as file:
        file.write(json.dumps(plain(tree), indent=1, ensure_ascii=False, allow_nan=False).encode() + b"\n")
