"""A run's server where Flower takes part: its strategies over fedsim's clients, or any strategy over its apps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fedsim.contracts import Metrics, State
from fedsim.flower.grid import SimulationGrid
from fedsim.flower.replies import OnClientError
from fedsim.flower.state import capture, initial_parts, restore
from fedsim.flower.strategy import RuleStrategy, aggregate
from fedsim.local import Int64


class FlowerServer:
    """Drives a strategy over the grid.

    Args:
        strategy: a Flower strategy, `RuleStrategy` among them.
        backend: what trains; `fedsim.flower.grid.Backend` or `MessageBackend`.
        seed: the run's.
        on_client_error: "raise" or "drop".

    """

    def __init__(self, strategy: Any, backend: Any, *, seed: int, on_client_error: OnClientError) -> None:
        self.strategy = strategy
        self.grid = SimulationGrid(backend, seed=seed, on_client_error=on_client_error)
        self._new = {} if isinstance(strategy, RuleStrategy) else initial_parts(strategy)

    def round(self, round: int, w: Tensor, clients: Int64) -> tuple[Tensor, Metrics]:
        """Train clients (K,), ascending, from w (D,), and return (the new weights (D,), the strategy's metrics)."""
        self.grid.cohort = clients
        return aggregate(self.strategy, round, w, self.grid)

    def capture(self) -> State:
        """Return what a strategy of Flower's remembers."""
        return capture(self.strategy, self._new)

    def restore(self, state: State) -> None:
        """Take back what `capture` returned."""
        restore(self.strategy, state)
