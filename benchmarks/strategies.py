"""B7: what a method costs: whole rounds of every strategy over FedAvg's, on B4."""

from __future__ import annotations

import time
from typing import Any

from benchmarks import harness, workloads
from benchmarks.rounds import WholeRound
from fedsim.errors import UserError
from fedsim.testing import strategy_names

SHARE_BYZANTINE = 5  # one client in five
SLOW = 8  # times FedAvg's round: what then takes too long to repeat
OWN_TEST = 10  # samples a client keeps: methods with personal parameters are evaluated on them


def b7(options: harness.Options, names: list[str] | None = None) -> dict[str, Any]:
    """Race all strategies' whole rounds on B4: a fifth of its cohort, all of it with --large or --peers."""
    cohort = 100 if options.large or options.peers else 20
    work = workloads.b4(50 + OWN_TEST, cohort)
    sides: dict[str, WholeRound] = {}
    left_out = {}
    for name in names or strategy_names():
        try:
            sides[name] = _round(work, name)
        except (UserError, ValueError, TypeError) as error:
            left_out[name] = str(error).splitlines()[0][:150]
    try:
        took = {name: _seconds(side) for name, side in sides.items()}  # warms up
        quick = {name: side for name, side in sides.items() if took[name] < SLOW * took["fedavg"]}
        seconds = harness.race(quick, options, warm=0, most=7)
        ratios = harness.ratios(seconds, [("fedavg", name) for name in quick if name != "fedavg"])
        # A slow one is timed once, against a FedAvg of its own.
        for name in sides.keys() - quick.keys():
            single = harness.race({"fedavg": sides["fedavg"], name: sides[name]}, options, warm=0, least=1, most=1)
            ratios |= harness.ratios(single, [("fedavg", name)])
            seconds[name] = single[name]
    finally:
        for side in sides.values():
            side.close()
    return {
        "title": f"whole rounds of every strategy on B4 at cohort {cohort}; fedavg/x is what x costs over FedAvg",
        "ratios": ratios,
        "figures": harness.figures(seconds), "seconds": seconds, "left_out": left_out,
        "plans": {name: side.plan for name, side in sides.items()},
    }  # fmt: skip


def hyper(options: harness.Options) -> dict[str, Any]:
    """Race FedHyper's whole rounds over FedAvg's on B4 at cohort 100, on both engines that train client by client."""
    work = workloads.b4()
    engines = {"sequential": ["engine=sequential"], "captured": ["engine=vectorized", "engine.kernels=captured"]}
    methods = ("fedavg", "fedhyper_g", "fedhyper_cl")
    sides = {
        f"{method} {name}": WholeRound(work, f"strategy={method}", *engine, cohort=work.cohort)
        for name, engine in engines.items() for method in methods
    }  # fmt: skip
    pairs = [(f"fedavg {name}", f"{method} {name}") for name in engines for method in methods[1:]]
    try:
        result = harness.compare(sides, pairs, options, warm=3, most=15, budget=60.0)
    finally:
        for side in sides.values():
            side.close()
    return {"title": "whole rounds of FedHyper over FedAvg on B4", **result}


def _seconds(side: harness.Side) -> float:
    side(1)
    began = time.perf_counter()
    side(2)
    return time.perf_counter() - began


def _round(work: workloads.Workload, name: str) -> WholeRound:
    given = [f"strategy={name}", f"partition.local_test={OWN_TEST / (50 + OWN_TEST)}"]
    try:
        return WholeRound(work, *given, f"strategy.num_byzantine={work.cohort // SHARE_BYZANTINE}", cohort=work.cohort)
    except UserError as error:
        if "num_byzantine" not in str(error):
            raise
    return WholeRound(work, *given, cohort=work.cohort)
