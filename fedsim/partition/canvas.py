"""A sheet of pixels to draw a picture's boxes, images and texts on; without a plotting library's start."""

from __future__ import annotations

import functools
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image, ImageFont

DPI = 120  # pixels an inch
BLACK, GREY = "#000000", "#b0b0b0"

Box = tuple[float, float, float, float]  # left, top, right, bottom; the last two beyond it


class Canvas:
    """White, and drawn upon from the top left.

    Args:
        width: pixels.
        height: pixels.

    """

    def __init__(self, width: int, height: int) -> None:
        from PIL import Image, ImageDraw  # here: most commands draw nothing

        self.image: Image.Image = Image.new("RGB", (width, height), "white")
        self._draw: Any = ImageDraw.Draw(self.image)

    def fill(self, box: Box, colour: str) -> None:
        """Fill a box, at least a pixel wide and high where it is not empty."""
        left, top, right, bottom = (round(edge) for edge in box)
        if right > left and bottom > top:
            self._draw.rectangle((left, top, right - 1, bottom - 1), fill=colour)

    def line(self, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Draw a line of one pixel."""
        self._draw.line((*map(round, start), *map(round, end)), fill=BLACK)

    def frame(self, box: Box) -> None:
        """Draw the outline of a box."""
        left, top, right, bottom = (round(edge) for edge in box)
        self._draw.rectangle((left, top, right - 1, bottom - 1), outline=BLACK)

    def paint(self, pixels: npt.NDArray[np.uint8], box: Box) -> None:
        """Paint a matrix of colours (rows, columns, 3) over a box; each cell keeps its edges."""
        from PIL import Image

        left, top, right, bottom = (round(edge) for edge in box)
        cells = Image.fromarray(np.ascontiguousarray(pixels))
        self.image.paste(cells.resize((right - left, bottom - top), Image.Resampling.NEAREST), (left, top))

    def text(  # noqa: PLR0913  where, what and how of one text
        self, x: float, y: float, text: str, points: float, anchor: str = "mm", *, colour: str = BLACK,
        upright: bool = False,
    ) -> None:  # fmt: skip
        """Write a text.

        Args:
            x: pixels from the left, of the anchor.
            y: pixels from the top.
            text: one line.
            points: height of the letters' body, 1/72 inch.
            anchor: what of the text as it reads lies there: l, m or r across, t, m or b along the height.
            colour: of the letters.
            upright: turn it a quarter, to be read from below; l is then its lower end.

        """
        font = font_of(points)
        left, _, right, _ = font.getbbox(text, anchor="ls")
        ascent, descent = font.getmetrics()
        across = {"l": 0.0, "m": (right + left) / 2, "r": right}[anchor[0]]
        along = {"t": -ascent, "m": -0.36 * ascent, "b": descent}[anchor[1]]  # digits and capitals in the middle
        if not upright:
            self._draw.text((x - across, y - along), text, fill=colour, font=font, anchor="ls")
            return
        from PIL import Image, ImageDraw

        size = (round(right - min(left, 0)) + 1, ascent + descent)
        mask = Image.new("L", size, 0)
        ImageDraw.Draw(mask).text((0, ascent), text, fill=255, font=font, anchor="ls")
        turned = mask.transpose(Image.Transpose.ROTATE_90)  # x runs up, y runs to the right
        corner = (round(x - (ascent + along)), round(y + across - size[0]))
        self.image.paste(colour, (*corner, corner[0] + turned.width, corner[1] + turned.height), turned)

    def save(self, path: Path) -> None:
        """Write the picture; the suffix says the format."""
        options: dict[str, Any] = {"compress_level": 3} if path.suffix.lower() == ".png" else {}
        self.image.save(path, **options)


def width_of(text: str, points: float) -> float:
    """Return how wide a text is, in pixels."""
    return float(font_of(points).getlength(text))


@functools.cache
def font_of(points: float) -> ImageFont.FreeTypeFont:
    """Return the letters of a size: those that matplotlib brings, which know most alphabets."""
    from PIL import ImageFont

    found = find_spec("matplotlib")  # where it is, without loading it
    for folder in (found.submodule_search_locations or ()) if found else ():
        file = Path(folder) / "mpl-data" / "fonts" / "ttf" / "DejaVuSans.ttf"
        if file.exists():
            return ImageFont.truetype(str(file), points * DPI / 72)
    font = ImageFont.load_default(points * DPI / 72)
    assert isinstance(font, ImageFont.FreeTypeFont)  # what a size asks for
    return font
