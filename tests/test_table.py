"""The table behind engine=auto counts a round's work from shapes, and from nothing else."""

import numpy as np
import pytest
import torch
from torch import nn

from fedsim.clients.cross_entropy import CrossEntropy
from fedsim.contracts import Partition
from fedsim.engine.auto import make_engine
from fedsim.engine.store import ClientStore
from fedsim.engine.table import COSTS, Cost, Shapes, microseconds, shapes
from fedsim.engine.task import Task
from fedsim.layout import Layout
from fedsim.local import LocalTraining
from fedsim.models.char_gru import char_gru
from fedsim.models.cnn import cnn
from fedsim.models.mlp import mlp


def make_task(module, x, sizes, **training):
    sizes = np.array(sizes)
    return Task(
        module=module,
        shared=Layout.of(dict(module.named_parameters())),
        local=Layout((), ()),
        buffers=Layout((), ()),
        objective=CrossEntropy(),
        training=LocalTraining(**{"lr": 0.1, "batch_size": 4, **training}),
        x=x,
        y=torch.zeros(len(x), dtype=torch.int64),
        partition=Partition(np.arange(sizes.sum()) % len(x), np.concatenate([[0], np.cumsum(sizes)])),
        store=ClientStore(len(sizes), {}),
    )


def test_shapes_of_an_mlp_by_hand():
    task = make_task(mlp((8,), 5, hidden=(6,)), torch.zeros(10, 8), [10, 5, 0], local_epochs=2)
    found = shapes(task, cohort=2, threads=1)
    assert found.parameters == 8 * 6 + 6 + 6 * 5 + 5
    assert found.operations == 3  # two affine maps and a rectifier; views are free
    assert found.products == 4 * (8 * 6 + 6 * 5)  # a batch of 4
    assert found.convolutions == 0
    assert found.steps.tolist() == [6, 4]  # whoever has samples: 2 epochs of ceil(n / 4)


def test_shapes_of_a_convolution_by_hand():
    module = nn.Sequential(nn.Conv2d(3, 7, 3, padding=1), nn.Flatten(), nn.Linear(7 * 5 * 5, 2))
    found = shapes(make_task(module, torch.zeros(8, 3, 5, 5), [8]), cohort=1, threads=1)
    assert found.convolutions == 4 * 25 * 7 * 3 * 9  # positions × outputs × inputs × kernel
    assert found.products == 4 * 175 * 2


def test_a_batch_is_no_larger_than_clients_are():
    task = make_task(mlp((8,), 5, hidden=()), torch.zeros(6, 8), [3, 3], batch_size=64)
    assert shapes(task, cohort=2, threads=1).products == 3 * 8 * 5


def test_counting_leaves_the_module_as_it_was():
    module = mlp((8,), 5, hidden=(6,))
    task = make_task(module, torch.zeros(10, 8), [10])
    module.train()
    before = [p.clone() for p in module.parameters()]
    shapes(task, cohort=1, threads=1)
    assert module.training
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


UNIT = Cost(
    client=0.0, step=100.0, operation=10.0, call=30.0, parameter=0.1, memory=0.2, again=2e-4, product=0.01,
    convolution=0.02, entry=0.5,
)  # fmt: skip


@pytest.fixture
def unit(monkeypatch):
    monkeypatch.setitem(COSTS, "fused", UNIT)
    monkeypatch.setitem(COSTS, "sequential", UNIT)


def given(steps=(4, 4), cohort=6, threads=1):
    return Shapes(50, 3, 200.0, 100.0, np.array(steps), cohort, threads)


def test_a_round_by_hand(unit):
    # program 100 + 3 · 10 = 130; a client's step 50 · 0.1 + 200 · 0.01 + 100 · 0.02 = 9
    assert microseconds("sequential", given()) == pytest.approx(4 * 6 * (130 + 9))
    assert microseconds("fused", given(), 6) == pytest.approx(4 * (130 + 6 * 9))
    assert microseconds("fused", given(), 100) == pytest.approx(4 * (130 + 6 * 9))
    assert microseconds("fused", given(), 4) == pytest.approx(4 * (2 * 130 + 6 * 9))


def test_threads_train_programs_side_by_side_but_no_more_than_there_are(unit):
    assert microseconds("fused", given(threads=2), 3) == pytest.approx(4 * (2 * 130 + 6 * 9) / 2)
    assert microseconds("fused", given(threads=2), 6) == microseconds("fused", given(), 6)
    assert microseconds("sequential", given(threads=2)) == microseconds("sequential", given())


def test_a_chunk_takes_as_many_steps_as_its_longest_client(unit):
    # mean 4, longest 6: the one chunk of six rows walks 6 steps, while its rows' own work is 4 steps a row
    assert microseconds("fused", given(steps=(6, 2)), 6) == pytest.approx(6 * 130 + 4 * 6 * 9)
    assert microseconds("sequential", given(steps=(6, 2))) == pytest.approx(4 * 6 * (130 + 9))


def network(width):
    return make_task(mlp((64,), 10, hidden=(width,)), torch.zeros(40, 64), [20] * 200, batch_size=10)


@pytest.mark.parametrize(
    ("width", "cohort", "kernels"),
    [(4, 200, "fused"), (4, 2, "captured"), (2000, 200, "captured")],
    ids=["many small clients", "two of them", "many large ones"],
)
def test_many_small_clients_are_batched_and_large_ones_stay_in_the_cache(width, cohort, kernels):
    engine, _ = make_engine(network(width), "auto", cohort=cohort, threads=1)
    assert engine.plan["kernels"] == kernels
    engine.close()


@pytest.mark.parametrize(("beside", "kernels"), [(1, "captured"), (10, "fused")])
def test_rows_of_several_runs_are_shared_out_over_the_threads(beside, kernels):
    task = make_task(mlp((784,), 10, hidden=()), torch.zeros(60, 784), [60] * 1000, batch_size=10)  # B2
    engine, _ = make_engine(task, "auto", cohort=10, threads=2, beside=beside)
    assert engine.plan["kernels"] == kernels
    engine.close()


def test_the_same_shapes_get_the_same_engine_whatever_the_weights_and_the_data():
    plans = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        task = network(30)
        with torch.no_grad():
            task.x.normal_()
        engine, why = make_engine(task, "auto", cohort=20, threads=1)
        plans.append((dict(engine.plan), why))
        engine.close()
    assert plans[0] == plans[1]


def recurrent(cohort, hidden=8):
    x = torch.zeros(200, 20, dtype=torch.int64)
    return make_task(char_gru((20,), 9, embedding=4, hidden=hidden), x, [10] * cohort)


def test_a_recurrent_layer_reads_its_weights_once_for_every_token():
    found = shapes(recurrent(3), cohort=3, threads=1)
    assert found.again == 6 * 19 * 8 * 24  # 20 tokens; what reads the input is one product
    assert found.fused is not None
    operations, again = found.fused
    assert again == 2 * 19 * 8 * 24  # and moves them in one product
    assert operations < 10 * 20
    assert shapes(network(4), cohort=3, threads=1).fused is None


def test_a_cohort_of_recurrent_models_is_batched():
    engine, _ = make_engine(recurrent(40), "auto", cohort=40, threads=1)
    assert engine.plan["kernels"] == "fused"
    engine.close()


def test_fused_kernels_make_products_of_convolutions():
    assert COSTS["fused"].call == 0 < min(COSTS[name].call for name in ("sequential", "captured", "generic"))


def test_a_captured_step_costs_what_its_forward_and_backward_have(unit, monkeypatch):
    monkeypatch.setitem(COSTS, "captured", UNIT)
    counted = given()._replace(recorded=11, again=5000, fused=(7, 10000))
    assert microseconds("captured", counted) == pytest.approx(4 * 6 * (100 + 11 * 10 + 9 + 1))
    assert microseconds("fused", counted, 6) == pytest.approx(4 * (100 + 7 * 10 + 6 * (9 + 2)))


def test_clients_cost_something_beside_their_steps(monkeypatch):
    monkeypatch.setitem(COSTS, "fused", UNIT._replace(client=7.0))
    assert microseconds("fused", given(), 6) == pytest.approx(4 * (130 + 6 * 9) + 6 * 7)
    assert microseconds("fused", given(threads=2), 3) == pytest.approx((4 * (2 * 130 + 6 * 9) + 6 * 7) / 2)


def test_what_an_optimiser_does_beside_plain_sgd_is_counted_in_passes(unit):
    def beside(**training):
        task = make_task(mlp((8,), 5, hidden=()), torch.zeros(4, 8), [4], **training)  # two tensors
        found = shapes(task, cohort=1, threads=1)
        return found.memories, found.recorded - plain.recorded

    plain = shapes(make_task(mlp((8,), 5, hidden=()), torch.zeros(4, 8), [4]), cohort=1, threads=1)
    assert beside() == (0, 0)
    assert beside(momentum=0.9) == (1, 2 * 2)
    assert beside(clip_norm=1.0) == (1, 2 * 3)
    assert beside(momentum=0.9, clip_norm=1.0) == (2, 2 * 5)
    assert beside(optimizer="adamw") == (4, 2 * 9)
    counted = given()._replace(memories=2)  # of 50 parameters each
    assert microseconds("sequential", counted) == pytest.approx(4 * 6 * (130 + 9 + 2 * 50 * 0.2))


def test_what_operations_write_is_counted_for_a_batch(unit):
    task = make_task(mlp((8,), 5, hidden=(6,)), torch.zeros(10, 8), [10, 5, 0])
    assert shapes(task, cohort=2, threads=1).entries == 4 * (6 + 6 + 5)  # a batch of 4: map, rectifier, map
    counted = given()._replace(entries=10.0)
    assert microseconds("fused", counted, 6) == pytest.approx(4 * (130 + 6 * (9 + 5)))


def test_a_small_convolution_costs_its_call_where_onednn_does_it(unit):
    task = make_task(cnn((1, 8, 8), 10, channels=(2, 3), hidden=4), torch.zeros(8, 1, 8, 8), [8])
    assert shapes(task, cohort=1, threads=1).calls == 2
    task = make_task(task.module.double(), task.x.double(), [8])
    assert shapes(task, cohort=1, threads=1).calls == 0
    counted = given()._replace(calls=2)
    assert microseconds("sequential", counted) == pytest.approx(4 * 6 * (130 + 60 + 9))


def test_torchs_own_recurrent_layers_are_counted_by_their_products():
    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.head = nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

        def forward(self, x):
            return self.head(self.layer(x)[0][:, -1])

    found = shapes(make_task(Tokens(), torch.zeros(8, 5, 3), [8]), cohort=1, threads=1)
    assert found.products == 4 * (5 * (3 * 16 + 4 * 16) + 4 * 2)  # a batch of 4, 5 tokens, 4 gates of 4
    assert found.unrolled > 5 * 4 > found.operations
    assert found.again == 6 * 4 * (4 * 16)
