"""The report's pictures of time: by hand where they are drawn, and from runs where they are read."""

import re
from xml.etree import ElementTree

import numpy as np
import pytest

import fedsim
from fedsim.report import delay
from fedsim.report.bars import bars, timeline
from fedsim.report.command import report
from fedsim.report.runs import read

SMALL = {"data": "blobs", "model": "logreg", "threads": 1}
LATE = ("mode=fixed_delay", "mode.delay=2", "devices=intertwined", "devices.form=most", "devices.num_slow=2",
        "devices.target_class=1", "devices.slowdown=1.5", "partition.num_clients=6", "fraction=1",
        "metrics.every=1")  # fmt: skip


def parts(svg):
    return ElementTree.fromstring(svg)


def boxes(svg, style):
    """Return (x, y, width, height) of each box of a style."""
    found = [e.get("d") for e in parts(svg).iter("path") if e.get("class") == style]
    return [tuple(map(float, box)) for d in found for box in re.findall(r"M([\d.]+) ([\d.]+)h([\d.]+)v([\d.]+)h", d)]


def test_a_timeline_by_hand():
    """The axis begins at x = 44 and its 764 pixels are 10 seconds; rows are 13 high, from y = 26 on."""
    rows = np.array([0, 1, 1])
    spans = [
        ("f0", rows, np.array([0.0, 2.5, 9.0]), np.array([5.0, 5.0, 20.0])),
        ("held", np.array([0, 1]), np.array([5.0, 11.0]), np.array([10.0, 12.0])),
    ]
    svg = timeline("who & when", spans, (np.array([0, 1]), np.array([10.0, 10.1])), ["7", "3"], 10.0)
    assert boxes(svg, "fill f0") == [(44, 27.5, 382, 10), (235, 40.5, 191, 10), (731.6, 40.5, 76.4, 10)]  # cut at 10
    assert boxes(svg, "fill held") == [(426, 31, 382, 3)]  # what begins beyond the end is not there
    dots = [(float(e.get("cx")), float(e.get("cy"))) for e in parts(svg).iter("circle")]
    assert dots == [(808, 32.5)]
    texts = [e.text for e in parts(svg).iter("text")]
    assert texts[:3] == ["who & when", "7", "3"]
    assert "simulated seconds" in texts
    minutes = timeline("", spans, (rows[:0], np.zeros(0)), ["7", "3"], 600.0)
    assert {"simulated minutes", "10"} <= {e.text for e in parts(minutes).iter("text")}


def test_of_jobs_that_overlap_one_is_drawn():
    rows = np.array([1, 0, 0, 0, 0, 1])
    started, arrived = np.array([0.0, 2, 0, 1, 3, 2]), np.array([2.0, 5, 2, 3, 9, 4])
    assert delay._apart(rows, started, arrived).tolist() == [True, True, True, False, False, True]


def test_bars_by_hand():
    svg = bars("late", np.array([0, 1, 3]), np.array([0.25, 0.5, 0.25]), "rounds late")
    found = [e.get("d") for e in parts(svg).iter("path") if e.get("class") == "fill f0"]
    edges = [tuple(map(float, re.fullmatch(r"M([\d.]+) 142V([\d.]+)H([\d.]+)V142Z", d).groups())) for d in found]
    tops = np.array([top for _, top, _ in edges])
    np.testing.assert_allclose((142 - tops) / (142 - tops[0]), [1, 2, 1], atol=0.01)  # a tenth of a pixel
    assert [(round(left), round(right)) for left, _, right in edges] == [(53, 121), (139, 207), (311, 379)]
    many = bars("late", np.arange(100), np.full(100, 0.01), "rounds late")  # two numbers a bar
    assert many.count('class="fill f0"') == 50


def test_the_parts_of_a_job_fill_the_time_until_its_reply(tmp_path):
    fedsim.simulate(
        "mode=async", "mode.buffer=2", "mode.concurrency=4", "devices=lognormal", "devices.partial_work=0.5",
        "partition.num_clients=6", **SMALL, num_rounds=5, folder=tmp_path / "a",
    )  # fmt: skip
    jobs = delay.read(read([tmp_path / "a"])[0])
    assert len(jobs.clients) == 10
    np.testing.assert_allclose(jobs.download + jobs.compute + jobs.upload, jobs.arrived - jobs.started, rtol=1e-9)
    assert (jobs.staleness > 0).any()


def test_late_replies_are_held_back_for_their_round(tmp_path):
    fedsim.simulate(*LATE, **SMALL, num_rounds=4, folder=tmp_path / "a")
    jobs = delay.read(read([tmp_path / "a"])[0])
    late = jobs.staleness == 2
    assert late.sum() == 4
    held = jobs.arrived - jobs.started - jobs.download - jobs.compute - jobs.upload
    assert (held[late] > 0).all()
    np.testing.assert_allclose(held[~late], 0, atol=1e-12)


def test_runs_without_time_have_no_such_section(tmp_path):
    fedsim.simulate(**SMALL, num_rounds=1, folder=tmp_path / "a")
    text, _ = report([tmp_path / "a"])
    assert 'id="delay"' not in text


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name, strategy in (
        ("fedavg", ["strategy=fedavg"]),
        ("unstale", ["strategy=unstale", "strategy.uniqueness=false"]),
    ):
        fedsim.simulate(
            *LATE, "client=full_batch", *strategy, **SMALL, num_rounds=8, folder=folder / name
        )  # fmt: skip
    text, _ = report([folder])
    return text[text.index('<section id="delay">') :].partition("</section>")[0]


def test_the_section_has_all_pictures(page):
    titles = re.findall(r'class="title"[^>]*>([^<]*)<', page)
    assert titles[:4] == ["who trains when", "recall 1 (%)", "E1 and E2 · unstale", "staleness of replies"]
    assert {"gamma", "num inverted"} & set(titles) or "inversion disparity" in titles
    assert titles.count("who trains when") == 1  # equal times are drawn once
    drawn = page[page.index(">who trains when<") :].partition("</svg>")[0]
    for kind in ("fill f0", "fill f1", "fill held", "fill idle"):
        assert f'class="{kind}" d="M' in drawn


def test_an_inner_rule_is_part_of_the_method(page):
    assert "strategy@strategy.rule" not in page
