"""The final table: mean and interval of each method in each setting, tests against a baseline, ties with the best."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedsim.errors import UserError, did_you_mean
from fedsim.quantities import duration, size
from fedsim.report.groups import Group, Table
from fedsim.report.statistics import LEVEL, Mean, Paired, holm, mean_of, paired
from fedsim.report.tuned import Tree

BySeeds = Mapping[tuple[Any, ...], float]

_LOWER = {"reached", "loss", "ece", "std", "bytes", "seconds", "dropped", "norm", "spread", "dissimilarity", "epsilon"}


@dataclass(frozen=True)
class Cell:
    """One method in one setting."""

    mean: Mean
    difference: Paired | None  # to the baseline, over the seeds that both have; None: the baseline, or too few pairs
    p: float | None  # of the difference, Holm-adjusted over the whole table
    best: bool  # the best of its setting, or not told apart from it


@dataclass(frozen=True)
class Comparison:
    """A metric over all groups."""

    metric: str
    baseline: str
    cells: Mapping[tuple[str, str], Cell]  # (method, setting)
    left_out: str = ""  # which runs are not in it, in a sentence
    budget: str = ""  # what methods were tuned with, in a sentence
    searches: Sequence[Tree] = ()  # the same, with what was chosen


def lower_is_better(metric: str) -> bool:
    """Say which way a metric is good.

    >>> lower_is_better("validation_loss"), lower_is_better("client_accuracy_mean")
    (True, False)
    """
    return bool(_LOWER & set(metric.replace(".", "_").split("_")))


def compare(table: Table, metric: str, baseline: str) -> Comparison:
    """Compare all methods on a metric.

    Each is tested against the baseline of its setting by Student's paired test over common seeds, Holm-adjusted over
    the table. Bold is the best mean of a setting with all whose paired difference from it is not significant,
    Holm-adjusted over the setting; without two common seeds nothing ties.
    """
    values = {key: group.by_seeds(metric) for key, group in table.groups.items()}
    values = {key: found for key, found in values.items() if found}
    cells = {}
    for key, found in values.items():
        difference = None
        if key[0] != baseline and (baseline, key[1]) in values:
            difference = _paired(found, values[baseline, key[1]])
        cells[key] = Cell(mean_of(list(found.values())), difference, None, False)
    tested = [key for key, cell in cells.items() if cell.difference]
    adjusted = holm([test.p for key in tested if (test := cells[key].difference)])
    cells |= {key: replace(cells[key], p=p) for key, p in zip(tested, adjusted, strict=True)}
    for setting in table.settings:
        inside = {key: found for key, found in values.items() if key[1] == setting}
        cells |= {key: replace(cells[key], best=True) for key in _best(inside, metric)}
    return Comparison(metric, baseline, cells)


def _paired(a: BySeeds, b: BySeeds) -> Paired | None:
    common = [key for key in a if key in b]
    return paired([a[key] for key in common], [b[key] for key in common])


def _best(values: Mapping[tuple[str, str], BySeeds], metric: str) -> list[tuple[str, str]]:
    """Return the best of a setting and all that tie with it."""
    if not values:
        return []
    sign = 1 if lower_is_better(metric) else -1
    best = min(values, key=lambda key: sign * mean_of(list(values[key].values())).mean)
    tests = {key: test for key, found in values.items() if key != best and (test := _paired(found, values[best]))}
    adjusted = holm([test.p for test in tests.values()])
    return [best, *(key for key, p in zip(tests, adjusted, strict=True) if p > 1 - LEVEL)]


def choose_baseline(table: Table, wanted: str | None) -> str:
    """Return the method that others are tested against: as asked, else plain FedAvg, else the first.

    Raises:
        UserError: there is no such method.

    """
    if wanted is not None:
        if wanted not in table.methods:
            raise UserError(f"--baseline {wanted}: no such method{did_you_mean(wanted, table.methods)}")
        return wanted
    return next((method for method in table.methods if method.split()[0] == "fedavg"), table.methods[0])


def choose_metric(table: Table, wanted: str | None) -> str:
    """Return the metric of the table: as asked, else test accuracy.

    Raises:
        UserError: no run has it.

    """
    known = metrics(table)
    name = wanted or ("accuracy" if "accuracy" in known else known[0] if known else "accuracy")
    if name not in known:
        raise UserError(f"--metric {name}: no run has such a result{did_you_mean(name, known)}")
    return name


def metrics(table: Table) -> list[str]:
    """Return the names of all results, in the order of the runs'."""
    return list(dict.fromkeys(name for group in table.all for run in group.runs for name in run.results))


def is_percent(metric: str) -> bool:
    """Say whether a metric is a share that people read in percent; Jain's index is none."""
    words = metric.replace(".", "_").split("_")
    return ("accuracy" in words or "recall" in words or "ece" in words) and "jain" not in words


def number(metric: str, value: float, *, signed: bool = False) -> str:
    """Return a value in the metric's unit, without the unit where it is percent.

    >>> number("accuracy", 0.91234), number("loss", 0.35899), number("accuracy", 0.01, signed=True)
    ('91.23', '0.3590', '+1.00')
    """
    if value < 0:
        return "−" + number(metric, -value)
    if not math.isfinite(value):
        return str(value)
    words = metric.replace(".", "_").split("_")
    sign = "+" if signed else ""
    if is_percent(metric):
        return f"{sign}{100 * value:.2f}"
    if "bytes" in words:
        return sign + size(value)
    if "seconds" in words:
        return sign + duration(value)
    if float(value).is_integer() and value < 1e15:
        return f"{sign}{int(value):,}"
    return f"{sign}{value:.4f}" if 1e-3 <= value < 1e3 else f"{sign}{value:.3e}"


def plus_minus(metric: str, mean: Mean) -> str:
    """Return "mean ± half" in the metric's unit; the mean alone of a single run."""
    text = number(metric, mean.mean)
    return text if mean.half is None else f"{text} ± {number(metric, mean.half)}"


def p_value(p: float) -> str:
    """Return a p-value as it is printed: never as exactly 0."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def heading(metric: str) -> str:
    """Return a metric's name with its unit."""
    return metric.replace(".", " ").replace("_", " ") + (" (%)" if is_percent(metric) else "")


def caption(comparison: Comparison, table: Table) -> str:
    """Return what a reader must know to read the table."""
    counts = sorted({len(group.runs) for group in table.all})
    runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    text = f"{heading(comparison.metric).capitalize()} after the last round"
    if counts[-1] > 1:
        text += f", mean of {runs} runs ± half of the 95 % interval (Student's t)"
    if len(table.methods) > 1:
        text += f"; bold: the best{' and all not told apart from it' if counts[-1] > 1 else ''}"
    if any(cell.p is not None for cell in comparison.cells.values()):
        text += f"; *: differs from {comparison.baseline} (paired over seeds, Holm-adjusted p ≤ 0.05)"
    return " ".join(filter(None, (f"{text}.", comparison.budget, comparison.left_out)))


def differs(cell: Cell) -> bool:
    """Say whether a cell's difference from the baseline is significant."""
    return cell.p is not None and cell.p <= 1 - LEVEL


def markdown(comparison: Comparison, table: Table) -> str:
    """Return the table in Markdown."""
    escape = str.maketrans({"|": r"\|"})
    rows = [["method", *((s or heading(comparison.metric)).translate(escape) for s in table.settings)]]
    for method in table.methods:
        cells = (comparison.cells.get((method, setting)) for setting in table.settings)
        rows.append([method.translate(escape), *(_markdown_cell(comparison.metric, cell) for cell in cells)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|".join("-" * (width + 1) + (":" if i else "-") for i, width in enumerate(widths))
    lines.insert(1, f"|{rule}|")
    return "\n".join([*lines, "", caption(comparison, table)])


def _markdown_cell(metric: str, cell: Cell | None) -> str:
    if cell is None:
        return "–"
    text = plus_minus(metric, cell.mean)
    return (f"**{text}**" if cell.best else text) + (r"\*" if differs(cell) else "")


_LATEX = str.maketrans(
    {c: "\\" + c for c in "&%$#_{}"}
    | {"~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\\": r"\textbackslash{}"}
)


def latex(comparison: Comparison, table: Table) -> str:
    """Return the table in LaTeX; needs the package booktabs."""
    head = [s.translate(_LATEX) or heading(comparison.metric).translate(_LATEX) for s in table.settings]
    lines = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"  \centering",
        f"  \\begin{{tabular}}{{l{'r' * len(head)}}}",
        r"    \toprule",
        f"    method & {' & '.join(head)} \\\\",
        r"    \midrule",
    ]
    for method in table.methods:
        cells = [_latex_cell(comparison, comparison.cells.get((method, setting))) for setting in table.settings]
        lines.append(f"    {method.translate(_LATEX)} & {' & '.join(cells)} \\\\")
    text = caption(comparison, table).translate(_LATEX).replace("±", r"$\pm$").replace("≤", r"$\le$")
    lines += [r"    \bottomrule", r"  \end{tabular}", f"  \\caption{{{text}}}", r"\end{table}"]
    return "\n".join(lines)


def _latex_cell(comparison: Comparison, cell: Cell | None) -> str:
    if cell is None:
        return "--"
    text = plus_minus(comparison.metric, cell.mean).replace("±", r"$\pm$").replace("−", "$-$")
    return (f"\\textbf{{{text}}}" if cell.best else text) + ("$^{*}$" if differs(cell) else "")


def as_csv(comparisons: Sequence[Comparison], table: Table) -> str:
    """Return one row a method, setting and metric, plain numbers; what does not exist is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["method", "setting", "metric", "runs", "mean", "low", "high", "best", "baseline", "pairs", "difference",
         "difference_low", "difference_high", "p_holm"]
    )  # fmt: skip
    for comparison in comparisons:
        for group in table.all:
            if cell := comparison.cells.get((group.method, group.setting)):
                writer.writerow(_csv_row(comparison, group, cell))
    return out.getvalue().rstrip("\n")


def _csv_row(comparison: Comparison, group: Group, cell: Cell) -> list[object]:
    mean, test = cell.mean, cell.difference
    low_high = ["", ""] if mean.half is None else [mean.mean - mean.half, mean.mean + mean.half]
    row = [group.method, group.setting, comparison.metric, mean.count, mean.mean, *low_high, int(cell.best)]
    if test is None:
        return [*row, comparison.baseline, "", "", "", "", ""]
    return [*row, comparison.baseline, test.count, test.mean, test.mean - test.half, test.mean + test.half, cell.p]
