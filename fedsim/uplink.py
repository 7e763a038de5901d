"""Updates on their way from the engine to the rule: compressed, then attacked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fedsim.attacks.adversary import Adversary
from fedsim.compress.contract import Compressor, Senders
from fedsim.contracts import Cohort, State
from fedsim.engine.store import ClientStore
from fedsim.layout import Layout
from fedsim.rng import keyed_bits


class Uplink:
    """What becomes of a cohort's rows before the rule sees them.

    Honest clients compress what they trained; attackers see the decoded rows and send what they please, as much as
    an honest client does. Whether the rows are finite is checked after.

    Args:
        layout: of the updates.
        num_clients: ids are below it.
        num_participants: clients that can be sampled.
        dtype: of what clients keep.
        compressor: of every client's update; None sends them whole.
        adversary: who attacks; None: nobody.

    Raises:
        ValueError: the compressor does not fit the updates.

    """

    def __init__(
        self, layout: Layout, num_clients: int, num_participants: int, *, dtype: torch.dtype = torch.float32,
        compressor: Compressor | None = None, adversary: Adversary | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.num_participants = layout, num_participants
        self.compressor, self.adversary = compressor, adversary
        init = getattr(compressor, "init_client", None)
        first = init(layout) if init else {}
        self.store = ClientStore(num_clients, {name: value.to(dtype) for name, value in first.items()})
        self.aggregate: Callable[[Cohort], Tensor] | None = None  # the server's step, for attacks that know its rule

    @property
    def needs_rows(self) -> str | None:
        """Who reads or replaces rows; None lets the engine sum them as they come."""
        if self.compressor is not None:
            return type(self.compressor).__name__
        if self.adversary is not None and self.adversary.sends_rows:
            return type(self.adversary.attack).__name__
        return None

    def __call__(self, cohort: Cohort) -> Cohort:
        """Return the cohort as it arrives; the given one's rows may be overwritten."""
        if self.compressor is not None:
            cohort = replace(cohort, updates=self._compress(cohort, self.compressor))
        if self.adversary is not None and self.adversary.sends_rows:
            byzantine, rows = self.adversary.rows(cohort, self.aggregate)
            cohort.rows[byzantine] = rows.to(cohort.rows)
        return cohort

    def _compress(self, cohort: Cohort, compressor: Compressor) -> Tensor:
        ids = cohort.clients.cpu().numpy()
        bits = keyed_bits(cohort.seed, "compress", cohort.round, ids) >> np.uint64(32)  # (K,)
        keys = torch.from_numpy(bits.astype(np.int64)).to(cohort.clients.device)
        senders = Senders(cohort.clients, keys, self.num_participants)
        sent, kept = compressor(cohort.rows, senders, self.store.get(ids, cohort.rows.device))
        self.store.put(ids, kept)
        return sent

    def num_bytes(self, itemsize: int) -> int | None:
        """Return the bytes of one encoded update of numbers of `itemsize` bytes; None where it is sent whole."""
        return None if self.compressor is None else self.compressor.num_bytes(self.layout.size, itemsize)

    def state(self) -> State:
        """Return what the next round depends on beside what the clients keep, which is in `store`."""
        attack: Any = None if self.adversary is None else self.adversary.state
        return {"attack": attack}

    def load(self, state: State) -> None:
        """Go back to what `state` returned."""
        if self.adversary is not None:
            self.adversary.state = state["attack"]
