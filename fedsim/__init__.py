"""fedsim: federated-learning simulation for heterogeneous clients, on Flower and PyTorch."""

from __future__ import annotations

import os as _os
import sys as _sys
from pathlib import Path as _Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedsim.simulation import Result as Result
    from fedsim.simulation import simulate as simulate

__version__ = "0.1.0"

# In a checkout the folders strategies, clients and configs stand beside this one, not in it; installed they
# are in it. This makes `python -m fedsim` in the repository's root see what an installed package sees.
if not (_Path(__file__).parent / "strategies").is_dir():
    __path__.append(str(_Path(__file__).parent.parent))

# Threads of torch's that have nothing to do wait for 0.1 ms before they sleep, not for 4: clients train in threads of
# fedsim's own, which need the cores. Read once, when torch is loaded.
if "torch" not in _sys.modules and "OMP_WAIT_POLICY" not in _os.environ:
    _os.environ.setdefault("GOMP_SPINCOUNT", "10000")


def __getattr__(name: str) -> Any:
    """Load `simulate` and `Result` when they are first used: importing fedsim itself costs nothing."""
    if name in {"simulate", "Result"}:
        from fedsim import simulation

        return getattr(simulation, name)
    raise AttributeError(f"module 'fedsim' has no attribute {name!r}")
