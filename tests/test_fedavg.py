"""FedAvg and FedAvgM against arithmetic by hand."""

import numpy as np
import pytest
import torch

from fedsim.strategies.centralized import Centralized
from fedsim.strategies.fedavg import FedAvg
from fedsim.strategies.fedexp import FedExP
from fedsim.strategies.local import Local
from fedsim.testing import apply_rule, cohort_of

ROWS = [[1.0, 0.0, 2.0], [0.0, 4.0, -2.0], [3.0, 0.0, 0.0]]


def test_the_mean_is_weighted_by_samples():
    # (1·row0 + 3·row1 + 4·row2) / 8
    assert apply_rule(FedAvg(), ROWS, [1, 3, 4]).tolist() == [13 / 8, 12 / 8, -4 / 8]


def test_server_lr_scales_the_mean():
    assert apply_rule(FedAvg(server_lr=0.5), ROWS, [1, 3, 4]).tolist() == [13 / 16, 12 / 16, -4 / 16]


def test_a_client_without_samples_does_not_count():
    assert apply_rule(FedAvg(), ROWS, [0, 1, 0]).tolist() == ROWS[1]


def test_momentum_by_hand():
    # v1 = 2, v2 = .5·2 + 4 = 5, v3 = .5·5 + 0 = 2.5; steps are .1 v
    rule = FedAvg(server_lr=0.1, server_momentum=0.5)
    state = rule.init(cohort_of([[0.0]]).layout, 1)
    steps = []
    for mean in (2.0, 4.0, 0.0):
        delta, state, _ = rule(cohort_of([[mean]]), state)
        steps.append(delta.item())
    assert steps == pytest.approx([0.2, 0.5, 0.25], abs=1e-15)


def test_momentum_is_sgd_with_momentum_on_the_pseudo_gradient():
    rng = np.random.default_rng(0)
    rule = FedAvg(server_lr=0.3, server_momentum=0.9)
    w = torch.nn.Parameter(torch.zeros(5, dtype=torch.float64))
    sgd = torch.optim.SGD([w], lr=0.3, momentum=0.9)
    mine, state = torch.zeros(5, dtype=torch.float64), rule.init(cohort_of(np.zeros((1, 5))).layout, 4)
    for _ in range(4):
        rows, n = rng.normal(size=(4, 5)), rng.integers(1, 9, 4)
        delta, state, _ = rule(cohort_of(rows, n), state)
        mine = mine + delta
        w.grad = -torch.as_tensor(n @ rows / n.sum())
        sgd.step()
    torch.testing.assert_close(mine, w.detach(), rtol=1e-12, atol=1e-12)


def test_without_momentum_there_is_no_memory():
    assert FedAvg().init(cohort_of([[0.0]]).layout, 1) == {}


@pytest.mark.parametrize(
    "arguments",
    [{"server_lr": 0.0}, {"server_lr": float("nan")}, {"server_momentum": 1.0}, {"server_momentum": -0.1}],
)
def test_arguments_out_of_range_are_named(arguments):
    (name,) = arguments
    with pytest.raises(ValueError, match=name):
        FedAvg(**arguments)


def test_the_bounds_say_what_they_ask_of_the_run():
    assert Local.local_parameters == ".*"
    assert Centralized.pooled
    assert apply_rule(Centralized(), [[1.0, 2.0]]).tolist() == [1.0, 2.0]
    assert apply_rule(Local(), np.zeros((3, 0))).shape == (0,)
    assert apply_rule(Local(), [[1.0, 2.0]]).tolist() == [0.0, 0.0]


def test_a_mean_of_rows_reads_them_once(monkeypatch):
    # norms of the rows cost another read: they are taken when a rule asks for them
    def asked(updates):
        raise AssertionError("nobody needs the norms")

    monkeypatch.setattr("fedsim.contracts.square_norms", asked)
    assert apply_rule(FedAvg(), [[1.0, 0.0], [0.0, 4.0]], weights=[3, 1]).tolist() == [0.75, 1.0]
    with pytest.raises(AssertionError, match="nobody"):
        apply_rule(FedExP(), [[1.0, 0.0], [0.0, 4.0]])
