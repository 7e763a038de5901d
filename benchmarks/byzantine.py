"""Rules × attacks × heterogeneity on the digits: final test accuracy, mean over seeds with its 95 % interval.

    python -m benchmarks.byzantine [--seeds N] [--alphas A,…] [--json FILE] [--picture FILE] [override ...]
    python -m benchmarks.byzantine --of FILE --picture FILE       what was written before, drawn

20 clients, all in every round, 4 of them Byzantine; every rule that has to be told is told 4. Logistic regression, 20
rounds, one local rate for all: nothing is tuned for any cell, so that a row compares rules under one setting and no
more. Seeds change partition, model, data order and who attacks. 294 runs with three seeds.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import fedsim
from benchmarks import harness
from fedsim.report.statistics import mean_of

NUM_CLIENTS, NUM_BYZANTINE = 20, 4
TOLD = f"strategy.num_byzantine={NUM_BYZANTINE}"
RULES = {
    "mean": ["strategy=fedavg"],
    "median": ["strategy=median"],
    "trimmed mean": ["strategy=trimmed_mean", TOLD],
    "multi-Krum": ["strategy=multi_krum", TOLD],
    "geometric median": ["strategy=geometric_median"],
    "NNM + trimmed mean": ["strategy=nnm", TOLD, f"strategy.rule.num_byzantine={NUM_BYZANTINE}"],
    "Flag": ["strategy=flag"],
}
ATTACKS = {
    "none": [],
    "label flip": ["attack=label_flip"],
    "sign flip": ["attack=sign_flip"],
    "IPM ε=5": ["attack=ipm", "attack.epsilon=5"],
    "ALIE": ["attack=alie"],
    "min-max": ["attack=min_max"],
    "mimic": ["attack=mimic"],
}
SETTING = (
    f"partition.num_clients={NUM_CLIENTS}", "fraction=1.0", "model=logreg", "num_rounds=20", "metrics.every=20",
    "metrics.clients_every=20", "checkpoint.every=1000", "threads=1",
)  # fmt: skip


def accuracies(rule: str, attack: str, alpha: float, seeds: int, overrides: list[str]) -> list[float]:
    """Return the final test accuracy of each seed."""
    share = [f"attack.fraction={NUM_BYZANTINE / NUM_CLIENTS}"] if ATTACKS[attack] else []
    own = {override.split("=")[0] for override in overrides}
    setting = [override for override in SETTING if override.split("=")[0] not in own]
    given = [*setting, *RULES[rule], *ATTACKS[attack], *share, f"partition.alpha={alpha}", *overrides]
    figures = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            result = fedsim.simulate(*given, seed=seed, folder=Path(folder, "run"))
        figures.append(float(result.summary["accuracy"]))
    return figures


def table(alpha: float, figures: dict[str, dict[str, list[float]]]) -> str:
    """Return one Markdown table, in per cent; the best rule of each attack in bold."""
    lines = [f"| α = {alpha:g} | {' | '.join(ATTACKS)} |", "|---" * (len(ATTACKS) + 1) + "|"]
    best = {attack: max(figures, key=lambda rule: sum(figures[rule][attack])) for attack in ATTACKS}
    for rule, row in figures.items():
        cells = []
        for attack, values in row.items():
            mean = mean_of([100 * value for value in values])
            text = f"{mean.mean:.1f}" + ("" if mean.half is None else f" ± {mean.half:.1f}")
            cells.append(f"**{text}**" if best[attack] == rule else text)
        lines.append(f"| {rule} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(figures: dict[str, dict[str, dict[str, list[float]]]], path: Path) -> None:
    """Draw mean accuracies, rules × attacks, a panel for each setting.

    Args:
        figures: setting → rule → attack → accuracy of each seed.
        path: of the PNG.

    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    first = next(iter(figures.values()))
    rules, attacks = list(first), list(next(iter(first.values())))
    width = 2.6 + 0.75 * len(attacks) * len(figures)
    figure = Figure(figsize=(width, 1.6 + 0.42 * len(rules)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(figures), squeeze=False, sharey=True)[0]
    for axes, (setting, rows) in zip(panels, figures.items(), strict=True):
        means = [[100 * sum(rows[rule][attack]) / len(rows[rule][attack]) for attack in attacks] for rule in rules]
        image = axes.imshow(means, cmap="viridis", vmin=0, vmax=100, aspect="auto")
        axes.set_title(setting.replace("alpha=", "α = "))
        axes.set_xticks(range(len(attacks)), attacks, rotation=35, ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rules)), rules)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        for i, row in enumerate(means):
            for j, value in enumerate(row):
                dark = value < 60  # of the colour map: white is read on it
                axes.text(j, i, f"{value:.0f}", ha="center", va="center", color="white" if dark else "black")
    figure.colorbar(image, ax=list(panels), label="test accuracy, %", shrink=0.9)
    figure.savefig(path)


def main() -> None:
    """Run all cells, print a table for each α, and draw them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--alphas", default="0.1,1", help="of the Dirichlet partition, by commas")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every run's accuracy there")
    parser.add_argument("--picture", type=Path, metavar="FILE", help="draw rules × attacks there, a PNG")
    parser.add_argument("--of", type=Path, metavar="FILE", help="run nothing: take the figures of an earlier --json")
    parser.add_argument("overrides", nargs="*", help="for all runs, e.g. num_rounds=50")
    given = parser.parse_args()
    if given.of:
        stored = json.loads(given.of.read_text(encoding="utf-8"))
        figures = {setting: rows for setting, rows in stored.items() if setting.startswith("alpha=")}
    else:
        figures = {}
        for alpha in map(float, given.alphas.split(",")):
            figures[f"alpha={alpha:g}"] = rows = {
                rule: {attack: accuracies(rule, attack, alpha, given.seeds, given.overrides) for attack in ATTACKS}
                for rule in RULES
            }
            print(f"\n{table(alpha, rows)}", flush=True)
    if given.json:
        results = {"machine": harness.machine(), **figures}
        given.json.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if given.picture:
        picture(figures, given.picture)


if __name__ == "__main__":
    main()
