"""B5: what the server pays for a rule, against one read of the (K, D) matrix of updates.

    python -m benchmarks B5 [--large] [--peers DIR]
    python -m benchmarks.aggregation median nnm --count 50 --size 1000000      some rules alone

The sides: every rule of `configs/strategy/`; **limit**, `w @ X`; **gram**, `X @ X.T` and then `a @ X`, which every
spectral or distance rule has to do. A ratio rule/limit is the limit's time over the rule's: 1 is one read, 0.5 two.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterable, Mapping
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks import harness
from benchmarks.peer import Peer, PeerError
from fedsim.contracts import Cohort
from fedsim.errors import UserError
from fedsim.testing import build_rule, cohort_of, strategy_names

# ByzFL 0.0.11's seconds at K = 50, D = 1e6 on 2 cores, measured once on another day: context, no ratio of one run.
BYZFL_SECONDS = {
    "fedavg": 0.06, "median": 5.6, "trimmed_mean": 3.2, "meamed": 13.2, "nnm": 44.1, "multi_krum": 1.9,
    "geometric_median": 2.9,
}  # fmt: skip
# What other frameworks have, and which of our sides does the same work: rules by their names; OUTER+INNER is a pipeline
# as users run it, ByzFL's pre-aggregator and then its aggregator against our wrapper around a rule, from the updates to
# the step; nnm_rows and arc_rows end with the changed rows (K, D), which is all that ByzFL's NNM and ARC alone do. Its
# ARC overwrites the rows that it is given, ours never does.
PEERS = {
    "byzfl": {
        **{
            name: name for name in (
                "fedavg", "median", "trimmed_mean", "meamed", "krum", "multi_krum", "geometric_median",
                "centered_clipping", "centered_clipping_once",
                "nnm+fedavg", "nnm+trimmed_mean", "arc+fedavg", "arc+trimmed_mean",
            )
        },
        "nnm": "nnm_rows", "arc": "arc_rows",
    },
    "flower": {name: name for name in ("fedavg", "median", "trimmed_mean", "krum", "multi_krum", "bulyan")},
}  # fmt: skip
# ByzFL's Krum counts one neighbour more, its geometric median takes 3 steps from 0 where ours takes 100 from the mean;
# Flower's Krum counts otherwise too, and its Bulyan leaves others out. What has to be read is the same.
UNLIKE = {
    "byzfl": ("krum", "multi_krum", "geometric_median"),
    "flower": ("krum", "multi_krum", "bulyan"),
}
TOLERANCE = 1e-3  # relative, of results that have to agree
SETTINGS = {"centered_clipping_once": ("centered_clipping", {"num_iterations": 1})}  # sides that are a rule set so
ROWS = ("nnm", "arc")  # wrappers, which are timed around the trimmed mean where nothing else is said
SHARE_BYZANTINE = 5  # one client in five
# Tensors of a small convolutional network, as shares of D: spectra are taken tensor by tensor.
TENSORS = (0.0005, 0.0005, 0.01, 0.001, 0.08, 0.008, 0.35, 0.05, 0.45, 0.05)


def b5(options: harness.Options) -> dict[str, Any]:
    """Race all rules at K = 50, D = 1e6; --large adds K = 100 and D = 1.1e7."""
    sizes = [(50, 10**6)] + ([(100, 10**6), (50, 11 * 10**6), (100, 11 * 10**6)] if options.large else [])
    result: dict[str, Any] = {
        "title": "seconds of a rule on K updates of D parameters", "ratios": {}, "figures": {}, "seconds": {},
        "left_out": {}, "byzfl_reference_seconds": BYZFL_SECONDS, "notes": [],
    }  # fmt: skip
    for count, size in sizes:
        small = (count, size) == sizes[0]
        part = measure(strategy_names(), count, size, options)
        suffix = "" if small else f"[{count}x{size:.0e}]".replace("e+0", "e")
        for name in ("ratios", "figures", "seconds"):
            result[name] |= {_suffixed(key, suffix): value for key, value in part[name].items()}
        result["left_out"] |= part["left_out"]
        if small:
            result["notes"] += [
                f"{name}: ByzFL's reference of another day / this median = "
                f"{1e3 * reference / part['figures'][name]['median_ms']:.0f} ×"
                for name, reference in BYZFL_SECONDS.items()
            ]
    _peers(result, options)
    if not options.large:
        result["left_out"]["K = 100, D = 1.1e7"] = "needs --large"
    return result


def _peers(result: dict[str, Any], options: harness.Options) -> None:
    """Add ByzFL and Flower's NumPy at K = 50, D = 1e6: each rule in turn with ours, one process at a time."""
    if options.peers is None:
        result["left_out"] |= dict.fromkeys(PEERS, "needs --peers DIR")
        return
    cohort = draw(50, 10**6)
    cohort = replace(cohort, weights=torch.ones_like(cohort.weights))  # theirs know no weights
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "rows.npy")
        np.save(file, cohort.rows.numpy())
        for peer, rules in PEERS.items():
            for name, ours in rules.items():
                arguments = str(file), peer, name, str(_byzantine(cohort))
                try:
                    with closing(_Rule(options, peer, "rules_b5.py", *arguments)) as theirs:
                        part = _in_turn(ours, theirs, f"{peer}_{name}", cohort, options)
                except PeerError as error:
                    result["left_out"][f"{peer}_{name}"] = str(error)[-300:]
                    continue
                result["ratios"] |= part["ratios"]
                result["notes"].append(part["note"])
                for key in ("figures", "seconds"):
                    result[key] |= {side: row for side, row in part[key].items() if side not in result[key]}


class _Rule(Peer):
    """A rule in another framework, which puts its rows right before a round without counting that."""

    counts = True


def _in_turn(ours: str, theirs: Peer, side: str, cohort: Cohort, options: harness.Options) -> dict[str, Any]:
    """Race one of our sides against another framework's, after a look at what both return.

    Raises:
        PeerError: it returns something else, though it has to be the same.

    """
    mine = rows_side(ours.removesuffix("_rows"), cohort) if ours.endswith("_rows") else rule_side(ours, cohort)
    want = mine(0)
    away = float((theirs.update() - want).norm() / want.norm())
    peer, name = side.split("_", 1)
    if away > TOLERANCE and name not in UNLIKE[peer]:
        raise PeerError(f"its result differs from ours by {away:.1e}")
    part = harness.compare({ours: mine, side: theirs}, [(ours, side)], options, warm=0, least=3, most=5)
    return {**part, "note": f"{side}: its result differs from that of {ours} by {away:.1e}"}


def measure(names: Iterable[str], count: int, size: int, options: harness.Options, **arguments: Any) -> dict[str, Any]:
    """Race rules on one cohort of `count` updates of `size` parameters."""
    cohort = draw(count, size)
    weights, rows = cohort.weights, cohort.rows
    sides: dict[str, harness.Side] = {
        "limit": lambda number: weights @ rows,
        "gram": lambda number: ((rows @ rows.T).sum(1)) @ rows,
    }
    left_out = {}
    for name in names:
        try:
            side = rule_side(name, cohort)
            side(0)
        except Exception as error:
            left_out[name] = f"does not run on a bare matrix of updates ({type(error).__name__})"
        else:
            sides[name] = side
    pairs = [(name, against) for name in sides for against in ("limit", "gram") if name not in ("limit", "gram")]
    return {**harness.compare(sides, pairs, options, warm=0, **arguments), "left_out": left_out}


def draw(count: int, size: int) -> Cohort:
    """Return `count` updates around a common direction, in tensors of unequal sizes, with unequal weights.

    They are unequally far from it: of equally near neighbours float32 chooses at random, and results differ.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(count, size, generator=generator)  # (K, D)
    rows *= 0.5 + torch.randperm(count, generator=generator)[:, None] / count
    rows += torch.randn(size, generator=generator)
    weights = torch.rand(count, generator=generator) + 0.5  # (K,)
    sizes = [round(share * size) for share in TENSORS[:-1]]
    # Round 2: some rules take the plain mean in the first.
    return cohort_of(rows, weights / weights.sum(), sizes=[*sizes, size - sum(sizes)], round=2)


def rule_side(name: str, cohort: Cohort) -> harness.Side:
    """Return the work of a rule, or of OUTER+INNER, told that one client in five is Byzantine if it has to be told."""
    rule = _rule(name, cohort)
    state = rule.init(cohort.layout, len(cohort))

    def apply(number: int) -> Tensor:
        delta: Tensor = rule(cohort, state)[0]
        return delta

    return apply


def rows_side(name: str, cohort: Cohort) -> harness.Side:
    """Return the work of a wrapper up to the rows (K, D) that its inner rule sees, written out."""
    rule = _rule(name, cohort)

    def apply(number: int) -> Tensor:
        rows: Tensor = rule.mix(cohort)[0].rows
        return rows

    return apply


def _rule(name: str, cohort: Cohort) -> Any:
    if name in SETTINGS:
        rule, settings = SETTINGS[name]
        return build_rule(rule, **settings)
    outer, _, inner = name.partition("+")
    told: dict[str, Any] = {"num_byzantine": _byzantine(cohort)}
    wrapped = {"rule": _rule(inner or "trimmed_mean", cohort)} if outer in ROWS else {}
    try:
        return build_rule(outer, **told, **wrapped)
    except UserError:
        return build_rule(outer)


def _byzantine(cohort: Cohort) -> int:
    return len(cohort) // SHARE_BYZANTINE


def _suffixed(name: str, suffix: str) -> str:
    return "/".join(part + suffix for part in name.split("/"))


def _line(name: str, figures: Mapping[str, Any], ratios: Mapping[str, Any]) -> str:
    shares = "".join(
        f"  {1 / ratios[f'{name}/{against}']['median']:6.2f} × {against}" for against in ("limit", "gram")
        if f"{name}/{against}" in ratios
    )  # fmt: skip
    return f"{name:<20} {figures[name]['median_ms']:9.1f} ms{shares}"


def main() -> None:
    """Time some rules alone: for whoever works on one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rules", nargs="*", metavar="RULE", help="names of configs/strategy; none: all")
    parser.add_argument("--count", type=int, default=50, help="K")
    parser.add_argument("--size", type=int, default=10**6, help="D")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    given = parser.parse_args()
    harness.pin(given.threads)
    options = harness.Options(threads=given.threads, rounds=given.rounds)
    result = measure(given.rules or strategy_names(), given.count, given.size, options)
    for name in sorted(result["figures"], key=lambda name: result["figures"][name]["median_ms"]):
        print(_line(name, result["figures"], result["ratios"]))
    for name, why in result["left_out"].items():
        print(f"left out: {name}: {why}")


if __name__ == "__main__":
    main()
