"""Experiments: verdicts against simulated truths and hand cases, and a whole one at toy size."""

import json
import math
import re

import numpy as np
import pytest
from scipy import stats

from fedsim.config import compose
from fedsim.errors import UserError
from fedsim.study import page, verdict
from fedsim.study.drive import OTHER_SEEDS, Asked, _judge, _overrides, _write, experiment
from fedsim.study.figure import figure
from fedsim.study.overview import with_overview
from fedsim.study.spec import Study, build, load, merged
from fedsim.sweep.board import Board

ARMS = {"a": ["strategy=fedavg"], "b": ["strategy=fedavg"], "c": {"like": "a", "reseed": True}}
CLAIM = {"arm": "a", "baseline": "b"}


def effects(differences, smallest=1.0, sign=1):
    return [verdict.effect("all", ("a", "b"), (d, np.zeros(len(d))), sign=sign, smallest=smallest) for d in differences]


@pytest.mark.parametrize("seed", range(4))
def test_effect_against_scipy(seed):
    rng = np.random.default_rng(seed)
    x, y = rng.normal(0.3, size=8), rng.normal(size=8)
    one = verdict.effect("all", ("a", "b"), (x, y), sign=1, smallest=0.5)
    test = stats.ttest_rel(x, y)
    assert one.test.p == pytest.approx(test.pvalue, rel=1e-9)
    low, high = test.confidence_interval(0.95)
    assert (one.test.mean - one.test.half, one.test.mean + one.test.half) == pytest.approx((low, high), rel=1e-9)
    sides = (stats.ttest_1samp(x - y, -0.5, alternative="greater"), stats.ttest_1samp(x - y, 0.5, alternative="less"))
    assert one.equivalence == pytest.approx(max(side.pvalue for side in sides), rel=1e-9)
    error = np.std(x - y, ddof=1) / np.sqrt(8)
    assert one.detectable == pytest.approx((stats.t.ppf(0.975, 7) + stats.t.ppf(0.8, 7)) * error, rel=1e-9)
    other = verdict.effect("all", ("a", "b"), (x, y), sign=-1, smallest=0.5)
    assert other.test.mean == pytest.approx(-one.test.mean)


def test_detectable_is_what_four_of_five_experiments_find():
    rng = np.random.default_rng(0)
    size = 2.0
    detectable = np.median([e.detectable for e in effects(rng.normal(0, size, (400, 10)))])
    found = [e.found for e in effects(rng.normal(detectable, size, (400, 10)))]
    assert 0.74 < np.mean(found) < 0.88  # binomial noise of 400, and the median's own


def test_verdicts():
    clear, none, wide, small, worse = effects(
        [[3, 3.1, 2.9, 3, 3.1], [0.1, -0.1, 0.05, 0, 0], [5, -5, 4, -4, 1], [0.1, 0.11, 0.1, 0.09, 0.1],
         [-3, -3.1, -2.9, -3, -3]]
    )  # fmt: skip
    assert verdict.verdict(clear, {}, 1.0) == "holds"
    assert verdict.verdict(clear, {"rate": clear}, 1.0) == "holds"
    assert verdict.verdict(clear, {"rate": wide, "noise": clear}, 1.0) == "holds only through a control: rate"
    assert verdict.verdict(none, {}, 1.0) == "no difference that matters"
    assert verdict.verdict(wide, {}, 1.0) == "not shown at this power"
    assert verdict.verdict(small, {}, 1.0) == "found, but less than matters"
    assert verdict.verdict(worse, {}, 1.0) == "the opposite holds"
    assert verdict.overall(["holds", "holds"]) == "holds"
    assert verdict.overall(["holds", "holds only through a control: x", "holds"]) == (
        "holds in 2 of 3; holds only through a control in 1 of 3"
    )


def test_holm_keeps_the_family_wise_error():
    """Of 300 experiments with 12 true nulls each, at most 5 % may find anything."""
    rng = np.random.default_rng(1)
    wrong = []
    for _ in range(300):
        family = verdict.adjusted(effects(rng.normal(size=(12, 10))))
        wrong.append(any(e.found or e.lost for e in family))
    assert np.mean(wrong) < 0.05 + 3 * np.sqrt(0.05 * 0.95 / 300)
    assert np.mean([any(e.found or e.lost for e in effects(rng.normal(size=(12, 10)))) for _ in range(50)]) > 0.2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"claims": [{"arm": "a", "baseline": "d"}]}, "claims name the arm 'd'"),
        ({"claims": [{"arm": "a"}]}, "a claim has arm and baseline"),
        ({"arms": {**ARMS, "d": {"like": "x"}}}, "arms.d is like 'x'"),
        ({"arms": {**ARMS, "d": {"like": "a", "tune": ["client.lr=1,2"]}}}, "leave tune out"),
        ({"arms": {**ARMS, "d": {"tune": ["client.lr=1,2"]}}}, "as many points as every other"),
        ({"arms": {**ARMS, "d": {"sets": []}}}, "arms.d has no 'sets'"),
        ({"arms": {**ARMS, "d": {"like": "a", "replays": "x"}}}, "arms.d replays 'x'"),
        ({"arms": {**ARMS, "d": {"replays": "a"}}}, "say whose choice it takes"),
        ({"smallest": 0.0}, "smallest must be > 0"),
        ({"seeds": 1}, "seeds must be >= 2"),
        ({"null_control": {"arm": "e", "baseline": "a"}}, "claims name the arm 'e'"),
    ],
)
def test_an_experiment_is_checked_before_it_runs(changes, message):
    with pytest.raises(ValueError, match=message):
        Study(**{"claims": [CLAIM], "arms": ARMS, **changes})


def test_arms_like_others_and_later_overrides():
    study = Study(claims=[CLAIM], arms={**ARMS, "d": {"like": "a", "set": ["strategy=median", "num_rounds=1"]}})
    assert study.methods["d"].set == ("strategy=median", "num_rounds=1")
    assert merged(["+a=1", "b=2"], ["a=3"]) == ["a=3", "b=2"]
    assert [values for _, values in Study(claims=[CLAIM], arms=ARMS, settings=["x=1,2", "y=a,b"]).cells] == [
        {"x": 1, "y": "a"}, {"x": 1, "y": "b"}, {"x": 2, "y": "a"}, {"x": 2, "y": "b"},
    ]  # fmt: skip


SHIPPED = [
    "fedld", "flag", "fedhyper", "ef21", "ef21_tuned", "unstale", "unstale_dirichlet", "unstale_shift", "unstale_mnist",
    "fedld_hospitals", "flag_attackers", "flag_mnist", "fedhyper_cifar",
]  # fmt: skip


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_experiments_are_sound(name):
    study = build(load(name))
    assert study.seeds >= 10
    assert study.null_control is not None
    assert study.positive_control is not None
    assert all(claim.text for claim in study.questions)


YAML = """# A toy.
_target_: fedsim.study.spec.Study
claims: [{text: a beats b, arm: a, baseline: short, controls: [again]}]
arms:
  a: {set: [strategy=fedavg], tune: ["client.lr=0.0001,0.3"]}
  short: {like: a, set: [num_rounds=1]}
  again: {like: a, reseed: true}
base: [data=digits, model=logreg, partition.num_clients=4, num_rounds=8, metrics.every=1, threads=1, device=cpu]
settings: ["partition.alpha=1.0,5.0"]
seeds: 2
tuning_seeds: 1
null_control: {arm: again, baseline: a}
positive_control: {arm: a, baseline: short}
"""


@pytest.fixture
def toys(tmp_path):
    (tmp_path / "configs" / "experiment").mkdir(parents=True)
    (tmp_path / "configs" / "experiment" / "toy.yaml").write_text(YAML)
    rounds = YAML.replace('["partition.alpha=1.0,5.0"]', "[]\nmetric: accuracy\ntarget: 0.6\nsmallest: 1.0")
    (tmp_path / "configs" / "experiment" / "rounds.yaml").write_text(rounds)
    return tmp_path / "configs"


def _an_arm_comes_later(go, folder, toys, stamp):
    """Only its runs are done; yoked to the lengths of its own direction it is the same method."""
    yaml = toys / "experiment" / "toy.yaml"
    later = "  early: {like: a, set: [strategy=fedld_yoked, client=sgd], replays: a}\n  a: {set:"
    yaml.write_text(yaml.read_text().replace("  a: {set:", later).replace("controls: [again]", "controls: [early]"))
    assert "| a − early | alpha=5.0 |" in go()[1]
    assert stamp == {path: path.stat().st_mtime_ns for path in stamp}
    found = {(row["arm"], row["partition.alpha"], row["seed"]): row for row in
             json.loads((folder / "report" / "sweep.json").read_text())["trials"]}  # fmt: skip
    assert len(found) == 2 * 4 * 2
    for alpha, seed in ((1.0, 0), (1.0, 1), (5.0, 0), (5.0, 1)):
        assert found["early", alpha, seed]["loss"] == pytest.approx(found["a", alpha, seed]["loss"], rel=1e-4)
    # and metrics to show beside
    yaml.write_text(yaml.read_text() + "beside: [loss]\n")
    text = go()[1]
    assert stamp == {path: path.stat().st_mtime_ns for path in stamp}
    table = text.split("of which nothing was asked: loss.")[1].splitlines()
    loss = np.mean([found["early", 5.0, seed]["loss"] for seed in (0, 1)])
    assert table[4].split("|")[1].strip() == "early"
    assert float(table[4].split("|")[3]) == pytest.approx(loss, rel=1e-3)
    yaml.write_text(yaml.read_text().replace("client.lr=0.0001,0.3", "client.lr=0.0001,0.2"))
    with pytest.raises(UserError, match="holds another experiment"):
        go()


def test_a_whole_experiment(toys, tmp_path):
    def go(*words):
        return experiment("toy", [f"hydra.sweep.dir={tmp_path / 'out'}", "sweep.workers=1", *words], toys, Board())

    folder, text = go()
    results = json.loads((folder / "results.json").read_text())
    assert [one["point"] for one in results["chosen"]] == [{"client.lr": 0.3}] * 2  # 1e-4 learns nothing
    assert {check: [e["cell"] for e in effects] for check, effects in results["checks"].items()} == {
        "null": ["alpha=1.0", "alpha=5.0"], "positive": ["alpha=1.0", "alpha=5.0"],
    }  # fmt: skip
    trials = json.loads((folder / "report" / "sweep.json").read_text())["trials"]
    assert len(trials) == 2 * 3 * 2
    by_arm = {
        (row["arm"], row["partition.alpha"], row["seed"]): row for row in trials
    }  # values are the cell's, the arm, its point, the seed
    differences = [by_arm["a", 1.0, s]["accuracy"] - by_arm["short", 1.0, s]["accuracy"] for s in range(2)]
    (line,) = [one for one in results["claims"] if one["effect"]["cell"] == "alpha=1.0"]
    assert line["effect"]["test"]["mean"] == pytest.approx(np.mean(differences))
    assert set(line["controls"]) == {"again"}
    assert "Not the experiment as written" not in text
    assert "`fedsim experiment toy`" in text

    # pairs share partition, initial model and cohorts, and a reseeded arm nothing else
    def config(arm):
        return (folder / "report" / by_arm[arm, 1.0, 1]["trial"] / "config.yaml").read_text()

    assert f"seed: {1 + OTHER_SEEDS}" in config("again")
    a, other = (folder / "report" / by_arm[arm, 1.0, 1]["trial"] / "partition.npz" for arm in ("a", "again"))
    assert a.read_bytes() == other.read_bytes()
    assert by_arm["a", 1.0, 1]["loss"] != by_arm["again", 1.0, 1]["loss"]

    # the same command goes on, another is refused
    stamp = {p: p.stat().st_mtime_ns for p in folder.glob("report/*/summary.json")}
    (folder / "results.md").unlink()
    assert go()[1] == text
    assert stamp == {p: p.stat().st_mtime_ns for p in folder.glob("report/*/summary.json")}
    with pytest.raises(UserError, match="holds another experiment"):
        go("num_rounds=3")

    _an_arm_comes_later(go, folder, toys, stamp)

    target = tmp_path / "results.md"
    page.put(target, "other", "kept")
    for _ in range(2):
        page.put(target, "toy", text)
    assert target.read_text().count("## `toy`") == 1
    assert "kept" in target.read_text()


def test_a_command_changes_no_arm_that_sets_the_same_itself():
    study = build(load("flag", None))
    asked = Asked("flag", study, ("num_rounds=5",), ("num_rounds=5",), None)
    words = {name: _overrides(asked, study.cells[0], arm, ((), {}), 0) for name, arm in study.methods.items()}
    assert "num_rounds=5" in words["mean"]
    assert "num_rounds=2" in words["mean cut short"]  # else the positive control would have nothing to find
    assert "num_rounds=5" not in words["mean cut short"]


def test_a_reseeded_arm_keeps_who_attacks_unless_the_cell_says():
    """Else a null control compares other attackers."""
    for name, attackers in (("flag", 3), ("flag_attackers", 101)):
        study = build(load(name))
        asked = Asked(name, study, (), (), None)
        config = compose(_overrides(asked, study.cells[0], study.methods["mean again"], ((), {}), 3))
        assert (config.attack.seed, config.partition.seed, config.seed) == (attackers, 3, 3 + OTHER_SEEDS)


def test_rounds_to_a_target(toys, tmp_path):
    words = [f"hydra.sweep.dir={tmp_path / 'out'}", "sweep.workers=1", "experiment.seeds=3", "client.batch_size=16"]
    folder, text = experiment("rounds", words, toys, Board())
    assert "Not the experiment as written: `client.batch_size=16`, `experiment.seeds=3`" in text
    assert re.search(r"Every run: `[^`]* client\.batch_size=16`", text)  # as they ran, not as the YAML has it
    rows = json.loads((folder / "report" / "sweep.json").read_text())["trials"]
    expected = {}
    for row in rows:
        lines = (folder / "report" / row["trial"] / "rounds.jsonl").read_text().splitlines()
        seen = [json.loads(line) for line in lines]
        reached = [one["round"] for one in seen if one["accuracy"] >= 0.6]
        expected.setdefault(row["arm"], []).append((reached or [seen[-1]["round"]])[0])
    means = json.loads((folder / "results.json").read_text())["means"]
    assert {one["cell"] for one in means} == {"all"}
    assert {one["arm"]: one["mean"] for one in means} == {arm: np.mean(values) for arm, values in expected.items()}
    assert len(set(map(tuple, expected.values()))) > 1


def written(folder, seed, rows):
    trial = folder / f"{seed}"
    trial.mkdir()
    (trial / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"trial": trial.name}


def judged(tmp_path, figures, **changes):
    """Return what is found of runs that ended with these figures: arm → a value a seed, as rows.jsonl has it."""
    study = Study(**{"claims": [CLAIM], "arms": {"a": [], "b": []}, "seeds": 3, **changes})
    (tmp_path / "report").mkdir(exist_ok=True)
    rows = [
        {"arm": arm, **written(tmp_path / "report", f"{arm}{seed}", [{"round": 1, study.metric: value}])}
        for arm, values in figures.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    asked = Asked("toy", study, (), (), None)
    return study, _judge(asked, tmp_path, rows)


def test_metrics_beside_a_logarithmic_one_are_shown_as_they_are(tmp_path):
    asides = {"metric": "loss", "better": "lower", "scale": "log", "beside": ["accuracy"]}
    study = Study(claims=[CLAIM], arms={"a": [], "b": []}, seeds=2, **asides)
    (tmp_path / "report").mkdir()
    rows = [
        {"arm": arm, **written(tmp_path / "report", f"{arm}{seed}", [{"round": 1, "loss": 0.5, "accuracy": value}])}
        for arm, values in {"a": (0.0, 0.5), "b": (0.4, 0.6)}.items() for seed, value in enumerate(values)
    ]  # fmt: skip
    found = _judge(Asked("toy", study, (), (), None), tmp_path, rows)
    text = page.section("toy", study, found, [], [])
    table = text.split("of which nothing was asked: accuracy.")[1]
    assert "| a | 0.25 |" in table
    assert "| b | 0.5 |" in table


def test_the_best_of_some_arms_is_the_best_in_each_seed(tmp_path):
    figures = {"a": [0.9, 0.9, 0.8], "b": [0.5, 0.7, 0.6], "c": [0.6, 0.2, 0.6]}
    arms = {"a": [], "b": [], "c": [], "best": {"best": ["b", "c"]}}
    claims = [{"arm": "a", "baseline": "best"}]
    study, found = judged(tmp_path, figures, arms=arms, claims=claims)
    assert found.lines[0].effect.test.mean == pytest.approx(np.mean([0.3, 0.2, 0.2]))
    assert list(study.own) == ["a", "b", "c"]
    (tmp_path / "lower").mkdir()
    lower = judged(tmp_path / "lower", figures, arms=arms, claims=claims, better="lower", metric="loss")[1]
    assert lower.lines[0].effect.test.mean == pytest.approx(-np.mean([0.4, 0.7, 0.2]))
    for wrong in ({"best": ["b", "d"]}, {"best": ["b"], "set": ["seed=1"]}):
        with pytest.raises(ValueError, match="best of arms that have runs"):
            Study(claims=[CLAIM], arms={"a": [], "b": [], "x": wrong})


@pytest.mark.parametrize(("arm", "other"), [("a", "b"), ("b", "a")])
def test_a_run_that_diverged_is_said_and_shows_nothing(arm, other, tmp_path):
    figures = {arm: [0.1, None, 0.11], other: [0.5, 0.6, 0.55]}
    null = {"arm": "a", "baseline": "b"}
    study, found = judged(tmp_path, figures, metric="loss", better="lower", null_control=null)
    assert [line.verdict for line in found.lines] == ["not shown: runs diverged"]
    assert (found.lines[0].effect.adjusted, found.lines[0].effect.equivalence) == (1, 1)
    assert found.means["all", arm] == pytest.approx(0.105)
    text = page.section("toy", study, found, [], [])
    assert f"| {arm} | 0.105, 1 of 3 diverged |" in text
    assert "| a > b | all | runs diverged | 1.000 | 1.000 | – | not shown: runs diverged |" in text
    assert "| runs diverged: **wrong** |" in text
    assert "nan" not in text
    assert "inf" not in text
    _write(tmp_path / "results.json", page.tree(found, []))

    def strict(word):
        raise AssertionError(f"{word} is not JSON")

    tree = json.loads((tmp_path / "results.json").read_text(), parse_constant=strict)
    assert {one["arm"]: one["diverged"] for one in tree["means"]} == {arm: 1, other: 0}


def test_arms_that_diverge_everywhere_are_no_difference(tmp_path):
    study, found = judged(tmp_path, {"a": [None] * 3, "b": [None] * 3}, metric="loss", better="lower")
    assert found.lines[0].verdict == "not shown: runs diverged"
    assert "| a | diverged |" in page.section("toy", study, found, [], [])


def test_a_family_with_a_diverged_cell_keeps_its_other_p(tmp_path):
    """Holm's first rank is that of the smallest p, which a NaN is not: 2 p of the clear cell."""
    clear, broken = effects([[3, 3.1, 2.9, 3, 3.1], [np.nan, 1, 1, 1, 1]])
    one, other = verdict.adjusted([broken, clear])
    assert (one.adjusted, other.adjusted) == (1, pytest.approx(2 * clear.test.p))


def test_a_figure_that_no_run_has_is_the_users_to_mend(tmp_path):
    study = Study(claims=[CLAIM], arms=ARMS, metric="los")
    row = written(tmp_path, 0, [{"round": 1, "loss": 1.0}])
    with pytest.raises(UserError, match="metric: runs have no los; they have loss"):
        figure(study, tmp_path, row)
    with pytest.raises(UserError, match="along: rounds have no rounds; they have loss, round"):
        figure(Study(claims=[CLAIM], arms=ARMS, metric="loss", target=0.1, along="rounds"), tmp_path, row)


def test_a_metric_may_name_a_setting_of_the_cell(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "rounds.jsonl").write_text('{"round": 1, "recall_2": 0.25, "recall_5": 0.5}\n', encoding="utf-8")
    study = Study(claims=[CLAIM], arms=ARMS, metric="recall_{devices.target_class}")
    assert figure(study, tmp_path, {"trial": "0", "devices.target_class": 5}) == 0.5
    assert figure(study, tmp_path, {"trial": "0", "devices.target_class": 2}) == 0.25
    with pytest.raises(UserError, match="no setting of the cells"):
        figure(study, tmp_path, {"trial": "0", "mode.delay": 2})


def test_bytes_until_a_target_go_on_after_a_round_in_which_nobody_arrived(tmp_path):
    """5 bytes, none, 7 bytes: reached with 12; a round without a figure of the cohort keeps the last one."""
    rows = [
        {"round": 1, "accuracy": 0.1, "bytes_up": 5, "train_loss": 2.0},
        {"round": 2, "accuracy": 0.1},
        {"round": 3, "accuracy": 0.9, "bytes_up": 7, "train_loss": 1.0},
        {"round": 4, "accuracy": 0.9},
    ]
    row = written(tmp_path, 0, rows)
    study = Study(claims=[CLAIM], arms=ARMS, target=0.8, along="bytes_up")
    assert figure(study, tmp_path, row) == 12
    assert figure(Study(claims=[CLAIM], arms=ARMS, metric="train_loss"), tmp_path, row) == 1


def test_on_a_logarithmic_scale_a_tenth_is_a_tenth_whatever_the_seed(tmp_path):
    """Losses 1 and 100 that one arm halves: ln 2 in both seeds, where their difference would be the second's."""
    study = Study(claims=[CLAIM], arms=ARMS, metric="loss", better="lower", scale="log")
    runs = [
        [figure(study, tmp_path, written(tmp_path, loss, [{"round": 1, "loss": loss}])) for loss in each]
        for each in ((0.5, 50.0), (1.0, 100.0))
    ]
    found = verdict.effect("all", ("a", "b"), (runs[0], runs[1]), sign=study.sign, smallest=0.05)
    assert (found.test.mean, found.test.half) == pytest.approx((math.log(2), 0), abs=1e-9)
    with pytest.raises(UserError, match="to be > 0, got 0"):
        figure(study, tmp_path, written(tmp_path, 0, [{"round": 1, "loss": 0.0}]))
    means = {("all", arm): float(np.mean(figures)) for arm, figures in zip("abc", (*runs, runs[0]), strict=True)}
    text = page.section("toy", study, page.Findings([], {}, means, dict.fromkeys(means, 0)), [], [])
    assert "Compared: ln loss" in text
    assert "| geometric mean | all |" in text
    assert "| a | 5 |" in text
    assert "| b | 10 |" in text


def test_a_wrong_word_is_found_before_anything_runs(toys, tmp_path):
    for words, message in (
        (["strategi=fedavg"], "strategi"),
        (["client.lr=1,2"], "one value"),
        (["experiment.seed=1"], "experiment.seed"),
    ):
        with pytest.raises(UserError, match=message):
            experiment("toy", [f"hydra.sweep.dir={tmp_path / 'x'}", *words], toys, Board())
        assert not (tmp_path / "x").exists()
    with pytest.raises(UserError, match="no experiment 'toi'"):
        experiment("toi", [], toys, Board())


PAGE = """# Results

Above.

<!-- a -->
## `a`

**Not the experiment as written: `x=1`.**

| claim | cell | difference, 95 % | verdict |
|---|---|---|---|
| first | c=1 | +1 ± 0.1 | holds |
| first | c=2 | +0 ± 0.1 | not shown at this power |
| first | **all** | | **holds in 1 of 2; not shown at this power in 1 of 2** |
| second | all | -1 ± 1 | the opposite holds |

| against its control | cell |
|---|---|
| x − y | all |

| control of the experiment | cell | says |
|---|---|---|
| null: m − m | all | no difference |
| positive: m − m cut short | all | no difference: **wrong** |
<!-- /a -->

<!-- b -->
| claim | verdict |
|---|---|
| third | holds |
<!-- /b -->
"""


def test_a_page_begins_with_all_its_claims():
    text = with_overview(PAGE)
    assert with_overview(text) == text
    begin = text.index("<!-- overview -->")
    assert text[:begin] == PAGE[: PAGE.index("<!-- a -->")]
    assert text[text.index("<!-- a -->") :] == PAGE[PAGE.index("<!-- a -->") :]
    assert text[begin:].splitlines()[3:6] == [
        "| [`a`](#a) | first | holds in 1 of 2; not shown at this power in 1 of 2 | "
        "**wrong in 1 of 2**, not as written |",
        "|  | second | the opposite holds |  |",
        "| [`b`](#b) | third | holds | none |",
    ]
