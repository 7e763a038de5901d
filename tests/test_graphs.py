"""Steps replayed as graphs train as steps that are launched; on a CPU a tape stands in for a CUDA graph.

The tape writes down the operations that a step runs and the tensors they read and write, and replays them in the same
places, without any Python of the step: what a step takes from anywhere else is as stale as in a graph.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.clients.fedprox import FedProx
from fedsim.clients.moon import Moon
from fedsim.clients.scaffold import Scaffold
from fedsim.contracts import Partition
from fedsim.engine.auto import make_engine
from fedsim.engine.graphs import Graphs, refusal, rounded
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Job, Task
from fedsim.engine.vectorized import Vectorized
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.char_gru import char_gru
from fedsim.models.cnn import cnn
from fedsim.models.mlp import mlp
from fedsim.rng import uniform_like

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SIZES = np.array([7, 1, 20, 13, 4, 4, 9, 16, 2, 11, 31])  # unequal on purpose: batches of 12, 12 and 7 at the end
N = int(SIZES.sum())
MODELS = {
    "mlp": (lambda: mlp((8,), 5, hidden=(6,)), lambda g: torch.randn(N, 8, generator=g)),
    "cnn": (
        lambda: cnn((1, 12, 12), 5, channels=(3, 4), hidden=6, dropout=(0.2, 0.3)),
        lambda g: torch.randn(N, 1, 12, 12, generator=g),
    ),
    "char_gru": (
        lambda: char_gru((6,), 9, embedding=3, hidden=4),
        lambda g: torch.randint(0, 9, (N, 6), generator=g),
    ),
}
TRAININGS = {
    "sgd": LocalTraining(lr=0.2, batch_size=10, local_epochs=2, weight_decay=0.01),
    "momentum": LocalTraining(lr=0.1, batch_size=12, momentum=0.9, weight_decay=0.1),
    "clipped": LocalTraining(lr=0.1, batch_size=4, local_steps=5, clip_norm=0.05),
    "whole": LocalTraining(lr=0.1, batch_size=None, local_epochs=2),
}
OBJECTIVES = {"cross_entropy": CrossEntropy, "fedprox": lambda: FedProx(proximal_mu=0.4)}


class Tape(TorchDispatchMode):
    """The operations of a body with the tensors themselves."""

    def __init__(self):
        super().__init__()
        self.ops = []

    @classmethod
    def _should_skip_dynamo(cls):
        return False

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "is_nonzero"):
            raise RuntimeError(f"operation not permitted when stream is capturing: {name}")
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            self.ops.append((func, args, kwargs or {}, out))
        return out

    def replay(self):
        """Do it all again, in place."""
        for func, args, kwargs, out in self.ops:
            again = func(*args, **kwargs)
            for old, new in zip(tree_flatten(out)[0], tree_flatten(again)[0], strict=True):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Tapes:
    """Records bodies as tapes, as `CudaGraphs` records them as graphs."""

    def __init__(self):
        self.made = 0

    def __call__(self, make):
        self.made += 1
        make()()
        body, tape = make(), Tape()
        with torch.no_grad(), tape:
            body()
        return lambda: tape.replay()


def graphs_of(task):
    return Graphs(task) if GPU else Graphs(task, Tapes())


def make_task(name="mlp", training="sgd", objective="cross_entropy", *, dtype=torch.float64, **changes):
    make, inputs = MODELS[name]
    torch.manual_seed(1)
    module, generator = make().to(dtype), torch.Generator().manual_seed(0)
    x = inputs(generator)
    task = Task(
        module=module.to(DEVICE),
        shared=Layout.of(dict(module.named_parameters())),
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=OBJECTIVES[objective](),
        training=TRAININGS[training],
        x=x.to(DEVICE, dtype if x.is_floating_point() else x.dtype),
        y=torch.randint(0, 5, (N,), generator=generator).to(DEVICE),
        partition=Partition(np.random.default_rng(0).permutation(N), np.concatenate([[0], np.cumsum(SIZES)])),
        store=ClientStore(len(SIZES), {}),
        **changes,
    )
    return task, torch.cat([p.detach().flatten().clone() for p in module.parameters()])


def make_job(task, weights, number, clients):
    return Job(
        clients=np.array(clients),
        received=np.zeros(len(clients), dtype=np.int64),
        models={0: weights},
        broadcasts={0: {}},
        buffers=weights.new_zeros(0),
        state={},
        round=number,
        key=number,
        lr=task.training.lr / (2 if number == 4 else 1),
    )


ROUNDS = {1: range(11), 2: (0, 2, 3, 7, 10), 3: range(11), 4: (1, 2, 5, 6, 8)}  # eleven rows and fewer, another rate


def rounds(task, weights, kernels, graphs=None):
    """Return the updates and losses of a few rounds with cohorts of several sizes."""
    engine, found = Vectorized(task, kernels=kernels, chunk=11, threads=1), []
    engine.graphs = graphs
    for number, clients in ROUNDS.items():
        job = make_job(task, weights * number, number, clients)
        out = torch.empty(len(job), task.shared.size, dtype=weights.dtype, device=weights.device)
        block = engine.train(job, out)
        found += [out.cpu(), block.extras["train_loss"].cpu(), block.square_norms.cpu()]
    engine.close()
    return found


WHAT = [
    *itertools.product(MODELS, ["sgd"], ["cross_entropy"]),
    *itertools.product(["mlp"], ["momentum", "clipped", "whole"], ["cross_entropy"]),
    *itertools.product(["mlp"], ["sgd", "momentum"], ["fedprox"]),
]


@pytest.mark.parametrize("kernels", ["fused", "generic"])
@pytest.mark.parametrize("what", WHAT, ids="-".join)
def test_replayed_steps_train_as_launched_ones(what, kernels):
    task, weights = make_task(*what)
    launched = rounds(task, weights, kernels)
    graphs = graphs_of(task)
    replayed = rounds(task, weights, kernels, graphs)
    assert graphs.refused is None
    assert graphs.programs  # they were
    for one, two in zip(replayed, launched, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-9 * float(two.abs().max()))  # promise 3


def test_samples_are_augmented_by_their_own_keys():
    def augment(x, keys):
        return x * uniform_like(x, keys.view(-1, *[1] * (x.dim() - 1)))

    task, weights = make_task(augment=augment)
    for one, two in zip(rounds(task, weights, "fused", graphs_of(task)), rounds(task, weights, "fused"), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)


def test_twice_the_same_bits():
    task, weights = make_task("cnn", dtype=torch.float32)
    one, two = (rounds(task, weights, "fused", graphs_of(task)) for _ in range(2))
    assert all(map(torch.equal, one, two))


def test_a_graph_is_recorded_once_for_each_of_a_few_sizes():
    if GPU:
        pytest.skip("counted on tapes")
    task, weights = make_task()
    graphs = graphs_of(task)
    engine = Vectorized(task, chunk=6, threads=1)
    engine.graphs = graphs
    for number in (1, 2, 3):
        job = make_job(task, weights, number, range(11))
        engine.train(job, torch.empty(11, task.shared.size, dtype=weights.dtype))
    engine.close()
    assert graphs.capture.made == len(graphs.programs) <= 6 * 5  # rows up to six, batches 2, 4, … 10


def test_sizes_pad_an_eighth_at_most():
    for most in (1, 3, 8, 50, 1000):
        sizes = {rounded(count, most) for count in range(1, most + 1)}
        assert len(sizes) <= 8
        assert all(count <= rounded(count, most) <= count + most / 8 + 1 for count in range(1, most + 1))
        assert rounded(most, most) == most


def test_what_cannot_be_replayed_is_said():
    def why(**parts):
        task = SimpleNamespace(**{"objective": CrossEntropy(), "training": TRAININGS["sgd"], **parts})
        return refusal(task)

    assert why() is None
    assert "loss of its own" in why(objective=Moon())
    assert "direction of its own" in why(objective=Scaffold())
    assert "AdamW" in why(training=LocalTraining(optimizer="adamw", lr=0.01))


def test_a_step_that_cannot_be_recorded_is_launched_and_said_once():
    def refuses(make):
        raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nand more")

    task, weights = make_task()
    graphs = Graphs(task, refuses)
    with pytest.warns(
        UserWarning, match=r"engine\.graphs: a step cannot be recorded.*when stream is capturing$"
    ) as said:
        found = rounds(task, weights, "fused", graphs)
    assert len(said) == 1
    assert all(map(torch.equal, found, rounds(task, weights, "fused")))


def test_memory_that_runs_out_is_let_go_of_and_passed_on():
    def grows(make):
        raise torch.OutOfMemoryError("CUDA out of memory")

    task, weights = make_task()
    graphs = Graphs(task, grows)
    with pytest.raises(torch.OutOfMemoryError):
        rounds(task, weights, "fused", graphs)
    assert graphs.places is None


def test_rows_pulled_to_versions_of_their_own_are_launched():
    task, weights = make_task(objective="fedprox")
    graphs, found = graphs_of(task), []
    for mine in (graphs, None):
        engine = Vectorized(task, chunk=6, threads=1)
        engine.graphs = mine
        job = make_job(task, weights, 1, range(4))
        job = Job(
            **{
                **vars(job),
                "received": np.array([0, 1, 0, 1]),
                "models": {0: weights, 1: 2 * weights},
                "broadcasts": {},
            }
        )
        out = torch.empty(4, task.shared.size, dtype=weights.dtype, device=weights.device)
        engine.train(job, out)
        found.append(out)
        engine.close()
    assert torch.equal(*found)
    assert not graphs.programs


@pytest.mark.skipif(GPU, reason="it has graphs")
def test_on_a_cpu_the_plan_says_that_there_are_none():
    task, _ = make_task()
    for kernels in ("auto", "fused", "captured"):
        engine, why = make_engine(task, "vectorized", cohort=11, threads=1, kernels=kernels, graphs=True)
        assert "without engine.graphs" in why
        assert "graphs" not in engine.plan
        engine.close()
