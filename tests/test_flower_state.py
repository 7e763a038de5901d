"""What a strategy remembers, through plain dicts and back."""

import collections
import copy
import pathlib
import random
import threading

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import DifferentialPrivacyServerSideAdaptiveClipping, FedAdam, FedAvg

from fedsim.flower.state import capture, initial_parts, restore


def plain(state):
    """Say whether a state is nested dicts with string keys of tensors, numbers and strings."""
    if isinstance(state, dict):
        return all(isinstance(key, str) and plain(value) for key, value in state.items())
    return isinstance(state, torch.Tensor | int | float | str)


class Everything:
    def __init__(self):
        self.number, self.flag, self.nothing, self.text, self.raw = 1.5, True, None, "x", b"\x00a"
        self.array = np.arange(6, dtype=np.float32).reshape(2, 3)
        self.scalar = np.float64(2.5)
        self.tensor = torch.arange(3)
        self.list, self.tuple, self.set = [np.ones(2), None], (1, "a"), {3, 1}
        self.by_round = {1: None, 2: [0.5]}
        self.ordered = collections.OrderedDict(b=1, a=2)
        self.record = ArrayRecord({"w": Array(np.ones((2, 2), np.float32))})
        self.wrapped = FedAdam()
        self.rng, self.python_rng = np.random.default_rng(0), random.Random(0)
        self.path, self.function, self.lock = pathlib.Path("x"), len, threading.Lock()


def change(part):
    part.number, part.flag, part.nothing, part.text, part.raw = -2, False, 4, "y", b""
    part.array, part.scalar, part.tensor = part.array * 2, np.float64(7.25), part.tensor + 1
    part.list, part.tuple, part.set = [np.zeros(1)], (None, (2.0,)), {9}
    part.by_round = {7: {"a": np.ones(1)}}
    part.ordered["c"] = 3
    part.record["b"] = Array(np.array(3, np.int64))
    part.wrapped.m_t = {"w": np.full(2, 0.25)}
    part.rng.random(3), part.python_rng.random()


def test_every_kind_of_attribute_comes_back():
    old, new = Everything(), Everything()
    initial = initial_parts(old)
    change(old)
    lock, path = new.lock, new.path
    state = capture(old, initial)
    assert plain(state)
    restore(new, copy.deepcopy(state))
    for name in ("number", "flag", "nothing", "text", "raw", "tuple", "set", "ordered", "record", "scalar"):
        assert getattr(new, name) == getattr(old, name), name
        assert type(getattr(new, name)) is type(getattr(old, name)), name
    np.testing.assert_array_equal(new.array, old.array)
    assert new.array.dtype == np.float32
    assert torch.equal(new.tensor, old.tensor)
    np.testing.assert_array_equal(new.list[0], np.zeros(1))
    np.testing.assert_array_equal(new.by_round[7]["a"], np.ones(1))
    np.testing.assert_array_equal(new.wrapped.m_t["w"], np.full(2, 0.25))
    assert (new.rng.random(), new.python_rng.random()) == (old.rng.random(), old.python_rng.random())
    assert new.lock is lock
    assert new.path is path
    assert new.wrapped.train_metrics_aggr_fn is FedAdam().train_metrics_aggr_fn


def test_a_capture_is_a_copy():
    strategy = FedAdam()
    strategy.m_t, strategy.eta = {"w": np.zeros(2)}, torch.ones(2)
    state = capture(strategy)
    strategy.m_t["w"] += 5
    strategy.eta += 5
    fresh = FedAdam()
    restore(fresh, state)
    assert fresh.m_t["w"].tolist() == [0, 0]
    assert fresh.eta.tolist() == [1, 1]
    fresh.m_t["w"] += 1
    fresh.eta += 1
    again = FedAdam()
    restore(again, state)
    assert again.m_t["w"].tolist() == [0, 0]
    assert again.eta.tolist() == [1, 1]


def test_a_wrapped_strategy_and_an_adaptive_bound_come_back():
    def make():
        return DifferentialPrivacyServerSideAdaptiveClipping(FedAdam(), 0.1, 10)

    old, new = make(), make()
    old.clipping_norm, old.strategy.v_t = 0.375, {"w": np.ones(3)}
    restore(new, capture(old, initial_parts(make())))
    assert new.clipping_norm == 0.375
    np.testing.assert_array_equal(new.strategy.v_t["w"], np.ones(3))


@pytest.mark.parametrize(
    ("name", "value", "kind"),
    [
        ("lock", threading.Lock(), "lock"),
        ("path", pathlib.Path("elsewhere"), "Path"),
        ("function", lambda: None, "function"),
        ("array", np.array(["text"]), "ndarray"),
    ],
)
def test_what_changed_and_cannot_be_stored_is_named(name, value, kind):
    strategy = Everything()
    initial = initial_parts(strategy)
    capture(strategy, initial)
    setattr(strategy, name, value)
    with pytest.raises(TypeError, match=rf"Everything\.{name} is a \w*{kind}, which a checkpoint cannot hold"):
        capture(strategy, initial)


def test_without_the_initial_parts_only_functions_and_classes_pass():
    capture(FedAvg())
    with pytest.raises(TypeError, match=r"Everything\.path is a PosixPath"):
        capture(Everything())


def test_a_ring_of_objects_is_named():
    strategy = FedAvg()
    strategy.me = strategy
    with pytest.raises(TypeError, match=r"FedAvg\.me refers back"):
        capture(strategy)
