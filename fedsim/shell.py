"""A rule between rounds: its state, and what its last call left. `flower.strategy` makes it one of Flower's."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any, Protocol

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, Rule, State
from fedsim.errors import UserError
from fedsim.layout import Layout
from fedsim.local import Int64
from fedsim.threads import one_thread


class Trains(Protocol):
    """What trains a cohort; see `fedsim.flower.grid.Backend`."""

    layout: Layout

    def train(
        self, round: int, clients: Int64, models: Tensor, broadcast: Mapping[str, Any], config: Mapping[str, Any]
    ) -> Cohort:
        """Train clients (K,) from models (D,) and return those that answered."""
        ...


def _kind(value: Any) -> str:
    return (
        f"a tuple of {len(value)}" if isinstance(value, tuple) else "nothing" if value is None else type(value).__name__
    )


class RuleShell:
    """Calls a rule round by round.

    Args:
        rule: a server rule; `state`, `metrics` and `cohort` are what its last call left.
        num_clients: clients that can be sampled; None: as many as there are in the first round.
        seed: of everything random in the rule.

    """

    def __init__(self, rule: Rule, *, num_clients: int | None = None, seed: int = 0) -> None:
        self.rule, self.num_clients, self.seed = rule, num_clients, seed
        self.state: State | None = None
        self.metrics: Metrics = {}
        self.cohort: Cohort | None = None
        self._short = False  # whether it was said that too few updates arrived

    @property
    def _name(self) -> str:
        return type(self.rule).__name__

    def begin(self, layout: Layout, connected: int, *, cohort: int | None = None) -> None:
        """Before the first round, make the rule's state.

        Args:
            layout: of the updates.
            connected: clients that can be sampled, where nobody has said.
            cohort: a size of cohorts that the rule may refuse; None: it was asked, about the size expected.

        """
        if self.state is None:
            if cohort is not None and (check := getattr(self.rule, "check", None)):
                check(cohort)
            self.state = self.rule.init(layout, self.num_clients or connected)
            if not isinstance(self.state, dict):
                raise UserError(
                    f"strategy: {self._name}.init must return a dict, got {_kind(self.state)}; {{}} is none"
                )

    def shortage(self) -> list[str]:
        """Say once that fewer updates reached the rule than its guarantee needs: a line, or none."""
        check = getattr(self.rule, "check", None)
        if check is None or self.cohort is None or self._short:
            return []
        try:
            check(len(self.cohort))
        except ValueError as error:
            self._short = True
            return [f"fewer updates arrived than the rule's guarantee needs, in this round and maybe later: {error}"]
        return []

    def broadcast(self) -> Mapping[str, Any]:
        """Return what the rule sends along with the model; `begin` was called."""
        broadcast = getattr(self.rule, "broadcast", None)
        return broadcast(self.state) if broadcast else {}

    def apply(self, cohort: Cohort, w: Tensor) -> Tensor:
        """Return the new weights (D,) that the rule makes of a cohort and w (D,)."""
        assert self.state is not None  # `begin` was called
        self.cohort = cohort
        with nullcontext() if cohort.streamed is None else one_thread():  # or it has no rows
            result: Any = self.rule(cohort, self.state)
        if not isinstance(result, tuple) or len(result) != 3:
            raise UserError(f"strategy: {self._name} must return (delta (D,), state, metrics), got {_kind(result)}")
        delta, state, metrics = result
        if not isinstance(delta, Tensor) or delta.shape != w.shape:
            got = tuple(delta.shape) if isinstance(delta, Tensor) else _kind(delta)
            raise UserError(f"strategy: {self._name} must return a step of shape {tuple(w.shape)}, got {got}")
        if not isinstance(state, dict) or not isinstance(metrics, dict):
            wrong = ("state", state) if not isinstance(state, dict) else ("metrics", metrics)
            raise UserError(f"strategy: {self._name} must return its {wrong[0]} as a dict, got {_kind(wrong[1])}")
        self.state, self.metrics = state, metrics
        with one_thread():
            return w + delta

    def round(self, round: int, w: Tensor, clients: Int64, backend: Trains) -> tuple[Tensor, Metrics]:
        """Train clients (K,), ascending, from w (D,), and return (the new weights (D,), the rule's metrics)."""
        self.begin(backend.layout, len(clients))
        w = self.apply(backend.train(round, clients, w, self.broadcast(), {}), w)
        return w, self.metrics
