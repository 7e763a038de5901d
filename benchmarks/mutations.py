"""Would the tests notice? Breaks the code in one place at a time, in a copy of the tree, and runs the tests there.

    python -m benchmarks.mutations [--list] [--output FILE] [NAME …]      names: some alone; none: all

Not part of a test run: each mutation has a pytest of its own, which stops at the first failure; that
test must pass once the line is right again. What survives is a missing test, or a mutation that changes nothing.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import flwr.app  # noqa: F401  slow to load, as the three below
import omegaconf  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import torch  # noqa: F401

ROOT = Path(__file__).resolve().parent.parent
PARTS = ("fedsim", "strategies", "clients", "configs", "tests", "benchmarks", "docs")
INSIDE = ("strategies", "clients", "configs")  # imported as fedsim.strategies and so on
RULES = ("test_robust.py", "test_order.py", "test_preaggregation.py", "test_byzfl_values.py", "test_laws.py")


class Mutation(NamedTuple):
    """One wrong line."""

    name: str
    file: str
    right: str
    wrong: str
    tests: tuple[str, ...]  # of the folder tests/: those of its topic, by the table in docs/architecture.md


MUTATIONS = (
    # Server rules
    Mutation("trimmed mean: one value too few trimmed where K = 2f + 1", "strategies/trimmed_mean.py",
             "(len(cohort) - 1) // 2)", "len(cohort) // 2 - 1)", RULES),
    Mutation("median: the upper of the middle two", "fedsim/order.py",
             "ascending[(len(ascending) - 1) // 2]", "ascending[len(ascending) // 2]", RULES),
    Mutation("Krum: one neighbour more", "strategies/krum.py", "len(distances) - num_byzantine - 2",
             "len(distances) - num_byzantine - 1", RULES),
    Mutation("Krum: K = 2f + 2 is let through", "strategies/krum.py", "num_participants <= 2 * num_byzantine + 2",
             "num_participants < 2 * num_byzantine + 2", RULES),
    Mutation("Multi-Krum: K - f - 1 selected", "strategies/krum.py", "or len(cohort) - self.num_byzantine",
             "or len(cohort) - self.num_byzantine - 1", RULES),
    Mutation("Bulyan: K - f selected", "strategies/bulyan.py", "range(count - 2 * f)", "range(count - f)", RULES),
    Mutation("MeaMed: the value that is farther stays", "fedsim/order.py", "high - center < center - low",
             "high - center > center - low", RULES),
    Mutation("geometric median: the half is missing", "strategies/geometric_median.py", "cross - share @ cross / 2",
             "cross - share @ cross", RULES),
    Mutation("centered clipping: the previous aggregate is forgotten", "strategies/centered_clipping.py",
             'memory = {"previous": delta}', 'memory = {"previous": state["previous"]}', RULES),
    Mutation("norm clipping: n_k becomes 1", "strategies/norm_clipping.py", "proportions(cohort.weights)",
             "proportions(torch.ones_like(cohort.weights))", RULES),
    Mutation("DnC: the floor of c f dropped", "strategies/dnc.py", "math.ceil(self.filter", "math.floor(self.filter",
             RULES),
    Mutation("DnC: rows centred along one axis only", "strategies/dnc.py",
             "inner - inner.mean(0) - inner.mean(1, keepdim=True) + inner.mean()", "inner - inner.mean(0)", RULES),
    Mutation("ARC: one norm further", "strategies/arc.py", "[2 * f * (count - f) // count]",
             "[2 * f * (count - f) // count + 1]", RULES),
    Mutation("NNM: K - f + 1 neighbours", "strategies/nnm.py", "[:, :kept]", "[:, : kept + 1]", RULES),
    Mutation("FedAvgM: momentum before, not after", "strategies/fedavg.py",
             'self.server_momentum * state["velocity"].to(mean) + mean',
             'self.server_momentum * (state["velocity"].to(mean) + mean)', ("test_fedavg.py",)),
    Mutation("FedYogi: v moves the other way", "strategies/fedopt.py", "(square - delta_square).sign()",
             "(delta_square - square).sign()", ("test_fedopt.py",)),
    Mutation("FedAdam: v starts at tau, not at its square", "strategies/fedopt.py", "self.tau**2", "self.tau",
             ("test_fedopt.py",)),
    Mutation("FedLD: shares of the kept spectrum alone", "strategies/fedld.py", "values / values.sum(-1, keepdim=True)",
             "values / (values * counts).sum(-1, keepdim=True)", ("test_fedld.py",)),
    Mutation("FedLD: k rounded up", "strategies/fedld.py", "math.floor(num_clients * self.k_proportion)",
             "math.ceil(num_clients * self.k_proportion)", ("test_fedld.py",)),
    Mutation("Flag: weights to the power -1, not -1/2", "strategies/flag.py",
             "((1 - quality).abs() + EPS).rsqrt().diag()", "((1 - quality).abs() + EPS).reciprocal().diag()",
             ("test_flag.py",)),
    Mutation("Flag: every pair counts once", "strategies/flag.py", "weights + 2 * laplacian", "weights + laplacian",
             ("test_flag.py",)),
    Mutation("FedHyper-G: last round's rate scales this step", "strategies/fedhyper.py", "delta * rate.to(delta.dtype)",
             'delta * state["rate"].to(delta.dtype)', ("test_server_rates.py", "test_fedhyper.py")),
    Mutation("FedNova: mean steps without n_k", "strategies/fednova.py", "(n @ lengths) / n.sum()", "lengths.mean()",
             ("test_two_sided.py",)),
    Mutation("FedDyn: the share of those who took part is missing", "strategies/feddyn.py",
             'len(sums.cohort) / state["num_clients"]', "1", ("test_two_sided.py",)),
    Mutation("q-FedAvg: clients count alike", "strategies/qfedavg.py", "return cohort.weights * (_losses(cohort)",
             "return torch.ones_like(cohort.weights) * (_losses(cohort)", ("test_two_sided.py",)),
    Mutation("q-FedAvg: squares of updates in the place of gradients'", "strategies/qfedavg.py",
             "* squares / rates.square()", "* squares / rates", ("test_two_sided.py",)),
    Mutation("q-FedAvg's client: batches of unequal size count alike", "clients/qfedavg.py",
             "value * size / context.num_samples", "value / context.num_samples", ("test_two_sided.py",)),
    Mutation("FedLEx's client: how far it went, not squared", "clients/fedlex.py", "moved.square()", "moved.abs()",
             ("test_two_sided.py",)),
    Mutation("SCAFFOLD's option I: batches of unequal size count alike", "clients/scaffold.py",
             "loss * size / context.num_samples", "loss / context.num_steps",
             ("test_two_sided.py",)),
    Mutation("FedExP: the 2 is missing", "strategies/fedexp.py", "(2 * (square + self.epsilon))",
             "(square + self.epsilon)", ("test_server_rates.py",)),
    Mutation("EF21: 1/K of the cohort, not 1/n of all", "strategies/ef21.py", '1 / state["num_clients"])',
             "1 / len(cohort))", ("test_compress.py",)),
    Mutation("EF21: the contraction knows no partial participation", "strategies/ef21.py",
             "a = self.alpha * self.participation", "a = self.alpha", ("test_compress.py",)),
    Mutation("FedBuff: divided by the discounts", "strategies/fedbuff.py", "self.server_lr * kept.to(mean) * mean",
             "self.server_lr * mean", ("test_stale_rules.py",)),
    Mutation("DP-FedAvg: noise for the sum, not for the mean", "strategies/dp_fedavg.py",
             "self.noise_multiplier * self.max_norm / expected", "self.noise_multiplier * self.max_norm",
             ("test_dp.py",)),
    # Objectives and local steps
    Mutation("margin loss: padding counts", "clients/margin.py", "(squares * (weights > 0)).sum(-1)", "squares.sum(-1)",
             ("test_objectives.py",)),
    Mutation("MOON: drawn to the old model", "clients/moon.py", "functional.softplus(closer / self.temperature)",
             "functional.softplus(-closer / self.temperature)", ("test_two_sided.py",)),
    Mutation("proximal term without the half of its derivative", "fedsim/engine/stepping.py",
             "self.received[name][:count], alpha=self.mu)",
             "self.received[name][:count], alpha=self.mu / 2)",
             ("test_engine_vectorized.py",)),
    Mutation("lr decay: a round too late", "fedsim/local.py", "((round - 1) // self.lr_decay_every)",
             "(max(round - 2, 0) // self.lr_decay_every)", ("test_local.py",)),
    # Partitions
    Mutation("Dirichlet: alpha not scaled", "fedsim/partition/dirichlet.py",
             'self.alpha / (self.num_clients if self.alpha_scale == "total" else 1)', "self.alpha",
             ("test_partition_kinds.py", "test_partition_laws.py")),
    Mutation("rounding: the least fractions first", "fedsim/partition/rounding.py", "np.argsort(-fractions",
             "np.argsort(fractions", ("test_partition_kinds.py", "test_partition_laws.py")),
    Mutation("long tail: C steps, not C - 1", "fedsim/partition/longtail.py", "max(num_classes - 1, 1)", "num_classes",
             ("test_partition_kinds.py", "test_partition_laws.py")),
    Mutation("shards: not shuffled", "fedsim/partition/shards.py", "rng.permutation(num_shards) //",
             "np.arange(num_shards) //", ("test_partition_kinds.py", "test_partition_laws.py")),
    Mutation("repair: one sample too few", "fedsim/partition/repair.py",
             "need = np.maximum(min_size - sizes, 0)  # (K,)\n    gifts",
             "need = np.maximum(min_size - 1 - sizes, 0)\n    gifts",
             ("test_partition_kinds.py", "test_partition_laws.py")),
    # Attacks
    Mutation("ALIE: s one too small", "fedsim/attacks/alie.py", "num_clients // 2 + 1 - num_byzantine",
             "num_clients // 2 - num_byzantine", ("test_attacks.py",)),
    Mutation("IPM: with the mean", "fedsim/attacks/ipm.py", "-self.epsilon", "self.epsilon", ("test_attacks.py",)),
    Mutation("min-max: the other root", "fedsim/attacks/min_max.py", ".sqrt() - half", ".sqrt() + half",
             ("test_attacks.py",)),
    Mutation("min-sum: the spread counts twice", "fedsim/attacks/min_sum.py", "(2 * len(distances))", "len(distances)",
             ("test_attacks.py",)),
    Mutation("attacks: the sample's deviation", "fedsim/attacks/contract.py", "std(0, correction=0)",
             "std(0, correction=1)", ("test_attacks.py",)),
    Mutation("Fang: with the direction of change", "fedsim/attacks/fang.py", "view.mean < 0", "view.mean > 0",
             ("test_attacks.py",)),
    Mutation("backdoor: the target's own samples count as successes", "fedsim/attacks/backdoor.py",
             "test[dataset.y.numpy()[test] != self.target]", "test", ("test_attacks.py",)),
    # Statistics and metrics
    Mutation("interval: the population's deviation", "fedsim/report/statistics.py", "float(x.std(ddof=1))",
             "float(x.std(ddof=0))", ("test_report_statistics.py",)),
    Mutation("Holm: one rank too far", "fedsim/report/statistics.py", "(len(p) - rank)", "(len(p) - rank - 1)",
             ("test_report_statistics.py",)),
    Mutation("equivalence: margin and mean add up", "fedsim/study/verdict.py", "(margin - abs(mean))",
             "(margin + abs(mean))", ("test_study.py",)),
    Mutation("Jain: the 1/K is missing", "fedsim/metrics/fairness.py", "(len(values) * squares)", "squares",
             ("test_metrics_clients.py",)),
    Mutation("worst tenth: rounded down", "fedsim/metrics/fairness.py", "math.ceil(Fraction(str(share)) * len(ranked))",
             "max(1, math.floor(Fraction(str(share)) * len(ranked)))", ("test_metrics_clients.py",)),
    Mutation("mutual information: clients count alike", "fedsim/metrics/skew.py", "sizes / sizes.sum() @",
             "held / held.sum() @", ("test_skew.py",)),
    Mutation("drift: the weights of the mean square are missing", "fedsim/metrics/drift.py",
             "_normalised(weights) @ square_norms.double()", "square_norms.double().mean()",
             ("test_metrics_clients.py",)),
)  # fmt: skip


def main() -> None:
    """Run and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="part of a mutation's name")
    parser.add_argument("--list", action="store_true", help="print them and stop")
    parser.add_argument("--output", type=Path, help="Markdown table, written as it grows")
    given = parser.parse_args()
    chosen = [m for m in MUTATIONS if not given.names or any(name in m.name for name in given.names)]
    if given.list:
        print(*(m.name for m in chosen), sep="\n")
        return
    lines = ["| mutation | file | result | by |", "|---|---|---|---|"]
    caught = 0
    with tempfile.TemporaryDirectory() as place:
        tree = copied(Path(place) / "tree")
        print(*lines, sep="\n", flush=True)
        for mutation in chosen:
            path = tree / mutation.file
            text = path.read_text(encoding="utf-8")
            if text.count(mutation.right) != 1:
                sys.exit(f"{mutation.name}: {mutation.file} has {text.count(mutation.right)} times {mutation.right!r}")
            path.write_text(text.replace(mutation.right, mutation.wrong), encoding="utf-8")
            code, by, seconds = tested(tree, mutation.tests)
            path.write_text(text, encoding="utf-8")
            result = {0: "**survived**", 1: "caught"}.get(code, f"**pytest ended with {code}**")
            if code == 1 and tested(tree, (by,))[0]:
                result = "**the test fails without it, too**"
            caught += result == "caught"
            lines.append(f"| {mutation.name} | `{mutation.file}` | {result} | `{by.partition('[')[0]}` |")
            print(lines[-1], f"{seconds:.0f} s", flush=True)
            if given.output:
                given.output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\n{caught} of {len(chosen)} caught")


def copied(tree: Path) -> Path:
    """Copy the tree, laid out as it is imported."""
    tree.mkdir()
    for part in PARTS:
        shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
    for part in INSIDE:
        (tree / "fedsim" / part).symlink_to(tree / part, target_is_directory=True)
    for file in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / file, tree)
    return tree


def tested(tree: Path, files: tuple[str, ...]) -> tuple[int, str, float]:
    """Run test files of the tree up to the first failure; return pytest's code, which test failed, and seconds.

    In a fork of this process, which has loaded what is slow to load and nothing of fedsim.
    """
    began = time.perf_counter()
    with tempfile.TemporaryFile("w+") as told:
        child = os.fork()
        if child == 0:
            os.dup2(told.fileno(), 1)
            os.dup2(told.fileno(), 2)
            os.chdir(tree)
            os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
            sys.path[:] = [str(tree), *(entry for entry in sys.path if Path(entry).resolve() != ROOT)]
            sys.dont_write_bytecode = True
            options = ["-q", "-x", "-p", "no:cacheprovider", "--tb=no", "--rootdir", str(tree)]
            os._exit(pytest.main([*options, *(f"tests/{file}" for file in files)]))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        told.seek(0)
        output = told.read()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - .*)?$", output, re.MULTILINE)
    by = failed[1] if failed else "" if code == 0 else output[-200:].replace("\n", " ")
    return code, by, time.perf_counter() - began


if __name__ == "__main__":
    main()
