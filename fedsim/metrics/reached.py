"""When a run first reached an accuracy: in rounds, in simulated seconds, in bytes sent both ways."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

Reached = dict[str, dict[str, float | None]]


def reached(rows: Sequence[Mapping[str, Any]], targets: Sequence[float]) -> Reached:
    """Return what it took until test accuracy was first measured at or above each target; None: it never was.

    Args:
        rows: of `rounds.jsonl`, from round 1.
        targets: accuracies in (0, 1].

    """
    found: Reached = {f"{target:g}": dict.fromkeys(("rounds", "simulated_seconds", "bytes")) for target in targets}
    sent = 0
    for row in rows:
        sent += (row.get("bytes_up") or 0) + (row.get("bytes_down") or 0)
        accuracy = row.get("accuracy") if row.get("evaluated") else None
        for target in targets:
            took = found[f"{target:g}"]
            if accuracy is not None and accuracy >= target and took["rounds"] is None:
                took |= {"rounds": row["round"], "simulated_seconds": row.get("simulated_seconds"), "bytes": sent}
    return found
