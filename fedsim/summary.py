"""What a run says of itself in a few lines: its plan before round 1, its summary after the last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedsim.attacks.adversary import Adversary
from fedsim.experiment import Experiment
from fedsim.loop import Loop
from fedsim.metrics.reached import reached
from fedsim.metrics.records import RoundLog
from fedsim.quantities import counted

SHOWN = ("accuracy", "loss", "validation_accuracy", "client_accuracy_mean", "client_accuracy_worst",
          "held_out_accuracy_mean", "num_attackers", "honest_accuracy_mean", "backdoor_accuracy", "staleness_mean",
          "num_lost", "epsilon", "delta", "num_rounds", "stopped", "bytes_up", "bytes_down", "seconds")  # fmt: skip


def shown(summary: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the screen says of a summary; simulated seconds only where clients differ in time."""
    timed = ("simulated_seconds",) if "num_lost" in summary else ()
    return {name: value for name, value in summary.items() if name in SHOWN + timed}


def plan_line(plan: Mapping[str, Any], adversary: Adversary | None = None) -> str:
    """Return what decides the bits of a run, who attacks, and its rhythms, in one line."""
    numbers = plan["dtype"] if plan["precision"] == "fp32" else f"{plan['dtype']} with {plan['precision']} products"
    attackers = ""
    if adversary is not None:
        attackers = (
            f", {int(adversary.byzantine.sum())} of {plan['clients']} attack ({type(adversary.attack).__name__})"
        )
    workers = f", {counted(plan['workers'], 'worker')}" if "workers" in plan else ""
    return (
        f"engine {plan['engine']}{workers} ({plan['why']}) on {plan['device']}, {numbers}, {plan['threads']} threads, "
        f"{plan['parameters']:,} parameters, {plan['cohort']} of {plan['clients']} clients a round{attackers}, "
        f"updates {plan['rows']}, evaluation every {plan['evaluate_every']} "
        f"(clients every {plan['evaluate_clients_every']}), checkpoint every {plan['checkpoint_every']}"
    )


def summarised(experiment: Experiment, loop: Loop, *, setup: float) -> dict[str, Any]:
    """Return what summary.json says.

    The best round is chosen among those evaluated in their turn and the last one: the last round of a run that was
    gone on with later would not have been evaluated in a longer one.

    Args:
        experiment: what was run.
        loop: after its last round.
        setup: seconds before round 1.

    """
    rows = RoundLog.read(loop.folder / "rounds.jsonl")
    due = experiment.evaluation.due
    adversary = None if loop.uplink is None else loop.uplink.adversary
    evaluated = [row for row in rows if row.get("evaluated") and due(row["round"], loop.round).server]
    validated = [row for row in evaluated if row.get("validation_accuracy") is not None]
    best = max(validated, key=lambda row: row["validation_accuracy"], default={})
    return {
        "status": "stopped" if loop.stopping.reason else "done",
        "stopped": loop.stopping.reason,
        "num_rounds": loop.round,
        "seed": experiment.settings.seed,
        "choices": experiment.config["hydra"]["runtime"]["choices"],
        **{name: value for name, value in loop.figures.known.items() if not name.startswith("recall_")},
        "best_validation": {name: best.get(name) for name in ("round", "validation_accuracy", "accuracy", "loss")},
        **({"reached": reached(rows, targets)} if (targets := experiment.evaluation.targets) else {}),
        **({"num_attackers": int(adversary.byzantine.sum())} if adversary else {}),
        "simulated_seconds": rows[-1].get("simulated_seconds") if rows else None,
        **_delayed(rows),
        **_spent(rows),
        "bytes_up": sum(row.get("bytes_up") or 0 for row in rows),
        "bytes_down": sum(row.get("bytes_down") or 0 for row in rows),
        "num_dropped": sum(row.get("num_dropped") or 0 for row in rows),
        "seconds": {"setup": setup, **loop.seconds, "total": setup + sum(loop.seconds.values())},
        "plan": loop.plan,
    }


def _spent(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the (ε, δ) that stands after the last round, of runs that account for privacy."""
    last: Mapping[str, Any] = next((row for row in reversed(rows) if "epsilon" in row), {})
    return {name: last.get(name) for name in ("epsilon", "delta") if last}


def _delayed(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return mean staleness over all updates that were aggregated, and lost jobs, where clients differ in time."""
    if not any("num_lost" in row for row in rows):
        return {}
    stale = [(row["staleness_mean"], row["num_participants"]) for row in rows if row.get("staleness_mean") is not None]
    num = sum(num for _, num in stale)
    return {
        "staleness_mean": sum(mean * num for mean, num in stale) / num if num else None,
        "num_lost": sum(row.get("num_lost") or 0 for row in rows),
    }
