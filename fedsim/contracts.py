"""What a method is made of: a cohort, a server rule on it, and, if it needs one, a client objective.

A method is written once, as pure functions of arrays, and every engine and a real Flower deployment execute
that definition. Nothing here has a base class to inherit from but `LinearRule`, which derives `__call__`.

Axis names, everywhere: K clients of a cohort, D shared parameters, B samples of a batch, C classes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from torch import Tensor

from fedsim.layout import Layout, Params
from fedsim.linalg import combine, square_norms
from fedsim.mapped import Mapped, Rows, taken
from fedsim.rng import generator

State = dict[str, Any]
"""Nested dicts with string keys of tensors, numbers and strings: what a checkpoint stores is the whole truth."""

Metrics = dict[str, Any]
"""Name → a number or 0-d tensor (one column of rounds.jsonl), or a (K,) tensor (one column of clients.parquet)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Cohort:
    """The updates that one aggregation sees, one row a client, rows in ascending order of client.

    Rules must not write into any of it.
    """

    updates: Rows | None  # (K, D) Δ_k = w_k − w_received, or a map of such; None when the engine streamed them
    weights: Tensor  # (K,) n_k ≥ 0, un-normalised; samples unless the objective's `finish` says otherwise
    clients: Tensor  # (K,) int64 ids, ascending
    num_steps: Tensor  # (K,) int64 local steps done
    staleness: Tensor  # (K,) int64 rounds between the version received and this round
    received: Tensor  # (K,) int64 ids of the versions received
    models: Mapping[int, Tensor] = field(default_factory=dict)  # version → (D,)
    round: int = 1
    layout: Layout
    seed: int = 0
    extras: Mapping[str, Tensor] = field(default_factory=dict)  # name → (K, …), the objective's second uploads
    streamed: Streamed | None = None  # what is left of rows that were summed as they came

    def __len__(self) -> int:
        return len(self.clients)

    def rng(self, purpose: str) -> np.random.Generator:
        """Return the generator of (seed, purpose, round)."""
        return generator(self.seed, purpose, self.round)

    @property
    def rows(self) -> Tensor:
        """(K, D) updates; those that a rule around this one maps are written out.

        Raises:
            ValueError: the engine streamed this cohort, so its rows were never held.

        """
        rows = self.matrix
        return rows.written if isinstance(rows, Mapped) else rows

    @property
    def matrix(self) -> Rows:
        """(K, D) updates as `fedsim.linalg` and `fedsim.order` take them: not written out where they are mapped.

        Raises:
            ValueError: the engine streamed this cohort, so its rows were never held.

        """
        if self.updates is None:
            raise ValueError("this cohort was streamed: its rows were summed as they came and are not held")
        return self.updates

    def take(self, rows: Tensor) -> Cohort:
        """Return the cohort of some rows: an int64 index tensor or a bool mask (K,)."""
        return replace(
            self,
            updates=None if self.updates is None else taken(self.updates, rows),
            extras={name: value[rows] for name, value in self.extras.items()},
            **{
                name: getattr(self, name)[rows] for name in ("weights", "clients", "num_steps", "staleness", "received")
            },
        )


@runtime_checkable
class Rule(Protocol):
    """A server rule: cohort and state in, step and state out. `w ← w + delta` is done by the caller.

    Optional members, found by name:
        check(num_participants: int) -> None     raise ValueError before training if the cohort is too small
        broadcast(state) -> {name: Tensor|float} sent with the model, versioned with it; `context.broadcast`.
                                                 "lr_scale" is a factor on the clients' rate, "proximal_mu" their mu
        sent(model, broadcast, staleness) -> (D,)        what a client begins at that was sent a version (D,) and
                                                 answers so many rounds ≥ 1 late; the version itself unless given
        needs: tuple[str, …]                     names of values given to `bind` at build time: "local_training"
        bind(**values) -> Rule                   the same rule, knowing them
        uploads: tuple[str, …]                   second uploads that it reads, a number > 0 of each client
        for_staleness: bool                      True: made for late updates; noted where the mode has none
        needs_rows: bool                         True: a linear rule that wants the matrix all the same
        local_parameters: str | (model) -> [str] patterns of the parameters that stay with their client, unless the
                                                 run's `model.local` says otherwise
        local_buffers: bool                      True: so do buffers, whatever the run's `buffers` says
        adapt_model(model) -> model              what clients train instead of the run's model
        half_of: str                             the choices of a method that is no method without its other half, as
                                                 "strategy=scaffold client=scaffold"; the other half has the same
    """

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the state before round 1; `num_clients` counts all clients that can be sampled."""
        ...

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Return (delta (D,), new state, metrics)."""
        ...


@dataclass(frozen=True, eq=False)
class Sums:
    """What is left of the rows of a streamed cohort, beside their mean."""

    cohort: Cohort  # without updates; only rows that arrived and were finite
    coefficients: Tensor  # (K,) c_k, un-normalised
    norms: Tensor | Callable[[], Tensor]  # what `square_norms` returns, or how: another read of a matrix
    extras: Mapping[str, Tensor]  # name → mean over rows, for the names in `reduced_extras`

    @cached_property
    def square_norms(self) -> Tensor:
        """(K,) ‖Δ_k‖²."""
        return self.norms if isinstance(self.norms, Tensor) else self.norms()


class Streamed(NamedTuple):
    """A cohort whose rows were summed as they came."""

    mean: Tensor  # (D,) Σ c_k Δ_k / Σ c_k
    sums: Sums


class LinearRule:
    """A rule whose direction is a weighted mean of updates: engines sum rows as they come and hold no matrix.

    The rule gives `coefficients` and `finish`; its `__call__` on a matrix follows from the two. Coefficient k
    may depend on row k and on the state alone, never on another row.
    """

    reduced_extras: tuple[str, ...] = ()  # second uploads of which only the plain mean over rows is wanted

    def init(self, layout: Layout, num_clients: int) -> State:
        """Return the state before round 1: none, unless a rule says otherwise."""
        return {}

    def coefficients(self, cohort: Cohort, state: State) -> Tensor:
        """Return c_k ≥ 0 (K,), un-normalised, from a cohort without updates; n_k unless a rule says otherwise."""
        return cohort.weights

    def finish(self, mean: Tensor, sums: Sums, state: State) -> tuple[Tensor, State, Metrics]:
        """Turn Σ c_k Δ_k / Σ c_k (D,) into (delta (D,), new state, metrics)."""
        return mean, state, {}

    def __call__(self, cohort: Cohort, state: State) -> tuple[Tensor, State, Metrics]:
        """Apply the rule to a cohort, whether it holds its rows or was streamed."""
        if cohort.streamed is not None:
            return self.finish(*cohort.streamed, state)
        streamed = summed(cohort, self, state).streamed
        assert streamed is not None
        return self.finish(*streamed, state)


def summed(cohort: Cohort, rule: LinearRule, state: State, factors: Tensor | None = None) -> Cohort:
    """Return a cohort that holds its rows as a linear rule is given one that was streamed.

    Args:
        cohort: with its rows.
        rule: whose coefficients c_k the rows are summed with.
        state: the rule's.
        factors: (K,) f_k that make Δ_k f_k Δ_k; None: 1.

    """
    updates = cohort.matrix
    c = rule.coefficients(cohort, state).to(updates.dtype)  # (K,)
    f = None if factors is None else factors.to(c)  # (K,)
    mean = combine(c if f is None else c * f, updates) / c.sum()  # (D,)
    reduced = {name: cohort.extras[name].mean(0) for name in rule.reduced_extras if name in cohort.extras}
    kept = {name: value for name, value in cohort.extras.items() if name not in rule.reduced_extras}
    light = replace(cohort, updates=None, extras=kept)

    def norms() -> Tensor:
        squares = square_norms(updates)  # (K,)
        return squares if f is None else squares * f.to(squares).square()

    return replace(light, streamed=Streamed(mean, Sums(light, c, norms, reduced)))


def row_square_norms(updates: Tensor) -> Tensor:
    """Return ‖Δ_k‖² (K,) of a (K, D) matrix."""
    return square_norms(updates)


class Batch(NamedTuple):
    """Samples of one step."""

    x: Tensor  # (B, …)
    y: Tensor  # (B,) int64


class Model(Protocol):
    """An `nn.Module` as a pure function of named parameters."""

    def __call__(self, params: Params, x: Tensor) -> Tensor:
        """Return logits (B, C)."""
        ...

    def features(self, params: Params, x: Tensor) -> Tensor:
        """Return what the module's `head` is applied to, (B, F). Needs an attribute `head`."""
        ...

    def head(self, params: Params, h: Tensor) -> Tensor:
        """Return logits (B, C) from features."""
        ...

    def still(self) -> AbstractContextManager[None]:
        """Have layers with running statistics take these and leave them as they are, as in evaluation."""
        ...


@dataclass(frozen=True, kw_only=True, eq=False)
class Context:
    """What an objective may know beside its batch. All tensors are of one client."""

    received: Params  # the model as it came, shared parameters only
    broadcast: Mapping[str, Any]  # what the rule sent with it
    client_state: Mapping[str, Tensor]  # this client's own, from `init_client` or the last `finish`
    step_state: Mapping[str, Tensor]  # from `direction`, {} at step 0 of a phase
    step: int  # local step of this phase, from 0
    num_steps: Any  # local steps of this phase: int, or int64 0-d tensor in a batched program
    lr: float  # this round's local rate
    num_samples: Any  # samples the client trains on
    key: Tensor  # 0-d int64: randomness of (seed, round, client, step)
    layout: Layout  # of the shared parameters
    phase: int = 0


@dataclass(frozen=True, kw_only=True)
class Phase:
    """One part of a client's round: its length, the parameters it moves, and the data it sees."""

    local_epochs: int | None = None  # None: as the client's `LocalTraining` says
    local_steps: int | None = None
    params: str | None = None  # regular expression of the names that move; None: all
    view: str | None = None  # a named subset of the client's samples, e.g. "labelled"; None: all


class Objective(Protocol):
    """What a client minimises. Pure and batchable: no `.item()`, no Python branch on a tensor's value.

    Give one of:
        criterion(logits (…, B, C), targets (…, B), weights (…, B)) -> (…)
            a loss on outputs alone. It reduces its batch axis and no other: leading axes are clients, so that a
            whole cohort runs as one batched program. `weights` are 1/b for the b samples of a batch and 0 for
            padding; a mean over the batch is (weights * value).sum(-1).
        loss(model, params, batch, context) -> (scalar, aux)
            anything else; called for one client and exactly its samples.

    Optional members, found by name:
        mean_criterion(logits (B, C), targets (B,)) -> scalar     the criterion for one client and equal weights,
                                                  where that is cheaper; taken wherever clients train one by one
        proximal_mu: float                        adds (mu/2)‖w − w_received‖² to the loss
        init_client(layout) -> {name: Tensor}     a client's state before its first round, of fixed shapes
        direction(grads, params, context) -> (direction, step_state)       replaces the gradient in the local step;
                                                  step_state["lr_scale"] (0-d), if there, is a factor on its rate
        finish(params, context) -> (client_state, extras, weight | None)   after the last step; None: n_k
        phases() -> tuple[Phase, …]               parts of the local round; `context.phase` counts them
        untrained(shared params) -> {name: Tensor}        personal parameters that a client is tested with which never
                                                  trained, from the server's model; the initial model's unless given
        adapt_direction(grads, params, context) -> …      as `direction`, in the local steps before an evaluation
                                                  (`metrics.finetune_steps`); the gradient itself unless given
        half_of: str                              as a rule's
    """


class Dataset(NamedTuple):
    """A data set in memory. Splits are positions, so that every sample is stored once."""

    x: Tensor  # (N, …) float32, or int64 tokens
    y: Tensor  # (N,) int64 classes
    splits: Mapping[str, np.ndarray[Any, np.dtype[np.int64]]]  # "train", "test" and, after `split`, "validation"
    num_classes: int
    client: np.ndarray[Any, np.dtype[np.int64]] | None = None  # (N,) natural client of each sample, −1 for none
    domain: np.ndarray[Any, np.dtype[np.int64]] | None = None  # (N,) domain of each sample
    class_names: Sequence[str] | None = None
    client_names: Sequence[str] | None = None
    augment: Any = None  # Augment: callable on (x (B, …), key (B,) int64), keyed and on the device


class Partition(NamedTuple):
    """Which training sample belongs to which client, in CSR form: two arrays even for a million clients."""

    indices: np.ndarray[Any, np.dtype[np.int64]]  # (N,) positions into the data set
    offsets: np.ndarray[Any, np.dtype[np.int64]]  # (K+1,)

    @property
    def num_clients(self) -> int:
        """K, empty clients included."""
        return len(self.offsets) - 1

    @property
    def sizes(self) -> np.ndarray[Any, np.dtype[np.int64]]:
        """(K,) number of samples of each client."""
        return np.diff(self.offsets)

    def of(self, client: int) -> np.ndarray[Any, np.dtype[np.int64]]:
        """Return the positions that belong to one client, a view."""
        return self.indices[self.offsets[client] : self.offsets[client + 1]]


class Partitioner(Protocol):
    """Draws a partition of labelled samples.

    Optional members, found by name:
        natural_from: "client" | "domain"        which column of the data set `natural` is; "client" if absent
        corrupt(dataset, partition, rng) -> Dataset      changes features or labels by client after the draw
        corrupts: tuple[str, …]                  whose samples `corrupt` is given: of "train", "validation", "test"
    """

    @property
    def num_clients(self) -> int | None:
        """K; None: the data's natural clients say."""
        ...

    def __call__(
        self,
        labels: np.ndarray[Any, np.dtype[np.int64]],
        rng: np.random.Generator,
        natural: np.ndarray[Any, np.dtype[np.int64]] | None = None,
    ) -> Partition:
        """Return a partition of range(N).

        Args:
            labels: (N,) classes of the training samples.
            rng: keyed by (partition.seed, "partition").
            natural: (N,) natural client or domain of each sample, where the data has one.

        """
        ...
