"""Reports: how runs are read and grouped, the table's figures by hand, and a page that is whole in itself."""

import base64
import doctest
import importlib
import json
import re
import shutil
import struct
import subprocess
import zlib
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from scipy import stats

import fedsim
from fedsim import cli
from fedsim.errors import UserError
from fedsim.report import maps, tables
from fedsim.report.charts import Line, heat_map, line_chart
from fedsim.report.command import report
from fedsim.report.difference import compare
from fedsim.report.groups import differing, group
from fedsim.report.page import columns_for
from fedsim.report.runs import read
from fedsim.report.statistics import holm

SEEDS = 4
FINAL = {  # (strategy, alpha) → accuracy of each seed
    ("fedavg", 0.1): [0.80, 0.82, 0.78, 0.81],
    ("fedavg", 1): [0.90, 0.91, 0.92, 0.90],
    ("mine", 0.1): [0.84, 0.87, 0.83, 0.85],
    ("mine", 1): [0.90, 0.92, 0.91, 0.91],
    ("worse", 0.1): [0.70, 0.71, 0.69, 0.72],
    ("worse", 1): [0.80, 0.80, 0.81, 0.82],
}


def write_run(
    folder: Path, *, strategy="fedavg", alpha=0.5, seed=0, accuracy=0.9, ended=True, timed=True, **config
) -> Path:
    """Write what a report reads of a run folder, small."""
    folder.mkdir(parents=True)
    client = "margin" if strategy == "mine" else "sgd"
    tree = {
        "num_rounds": 3, "seed": seed, "threads": seed, **config,
        "strategy": {"_target_": f"x.{strategy}", "server_lr": 1.0}, "client": {"lr": 0.3},
        "partition": {"alpha": alpha, "seed": None},
        "hydra": {
            "runtime": {"choices": {"strategy": strategy, "client": client, "data": "digits", "tracker": str(seed)}},
            "overrides": {"task": [f"strategy={strategy}", f"partition.alpha={alpha}", f"seed={seed}"]},
        },
    }  # fmt: skip
    (folder / "config.yaml").write_text(yaml.safe_dump(tree))
    rows = [
        {
            "round": r, "accuracy": accuracy * r / 3, "loss": 1.0 / r, "evaluated": r != 2, "recall_0": 0.5,
            "recall_10": 0.25, "bytes_up": 100, "bytes_down": 200, "simulated_seconds": 10.0 * r,
            **({"num_lost": 0} if timed else {}),
            "quality_score": r * accuracy, "fixed": 3.0, "note": "text", "drift_ratio": 0.5 / r,
        }
        for r in (1, 2, 3)
    ]  # fmt: skip
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "timings.jsonl").write_text(json.dumps({"round": 1, "seconds_train": 0.5, "seconds_record": None}) + "\n")
    if ended:
        summary = {"status": "done", "accuracy": accuracy, "loss": 1 / 3, "num_rounds": 3, "plan": {"threads": 1}}
        (folder / "summary.json").write_text(json.dumps(summary))
    return folder


@pytest.fixture
def sweep(tmp_path):
    for (strategy, alpha), figures in FINAL.items():
        for seed, accuracy in enumerate(figures):
            write_run(
                tmp_path / f"{strategy}-{alpha}" / str(seed),
                strategy=strategy,
                alpha=alpha,
                seed=seed,
                accuracy=accuracy,
            )
    return tmp_path


@pytest.mark.parametrize("name", ["runs", "groups", "tables", "charts"])
def test_examples(name):
    result = doctest.testmod(importlib.import_module(f"fedsim.report.{name}"))
    assert result.attempted > 0
    assert result.failed == 0


# ---- runs and groups


def test_a_series_leaves_out_what_was_not_measured(tmp_path):
    (run,) = read([write_run(tmp_path / "run")])
    rounds, values = run.series("accuracy")
    assert rounds.tolist() == [1, 3]  # round 2 repeats the last known value
    assert values.tolist() == pytest.approx([0.3, 0.9])
    assert run.series("drift_ratio")[0].tolist() == [1, 2, 3]
    assert run.total("bytes_up", "bytes_down").tolist() == [300, 600, 900]
    assert run.results == {"accuracy": 0.9, "loss": 1 / 3, "num_rounds": 3.0}


def test_groups_are_methods_in_settings_by_the_fewest_keys(sweep):
    table = group(read([sweep]))
    assert table.methods == ("fedavg", "mine", "worse")  # the client always comes with the strategy
    assert table.settings == ("alpha=0.1", "alpha=1")
    assert all([run.config["seed"] for run in g.runs] == list(range(SEEDS)) for g in table.all)
    assert len(table.all) == 6


def test_one_method_in_several_settings_compares_the_settings(tmp_path):
    for alpha in (10, 0.5, 2):
        write_run(tmp_path / str(alpha), alpha=alpha)
    table = group(read([tmp_path]))
    assert table.methods == ("alpha=0.5", "alpha=2", "alpha=10")  # by value, not by spelling
    assert table.settings == ("",)


def test_repetitions_differ_in_seeds_threads_and_trackers_only(tmp_path):
    for seed in range(3):
        write_run(tmp_path / str(seed), seed=seed)
    runs = read([tmp_path])
    assert differing(runs) == []
    (only,) = group(runs).all
    assert (only.name, len(only.runs)) == ("fedavg", 3)


def test_equal_ends_of_keys_are_spelled_out(tmp_path):
    for i, (a, b) in enumerate([(1, 1), (1, 2), (2, 1)]):
        write_run(tmp_path / str(i), first={"rate": a}, second={"rate": b})
    assert set(group(read([tmp_path])).methods) == {
        "first.rate=1 second.rate=1", "first.rate=1 second.rate=2", "first.rate=2 second.rate=1",
    }  # fmt: skip


def test_wrong_folders_are_named(tmp_path):
    with pytest.raises(UserError, match="nix: no such folder"):
        read([tmp_path / "nix"])
    with pytest.raises(UserError, match="holds no runs"):
        read([tmp_path])
    run = write_run(tmp_path / "run")
    (run / "config.yaml").write_text("a: 1\n")
    with pytest.raises(UserError, match=r"config.yaml is not the config of a run"):
        read([tmp_path])


# ---- the table


def test_the_table_by_scipy(sweep):
    table = group(read([sweep]))
    comparison = tables.compare(table, "accuracy", "fedavg")
    keys = [(m, f"alpha={a}") for m, a in FINAL if m != "fedavg"]
    expected = [stats.ttest_rel(FINAL[m, a], FINAL["fedavg", a]).pvalue for m, a in FINAL if m != "fedavg"]
    for key, p in zip(keys, holm(expected), strict=True):
        assert comparison.cells[key].p == pytest.approx(p, abs=1e-12)
    low, high = stats.t.interval(0.95, 3, np.mean(FINAL["mine", 0.1]), stats.sem(FINAL["mine", 0.1]))
    mean = comparison.cells["mine", "alpha=0.1"].mean
    assert (mean.mean - mean.half, mean.mean + mean.half) == pytest.approx((low, high))
    best = {key for key, cell in comparison.cells.items() if cell.best}
    # mine is significantly better at 0.1; at 1 it ties with fedavg (equal seeds differ by −.01, 0, .01, .01)
    assert best == {("mine", "alpha=0.1"), ("mine", "alpha=1"), ("fedavg", "alpha=1")}
    lower = tables.compare(table, "loss", "fedavg")
    assert all(cell.best for cell in lower.cells.values())  # all equal


def test_unpaired_seeds_and_lone_runs_make_no_tests(tmp_path):
    for i, strategy in enumerate(("fedavg", "mine")):
        write_run(tmp_path / strategy, strategy=strategy, seed=i, accuracy=0.8 + i / 10)
    table = group(read([tmp_path]))
    comparison = tables.compare(table, "accuracy", "fedavg")
    assert [cell.p for cell in comparison.cells.values()] == [None, None]
    assert [key[0] for key, cell in comparison.cells.items() if cell.best] == ["mine"]
    assert "±" not in tables.markdown(comparison, table)
    assert "interval" not in tables.caption(comparison, table)


def test_formats_agree(sweep, capsys):
    for form, pieces in {
        "markdown": ["| fedavg |", "**84.75 ± ", r"\*"],
        "latex": [r"\toprule", r"\textbf{84.75 $\pm$ ", "$^{*}$", r"Accuracy (\%)"],
        "csv": ["mine,alpha=0.1,accuracy,4,0.8475"],
    }.items():
        assert cli.main(["report", str(sweep), "--format", form]) == 0
        out, err = capsys.readouterr()
        assert err == ""
        for piece in pieces:
            assert piece in out, (form, piece)
    assert not (sweep / "report.html").exists()


def test_latex_survives_hostile_names(tmp_path):
    for i, name in enumerate(["a_b%", "c&d#", "e~f^\\"]):
        write_run(tmp_path / str(i), strategy=name)
    text = report([tmp_path], format="latex")[0]
    assert r"a\_b\%" in text
    assert r"c\&d\#" in text
    assert r"e\textasciitilde{}f\textasciicircum{}\textbackslash{}" in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "needs a folder"),
        (("nix",), "nix: no such folder"),
        ((".", "--format", "pdf"), "--format pdf: no such format; known: csv, html, latex, markdown"),
        ((".", "--baseline", "mien"), "--baseline mien: no such method; did you mean 'mine'?"),
        ((".", "--metric", "acuracy"), "--metric acuracy: no run has such a result; did you mean 'accuracy'?"),
        ((".", "--out", "config/x.html"), "config/x.html cannot be written"),
    ],
)
def test_wrong_input_is_one_line(words, message, sweep, monkeypatch, capsys):
    monkeypatch.chdir(sweep)
    (sweep / "config").write_text("a file where a folder should be")
    assert cli.main(["report", *words]) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.count("\n") == 1


# ---- the page


class Page(HTMLParser):
    """Checks that tags are balanced and collects what a browser would fetch or run."""

    VOID = ("meta", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: dict[str, int] = {}
        self.links: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        self.seen[tag] = self.seen.get(tag, 0) + 1
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href", "action")]
        assert not any(name.startswith("on") for name, _ in attributes)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.handle_starttag(tag, attributes)
        if tag not in self.VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def check_whole(text: str) -> Page:
    page = Page(text)
    assert all(link.startswith(("data:", "#")) for link in page.links)
    assert "script" not in page.seen
    assert "@import" not in text
    assert "url(" not in text
    assert not re.search(r"\b(nan|inf|None)\b", re.sub(r"data:[^\"]*", "", text))
    for link in page.links:
        if link.startswith("#"):
            assert f'id="{link[1:]}"' in text
    return page


@pytest.mark.parametrize(("format", "has_caption"), [("markdown", True), ("latex", True), ("csv", False)])
def test_a_table_says_how_many_runs_it_leaves_out(tmp_path, capsys, format, has_caption):
    write_run(tmp_path / "a", seed=0)
    report([tmp_path], format=format)
    assert capsys.readouterr().err == ""
    write_run(tmp_path / "b", seed=1, ended=False)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "plan.json").write_text("{}")  # it failed in its first round
    rows = [{"trial": "d", "state": "failed"}, {"trial": "a", "state": "done"}]
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": rows}))
    text, _ = report([tmp_path], format=format)
    line = "3 of 4 runs failed or have not ended, and are left out."
    assert (line in text) == has_caption
    assert capsys.readouterr().err == f"note: {line}\n"


def test_the_page_is_whole_and_the_same_each_time(sweep):
    write_run(sweep / "half", strategy="mine", alpha=0.1, seed=9, ended=False)
    text, out = report([sweep])
    assert out == sweep / "report.html"
    assert report([sweep])[0] == text
    page = check_whole(text)
    assert page.seen["svg"] > 20
    assert "1 of 25 runs have not ended and are left out: half." in text
    for words in ("84.75 ± ", "no difference", "quality score", "simulated seconds", "kB sent, both ways"):
        assert words in text
    assert "fixed" not in text.partition('id="figures"')[0]  # one constant: no curve


def test_without_devices_no_chart_is_over_simulated_time(tmp_path):
    for name, timed in (("timed", True), ("untimed", False)):
        write_run(tmp_path / name, timed=timed)
        text = report([tmp_path / name])[0]
        assert text.count("kB sent, both ways") == 1
        assert text.count(">simulated seconds<") == timed


@pytest.mark.parametrize(("count", "kind"), [(2, ""), (3, ""), (4, "by2"), (5, ""), (7, "by4"), (10, "by2"), (13, "")])
def test_no_chart_is_left_alone_in_its_row(count, kind):
    assert columns_for(count) == kind


def tuned_folder(folder):
    """Write what `fedsim tune` leaves: the runs of a search, those of the report, and what was chosen."""
    for seed in (0, 1):
        for strategy in ("fedavg", "mine"):
            write_run(folder / "report" / f"{strategy}-{seed}", strategy=strategy, seed=seed)
    write_run(folder / "search" / "0", seed=1000)
    (folder / "search" / "1").mkdir()
    (folder / "search" / "1" / "plan.json").write_text("{}")
    (folder / "search" / "trials.json").write_text('{"words": []}')
    methods = [
        {"values": {"strategy": name}, "best": {"client.lr": 0.3}, "score": 0.875, "failed": 0, "edges": edges}
        for name, edges in (("fedavg", []), ("mine", ["strategy=mine: client.lr=0.3 is the highest that was tried"]))
    ]
    tuning = {"metric": "validation_accuracy", "search": "grid"}
    tree = {"tuning": tuning, "budget": {"points": 3, "seeds": [1000, 1001]}, "methods": methods}
    (folder / "tune.json").write_text(json.dumps(tree))


def test_a_tuning_is_reported_without_its_search_and_with_its_budget(tmp_path):
    tuned_folder(tmp_path / "tuned")
    given = "tuned before, on other seeds: 3 trials × 2 seeds by grid search, chosen by validation accuracy."
    for folder in (tmp_path / "tuned", tmp_path, tmp_path / "tuned" / "report"):
        text = report([folder], format="markdown")[0]
        assert "mean of 2 runs" in text
        assert given in text
        assert "left out" not in text  # a run of the search is not missing
    page = report([tmp_path / "tuned"])[0]
    check_whole(page)
    assert "<td>mine</td><td>client.lr=0.3</td><td>87.50 %</td><td>0</td><td>client.lr=0.3 is the highest" in page
    alone = report([tmp_path / "tuned" / "search"], format="markdown")[0]  # asked for by name
    assert "1 of 2 runs failed or have not ended" in alone
    assert given not in alone


def test_attackers_are_below_the_others_and_have_a_section(tmp_path, monkeypatch):
    folder = write_run(tmp_path / "run")
    rows = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {
            "honest_accuracy_mean": row["accuracy"],
            "honest_distance": 0.5,
            "honest_accuracy_jain": 0.1 * row["round"],
        }
    (folder / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    columns = {
        "round": [1] * 4,
        "client": [0, 1, 2, 3],
        "byzantine": [1.0, 0.0, 0.0, 1.0],
        "score": [0.0, 2.0, 1.0, 3.0],
    }
    pq.write_table(pa.table(columns), folder / "clients.parquet")
    drawn = []

    def draw(title, values, **how):
        drawn.append((title, values))
        return heat_map(title, values, **how)

    monkeypatch.setattr(maps, "heat_map", draw)
    text = report([folder])[0]
    check_whole(text)
    assert [(title, values.ravel().tolist()) for title, values in drawn if "score" in title] == [
        ("score · fedavg", [1.0, 2.0, 0.0, 3.0])
    ]
    assert "client, attackers below" in text
    assert "byzantine ·" not in text
    own = text.partition('<section id="attack">')[2].partition("</section>")[0]
    assert "honest distance" in own
    assert "honest accuracy jain" not in own
    assert "honest" not in text.partition('<section id="recorded">')[2].partition("</section>")[0]


def test_hostile_names_are_text(tmp_path):
    write_run(tmp_path / "<b>x", strategy="<script>alert(1)</script>", accuracy=0.5)
    write_run(tmp_path / "&", strategy='"&<', accuracy=0.6)
    text, _ = report([tmp_path])
    check_whole(text)
    assert "&lt;script&gt;" in text


def test_a_run_that_goes_on_is_reported_as_far_as_it_is(tmp_path):
    write_run(tmp_path / "run", ended=False)
    text, _ = report([tmp_path / "run"])
    check_whole(text)
    assert "No run has ended yet" in text


def test_a_page_of_a_real_run(tmp_path):
    for seed in (0, 1):
        fedsim.simulate(
            "metrics.decomposition_every=1",
            "metrics.cosines=true",
            data="blobs",
            model="logreg",
            num_rounds=2,
            seed=seed,
            folder=tmp_path / str(seed),
        )
    text, _ = report([tmp_path])
    page = check_whole(text)
    for title in ("Results", "Curves", "Clients", "Classes", "Partition", "Drift", "The loss, term by term", "Time"):
        assert f"<h2>{title}</h2>" in text
    assert page.seen["image"] >= 2
    assert "cosine mean" in text


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_a_browser_draws_it_without_a_complaint_or_a_request(sweep, tmp_path):
    def complaints(page: Path) -> list[str]:
        picture = page.with_suffix(".png")
        words = [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--enable-logging=stderr", "--window-size=1200,2000",
            f"--user-data-dir={tmp_path / 'profile'}", f"--screenshot={picture}", page.as_uri(),
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=120)
        assert picture.stat().st_size > 5_000, done.stderr
        return [line for line in done.stderr.splitlines() if "CONSOLE" in line]

    text, _ = report([sweep], out=tmp_path / "page.html")
    assert complaints(tmp_path / "page.html") == []
    planted = tmp_path / "planted.html"
    planted.write_text(text.replace("</body>", '<img src="http://example.invalid/x.png"></body>'))
    assert any("example.invalid" in line for line in complaints(planted))  # its own policy forbids it


# ---- drawings


def test_lines_stay_in_their_panel_and_missing_points_are_left_out():
    x = np.arange(1.0, 1001)
    y = np.where(x % 7 == 0, np.nan, np.sin(x))
    text = line_chart("t", [Line("a", 0, x, y, y - 0.1, y + 0.1)], "round")
    (path,) = re.findall(r'class="line s0" d="M([^"]+)"', text)
    points = np.array([[float(v) for v in pair.split()] for pair in path.split("L")])
    assert 200 < len(points) <= 250
    assert np.isfinite(points).all()
    assert points.min() >= 0
    assert points[:, 0].max() <= 400
    assert points[:, 1].max() <= 250


def test_the_axis_is_logarithmic_over_three_decades_only():
    x = np.arange(1.0, 5)
    for values, expected in (([1, 10, 100, 1001], True), ([1, 10, 100, 999], False), ([0, 10, 100, 9999], False)):
        y = np.array(values, dtype=float)
        assert ("logarithmic" in line_chart("t", [Line("a", 0, x, y, y, y)], "round")) is expected


def test_a_heat_map_is_a_png_of_its_values():
    values = np.array([[0.0, 1.0, np.nan], [0.5, 2.0, -1.0]])
    text = heat_map("t", values, axes=("r", "c"), span=(0.0, 1.0))
    raw = base64.b64decode(re.search(r"base64,([^\"]+)", text)[1])
    assert raw[:8] == b"\x89PNG\r\n\x1a\n"
    assert struct.unpack(">II", raw[16:24]) == (3, 2)
    length = struct.unpack(">I", raw[33:37])[0]
    assert raw[37:41] == b"IDAT"
    rows = np.frombuffer(zlib.decompress(raw[41 : 41 + length]), np.uint8).reshape(2, 13)
    pixels = rows[:, 1:].reshape(2, 3, 4)
    low, high = (68, 1, 84, 255), (253, 231, 37, 255)  # viridis' ends
    assert tuple(pixels[0, 0]) == low == tuple(pixels[1, 2])
    assert tuple(pixels[0, 1]) == high == tuple(pixels[1, 1])
    assert pixels[0, 2, 3] == 0  # missing: the page shows through
    assert tuple(pixels[1, 0]) not in (low, high)


def test_a_heat_map_with_names_of_its_ends_has_them_at_its_ends():
    text = heat_map("t", np.zeros((5, 4)), axes=("rank", "round"), span=(0.0, 1.0), names=(["1", "900"], ["3", "60"]))
    at = {
        name: (float(x), anchor)
        for x, anchor, name in re.findall(r'x="([\d.]+)" y="[\d.]+" text-anchor="(\w+)">(\w+)<', text)
    }
    assert at["1"][1] == at["900"][1] == "end"
    assert (at["3"][1], at["60"][1]) == ("start", "end")
    assert at["60"][0] - at["3"][0] > 300
    assert "rank" in text


# ---- compare


def test_compare_pairs_by_seed_and_setting(sweep, capsys):
    for i, name in enumerate(("fedavg", "mine")):
        (sweep / name).mkdir()
        for alpha in ("0.1", "1"):
            (sweep / f"{name}-{alpha}").rename(sweep / name / f"{i}-{alpha}")
    assert cli.main(["compare", str(sweep / "fedavg"), str(sweep / "mine")]) == 0
    out = capsys.readouterr().out
    a = [v for (m, _), values in FINAL.items() if m == "fedavg" for v in values]
    b = [v for (m, _), values in FINAL.items() if m == "mine" for v in values]
    half = stats.ttest_rel(b, a).confidence_interval()
    expected = f"+{100 * np.mean(np.subtract(b, a)):.2f} ± {50 * (half.high - half.low):.2f}"
    (line,) = (line for line in out.splitlines() if line.startswith("accuracy"))
    assert expected in line
    assert "B − A over 8 pairs of equal seeds" in out
    assert re.search(r"strategy +fedavg +mine", out)
    assert "partition.alpha" not in out  # both have both
    assert "2 more results equal." in out


def test_compare_of_a_run_with_itself_and_of_lone_runs(tmp_path):
    for name, extra in (("a", {}), ("b", {}), ("c", {"seed": 1}), ("d", {"strategy": "fedprox"})):
        settings = {"strategy": "fedavg", "num_rounds": 2, "data": "blobs", "model": "logreg"} | extra
        fedsim.simulate("partition.num_clients=10", folder=tmp_path / name, **settings)
    same = compare(tmp_path / "a", tmp_path / "b")
    assert "config: equal" in same
    assert "final weights: equal to the bit" in same
    assert "are equal" in same
    other = compare(tmp_path / "a", tmp_path / "c")
    assert re.search(r"^seed +0 +1$", other, re.MULTILINE)
    assert "final weights: differ" in other
    assert "accuracy of the same client" not in other  # another seed, another partition
    assert "no interval, and no test" in other
    assert "client.proximal_mu" in compare(tmp_path / "a", tmp_path / "d")


@pytest.mark.parametrize(
    ("seeds", "said", "cells"),
    [
        ((0,), "A, B and B − A are of seed 0 alone.", r"80\.00 +84\.00 +\+4\.00 "),
        ((0, 2), "A, B and B − A are of the 2 seeds that both have.", r"79\.00 ± \S+ +83\.50 ± \S+ +\+4\.50 ± "),
        ((7,), "No run of A has its seeds in B: A and B are of all their runs", r"80\.25 ± \S+ +84\.00 +– "),
    ],
)
def test_compare_of_unequal_seeds_has_one_population_a_row(tmp_path, seeds, said, cells):
    for seed, accuracy in enumerate(FINAL["fedavg", 0.1]):
        write_run(tmp_path / "a" / str(seed), seed=seed, accuracy=accuracy)
    for seed, accuracy in zip(seeds, FINAL["mine", 0.1][::2], strict=False):
        write_run(tmp_path / "b" / str(seed), strategy="mine", seed=seed, accuracy=accuracy)
    out = compare(tmp_path / "a", tmp_path / "b")
    assert said in out
    (line,) = (line for line in out.splitlines() if line.startswith("accuracy"))
    assert re.search(cells, line), line


def test_compare_needs_two_folders(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "fedsim: fedsim compare takes two folders, got 1\n"
