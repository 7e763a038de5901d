"""Centralized: one model trained on all clients' data in one place. The bound that a federation approaches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from fedsim.contracts import LinearRule


@dataclass(frozen=True)
class Centralized(LinearRule):
    """Take the pooled client's update as it is.

    Attributes:
        pooled: training sees one client that holds every participating client's training samples, in each
            round; evaluation sees the clients as they are.

    """

    pooled: ClassVar[bool] = True
