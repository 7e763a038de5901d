"""Foreign ClientApps simulated, and fedsim's own shells over a wire: bytes are all that passes between the two."""

import random
import sys
import textwrap

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid
from flwr.serverapp.strategy import DifferentialPrivacyClientSideFixedClipping
from flwr.serverapp.strategy import FedAvg as FlowerFedAvg
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from torch import nn

from fedsim.contracts import Cohort, LinearRule
from fedsim.errors import UserError
from fedsim.flower.client import FlowerApp, ForeignClients, client_app, load_app
from fedsim.flower.grid import SimulationGrid
from fedsim.flower.records import FlatRecord
from fedsim.flower.replies import ClientError, read_replies
from fedsim.flower.strategy import RuleStrategy, aggregate, evaluate
from fedsim.layout import Layout
from fedsim.strategies.fedavg import FedAvg

NUM_CLIENTS = 6
W0 = torch.zeros(10)


def data(client):
    rng = np.random.default_rng(client)
    x = torch.from_numpy(rng.normal(size=(10 + client, 4)).astype(np.float32))
    return x, (x[:, 0] + x[:, 1] > 0).long()


def torch_app(mods=(), keep_input=False):
    """A user's app as Flower's tutorials write it: a torch model, dropout, global randomness, state per client."""
    app = ClientApp()

    def load(message):
        model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 2))
        model.load_state_dict(message.content["arrays"].to_torch_state_dict(keep_input=keep_input))
        return model

    @app.train(mods=list(mods))
    def train(message, context):
        model, (x, y) = load(message), data(context.node_config["partition-id"])
        optimizer = torch.optim.SGD(model.parameters(), lr=context.run_config.get("lr", 0.5))
        order = list(range(len(x)))
        random.shuffle(order)
        for start in range(0, len(x), 5):
            batch = order[start : start + 5]
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x[batch]), y[batch])
            loss.backward()
            optimizer.step()
        rounds = context.state.get("memory", MetricRecord({"rounds": 0}))
        context.state["memory"] = MetricRecord({"rounds": rounds["rounds"] + 1})
        metrics = {"num-examples": len(x), "train_loss": loss.item(), "rounds": rounds["rounds"] + 1}
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
        return Message(content, reply_to=message)

    @app.evaluate()
    def evaluate_(message, context):
        model, (x, y) = load(message).eval(), data(context.node_config["partition-id"])
        logits = model(x)
        metrics = {
            "num-examples": len(x),
            "eval_loss": nn.functional.cross_entropy(logits, y).item(),
            "eval_acc": (logits.argmax(1) == y).float().mean().item(),
        }
        return Message(RecordDict({"metrics": MetricRecord(metrics)}), reply_to=message)

    return app


LAYOUT = Layout(("1.weight", "1.bias"), ((2, 4), (2,)))


def make_grid(app=None, clients=range(NUM_CLIENTS), *, on_client_error="raise", seed=0):
    backend = ForeignClients(
        app or torch_app(), layout=LAYOUT, num_clients=NUM_CLIENTS, seed=seed, on_client_error=on_client_error
    )
    grid = SimulationGrid(backend, seed=seed, on_client_error=on_client_error)
    grid.cohort = np.array(list(clients))
    return grid


def flower_fedavg():
    return FlowerFedAvg(min_train_nodes=1, min_available_nodes=1, min_evaluate_nodes=1)


def run(strategy, grid, num_rounds, w=W0, start=1):
    for round in range(start, start + num_rounds):
        w, metrics = aggregate(strategy, round, w, grid)
    return w, metrics


def test_a_foreign_app_learns_under_a_fedsim_rule_and_a_flower_strategy_alike():
    own, foreign = RuleStrategy(FedAvg()), flower_fedavg()
    own_grid, foreign_grid = make_grid(), make_grid()
    w, _ = run(own, own_grid, 10)
    w_foreign, metrics = run(foreign, foreign_grid, 10)
    # float32, ten rounds of sums in two orders through a contracting training: 1e-5 is some ten roundings.
    torch.testing.assert_close(w, w_foreign, rtol=1e-5, atol=1e-5)
    assert evaluate(foreign, 10, w, foreign_grid)["eval_acc"] > 0.9
    assert evaluate(own, 10, w, own_grid)["eval_acc"] > 0.9
    assert metrics["rounds"] == pytest.approx(10)
    assert own.cohort.extras["rounds"].tolist() == [10] * NUM_CLIENTS
    assert own.cohort.weights.tolist() == [10 + k for k in range(NUM_CLIENTS)]


def test_results_depend_on_seed_round_and_client_and_on_nothing_else():
    whole, part = make_grid(), make_grid()
    strategy = RuleStrategy(FedAvg())
    aggregate(strategy, 1, W0, whole)
    random.seed(1), torch.manual_seed(1), np.random.seed(1)  # noqa: NPY002
    alone = ForeignClients(torch_app(), layout=LAYOUT, num_clients=NUM_CLIENTS)
    for client in (4, 1, 3):
        row = alone.train(1, np.array([client]), W0, {}, {}).rows[0]
        assert torch.equal(row, strategy.cohort.rows[client])
    again = alone.train(2, np.array([4]), W0, {}, {}).rows[0]
    assert not torch.equal(again, strategy.cohort.rows[4])
    other = make_grid(seed=1).backend.train(1, np.array([4]), W0, {}, {}).rows[0]
    assert not torch.equal(other, strategy.cohort.rows[4])
    assert part.backend.capture() == {}


def test_client_state_survives_rounds_and_a_checkpoint():
    grid = make_grid(clients=(1, 4))
    w, _ = run(RuleStrategy(FedAvg()), grid, 2)
    state = grid.backend.capture()
    assert set(state) == {"1", "4"}
    resumed = make_grid(clients=(1, 4))
    resumed.backend.restore(state)
    strategy = RuleStrategy(FedAvg())
    run(strategy, resumed, 1, w, start=3)
    assert strategy.cohort.extras["rounds"].tolist() == [3, 3]


def test_clients_keep_every_kind_of_record():
    state = RecordDict(
        {
            "a": ArrayRecord({"x": Array(np.arange(6, dtype=np.int64).reshape(2, 3))}),
            "m": MetricRecord({"i": 3, "f": 0.25, "l": [1.0, 2.5]}),
            "c": ConfigRecord({"s": "text", "b": True, "raw": b"\x00\xff", "l": ["u", "v"], "none": []}),
        }
    )
    app = ClientApp()

    @app.train()
    def train(message, context):
        context.state = RecordDict(dict(state))
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": message.content["arrays"], "metrics": metrics}), reply_to=message)

    one, other = make_grid(app).backend, make_grid(app).backend
    one.train(1, np.array([2]), W0, {}, {})
    other.restore(one.capture())
    assert other._contexts[2].state == state
    assert isinstance(other._contexts[2].state["c"]["b"], bool)


def failing_app():
    app, good = ClientApp(), torch_app()

    @app.train()
    def train(message, context):
        if context.node_config["partition-id"] in (2, 3):
            raise OSError("disk of client is full")
        return good(message, context)

    return app


@pytest.mark.parametrize("make", [flower_fedavg, lambda: RuleStrategy(FedAvg())])
def test_a_failing_client_stops_the_run_or_is_left_out(make, caplog):
    with pytest.raises(ClientError, match="node 3 failed: OSError: disk of client is full") as info:
        aggregate(make(), 1, W0, make_grid(failing_app()))
    assert "in train" in info.value.__notes__[0]  # the client's own traceback
    dropped, _ = aggregate(make(), 1, W0, make_grid(failing_app(), on_client_error="drop"))
    assert "node 4 failed: OSError: disk of client is full; it is left out" in caplog.messages
    without, _ = aggregate(make(), 1, W0, make_grid(clients=(0, 1, 4, 5)))
    torch.testing.assert_close(dropped, without, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match=r"every client failed|returned no arrays"):
        aggregate(make(), 1, W0, make_grid(failing_app(), clients=(2, 3), on_client_error="drop"))


def test_a_client_that_returns_no_message_has_failed():
    app = ClientApp()
    app.train()(lambda message, context: None)
    with pytest.raises(ClientError, match="node 1 failed: TypeError: the ClientApp returned a NoneType, not a Message"):
        aggregate(RuleStrategy(FedAvg()), 1, W0, make_grid(app))


def test_one_client_cannot_spoil_the_next_ones_message():
    # torch_app takes the arrays out of its message; Flower's strategies send one content to all.
    grid = make_grid()
    record = FlatRecord(W0, LAYOUT)
    content = RecordDict({"arrays": record, "config": ConfigRecord({"server-round": 1})})
    grid.send_and_receive([Message(content, node, "train") for node in (1, 2)])
    assert list(record) == ["1.weight", "1.bias"]


def test_flowers_own_mods_work_on_a_foreign_app():
    def clipped(mods):
        strategy = DifferentialPrivacyClientSideFixedClipping(flower_fedavg(), 0.0, 0.01, NUM_CLIENTS)
        return aggregate(strategy, 1, W0, make_grid(torch_app(mods, keep_input=True)))[0]

    assert clipped([]).norm() > 0.02  # every update is longer than the bound, and unclipped without the mod
    assert 0 < clipped([fixedclipping_mod]).norm() <= 0.01 + 1e-6
    content = RecordDict({"arrays": FlatRecord(W0, LAYOUT), "config": ConfigRecord({"clipping_norm": 1.0})})
    with pytest.raises(ClientError, match="node 1 failed: fixedclipping_mod expects the keys"):
        make_grid(torch_app([fixedclipping_mod])).send_and_receive([Message(content, 1, "train")])


def test_run_config_reaches_the_app():
    still = FlowerApp(app=torch_app(), run_config={"lr": 0.0}).clients(LAYOUT, NUM_CLIENTS)
    assert not still.train(1, np.array([0]), W0, {}, {}).rows.any()


def test_rows_may_start_from_different_weights():
    backend = make_grid(failing_app(), on_client_error="drop").backend
    models = torch.stack([W0 + k for k in range(4)])
    cohort = backend.train(1, np.array([1, 2, 3, 4]), models, {}, {})  # 2 and 3 fail
    assert cohort.clients.tolist() == [1, 4]
    for k, client, model in ((0, 1, models[0]), (1, 4, models[3])):
        alone = make_grid().backend.train(1, np.array([client]), model, {}, {})
        assert torch.equal(alone.rows[0], cohort.rows[k])


def test_clients_draw_apart():
    app = ClientApp()

    @app.train()
    def train(message, context):
        draws = {"num-examples": 1, "a": random.random(), "b": np.random.random(), "c": torch.rand(()).item()}  # noqa: NPY002
        return Message(RecordDict({"arrays": message.content["arrays"], "m": MetricRecord(draws)}), reply_to=message)

    backend = make_grid(app).backend
    draws = [backend.train(round, np.arange(3), W0, {}, {}).extras[n].tolist() for round in (1, 2) for n in "abc"]
    assert len(set(np.ravel(draws))) == 2 * 3 * 3


def test_replies_become_rows_in_order_of_clients():
    request = Message(RecordDict(), 1, "train")

    def reply(value, num_examples):
        arrays = FlatRecord(W0 + value, LAYOUT)
        metrics = MetricRecord({"num-examples": num_examples, "per_class": [1.0, 2.0]})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=request)

    start = torch.stack([W0 + 1, W0 + 2, W0])
    replies = [reply(5.0, 1), reply(6.0, 2), reply(7.0, 3)]
    cohort = read_replies(replies, clients=[8, 2, 5], layout=LAYOUT, start=start, round=4)
    assert cohort.clients.tolist() == [2, 5, 8]
    assert cohort.weights.tolist() == [2, 3, 1]
    assert cohort.rows[:, 0].tolist() == [4, 7, 4]
    assert cohort.received.tolist() == [3, 3, 3]
    assert cohort.extras == {}


def test_an_app_is_found_by_name_in_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "flower_app_module.py").write_text(
        textwrap.dedent("""
            from flwr.clientapp import ClientApp
            client = ClientApp()
            number = 3
        """)
    )
    (tmp_path / "flower_broken_module.py").write_text("import nowhere_to_be_found\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert isinstance(load_app("flower_app_module:client"), ClientApp)
    assert isinstance(FlowerApp(app="flower_app_module:client").app, ClientApp)
    for path, error in (
        ("flower_app_module", "must be 'module:attribute'"),
        ("flower_app_modul:client", "No module named 'flower_app_modul'"),
        ("flower_app_module:clinet", "has no 'clinet'; did you mean 'client'"),
        ("flower_app_module:number", "is a int, not a flwr.clientapp.ClientApp"),
        ("flower_broken_module:client", "No module named 'nowhere_to_be_found'"),
    ):
        with pytest.raises(UserError, match=error):
            load_app(path)
    with pytest.raises(ValueError, match=r"app must be 'module:attribute' or a .*ClientApp, got None"):
        FlowerApp(app=None)


def test_wrong_clients_are_named():
    with pytest.raises(ValueError, match="num_clients must be >= 1, got 0"):
        ForeignClients(ClientApp(), layout=LAYOUT, num_clients=0)
    with pytest.raises(ValueError, match="clients are 0 to 5, got a message to client 6"):
        make_grid().backend.train(1, np.array([6]), W0, {}, {})


# fedsim's two shells in a deployment


class WireGrid(Grid):
    """Nodes with random ids behind a wire: every message and reply is taken apart to bytes and built again."""

    nodes = (917, 12, 2**63 + 5, 4000)  # in a deployment ids are random 64-bit numbers

    def __init__(self, app):
        self.app, self.sent = app, []
        self.contexts = {
            node: Context(1, node, {"partition-id": k}, RecordDict(), {}) for k, node in enumerate(sorted(self.nodes))
        }

    def get_node_ids(self):
        return set(self.nodes)

    def send_and_receive(self, messages, *, timeout=None):
        replies = []
        for message in messages:
            self.sent.append(message.metadata.dst_node_id)
            received = over_wire(message)
            replies.append(over_wire(self.app(received, self.contexts[message.metadata.dst_node_id])))
        return replies[::-1]  # in whatever order they come

    run = property(lambda self: None)

    def set_run(self, run): ...

    def create_message(self, *args): ...

    def push_messages(self, messages): ...

    def pull_messages(self, message_ids): ...


def over_wire(message):
    contents = {key: part.deflate() for key, part in get_all_nested_objects(message).items()}
    return inflate_object_from_contents(message.object_id, contents)


class Halving(LinearRule):
    """Steps half the mean, tells clients how many rounds there were, and averages a second upload of theirs."""

    reduced_extras = ("second",)

    def init(self, layout, num_clients):
        return {"rounds": 0, "num_clients": num_clients}

    def broadcast(self, state):
        return {"rounds": state["rounds"], "direction": torch.arange(3.0)}

    def finish(self, mean, sums, state):
        metrics = {"second": sums.extras["second"], "steps": sums.cohort.num_steps}
        return 0.5 * mean, {**state, "rounds": state["rounds"] + 1}, metrics


def local_train(weights, config, context):
    """Go to the point client + 1, plus the number of rounds that the rule has told."""
    client = context.node_config["partition-id"]
    assert set(config) == {"server-round", "broadcast"}
    assert isinstance(config["broadcast"]["rounds"], int)
    target = client + 1.0 + config["broadcast"]["rounds"]
    metrics = {
        "num-examples": client + 1,
        "num-steps": 7,
        "train_loss": target,
        "second": config["broadcast"]["direction"],
    }
    return {name: torch.full_like(w, target) for name, w in weights.items()}, metrics


class Direct:
    """The same clients as `local_train`, as a simulated backend."""

    layout = LAYOUT

    def train(self, round, clients, models, broadcast, config):
        ids = torch.from_numpy(clients)
        ones = torch.ones_like(ids)
        return Cohort(
            updates=(ids + 1.0 + broadcast["rounds"])[:, None] - models,
            weights=ids + 1.0,
            clients=ids,
            num_steps=7 * ones,
            staleness=0 * ones,
            received=(round - 1) * ones,
            round=round,
            layout=LAYOUT,
            extras={"second": broadcast["direction"].expand(len(ids), 3)},
        )


def test_a_rule_gives_the_same_in_a_deployment_as_in_the_simulation():
    deployed, simulated = RuleStrategy(Halving(), fraction_evaluate=0), RuleStrategy(Halving(), num_clients=4)
    wire = WireGrid(client_app(local_train))
    result = deployed.start(wire, FlatRecord(W0, LAYOUT).plain(), num_rounds=3)
    grid = SimulationGrid(Direct())
    grid.cohort = np.arange(4)
    w, _ = run(simulated, grid, 3)
    assert type(result.arrays) is ArrayRecord
    torch.testing.assert_close(torch.cat([a.flatten() for a in result.arrays.to_torch_state_dict().values()]), w)
    assert deployed.state == simulated.state == {"rounds": 3, "num_clients": 4}
    assert deployed.metrics["second"].tolist() == simulated.metrics["second"].tolist() == [0, 1, 2]
    assert deployed.metrics["steps"].tolist() == [7] * 4
    assert deployed.cohort.clients.tolist() == [0, 1, 2, 3]
    assert deployed.cohort.weights.tolist() == [1, 2, 3, 4]
    assert torch.equal(deployed.cohort.extras["train_loss"], torch.tensor([3.0, 4, 5, 6]))


def test_a_deployment_samples_nodes_by_seed_and_round():
    def sampled(seed):
        wire = WireGrid(client_app(local_train))
        RuleStrategy(Halving(), fraction=0.5, fraction_evaluate=0, seed=seed).start(
            wire, FlatRecord(W0, LAYOUT).plain(), num_rounds=6
        )
        return wire.sent

    assert sampled(0) == sampled(0)
    assert sampled(0) != sampled(1)
    assert len(sampled(0)) == 12
    assert set(sampled(0)) == set(WireGrid.nodes)


def test_fedsims_client_works_under_flowers_strategies():
    def train(weights, config, context):
        client = context.node_config["partition-id"]
        return {name: w + client + 1 for name, w in weights.items()}, {
            "num-examples": 1,
            "train_loss": torch.tensor(0.5),
        }

    def evaluate_(weights, config, context):
        return {"num-examples": context.node_config["partition-id"] + 1, "eval_loss": weights["1.bias"][0].item()}

    result = flower_fedavg().start(WireGrid(client_app(train, evaluate_)), FlatRecord(W0, LAYOUT).plain(), num_rounds=2)
    assert result.arrays["1.bias"].numpy().tolist() == [5.0, 5.0]  # twice (1 + 2 + 3 + 4) / 4
    assert result.evaluate_metrics_clientapp[2]["eval_loss"] == 5.0
    assert result.train_metrics_clientapp[2]["train_loss"] == 0.5


def test_a_failing_node_of_a_deployment_is_left_out(caplog):
    def train(weights, config, context):
        if context.node_config["partition-id"] == failing:
            raise OSError("no power")
        return weights, {"num-examples": 1}

    class Failing(WireGrid):
        def send_and_receive(self, messages, *, timeout=None):
            replies = []
            for message in messages:
                try:
                    replies += super().send_and_receive([message])
                except OSError as error:
                    replies.append(Message(Error(1, f"OSError: {error}"), reply_to=message))
            return replies

    failing = 2
    strategy = RuleStrategy(FedAvg(), fraction_evaluate=0)
    strategy.start(Failing(client_app(train)), FlatRecord(W0, LAYOUT).plain(), num_rounds=1)
    assert strategy.cohort.clients.tolist() == [0, 1, 3]
    assert "node 4000 failed: OSError: no power; it is left out" in caplog.messages
    every = client_app(lambda *_: (_ for _ in ()).throw(OSError("no power")))
    with pytest.raises(RuntimeError, match="no client answered in round 1"):
        strategy.start(Failing(every), FlatRecord(W0, LAYOUT).plain(), num_rounds=1)


def test_metrics_without_the_weight_are_refused():
    app = client_app(lambda weights, config, context: (weights, {"loss": 1.0}))
    with pytest.raises(ValueError, match=r"must have 'num-examples', got \['loss'\]"):
        flower_fedavg().start(WireGrid(app), FlatRecord(W0, LAYOUT).plain(), num_rounds=1)
