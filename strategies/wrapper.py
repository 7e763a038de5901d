"""What rules that change another rule's step share: streaming where that one streams, its memory, its wishes."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from fedsim.contracts import Cohort, LinearRule, Metrics, Rule, State, Sums
from fedsim.layout import Layout
from fedsim.strategies.fedavg import FedAvg


@dataclass(frozen=True, kw_only=True)
class Wrapper(LinearRule):
    """A rule around another one, which gives `memory`, `turn` and, if it sends anything along, `sends`.

    It is linear, so that engines may sum rows as they come, exactly where the inner rule is. What it does not
    define itself (`check`, `local_parameters`, …) is the inner rule's.

    Args:
        rule: the inner rule; FedAvg.

    """

    rule: Rule = field(default_factory=FedAvg)

    def __post_init__(self) -> None:
        linear = isinstance(self.rule, LinearRule)
        object.__setattr__(self, "needs_rows", not linear or bool(getattr(self.rule, "needs_rows", False)))
        object.__setattr__(self, "reduced_extras", getattr(self.rule, "reduced_extras", ()))

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name == "rule":  # asked for before there is a rule, e.g. by copy
            raise AttributeError(name)
        return getattr(self.rule, name)

    def bind(self, **values: Any) -> Wrapper:
        """Return the same rule around a bound one."""
        inner: Any = self.rule
        return replace(self, rule=inner.bind(**values))

    def memory(self, layout: Layout) -> State:
        """Return what this rule remembers before round 1, beside the inner rule's state."""
        return {}

    def sends(self, state: State) -> dict[str, Any]:
        """Return what goes with the model beside what the inner rule sends."""
        return {}

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return (step (D,), new memory, metrics) from the inner rule's step (D,)."""
        raise NotImplementedError

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the inner rule's state under "rule", and this one's memory."""
        return {"rule": self.rule.init(layout, num_clients), **self.memory(layout)}

    def broadcast(self, state: State) -> dict[str, Any]:
        """Return what the inner rule sends, and this one."""
        inner = getattr(self.rule, "broadcast", None)
        return {**(inner(state["rule"]) if inner else {}), **self.sends(state)}

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return the inner rule's coefficients (K,)."""
        inner: Any = self.rule
        coefficients: Tensor = inner.coefficients(cohort, state["rule"])  # (K,)
        return coefficients

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Turn what the inner rule makes of the mean (D,)."""
        inner: Any = self.rule
        return self._turned(inner.finish(mean, sums, state["rule"]), sums.cohort, state)

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Turn the inner rule's step (D,)."""
        return self._turned(self.rule(cohort, state["rule"]), cohort, state)

    def _turned(
        self, inner: tuple[Tensor, State, Metrics], cohort: Cohort, state: State
    ) -> tuple[Tensor, State, Metrics]:
        delta, kept, metrics = inner
        delta, memory, own = self.turn(delta, cohort, state)
        return delta, {"rule": kept, **memory}, {**metrics, **own}
