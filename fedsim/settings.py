"""The scalars that all parts of a run share, typed and checked; their defaults stand in configs/config.yaml."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class EarlyStopping:
    """When to stop for want of progress; reads the validation split, never the test split."""

    metric: Literal["loss", "accuracy"]
    patience: int | None  # evaluations without an improvement, ≥ 1; None: never stops
    min_delta: float  # smallest change that is an improvement, ≥ 0

    def __post_init__(self) -> None:
        _check(self.patience is None or self.patience >= 1, "patience", ">= 1, or null for never", self.patience)
        _check(0 <= self.min_delta < math.inf, "min_delta", ">= 0 and finite", self.min_delta)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """How often the state is stored, and how many of the newest are kept."""

    every: int | None  # rounds, ≥ 1; None: so often that it costs a twentieth of the rounds at most
    keep: int  # ≥ 1

    def __post_init__(self) -> None:
        _check(self.every is None or self.every >= 1, "every", ">= 1, or null for the budget", self.every)
        _check(self.keep >= 1, "keep", ">= 1", self.keep)


@dataclass(frozen=True, kw_only=True)
class Run:
    """The shared scalars of a run.

    Raises:
        ValueError: a value out of its range; the message names the setting, the range and the value.

    """

    num_rounds: int  # ≥ 1
    fraction: float  # share of the clients in a round's cohort, in (0, 1]
    seed: int  # in [0, 2^63)
    dtype: Literal["float32", "float64"]
    precision: Literal["fp32", "tf32", "bf16"]  # of the forward's products where dtype is float32
    device: str  # auto, cpu, cuda, cuda:N, mps
    threads: int | None  # CPU threads, ≥ 1; None: one per core
    buffers: Literal["average", "server", "client"]
    on_bad_update: Literal["drop", "raise"]
    on_client_error: Literal["raise", "drop"]
    device_memory: int | None  # bytes of the device that updates may count on, ≥ 1; None: all of an accelerator's
    client_state_bytes: int  # of all clients' state up to which it is held in memory, ≥ 0
    replicas: int  # ≥ 1 runs side by side, with the seeds seed, seed + 1, …
    resume: str | None  # run folder to go on with
    target_accuracy: float | None  # on validation, in (0, 1]
    early_stopping: EarlyStopping
    checkpoint: Checkpoint

    def __post_init__(self) -> None:
        _check(self.num_rounds >= 1, "num_rounds", ">= 1", self.num_rounds)
        _check(0 < self.fraction <= 1, "fraction", "in (0, 1], the share of clients a round", self.fraction)
        _check(0 <= self.seed < 2**63, "seed", ">= 0 and below 2^63", self.seed)
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?|mps", self.device)
        _check(known is not None, "device", "auto, cpu, cuda, cuda:N or mps", self.device)
        _check(self.threads is None or self.threads >= 1, "threads", ">= 1, or null for all cores", self.threads)
        _check(self.replicas >= 1, "replicas", ">= 1, runs with the seeds seed, seed + 1, …", self.replicas)
        memory, state = self.device_memory, self.client_state_bytes
        _check(memory is None or memory >= 1, "device_memory", ">= 1 byte, or null for all that it has", memory)
        _check(state >= 0, "client_state_bytes", ">= 0, beyond which clients' state is kept in a file", state)
        target = self.target_accuracy
        _check(target is None or 0 < target <= 1, "target_accuracy", "in (0, 1], or null for none", target)


def _check(holds: bool, name: str, rule: str, value: object) -> None:
    if not holds:
        raise ValueError(f"{name} must be {rule}, got {value!r}")
