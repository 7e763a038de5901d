"""An experiment's section of a page of results: claim → verdict, with everything a reader needs to doubt it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from fedsim.study.overview import with_overview
from fedsim.study.spec import Claim, Study, merged
from fedsim.study.verdict import Effect, overall


@dataclass(frozen=True)
class Line:
    """A claim in one cell."""

    claim: Claim
    effect: Effect
    controls: Mapping[str, Effect]
    verdict: str


@dataclass(frozen=True)
class Findings:
    """All that came of an experiment."""

    lines: Sequence[Line]
    checks: Mapping[str, Sequence[Effect]]  # "null" and "positive" → an effect a cell
    means: Mapping[tuple[str, str], float]  # (cell, arm) → mean of what is compared, over runs that did not diverge
    diverged: Mapping[tuple[str, str], int]  # (cell, arm) → runs that did
    beside: Mapping[str, Mapping[tuple[str, str], float]] = field(default_factory=dict)  # metric → (cell, arm) → mean


def cell_name(values: Mapping[str, Any]) -> str:
    """Return how a cell is called.

    >>> cell_name({"partition.alpha": 0.1, "attack": "alie"}), cell_name({})
    ('alpha=0.1 attack=alie', 'all')
    """
    return " ".join(f"{key.rpartition('.')[2]}={value}" for key, value in values.items()) or "all"


def section(
    name: str, study: Study, found: Findings, chosen: Sequence[Mapping[str, Any]], changed: Sequence[str]
) -> str:
    """Return the Markdown of an experiment."""
    ran = merged(study.base, [word for word in changed if not word.startswith("experiment.")])
    unit = study.metric if study.target is None else f"{study.along} until {study.metric} reaches {study.target:g}"
    unit = f"ln {unit}" if study.scale == "log" else unit
    lines = [f"## `{name}`", ""]
    if changed:
        lines += [f"**Not the experiment as written: {', '.join(f'`{word}`' for word in changed)}.**", ""]
    lines += [
        f"Compared: {unit}; {'less' if study.sign < 0 else 'more'} is better, {study.smallest:g} matters. "
        f"{study.seeds} seeds an arm, paired by partition, initial model and cohorts. "
        + (f"Rates: {_budget(study)}. " if study.tuned else "Nothing is tuned. ")
        + f"Command: `fedsim experiment {' '.join([name, *changed])}`. Every run: `{' '.join(ran)}`.",
        "",
        "| claim | cell | difference, 95 % | p (Holm) | p (equal) | detectable | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for claim in study.questions:
        own = [line for line in found.lines if line.claim == claim]
        text = claim.text or f"{claim.arm} > {claim.baseline}"
        for line in own:
            lines.append(f"| {text} | {_row(line.effect)} | {line.verdict} |")
        if len(own) > 1:
            lines.append(f"| {text} | **all** | | | | | **{overall([line.verdict for line in own])}** |")
    beside = [(line, control, e) for line in found.lines for control, e in line.controls.items()]
    if beside:
        lines += ["", "| against its control | cell | difference, 95 % | p (Holm) | p (equal) | detectable |",
                  "|---|---|---|---|---|---|"]  # fmt: skip
        lines += [f"| {line.claim.arm} − {control} | {_row(e)} |" for line, control, e in beside]
    lines += _checks(found)
    lines += ["", _means(study, found), ""]
    for metric, means in found.beside.items():
        lines += [f"Beside, of which nothing was asked: {metric}.", "", _table(study, found, means), ""]
    edges = [f"{one['arm']}, {one['cell']}: {edge}" for one in chosen for edge in one["edges"]]
    if edges:
        lines += ["On the edge of what was tried, so that the best may lie beyond: " + "; ".join(edges) + ".", ""]
    return "\n".join(lines)


def _budget(study: Study) -> str:
    points = len(next(iter(study.own.values())).points())
    return f"{points} points an arm and cell, by {study.tuning_metric} over {study.tuning_seeds} other seeds"


def _row(one: Effect) -> str:
    if one.diverged:
        return f"{one.cell} | runs diverged | {_p(one.adjusted)} | {_p(one.equivalence)} | –"
    return (
        f"{one.cell} | {one.test.mean:+.4g} ± {one.test.half:.2g} | {_p(one.adjusted)} | {_p(one.equivalence)} | "
        f"{one.detectable:.2g}"
    )


def _p(value: float) -> str:
    return "< 0.001" if value < 0.001 else f"{value:.3f}"


def _checks(found: Findings) -> list[str]:
    """Return what the null and the positive control say of the experiment itself."""
    lines: list[str] = []
    for role, effects in found.checks.items():
        for one in effects:
            seen = one.found or (role == "null" and one.lost)
            right = seen == (role == "positive") and not one.diverged
            what = "runs diverged" if one.diverged else "found" if seen else "no difference"
            lines.append(
                f"| {role}: {one.arm} − {one.baseline} | {_row(one)} | {what}{'' if right else ': **wrong**'} |"
            )
    if not lines:
        return []
    head = "| control of the experiment | cell | difference, 95 % | p (Holm) | p (equal) | detectable | says |"
    return ["", head, "|---|---|---|---|---|---|---|", *lines]


def _means(study: Study, found: Findings) -> str:
    head = "geometric mean" if study.scale == "log" else "arm"
    return _table(study, found, {key: _mean(study, found, key) for key in found.means}, head)


def _table(study: Study, found: Findings, means: Mapping[tuple[str, str], str | float], head: str = "arm") -> str:
    """Return a table of arms by cells; an arm without runs of its own may be missing."""
    cells = list(dict.fromkeys(cell for cell, _ in found.means))
    rows = [f"| {head} | {' | '.join(cells)} |", "|---" * (len(cells) + 1) + "|"]
    for arm in study.methods:
        values = [means.get((cell, arm)) for cell in cells]
        if None not in values:
            rows.append(f"| {arm} | {' | '.join(v if isinstance(v, str) else f'{v:.4g}' for v in values)} |")
    return "\n".join(rows)


def _mean(study: Study, found: Findings, key: tuple[str, str]) -> str:
    count = found.diverged[key]
    mean = math.exp(found.means[key]) if study.scale == "log" else found.means[key]
    if not count:
        return f"{mean:.4g}"
    return f"{mean:.4g}, {count} of {study.seeds} diverged" if count < study.seeds else "diverged"


def tree(found: Findings, chosen: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return everything as plain values."""
    return {
        "claims": [
            {"claim": asdict(line.claim), "verdict": line.verdict, "effect": asdict(line.effect),
             "controls": {name: asdict(e) for name, e in line.controls.items()}}
            for line in found.lines
        ],
        "checks": {role: [asdict(e) for e in effects] for role, effects in found.checks.items()},
        "means": [{"cell": cell, "arm": arm, "mean": mean, "diverged": found.diverged[cell, arm]}
                  for (cell, arm), mean in found.means.items()],
        "beside": [{"metric": metric, "cell": cell, "arm": arm, "mean": mean}
                   for metric, means in found.beside.items() for (cell, arm), mean in means.items()],
        "chosen": list(chosen),
    }  # fmt: skip


def put(path: Path, name: str, text: str) -> None:
    """Write a section into a page, in the place of the one of that name if there is one, and the overview of all."""
    old = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    block = f"{begin}\n{text.rstrip()}\n{end}"
    there = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", flags=re.DOTALL)
    new = there.sub(lambda _: block, old) if there.search(old) else f"{old.rstrip()}\n\n{block}\n"
    path.write_text(with_overview(new), encoding="utf-8")
