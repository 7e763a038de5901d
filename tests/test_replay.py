"""Functions that are called by their recorded programs: the same values, and what cannot be recorded is called."""

import numpy as np
import pytest
import torch

from fedsim.engine import replay as module
from fedsim.engine.replay import Replay


def values(seed, *shape):
    return torch.as_tensor(np.random.default_rng(seed).normal(size=shape))


class Counted:
    """A function and how often Python ran it."""

    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, given):
        self.calls += 1
        return self.function(given)


def curvature(given):
    """Differentiate a gradient's length: what a search for samples does."""
    x, w = given
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        v = w.detach().requires_grad_()
        (g,) = torch.autograd.grad((x @ v).tanh().sum(), v, create_graph=True)
        (h,) = torch.autograd.grad(g.abs().sum(), x)
    return [h, g.detach()]


def test_a_program_does_what_the_function_does_and_python_stays_out_of_it():
    replay, function = Replay(), Counted(curvature)
    for seed in range(4):
        given = [values(seed, 5, 3), values(seed + 9, 3)]
        for got, want in zip(replay("key", function, given), curvature(given), strict=True):
            assert torch.equal(got, want)
    assert replay.refused is None
    assert function.calls == 2  # recorded, and held against on other values
    replay("key", function, [values(0, 6, 3), values(1, 3)])
    assert function.calls == 4  # another shape is another program
    replay("other", function, [values(0, 6, 3), values(1, 3)])
    assert function.calls == 6


def test_another_precision_is_another_program():
    replay, function = Replay(), Counted(curvature)
    for calls, dtype in ((2, torch.float64), (4, torch.float32), (4, torch.float64), (4, torch.float32)):
        given = [values(0, 5, 3).to(dtype), values(1, 3).to(dtype)]
        for got, want in zip(replay("key", function, given), curvature(given), strict=True):
            assert got.dtype == dtype
            assert torch.equal(got, want)
        assert function.calls == calls


def test_inputs_stay_and_results_can_be_differentiated():
    given = [values(0, 5, 3), values(1, 3)]
    kept = [value.clone() for value in given]
    got = Replay()("key", curvature, given)[0]
    assert all(torch.equal(a, b) for a, b in zip(given, kept, strict=True))
    weight = torch.ones(5, 3, dtype=torch.float64, requires_grad=True)
    (got * weight).sum().backward()
    assert torch.equal(weight.grad, got)


def test_what_hangs_on_values_is_called_as_it_is():
    def branches(given):
        return [given[0] if given[0].sum() > 0 else -given[0]]

    def hides(given):
        return [given[0] * float(given[0].detach().abs().max().numpy())]

    for name, function, words in (("a", branches, "value"), ("b", hides, "")):
        replay = Replay()
        given = [values(9, 4)]
        with pytest.warns(UserWarning, match="cannot be recorded, so Python runs it each time: .+"):
            replay(name, function, given)
        for seed in range(6):  # of another shape, too, without another word
            given = [values(seed, 4 + seed // 3)]
            assert torch.equal(replay(name, function, given)[0], function(given)[0])
        assert replay.refused is not None
        assert words in replay.refused


def test_old_programs_are_let_go(monkeypatch):
    monkeypatch.setattr(module, "MOST", 2)
    replay, function = Replay(), Counted(lambda given: [given[0] + 1])
    for size in (1, 2, 1, 3):  # 2 is the least recently used
        replay("key", function, [values(0, size)])
    calls = function.calls
    replay("key", function, [values(0, 1)])
    assert function.calls == calls
    replay("key", function, [values(0, 2)])
    assert function.calls == calls + 2
