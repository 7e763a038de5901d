"""Trials on a Ray cluster, one remote task each: `sweep.address=auto`.

Every machine has fedsim and sees the sweep's folder under one path, as on a network file system: what a trial leaves
is its run folder, and nothing else comes back but whether it ended well.
"""

from __future__ import annotations

import logging
import os
import sys
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from importlib import import_module
from typing import Any, Self

from fedsim.errors import UserError
from fedsim.sweep.pool import Batch, Event, Job


class Cluster:
    """Does jobs on a Ray cluster; in place of `pool.Pool`.

    Args:
        address: of a running cluster, "auto" or host:port; "local" starts one on this machine.
        workers: trials at a time; None: as many as the cluster has room for.
        threads: CPU threads of a trial, which are the cores that it takes.
        trials_per_gpu: a trial takes this part of a GPU, where the cluster has any.
        cpu: whether no GPU is wanted.

    Raises:
        UserError: Ray is not installed, no cluster answers, or it has no room for one trial.

    """

    def __init__(self, address: str, *, workers: int | None, threads: int, trials_per_gpu: int, cpu: bool) -> None:
        try:
            ray: Any = import_module("ray")
        except ImportError as error:
            raise UserError("sweep.address needs Ray: pip install 'fedsim[ray]'") from error
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent home
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # spares a warning of what Ray will do
        self._ray, self._own = ray, not ray.is_initialized()
        local = {"include_dashboard": False, "_node_ip_address": "127.0.0.1"} if address == "local" else {}
        try:
            if self._own:
                ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **local)
        except Exception as error:  # Ray raises a dozen kinds
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise UserError(f"sweep.address={address}: no cluster answers ({first})") from error
        found = ray.cluster_resources()
        gpus = 0 if cpu else int(found.get("GPU", 0))
        room = gpus * trials_per_gpu or int(found.get("CPU", 0)) // threads
        if not room:
            self._leave()
            raise UserError(f"sweep.address={address}: no machine has {threads} cores for a trial; lower threads=")
        self._at_once = room if workers is None else min(workers, room)
        share = {"num_gpus": 1 / trials_per_gpu} if gpus else {}
        # A trial whose machine is lost is reported like one that failed; resume=FOLDER goes on with it.
        self._remote = ray.remote(_trial).options(num_cpus=threads, max_retries=0, **share)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._leave()

    def __len__(self) -> int:
        return self._at_once

    def _leave(self) -> None:
        if self._own and self._ray.is_initialized():
            self._ray.shutdown()

    def run(self, jobs: Iterable[Job | Batch], told: Callable[[Event], None]) -> None:
        """Do all jobs, in order of their start; a job that fails, or whose machine is lost, stops no other.

        Args:
            jobs: what to do.
            told: called with a "begin" of each trial and one "done" or "failed" at its end.

        """
        waiting, running = deque(jobs), dict[Any, Job | Batch]()
        while waiting or running:
            while waiting and len(running) < self._at_once:
                job = waiting.popleft()
                for one in _trials(job):
                    told(Event("begin", one.name, {"folder": one.folder}))
                running[self._remote.remote(_absolute(job), os.getcwd(), list(sys.path))] = job
            done, _ = self._ray.wait(list(running))
            for ref in done:
                for event in self._heard(ref, running.pop(ref)):
                    told(event)

    def _heard(self, ref: Any, job: Job | Batch) -> Sequence[Event]:
        try:
            events: list[Event] = [Event(*event) for event in self._ray.get(ref)]
        except Exception as error:  # the worker or its machine is gone, or cannot load fedsim
            lines = [line for line in str(error).strip().splitlines() if line.strip()] or [""]
            why = {"error": f"{type(error).__name__}: {lines[-1].strip()}", "seconds": None}
            return [Event("failed", one.name, why) for one in _trials(job)]
        return events


def _trials(job: Job | Batch) -> Sequence[Job]:
    return job.jobs if isinstance(job, Batch) else [job]


def _absolute(job: Job | Batch) -> Job | Batch:
    if isinstance(job, Batch):
        return Batch(tuple(one._replace(folder=os.path.abspath(one.folder)) for one in job.jobs))
    return job._replace(folder=os.path.abspath(job.folder))


def _trial(job: Job | Batch, folder: str, path: list[str]) -> list[tuple[str, str, dict[str, Any]]]:
    """Do a job in a process of the cluster, and return what ended: plain values, whatever the versions there."""
    os.chdir(folder)
    sys.path += [entry for entry in path if entry not in sys.path]
    from fedsim.sweep.worker import once  # here: the process that sweeps needs neither torch nor Flower

    return [(event.kind, event.name, dict(event.content)) for event in once(job)]
