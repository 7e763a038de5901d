"""Local: every client trains alone. The bound that a federation must beat to be worth joining.

Nothing is shared, so the updates have no columns; each client's model is its own state.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.linalg import beside


@dataclass(frozen=True)
class Local:
    """Average nothing.

    Attributes:
        local_parameters: pattern of the parameters that stay with their client where the run's `model.local`
            says nothing: all of them.

    """

    local_parameters: ClassVar[str] = ".*"

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return no memory."""
        return {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the step 0 (D,): what is shared against the rule's advice stays as it began."""
        return beside(cohort.rows).new_zeros(cohort.layout.size), state, {}
