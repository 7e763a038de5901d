"""What holds for a method when it is run, whatever it does; and `check_client`, which runs it.

The laws of `fedsim.laws` are a rule's on a matrix. These need clients that train: a strategy and a client are run
together on a tiny federation, once, and then again in other ways that must not matter.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedsim.backend import EngineBackend
from fedsim.build import build
from fedsim.config import compose
from fedsim.console import Observer
from fedsim.deploy import app_of
from fedsim.engine.failing import AllUpdatesBad
from fedsim.engine.rounds import Trainer
from fedsim.errors import UserError, did_you_mean
from fedsim.experiment import Experiment
from fedsim.flower.deployment import Deployed
from fedsim.flower.nodes import LocalNodes
from fedsim.flower.records import FlatRecord, flatten
from fedsim.loop import Loop
from fedsim.metrics.records import RoundLog

ROUNDS, CLIENTS = 3, 5
# 150 samples of 6 numbers and 3 classes, unequal clients, two batches and more a round; all clients in every round.
_WORDS = (
    "data=blobs", "data.shape=[6]", "data.num_classes=3", "data.num_samples=150", f"partition.num_clients={CLIENTS}",
    "partition.alpha=2", "fraction=1", "client.batch_size=8", "client.lr=0.1", "model.hidden=[5]",
    f"num_rounds={ROUNDS}", "dtype=float64", "metrics.every=1000", "checkpoint.every=1000",
)  # fmt: skip


class Left(NamedTuple):
    """What a run leaves."""

    weights: Tensor  # (D,) on the CPU
    kept: dict[str, Tensor]  # name → (T, …), what clients keep
    uploads: dict[str, Tensor]  # name → (K, …), of the last round


class Federation:
    """A method on a tiny federation.

    Args:
        strategy: the name of a choice, or a rule.
        client: the name of a choice or an objective; None: what belongs to the strategy.
        settings: that the method needs, e.g. "client.batch_size=null".

    """

    def __init__(self, strategy: Any, client: Any, settings: Sequence[str] = ()) -> None:
        self.settings = tuple(settings)
        self.named = {n: g for n, g in (("strategy", strategy), ("client", client)) if isinstance(g, str)}
        given = {"strategy": strategy, "client": client}
        self.parts = {n: g for n, g in given.items() if g is not None and n not in self.named}

    def build(self, *words: str) -> Experiment:
        """Return the experiment, with some settings otherwise."""
        given = [*self.settings, *words]
        changed = {word.split("=")[0] for word in given}
        fixed = [word for word in _WORDS if word.split("=")[0] not in changed]
        return build(compose([*(f"{n}={v}" for n, v in self.named.items()), *fixed, *given]), self.parts)

    def run(self, *words: str, cut: bool = False) -> Left:
        """Return what a run leaves; `cut` ends it after the first round and goes on from its checkpoint."""
        with TemporaryDirectory() as folder, ExitStack() as opened:
            loop = self._loop(words, folder, opened)
            loop.step(1)
            if cut:
                loop.save()
                loop = self._loop(words, folder, opened)
                loop.load()
            for number in range(2, ROUNDS + 1):
                loop.step(number)
            uploads = {} if loop.backend.cohort is None else loop.backend.cohort.extras
            return Left(loop.weights.cpu(), loop.task.store.rows()[1], {n: v.cpu().clone() for n, v in uploads.items()})

    def _loop(self, words: Sequence[str], folder: str, opened: ExitStack) -> Loop:
        loop = Loop(self.build(*words), Path(folder), Observer())
        for part in (loop.rounds, loop.times, loop.experiment.engine):
            opened.callback(part.close)
        return loop

    @cached_property
    def left(self) -> Left:
        """What the run leaves that all others are held against."""
        return self.run("engine=sequential")

    def clients(self) -> tuple[EngineBackend, Tensor, dict[str, Any]]:
        """Return the clients before round 1, the weights (D,) that they are sent, and what goes with these."""
        made = self.build("engine=sequential")
        backend = EngineBackend(
            Trainer(made.engine), buffers=made.initial_buffers, average_buffers=True, test=made.splits.test
        )
        rule, layout = made.strategy, made.task.shared
        sent = rule.broadcast(rule.init(layout, CLIENTS)) if hasattr(rule, "broadcast") else {}
        return backend, made.initial, dict(sent)


def check_client(
    client: Any, *, strategy: Any = None, laws: Collection[str] | None = None, settings: Sequence[str] = ()
) -> None:
    """Run the laws on a client's objective; say which failed and what to do about it.

    `repeat` (equal bits from equal seeds), `engines` (one client after another, or a cohort as one program),
    `alone` (an update does not depend on who else trains), `pure` (what a client is given is left alone),
    `precision` (float32 follows float64), `checkpoint` (a run that is cut off goes on to the bit), `finite`,
    `device` (where there is a GPU) and `flower` (a deployment's messages carry all that the method needs).

    Args:
        client: an objective, or the name of a choice.
        strategy: the rule that it goes with, or the name of a choice; None: federated averaging.
        laws: which to run; None: all.
        settings: that the method needs, e.g. "client.batch_size=null".

    Raises:
        AssertionError: a law does not hold; the message names it and the cure.
        ValueError: `laws` names one that there is not.

    """
    check_runs(Federation(strategy or "fedavg", client, settings), laws)


def check_runs(federation: Federation, laws: Collection[str] | None = None) -> None:
    """Run the laws on a federation.

    Raises:
        AssertionError: a law does not hold.
        ValueError: `laws` names one that there is not.

    """
    for name in RUN_LAWS if laws is None else laws:
        if name not in RUN_LAWS:
            raise ValueError(f"no law {name!r}{did_you_mean(name, RUN_LAWS)}")
        RUN_LAWS[name](federation)


def _law_finite(federation: Federation) -> None:
    try:
        left = federation.left
    except AllUpdatesBad as error:
        raise AssertionError(f"law 'finite': {error}; guard the logarithm, the root or the division") from error
    for name, value in {"the weights": left.weights, **left.kept, **left.uploads}.items():
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise AssertionError(f"law 'finite': {name} hold a NaN or an infinity after {ROUNDS} rounds")


def _law_repeat(federation: Federation) -> None:
    again = federation.run("engine=sequential")
    _same(
        "repeat", again, federation.left, 0.0, "two runs differ; draw randomness from context.rng or cohort.rng alone"
    )


def _law_engines(federation: Federation) -> None:
    # The engine's own choice; then, whatever this machine would choose, what a GPU trains a cohort with.
    for kernels in ("auto", "generic", "fused"):
        try:
            batched = federation.run("engine=vectorized", f"engine.kernels={kernels}")
        except UserError as error:
            if kernels == "fused":  # only for some layers, and losses on what the model returns
                continue
            raise AssertionError(f"law 'engines': a cohort cannot be trained as one program: {error}") from error
        except Exception as error:
            first = (str(error).strip().splitlines() or [""])[0]
            raise AssertionError(
                f"law 'engines': {type(error).__name__} where a cohort is trained as one program: {first}; an "
                "objective has no .item() and no Python branch on a tensor's value (torch.where instead), and makes "
                "new tensors from its inputs (torch.zeros_like), so that they have the clients' axis"
            ) from error
        cure = "one client after another and a cohort as one program differ; keep leading axes apart, reduce the last"
        _same("engines", batched, federation.left, 1e-7, f"{cure} alone")


def _law_alone(federation: Federation) -> None:
    rows = []
    for chosen in (range(CLIENTS), [0], [CLIENTS - 1]):
        backend, w, sent = federation.clients()
        rows.append(backend.train(1, np.array(chosen), w, sent, {}).rows.clone())
    if not torch.equal(rows[0][[0, -1]], torch.cat(rows[1:])):
        raise AssertionError(
            "law 'alone': a client's update depends on who else trains; keep nothing in the objective between calls: "
            "what a client keeps is returned by `finish`"
        )


def _law_pure(federation: Federation) -> None:
    backend, w, sent = federation.clients()
    given = {f"context.broadcast[{name!r}]": value for name, value in sent.items() if isinstance(value, Tensor)}
    given |= {"context.received": w, **backend.task.store.first}
    copies = {name: value.clone() for name, value in given.items()}
    backend.train(1, np.arange(CLIENTS), w, sent, {})
    if changed := [name for name, copy in copies.items() if not torch.equal(copy, given[name])]:
        raise AssertionError(f"law 'pure': the client writes into {changed[0]}; return a new tensor instead")


def _law_precision(federation: Federation) -> None:
    single = federation.run("engine=sequential", "dtype=float32")
    if single.weights.dtype != torch.float32:
        raise AssertionError(f"law 'precision': weights of a float32 run are {single.weights.dtype}; keep the dtype")
    # 1e-2: rules that select or take signs jump where rounding decides
    cure = "float32 and float64 differ; build tensors with the dtype and device of those given (value.new_zeros)"
    _same("precision", Left(single.weights.double(), {}, {}), federation.left, 1e-2, cure)


def _law_checkpoint(federation: Federation) -> None:
    cure = (
        "a run that is cut off after round 1 ends elsewhere; what is remembered belongs into the rule's state or what "
        "`finish` returns, not into attributes"
    )
    _same("checkpoint", federation.run("engine=sequential", cut=True), federation.left, 0.0, cure)


def _law_device(federation: Federation) -> None:
    if torch.cuda.is_available():
        left = federation.run("engine=sequential", "device=cuda")
        _same("device", left, federation.left, 1e-6, "CPU and GPU differ; build tensors on the device of those given")


def _law_flower(federation: Federation) -> None:
    made = federation.build("engine=sequential")
    backend, _, _ = federation.clients()
    app = app_of(lambda client, _: (backend, client))
    with TemporaryDirectory() as folder:
        log = RoundLog(Path(folder, "rounds.jsonl"))
        shell = Deployed(
            made.strategy, log, made.initial_buffers[:0], num_clients=CLIENTS, min_nodes=CLIENTS, fraction_evaluate=0,
            seed=made.settings.seed,
        )  # fmt: skip
        layout = made.task.shared
        try:
            result = shell.start(LocalNodes(app, CLIENTS), FlatRecord(made.initial, layout).plain(), num_rounds=ROUNDS)
        except Exception as error:
            raise AssertionError(
                f"law 'flower': {type(error).__name__} in a deployment: {error}; what is sent and uploaded is tensors "
                "and numbers by name"
            ) from error
        finally:
            log.close()
    weights = flatten(result.arrays, layout)
    cure = "a Flower deployment gives other weights than the simulation; what travels is tensors and numbers by name"
    _same("flower", Left(weights.to(made.initial), {}, {}), federation.left, 1e-7, cure)


def _same(law: str, got: Left, want: Left, tolerance: float, cure: str) -> None:
    """Compare all that both have; tolerances are relative to the largest entry."""
    for name, a, b in _pairs(got, want):
        scale = max(float(b.abs().max()) if b.numel() else 0.0, 1e-3)
        error = float((a - b).abs().max()) / scale if b.numel() else 0.0
        if not error <= tolerance:
            raise AssertionError(f"law {law!r}: {cure} ({name}: relative error {error:.1e}, {tolerance:.0e} allowed)")


def _pairs(got: Left, want: Left) -> list[tuple[str, Tensor, Tensor]]:
    def common(a: Mapping[str, Tensor], b: Mapping[str, Tensor], what: str) -> list[tuple[str, Tensor, Tensor]]:
        return [(f"{what} {name!r}", a[name].double(), b[name].double()) for name in a if name in b]

    weights = ("weights", got.weights.double(), want.weights.double())
    return [weights, *common(got.kept, want.kept, "state"), *common(got.uploads, want.uploads, "upload")]


RUN_LAWS: dict[str, Callable[[Federation], None]] = {
    name.removeprefix("_law_"): law for name, law in list(globals().items()) if name.startswith("_law_")
}
