r"""FedLEx, the server: one round of exploration, then any rule over clients whose gradients are guided by it.

Internò et al., IJCNN 2024. https://arxiv.org/abs/2506.18640 (the client is `clients/fedlex.py`). With θ_k the model of
scout k ∈ X after its local round from θ₀,
    S = (1/|X|) \sum_{k ∈ X} (θ_k − θ₀)²,   G = (S − min S) / (max S − min S)   tensor by tensor; 1 where S is constant
The paper's text was not at hand: the formula is the released code's (ChristianInterno/FedLEx, `GTL_utils.create_mask`).

Departs from the code: all scouts begin at θ₀, on copies of it (there each begins where the one before ended, and the
first rounds' model has been trained by them); G is made once; the scouts are the first round's cohort, and explore for
one local round. That round moves nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State, Sums
from fedsim.layout import Layout
from fedsim.linalg import mean_of
from fedsim.strategies.wrapper import Wrapper

SCALES = ("minmax", "robust")
GUIDES = ("explored", "permuted", "mean")
LARGEST = 5.0  # bound on G where its mean is made one


@dataclass(frozen=True, kw_only=True)
class FedLEx(Wrapper):
    """Any rule, after a round in which clients explore; needs the upload `deviation` of `client=fedlex`.

    Args:
        rule: the inner rule, any; it begins in the second round.
        scale: "minmax", or "robust": (S − median) / (Q₃ − Q₁), of which what is below 0 is 0.
        floor: f in [0, 1): G ← f + (1 − f) G. 0 freezes at least one entry of each tensor for good.
        even: True: G over its mean, tensor by tensor, and at most 5, so that rates stay what they were.
        guide: "explored", or a control: "permuted" entries within each tensor, or the tensor's "mean" alone.
        warm_start: True: the first round's mean update is a step, as in the code; what it gains is no guidance's.

    Raises:
        ValueError: an argument out of its range; adaptive clients, whose steps undo a factor on the gradient.

    """

    scale: str = "minmax"
    floor: float = 0.0
    even: bool = False
    guide: str = "explored"
    warm_start: bool = False

    half_of = "strategy=fedlex client=fedlex"

    def __post_init__(self) -> None:
        super().__post_init__()
        for argument, known in (("scale", SCALES), ("guide", GUIDES)):
            if getattr(self, argument) not in known:
                raise ValueError(f"FedLEx's {argument} is one of {', '.join(known)}, got {getattr(self, argument)!r}")
        if not 0 <= self.floor < 1:
            raise ValueError(f"FedLEx needs floor in [0, 1), got {self.floor}")
        object.__setattr__(self, "reduced_extras", ("deviation", *self.reduced_extras))

    @property
    def needs(self) -> tuple[str, ...]:
        """What clients do locally, and what the inner rule wants to know."""
        return tuple(dict.fromkeys(("local_training", *getattr(self.rule, "needs", ()))))

    def bind(self, *, local_training: Any = None, **values: Any) -> FedLEx:
        """Return the same rule around a bound one; a run binds what it knows in several calls."""
        if local_training is not None and local_training.optimizer != "sgd":
            raise ValueError(
                f"FedLEx scales gradients, which client.optimizer={local_training.optimizer} undoes; sgd does not"
            )
        if local_training is not None and "local_training" in getattr(self.rule, "needs", ()):
            values["local_training"] = local_training
        inner: Any = self.rule
        return replace(self, rule=inner.bind(**values)) if values else self

    def memory(self, layout: Layout) -> State:
        """Return G = 1 (D,), and that nobody has explored."""
        return {"guidance": torch.ones(layout.size), "explored": 0}

    def sends(self, state: State) -> dict[str, Any]:
        """Return G (D,) once it is known."""
        return {"guidance": state["guidance"]} if state["explored"] else {}

    def turn(self, delta: Tensor, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,)."""
        return delta, {"guidance": state["guidance"], "explored": 1}, {}

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Explore, or let the inner rule go on."""
        if state["explored"]:
            return super().finish(mean, sums, state)
        return self._explore(mean, sums.extras, sums.cohort, state)

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Explore, or let the inner rule go on."""
        if state["explored"]:
            return super().__call__(cohort, state)
        if cohort.streamed is not None:
            return self.finish(*cohort.streamed, state)
        extras = {name: value.mean(0) for name, value in cohort.extras.items() if name == "deviation"}
        return self._explore(mean_of(cohort.weights, cohort.rows), extras, cohort, state)

    def _explore(self, mean: Tensor, extras: Any, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        if "deviation" not in extras:
            raise ValueError("FedLEx needs the clients' deviations; choose client=fedlex")
        parts = cohort.layout.split(extras["deviation"].to(mean))
        rng = cohort.rng("fedlex guidance") if self.guide == "permuted" else None
        guidance = torch.cat([self._guidance(part.flatten(), rng) for part in parts.values()])  # (D,)
        step = mean if self.warm_start else torch.zeros_like(mean)
        memory = {"guidance": guidance, "explored": 1}
        return step, {"rule": state["rule"], **memory}, {"guidance_mean": guidance.mean()}

    def _guidance(self, deviation: Tensor, rng: np.random.Generator | None) -> Tensor:
        """Return G (d,) of one tensor's S (d,), its entries permuted if there is a generator."""
        # Drawn for constant tensors too: no tensor's order hangs on another one's values.
        order = None if rng is None else torch.from_numpy(rng.permutation(deviation.numel()))
        low, high = deviation.min(), deviation.max()  # ()
        if self.scale == "robust":
            first, low, third = _quartiles(deviation)
            high = low + third - first
        if not bool(high > low):
            return torch.ones_like(deviation)
        guidance = ((deviation - low) / (high - low)).clamp_min(0)  # (d,)
        guidance = self.floor + (1 - self.floor) * guidance
        if self.even:
            guidance = (guidance / guidance.mean()).clamp_max(LARGEST)
        if self.guide == "mean":
            return guidance.mean().expand_as(guidance)
        return guidance if order is None else guidance[order.to(guidance.device)]


def _quartiles(values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the quartiles () of values (d,), linear between two of them; torch's own refuse d > 2²⁴."""
    ordered, last = values.sort().values, values.numel() - 1

    def at(quarters: int) -> Tensor:
        low, rest = divmod(quarters * last, 4)
        return torch.lerp(ordered[low], ordered[min(low + 1, last)], rest / 4)

    return at(1), at(2), at(3)
