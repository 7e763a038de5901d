"""A rule as a Flower `Strategy`, and the step that drives any strategy over a grid."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.contracts import Metrics, Rule
from fedsim.flower.grid import SimulationGrid
from fedsim.flower.records import (
    ARRAYS,
    CONFIG,
    NUM_EXAMPLES,
    SERVER_ROUND,
    CohortReplies,
    FlatRecord,
    TrainMessages,
    flatten,
    layout_of,
)
from fedsim.flower.replies import CLIENT, checked, only, read_replies
from fedsim.flower.runtime import logged_warnings, no_forced_collection, seeded
from fedsim.rng import generator
from fedsim.shell import RuleShell


class RuleStrategy(RuleShell, Strategy):
    """Any fedsim rule as a Flower strategy: the same in the simulation and under `flwr run`.

    In the simulation messages and replies stay unbuilt, the cohort's matrix passes straight to the rule, and the
    grid has chosen the cohort. In a deployment replies are read into such a matrix, nodes are sampled here, and
    a client's id counts nodes in the order in which they were first asked.

    Args:
        rule: a server rule; `state`, `metrics` and `cohort` are what its last call left.
        num_clients: clients that can be sampled; None: the nodes connected at the first round.
        seed: of everything random in the rule and of the sampling.
        fraction: of the connected nodes that train, in (0, 1]; the simulation's cohort always trains whole.
        fraction_evaluate: of them that evaluate, in [0, 1]; 0 sends no such messages.
        min_nodes: wait for that many nodes before the first round, ≥ 1; nodes may leave later.

    A node of a deployment that fails is logged and left out; a round that nobody answers is an error. A node whose
    metrics have "client" is that client, whenever it was first asked.

    """

    def __init__(
        self,
        rule: Rule,
        *,
        num_clients: int | None = None,
        seed: int = 0,
        fraction: float = 1.0,
        fraction_evaluate: float = 1.0,
        min_nodes: int = 1,
    ) -> None:
        if not 0 < fraction <= 1:
            raise ValueError(f"fraction must be in (0, 1], got {fraction}")
        if not 0 <= fraction_evaluate <= 1:
            raise ValueError(f"fraction_evaluate must be in [0, 1], got {fraction_evaluate}")
        if min_nodes < 1:
            raise ValueError(f"min_nodes must be >= 1, got {min_nodes}")
        super().__init__(rule, num_clients=num_clients, seed=seed)
        self.fraction = fraction
        self.fraction_evaluate = fraction_evaluate
        self.min_nodes = min_nodes
        self._client_of: dict[int, int] = {}  # node → client, in a deployment
        self.told: dict[int, int] = {}  # of these, the clients that said who they are
        self._sent: FlatRecord | None = None

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> TrainMessages:
        """Return the round's messages, unbuilt."""
        nodes, num_connected = self._sample(server_round, grid, self.fraction)
        self._sent = arrays = as_flat(arrays)
        if isinstance(grid, SimulationGrid):  # which asked the rule about the cohort expected; this may be smaller
            self.begin(arrays.layout, num_connected)
        else:
            self._inform()
            self.begin(arrays.layout, num_connected, cohort=len(nodes))
        sent_along = self.broadcast()
        return TrainMessages(round=server_round, nodes=nodes, arrays=arrays, config=dict(config), broadcast=sent_along)

    def _inform(self) -> None:
        """Before the first round of a deployment, tell a rule that asks how its clients are drawn."""
        known: dict[str, Any] = {"fraction": self.fraction}
        if self.fraction < 1:
            known["dependence"] = "cohorts of a fixed size"
        wanted = {name: known[name] for name in getattr(self.rule, "needs", ()) if name in known}
        if wanted and self.state is None:
            rule: Any = self.rule
            self.rule = rule.bind(**wanted)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Apply the rule; `self.metrics` has what a `MetricRecord` cannot hold."""
        if self._sent is None or self.state is None:
            raise RuntimeError("aggregate_train was called before configure_train")
        layout, w = self._sent.layout, flatten(self._sent, self._sent.layout)  # (D,)
        if isinstance(replies, CohortReplies):
            cohort = replies.cohort
        else:
            answers = checked(replies, "drop")
            if not answers:
                raise RuntimeError(f"no client answered in round {server_round}")
            clients = self._clients(answers)
            cohort = read_replies(answers, clients=clients, layout=layout, start=w, round=server_round, seed=self.seed)
        arrays = FlatRecord(self.apply(cohort, w), layout)
        simulated = isinstance(replies, CohortReplies)
        return arrays if simulated else arrays.plain(), MetricRecord(scalars(self.metrics))

    def _clients(self, answers: Sequence[Message]) -> list[int]:
        """Return the client of each reply: who it says that it is, else the number of its node."""
        for reply in answers:
            metrics, node = only(reply.content, MetricRecord), reply.metadata.src_node_id
            if CLIENT in metrics:
                self.told[node] = int(metrics[CLIENT])
        clients = [self.told.get(node, self._client_of[node]) for node in (r.metadata.src_node_id for r in answers)]
        twice = sorted({client for client in clients if clients.count(client) > 1})
        if twice:
            raise ValueError(f"two nodes are client {twice[0]}; give every SuperNode a partition-id of its own")
        return clients

    def name_of(self, node: int) -> str:
        """Return the client that a node said it is, or the node's own id where it never answered."""
        return str(self.told[node]) if node in self.told else f"node {node}"

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return a message to each node of this round."""
        if not self.fraction_evaluate:
            return []
        nodes, _ = self._sample(server_round, grid, self.fraction_evaluate)
        content = RecordDict({ARRAYS: arrays, CONFIG: ConfigRecord({**config, SERVER_ROUND: server_round})})
        return [Message(content, node, MessageType.EVALUATE) for node in nodes]

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Return the means of the clients' metrics, weighted by their numbers of samples."""
        records: list[MetricRecord] = [only(reply.content, MetricRecord) for reply in checked(replies, "drop")]
        if not records:
            return None
        total = math.fsum(_number(record, NUM_EXAMPLES) for record in records)
        names = [name for name in records[0] if name != NUM_EXAMPLES]
        sums = {n: math.fsum(_number(r, NUM_EXAMPLES) * _number(r, n) for r in records) for n in names}
        return MetricRecord({name: value / total for name, value in sums.items()})

    def summary(self) -> None:
        """Say nothing: the run's plan line and summary table do."""

    def _sample(self, round: int, grid: Grid, fraction: float) -> tuple[list[int], int]:
        """Return the round's nodes, ascending, and how many are connected."""
        if isinstance(grid, SimulationGrid):
            nodes = grid.get_node_ids()
            return nodes, len(nodes)
        needed = self.min_nodes if self.state is None else 1
        while len(connected := sorted(grid.get_node_ids())) < needed:
            time.sleep(1.0)
        for node in connected:
            self._client_of.setdefault(node, len(self._client_of))
        size = max(1, round_half_up(fraction * len(connected)))
        chosen = generator(self.seed, "cohort", round).choice(len(connected), size=size, replace=False)
        return [connected[i] for i in sorted(chosen)], len(connected)


def aggregate(strategy: Strategy, round: int, w: Tensor, grid: SimulationGrid) -> tuple[Tensor, Metrics]:
    """Do one round of any strategy: configure, train the grid's cohort, aggregate.

    Args:
        strategy: fedsim's own shell or any Flower strategy. Around a foreign one the global generators are seeded
            by (seed, "flower", round) and given back after, so that its samples and noise are repeatable.
        round: from 1.
        w: (D,) weights; not written to.
        grid: with its `cohort` set.

    Returns:
        (D,) new weights and the strategy's metrics.

    Raises:
        RuntimeError: the strategy returned no arrays, which Flower's own loop would pass over.

    """
    grid.round, grid.like = round, w
    layout = grid.backend.layout
    if isinstance(strategy, RuleStrategy):
        messages = strategy.configure_train(round, FlatRecord(w, layout), ConfigRecord(), grid)
        arrays, _ = strategy.aggregate_train(round, grid.send_and_receive(messages))
        return flatten(arrays or ArrayRecord(), layout, w), strategy.metrics
    # A copy: strategies keep the record for rounds, and the caller may add to its tensor in place.
    sent = FlatRecord(w.clone(), layout)
    with seeded(grid.seed, "flower", round, 0):
        requests = strategy.configure_train(round, sent, ConfigRecord(), grid)
    replies = grid.send_and_receive(requests)
    with seeded(grid.seed, "flower", round, 1), no_forced_collection(), logged_warnings() as warnings:
        arrays, metrics = strategy.aggregate_train(round, replies)
    if not arrays:
        why = f": {warnings[-1]}" if warnings else ""
        raise RuntimeError(
            f"{type(strategy).__name__} returned no arrays in round {round} from {len(replies)} replies{why}"
        )
    return flatten(arrays, layout, w), dict(metrics or {})


def evaluate(strategy: Strategy, round: int, w: Tensor, grid: SimulationGrid) -> Metrics:
    """Let a strategy evaluate weights (D,) on the grid's cohort, and return what it makes of the replies."""
    grid.round, grid.like = round, w
    with seeded(grid.seed, "flower", round, 2):
        requests = strategy.configure_evaluate(round, FlatRecord(w.clone(), grid.backend.layout), ConfigRecord(), grid)
    replies = grid.send_and_receive(requests)
    with seeded(grid.seed, "flower", round, 3):
        return dict(strategy.aggregate_evaluate(round, replies) or {})


def as_flat(record: ArrayRecord) -> FlatRecord:
    """Return a record as flat weights, itself where it is that already."""
    if isinstance(record, FlatRecord) and record.flat is not None:
        return record
    layout = layout_of(record)
    return FlatRecord(flatten(record, layout), layout)


def scalars(metrics: Metrics) -> dict[str, float | int | list[float] | list[int]]:
    """Return the metrics that are one number each."""
    single: dict[str, Any] = {
        name: value.item() if isinstance(value, torch.Tensor) and value.dim() == 0 else value
        for name, value in metrics.items()
    }
    return {name: value for name, value in single.items() if isinstance(value, int | float)}


def round_half_up(value: float) -> int:
    """Round as people do: fraction 0.5 of 5 nodes is 3."""
    return math.floor(value + 0.5)


def _number(record: MetricRecord, name: str) -> float:
    value = record[name]
    if isinstance(value, list):
        raise ValueError(f"metric {name!r} must be one number, got a list")
    return float(value)
