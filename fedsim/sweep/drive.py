"""A sweep from the command line to its table."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fedsim.children import num_cores
from fedsim.config import Config, instantiate, notes, plain
from fedsim.construct import construct
from fedsim.errors import UserError
from fedsim.folder import locked
from fedsim.misfit import quoted
from fedsim.quantities import counted
from fedsim.sweep import plan as plans
from fedsim.sweep import table
from fedsim.sweep.board import Board
from fedsim.sweep.cluster import Cluster
from fedsim.sweep.grammar import Words, read
from fedsim.sweep.plan import Plan
from fedsim.sweep.pool import PICTURES, Batch, Event, Job, Pool, start_server

# Groups whose parts are built from their settings alone, and the settings that are fedsim's and not the part's.
_DATALESS = {
    "strategy": (), "client": (), "partition": ("seed", "held_out_clients", "local_validation", "local_test"),
    "sampler": ("seed",), "mode": (),
}  # fmt: skip
_WRITE_EVERY = 1.0  # seconds between two writes of the table while trials end


@dataclass(frozen=True, kw_only=True)
class Machine:
    """How many trials run at a time, and on what: `sweep.workers`, `.trials_per_gpu`, `.address`, `.batch`.

    Raises:
        ValueError: a value out of its range.

    """

    workers: int | None = None  # processes, one trial at a time each, ≥ 1; None: GPUs × trials_per_gpu, else cores
    trials_per_gpu: int = 1  # ≥ 1
    address: str | None = None  # of a Ray cluster, "auto", host:port or "local"; None: processes of this machine
    batch: bool = False  # whether trials that differ only in seeds and rates train as one program

    def __post_init__(self) -> None:
        if self.workers is not None and self.workers < 1:
            raise ValueError(f"workers must be >= 1, or null for the machine's, got {self.workers}")
        if self.trials_per_gpu < 1:
            raise ValueError(f"trials_per_gpu must be >= 1, got {self.trials_per_gpu}")

    def devices(self, *, cpu: bool) -> list[str | None]:
        """Return what each worker sees as CUDA_VISIBLE_DEVICES; None where there is no GPU, or none is wanted."""
        gpus = [] if cpu else _gpus()
        slots: list[str | None] = [gpu for _ in range(self.trials_per_gpu) for gpu in gpus] or [None] * num_cores()
        if self.workers is None:
            return slots
        return [slots[i % len(slots)] for i in range(self.workers)]

    def pool(self, *, cpu: bool, threads: int | None) -> Pool | Cluster:
        """Return who does the trials."""
        if self.address is None:
            return Pool(self.devices(cpu=cpu))
        return Cluster(
            self.address, workers=self.workers, threads=threads or 1, trials_per_gpu=self.trials_per_gpu, cpu=cpu
        )


def _gpus() -> list[str]:
    import torch  # asks the driver without making a context on any GPU

    number = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    return visible.split(",")[:number] if visible else [str(i) for i in range(number)]


def sweep(given: Sequence[str], config_dir: Path | None, board: Board) -> Path:
    """Run a sweep, or go on with one, and return its folder.

    Args:
        given: words in Hydra's sweep grammar, with `sweep.…` and `hydra.sweep.dir`; or `resume=FOLDER`, alone or
            with `sweep.…`.
        config_dir: folder of further choices of groups.
        board: who is told.

    Raises:
        UserError: something is wrong in what was asked; no trial has begun.
        RuntimeError: trials failed; all others were done.
        KeyboardInterrupt: with what to say about going on.

    """
    words = read(given, config_dir)
    machine: Machine = words.settings(Machine, "sweep")
    if words.resume is not None:
        folder = resumable(words, config_dir)
        start_server()
        plan = plans.load(folder)
        asked = read(plan.words, plans.path(plan.config_dir))
    else:
        plan = plan_of(words, given, config_dir, machine, board)
        folder, asked = plans.claim_folder(words.folder, "sweep"), words
        plans.save(plan, folder)
    threads = plan.threads or asked.fixed_value("threads")
    pooled = machine.pool(cpu=asked.fixed_value("device") == "cpu", threads=threads)
    with going_on(folder, "sweep"), locked(folder), pooled as pool:
        rows = execute(plan, folder, pool, board, batch=machine.batch)
    table.write_parquet(folder, rows)
    board.finish(table.means(rows, plan.keys, table.SHOWN), plan.keys)
    board.note(f"{folder}/sweep.json")
    failed = sum(row["state"] != "done" for row in rows)
    if failed:
        raise RuntimeError(
            f"{failed} of {counted(len(rows), 'trial')} failed; again: fedsim sweep {quoted('resume', str(folder))}"
        )
    return folder


def resumable(words: Words, config_dir: Path | None) -> Path:
    """Return the folder to go on with; whatever would make other trials of it is refused."""
    folder = Path(str(words.resume))
    if config_dir is not None or words.fixed or words.axes or words.intervals or words.folder:
        raise UserError("a resumed sweep keeps its trials: beside resume=FOLDER only sweep.… can be set")
    if not folder.is_dir():
        raise UserError(f"resume={folder}: no such folder")
    return folder


def plan_of(words: Words, given: Sequence[str], config_dir: Path | None, machine: Machine, board: Board) -> Plan:
    """Return the plan of a new sweep, once all of its settings are known to be right."""
    if words.intervals:
        raise UserError(
            f"{words.intervals[0].key}: a sweep enumerates its values; `fedsim tune` draws from an interval"
        )
    check(words, config_dir, board)
    points = list(plans.product(words.axes))
    units = len(plans.batches(plans.trials_of(points, (), None))) if machine.batch else len(points)
    threads = threads_of(machine, units, words)
    trials = plans.trials_of(points, words.fixed, threads)
    return Plan(
        words=tuple(given), config_dir=None if config_dir is None else str(config_dir), threads=threads, trials=trials
    )


def check(words: Words, config_dir: Path | None, board: Board) -> list[Config]:
    """Compose what will run, and say what a user may not expect of it."""
    if re.fullmatch(r"cuda:\d+", str(words.fixed_value("device"))):
        raise UserError("device: a sweep gives each worker its GPU; write device=cuda and set CUDA_VISIBLE_DEVICES")
    composed = plans.check(words, config_dir)
    start_server()  # names are right: it loads beside what follows, which takes a second itself
    _check_values(composed)
    for line in dict.fromkeys(line for config in composed for line in notes(config)):
        board.note(line)
    return composed


def _check_values(configs: Sequence[Config]) -> None:
    """Build the parts that need no data, so that a wrong type or value is found here and not in every trial."""
    seen: list[object] = []
    for config in configs:
        for group, shared in _DATALESS.items():
            node = plain(config[group])
            # Of Flower's wrappers one has no value before the data are there.
            if node in seen or "num_sampled_clients" in node:
                continue
            seen.append(node)
            if group == "client":
                _check_training(node)
            instantiate({name: value for name, value in node.items() if name not in shared}, group)


def _check_training(node: dict[str, object]) -> None:
    """Take a client's settings of how it trains out of its node, and check them."""
    from fedsim.local import LocalTraining  # here: it loads torch

    mine = {name: node.pop(name) for name in LocalTraining.__dataclass_fields__ if name in node}
    construct(LocalTraining, mine, "client")


def threads_of(machine: Machine, units: int, words: Words) -> int | None:
    """Return the CPU threads of a trial: one each on a cluster, where a trial asks for as many cores."""
    if machine.address is not None:
        return None if _says_threads(words) else 1
    return threads_for(min(len(machine.devices(cpu=words.fixed_value("device") == "cpu")), units), words)


def _says_threads(words: Words) -> bool:
    return words.fixed_value("threads") is not None or any(axis.key == "threads" for axis in words.axes)


def threads_for(num_workers: int, words: Words) -> int | None:
    """Return the CPU threads of a trial, so that all workers together have one a core.

    None leaves it to the run: there is one worker, or the user has said.
    """
    return None if _says_threads(words) or num_workers == 1 else max(1, num_cores() // num_workers)


def execute(plan: Plan, folder: Path, pool: Pool | Cluster, board: Board, *, batch: bool = False) -> list[table.Row]:
    """Do the trials of a plan that are not done, and return the rows of all.

    Args:
        plan: with all trials.
        folder: of the sweep.
        pool: who does them.
        board: who is told.
        batch: whether those that differ only in seeds and rates train as one program.

    """
    rows = {trial.name: table.row(trial, folder) for trial in plan.trials}
    trials = {trial.name: trial for trial in plan.trials}
    missing = [trial for trial in plan.trials if rows[trial.name]["state"] != "done"]
    written = 0.0

    def told(event: Event) -> None:
        nonlocal written
        if event.kind in ("done", "failed"):
            rows[event.name] = table.row(trials[event.name], folder, event.content.get("error"))
            board.ended(rows[event.name], event.content["seconds"])
            if time.monotonic() - written > _WRITE_EVERY:
                table.write(plan, folder, list(rows.values()))
                written = time.monotonic()
        else:
            board.heard(event)

    table.write(plan, folder, list(rows.values()))
    groups = plans.batches(missing) if batch else [[trial] for trial in missing]
    side_by_side = sum(sorted(map(len, groups), reverse=True)[: len(pool)])
    board.begin(len(rows), len(rows) - len(missing), side_by_side)
    try:
        jobs = [[Job(t.name, str(folder / t.name), t.overrides, plan.config_dir) for t in group] for group in groups]
        pool.run((Batch(tuple(group)) if len(group) > 1 else group[0] for group in jobs), told)
        shutil.rmtree(folder / PICTURES, ignore_errors=True)
    finally:
        board.end()
        table.write(plan, folder, list(rows.values()))
    return list(rows.values())


@contextmanager
def going_on(folder: Path, verb: str) -> Iterator[None]:
    """Say at an interrupt how to go on."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(f"interrupted; go on with: fedsim {verb} {quoted('resume', str(folder))}") from error
