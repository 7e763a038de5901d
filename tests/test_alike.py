"""What two models hold beside their parameters decides whether the rows of two runs may train as one program."""

import doctest
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from fedsim import replicas
from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.contracts import Partition
from fedsim.engine import alike as module_of_alike
from fedsim.engine.alike import alike, alike_modules
from fedsim.engine.replicas import why_apart
from fedsim.engine.store import ClientStore
from fedsim.engine.task import Task
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.simulation import launch

X, Y = torch.zeros(8, 3), torch.zeros(8, dtype=torch.int64)


def test_examples():
    result = doctest.testmod(module_of_alike)
    assert result.attempted > 0
    assert result.failed == 0


class Holder(nn.Module):
    """A layer that holds something, of which its printed form says nothing."""

    def __init__(self, what, buffer=None):
        super().__init__()
        self.layer, self.held = nn.Linear(3, 2), what
        self.register_buffer("kept", buffer, persistent=False)

    def forward(self, x):
        return self.layer(x)


class Box:
    def __init__(self, what):
        self.what = what


def scaled(by):
    return lambda x: x * by


def task_of(what, buffer=None):
    module = nn.Sequential(Holder(what, buffer))
    return Task(
        module=module, shared=Layout.of(dict(module.named_parameters())), local=Layout((), ()), buffers=Layout((), ()),
        objective=CrossEntropy(), training=LocalTraining(batch_size=4, lr=0.1), x=X, y=Y,
        partition=Partition(np.arange(8), np.array([0, 4, 8])), store=ClientStore(2, {}),
    )  # fmt: skip


def draw(seed):
    return torch.randn(2, generator=torch.Generator().manual_seed(seed))


HELD = [
    draw,
    lambda s: draw(s).numpy(),
    float,
    str,
    lambda s: [1, {"a": draw(s)}],
    lambda s: (draw(s),),
    lambda s: Box(draw(s)),
    lambda s: scaled(float(s)),
    lambda s: partial(torch.mul, draw(s)),
    lambda s: Box(draw(s)).__init__,
    lambda s: np.float32(s),
    lambda s: {s},
]


@pytest.mark.parametrize("held", HELD)
def test_what_a_model_holds_beside_parameters_keeps_runs_apart(held):
    assert why_apart(task_of(held(1)), task_of(held(1))) is None
    assert "not parameters" in why_apart(task_of(held(0)), task_of(held(1)))


def test_buffers_that_are_not_stored_keep_runs_apart():
    assert why_apart(task_of(0, draw(1)), task_of(0, draw(1))) is None
    assert "not parameters" in why_apart(task_of(0, draw(0)), task_of(0, draw(1)))
    one, other = (replace(task_of(0, draw(s)), buffers=Layout(("0.kept",), ((2,),))) for s in (0, 1))
    assert why_apart(one, other) is None  # a run's own, which no engine takes from the module


def test_values_that_only_look_alike():
    assert not alike(torch.ones(2), torch.ones(2).double())
    assert not alike(np.ones(2), np.ones(2, dtype=np.float32))
    assert not alike([1], [1, 2])
    assert not alike({"a": 1}, {"b": 1})
    loop = [1]
    loop.append(loop)
    other = [1]
    other.append(other)
    assert alike(loop, other)
    assert not alike([loop, 1], [other, 2])


def test_models_that_list_their_parameters_are_alike():
    """An LSTM has them a second and a third time, as a list and as weak references."""
    one, other = nn.LSTM(2, 3), nn.LSTM(2, 3)
    names = [name for name, _ in one.named_parameters()]
    assert alike_modules(one, other, names)
    assert not alike_modules(one, other, names[1:])
    other.dropout = 0.5
    assert not alike_modules(one, other, names)


SKETCH = """
import torch
from torch import nn

class Sketch(nn.Module):
    def __init__(self, classes):
        super().__init__()
        self.proj = torch.randn(8, 64)  # plain: neither a parameter nor a buffer
        self.layer = nn.Linear(8, classes)

    def forward(self, x):
        return self.layer(x.flatten(1) @ self.proj.T)

def sketch(num_classes):
    return Sketch(num_classes)
"""


class Ear(Observer):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


@pytest.mark.parametrize("kernels", ["captured", "generic"])
def test_replicas_of_a_model_with_a_drawn_matrix_train_with_their_own(kernels, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "sketch_of_alike.py").write_text(SKETCH)
    (tmp_path / "my" / "model").mkdir(parents=True)
    (tmp_path / "my" / "model" / "sketch.yaml").write_text("# Sketch.\n_target_: sketch_of_alike.sketch\n")
    words = ["data=digits", "model=sketch", "partition.num_clients=3", "num_rounds=2", "threads=1",
             "engine=vectorized", f"engine.kernels={kernels}"]  # fmt: skip
    ear = Ear()
    both = replicas.run(compose([*words, "replicas=2", "hydra.run.dir=both"], config_dir=tmp_path / "my"), ear)
    assert any("train apart" in note and "drawn from the seed" in note for note in ear.notes)
    alone = launch(compose([*words, "seed=1", "hydra.run.dir=alone"], config_dir=tmp_path / "my"), {}).go(ear)
    for name in ("rounds.jsonl", "model.safetensors"):
        assert (both[1].folder / name).read_bytes() == (alone.folder / name).read_bytes()
