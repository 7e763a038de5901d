"""The rounds of a run: sample, train, aggregate, evaluate, record, checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fedsim import checkpoint, heap
from fedsim.backend import EngineBackend
from fedsim.console import Observer
from fedsim.contracts import Cohort, LinearRule, Metrics, State
from fedsim.dispatch import Dispatcher
from fedsim.engine.failing import AllUpdatesBad
from fedsim.engine.hosted import Hosted
from fedsim.engine.rounds import Trainer
from fedsim.engine.task import clock_of
from fedsim.errors import UserError, some_of
from fedsim.evaluation import ClientFigures, Evaluator, with_evaluation
from fedsim.experiment import Experiment
from fedsim.figures import Figures
from fedsim.local import Int64
from fedsim.metrics.client_log import ClientLog
from fedsim.metrics.records import RoundLog, write_json
from fedsim.place import Place, blockwise
from fedsim.shards import all_stores
from fedsim.shell import RuleShell
from fedsim.stopping import Stopping
from fedsim.threads import one_thread


class Loop:
    """A run's state and what one round does to it.

    Args:
        experiment: what the run is made of.
        folder: the run folder, held by the caller.
        observer: who is told.

    """

    def __init__(self, experiment: Experiment, folder: Path, observer: Observer) -> None:
        self.experiment, self.folder, self.observer = experiment, folder, observer
        self.settings, self.task = experiment.settings, experiment.task
        self.plan = experiment.plan  # as written: a resumed run's is that of the run which it goes on with
        self.weights = experiment.initial.detach()  # (D,), never written to
        self.round = 0
        self.now = clock_of(experiment.engine)
        self.waited = False  # whether it was said that nobody answered
        self.stopping = Stopping(experiment.settings, experiment.evaluation.every or 1)
        self.seconds = {"train": 0.0, "aggregate": 0.0, "evaluate": 0.0, "record": 0.0}
        self.uplink = experiment.uplink
        adversary = None if self.uplink is None else self.uplink.adversary
        self.evaluator = Evaluator(
            self.task, experiment.dataset, experiment.splits, experiment.evaluation,
            byzantine=None if adversary is None else adversary.byzantine,
        )  # fmt: skip
        self.strategy = self._strategy()
        self.backend = self._backend()
        self.backend.uplink = self.uplink
        self.backend.sent = getattr(experiment.strategy, "sent", None)
        self.flower = self._flower()
        self.dispatcher = self.backend.dispatcher = Dispatcher(
            experiment, lambda ids: self.evaluator.train_losses(self.weights, self.backend.buffers, ids, self.round + 1)
        )
        self.figures = Figures(experiment, self.evaluator, self.backend, self.dispatcher, self._broadcast)
        kept = {"clients": self.task.store, "uplink": None if self.uplink is None else self.uplink.store}
        for store in kept.values():
            if store is not None:
                store.folder = folder
        self.shards = all_stores(folder / "checkpoints" / "clients", **kept)
        self.rounds = RoundLog(folder / "rounds.jsonl")
        self.times = RoundLog(folder / "timings.jsonl")
        self.clients = ClientLog(folder)

    def _strategy(self) -> Any:
        strategy = self.experiment.strategy
        if not callable(strategy):  # a Flower strategy: it has methods, and is none
            return strategy
        shell = RuleShell
        if self.experiment.foreign is not None:
            from fedsim.flower.strategy import RuleStrategy as shell  # here: see `_flower`
        return shell(strategy, num_clients=len(self.experiment.participants), seed=self.settings.seed)

    def _flower(self) -> Any:
        """Return what drives a Flower strategy or app; None where a rule meets fedsim's own clients."""
        foreign = self.experiment.foreign
        if foreign is None and isinstance(self.strategy, RuleShell):
            return None
        from fedsim.flower.server import FlowerServer  # here: to load Flower takes a third of a second

        return FlowerServer(
            self.strategy, foreign or self.backend, seed=self.settings.seed,
            on_client_error=self.settings.on_client_error,
        )  # fmt: skip

    def _backend(self) -> EngineBackend:
        rule = self.experiment.strategy
        settings, plan = self.settings, self.experiment.plan
        streamed = plan["rows"] == "streamed"
        if self.uplink is not None and callable(rule):
            self.uplink.aggregate = lambda cohort: rule(cohort, self.strategy.state)[0]
        trainer = Trainer(
            self.experiment.engine, settings.on_bad_update, settings.on_client_error, block=plan["block_rows"],
            changes=plan["changes"], hosted=Hosted(self.task) if plan["updates"]["on"] == "host" else None,
        )  # fmt: skip
        trainer.halving.told = self._halved
        return EngineBackend(
            trainer,
            buffers=self.experiment.initial_buffers,
            average_buffers=settings.buffers == "average",
            test=self.experiment.splits.test,
            coefficients=(lambda cohort: rule.coefficients(cohort, self.strategy.state)) if streamed else None,
            reduced_extras=rule.reduced_extras if isinstance(rule, LinearRule) else (),
        )

    def run(self) -> None:
        """Go on until the last round or a stop; then the logs are whole."""
        last = self.settings.num_rounds
        self.observer.start(last, self.round)
        every = self.experiment.plan["checkpoint_every"]
        try:
            while self.round < last and self.stopping.reason is None:
                self.step(self.round + 1)
                self.backend.cohort = None  # its mean and its versions are models' sizes, and nobody needs them now
                if self.round % every == 0 or self.round == last or self.stopping.reason:
                    self.save()
        finally:
            self.rounds.close()
            self.times.close()
            self.experiment.engine.close()
            heap.release()

    def step(self, round: int) -> None:
        """Do one round."""
        held = self.plan["updates"]
        with blockwise(Place(self.task.device, held["block_bytes"]) if held["on"] == "host" else None):
            self._step(round)

    def _step(self, round: int) -> None:
        started = self.now()
        self.backend.cohort, buffers = None, self.backend.buffers
        arrivals = self.dispatcher.next(round, self.weights, self._broadcast, buffers)
        train = self._train_seconds()
        weights: Tensor = self.weights
        metrics: Metrics = {}
        if len(arrivals.clients):
            weights, metrics = self._aggregate(round, arrivals.clients)
            self._warn(round)
        elif not self.waited:
            self.waited = True
            self.observer.warn(f"round {round}: nobody's reply arrived; such rounds leave the model as it is")
        with one_thread():
            weights = weights.to(self.task.device, self.task.dtype)
            if not bool(torch.isfinite(weights).all()):
                self.backend.buffers = buffers
                what = f"the new model is not finite; the run keeps that of round {self.round}"
                raise AllUpdatesBad(f"round {round}: {what}")
            delta = weights - self.weights
        trained = self.now()
        self.weights, self.round = weights, round
        row, clients = self.figures.measure(round, weights, delta, self._cohort())
        row |= metrics  # a (K,) tensor becomes a column of the clients' table
        if len(arrivals.clients):
            self.figures.previous = delta
        measured = self.now()
        self.stopping.look(round, row)
        self._record(row, clients)
        if isinstance(self.strategy, RuleShell):
            self.strategy.cohort = None  # the backend has it
        ended = self.now()
        times = {
            "train": self._train_seconds() - train, "evaluate": measured - trained, "record": ended - measured,
        }  # fmt: skip
        times["aggregate"] = trained - started - times["train"]
        for name, seconds in times.items():
            self.seconds[name] += seconds
        self.times.append(round, {f"seconds_{name}": seconds for name, seconds in times.items()})
        self.observer.round({**row, "round": round, "seconds": ended - started})

    def _aggregate(self, round: int, clients: Int64) -> tuple[Tensor, Metrics]:
        new: tuple[Tensor, Metrics]
        if self.flower is not None:
            new = self.flower.round(round, self.weights, clients)
        else:
            new = self.strategy.round(round, self.weights, clients, self.backend)
        return new

    def _halved(self, change: Mapping[str, int]) -> None:
        """Say that memory ran out, and write it into the plan."""
        self.observer.warn(
            f"round {change['round']}: out of memory on the device; chunks of {change['chunk']} clients from here on"
        )
        self.write_plan()

    def write_plan(self) -> None:
        """Write the plan, with what has changed of it."""
        write_json(self.folder / "plan.json", self.plan)

    def _warn(self, round: int) -> None:
        """Say whose updates were left out."""
        trainer = self.backend.trainer
        if trainer.bad:
            self.observer.warn(
                f"round {round}: the update of client {some_of(trainer.bad)} is not finite; it is left out"
            )
        for client, what in trainer.failures.items():
            self.observer.warn(f"round {round}: client {client} failed and is left out: {what}")
        lost: list[str] = getattr(self.experiment.engine, "warnings", [])  # workers that died
        for line in (*lost, *(self.strategy.shortage() if isinstance(self.strategy, RuleShell) else ())):
            self.observer.warn(f"round {round}: {line}")
        lost.clear()

    def _train_seconds(self) -> float:
        return self.backend.trainer.seconds

    def _cohort(self) -> Cohort | None:
        """Return this round's cohort; a Flower strategy over a foreign app never makes one."""
        if self.experiment.foreign is None:
            return self.backend.cohort
        return self.strategy.cohort if isinstance(self.strategy, RuleShell) else None

    def _broadcast(self) -> Mapping[str, Any]:
        """Return what the rule sends with the newest version."""
        shell = self.strategy
        if not isinstance(shell, RuleShell) or not hasattr(shell.rule, "broadcast"):
            return {}
        if shell.state is None:
            shell.state = shell.rule.init(self.task.shared, len(self.experiment.participants))
        sent: Mapping[str, Any] = shell.rule.broadcast(shell.state)
        return sent

    def _record(self, row: Mapping[str, Any], evaluated: ClientFigures | None) -> None:
        columns = {name: value for name, value in row.items() if not isinstance(value, Tensor) or value.dim() == 0}
        self.rounds.append(self.round, columns)
        cohort = self._cohort()
        if cohort is None or not self.experiment.evaluation.per_client:
            return
        mine: dict[str, Any] = {"num_samples": cohort.weights, "num_steps": cohort.num_steps}
        mine |= {name: value for name, value in cohort.extras.items() if value.dim() == 1}
        mine |= self.dispatcher.columns(cohort)[1]
        mine |= {n: v for n, v in row.items() if isinstance(v, Tensor) and v.dim() == 1 and len(v) == len(cohort)}
        self.clients.append(self.round, *with_evaluation(cohort, mine, evaluated))

    def state(self) -> State:
        """Return everything that the next round depends on; what clients keep is in shards, written before."""
        rule = self.strategy.state if isinstance(self.strategy, RuleShell) else self.flower.capture()
        return {
            "config": checkpoint.identity(self.experiment.config),
            "plan": self.plan,
            "weights": self.weights,
            "buffers": self.backend.buffers,
            "strategy": rule,
            "clients": {name: shards.write(self.round) for name, shards in self.shards.items()},
            "uplink": {} if self.uplink is None else self.uplink.state(),
            "foreign": self.experiment.foreign.capture() if self.experiment.foreign else {},
            "stopping": self.stopping.state(),
            "figures": self.figures.state(),
            "time": self.dispatcher.state(),
            "seconds": self.seconds,
        }

    def save(self) -> None:
        """Write a checkpoint of the rounds done."""
        self.clients.flush()
        self.rounds.sync()
        self.times.sync()
        folder = self.folder / "checkpoints"
        checkpoint.save(folder, self.round, self.state(), keep=self.settings.checkpoint.keep)
        for shards in self.shards.values():
            shards.prune(checkpoint.rounds(folder)[0])

    def _load_clients(self, state: State) -> None:
        if state.get("config") == checkpoint.identity(self.experiment.config):
            for name, shards in self.shards.items():
                shards.load(state["clients"][name])

    def load(self) -> None:
        """Go back to the newest checkpoint, or to the start where there is none yet."""
        checkpoints = self.folder / "checkpoints"
        if checkpoint.rounds(checkpoints):
            self.round, state = checkpoint.load(checkpoints, self._load_clients)
            if state.get("config") != checkpoint.identity(self.experiment.config):
                raise UserError(f"{checkpoints}: the checkpoint of round {self.round} is of a run with another config")
            device = self.task.device
            self.weights = state["weights"].to(device)
            self.backend.buffers = state["buffers"].to(device)
            if isinstance(self.strategy, RuleShell):
                self.strategy.state = checkpoint.moved(state["strategy"], device)
            else:
                self.flower.restore(state["strategy"])
            if state["foreign"]:
                self.experiment.foreign.restore(state["foreign"])
            if self.uplink is not None:
                self.uplink.load(state["uplink"])
            self.dispatcher.load(state["time"], lambda value: checkpoint.moved(value, device))
            self.stopping.load(state["stopping"])
            self.figures.load(state["figures"], device)
            self.seconds = state["seconds"]
        self.rounds.truncate_to(self.round)
        self.times.truncate_to(self.round)
        self.clients.truncate_to(self.round)
