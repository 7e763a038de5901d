r"""Stale updates made fresh: the server rebuilds what a late client trained on, and trains the newest model on it.

Huang et al., "Tackling Intertwined Data and Device Heterogeneities in Federated Learning with Unlimited Staleness"
(AAAI 2025; arXiv:2309.13536). For a client whose update Δ of an old version arrives, D_rec is sought by gradient
inversion (`inversion.py`), and in front of any rule
    Δ_k ← γ LocalRound(w; D_rec) + (1 − γ) Δ_k
A client's true update of w arrives later. Then, summed over clients,
    E1 = ‖estimate − true‖_1,   E2 = ‖stale update used instead − true‖_1
and once E1 > E2, γ falls from 1 to 0, linearly over a window: late in training stale updates are good enough.

The paper's text was not available, so what the authors' notes leave open is ours: the shape of γ and its window, and
the test of uniqueness (clients that resemble a fresh one are left as they are). The released code
(pittisl/FL-with-intertwined-heterogeneity) discards its estimates in two of three scripts and has the switch's test
the wrong way round; neither is offered. Clients are weighted by their own samples, not by those rebuilt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from fedsim.contracts import Cohort, Metrics, State
from fedsim.layout import Layout
from fedsim.rng import torch_generator
from fedsim.strategies.inversion import Found, Inversion, Late, Sought, largest, unique
from fedsim.strategies.preaggregation import PreAggregator
from fedsim.strategies.staleness import version

PRESETS: dict[str, dict[str, Any]] = {
    "paper": {"iterations": 25, "inversion_lr": 0.3, "sign": False, "labels": "softmax", "warm_start": True,
              "uniqueness": True},
    "reference": {"iterations": 40_000, "inversion_lr": 1.0, "sign": True, "labels": "bce", "warm_start": False,
                  "uniqueness": False},
}  # fmt: skip
LEAST_KEPT = 2000  # entries: a mask of fewer loses what an update says (measured on 2,410 parameters)


@dataclass(frozen=True, kw_only=True)
class Unstale(PreAggregator):
    """A rule on updates of which the stale ones were estimated anew by gradient inversion.

    Args:
        rule: the inner rule.
        size: samples rebuilt, as a share > 0 of the client's own.
        keep: share ρ in (0, 1] of an update's entries, the largest, that are matched; all where ρ·D < 2000.
        quantile: of the fresh updates' distances in [0, 1], beyond which a stale one is unique.
        switch: whether γ falls once E1 > margin · E2.
        margin: > 0.
        window: rounds ≥ 0 in which γ falls to 0; None: a tenth of the rounds that have passed.
        preset: "paper", or "reference" for the released code's search; sets what is None below.
        iterations: steps ≥ 0 of the search. 25, as warm starts go on from round to round; reference: 40,000.
        inversion_lr: its rate > 0. 0.3; reference: 1.
        sign: inputs step by the sign of their gradient. False; reference: True.
        labels: "softmax", or "bce" as the reference.
        warm_start: a search begins at the client's last result. True; reference: False.
        uniqueness: only updates that are unique are inverted. True; reference: False.

    Raises:
        ValueError: an argument out of its range.

    """

    size: float = 0.5
    keep: float = 1.0
    quantile: float = 0.9
    switch: bool = True
    margin: float = 1.0
    window: int | None = None
    preset: str = "paper"
    iterations: int | None = None
    inversion_lr: float | None = None
    sign: bool | None = None
    labels: str | None = None
    warm_start: bool | None = None
    uniqueness: bool | None = None

    mimic: ClassVar[Any] = None  # the clients' local round; `bind` gives an instance its own

    for_staleness: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(f"Unstale's preset is one of {', '.join(PRESETS)}, got {self.preset!r}")
        for name, value in PRESETS[self.preset].items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        for name, low in (("size", 0.0), ("margin", 0.0), ("keep", 0.0)):
            if not low < getattr(self, name) < math.inf:
                raise ValueError(f"Unstale needs {name} > 0, got {getattr(self, name)}")
        if not (self.keep <= 1 and 0 <= self.quantile <= 1):
            raise ValueError(f"Unstale needs keep and quantile in [0, 1], got {self.keep} and {self.quantile}")
        if self.window is not None and self.window < 0:
            raise ValueError(f"Unstale needs window >= 0 rounds or null, got {self.window}")
        self.inversion  # noqa: B018  checks its own

    @property
    def inversion(self) -> Inversion:
        """How samples are sought."""
        return Inversion(iterations=self.iterations, lr=self.inversion_lr, sign=self.sign, labels=self.labels)  # type: ignore[arg-type]

    @property
    def needs(self) -> tuple[str, ...]:
        """What a run must bind: the mimic, and what the inner rule asks for."""
        return ("mimic", *getattr(self.rule, "needs", ()))

    def bind(self, *, mimic: Any = None, **values: Any) -> Unstale:
        """Return the same around a bound rule, with the clients' local round."""
        inner: Any = self.rule
        bound = replace(self, rule=inner.bind(**values) if values else inner)
        object.__setattr__(bound, "mimic", mimic or self.mimic)
        return bound

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the inner rule's memory, no samples, no estimates, and no switch (0)."""
        return {"rule": self.rule.init(layout, num_clients), "samples": {}, "pending": {}, "switched": 0}

    def broadcast(self, state: State) -> dict[str, Any]:
        """Return what the inner rule sends."""
        inner = getattr(self.rule, "broadcast", None)
        return dict(inner(state["rule"])) if inner else {}

    def gamma(self, state: State, round: int) -> float:
        """Return γ of a round."""
        begun = state["switched"]
        if not begun:
            return 1.0
        window = self.window if self.window is not None else math.ceil(begun / 10)
        return max(0.0, 1 - (round - begun) / window) if window else 0.0

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return the inner rule's step (D,) on the mended updates."""
        state, metrics = self._learn(cohort, state)
        gamma = self.gamma(state, cohort.round)
        rows = torch.nonzero(cohort.staleness > 0).flatten()  # (S,)
        if len(rows) and gamma > 0:
            if self.uniqueness:
                fresh = cohort.rows[cohort.staleness == 0]
                rows = rows[unique(cohort.rows[rows], fresh, self.quantile)]
        else:
            rows = rows[:0]
        if len(rows):
            cohort, state, found = self._mend(cohort, state, rows, gamma)
            metrics["inversion_disparity"] = found.disparity.mean()
        elif gamma == 0:
            state = {**state, "samples": {}, "pending": {}}
        delta, inner, theirs = self.rule(cohort, state["rule"])
        metrics |= {"num_inverted": len(rows), "gamma": gamma}
        return delta, {**state, "rule": inner}, {**theirs, **metrics}

    def _learn(self, cohort: Cohort, state: State) -> tuple[State, Metrics]:
        """Compare estimates with the true updates that have come, and switch."""
        pending = dict(state["pending"])
        first = second = 0.0
        came = {}
        for row, (client, received) in enumerate(zip(cohort.clients.tolist(), cohort.received.tolist(), strict=True)):
            known = pending.pop(f"{client}/{received}", None)
            came[str(client)] = received
            if known is not None:
                first += float((known["estimate"] - cohort.rows[row]).abs().sum())
                second += float((known["stale"] - cohort.rows[row]).abs().sum())
        compared = len(pending) < len(state["pending"])
        pending = {name: known for name, known in pending.items() if not _passed(name, came)}
        state = {**state, "pending": pending}
        if not compared:
            return state, {}
        late = self.switch and not state["switched"] and first > self.margin * second
        return {**state, "switched": cohort.round if late else state["switched"]}, {"e1": first, "e2": second}

    def _mend(self, cohort: Cohort, state: State, rows: Tensor, gamma: float) -> tuple[Cohort, State, Found]:
        """Estimate the fresh updates of some rows."""
        if self.mimic is None:
            raise ValueError("Unstale needs the clients' local round: call bind(mimic=…) first, as a run does")
        found, estimates = self._estimate(cohort, state, rows)
        updates, now = cohort.rows.clone(), cohort.round - 1
        samples, pending = dict(state["samples"]), dict(state["pending"])
        for i, row in enumerate(rows.tolist()):
            client, count = int(cohort.clients[row]), self._count(cohort, row)
            samples[str(client)] = {"x": found.x[i, :count].clone(), "z": found.z[i, :count].clone()}
            pending[f"{client}/{now}"] = {"estimate": estimates[i].clone(), "stale": cohort.rows[row].clone()}
        updates[rows] = gamma * estimates + (1 - gamma) * cohort.rows[rows]
        staleness, received = cohort.staleness.clone(), cohort.received.clone()
        staleness[rows], received[rows] = 0, now
        mended = replace(cohort, updates=updates, staleness=staleness, received=received)
        return mended, {**state, "samples": samples, "pending": pending}, found

    def _count(self, cohort: Cohort, row: int) -> int:
        return max(1, round(self.size * float(cohort.weights[row])))

    def _estimate(self, cohort: Cohort, state: State, rows: Tensor) -> tuple[Found, Tensor]:
        """Return samples that explain some rows, and the updates (S, D) of the newest model on them."""
        counts = [self._count(cohort, row) for row in rows.tolist()]
        starts = [self._begin(cohort, state, row, count) for row, count in zip(rows.tolist(), counts, strict=True)]
        most, updates = max(counts), cohort.rows[rows]  # B, (S, D)
        x, z = (torch.stack([_padded(start[i], most) for start in starts]) for i in (0, 1))
        weights = torch.stack([_padded(torch.full((b,), 1 / b, dtype=x.dtype), most) for b in counts])  # (S, B)
        kept = math.ceil(self.keep * updates.shape[1])
        mask = largest(updates, kept) if kept >= LEAST_KEPT else torch.ones_like(updates, dtype=torch.bool)
        now, steps = cohort.round, cohort.num_steps[rows]
        then = tuple(int(cohort.received[row]) + 1 for row in rows)
        late = Late(
            Sought(
                torch.stack([version(cohort, int(cohort.received[row]), updates) for row in rows]),
                updates, mask, weights.to(updates), self.mimic.rates(steps, then, updates),
            ),
            x.to(updates), z.to(updates), version(cohort, now - 1, updates).expand_as(updates),
            self.mimic.rates(steps, now, updates),
        )  # fmt: skip
        inversion = self.inversion
        solved: tuple[Found, Tensor] = self.mimic.together(now, inversion, inversion.estimates, late)
        return solved

    def _begin(self, cohort: Cohort, state: State, row: int, count: int) -> tuple[Tensor, Tensor]:
        """Return where the search of a row begins: x (b, …) and z (b, C) of its client's last one, or noise."""
        client = int(cohort.clients[row])
        last = state["samples"].get(str(client)) if self.warm_start else None
        if last is not None and len(last["x"]) == count:
            return last["x"].cpu(), last["z"].cpu()
        rng = torch_generator(cohort.seed, "unstale", client, 0 if self.warm_start else cohort.round)
        low, high = self.mimic.bounds
        x = (low + high) / 2 + (high - low) / 4 * torch.randn(count, *self.mimic.input_shape, generator=rng)
        return x.clamp(low, high), torch.randn(count, self.mimic.num_classes, generator=rng)


def _passed(name: str, came: Mapping[str, int]) -> bool:
    """Return whether the update "client/version" can't come any more: that client's of a newer version has."""
    client, _, number = name.partition("/")
    return int(number) < came.get(client, 0)


def _padded(values: Tensor, length: int) -> Tensor:
    """Return values (b, …) with zeros up to (length, …)."""
    return torch.cat([values, values.new_zeros(length - len(values), *values.shape[1:])])
