"""`fedsim compare`: which config keys and which results of two runs, or of two folders of runs, differ."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fedsim.report import tables
from fedsim.report.groups import differing, rank, value_of, written
from fedsim.report.maps import by_client
from fedsim.report.runs import Run, is_seed, read
from fedsim.report.statistics import LEVEL, Paired, holm, mean_of, paired

_CLIENT_FIGURE = "accuracy of the same client (%)"


@dataclass(frozen=True)
class Row:
    """One result that differs."""

    name: str
    a: str
    b: str
    test: Paired | None  # of B − A
    text: str  # B − A


def compare(a: Path, b: Path) -> str:
    """Return what differs between A and B, as text for a terminal.

    Runs are paired by seeds and by what varies within A and within B; where some have no partner, all columns are
    of the pairs alone, and where none has, of all runs and without a difference. Of two lone runs, which no
    interval over seeds can come from, the clients are paired where both have one partition.

    Raises:
        UserError: a folder without runs.

    """
    left, right = read([a]), read([b])
    pairs = _pairs(left, right)
    lines = [f"A  {a}  ({_many(len(left), 'run')})", f"B  {b}  ({_many(len(right), 'run')})", ""]
    lines += _config(left, right)
    rows, equal = _results(left, right, pairs)
    if len(left) == len(right) == 1:
        lines += [*_weights(left[0], right[0])]
        rows += _by_clients(left[0], right[0])
    adjusted = iter(holm([row.test.p for row in rows if row.test]))
    table = [("result", "A", "B", "B − A", "p")]
    for row in rows:
        p = next(adjusted) if row.test else None
        mark = " *" if p is not None and p <= 1 - LEVEL else ""
        table.append((row.name, row.a, row.b, row.text, "–" if p is None else tables.p_value(p) + mark))
    if not rows:
        lines += [f"results: all {equal} are equal", ""]
    else:
        lines += [*_columns(table), "", _legend(rows, len(pairs), equal, _population(left, right, pairs))]
    return "\n".join(lines).rstrip()


def _many(number: int, word: str) -> str:
    return f"{number} {word}{'s' * (number != 1)}"


def _pairs(left: Sequence[Run], right: Sequence[Run]) -> list[tuple[Run, Run]]:
    varying = sorted({*differing(left), *differing(right)})

    def key(run: Run) -> tuple[Any, ...]:
        return (run.seeds, *(repr(value_of(run, name)) for name in varying))

    others: dict[tuple[Any, ...], list[Run]] = {}
    for run in right:
        others.setdefault(key(run), []).append(run)
    return [(run, others[key(run)].pop(0)) for run in left if others.get(key(run))]


def _config(left: Sequence[Run], right: Sequence[Run]) -> list[str]:
    """Return the keys whose values differ; an A or B with several values has them all listed."""
    keys = [*differing([*left, *right]), *_seed_keys([*left, *right])]
    rows = [("config", "A", "B")]
    rows += [(key, x, y) for key in keys if (x := _values(left, key)) != (y := _values(right, key))]
    return [*_columns(rows), ""] if len(rows) > 1 else ["config: equal", ""]


def _seed_keys(runs: Sequence[Run]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.config if is_seed(key)))


def _values(runs: Sequence[Run], key: str) -> str:
    values = sorted((value_of(run, key) for run in runs if _has(run, key)), key=rank)
    found = dict.fromkeys(map(written, values))
    return ", ".join(found) or "–"


def _has(run: Run, key: str) -> bool:
    return key in run.config or key in run.choices


def _results(left: Sequence[Run], right: Sequence[Run], pairs: Sequence[tuple[Run, Run]]) -> tuple[list[Row], int]:
    """Return the results that differ, and how many are equal. Seconds are not results."""
    names = list(dict.fromkeys(name for run in (*left, *right) for name in run.results))
    rows, equal = [], 0
    for name in names:
        if name.startswith("seconds"):
            continue
        both = [(p.results[name], q.results[name]) for p, q in pairs if name in p.results and name in q.results]
        x, y = ([run.results[name] for run in runs if name in run.results] for runs in (left, right))
        if both:  # the three columns are of the same runs
            x, y = ([pair[i] for pair in both] for i in (0, 1))
        if sorted(x) == sorted(y):
            equal += 1
            continue
        test = paired([q for _, q in both], [p for p, _ in both])
        left_text, right_text = (tables.plus_minus(name, mean_of(v)) if v else "–" for v in (x, y))
        rows.append(Row(tables.heading(name), left_text, right_text, test, _difference(name, both, test)))
    return rows, equal


def _population(left: Sequence[Run], right: Sequence[Run], pairs: Sequence[tuple[Run, Run]]) -> str:
    """Say which runs the columns are of, where it is not all of A, each with its partner in B."""
    if len(pairs) == len(left) == len(right):
        return ""
    settings = " and settings" if differing(left) or differing(right) else ""
    if not pairs:
        return f"No run of A has its seeds{settings} in B: A and B are of all their runs, without a difference."
    if settings:
        return f"A, B and B − A are of the {_many(len(pairs), 'pair')} of equal seeds and settings alone."
    if len(pairs) == 1:
        return f"A, B and B − A are of seed {written(pairs[0][0].config.get('seed'))} alone."
    return f"A, B and B − A are of the {_many(len({run.seeds for run, _ in pairs}), 'seed')} that both have."


def _difference(name: str, both: Sequence[tuple[float, float]], test: Paired | None) -> str:
    if test:
        return f"{tables.number(name, test.mean, signed=True)} ± {tables.number(name, test.half)}"
    return tables.number(name, both[0][1] - both[0][0], signed=True) if both else "–"


def _weights(a: Run, b: Run) -> list[str]:
    files = [run.folder / "model.safetensors" for run in (a, b)]
    if not all(file.is_file() for file in files):
        return []
    equal = files[0].read_bytes() == files[1].read_bytes()
    return [f"final weights: {'equal to the bit' if equal else 'differ'}", ""]


def _by_clients(a: Run, b: Run) -> list[Row]:
    """Pair the clients of two lone runs on one partition."""
    x, y = (by_client(run, "test_accuracy") for run in (a, b))
    if x is None or y is None or not np.array_equal(x.clients, y.clients) or not _same_partition(a, b):
        return []
    test = paired(y.last, x.last)
    if test is None or np.array_equal(x.last, y.last):
        return []
    left, right = (tables.number("accuracy", float(part.last.mean())) for part in (x, y))
    return [Row(_CLIENT_FIGURE, left, right, test, _difference("accuracy", [], test))]


def _same_partition(a: Run, b: Run) -> bool:
    arrays = []
    for run in (a, b):
        path = run.folder / "partition.npz"
        if not path.is_file():
            return False
        with np.load(path, allow_pickle=False) as stored:
            arrays.append({name: stored[name] for name in stored.files})
    return arrays[0].keys() == arrays[1].keys() and all(np.array_equal(v, arrays[1][n]) for n, v in arrays[0].items())


def _columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return rows of cells as aligned lines, names to the left, figures to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return lines


def _legend(rows: Sequence[Row], pairs: int, equal: int, population: str) -> str:
    """Return what the table's columns mean, in a few lines."""
    parts = [f"{_many(equal, 'more result')} equal." if equal else "", population]
    by_clients = any(row.name == _CLIENT_FIGURE for row in rows)
    if pairs >= 2:
        parts.append(f"B − A over {_many(pairs, 'pair')} of equal seeds ± half of the 95 % interval.")
    elif by_clients:
        parts.append("One run each: an interval over clients only; run more seeds to tell the methods apart.")
    else:
        parts.append("Fewer than two pairs of equal seeds: no interval, and no test.")
    if any(row.test for row in rows):
        parts.append("p: paired t-test, Holm-adjusted over the table; *: at most 0.05.")
    return "\n".join(part for part in parts if part)
