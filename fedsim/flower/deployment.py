"""A run of fedsim as a Flower app: what `flwr run` starts on a SuperLink and its SuperNodes.

`fedsim export flower` writes such an app. Server and clients get their parts as functions, so that neither builds
what the other needs: `fedsim.deploy` makes them of a run's config.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord
from flwr.app import Context as Context
from flwr.clientapp import ClientApp as ClientApp
from flwr.serverapp import Grid
from flwr.serverapp import ServerApp as ServerApp
from flwr.serverapp.strategy import Strategy
from torch import Tensor

from fedsim.contracts import Rule
from fedsim.files import save_tensors
from fedsim.flower.records import FlatRecord, TrainMessages
from fedsim.flower.replies import CLIENT as CLIENT
from fedsim.flower.strategy import RuleStrategy, as_flat
from fedsim.layout import Layout
from fedsim.metrics.records import RoundLog

BUFFERS = "model_buffers"  # running statistics travel beside the parameters, and come back as a second upload
KEPT = "fedsim"  # the record of a node's Context that holds what its client keeps


class Served(NamedTuple):
    """What the server of a run needs."""

    strategy: Any  # a rule or a Flower strategy
    weights: Tensor  # (D,) before round 1
    layout: Layout
    buffers: Tensor  # (B,) before round 1; of size 0 where the server has none
    buffer_layout: Layout
    seed: int


class Deployed(RuleStrategy):
    """A rule in a deployment, which averages buffers too and writes a row of every round.

    Args:
        rule: a server rule.
        log: of the rows: how many answered, who is `missing`, the rule's metrics, and the clients' evaluation.
        buffers: (B,) of the model before round 1; of size 0 where it has none, or where clients keep their own.
        options: of `RuleStrategy`.

    """

    def __init__(self, rule: Rule, log: RoundLog, buffers: Tensor, **options: Any) -> None:
        super().__init__(rule, **options)
        self.log, self.buffers = log, buffers
        self._asked: list[int] = []
        self._row: dict[str, Any] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> TrainMessages:
        """Return the round's messages, with the model's buffers where it has any."""
        messages = super().configure_train(server_round, arrays, config, grid)
        self._asked = list(messages.nodes)
        return self._with_buffers(messages)

    def _with_buffers(self, messages: TrainMessages) -> TrainMessages:
        if not self.buffers.numel():
            return messages
        return replace(messages, broadcast={**messages.broadcast, BUFFERS: self.buffers})

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Apply the rule, average the buffers, and note who answered."""
        answers = list(replies)
        arrays, metrics = super().aggregate_train(server_round, answers)
        cohort = self.cohort
        assert cohort is not None  # aggregate_train has set it, or raised
        share = cohort.weights / cohort.weights.sum()  # (K,)
        if self.buffers.numel():
            self.buffers = share @ cohort.extras[BUFFERS]  # (B,)
        answered = {reply.metadata.src_node_id for reply in answers if reply.has_content()}
        # Who was asked and did not answer, and who is gone since an earlier round.
        missing = sorted(self.name_of(node) for node in {*self._asked, *self.told} - answered if self._expected(node))
        self._row = {"num_participants": len(cohort), "missing": ", ".join(missing)}
        if (losses := cohort.extras.get("train_loss")) is not None:
            self._row["train_loss"] = float(share @ losses)
        self._row |= {name: value for name, value in dict(metrics or {}).items() if not isinstance(value, list)}
        return arrays, metrics

    def _expected(self, node: int) -> bool:
        return node in self._asked or self.fraction == 1

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Sequence[Message]:
        """Return the messages of an evaluation, which need the buffers as those of a training do."""
        if not self.fraction_evaluate:
            return []
        nodes, _ = self._sample(server_round, grid, self.fraction_evaluate)
        messages = TrainMessages(
            round=server_round, nodes=nodes, arrays=as_flat(arrays), config=dict(config), kind=MessageType.EVALUATE
        )
        return list(self._with_buffers(messages))

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Average what the clients measured, and write the round's row."""
        metrics = super().aggregate_evaluate(server_round, replies)
        self.log.append(server_round, self._row | dict(metrics or {}))
        return metrics


def server_app(make: Callable[[], Served]) -> ServerApp:
    """Return the `ServerApp` of a run.

    Its settings, `[tool.flwr.app.config]` of the app: num-rounds, min-nodes, fraction, fraction-evaluate, timeout in
    seconds a round, and folder, where rounds.jsonl and model.safetensors are written; "" is `flower-RUN` where the
    ServerApp runs.

    Args:
        make: builds what the server needs.

    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        said = context.run_config
        strategy, weights, layout, buffers, buffer_layout, seed = make()
        names = buffer_layout.names if buffers.numel() else ()
        folder = Path(str(said["folder"]) or f"flower-{context.run_id}").absolute()
        folder.mkdir(parents=True, exist_ok=True)
        log = RoundLog(folder / "rounds.jsonl")
        if callable(strategy):  # a rule; a Flower strategy has methods, and is none
            shell: Strategy = Deployed(
                strategy, log, buffers, seed=seed, num_clients=int(said["min-nodes"]),
                min_nodes=int(said["min-nodes"]), fraction=float(said["fraction"]),
                fraction_evaluate=float(said["fraction-evaluate"]),
            )  # fmt: skip
        else:
            shell = strategy
        try:
            while len(list(grid.get_node_ids())) < int(
                said["min-nodes"]
            ):  # some of Flower's begin with whoever is there
                time.sleep(1.0)
            initial = FlatRecord(weights, layout).plain()
            result = shell.start(grid, initial, num_rounds=int(said["num-rounds"]), timeout=float(said["timeout"]))
        finally:
            log.close()
        tensors = {name: value.contiguous() for name, value in result.arrays.to_torch_state_dict().items()}
        if isinstance(shell, Deployed) and names:
            split = buffer_layout.split(shell.buffers)
            tensors |= {name: split[name].cpu().contiguous() for name in names}
        save_tensors(tensors, folder / "model.safetensors")

    return app


def kept(context: Context) -> dict[str, Tensor]:
    """Return what a client kept on its node, by name; nothing before its first round."""
    found: Mapping[str, Any] = context.state.get(KEPT, {})
    return {name: torch.from_numpy(np.array(array.numpy())) for name, array in found.items()}


def keep(context: Context, values: Mapping[str, Tensor]) -> None:
    """Keep a client's tensors on its node until its next round."""
    if values:
        context.state[KEPT] = ArrayRecord({name: Array(value.cpu().numpy()) for name, value in values.items()})
