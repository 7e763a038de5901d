"""The Ray engine on a real cluster of two nodes on this machine: the same bits as processes, whatever dies."""

import itertools
import os
import sys
import threading
from pathlib import Path

import pytest

import fedsim
from fedsim import simulation
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.engine import ray as engine
from fedsim.errors import UserError

try:
    import ray
    from ray.cluster_utils import Cluster
except ImportError:
    ray = None

# Ray leaves sockets, files and child processes for the interpreter's end to close.
pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
needs_ray = pytest.mark.skipif(ray is None, reason="Ray is not installed: pip install 'fedsim[ray]'")

BYTES = ("model.safetensors", "rounds.jsonl", "clients.parquet")
TINY = (
    "data=blobs", "data.num_samples=240", "partition=dirichlet", "partition.num_clients=12", "partition.alpha=1",
    "model=mlp", "model.hidden=[8]", "metrics.every=1", "metrics.clients_every=1", "threads=1", "engine.block=2",
    "device=cpu",
)  # fmt: skip

OBJECTIVES = """
import os, signal, time
from dataclasses import dataclass
from pathlib import Path
from fedsim.clients.cross_entropy import CrossEntropy

@dataclass(frozen=True)
class Deadly(CrossEntropy):
    '''Ends its own process, once a file.'''
    folder: str

    def criterion(self, logits, targets, weights):
        try:
            (Path(self.folder) / "death").touch(exist_ok=False)
        except FileExistsError:
            return super().criterion(logits, targets, weights)
        os.kill(os.getpid(), signal.SIGKILL)

@dataclass(frozen=True)
class Slow(CrossEntropy):
    '''Takes its time.'''

    def criterion(self, logits, targets, weights):
        time.sleep(0.01)
        return super().criterion(logits, targets, weights)
"""


class Recorder(Observer):
    """Keeps what a run says, and does something after a round."""

    def __init__(self, after=None):
        self.warnings, self.plans, self._after = [], [], after or {}

    def warn(self, line):
        self.warnings.append(line)

    def plan(self, line):
        self.plans.append(line)

    def round(self, row):
        if act := self._after.get(row["round"]):
            act()


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Run with given settings in a new folder, without drawing; objectives of the user's own stand in theirs.py."""
    monkeypatch.setattr(simulation, "draw", lambda *_, **__: None)
    (tmp_path / "theirs.py").write_text(OBJECTIVES)
    monkeypatch.syspath_prepend(tmp_path)
    count = itertools.count()

    def go(*overrides, **given):
        return fedsim.simulate(*TINY, *overrides, folder=tmp_path / f"run-{next(count)}", **given)

    yield go
    sys.modules.pop("theirs", None)


@pytest.fixture(scope="module")
def cluster():
    """Two nodes of one core each, without a dashboard."""
    if ray is None:
        pytest.skip("Ray is not installed: pip install 'fedsim[ray]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    quiet = {"num_cpus": 1, "include_dashboard": False, "object_store_memory": 100 << 20}
    two = Cluster(initialize_head=True, head_node_args=quiet)
    two.second = two.add_node(num_cpus=1, object_store_memory=100 << 20)
    yield two
    if ray.is_initialized():
        ray.shutdown()
    two.shutdown()


def contents(result):
    return {name: (Path(result.folder) / name).read_bytes() for name in BYTES}


PROCESSES = ("engine=processes", "engine.workers=2")


def on(cluster, workers=2):
    return ("engine=ray", f"engine.address={cluster.address}", f"engine.workers={workers}")


@needs_ray
def test_actors_on_two_nodes_give_the_bits_of_processes(run, cluster):
    method = ("strategy=scaffold",)  # rows, second uploads and state go to and fro
    observer = Recorder()
    spread = run(*method, "num_rounds=3", *on(cluster), observer=observer)
    assert contents(spread) == contents(run(*method, "num_rounds=3", *PROCESSES))
    assert "engine ray, 2 workers" in observer.plans[0]
    assert not ray.is_initialized()  # it has left the cluster


@needs_ray
def test_a_cluster_without_room_is_one_clear_line(cluster):
    with pytest.raises(
        UserError, match=r"engine.workers=3: the Ray cluster has CPUs for 2 workers of 1; ask for fewer"
    ):
        build(compose([*TINY, *on(cluster, 3)]))
    assert not ray.is_initialized()


@needs_ray
def test_an_actor_killed_in_mid_round_changes_no_bit(run, cluster, tmp_path):
    # Sequential: choosing an engine may try a step, here in this process.
    words = ("client._target_=theirs.Deadly", f"+client.folder={tmp_path}", "num_rounds=3", "engine.inner=sequential")
    observer = Recorder()
    hurt = run(*words, *on(cluster), observer=observer)
    assert (tmp_path / "death").exists()
    assert len(observer.warnings) == 1
    assert "round 1: worker" in observer.warnings[0]
    assert "train again" in observer.warnings[0]
    assert contents(hurt) == contents(run(*words, *PROCESSES))


@needs_ray
def test_a_node_removed_in_mid_run_changes_no_bit(run, cluster):
    words = ("client._target_=theirs.Slow", "num_rounds=6")

    def lose():  # beside the rounds: at a moment of one that nobody chose
        threading.Thread(target=cluster.remove_node, args=(cluster.second,)).start()

    observer = Recorder({2: lose})
    hurt = run(*words, *on(cluster), observer=observer)
    assert any("is gone" in line for line in observer.warnings)
    assert contents(hurt) == contents(run(*words, *PROCESSES))


@needs_ray
def test_without_an_address_a_cluster_begins_and_ends_with_the_run(run):
    own = run("num_rounds=2", "engine=ray", "engine.workers=2", model=lambda: __import__("torch").nn.Linear(10, 5))
    assert not ray.is_initialized()
    assert [row["round"] for row in own.rounds] == [1, 2]


@needs_ray
@pytest.mark.parametrize(
    ("address", "why"), [("127.0.0.1:9", "refused"), ("nobody", "an address is auto or host:port")]
)
def test_an_address_where_nobody_answers_is_one_clear_line(address, why):
    with pytest.raises(UserError, match=rf"engine=ray: no cluster: none answers at {address} \(.*{why}"):
        build(compose([*TINY, "engine=ray", f"engine.address='{address}'"]))


def test_without_ray_the_error_names_the_command(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"engine=ray needs Ray: pip install 'fedsim\[ray\]'"):
        engine._installed()
