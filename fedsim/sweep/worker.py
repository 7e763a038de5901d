"""A worker process of a sweep: does one trial after another, and ends when its parent does.

Imported by the fork server before the first worker is forked, so that every worker starts with torch, Flower and
Hydra loaded; nothing here may touch a GPU or start a thread at import.
"""

from __future__ import annotations

import gc
import os
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from importlib import import_module
from multiprocessing import connection
from pathlib import Path
from typing import Any

import torch

from fedsim import simulation
from fedsim.children import obey_parent
from fedsim.config import compose
from fedsim.console import Plain
from fedsim.contracts import Dataset
from fedsim.data.kept import keeping
from fedsim.errors import UserError
from fedsim.folder import locked
from fedsim.partition.picture import drawn_once
from fedsim.sweep.plan import setting
from fedsim.sweep.pool import PICTURES, Batch, Event, Job
from fedsim.threads import take_threads
from fedsim.together import Entrant, Outcome, together

# What runs import when they first need it: loaded once, before the fork, it costs the trials nothing.
for _name in (
    "matplotlib.backends.backend_agg", "matplotlib.figure", "PIL.PngImagePlugin",  # the partition's picture
    "pandas", "pyarrow.parquet",  # clients.parquet; pyarrow looks for pandas
    "sklearn.datasets",  # the digits
):  # fmt: skip
    with suppress(ImportError):
        import_module(_name)

LOG = "log.txt"
_TOLD = ("round", "accuracy", "loss", "validation_accuracy", "validation_loss")
_PATIENCE = 10.0  # seconds for which a killed sweep's worker may still hold a folder


class Reporter(Plain):
    """Writes what `fedsim run` would have said into the trial's log, and tells the sweep how far it is."""

    def __init__(self, stream: Any, tell: Any, seconds: float = 0.2) -> None:
        super().__init__(stream)
        self._tell, self._pause, self._told = tell, seconds, -seconds

    def start(self, total: int, done: int) -> None:
        """Tell the first round and the last."""
        super().start(total, done)
        self._tell("start", {"total": total, "done": done})

    def round(self, row: Mapping[str, Any]) -> None:
        """Tell of the round, unless one was told just now."""
        super().round(row)
        now = time.monotonic()
        if now - self._told >= self._pause:
            self._told = now
            self._tell("round", {name: row.get(name) for name in _TOLD})

    def warn(self, line: str) -> None:
        """Write the warning into the log, and tell it."""
        self._write(f"warning: {line}")
        self._tell("warn", {"line": line})


def serve(pipe: connection.Connection, environ: Mapping[str, str], folder: str) -> None:
    """Do the trials that come through a pipe until it closes.

    Args:
        pipe: gives `Job`s, takes `Event`s.
        environ: of the process that sweeps, with this worker's devices; the fork server's may be older.
        folder: the working directory.

    """
    os.environ.update(environ)  # what loading fedsim has set besides stays
    os.chdir(folder)
    obey_parent()
    gc.freeze()  # what was loaded before the fork is never looked through again
    threads, data = torch.get_num_threads(), dict[str, Dataset]()
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            take_threads(threads)  # a run's model is made before the run has set its own
            with keeping(data):
                if isinstance(job, Batch):
                    _do_together(job, pipe)
                else:
                    _do(job, pipe)
        except BrokenPipeError:
            return
        gc.collect()


class _Heard:
    """In place of a pipe: keeps how trials ended."""

    def __init__(self) -> None:
        self.ended: list[Event] = []

    def send(self, event: Event) -> None:
        """Take an event."""
        if event.kind in ("done", "failed"):
            self.ended.append(event)


def once(job: Job | Batch) -> list[Event]:
    """Do one job in this process, which may do others later, and return how its trials ended."""
    heard: Any = _Heard()
    with keeping(_DATA):
        if isinstance(job, Batch):
            _do_together(job, heard)
        else:
            _do(job, heard)
    gc.collect()
    return list(heard.ended)


_DATA: dict[str, Dataset] = {}  # of the jobs that `once` did


def _do(job: Job, pipe: connection.Connection) -> None:
    def tell(kind: str, content: Mapping[str, Any]) -> None:
        pipe.send(Event(kind, job.name, content))

    folder, started = Path(job.folder), time.perf_counter()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _wait_for(folder)
        with _output_to(folder / LOG), drawn_once(folder.parent / PICTURES):
            try:
                _run(job, folder, Reporter(sys.stdout, tell))
            except BaseException:
                traceback.print_exc()
                raise
    except BrokenPipeError:
        raise
    except BaseException as error:  # whatever a trial does, the sweep goes on
        tell("failed", {"error": _one_line(error), "seconds": time.perf_counter() - started})
    else:
        tell("done", {"seconds": time.perf_counter() - started})


def _run(job: Job, folder: Path, observer: Reporter) -> None:
    _launch(job, folder).go(observer)


def _launch(job: Job, folder: Path) -> simulation.Launch:
    if (folder / "plan.json").exists():
        return simulation.relaunch(folder, [])
    own = setting("hydra.run.dir", str(folder))
    config_dir = None if job.config_dir is None else Path(job.config_dir)
    return simulation.launch(compose([*job.overrides, own], config_dir=config_dir))


def _do_together(batch: Batch, pipe: connection.Connection) -> None:
    """Do trials as replicas, each with its own log; what C libraries write is in the first one's."""
    folders, started = [Path(job.folder) for job in batch.jobs], time.perf_counter()

    def tell(job: Job, kind: str, content: Mapping[str, Any]) -> None:
        pipe.send(Event(kind, job.name, content))

    def ended(i: int, outcome: Outcome) -> None:
        content: dict[str, Any] = {"seconds": time.perf_counter() - started}
        if isinstance(outcome, BaseException):
            traceback.print_exception(outcome, file=logs[i])
            tell(batch.jobs[i], "failed", {**content, "error": _one_line(outcome)})
        else:
            tell(batch.jobs[i], "done", content)

    with ExitStack() as stack:
        logs = []
        for folder in folders:
            folder.mkdir(parents=True, exist_ok=True)
            _wait_for(folder)
            logs.append(stack.enter_context(open(folder / LOG, "a")))
        stack.enter_context(_output_to(folders[0] / LOG))
        stack.enter_context(drawn_once(folders[0].parent / PICTURES))
        together(
            [
                Entrant(launch=partial(_launch, job, folder), observer=Reporter(log, partial(tell, job)))
                for job, folder, log in zip(batch.jobs, folders, logs, strict=True)
            ],
            ended,
        )


def _one_line(error: BaseException) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    plain = isinstance(error, UserError) or type(error) is RuntimeError
    return first if plain and first else f"{type(error).__name__}: {first}".rstrip(": ")


def _wait_for(folder: Path) -> None:
    """Wait for the worker of a sweep that was killed just now to let go of its folder."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            with locked(folder):
                return
        except UserError:
            if time.monotonic() > end:
                raise
            time.sleep(0.1)


@contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send both standard streams to a file, those of C libraries and of child processes too."""
    saved = [os.dup(1), os.dup(2)]
    with open(path, "ab") as file:
        try:
            for number in (1, 2):
                os.dup2(file.fileno(), number)
            yield
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, old in zip((1, 2), saved, strict=True):
                os.dup2(old, number)
                os.close(old)
