"""What `python -m benchmarks --json FILE` wrote, as Markdown.

    python -m benchmarks.table FILE [--into docs/benchmarks.md]

--into replaces what stands between the two marker lines of a document.
"""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures: begin -->", "<!-- figures: end -->"
BUSY = 1.5  # load a core above which others were at work too


def markdown(results: Mapping[str, Any]) -> str:
    """Return the tables of all ids, after a line that says what they were measured on."""
    parts = [_machine(results)]
    for name, result in results.items():
        if name not in ("machine", "after"):
            parts.append(f"### {name}" + (f": {result['title']}" if result.get("title") else ""))
            parts.append(f"Failed: {result['error']}" if "error" in result else _tables(result))
    return "\n\n".join(part for part in parts if part) + "\n"


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    loads = [place["load"][0] for place in (machine, results.get("after", {})) if place.get("load")]
    versions = ", ".join(f"{name} {value}" for name, value in machine["versions"].items() if value)
    line = (
        f"{machine['processor']}, {machine['threads']} threads, {machine['device']}; Python {machine['python']}, "
        f"{versions}; commit {(machine['commit'] or 'unknown')[:9]}; load "
        f"{' → '.join(f'{load:.1f}' for load in loads)}; peak memory "
        f"{results.get('after', machine)['peak_rss_mib']:.0f} MiB."
    )
    # The first load is that before the benchmarks themselves ran.
    if loads and loads[0] > BUSY * machine["threads"] / 2:
        line += " **Provisional: the machine was busy with other work.**"
    return textwrap.fill(line, 118)


def _tables(result: Mapping[str, Any]) -> str:
    same = result.get("same_as", {})
    timed = {n: row for n, row in result.get("figures", {}).items() if "median_ms" in row and n not in same}
    others = {n: row for n, row in result.get("figures", {}).items() if "median_ms" not in row}
    plans, cells, columns = result.get("plans", {}), *_ratios(result.get("ratios", {}))
    lines = []
    if timed:
        lines += ["| " + " | ".join(["side", "ms a round", *columns, "plan"]) + " |", "|---" * (3 + len(columns)) + "|"]
    for side, row in timed.items():
        plan = " ".join(str(plans.get(side, {}).get(key) or "") for key in ("engine", "kernels", "program")).strip()
        spread = f"{row['median_ms']:.4g} ({row['q1_ms']:.4g} – {row['q3_ms']:.4g})"
        lines.append("| " + " | ".join([side, spread, *(cells.get((side, c), "") for c in columns), plan]) + " |")
    notes = [f"{side}: {_numbers(row)}" for side, row in others.items()]
    notes += [
        f"{pair}: {_spread(row)}" for pair, row in result.get("ratios", {}).items()
        if not set(pair.split("/")) & timed.keys() and not set(pair.split("/")) & same.keys()
    ]  # fmt: skip
    notes += [f"{name} took the same as {twin}." for name, twin in same.items()]
    notes += list(result.get("notes", []))
    notes += [f"Left out: {side} ({why})." for side, why in result.get("left_out", {}).items()]
    wrapped = [textwrap.fill(note, 118, initial_indent="* ", subsequent_indent="  ") for note in notes]
    return "\n".join([*lines, *([""] if lines and wrapped else []), *wrapped])


def _ratios(ratios: Mapping[str, Any]) -> tuple[dict[tuple[str, str], str], list[str]]:
    """Return (side, column) → text, with the fewer of a ratio's two sides as columns."""
    pairs = [tuple(pair.split("/")) for pair in ratios]
    over, under = dict.fromkeys(a for a, _ in pairs), dict.fromkeys(b for _, b in pairs)
    if len(under) <= len(over):
        return {(a, f"over {b}"): _spread(ratios[f"{a}/{b}"]) for a, b in pairs}, [f"over {b}" for b in under]
    return {(b, f"{a} over it"): _spread(ratios[f"{a}/{b}"]) for a, b in pairs}, [f"{a} over it" for a in over]


def _spread(row: Mapping[str, Any]) -> str:
    return f"{row['median']:.3g}" + (f" ({row['q1']:.3g} – {row['q3']:.3g})" if "q1" in row else "")


def _numbers(row: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, int | float))


def into(document: str, tables: str) -> str:
    """Return a document with the text between its markers replaced.

    Raises:
        ValueError: it has no such markers.

    """
    before, begin, rest = document.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"the document needs the lines {BEGIN} and {END}; tables go between them")
    return f"{before}{BEGIN}\n\n{tables}\n{END}{after}"


def main() -> None:
    """Print the tables, or put them in a document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--into", type=Path, metavar="DOCUMENT")
    given = parser.parse_args()
    tables = markdown(json.loads(given.file.read_text(encoding="utf-8")))
    if given.into is None:
        print(tables)
    else:
        given.into.write_text(into(given.into.read_text(encoding="utf-8"), tables), encoding="utf-8")


if __name__ == "__main__":
    main()
