"""What can be chosen, as text."""

from pathlib import Path

import pytest

from fedsim import catalogue
from fedsim.errors import UserError


def test_groups_come_in_the_order_of_the_defaults() -> None:
    found = catalogue.groups(catalogue.roots())
    assert found[: len(catalogue.defaults())] == list(catalogue.defaults())
    assert found.index("client") < found.index("strategy")  # or no strategy could pair itself with its client
    assert not any(name.startswith(("_", ".")) for name in found)


def test_defaults_are_those_of_the_composed_config() -> None:
    from fedsim.config import compose

    assert dict(compose([]).hydra.runtime.choices) == catalogue.defaults()


@pytest.mark.parametrize("group", catalogue.groups(catalogue.roots()))
def test_every_choice_says_what_it_is_in_80_columns(group: str) -> None:
    found = catalogue.entries(group)
    assert found
    for entry in found:
        assert not entry.name.rpartition("/")[2].startswith("_")
        assert entry.summary.endswith((".", "!", "?")), f"{group}={entry.name}: the first line is a comment, a sentence"
    text = catalogue.choice_table(group, width=80)
    assert max(map(len, text.splitlines())) <= 80
    for entry in found:
        assert any(line.split() and line.split()[0] == entry.name for line in text.splitlines())


def test_the_table_of_groups_fits_and_names_each() -> None:
    text = catalogue.group_table(width=80)
    assert max(map(len, text.splitlines())) <= 80
    for group, choice in catalogue.defaults().items():
        assert any(line.split()[:2] == [group, choice] for line in text.splitlines())


def test_own_folder_hidden_files_nested_names(tmp_path: Path) -> None:
    for name in ("strategy/mine", "strategy/_part", "strategy/deep/er/one", "other/x", "_hidden/x", "empty/_x"):
        path = tmp_path / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("# Mine. Me (2020).\n")
    (tmp_path / "strategy" / "notes.txt").write_text("no choice")
    folders = catalogue.roots(tmp_path)
    assert {"other"} == set(catalogue.groups(folders)) - set(catalogue.groups(catalogue.roots()))
    added = set(catalogue.options("strategy", folders)) - set(catalogue.options("strategy", catalogue.roots()))
    assert added == {"mine", "deep/er/one"}
    assert catalogue.Entry("mine", "Mine.", "Me (2020).") in catalogue.entries("strategy", tmp_path)


def test_an_unknown_group_gets_the_nearest_name() -> None:
    with pytest.raises(UserError, match="no group 'strategies'; did you mean 'strategy'"):
        catalogue.entries("strategies")


@pytest.mark.parametrize(
    ("line", "summary", "paper"),
    [
        ("# Mean. FedAvg (McMahan et al., AISTATS 2017), §3.", "Mean.", "FedAvg (McMahan et al., AISTATS 2017), §3."),
        ("# Two 3x3. Reddi et al., ICLR 2021.", "Two 3x3.", "Reddi et al., ICLR 2021."),
        ("# A. B c. El M. Hamdi et al., Proc. IEEE 1998.", "A. B c.", "El M. Hamdi et al., Proc. IEEE 1998."),
        ("# One. He et al., CVPR 2016; Li, ICML 2020.", "One.", "He et al., CVPR 2016; Li, ICML 2020."),
        ("# A fifth of training. See docs.", "A fifth of training. See docs.", ""),
        ("# Of 1797 images, 2019 of them new.", "Of 1797 images, 2019 of them new.", ""),
        ("_target_: a.B", "", ""),
        ("", "", ""),
    ],
)  # fmt: skip
def test_the_first_line_is_split_at_the_paper(line: str, summary: str, paper: str) -> None:
    assert catalogue.describe(line + "\nkey: 1\n") == (summary, paper)


def test_long_names_have_a_line_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "attack").mkdir()
    (tmp_path / "attack" / f"{'long' * 10}.yaml").write_text("# " + "word " * 30 + "end. Me (2020).\n")
    lines = catalogue.choice_table("attack", tmp_path, width=60).splitlines()
    start = lines.index("long" * 10)
    assert all(line.startswith(" " * 24) and len(line) <= 60 for line in lines[start + 1 : start + 5])
    styled = catalogue.choice_table("attack", tmp_path, width=60, style=True)
    assert "\033[1m" + "long" * 10 + "\033[0m" in styled
    assert "\033[2m" + " " * 24 + "Me (2020).\033[0m" in styled
