"""The picture: what it shows, at any size, without touching matplotlib's global state."""

import subprocess
import sys

import numpy as np
import pytest
from matplotlib.figure import Figure

from fedsim.partition.picture import _columns, draw, drawn_once


@pytest.fixture
def figures(monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kw: (drawn.append(self), save(self, *args, **kw)))
    return drawn


def counts(num_clients, num_classes, alpha=0.2, size=50):
    generator = np.random.default_rng(0)
    return generator.multinomial(size, generator.dirichlet(np.full(num_classes, alpha), size=num_clients))


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (10, 10), (100, 2), (3000, 100)])
def test_any_size_is_drawn(tmp_path, figures, num_clients, num_classes):
    draw(counts(num_clients, num_classes), tmp_path / "p.png", title="a title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    width, height = figures[0].get_size_inches()
    assert 6 <= width <= 13
    assert 3 <= height <= 10
    assert figures[0].get_suptitle() == "a title"


def test_few_clients_stand_in_order_with_names_counts_and_sizes(tmp_path, figures):
    m = np.array([[3, 0], [1, 4]])
    draw(m, tmp_path / "p.png", class_names=["ill", "well"], client_names=["north", "south"])
    top, main, _ = figures[0].axes
    assert [label.get_text() for label in main.get_xticklabels()] == ["north", "south"]
    assert [label.get_text() for label in main.get_yticklabels()] == ["ill", "well"]
    assert [bar.get_height() for bar in top.patches] == [3, 5]
    assert [text.get_text() for text in top.texts] == ["3", "5"]
    shown = {(text.get_position(), text.get_text()) for text in main.texts}
    assert shown == {((0, 0), "3"), ((1, 0), "1"), ((1, 1), "4")}
    image = main.images[0].get_array()  # (C, K) shares, empty cells masked
    np.testing.assert_allclose(image.filled(0), [[1, 0.2], [0, 0.8]])
    assert image.mask.tolist() == [[False, False], [True, False]]


def test_many_clients_are_ordered_by_their_leading_class_and_the_largest_share():
    m = np.zeros((50, 3), dtype=int)
    m[:, 0], m[:, 2] = np.arange(50), 25
    m[7] = 0
    columns = _columns(m)
    assert not columns.named
    leading = columns.counts.argmax(1)
    assert (np.diff(leading[:-1]) >= 0).all()
    assert columns.counts[-1].sum() == 0
    shares = columns.counts[:-1].max(1) / columns.counts[:-1].sum(1)
    for c in (0, 2):
        assert (np.diff(shares[leading[:-1] == c]) <= 0).all()
    np.testing.assert_array_equal(np.sort(columns.counts, axis=0), np.sort(m, axis=0))


@pytest.mark.parametrize("num_clients", [1000, 1001, 2500, 4321])
def test_more_clients_than_pixels_share_columns(num_clients):
    m = counts(num_clients, 3)
    columns = _columns(m)
    assert len(columns.counts) == 1000
    np.testing.assert_array_equal(columns.counts.sum(0), m.sum(0))
    assert columns.clients.sum() == num_clients
    assert np.ptp(columns.clients) <= 1


def test_many_classes_have_few_labels(tmp_path, figures):
    draw(counts(5, 100), tmp_path / "p.png")
    labels = [label.get_text() for label in figures[0].axes[1].get_yticklabels()]
    assert labels == [str(c) for c in range(0, 100, 5)]


def test_long_names_stand_upright_and_short_ones_do_not(tmp_path, figures):
    draw(counts(30, 2), tmp_path / "p.png", client_names=[f"hospital {k}" for k in range(30)])
    draw(counts(4, 2), tmp_path / "p.png", client_names=[f"hospital {k}" for k in range(4)])
    rotations = [figure.axes[1].get_xticklabels()[0].get_rotation() for figure in figures]
    assert rotations == [90, 0]


def test_no_samples_are_drawn_as_nothing(tmp_path):
    draw(np.zeros((3, 2), dtype=int), tmp_path / "p.png")
    assert (tmp_path / "p.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"counts": [1, 2]}, r"counts must be a matrix \(clients, classes\), got shape \(2,\)"),
        ({"counts": np.zeros((0, 2))}, "counts must be a matrix"),
        ({"counts": [[1, 2]], "class_names": ["a"]}, "class_names must have 2 entries, got 1"),
        ({"counts": [[1, 2]], "client_names": ["a", "b"]}, "client_names must have 1 entries, got 2"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        draw(arguments.pop("counts"), tmp_path / "p.png", **arguments)


def test_importing_costs_no_matplotlib_and_drawing_no_pyplot(tmp_path):
    code = f"""
import sys
from fedsim.partition.picture import draw
assert "matplotlib" not in sys.modules
draw([[1, 2]], {str(tmp_path / "p.png")!r})
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_many_runs_draw_one_partition_once(tmp_path, figures):
    m = counts(4, 3)
    with drawn_once(tmp_path / "shared"):
        draw(m, tmp_path / "a.png")
        draw(m.copy(), tmp_path / "b.png")
        assert len(figures) == 1
        others = [{"class_names": ["x", "y", "z"]}, {"client_names": ["x", "y", "z", "u"]}, {"title": "t"}]
        for n, names in enumerate(others, start=2):
            draw(m, tmp_path / "c.png", **names)
            assert len(figures) == n
        draw(m.T.reshape(4, 3), tmp_path / "c.png")  # the same numbers, elsewhere
        assert len(figures) == 5
    draw(m, tmp_path / "d.png")
    assert len(figures) == 6
    assert len({(tmp_path / f"{name}.png").read_bytes() for name in "abd"}) == 1
