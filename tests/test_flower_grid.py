"""The grid and fedsim's shell: nothing is built that nobody reads, and what is read is what a real node would send."""

import copy
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg

import fedsim.flower.grid as grid_module
from fedsim.contracts import Cohort, LinearRule, Streamed, Sums, row_square_norms
from fedsim.flower import records
from fedsim.flower.grid import SimulationGrid
from fedsim.flower.records import FlatRecord, LazyArray, flatten, layout_of
from fedsim.flower.strategy import RuleStrategy, aggregate
from fedsim.layout import Layout
from fedsim.strategies.fedavg import FedAvg

LAYOUT = Layout(("w", "b"), ((2, 2), ()))


class Quadratics:
    """Client k goes half-way to the point k + 1, in every coordinate; n_k = k + 1."""

    layout = LAYOUT

    def __init__(self):
        self.calls = []

    def train(self, round, clients, models, broadcast, config):
        self.calls.append((round, clients.tolist(), models, dict(broadcast), dict(config)))
        target = torch.from_numpy(clients + 1.0)[:, None]  # (K, 1)
        ones = torch.ones(len(clients), dtype=torch.int64)
        return Cohort(
            updates=0.5 * (target - models),
            weights=torch.from_numpy(clients + 1.0),
            clients=torch.from_numpy(clients),
            num_steps=ones,
            staleness=0 * ones,
            received=(round - 1) * ones,
            round=round,
            layout=self.layout,
            extras={"train_loss": (target - models).square().sum(1), "second": torch.ones(len(clients), 5)},
        )

    def evaluate(self, round, clients, models):
        return {"num-examples": clients + 1, "eval_loss": clients * 1.0, "eval_acc": clients * 0.1}


def make_grid(clients=(0, 1, 2), backend=None, **arguments):
    grid = SimulationGrid(backend or Quadratics(), **arguments)
    grid.cohort = np.array(clients)
    return grid


def flat(*values):
    return torch.tensor(values, dtype=torch.float64)


W = flat(0.0, 1.0, 2.0, 3.0, 4.0)


def train_message(node, w=W, **config):
    content = RecordDict({"arrays": FlatRecord(w, LAYOUT), "config": ConfigRecord(config)})
    return Message(content, node, "train")


# Laziness


@pytest.fixture
def spy(monkeypatch):
    """Count what is materialised: arrays read and messages built."""
    counts = {"arrays": 0, "messages": 0}
    to_numpy, message = records.to_numpy, Message.__init__

    def counted_array(tensor):
        counts["arrays"] += 1
        return to_numpy(tensor)

    def counted_message(self, *args, **kwargs):
        counts["messages"] += 1
        message(self, *args, **kwargs)

    monkeypatch.setattr(records, "to_numpy", counted_array)
    monkeypatch.setattr(Message, "__init__", counted_message)
    return counts


def test_fedsims_shell_builds_no_message_and_reads_no_array(spy):
    grid = make_grid()
    strategy = RuleStrategy(FedAvg())
    w, _ = aggregate(strategy, 1, W, grid)
    w, _ = aggregate(strategy, 2, w, grid)
    assert spy == {"arrays": 0, "messages": 0}
    # Σ n_k (k+1) / Σ n_k = 14/6; two half-steps: w/4 + 3/4 · 14/6.
    torch.testing.assert_close(w, W / 4 + 0.75 * 14 / 6, rtol=1e-12, atol=0)


def test_flowers_fedavg_reads_each_array_once_and_serialises_none_but_its_own(spy, monkeypatch):
    serialised = []
    from_numpy = Array.from_numpy_ndarray.__func__
    monkeypatch.setattr(Array, "from_numpy_ndarray", classmethod(lambda c, a: serialised.append(1) or from_numpy(c, a)))
    aggregate(FlowerFedAvg(min_train_nodes=1, min_available_nodes=1), 1, W, make_grid())
    assert spy == {"arrays": 3 * 2, "messages": 3 + 3}  # 3 clients × 2 arrays; requests and replies
    assert len(serialised) == 2  # the aggregate's two arrays


def test_a_lazy_array_is_an_array_in_all_that_can_be_asked():
    record = FlatRecord(W, LAYOUT)
    real = ArrayRecord({"w": Array(W[:4].reshape(2, 2).numpy()), "b": Array(np.array(4.0))})
    assert record == real
    assert real == record
    for name, array in record.items():
        assert isinstance(array, LazyArray)
        assert (array.dtype, array.shape, array.stype) == (real[name].dtype, real[name].shape, real[name].stype)
        assert array.data == real[name].data
    assert type(copy.deepcopy(record["w"])) is Array
    assert record.count_bytes() == real.count_bytes()
    assert record.plain().object_id == real.object_id
    assert torch.equal(record.to_torch_state_dict()["w"], W[:4].reshape(2, 2))


def test_what_a_strategy_reads_is_its_own():
    record = FlatRecord(W.clone(), LAYOUT)
    array = record["w"].numpy()
    array -= 100  # as QFedAvg does
    assert torch.equal(record.flat, W)
    np.testing.assert_array_equal(record["w"].numpy(), [[0, 1], [2, 3]])


@pytest.mark.parametrize("change", ["set", "delete", "data"])
def test_a_changed_record_is_read_from_its_arrays(change):
    record = FlatRecord(W, LAYOUT)
    assert flatten(record, LAYOUT) is W
    if change == "set":
        record["b"] = Array(np.array(9.0))
    elif change == "delete":
        del record["b"]
        assert record.flat is None
        record["b"] = Array(np.array(9.0))
    else:
        record["b"].data = Array(np.array(9.0)).data
    assert record.flat is None
    assert torch.equal(flatten(record, LAYOUT), flat(0, 1, 2, 3, 9))


def test_flatten_follows_the_layout_and_names_what_does_not_fit():
    shuffled = ArrayRecord({"b": Array(np.array(4.0)), "w": Array(np.arange(4.0).reshape(2, 2))})
    assert torch.equal(flatten(shuffled, LAYOUT), W)
    assert flatten(shuffled, LAYOUT, W.float()).dtype == torch.float32
    assert layout_of(shuffled) == Layout(("b", "w"), ((), (2, 2)))
    with pytest.raises(ValueError, match=r"missing \['w'\], unknown \['v'\]"):
        flatten(ArrayRecord({"b": Array(np.array(4.0)), "v": Array(np.ones(1))}), LAYOUT)
    with pytest.raises(ValueError, match=r"'w' must have shape \(2, 2\), got \(4,\)"):
        flatten(ArrayRecord({"b": Array(np.array(4.0)), "w": Array(np.ones(4))}), LAYOUT)


def test_flatten_joins_buffers_of_integers():
    record = ArrayRecord({"w": Array(np.ones((2, 2), np.float32)), "b": Array(np.array(7, np.int64))})
    result = flatten(record, LAYOUT)
    assert result.dtype == torch.float32
    assert result.tolist() == [1, 1, 1, 1, 7]


# The grid's contract


def test_replies_carry_one_record_of_weights_and_one_of_metrics_in_order_of_nodes():
    grid = make_grid((0, 4, 7))
    assert grid.get_node_ids() == [1, 5, 8]
    assert [node.node_id for node in grid.get_nodes()] == [1, 5, 8]
    requests = [train_message(node) for node in (8, 1, 5)]
    replies = grid.send_and_receive(requests)
    assert [reply.metadata.src_node_id for reply in replies] == [1, 5, 8]
    ids = {request.metadata.dst_node_id: request.metadata.message_id for request in requests}
    assert [reply.metadata.reply_to_message_id for reply in replies] == [ids[1], ids[5], ids[8]]
    assert len(set(ids.values())) == 3
    for reply, target in zip(replies, (1, 5, 8), strict=True):
        (arrays,) = reply.content.array_records.values()
        (metrics,) = reply.content.metric_records.values()
        assert torch.equal(flatten(arrays, LAYOUT), (W + target) / 2)
        assert metrics == {"num-examples": target, "train_loss": pytest.approx(((target - W) ** 2).sum().item())}
        assert isinstance(metrics["num-examples"], int)
    assert replies[0] is replies[0], "edits that a strategy makes to a reply must stay"
    assert [reply.metadata.src_node_id for reply in replies[1:]] == [5, 8]
    assert replies[-1] is replies[2]


def test_fractional_weights_stay_fractions():
    class Halves(Quadratics):
        def train(self, *args):
            cohort = super().train(*args)
            return replace(cohort, weights=cohort.weights - 0.5)

    replies = make_grid(backend=Halves()).send_and_receive([train_message(1), train_message(2)])
    assert [reply.content["metrics"]["num-examples"] for reply in replies] == [0.5, 1.5]


def test_clients_that_did_not_answer_send_no_reply():
    class Drops(Quadratics):
        def train(self, *args):
            return super().train(*args).take(torch.tensor([0, 2]))

    grid = make_grid(backend=Drops())
    replies = grid.send_and_receive([train_message(node) for node in (3, 1, 2)])
    assert [reply.metadata.src_node_id for reply in replies] == [1, 3]
    strategy = RuleStrategy(FedAvg())
    messages = strategy.configure_train(1, FlatRecord(W, LAYOUT), ConfigRecord(), grid)
    assert [reply.metadata.src_node_id for reply in grid.send_and_receive(messages)] == [1, 3]


def test_a_strategy_may_send_each_client_its_own_model():
    grid = make_grid()
    replies = grid.send_and_receive([train_message(node, W * node) for node in (3, 1, 2)])
    for reply, target in zip(replies, (1, 2, 3), strict=True):
        assert torch.equal(flatten(reply.content["arrays"], LAYOUT), (W * target + target) / 2)
    (_, clients, models, _, _) = grid.backend.calls[0]
    assert clients == [0, 1, 2]
    assert torch.equal(models, torch.stack([W, 2 * W, 3 * W]))


def test_models_that_a_strategy_builds_reach_the_clients_in_the_runs_dtype():
    class Doubling(FlowerFedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            doubled = ArrayRecord(
                {name: Array(np.array(2.0 * array.numpy(), np.float64)) for name, array in arrays.items()}
            )
            return super().configure_train(server_round, doubled, config, grid)

    grid = make_grid()
    aggregate(Doubling(min_train_nodes=1, min_available_nodes=1), 1, W.float(), grid)
    (_, _, models, _, _) = grid.backend.calls[0]
    assert models.dtype == torch.float32
    assert models.tolist() == (2 * W).tolist()


def test_a_strategy_may_send_each_client_its_own_config_and_several_messages():
    grid = make_grid()
    messages = [train_message(2, lr=0.1), train_message(1, lr=0.5), train_message(3, lr=0.1), train_message(2, lr=0.1)]
    replies = grid.send_and_receive(messages)
    assert [reply.metadata.src_node_id for reply in replies] == [1, 2, 2, 3]
    assert [(clients, config) for _, clients, _, _, config in grid.backend.calls] == [
        ([1, 2], {"lr": 0.1}),
        ([0], {"lr": 0.5}),
        ([1], {"lr": 0.1}),
    ]


def test_the_round_is_the_strategys_or_else_the_loops():
    grid = make_grid()
    grid.round = 4
    grid.send_and_receive([train_message(1)])
    grid.send_and_receive([train_message(1, **{"server-round": 9})])
    assert [call[0] for call in grid.backend.calls] == [4, 9]


def test_pushed_messages_train_together_and_are_pulled_once():
    grid = make_grid()
    ids = grid.push_messages([train_message(2)]) + grid.push_messages([train_message(1), train_message(3)])
    assert grid.backend.calls == []
    (second,) = grid.pull_messages([ids[1]])
    assert second.metadata.src_node_id == 1
    assert [call[1] for call in grid.backend.calls] == [[0, 1, 2]]
    assert {r.metadata.reply_to_message_id for r in grid.pull_messages(ids)} == {ids[0], ids[2]}
    assert grid.pull_messages([*ids, "never sent"]) == []


def test_nothing_is_sent_for_nothing():
    grid = make_grid()
    assert list(grid.send_and_receive([])) == []
    assert grid.backend.calls == []


def test_evaluation_replies_carry_the_metrics():
    replies = make_grid().send_and_receive(
        [Message(RecordDict({"arrays": FlatRecord(W, LAYOUT)}), node, "evaluate") for node in (3, 2)]
    )
    assert [dict(reply.content["metrics"]) for reply in replies] == [
        {"num-examples": 2, "eval_loss": 1.0, "eval_acc": 0.1},
        {"num-examples": 3, "eval_loss": 2.0, "eval_acc": 0.2},
    ]


@pytest.mark.parametrize(
    ("message", "error"),
    [
        (lambda: Message(RecordDict(), 1, "query"), "answer 'train' and 'evaluate' messages, not 'query'"),
        (lambda: train_message(0), "node ids start at 1, got a message to 0"),
        (lambda: Message(RecordDict(), 1, "train"), "exactly one ArrayRecord, got 0"),
    ],
)
def test_messages_that_no_client_can_answer(message, error):
    grid = make_grid()
    with pytest.raises(ValueError, match=error):
        grid.send_and_receive([message()])


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="on_client_error must be 'raise' or 'drop', got 'ignore'"):
        make_grid(on_client_error="ignore")
    with pytest.raises(ValueError, match=r"fraction must be in \(0, 1\], got 0"):
        RuleStrategy(FedAvg(), fraction=0)
    with pytest.raises(ValueError, match=r"fraction_evaluate must be in \[0, 1\], got 2"):
        RuleStrategy(FedAvg(), fraction_evaluate=2)
    with pytest.raises(ValueError, match="min_nodes must be >= 1, got 0"):
        RuleStrategy(FedAvg(), min_nodes=0)


@pytest.mark.parametrize(("fraction", "size"), [(0.3, 3), (0.25, 3), (0.01, 1), (1.0, 10)])
def test_a_deployments_cohort_is_its_fraction_however_many_nodes_are_waited_for(fraction, size):
    connected = SimpleNamespace(get_node_ids=lambda: list(range(100, 110)))
    nodes, count = RuleStrategy(FedAvg(), fraction=fraction, min_nodes=10)._sample(1, connected, fraction)
    assert (len(nodes), count) == (size, 10)
    assert set(nodes) <= set(range(100, 110))


def test_clipping_on_the_clients_leaves_short_updates_and_zero_alone():
    cohort = Quadratics().train(1, np.array([0, 1]), torch.zeros(5, dtype=torch.float64), {}, {})
    cohort = replace(cohort, updates=torch.tensor([[0.0] * 5, [3.0, 4.0, 0, 0, 0]], dtype=torch.float64))
    for norm, row, bits in ((2.5, [1.5, 2.0, 0, 0, 0], [0, 1]), (5.0, [3.0, 4.0, 0, 0, 0], [0, 0])):
        result = grid_module.clipped(cohort, norm)
        assert result.updates.tolist() == [[0.0] * 5, row]
        assert result.extras["norm_bit"].tolist() == bits


# fedsim's shell


@dataclass(frozen=True, kw_only=True)
class Remembering(LinearRule):
    """Counts rounds, sends the count to the clients, and wants two of them."""

    def init(self, layout, num_clients):
        return {"rounds": 0, "num_clients": num_clients}

    def check(self, num_participants):
        if num_participants < 2:
            raise ValueError("needs 2 clients")

    def broadcast(self, state):
        return {"rounds": float(state["rounds"]), "ones": torch.ones(5, dtype=torch.float64)}

    def finish(self, mean, sums, state):
        metrics = {"norm": mean.norm(), "per_client": sums.square_norms, "count": len(sums.cohort), "name": "x"}
        return mean, {**state, "rounds": state["rounds"] + 1}, metrics


def test_the_shell_keeps_state_sends_broadcasts_and_reports_scalars():
    grid, strategy = make_grid(), RuleStrategy(Remembering(), num_clients=50)
    w, metrics = aggregate(strategy, 1, W, grid)
    aggregate(strategy, 2, w, grid)
    assert strategy.state == {"rounds": 2, "num_clients": 50}
    assert [call[3]["rounds"] for call in grid.backend.calls] == [0.0, 1.0]
    assert metrics["per_client"].shape == (3,)
    _, record = strategy.aggregate_train(
        2, grid.send_and_receive(strategy.configure_train(2, FlatRecord(W, LAYOUT), ConfigRecord(), grid))
    )
    assert set(record) == {"norm", "count"}
    assert strategy.cohort.clients.tolist() == [0, 1, 2]


def test_a_deployments_rule_may_refuse_the_cohort_before_it_trains():
    with pytest.raises(ValueError, match="needs 2 clients"):
        RuleStrategy(Remembering()).begin(make_grid((0,)).backend.layout, 1, cohort=1)


def test_a_streamed_cohort_is_finished_without_rows():
    class Streams(Quadratics):
        def train(self, *args):
            cohort = super().train(*args)
            c, updates = cohort.weights, cohort.rows
            empty = replace(cohort, updates=None)
            sums = Sums(empty, c, row_square_norms(updates), {})
            return replace(empty, streamed=Streamed((c @ updates) / c.sum(), sums))

    streamed, _ = aggregate(RuleStrategy(FedAvg()), 1, W, make_grid(backend=Streams()))
    whole, _ = aggregate(RuleStrategy(FedAvg()), 1, W, make_grid())
    assert torch.equal(streamed, whole)
    with pytest.raises(ValueError, match="this cohort was streamed"):
        aggregate(FlowerFedAvg(min_train_nodes=1, min_available_nodes=1), 1, W, make_grid(backend=Streams()))


def test_the_callers_weights_may_change_in_place_while_a_strategy_remembers_them():
    class Remembers(FlowerFedAvg):
        def configure_train(self, server_round, arrays, config, grid):
            self.seen = arrays
            return super().configure_train(server_round, arrays, config, grid)

    strategy, w = Remembers(min_train_nodes=1, min_available_nodes=1), W.clone()
    new, _ = aggregate(strategy, 1, w, make_grid())
    w.copy_(new)
    np.testing.assert_array_equal(strategy.seen["w"].numpy(), [[0, 1], [2, 3]])


def test_foreign_arrays_of_another_model_are_refused():
    class Wrong(FlowerFedAvg):
        def aggregate_train(self, server_round, replies):
            arrays, metrics = super().aggregate_train(server_round, replies)
            arrays["extra"] = arrays["b"]
            return arrays, metrics

    with pytest.raises(ValueError, match=r"unknown \['extra'\]"):
        aggregate(Wrong(min_train_nodes=1, min_available_nodes=1), 1, W, make_grid())


def test_the_shell_runs_under_flowers_own_loop():
    grid = make_grid()
    result = RuleStrategy(FedAvg()).start(grid, FlatRecord(W, LAYOUT), num_rounds=2)
    torch.testing.assert_close(flatten(result.arrays, LAYOUT), W / 4 + 0.75 * 14 / 6, rtol=1e-12, atol=0)
    # Σ n_k k / Σ n_k = (0·1 + 1·2 + 2·3) / 6
    assert result.evaluate_metrics_clientapp[2]["eval_loss"] == pytest.approx(8 / 6)
    assert isinstance(result.train_metrics_clientapp[1], MetricRecord)
