"""Checkpoints: nested dicts of tensors and plain values, valid once their manifest is renamed into place.

A checkpoint of round r is two files: `round-r.safetensors` with every tensor and `round-r.json`, the manifest, with
the nesting, the plain values and the byte size of the first. The manifest is written last and renamed, so a run
killed at any moment leaves whole checkpoints only. Nothing is ever unpickled.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fedsim.contracts import State
from fedsim.errors import UserError
from fedsim.files import save_tensors

_MANIFEST = re.compile(r"round-(\d+)\.json")


def save(folder: Path, round: int, state: State, *, keep: int = 2) -> None:
    """Write the checkpoint of a round and remove all but the newest `keep`.

    Args:
        folder: where checkpoints lie; made if absent.
        round: rounds done.
        state: nested dicts with string keys and lists, of tensors, arrays, numbers, strings, bools and None.
        keep: checkpoints kept ≥ 1.

    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    tree = _plain(state, tensors)
    stem = folder / f"round-{round:08d}"
    partial = stem.with_suffix(".partial")
    try:
        save_tensors(tensors, partial)
        size = partial.stat().st_size
        os.replace(partial, stem.with_suffix(".safetensors"))
        partial.write_text(json.dumps({"round": round, "bytes": size, "state": tree}))
        os.replace(partial, stem.with_suffix(".json"))
    except OSError:  # what is half-written would keep a full disk full
        partial.unlink(missing_ok=True)
        raise
    older = [known for known in rounds(folder) if known < round]  # a newer one is torn: nobody could go on from it
    _remove(folder, older[: max(0, len(older) + 1 - max(keep, 1))])


def forget(folder: Path, round: int) -> None:
    """Remove the checkpoints after a round, so that a run goes on from an earlier one."""
    _remove(folder, [known for known in rounds(folder) if known > round])


def _remove(folder: Path, which: Iterable[int]) -> None:
    for round in which:
        for suffix in (".json", ".safetensors"):
            (folder / f"round-{round:08d}{suffix}").unlink(missing_ok=True)


def rounds(folder: Path) -> list[int]:
    """Return the rounds that have a manifest, ascending."""
    names = (_MANIFEST.fullmatch(path.name) for path in folder.glob("round-*.json"))
    return sorted(int(match[1]) for match in names if match)


def load(folder: Path, accept: Callable[[State], None] = lambda state: None) -> tuple[int, State]:
    """Return (round, state) of the newest whole checkpoint; a torn newer one is passed over.

    Args:
        folder: of checkpoints.
        accept: reads what lies beside a checkpoint's own files, and raises where that is torn.

    Raises:
        UserError: there are checkpoints, but none can be read.

    """
    problems = []
    for round in reversed(rounds(folder)):
        try:
            state = _read(folder / f"round-{round:08d}")
            accept(state)
            return round, state
        except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
            problems.append(f"round {round}: {error}")
    detail = "; ".join(problems) if problems else "there is none"
    raise UserError(f"no checkpoint in {folder} can be read ({detail})")


def _read(stem: Path) -> State:
    manifest = json.loads(stem.with_suffix(".json").read_text())
    path = stem.with_suffix(".safetensors")
    if path.stat().st_size != manifest["bytes"]:
        raise ValueError(f"{path.name} has {path.stat().st_size} bytes instead of {manifest['bytes']}")
    tensors = load_file(path)
    # Where in a file a tensor lies decides its address, and that the last bits of a product with it: a copy begins
    # where the tensor that was saved began, on a boundary of the allocator's.
    for name in tensors:
        tensors[name] = tensors[name].clone()
    state: State = _restore(manifest["state"], tensors)
    return state


def identity(config: Mapping[str, Any]) -> str:
    """Return a digest of what may not change when a run is resumed."""
    free = ("hydra", "tracker", "num_rounds", "client_state_bytes", "resume")
    kept = {name: value for name, value in config.items() if name not in free}
    where = ("workers", "devices", "address")  # these decide who trains, not what comes out
    kept["engine"] = {name: value for name, value in kept["engine"].items() if name not in where}
    return hashlib.blake2b(json.dumps(kept, sort_keys=True).encode(), digest_size=16).hexdigest()


def moved(value: Any, device: torch.device) -> Any:
    """Return a nested value with its tensors on a device."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {name: moved(item, device) for name, item in value.items()}
    return value


def _plain(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Move tensors out of a nested value; what is left is JSON."""
    if isinstance(value, np.ndarray):
        return {"array": _plain(torch.from_numpy(value.copy()), tensors)}
    if isinstance(value, Tensor):
        name = f"t{len(tensors)}"
        held = value.detach().to("cpu").contiguous()
        whole = held.untyped_storage().nbytes() == held.nbytes and not any(held.is_set_to(t) for t in tensors.values())
        tensors[name] = held if whole else held.clone()  # of shared storage no two tensors can be saved
        return {"tensor": name}
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise TypeError(f"state must have string keys, got {list(value)}")
        return {"dict": {key: _plain(item, tensors) for key, item in value.items()}}
    if isinstance(value, (list, tuple)):
        return {"list": [_plain(item, tensors) for item in value]}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": repr(value)}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"state must be tensors, numbers, strings, dicts and lists, got {type(value).__name__}")


def _restore(value: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "array":
        return _restore(content, tensors).numpy()
    if kind == "dict":
        return {key: _restore(item, tensors) for key, item in content.items()}
    if kind == "list":
        return [_restore(item, tensors) for item in content]
    return float(content)
