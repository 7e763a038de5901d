"""Processes of one's own: how many there may be, how they are made, ended and spoken of."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
from typing import Any

GRACE = 5.0  # seconds in which a process without work ends by itself


def num_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def context(preloaded: str) -> Any:
    """Return what makes processes: forked from a server that has loaded a module, or spawned where there is none."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload([preloaded])
    return made


def start_server(preloaded: str) -> None:
    """Begin to load what processes need, beside what this one does meanwhile."""
    if context(preloaded).get_start_method() == "forkserver":
        from multiprocessing import forkserver

        forkserver.ensure_running()


def kill_server() -> None:
    """End the server at once, if there is one: by itself it notices seconds later that nobody needs it any more."""
    known = getattr(sys.modules.get("multiprocessing.forkserver"), "_forkserver", None)  # has no public way to do it
    number = getattr(known, "_forkserver_pid", None)
    if number is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


def obey_parent() -> None:
    """Let the parent decide: of Ctrl-C and a scheduler's signal, which go to the whole group; and end when it ends."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()


def _die_with_parent() -> None:
    from multiprocessing import connection  # here: processes alone need it

    parent = multiprocessing.parent_process()
    if parent is not None:
        connection.wait([parent.sentinel])
        os._exit(1)


def end(process: Any, *, at_once: bool) -> None:
    """End a process: at once, or when it does not end by itself."""
    if at_once:
        process.kill()
    process.join(GRACE)
    if process.is_alive():
        process.kill()
        process.join()


def epitaph(code: int | None) -> str:
    """Say how a process ended, from its exit code."""
    if code is None or code >= 0:
        return f"its process ended with exit code {code}"
    hint = "; was memory short?" if code == -9 else ""
    return f"its process was killed by signal {-code}{hint}"
