"""Flower's `ClientApp` both ways: any foreign one simulated, and fedsim's client in a real deployment."""

from __future__ import annotations

import importlib
import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Error, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from fedsim.contracts import Cohort, State
from fedsim.errors import UserError, did_you_mean
from fedsim.flower import runtime
from fedsim.flower.records import (
    ARRAYS,
    BROADCAST,
    CONFIG,
    METRICS,
    NUM_EXAMPLES,
    SERVER_ROUND,
    FlatRecord,
    broadcast_record,
)
from fedsim.flower.replies import EXTRAS, OnClientError, checked, config_of, only, read_replies
from fedsim.flower.state import capture_record, restore_record
from fedsim.layout import Layout

Clients = npt.NDArray[np.int64]
TrainFn = Callable[[dict[str, Tensor], dict[str, Any], Context], tuple[Mapping[str, Tensor], Mapping[str, Any]]]
EvaluateFn = Callable[[dict[str, Tensor], dict[str, Any], Context], Mapping[str, Any]]


@dataclass(frozen=True, kw_only=True)
class FlowerApp:
    """A foreign Flower `ClientApp` as fedsim's client: `client=flower_app client.app=my_module:app`.

    Args:
        app: "module:attribute", importable from the current folder, or the `ClientApp` itself.
        run_config: what the app finds in `context.run_config`; values are strings, numbers or booleans.

    """

    app: str | ClientApp
    run_config: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.app, str):
            object.__setattr__(self, "app", load_app(self.app))
        if not isinstance(self.app, ClientApp):
            raise ValueError(f"app must be 'module:attribute' or a flwr.clientapp.ClientApp, got {self.app!r}")

    def clients(
        self, layout: Layout, num_clients: int, *, seed: int = 0, on_client_error: OnClientError = "raise"
    ) -> ForeignClients:
        """Return the virtual clients that run the app."""
        assert isinstance(self.app, ClientApp)  # __post_init__ made it one
        return ForeignClients(
            self.app,
            layout=layout,
            num_clients=num_clients,
            run_config=self.run_config,
            seed=seed,
            on_client_error=on_client_error,
        )


class ForeignClients:
    """The backend that calls a `ClientApp` once a client and message.

    Every client has a `Context` of its own: `node_config` with "partition-id" and "num-partitions", and a `state`
    that survives rounds. Python's, NumPy's and PyTorch's global generators are seeded by (seed, round, client)
    around each call, so that results depend neither on order nor on who else trains.

    Args:
        app: the app.
        layout: of the model's arrays; names are the keys of the `ArrayRecord` that the app gets.
        num_clients: how many clients there are.
        run_config: `context.run_config`.
        seed: the run's.
        on_client_error: for `train` and `evaluate`; a grid that passes messages through has its own.

    """

    def __init__(
        self,
        app: ClientApp,
        *,
        layout: Layout,
        num_clients: int,
        run_config: Mapping[str, Any] | None = None,
        seed: int = 0,
        on_client_error: OnClientError = "raise",
    ) -> None:
        if num_clients < 1:
            raise ValueError(f"num_clients must be >= 1, got {num_clients}")
        runtime.claim_identity()
        self.app = app
        self.layout = layout
        self.num_clients = num_clients
        self.run_config = dict(run_config or {})
        self.seed = seed
        self.on_client_error = on_client_error
        self._contexts: dict[int, Context] = {}

    def train(
        self, round: int, clients: Clients, models: Tensor, broadcast: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Cohort:
        """Train clients (K,) from models (D,) or (K, D), for a fedsim rule."""
        messages = self._messages(MessageType.TRAIN, round, clients, models, config, broadcast)
        replies = checked(self.handle(messages, round), self.on_client_error)
        if not replies:
            raise RuntimeError(f"every client failed in round {round}")
        answered = np.array([reply.metadata.src_node_id - 1 for reply in replies])  # (K',)
        start = models if models.dim() == 1 else models[torch.from_numpy(np.searchsorted(clients, answered))]
        return read_replies(
            replies, clients=answered.tolist(), layout=self.layout, start=start, round=round, seed=self.seed
        )

    def evaluate(self, round: int, clients: Clients, models: Tensor) -> Mapping[str, npt.NDArray[Any]]:
        """Return the metrics that every client sends, (K,) each."""
        messages = self._messages(MessageType.EVALUATE, round, clients, models, {}, {})
        replies = checked(self.handle(messages, round), self.on_client_error)
        records: list[Mapping[str, Any]] = [only(reply.content, MetricRecord) for reply in replies]
        names = sorted(set.intersection(*map(set, records))) if records else []
        return {name: np.array([record[name] for record in records]) for name in names}

    def handle(self, messages: Sequence[Message], round: int) -> list[Message]:
        """Call the app on each message and return its replies unmodified; a raised exception is an error reply."""
        with runtime.no_forced_collection():
            return [self._call(message, round) for message in messages]

    def capture(self) -> State:
        """Return what clients keep between rounds, by client; clients that keep nothing are left out."""
        return {
            str(client): capture_record(context.state)
            for client, context in sorted(self._contexts.items())
            if len(context.state)
        }

    def restore(self, state: State) -> None:
        """Give clients back what `capture` returned."""
        self._contexts.clear()
        for client, record in state.items():
            self._context(int(client)).state = restore_record(record)

    def _context(self, client: int) -> Context:
        if client not in self._contexts:
            if not 0 <= client < self.num_clients:
                raise ValueError(f"clients are 0 to {self.num_clients - 1}, got a message to client {client}")
            self._contexts[client] = Context(
                run_id=runtime.RUN_ID,
                node_id=client + 1,
                node_config={"partition-id": client, "num-partitions": self.num_clients},
                state=RecordDict(),
                run_config=dict(self.run_config),
            )
        return self._contexts[client]

    def _call(self, message: Message, round: int) -> Message:
        client = message.metadata.dst_node_id - 1
        context = self._context(client)
        # Flower's strategies send one content to all nodes; a client may empty its records, as on a real node.
        content = RecordDict({name: record.copy() for name, record in message.content.items()})
        request = runtime.with_content(message, content)
        round = int(config_of(content).get(SERVER_ROUND, round))
        try:
            with runtime.seeded(self.seed, f"client.{message.metadata.message_type}", round, client):
                reply: Any = self.app(request, context)
            if not isinstance(reply, Message):
                raise TypeError(f"the ClientApp returned a {type(reply).__name__}, not a Message")
        except Exception:  # whatever foreign code raises is that client's failure, as on a real node
            return Message(Error(runtime.CLIENT_RAISED, traceback.format_exc()), reply_to=message)
        if reply.metadata.src_node_id != client + 1:  # some of Flower's mods report a failure as a reply to the reply
            return Message(reply.error if reply.has_error() else reply.content, reply_to=message)
        return reply

    def _messages(
        self,
        kind: str,
        round: int,
        clients: Clients,
        models: Tensor,
        config: Mapping[str, Any],
        broadcast: Mapping[str, Any],
    ) -> list[Message]:
        shared = FlatRecord(models, self.layout) if models.dim() == 1 else None
        beside = {BROADCAST: broadcast_record(broadcast)} if broadcast else {}
        messages = []
        for k, client in enumerate(clients.tolist()):
            arrays = shared or FlatRecord(models[k], self.layout)
            settings = ConfigRecord({**config, SERVER_ROUND: round})
            messages.append(Message(RecordDict({ARRAYS: arrays, CONFIG: settings, **beside}), client + 1, kind))
        return messages


def load_app(path: str) -> ClientApp:
    """Import a `ClientApp` named "module:attribute"; modules in the current folder are found.

    Raises:
        UserError: no such module or attribute, or it is something else.

    """
    module_name, _, attribute = path.partition(":")
    if not module_name or not attribute:
        raise UserError(f"client.app must be 'module:attribute', e.g. 'my_module:app', got {path!r}")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())  # last, so that it shadows nothing
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise UserError(f"client.app={path}: {error}") from error
    if not hasattr(module, attribute):
        apps = [name for name, value in vars(module).items() if isinstance(value, ClientApp)]
        raise UserError(f"client.app={path}: {module_name} has no {attribute!r}{did_you_mean(attribute, apps)}")
    app = getattr(module, attribute)
    if not isinstance(app, ClientApp):
        raise UserError(f"client.app={path} is a {type(app).__name__}, not a flwr.clientapp.ClientApp")
    return app


def client_app(train: TrainFn, evaluate: EvaluateFn | None = None) -> ClientApp:
    """Return a `ClientApp` for a real deployment around functions of tensors.

    Args:
        train: (weights, config, context) → (new weights, metrics). Weights are named tensors; config has what the
            strategy sent, "server-round", and under "broadcast" what the rule sent beside the model (tensors and
            numbers). Metrics need "num-examples"; numbers go back as metrics, tensors as the rule's second uploads.
        evaluate: (weights, config, context) → metrics, with "num-examples".

    """
    app = ClientApp()

    @app.train()
    def on_train(message: Message, context: Context) -> Message:
        weights, metrics = train(*_open(message), context)
        uploads = {name: value for name, value in metrics.items() if isinstance(value, Tensor) and value.dim() > 0}
        numbers = {name: value for name, value in metrics.items() if name not in uploads}
        content = RecordDict({ARRAYS: ArrayRecord(dict(weights)), METRICS: _metric_record(numbers)})
        if uploads:
            content[EXTRAS] = ArrayRecord(uploads)
        return Message(content, reply_to=message)

    if evaluate is not None:

        @app.evaluate()
        def on_evaluate(message: Message, context: Context) -> Message:
            content = RecordDict({METRICS: _metric_record(evaluate(*_open(message), context))})
            return Message(content, reply_to=message)

    return app


def _open(message: Message) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a message's weights and config as plain dicts."""
    weights: dict[str, Tensor] = dict(only(message.content, ArrayRecord).to_torch_state_dict())
    config = config_of(message.content)
    if BROADCAST in message.content:
        sent: Any = message.content[BROADCAST]
        tensors = {name: torch.from_numpy(np.array(array.numpy())) for name, array in sent.items()}
        config[BROADCAST] = {name: value if value.dim() else value.item() for name, value in tensors.items()}
    return weights, config


def _metric_record(metrics: Mapping[str, Any]) -> MetricRecord:
    if NUM_EXAMPLES not in metrics:
        raise ValueError(f"a client's metrics must have {NUM_EXAMPLES!r}, got {sorted(metrics)}")
    return MetricRecord({name: v.item() if isinstance(v, Tensor) else v for name, v in metrics.items()})
