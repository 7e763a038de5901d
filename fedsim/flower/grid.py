"""The grid: Flower's link between server and clients, in one process and one call for the whole cohort."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from torch import Tensor

from fedsim.contracts import Cohort, row_square_norms
from fedsim.flower import runtime
from fedsim.flower.records import METRICS, SERVER_ROUND, CohortReplies, TrainMessages, flatten
from fedsim.flower.replies import OnClientError, checked, config_of, only
from fedsim.flower.runtime import Run
from fedsim.layout import Layout
from fedsim.linalg import map_columns

Clients = npt.NDArray[np.int64]


class Backend(Protocol):
    """What trains the clients behind the grid."""

    layout: Layout  # of what travels; its names are the keys of the arrays that strategies see, in its order

    def train(
        self, round: int, clients: Clients, models: Tensor, broadcast: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Cohort:
        """Train clients (K,), ascending, and return those that answered.

        Args:
            round: from 1.
            clients: (K,) ids.
            models: (D,) what all start from, or (K, D) one row a client.
            broadcast: what the rule sent with it.
            config: what a Flower strategy sent with it, e.g. "proximal-mu".

        """
        ...

    def evaluate(self, round: int, clients: Clients, models: Tensor) -> Mapping[str, npt.NDArray[Any]]:
        """Return "num-examples" (K,) and metrics (K,) of models (D,) or (K, D) on the clients' own data."""
        ...


@runtime_checkable
class MessageBackend(Protocol):
    """A backend whose clients read Flower messages themselves: they pass through unopened."""

    def handle(self, messages: Sequence[Message], round: int) -> list[Message]:
        """Return the clients' replies, failures included; `round` counts for messages that do not say theirs."""
        ...


class SimulationGrid(Grid):
    """Virtual clients as Flower nodes: client k is node k + 1, and only the round's cohort is connected.

    The run loop sets `round` and `cohort` before each round, so that fedsim's sampler chooses the cohorts of
    Flower's strategies too. Replies come in order of their nodes, whatever the order of the messages.

    Args:
        backend: what trains.
        seed: the run's.
        on_client_error: "raise" stops the run with the client's error; "drop" goes on without that client, which
            is what Flower's strategies do silently.

    """

    def __init__(self, backend: Backend, *, seed: int = 0, on_client_error: OnClientError = "raise") -> None:
        if on_client_error not in ("raise", "drop"):
            raise ValueError(f"on_client_error must be 'raise' or 'drop', got {on_client_error!r}")
        runtime.claim_identity()
        self.backend = backend
        self.seed = seed
        self.on_client_error = on_client_error
        self.round = 1
        self.cohort: Clients = np.zeros(0, dtype=np.int64)
        self.like: Tensor | None = None  # a tensor of the run's dtype and device, for arrays that strategies build
        self._run = runtime.empty_run()
        self._num_sent = 0
        self._pushed: list[Message] = []
        self._replies: dict[str, Message] = {}

    def set_run(self, run: Run) -> None:
        """Set the run's description."""
        self._run = run

    @property
    def run(self) -> Run:
        """The run's description: empty, for no SuperLink knows it."""
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        """Return a message to a node."""
        return Message(content, dst_node_id, message_type, group_id=group_id, ttl=ttl)

    def get_node_ids(self) -> list[int]:
        """Return the nodes of this round's cohort."""
        nodes: list[int] = (self.cohort + 1).tolist()
        return nodes

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        """Take messages and return their ids; the clients start when the first reply is pulled."""
        pushed = list(messages)
        self._number(pushed)
        self._pushed += pushed
        return [message.metadata.message_id for message in pushed]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        """Return the replies to messages that were pushed, each once; all that are pending train as one cohort."""
        pushed, self._pushed = self._pushed, []
        self._replies |= {reply.metadata.reply_to_message_id: reply for reply in self._exchange(pushed)}
        return [self._replies.pop(i) for i in message_ids if i in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Sequence[Message]:
        """Train or evaluate a cohort and return its replies; nobody waits, so `timeout` has no meaning."""
        if isinstance(messages, TrainMessages):
            clients = np.asarray(messages.nodes, dtype=np.int64) - 1  # (K,)
            start = flatten(messages.arrays, self.backend.layout)  # (D,)
            cohort = self.backend.train(messages.round, clients, start, messages.broadcast, messages.config)
            rows = np.searchsorted(clients, cohort.clients.cpu().numpy())  # (K',) of those that answered
            return CohortReplies(cohort=cohort, start=start, request=lambda k: messages[int(rows[k])])
        requests = list(messages)
        self._number(requests)
        return self._exchange(requests)

    def _number(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self._num_sent += 1
            runtime.set_message_id(message, str(self._num_sent))

    def _exchange(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the replies to numbered messages."""
        if isinstance(self.backend, MessageBackend):
            return checked(self.backend.handle(messages, self.round), self.on_client_error)
        batches = [self._answer(*batch) for batch in _batches(messages)]
        if len(batches) == 1:
            return batches[0]
        return checked([reply for batch in batches for reply in batch], self.on_client_error)

    def _answer(self, requests: list[Message], config: Mapping[str, Any]) -> Sequence[Message]:
        """Open the messages of one batch, run it, and wrap what comes back."""
        requests = sorted(requests, key=lambda message: message.metadata.dst_node_id)
        clients = np.array([message.metadata.dst_node_id - 1 for message in requests], dtype=np.int64)  # (K,)
        records = [only(message.content, ArrayRecord) for message in requests]
        flat = {id(record): flatten(record, self.backend.layout, self.like) for record in records}
        models = next(iter(flat.values()))  # (D,)
        if len(flat) > 1:
            models = torch.stack([flat[id(record)] for record in records])  # (K, D)
        round = int(config.get(SERVER_ROUND, self.round))
        if requests[0].metadata.message_type == MessageType.EVALUATE:
            columns = {k: v.tolist() for k, v in self.backend.evaluate(round, clients, models).items()}
            metrics = [MetricRecord({k: v[i] for k, v in columns.items()}) for i in range(len(clients))]
            return [Message(RecordDict({METRICS: m}), reply_to=r) for m, r in zip(metrics, requests, strict=True)]
        cohort = self.backend.train(round, clients, models, {}, config)
        rows = np.searchsorted(clients, cohort.clients.cpu().numpy())  # (K',) of those that answered
        if runtime.CLIPPING_NORM in config:
            cohort = clipped(cohort, float(config[runtime.CLIPPING_NORM]))
        start = models if models.dim() == 1 else models[torch.from_numpy(rows)]
        return CohortReplies(cohort=cohort, start=start, request=lambda k: requests[rows[k]])


def clipped(cohort: Cohort, max_norm: float) -> Cohort:
    """Return the cohort as Flower's client-side clipping mods would send it.

    Δ_k ← min(1, S/‖Δ_k‖) Δ_k, and an extra "norm_bit" (K,) of 1 where that changed anything. Andrew et al.,
    "Differentially Private Learning with Adaptive Clipping", NeurIPS 2021, Algorithm 1 (there the bit is 1 − this).
    """
    norms = row_square_norms(cohort.rows).sqrt()  # (K,)
    factors = (max_norm / norms).clamp(max=1.0)  # (K,); a zero row gives inf, clamped to 1
    bits = (factors < 1).to(norms.dtype)  # (K,)
    cut = map_columns(cohort.rows, lambda block, _: block * factors[:, None])  # (K, D)
    return replace(cohort, updates=cut, extras={**cohort.extras, runtime.NORM_BIT: bits})


def _batches(messages: Iterable[Message]) -> list[tuple[list[Message], dict[str, Any]]]:
    """Group messages that can run as one cohort: equal types and configs, no client twice."""
    batches: list[tuple[str, dict[str, Any], dict[int, Message]]] = []
    configs: dict[int, dict[str, Any]] = {}  # Flower's strategies send one content to all: read it once
    for message in messages:
        kind, node = message.metadata.message_type, message.metadata.dst_node_id
        if kind not in (MessageType.TRAIN, MessageType.EVALUATE):
            raise ValueError(f"fedsim's clients answer 'train' and 'evaluate' messages, not {kind!r}")
        if node < 1:
            raise ValueError(f"node ids start at 1, got a message to {node}")
        if (key := id(message.content)) not in configs:
            configs[key] = config_of(message.content)
        config = configs[key]
        for other_kind, other_config, members in batches:
            if kind == other_kind and config == other_config and node not in members:
                members[node] = message
                break
        else:
            batches.append((kind, config, {node: message}))
    return [(list(members.values()), config) for _, config, members in batches]
