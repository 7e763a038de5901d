r"""Yoked steps: FedAvg's direction with the step lengths of a recorded run.

A control for rules that change both where a step goes and how long it is (FedLD's step is a mean, shrunk by the
spectrum): what is left of their gain when only the lengths are taken over? With r_t and m_t the recorded norms of
round t's step and of its clients' mean update:
    absolute   w ← w + r_t \bar Δ / ‖\bar Δ‖
    relative   w ← w + (r_t / m_t) \bar Δ,   \bar Δ = \sum_k (n_k / n) Δ_k
"Yoked" as in experiments on behaviour: the control gets what the other got, whatever it does itself.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from fedsim.contracts import LinearRule, Metrics, State, Sums

LENGTHS = ("absolute", "relative")


@dataclass(frozen=True, kw_only=True)
class Yoked(LinearRule):
    """FedAvg's direction at another run's step lengths, round by round.

    Args:
        run: folder of the recorded run; of its `rounds.jsonl` the columns `step_norm` and `mean_norm` are read, which
            `metrics.drift` records.
        length: "absolute" or "relative".

    Raises:
        ValueError: no such record, or an argument out of its range.

    """

    run: str
    length: str = "absolute"
    recorded: dict[int, tuple[float, float]] = field(init=False, repr=False)  # round → (‖step‖, ‖mean‖)

    def __post_init__(self) -> None:
        if self.length not in LENGTHS:
            raise ValueError(f"Yoked's length is one of {', '.join(LENGTHS)}, got {self.length!r}")
        object.__setattr__(self, "recorded", _read(Path(self.run)))

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the mean (D,) at the recorded length; its factor is a metric.

        Raises:
            ValueError: the recorded run has no such round.

        """
        round = sums.cohort.round
        if round not in self.recorded:
            raise ValueError(f"Yoked has no round {round}: {self.run} records {len(self.recorded)}; lower num_rounds")
        step, other = self.recorded[round]
        norm = torch.linalg.vector_norm(mean.double())  # ()
        divisor = norm if self.length == "absolute" else norm.new_tensor(other)
        rate = torch.where(divisor > 0, step / divisor, 0.0)  # ()
        return mean * rate.to(mean.dtype), state, {"server_rate": rate}


def _read(folder: Path) -> dict[int, tuple[float, float]]:
    """Return (‖step‖, ‖mean‖) of each round that a run folder records."""
    path = folder / "rounds.jsonl"
    if not path.is_file():
        raise ValueError(f"Yoked needs run to be the folder of a finished run, got {folder}: no {path}")
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not rows or any(row.get("step_norm") is None or row.get("mean_norm") is None for row in rows):
        raise ValueError(f"Yoked finds no step_norm and mean_norm in {path}; record that run with metrics.drift=true")
    return {int(row["round"]): (float(row["step_norm"]), float(row["mean_norm"])) for row in rows}
