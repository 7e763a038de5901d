"""Sweeps on a Ray cluster: what is asked of it, what a lost machine costs, and a real cluster of this machine."""

import json
import os
import sys
import types
from pathlib import Path

import pytest

from fedsim.errors import UserError
from fedsim.sweep import plan
from fedsim.sweep.board import Board
from fedsim.sweep.cluster import Cluster
from fedsim.sweep.drive import Machine, sweep
from fedsim.sweep.pool import Batch, Job, Pool

SMALL = ("model=logreg", "partition.num_clients=4", "num_rounds=2")


class FakeRay(types.ModuleType):
    """Does tasks at once, or fails as a lost machine does; keeps what was asked of it."""

    def __init__(self, lost=(), **resources):
        super().__init__("ray")
        self.lost, self.resources, self.asked, self.open, self.most, self.started = lost, resources, {}, False, 0, []
        self.running = {}

    def is_initialized(self):
        return self.open

    def init(self, address, **_):
        if address == "nowhere:1":
            raise ConnectionError("nobody there\nsecond line")
        self.open = True

    def shutdown(self):
        self.open = False

    def cluster_resources(self):
        return self.resources

    def remote(self, function):
        fake = self

        class Remote:
            def options(self, **asked):
                fake.asked = asked
                return self

            def remote(self, job, folder, path):
                ref = object()
                fake.running[ref] = job
                fake.started.append(job)
                fake.most = max(fake.most, len(fake.running))
                return ref

        return Remote()

    def wait(self, refs):
        return refs[:1], refs[1:]

    def get(self, ref):
        job = self.running.pop(ref)
        names = [one.name for one in (job.jobs if isinstance(job, Batch) else [job])]
        if set(names) & set(self.lost):
            raise RuntimeError("The worker died.\n\nnode 10.0.0.7 is gone\n")
        return [("done", name, {"seconds": 1.0}) for name in names]


def cluster(monkeypatch, fake, **options):
    monkeypatch.setitem(sys.modules, "ray", fake)
    return Cluster("auto", **{"workers": None, "threads": 1, "trials_per_gpu": 1, "cpu": False} | options)


@pytest.mark.parametrize(
    ("resources", "options", "at_once", "asked"),
    [
        ({"CPU": 8.0}, {"threads": 2}, 4, {"num_cpus": 2}),
        ({"CPU": 8.0}, {"workers": 3}, 3, {"num_cpus": 1}),
        ({"CPU": 2.0}, {"workers": 9}, 2, {"num_cpus": 1}),
        ({"CPU": 8.0, "GPU": 3.0}, {"trials_per_gpu": 2}, 6, {"num_cpus": 1, "num_gpus": 0.5}),
        ({"CPU": 8.0, "GPU": 3.0}, {"cpu": True, "threads": 4}, 2, {"num_cpus": 4}),
    ],
)
def test_a_trial_asks_for_its_cores_or_its_part_of_a_gpu(resources, options, at_once, asked, monkeypatch):
    fake = FakeRay(**resources)
    with cluster(monkeypatch, fake, **options) as pool:
        assert len(pool) == at_once
        assert fake.asked == {**asked, "max_retries": 0}
    assert not fake.open


def test_all_jobs_are_done_no_more_at_once_than_there_is_room_and_a_lost_machine_fails_its_own(monkeypatch):
    fake = FakeRay(lost=("c",), CPU=2.0)
    jobs = [Job(name, f"s/{name}", (), None) for name in "abcd"] + [
        Batch((Job("e", "s/e", (), None), Job("f", "s/f", (), None)))
    ]
    told = []
    with cluster(monkeypatch, fake) as pool:
        pool.run(jobs, told.append)
    assert [event.name for event in told if event.kind == "begin"] == list("abcdef")
    ends = {event.name: event.kind for event in told if event.kind != "begin"}
    assert ends == {**dict.fromkeys("abdef", "done"), "c": "failed"}
    (failed,) = [event for event in told if event.kind == "failed"]
    assert failed.content["error"] == "RuntimeError: node 10.0.0.7 is gone"
    assert fake.most == 2
    assert all(os.path.isabs(job.folder) for job in fake.started[:4])


def test_what_cannot_be_reached_is_said(monkeypatch):
    with pytest.raises(UserError, match="no machine has 4 cores"):
        cluster(monkeypatch, FakeRay(CPU=2.0), threads=4)
    monkeypatch.setitem(sys.modules, "ray", FakeRay(CPU=1.0))
    with pytest.raises(UserError, match=r"sweep.address=nowhere:1: no cluster answers \(nobody there\)"):
        Cluster("nowhere:1", workers=None, threads=1, trials_per_gpu=1, cpu=True)
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'fedsim\[ray\]'"):
        Cluster("auto", workers=None, threads=1, trials_per_gpu=1, cpu=True)


def test_without_an_address_the_workers_are_processes():
    assert isinstance(Machine(workers=1).pool(cpu=True, threads=None), Pool)


def test_a_cluster_writes_what_processes_write(tmp_path, monkeypatch):
    """A task is run here, in this process, as a node of the cluster runs it."""
    from fedsim.sweep import cluster as module

    class Here(FakeRay):
        def get(self, ref):
            return module._trial(self.running.pop(ref), os.getcwd(), [])

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedsim.sweep.drive.start_server", lambda: None)
    monkeypatch.setitem(sys.modules, "ray", Here(CPU=2.0))
    sweep([*SMALL, "seed=0,1", "sweep.address=auto", "hydra.sweep.dir=far"], None, Board())
    rows = json.loads(Path("far/sweep.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["done", "done"]
    assert rows[0]["accuracy"] != rows[1]["accuracy"]
    assert plan.load(Path("far")).threads == 1
    assert all(Path("far", row["trial"], "model.safetensors").exists() for row in rows)


@pytest.mark.slow
def test_on_a_real_cluster(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    if "FEDSIM_DEPLOYMENT" not in os.environ:
        pytest.skip("a cluster takes half a minute to start: FEDSIM_DEPLOYMENT=1 runs it")
    monkeypatch.chdir(tmp_path)
    words = [*SMALL, "seed=0,1", "client.lr=0.1,0.2", "sweep.address=local", "device=cpu", "hydra.sweep.dir=far"]
    sweep(words, None, Board())
    rows = json.loads(Path("far/sweep.json").read_text())["trials"]
    assert [row["state"] for row in rows] == ["done"] * 4
    assert "round 2/2" in Path("far", rows[0]["trial"], "log.txt").read_text()
