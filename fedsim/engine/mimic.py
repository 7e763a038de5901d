"""A client's local round as the server can imitate it: on data that the server makes up, differentiable, batched.

What the server knows of a client beside its update: the model, the objective, how it trains, how many samples it
has. No client's data is held or read; of the data set only its format is (shape, classes and the range of inputs,
which for pixels is public).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fedsim.engine.model import Functional
from fedsim.engine.replay import Replay
from fedsim.engine.task import Task
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import LocalTraining, rates_of
from fedsim.models.dropout import KeyedDropout

P = TypeVar("P")
R = TypeVar("R")
Soft = Callable[[Tensor, Tensor, Tensor], Tensor]
Samples = tuple[Tensor, Tensor, Tensor]


@dataclass(kw_only=True, eq=False)
class Mimic:
    """Local rounds of S clients at once, on made-up samples with soft labels.

    Args:
        module: the model, in eval mode when it is called.
        layout: of its D shared parameters.
        training: what clients do; full batches by sgd.
        criterion: (logits (S, B, C), label probabilities (S, B, C), weights (S, B)) -> (S,).
        proximal_mu: of the clients' objective.
        input_shape: of one sample.
        num_classes: C.
        bounds: (lowest, highest) value of an input.
        replay: calls functions of many local rounds; replicas share one.
        seat: where a replica waits until others have rows too; None: it is alone.

    """

    module: nn.Module
    layout: Layout
    training: LocalTraining
    criterion: Soft
    proximal_mu: float
    input_shape: tuple[int, ...]
    num_classes: int
    bounds: tuple[float, float]
    replay: Replay = field(default_factory=Replay)
    seat: Any = None

    @classmethod
    def of(cls, task: Task) -> Mimic:
        """Return the mimic of a task's clients.

        Raises:
            UserError: something of what they do cannot be imitated faithfully; the message says what.

        """
        reason = _refusal(task)
        if reason is not None:
            raise UserError(f"strategy: the server cannot imitate these clients: {reason}")
        task.module.eval()
        with torch.no_grad():
            num_classes = int(task.module(task.x[:1]).shape[-1])
        return cls(
            module=task.module,
            layout=task.shared,
            training=task.training,
            criterion=task.objective.soft_criterion,
            proximal_mu=float(getattr(task.objective, "proximal_mu", 0.0)),
            input_shape=tuple(task.x.shape[1:]),
            num_classes=num_classes,
            bounds=(float(task.x.min()), float(task.x.max())),
        )

    def rates(self, num_steps: Tensor, round: int | Sequence[int], like: Tensor) -> Tensor:
        """Return the local rate (S, E) of each step of S rows, 0 after a row's last one.

        Args:
            num_steps: (S,) int64.
            round: whose local rate is used; (S,): each row's own.
            like: for dtype and device.

        """
        if isinstance(round, int):
            return rates_of(num_steps, self.training.rate(round), like).T
        return rates_of(num_steps, like.new_tensor([self.training.rate(of) for of in round]), like).T

    def unroll(
        self, start: Tensor, samples: Samples, *, rates: Tensor, criterion: Soft | None = None,
        create_graph: bool = True,
    ) -> Tensor:  # fmt: skip
        """Return the updates (S, D) of local rounds from start (S, D).

        Args:
            start: (S, D) models.
            samples: of S clients: x (S, B, …), labels (S, B, C), and weights (S, B), 1/b for b samples, 0 for padding.
            rates: (S, E) of `rates`.
            criterion: instead of the clients' own.
            create_graph: whether the result can be differentiated in the samples.

        """
        self.module.eval()
        soft = criterion or self.criterion
        x, labels, weights = samples
        return self.training.unroll(
            lambda params, step: soft(self._logits(params, x), labels, weights),
            start, rates=rates.T, proximal_mu=self.proximal_mu, create_graph=create_graph,
        )  # fmt: skip

    def together(self, round: int, key: Hashable, solve: Callable[[Mimic, Sequence[P]], list[R]], part: P) -> R:
        """Return what `solve` makes of a part; of replicas it is given the parts of all that have one, at once.

        Args:
            round: the run's; those behind are waited for.
            key: parts of one key are solved together.
            solve: (mimic, parts) -> as many results, each of which is its own part's alone.
            part: rows of this run.

        """
        if self.seat is None:
            return solve(self, [part])[0]
        result: R = self.seat.solved(round, key, lambda parts: solve(self, parts), part)
        return result

    def _logits(self, params: Tensor, x: Tensor) -> Tensor:
        model = Functional(self.module)
        if len(params) == 1:
            return model(self.layout.split(params[0]), x[0])[None]  # (1, B, C)
        logits: Tensor = torch.vmap(lambda w, samples: model(self.layout.split(w), samples))(params, x)  # (S, B, C)
        return logits


def _refusal(task: Task) -> str | None:
    """Say what cannot be imitated, None if all can."""
    objective, training = task.objective, task.training
    if training.optimizer != "sgd":
        return f"client.optimizer={training.optimizer} cannot be unrolled; use sgd"
    if training.batch_size is not None and training.batch_size < int(task.partition.sizes.max()):
        return "they train in mini-batches, whose order it does not know; set client.batch_size=null"
    if any(hasattr(objective, name) for name in ("loss", "direction", "finish", "phases")):
        return f"{type(objective).__name__} does more than minimise a criterion of the logits"
    if not hasattr(objective, "soft_criterion"):
        return f"{type(objective).__name__} has no soft_criterion for labels that are probabilities"
    if any(isinstance(module, KeyedDropout) and module.p for module in task.module.modules()):
        return "the model has dropout, whose masks it does not know; set it to 0"
    if task.buffers.size:
        return "the model keeps running statistics (batch norm); use group norm"
    if task.local.size:
        return "part of the model stays with the clients"
    if task.augment is not None:
        return "their samples are augmented, differently in every pass"
    if not task.x.is_floating_point():
        return "inputs are tokens, which have no gradient"
    return None
