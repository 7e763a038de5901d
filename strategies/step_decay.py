r"""Step decay: any rule's step times a factor that falls round by round; the control of adaptive server rates.

The baseline "Decay" of FedHyper (Wang et al., ICLR 2024, fig. 3; its code: γ = 0.995 each round).
    w ← w + γ^{⌊(t − 1) / s⌋} Δᵗ,   t = 1, 2, …
The clients' own rate decays by `client.lr_decay`.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.strategies.wrapper import Wrapper


@dataclass(frozen=True, kw_only=True)
class StepDecay(Wrapper):
    """A rule whose steps shrink on a schedule.

    Args:
        rule: the inner rule, any.
        decay: γ in (0, 1]; 1 is the inner rule.
        every: s ≥ 1, rounds between two decays.

    Raises:
        ValueError: an argument out of its range.

    >>> from fedsim.testing import apply_rule
    >>> apply_rule(StepDecay(decay=0.5), [[8.0]], round=2)  # the third round
    array([2.])

    """

    decay: float = 0.995
    every: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.decay <= 1:
            raise ValueError(f"StepDecay needs 0 < decay <= 1, got {self.decay}; 1 is the inner rule")
        if self.every < 1:
            raise ValueError(f"StepDecay needs every >= 1, got {self.every}")

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner step (D,) times this round's rate, which is a metric."""
        rate = self.decay ** ((cohort.round - 1) // self.every)
        return delta * rate, {}, {"server_rate": rate}
