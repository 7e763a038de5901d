"""The picture: what it shows, at any size, without a plotting library."""

import subprocess
import sys

import numpy as np
import pytest

from fedsim.partition.canvas import Canvas
from fedsim.partition.picture import _columns, _palette, _steps, draw, drawn_once


@pytest.fixture
def figures(monkeypatch):
    """Canvases as they are saved, with what was put on them: `texts` (text, x, y, upright), `fills` and `paints`."""
    drawn = []
    init, text, fill, paint, save = Canvas.__init__, Canvas.text, Canvas.fill, Canvas.paint, Canvas.save

    def begun(self, *size):
        init(self, *size)
        self.texts, self.fills, self.paints = [], [], []

    def written(self, x, y, words, *args, **kw):
        self.texts.append((words, x, y, kw.get("upright", False)))
        text(self, x, y, words, *args, **kw)

    monkeypatch.setattr(Canvas, "__init__", begun)
    monkeypatch.setattr(Canvas, "text", written)
    monkeypatch.setattr(Canvas, "fill", lambda self, *args: (self.fills.append(args), fill(self, *args)))
    monkeypatch.setattr(Canvas, "paint", lambda self, *args: (self.paints.append(args), paint(self, *args)))
    monkeypatch.setattr(Canvas, "save", lambda self, path: (drawn.append(self), save(self, path)))
    return drawn


def words(canvas):
    return [text for text, *_ in canvas.texts]


def counts(num_clients, num_classes, alpha=0.2, size=50):
    generator = np.random.default_rng(0)
    return generator.multinomial(size, generator.dirichlet(np.full(num_classes, alpha), size=num_clients))


@pytest.mark.parametrize(("num_clients", "num_classes"), [(1, 1), (10, 10), (100, 2), (3000, 100)])
def test_any_size_is_drawn(tmp_path, figures, num_clients, num_classes):
    draw(counts(num_clients, num_classes), tmp_path / "p.png", title="a title")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")
    width, height = (pixels / 120 for pixels in figures[0].image.size)
    assert 6 <= width <= 13
    assert 3 <= height <= 10
    assert "a title" in words(figures[0])


def test_few_clients_stand_in_order_with_names_counts_and_sizes(tmp_path, figures):
    m = np.array([[3, 0], [1, 4]])
    draw(m, tmp_path / "p.png", class_names=["ill", "well"], client_names=["north", "south"])
    (canvas,) = figures
    at = {text: (x, y) for text, x, y, _ in canvas.texts}
    assert at["north"][0] < at["south"][0]
    assert at["ill"][1] < at["well"][1]
    bars = [bottom - top for (_, top, _, bottom), _ in canvas.fills]
    assert bars[1] / bars[0] == pytest.approx(5 / 3)
    # Sizes above, then the scales, then a count in each cell that has any: client 0 has 3 of "ill", 1 has 1 and 4.
    cells = [(text, round(x), round(y)) for text, x, y, _ in canvas.texts if text in {"1", "3", "4"}]
    (north, ill), (south, well) = at["north"][:1] + at["ill"][1:], at["south"][:1] + at["well"][1:]
    assert [(t, round(x), round(y)) for t, x, y in (("3", north, ill), ("1", south, ill), ("4", south, well))] == [
        cell for cell in cells if cell[1] in (round(north), round(south)) and cell[2] in (round(ill), round(well))
    ]
    assert {("3", round(north)), ("5", round(south))} <= {(text, round(x)) for text, x, _, _ in canvas.texts}
    pixels = canvas.paints[0][0]  # (C, K, 3): shares 1 and 0, 0.2 and 0.8, darker by their square root
    palette = _palette()
    assert pixels[0, 0].tolist() == palette[255].tolist()
    assert pixels[1, 0].tolist() == [255, 255, 255]
    assert pixels[:, 1].tolist() == palette[[round(255 * 0.2**0.5), round(255 * 0.8**0.5)]].tolist()


def test_the_palette_darkens_evenly_and_its_palest_is_not_white():
    palette = _palette().astype(int)
    assert (np.diff(palette.sum(1)) <= 0).all()
    assert palette[0].max() < 255


@pytest.mark.parametrize(
    ("high", "most", "whole", "steps"),
    [
        (7.0, 3, True, [0, 5]), (1.0, 3, True, [0, 1]), (0.0, 3, True, [0]), (310.0, 3, True, [0, 200]),
        (1.0, 5, False, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (0.68, 5, False, [0, 0.2, 0.4, 0.6]), (1e-9, 5, False, None),
    ],
)  # fmt: skip
def test_scales_have_round_steps(high, most, whole, steps):
    found = _steps(high, most=most, whole=whole)
    assert steps is None or found == steps
    assert len(found) <= most + 1


def test_text_is_put_where_its_anchor_says():
    def ink(anchor, **kw):
        canvas = Canvas(200, 200)
        canvas.text(100, 100, "H", 20, anchor, **kw)
        y, x = np.nonzero(np.asarray(canvas.image).sum(2) < 380)
        return x.min(), x.max(), y.min(), y.max()

    left, right, top, bottom = ink("mm")
    assert abs(left + right - 200) <= 2
    assert abs(top + bottom - 200) <= 4
    assert ink("lm")[0] >= 99
    assert ink("rm")[1] <= 100
    assert ink("mt")[2] >= 100
    assert ink("mb")[3] <= 100
    left, right, top, bottom = ink("rm", upright=True)  # its end, which is on top, lies at the point
    assert top >= 99
    assert bottom - top > right - left - 12
    assert abs(left + right - 200) <= 4


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
    (canvas,) = figures
    classes = next(x for text, x, _, _ in canvas.texts if text == "95")
    assert [text for text, x, y, _ in canvas.texts if x == classes and y > canvas.paints[0][1][1]] == [
        str(c) for c in range(0, 100, 5)
    ]


def test_long_names_stand_upright_and_short_ones_do_not(tmp_path, figures):
    draw(counts(30, 2), tmp_path / "p.png", client_names=[f"hospital {k}" for k in range(30)])
    draw(counts(4, 2), tmp_path / "p.png", client_names=[f"hospital {k}" for k in range(4)])
    turned = [next(upright for text, _, _, upright in canvas.texts if text == "hospital 0") for canvas in figures]
    assert turned == [True, False]


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


def test_drawing_costs_no_matplotlib(tmp_path):
    code = f"""
import sys
from fedsim.partition.picture import draw
assert "PIL" not in sys.modules
draw([[1, 2]], {str(tmp_path / "p.png")!r})
assert "matplotlib" not in sys.modules
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
