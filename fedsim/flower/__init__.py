"""Flower: the in-process grid and the two shells.

Flower reads its environment once, when it is first imported; the package's own submodules are the only ones
that import it, so here is the last place to ask for quiet, offline runs. A variable that is set already wins.
"""

import os

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("FLWR_LOG_LEVEL", "ERROR")
