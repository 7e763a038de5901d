"""What the documents say is so: links lead somewhere, commands run, code runs, tables agree with the configs."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import pytest
from pyarrow import parquet

from fedsim import catalogue, cli
from fedsim.config import compose

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
EXECUTED = ["README.md", "docs/flower.md"]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED_FILE = re.compile(r"`([\w/]+\.(?:py|yaml))`[^`]*\Z")
FOLDERS = ("fedsim", "strategies", "clients", "configs", "tests", "docs", "benchmarks")
MOST_ROUNDS = 2


def relative(path):
    return path.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_links_lead_to_files(page):
    targets = [link.partition("#")[0] for link in LINK.findall(page.read_text()) if "://" not in link]
    missing = [target for target in targets if target and not (page.parent / target).exists()]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=relative)
def test_paths_exist(page):
    """`fedsim/rng.py`, `configs/client/`, and `test_rng.py` beside the tests."""
    missing = []
    for span in SPAN.findall(page.read_text()):
        in_tree = (
            re.fullmatch(rf"(?:{'|'.join(FOLDERS)})/[a-z0-9_/.]*", span) and "/x." not in span and "test_x" not in span
        )
        if in_tree and not (ROOT / span).exists():
            missing.append(span)
        if (
            re.fullmatch(r"test_\w+\.py", span)
            and span != "test_majority_vote.py"
            and not (ROOT / "tests" / span).exists()
        ):
            missing.append(span)
    assert not missing


def _generator():
    spec = importlib.util.spec_from_file_location("catalogue_page", ROOT / "docs" / "catalogue.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = _generator()
# New methods need no edit of a page; everything else is listed.
LISTED = ("data", "partition", "model", "sampler")
METHODS = ("strategy", "client")


@pytest.mark.parametrize("group", catalogue.groups([ROOT / "configs"]))
def test_the_catalogue_agrees_with_the_configs(group):
    section = (ROOT / "docs" / "catalogue.md").read_text().partition(f"\n## `{group}`\n")[2].partition("\n## ")[0]
    written = [line for line in section.splitlines() if re.match(r"\| \**`", line)]
    rows = GENERATOR.rows(group)
    stale = [line for line in written if line not in rows.values()]
    assert not stale, "run python docs/catalogue.py"
    if group in LISTED:
        assert written == list(rows.values()), "run python docs/catalogue.py"
    missing = [name for name, row in rows.items() if row not in written]
    if missing:
        pytest.skip(f"not in docs/catalogue.md yet, run python docs/catalogue.py: {', '.join(missing)}")


def test_every_target_is_a_file():
    for group in catalogue.groups([ROOT / "configs"]):
        for name, file in catalogue.options(group, [ROOT / "configs"]).items():
            path = GENERATOR.source(file.read_text())
            found = not path or any((ROOT / p).exists() for p in (path, path.removesuffix(".py") + "/__init__.py"))
            assert found, f"{group}={name}: {path}"


def _method_rows():
    text = (ROOT / "README.md").read_text()
    lines = [line for line in text.splitlines() if re.match(r"\| .*`strategy=", line)]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


@pytest.mark.parametrize("row", _method_rows(), ids=lambda row: row[3].strip("`"))
def test_the_table_of_methods_agrees_with_the_configs(row):
    _, paper, link, command, *figures = row
    choices = dict(word.split("=") for word in command.strip("`").split())
    folder = link.partition("]")[0].strip("[").partition("/")[0]
    group = {"strategies": "strategy", "clients": "client"}[folder]
    strategy = ROOT / "configs" / "strategy" / f"{choices['strategy']}.yaml"
    paired = re.search(r"override /client@\S+ *(\w+)", strategy.read_text())
    client = choices.get("client") or (paired[1] if paired else "sgd")
    text = {"strategy": strategy, "client": ROOT / "configs" / "client" / f"{client}.yaml"}[group].read_text()
    assert GENERATOR.source(text) == link.partition("(")[2].rstrip(")")
    assert paper in text.partition("\n")[0]
    for figure in figures:
        assert re.fullmatch(r"\d+\.\d ± \d+\.\d", figure)


def _blocks(page):
    """Yield (language, file name or "", text) of a page's blocks; a file is named right before its block."""
    text = (ROOT / page).read_text()
    for match in BLOCK.finditer(text):
        before = text[: match.start()].rstrip().rsplit("\n\n", 1)[-1]
        named = NAMED_FILE.search(before)
        yield match[1], named[1] if named else "", match[2]


def _capped(words):
    """The same command with few rounds; a resumed run may have twice as many."""
    if words[0] not in ("run", "sweep", "tune"):
        return words
    most = 2 * MOST_ROUNDS if any(word.startswith("resume=") for word in words) else MOST_ROUNDS
    kept = [word for word in words if not word.startswith("num_rounds=")]
    return [*kept, f"num_rounds={most}"]


def _data_root():
    folder = Path(os.environ.get("FEDSIM_DATA", ROOT.parent / "shared" / "data"))
    return folder if folder.is_dir() else None


def _shell(line, capsys):
    words = shlex.split(line, comments=True)
    if words[:1] == ["pytest"]:
        module = {}
        exec(compile(Path(words[-1]).read_text(), words[-1], "exec"), module)
        tests = [value for name, value in module.items() if name.startswith("test_")]
        assert tests
        for test in tests:
            test()
    elif words[:1] == ["fedsim"]:
        words = [word.replace("~/data", str(_data_root())) for word in words]
        assert cli.main(_capped(words[1:])) == 0, (line, capsys.readouterr().err)
    else:
        assert words[:1] in ([], ["make"], ["bash"]), f"no way to test {line!r}"


@pytest.fixture
def _apart(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    known = set(sys.modules)
    yield
    for name in set(sys.modules) - known:
        if getattr(sys.modules[name], "__file__", None) and str(tmp_path) in str(sys.modules[name].__file__):
            del sys.modules[name]
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


@pytest.mark.usefixtures("_apart")
@pytest.mark.parametrize("page", EXECUTED)
def test_commands_and_code_run(page, capsys):
    skipped = []
    for language, name, text in _blocks(page):
        if name:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(text)
        if name.endswith(".py") and not name.startswith("test_"):
            importlib.import_module(name.removesuffix(".py"))
        if language == "python" and not name:
            exec(compile(text, page, "exec"), {"__name__": page})
        for line in text.splitlines() if language == "sh" else ():
            if "~/data" in line and _data_root() is None:
                skipped.append(line)
            else:
                _shell(line, capsys)
    if skipped:
        pytest.skip(f"all else ran; no data for: {'; '.join(skipped)}")


def _runs():
    """Return the runs that pages show which are not executed here: (page, words)."""
    pages = [
        page for page in map(relative, PAGES) if page not in (*EXECUTED, "docs/plugins.md")
    ]  # has tests of its own
    texts = [(page, text) for page in pages for language, _, text in _blocks(page) if language in ("sh", "console")]
    lines = [
        (page, shlex.split(line.removeprefix("$ "), comments=True)) for page, t in texts for line in t.splitlines()
    ]
    return [(page, words[2:]) for page, words in lines if words[:2] in (["fedsim", "run"], ["fedsim", "bench"])]


@pytest.mark.parametrize(
    ("page", "words"), _runs(), ids=lambda value: " ".join(value) if isinstance(value, list) else value
)
def test_every_setting_of_a_run_that_is_shown_exists(page, words):
    assert compose([word for word in words if not word.startswith("--")]).num_rounds >= 1


def test_the_output_shown_is_what_a_run_prints(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (shown,) = (text for language, _, text in _blocks("README.md") if text.startswith("plan: "))
    assert cli.main(["run", "strategy=fedld", "num_rounds=1"]) == 0
    captured = capsys.readouterr()
    printed = captured.out + captured.err

    def labels(text):
        return {
            line[:22].strip() for line in text.splitlines() if len(line) > 22 and not re.match(r"plan|round|\[", line)
        }

    assert labels(shown) <= labels(printed)


FULL = (
    ["partition.held_out_clients=0.2", "metrics.cosines=true", "metrics.decomposition_every=1"],
    ["mode=async", "devices=lognormal", "attack=sign_flip", "attack.fraction=0.3"],
)


@pytest.mark.parametrize("words", FULL, ids=" ".join)
def test_every_column_is_explained(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["run", "num_rounds=2", "hydra.run.dir=run", *words]) == 0, capsys.readouterr().err
    rows = [json.loads(line) for line in Path("run/rounds.jsonl").read_text().splitlines()]
    columns = {name for row in rows for name in row} | set(parquet.read_schema("run/clients.parquet").names)
    explained = set(re.findall(r"`(\w+)`", (ROOT / "docs" / "metrics.md").read_text()))
    families = [(r"recall_\d+", "recall_0"), (r"(client|held_out|honest)_(?=accuracy_)", ""), (r"_q\d$", "_q1")]

    def known(name):
        for pattern, form in families:
            name = name if name in explained else re.sub(pattern, form, name)
        return name in explained

    assert sorted(name for name in columns if not known(name)) == []


@pytest.mark.parametrize("line", re.findall(r"^make (\w+)", (ROOT / "README.md").read_text(), re.MULTILINE))
def test_make_targets_exist(line):
    assert re.search(rf"^{line}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_versions_agree():
    versions = {
        re.search(r'^version = "([^"]+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1],
        re.search(r"^version: (.+)", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)[1],
        re.search(r"^## ([\d.]+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)[1],
    }
    assert len(versions) == 1


def test_the_table_of_claims_is_that_of_the_sections_below_it():
    from fedsim.study.overview import with_overview

    page = (ROOT / "docs" / "results.md").read_text()
    assert with_overview(page) == page
