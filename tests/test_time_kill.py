"""An asynchronous run, killed with SIGKILL in mid-flight from the command line, goes on with more workers."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

pytestmark = pytest.mark.skipif(os.name == "nt", reason="SIGKILL is POSIX's")

RUN = (
    "data=blobs", "data.num_samples=600", "partition.num_clients=12", "model=mlp", "strategy=scaffold",
    "client.lr_decay=0.98", "mode=async", "mode.buffer=3", "mode.concurrency=8", "devices=lognormal",
    "devices.dropout=0.1", "devices.partial_work=0.5", "num_rounds=60", "checkpoint.every=4", "metrics.every=5",
    "metrics.clients_every=20", "threads=1", "engine=processes",
)  # fmt: skip


def fedsim(*words, **how):
    environ = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, "-m", "fedsim", "run", *words], stdout=subprocess.DEVNULL, env=environ,
                            stderr=subprocess.PIPE, **how)  # fmt: skip


def finished(child):
    error = child.communicate(timeout=120)[1]
    assert child.returncode == 0, error.decode()


def rows_of(folder):
    path = folder / "rounds.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def test_killed_in_mid_flight_and_resumed_with_another_number_of_workers(tmp_path):
    whole = fedsim(*RUN, "engine.workers=1", f"hydra.run.dir={tmp_path / 'whole'}")
    folder = tmp_path / "killed"
    child = fedsim(*RUN, "engine.workers=1", f"hydra.run.dir={folder}")
    until = time.monotonic() + 120
    while len(rows_of(folder)) < 10 and child.poll() is None and time.monotonic() < until:
        time.sleep(0.001)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    left = rows_of(folder)
    assert len(left) < 60  # it did not end by itself
    assert json.loads(left[9])["num_outstanding"] > 4  # jobs are under way
    assert not (folder / "summary.json").exists()
    finished(fedsim(f"resume={folder}", "engine.workers=2"))
    finished(whole)
    for name in ("model.safetensors", "rounds.jsonl"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    rows = [json.loads(row) for row in rows_of(folder)]
    assert len(rows) == 60
    assert max(row["staleness_max"] for row in rows) > 2
