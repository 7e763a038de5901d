"""What is measured, and in which rounds: evaluation has a share of the training's work, in samples, never in time.

A forward pass is a third of a forward and a backward (the backward does two products where the forward does one;
Kaplan et al. 2020, §2.1), so evaluating a sample costs a third of training on it. Counting samples and not seconds
makes the rounds that are evaluated a function of the config alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import NamedTuple

_FORWARD = Fraction(1, 3)  # of a training step's work on the same sample


def evaluation_interval(train_samples_per_round: int, eval_samples: int, share: float = 0.2) -> int:
    """Return the least number of rounds between evaluations that keeps their work within a share of the training's.

        min m ≥ 1:  eval_samples / 3 ≤ share · m · train_samples_per_round

    Args:
        train_samples_per_round: samples passed forward and backward in a round, ≥ 1 (cohort · local epochs · size).
        eval_samples: samples of one evaluation, ≥ 0.
        share: in (0, 1].

    """
    _check(train_samples_per_round >= 1, "train_samples_per_round", ">= 1", train_samples_per_round)
    _check(eval_samples >= 0, "eval_samples", ">= 0", eval_samples)
    _check(0 < share <= 1, "share", "in (0, 1]", share)
    # str: the decimal that was written; the float 0.3 lies below 3/10 and would cost a round at a tie.
    budget = Fraction(str(share)) * train_samples_per_round
    return max(1, math.ceil(_FORWARD * eval_samples / budget))


class Due(NamedTuple):
    """What is evaluated in a round."""

    server: bool  # test and validation splits: every figure of the global model
    clients: bool  # each client's local data
    decomposition: bool  # the terms of the loss


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured in a run and how often; `resolve` fills in what the budget decides.

    Raises:
        ValueError: a value out of its range; the message names the setting, the range and the value.

    """

    every: int | None = None  # rounds between evaluations of the global model, ≥ 1
    clients_every: int | None = None  # rounds between evaluations on the clients' data, ≥ 1; 0: never
    share: float = 0.2  # of training's work for what is None above, in (0, 1]
    per_class: bool = True  # recall of each class
    per_client: bool = True  # a row a client and round in clients.parquet
    drift: bool = True  # what the norms of the updates and their mean tell
    cosines: bool = False  # and each update's cosine to the mean, for which the engine must hold the rows
    calibration: bool = True  # expected calibration error
    calibration_bins: int = 15  # ≥ 1
    robust_radius: float = 0.0  # ε ≥ 0 of the box in which an adversary moves samples of the server's splits; 0: never
    robust_steps: int = 20  # of its gradient ascent, ≥ 1; 1: the fast gradient sign method
    robust_low: float | None = None  # least value of a feature that it may give; None: no bound
    robust_high: float | None = None  # largest, above `robust_low`
    finetune_steps: int = 0  # local steps after which clients are tested once more, each on its own model; 0: never
    decomposition_every: int = 0  # rounds between decompositions of the loss; 0: never
    decomposition_samples: int = 5000  # at most, of all clients' training data, ≥ 1
    targets: tuple[float, ...] = ()  # test accuracies in (0, 1] of which the summary says when they were reached

    def __post_init__(self) -> None:
        rule = ">= 1, or null for the budget"
        _check(self.every is None or self.every >= 1, "metrics.every", rule, self.every)
        often = self.clients_every
        _check(often is None or often >= 0, "metrics.clients_every", ">= 0, or null for the budget", often)
        _check(0 < self.share <= 1, "metrics.share", "in (0, 1]", self.share)
        _check(self.calibration_bins >= 1, "metrics.calibration_bins", ">= 1", self.calibration_bins)
        _check(0 <= self.robust_radius < math.inf, "metrics.robust_radius", "finite and >= 0", self.robust_radius)
        _check(self.robust_steps >= 1, "metrics.robust_steps", ">= 1", self.robust_steps)
        low, high = self.robust_low, self.robust_high
        _check(low is None or high is None or low < high, "metrics.robust_low", f"below robust_high={high}", low)
        _check(self.finetune_steps >= 0, "metrics.finetune_steps", ">= 0", self.finetune_steps)
        _check(self.decomposition_every >= 0, "metrics.decomposition_every", ">= 0", self.decomposition_every)
        _check(self.decomposition_samples >= 1, "metrics.decomposition_samples", ">= 1", self.decomposition_samples)
        for target in self.targets:
            _check(0 < target <= 1, "metrics.targets", "accuracies in (0, 1]", target)

    def resolve(self, train_samples_per_round: int, eval_samples: int, client_samples: int) -> Evaluation:
        """Return the same with numbers for what was left to the budget.

        The two kinds of evaluation get half of the share each, or all of it where the other one has its interval
        from the user.

        Args:
            train_samples_per_round: expected samples passed forward and backward in a round, ≥ 1.
            eval_samples: samples of one evaluation of the global model (test and validation).
            client_samples: samples of one evaluation on the clients' data (all clients together).

        """
        both = self.every is None and self.clients_every is None
        share = self.share / 2 if both else self.share
        every, often = self.every, self.clients_every
        if every is None:
            every = evaluation_interval(train_samples_per_round, eval_samples, share)
        if often is None:
            often = evaluation_interval(train_samples_per_round, client_samples, share)
        return replace(self, every=every, clients_every=often)

    @property
    def passes(self) -> int:
        """Forward passes that a sample of the server's splits is worth: of a step of the adversary three."""
        return 2 + 3 * self.robust_steps if self.robust_radius else 1

    def due(self, round: int, last_round: int) -> Due:
        """Say what is evaluated in a round (from 1); call it on what `resolve` returned.

        The first round and the last have everything that is ever measured, so that every later row has a last known
        value and the result is whole.
        """
        if self.every is None or self.clients_every is None:
            raise ValueError("metrics.every and metrics.clients_every are still null; call resolve first")
        return Due(
            *(
                every > 0 and (round in (1, last_round) or round % every == 0)
                for every in (self.every, self.clients_every, self.decomposition_every)
            )
        )


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
