"""The clients' state in checkpoints: files of neighbouring clients, which checkpoints share until a client changes.

A shard holds the clients touched so far of one range of ids, as one safetensors file named after its first client and
the round that wrote it. A checkpoint writes the shards in which a client changed since the last one and points to the
others; what it points to stands in its manifest with size and digest, so a shard that was torn is found on reading.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load, save

from fedsim.contracts import State
from fedsim.engine.store import ClientStore

BYTES = 1 << 18  # of a full shard: what one client's change costs, beside a thousand entries a gigabyte in the manifest
_DIGEST = 16


class Shards:
    """One store's shards in a folder of checkpoints.

    Args:
        folder: of the files; made with the first one.
        name: tells the files of several stores apart.
        store: whose state it is.

    """

    def __init__(self, folder: Path, name: str, store: ClientStore) -> None:
        self.folder, self.name, self.store = folder, name, store
        self._old: dict[Path, int] = {}  # file → round from which on no checkpoint needs it
        self._clear(max(1, BYTES // max(1, store.record)))

    def _clear(self, clients: int) -> None:
        self.clients = clients  # ids a shard
        count = -(-len(self.store.touched) // clients)
        self.rounds = np.zeros(count, dtype=np.int64)  # (S,) that wrote each shard; 0: none has
        self.sizes = np.zeros(count, dtype=np.int64)  # (S,) bytes
        self.digests = np.zeros((count, _DIGEST), dtype=np.uint8)  # (S, 16) BLAKE2b

    def write(self, round: int) -> State:
        """Write the shards that changed; return what the manifest of this round's checkpoint must hold."""
        changed = np.flatnonzero(self.store.changed)
        for shard in np.unique(changed // self.clients).tolist():
            low = shard * self.clients
            ids = low + np.flatnonzero(self.store.touched[low : low + self.clients])  # (T,)
            rows = self.store.get(ids, torch.device("cpu"))
            content = save({"clients": torch.from_numpy(ids), **{f"/{n}": v.contiguous() for n, v in rows.items()}})
            path = self._path(shard, round)
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            try:
                partial.write_bytes(content)
                os.replace(partial, path)
            except OSError:  # what is half-written would keep a full disk full
                partial.unlink(missing_ok=True)
                raise
            self._old.pop(path, None)
            if 0 < self.rounds[shard] != round:
                self._old[self._path(shard, int(self.rounds[shard]))] = round
            self.rounds[shard], self.sizes[shard] = round, len(content)
            self.digests[shard] = np.frombuffer(_digest(content), dtype=np.uint8)
        self.store.changed[changed] = False
        used = np.flatnonzero(self.rounds)
        return {
            "clients": self.clients, "shard": used, "round": self.rounds[used], "bytes": self.sizes[used],
            "digest": self.digests[used],
        }  # fmt: skip

    def load(self, state: State) -> None:
        """Fill the store from what `write` returned.

        Raises:
            ValueError: a shard is not what was written.
            OSError: it is gone.

        """
        self.store.clear()
        self._clear(state["clients"])
        used = state["shard"]
        self.rounds[used], self.sizes[used], self.digests[used] = state["round"], state["bytes"], state["digest"]
        for shard in used.tolist():
            path = self._path(shard, int(self.rounds[shard]))
            content = path.read_bytes()
            if len(content) != self.sizes[shard] or _digest(content) != self.digests[shard].tobytes():
                raise ValueError(f"{path.name} is not what the checkpoint wrote")
            tensors = load(content)
            ids = tensors.pop("clients").numpy()
            self.store.put(ids, {name[1:]: value for name, value in tensors.items()})
        self.store.changed[:] = False
        self._find_old()

    def prune(self, oldest: int) -> None:
        """Remove the files that no checkpoint from round `oldest` on needs."""
        for path in [path for path, round in self._old.items() if round <= oldest]:
            path.unlink(missing_ok=True)
            del self._old[path]

    def _find_old(self) -> None:
        """Find what earlier writers left: what was replaced before the round gone back to, and what came after it."""
        known = defaultdict(list)
        for path in self.folder.glob(f"{self.name}-*.safetensors"):
            if match := re.fullmatch(rf"{self.name}-(\d+)-(\d+)\.safetensors", path.name):
                known[int(match[1]) // self.clients].append(int(match[2]))
        self._old = {}
        for shard, rounds in known.items():
            now = int(self.rounds[shard]) if shard < len(self.rounds) else 0
            for round in rounds:
                if round != now:
                    ends = min((later for later in rounds if round < later <= now), default=round)
                    self._old[self._path(shard, round)] = ends

    def _path(self, shard: int, round: int) -> Path:
        return self.folder / f"{self.name}-{shard * self.clients:09d}-{round:08d}.safetensors"


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST).digest()


def shard_bytes(store: ClientStore, cohort: int) -> int:
    """Return the bytes that a checkpoint after a round of a cohort writes at most."""
    return int(min(len(store.touched) * store.record, cohort * max(store.record, BYTES)))


def all_stores(folder: Path, **stores: Any) -> dict[str, Shards]:
    """Return the shards of each store that keeps anything, by name."""
    return {name: Shards(folder, name, store) for name, store in stores.items() if store is not None and store.first}
