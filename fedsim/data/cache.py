"""Arrays that are slow to make and never change, kept once per user: decoded images."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
import warnings
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file


def cache_folder() -> Path:
    """Return FEDSIM_CACHE, else `fedsim` in XDG_CACHE_HOME, else in `~/.cache`. It may be deleted at any time."""
    if own := os.environ.get("FEDSIM_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "fedsim"


def cached(name: str, key: Mapping[str, Any], make: Callable[[], npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """Return the array that `make` returns, from the cache if it was made before.

    A file appears under its name only when it is whole, so concurrent makers cost time and nothing else. Its
    checksum is verified; a file that is damaged is made again. A cache that cannot be written is a warning.

    Args:
        name: beginning of the file's name, for people who look into the folder.
        key: everything the array depends on; JSON.
        make: called without arguments if need be.

    """
    digest = hashlib.blake2b(json.dumps(key, sort_keys=True).encode(), digest_size=12).hexdigest()
    path = cache_folder() / f"{name}-{digest}.safetensors"
    array = _read(path)
    if array is None:
        array = np.ascontiguousarray(make())
        _write(path, array)
    return array


def _read(path: Path) -> npt.NDArray[Any] | None:
    try:
        with safe_open(path, framework="numpy") as file:
            array: npt.NDArray[Any] = file.get_tensor("array")
            return array if (file.metadata() or {}).get("crc32") == _checksum(array) else None
    except (OSError, SafetensorError):
        return None


def _write(path: Path, array: npt.NDArray[Any]) -> None:
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".tmp")
        os.close(handle)
        save_file({"array": array}, temporary, metadata={"crc32": _checksum(array)})
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            Path(temporary).unlink(missing_ok=True)
        warnings.warn(f"the cache {path.parent} cannot be written ({error}); set FEDSIM_CACHE", stacklevel=3)


def _checksum(array: npt.NDArray[Any]) -> str:
    return f"{zlib.crc32(array.data.cast('B')):08x}"
