"""Other frameworks as sides of a race: each a process of its own environment that does one round when asked.

Their environments come from `benchmarks/peers/make.sh DIR`; without `--peers DIR` they are left out, by name.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Options
from benchmarks.workloads import Workload

SCRIPTS = Path(__file__).parent / "peers"
ROOT = SCRIPTS.parent.parent
QUIET = {
    "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "FLWR_LOG_LEVEL": "ERROR",
    "RAY_USAGE_STATS_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "PYTHONWARNINGS": "ignore", "JAX_PLATFORMS": "cpu",
}  # fmt: skip
PATIENCE = 300.0  # seconds for one answer; the slowest rule of the slowest framework takes 50


class PeerError(RuntimeError):
    """Another framework's process did not do what it was asked to."""


class Peer:
    """A process that does one round of a workload for every line it is sent.

    Args:
        options: where the environments are.
        name: the environment's folder.
        script: file in `benchmarks/peers/`.
        arguments: of the script.

    Raises:
        PeerError: no such environment, or the script ended.

    """

    def __init__(self, options: Options, name: str, script: str, *arguments: str) -> None:
        self.name = name
        python = interpreter(options, name)
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  read if the process ends, closed with it
        self._process = subprocess.Popen(
            [python, SCRIPTS / script, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=self._log, text=True, env=environment(options.threads),
        )  # fmt: skip
        try:
            self.about = self._answer()
        except BaseException:
            self.close()
            raise

    def __call__(self, number: int) -> float:
        """Do one round; return the seconds that the process itself counted."""
        return float(self._ask("round")["seconds"])

    def update(self) -> Tensor:
        """Do one round and return its mean update (D,)."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "update.npy")
            self._ask(f"update {path}")
            return torch.from_numpy(np.load(path))

    def close(self) -> None:
        """End the process: the end of its input tells it to go."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.stdout.close()
        try:
            self._process.wait(timeout=30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def _ask(self, line: str) -> Mapping[str, Any]:
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(line + "\n")
            self._process.stdin.flush()
        return self._answer()

    def _answer(self) -> Mapping[str, Any]:
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], PATIENCE)[0]:  # a line is one whole answer
            self._process.kill()
            raise PeerError(f"{self.name} was silent for {PATIENCE} s")
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            tail = self._log.read()[-2000:]
            raise PeerError(f"{self.name} ended with code {self._process.returncode}: {tail}")
        answer: Mapping[str, Any] = json.loads(line)
        return answer


def interpreter(options: Options, name: str) -> Path:
    """Return a peer's Python.

    Raises:
        PeerError: there is no such environment.

    """
    if options.peers is None:
        raise PeerError("needs --peers DIR")
    python = options.peers / name / "bin" / "python"
    if not python.exists():
        raise PeerError(f"{python} is missing: benchmarks/peers/make.sh {options.peers} {name}")
    return python


def environment(threads: int) -> dict[str, str]:
    """Return the variables of a peer's process: quiet, so many threads, fedsim's models to be found."""
    return {**os.environ, **QUIET, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": f"{ROOT}{os.pathsep}{SCRIPTS}"}


def export(work: Workload, folder: Path, number: int = 1) -> Path:
    """Write what a peer needs of a workload of equal clients; all its rounds are round `number`.

    Returns:
        A file of x, y, start (D,), shapes of the parameters, order (K, steps, batch), lr. Beside it, for peers on
        PyTorch, the module in `module.pt`.

    """
    order = np.stack([torch.stack(client).numpy() for client in work.batches(number)])  # (K, steps, batch)
    path = folder / "work.npz"
    np.savez(
        path, x=work.x.numpy(), y=work.y.numpy(), start=work.start.numpy(), order=order, lr=work.training.lr,
        shapes=json.dumps([tuple(p.shape) for p in work.module.parameters()]),
    )  # fmt: skip
    torch.save(work.module, folder / "module.pt")
    return path


@contextlib.contextmanager
def peers_of(
    work: Workload, options: Options, wanted: Mapping[str, tuple[str, ...]]
) -> Iterator[tuple[dict[str, Peer], dict[str, str]]]:
    """Start the peers of a workload.

    Args:
        work: what they train.
        options: where the environments are.
        wanted: side → (environment, script, further arguments …).

    Yields:
        Side → peer, and side → why it was left out.

    """
    started: dict[str, Peer] = {}
    left_out = {}
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        path = export(work, Path(folder)) if options.peers else Path(folder)
        for side, (name, script, *arguments) in wanted.items():
            try:
                started[side] = Peer(options, name, script, str(path), *arguments)
                stack.callback(started[side].close)
            except PeerError as error:
                left_out[side] = str(error)
        yield started, left_out
