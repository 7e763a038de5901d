"""Building what a config names: names and types are checked before the target is called."""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pytest

from fedsim.construct import build, construct, locate
from fedsim.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Part:
    alpha: float
    num_clients: int | None = None
    mode: Literal["per_class", "per_client"] = "per_class"
    hidden: tuple[int, ...] = (200,)
    shape: tuple[int, int] = (1, 1)
    guards: bool = True
    path: Path | None = None
    columns: Sequence[str] = ()
    missing: Mapping[str, list[int]] | None = None
    anything: Any = None

    def __post_init__(self) -> None:
        if self.alpha <= 0:
            raise ValueError(f"alpha must be > 0, got {self.alpha}")
        if self.alpha == 7:
            raise TypeError("seven")
        if self.alpha == 8:
            raise FileNotFoundError(2, "No such file", "eight.csv")
        if self.alpha == 9:
            raise RuntimeError("nine")


class Pair(NamedTuple):
    x: Any
    y: Any


def of(**arguments: Any) -> Part:
    made = construct(Part, {"alpha": 1} | arguments, "partition")
    assert isinstance(made, Part)
    return made


def test_values_become_what_the_annotations_say() -> None:
    part = of(alpha=3, hidden=[1, 2], shape=[3, 4], path="a/b", columns=["c"], missing={"chol": [0]})
    assert type(part.alpha) is float
    assert part == Part(alpha=3.0, hidden=(1, 2), shape=(3, 4), path=Path("a/b"), columns=("c",), missing={"chol": [0]})
    hash(of(hidden=[1]))  # no list is left in it


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": "abc"}, "partition.alpha must be a number, got 'abc'"),
        ({"alpha": None}, "partition.alpha must be a number, got None"),
        ({"alpha": True}, "partition.alpha must be a number, got True"),
        ({"num_clients": "ten"}, "partition.num_clients must be an integer or null, got 'ten'"),
        ({"num_clients": 1e3}, "partition.num_clients must be an integer or null, got 1000.0"),
        ({"mode": "per_clas"}, "partition.mode must be one of per_class, per_client, got 'per_clas'"),
        ({"hidden": 200}, "partition.hidden must be a list of integers, got 200"),
        ({"hidden": ["a"]}, "partition.hidden must be a list of integers, got ['a']"),
        ({"hidden": "12"}, "partition.hidden must be a list of integers, got '12'"),
        ({"shape": [1]}, "partition.shape must be a list of 2, got [1]"),
        ({"guards": "yes"}, "partition.guards must be true or false, got 'yes'"),
        ({"guards": 1}, "partition.guards must be true or false, got 1"),
        ({"path": 3}, "partition.path must be a path or null, got 3"),
        ({"missing": {"chol": 0}}, "partition.missing must be a table of name: value or null, got {'chol': 0}"),
        ({"alpah": 1}, "partition.alpah: Part takes no such argument"),
        ({"hiden": [1]}, "partition.hiden: Part takes no such argument; did you mean 'hidden'?"),
        ({"alpha": -1}, "partition.alpha must be > 0, got -1.0"),
        ({"alpha": 7}, "partition: Part failed: TypeError: seven"),
        ({"alpha": 8}, "partition: Part failed: FileNotFoundError: [Errno 2] No such file: 'eight.csv'"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_one_line(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        of(**arguments)
    assert str(caught.value).startswith(message)


def test_a_missing_argument_is_named() -> None:
    with pytest.raises(UserError, match=r"^partition: Part needs alpha$"):
        construct(Part, {}, "partition")
    with pytest.raises(UserError, match=r"^alpha must have a value$"):
        construct(Part, {})


def test_a_failure_of_the_part_is_no_fault_of_the_user() -> None:
    with pytest.raises(RuntimeError, match="nine"):
        of(alpha=9)


def test_what_annotations_do_not_settle_passes() -> None:
    def free(a, *, b: "Unknown" = None, **rest):  # type: ignore  # noqa: F821
        return a, b, rest

    assert construct(free, {"a": "x", "b": 3, "c": [1]}) == ("x", 3, {"c": [1]})
    assert construct(dict, {"a": 1}) == {"a": 1}


def test_objects_pass_as_they_are() -> None:
    pair = Pair([1], object())
    built = build({"_target_": "builtins.dict", "a": [1]}, "data", {"pair": pair})
    assert built["pair"] is pair  # not a list, not a copy
    assert of(anything=pair).anything is pair


def test_trees_are_built_innermost_first() -> None:
    tree = {
        "_target_": f"{__name__}.Pair",
        "x": {"_target_": f"{__name__}.Part", "alpha": 2},
        "y": [{"_target_": f"{__name__}.Pair", "x": 1, "y": {"z": 3}}, {"_target_": None, "alpha": 2}],
    }
    assert build(tree, "strategy") == Pair(Part(alpha=2), [Pair(1, {"z": 3}), None])
    tree["y"][0]["x2"] = 3
    with pytest.raises(UserError, match=r"^strategy\.y\[0\]\.x2: Pair takes no such argument"):
        build(tree, "strategy")


def test_partial_binds_and_checks() -> None:
    tree = {"_target_": "fractions.Fraction", "_partial_": True, "numerator": 3}
    assert build(tree, "x")(denominator=4).denominator == 4
    with pytest.raises(UserError, match="takes no such argument"):
        build(tree | {"nominator": 3}, "x")


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no.such.Class", "no module named 'no'"),
        ("fedsim.nix.Class", "no 'nix' in fedsim"),
        ("fedsim.settings.Rum", "no 'Rum' in fedsim.settings; did you mean 'Run'?"),
        ("torch.nn.Liner", "no 'Liner' in torch.nn; did you mean 'Linear'?"),
        ("fractions.Fraction.nix", "has no 'nix'"),
        ("fedsim.errors.annotations", "is a _Feature, not a class or function"),
        ("Run", "must be a dotted path"),
        ("fedsim..Run", "must be a dotted path"),
        ("os.system('ls').x", "must be a dotted path"),
        ("", "must be a dotted path"),
        (3, "must be a dotted path"),
    ],
)
def test_a_path_that_leads_nowhere(path: object, message: str) -> None:
    with pytest.raises(UserError) as caught:
        locate(path, "strategy._target_")
    assert "strategy._target_" in str(caught.value)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("import no_such_library\n", "No module named 'no_such_library'"),
        ("x = (\n", "SyntaxError"),
        ("1 / 0\n", "ZeroDivisionError: division by zero"),
    ],
)
def test_a_module_that_cannot_be_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    (tmp_path / "fedsim_broken_plugin.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="cannot be imported") as caught:
        locate("fedsim_broken_plugin.Rule", "strategy._target_")
    assert message in str(caught.value)
    sys.modules.pop("fedsim_broken_plugin", None)


def test_a_method_of_a_class_can_be_named() -> None:
    from fractions import Fraction

    assert locate("fractions.Fraction.from_float", "x") == Fraction.from_float


def test_what_only_the_user_knows_is_asked_for():
    with pytest.raises(UserError, match=r"partition\.path is needed .* partition\.path=VALUE"):
        build({"_target_": "fedsim.partition.saved.Saved", "path": "???"}, "partition")
