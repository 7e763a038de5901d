"""In a notebook: progress in the cell, `Result.plot()`, and the example in docs/, whose code runs."""

import json
import sys
import types
from pathlib import Path

import pytest

import fedsim
from fedsim.console import Observer
from fedsim.errors import UserError
from fedsim.notebook import Notebook, default_observer
from fedsim.plots import plot

EXAMPLE = Path(__file__).resolve().parent.parent / "docs" / "example.ipynb"


@pytest.fixture
def cell(monkeypatch):
    """Stand in for IPython, which is no dependency; return what a cell shows, outputs that are updated in place."""
    shown = []

    class Handle:
        def __init__(self, at):
            self.at = at

        def update(self, content):
            shown[self.at] = content

    def display(content, display_id=False):
        shown.append(content)
        return Handle(len(shown) - 1) if display_id else None

    module, inner = types.ModuleType("IPython"), types.ModuleType("IPython.display")
    module.version_info = (8, 30)  # matplotlib asks
    module.get_ipython = lambda: types.SimpleNamespace(kernel=object())
    inner.display, inner.HTML, module.display = display, str, inner
    monkeypatch.setitem(sys.modules, "IPython", module)
    monkeypatch.setitem(sys.modules, "IPython.display", inner)
    return shown


def test_a_run_draws_one_line_and_keeps_it(cell, tmp_path):
    assert isinstance(default_observer(), Notebook)
    fedsim.simulate("model=logreg", num_rounds=5, folder=tmp_path / "run")
    (line,) = [text for text in cell if "progress" in text]
    assert 'value="5" max="5"' in line
    assert "round 5/5  accuracy" in line
    assert "left" not in line


def test_warnings_stay_and_are_escaped(cell):
    shown = Notebook(seconds=0.0)
    shown.start(3, 0)
    shown.round({"round": 1, "accuracy": 0.5, "loss": 1.0})
    shown.warn("a < b")
    assert "round 1/3  accuracy 50.00 %  loss 1.0000" in cell[0]
    assert cell[0].count("left") == 1
    assert "a &lt; b" in cell[1]


def test_outside_a_notebook_nobody_is_told(monkeypatch):
    monkeypatch.delitem(sys.modules, "IPython", raising=False)
    assert type(default_observer()) is Observer
    terminal = types.ModuleType("IPython")
    terminal.get_ipython = lambda: object()  # IPython in a terminal has no kernel
    monkeypatch.setitem(sys.modules, "IPython", terminal)
    assert type(default_observer()) is Observer


def test_plot_draws_what_was_measured():
    rows = [
        {"round": 1, "accuracy": 0.5, "loss": 1.0, "evaluated": True, "validation_accuracy": 0.4, "drift_ratio": 2.0},
        {"round": 2, "accuracy": 0.5, "loss": 1.0, "evaluated": False},
        {"round": 3, "accuracy": 0.75, "loss": 0.5, "evaluated": True, "validation_accuracy": 0.7, "drift_ratio": 3.0},
    ]
    figure = plot(rows, ("accuracy", "drift_ratio"))
    accuracy, drift = figure.axes
    assert [list(line.get_xdata()) for line in accuracy.lines] == [
        [1, 3],
        [1, 3],
    ]  # not round 2, which measured nothing
    assert [list(line.get_ydata()) for line in accuracy.lines] == [[50, 75], [40, 70]]
    assert list(drift.lines[0].get_ydata()) == [2, 3]
    assert accuracy.get_ylabel() == "accuracy (%)"
    assert figure._repr_png_().startswith(b"\x89PNG")
    with pytest.raises(UserError, match="did you mean 'drift_ratio'"):
        plot(rows, ("drift_rato",))


def test_the_example_was_executed_and_its_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cells = [cell for cell in json.loads(EXAMPLE.read_text())["cells"] if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not [out for cell in cells for out in cell["outputs"] if out["output_type"] == "error"]
    assert any("image/png" in out.get("data", {}) for cell in cells for out in cell["outputs"])
    space = {}
    for cell in cells:
        exec("".join(cell["source"]).replace("num_rounds=60", "num_rounds=2"), space)
    assert space["result"].summary["num_rounds"] == 2
