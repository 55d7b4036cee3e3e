"""Pages: rendered words. Dimensions: one word on 112 x 56 pixels, two or three lines on 112 x 84,
28 pixels a line.
"""

from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from laboratory.worlds.concepts import Page, pick
from laboratory.worlds.draw import paper

FONTS = (
    "DejaVuSans.ttf",
    "DejaVuSans-Bold.ttf",
)  # matplotlib brings them; they have all our scripts
WIDTH, LINE, MARGIN = 112, 28, 4  # pixels


def page(meaning: Page, rng: np.random.Generator) -> Image.Image:
    """An RGB image, letters as large as the line and its longest word allow."""
    lines = len(meaning.words)
    canvas = paper(WIDTH, 2 * LINE if lines == 1 else 3 * LINE, rng)
    pen, name, ink = ImageDraw.Draw(canvas), pick(rng, FONTS), int(rng.integers(0, 70))
    size = int(rng.integers(32, 38) if lines == 1 else rng.integers(22, 25))
    while max(_font(name, size).getlength(word) for word in meaning.words) > WIDTH - 2 * MARGIN:
        size -= 1
    line = canvas.height / lines if lines > 1 else canvas.height
    for i, word in enumerate(meaning.words):
        room = WIDTH - 2 * MARGIN - _font(name, size).getlength(word)
        x, y = MARGIN + rng.random() * min(room, 24), (i + 0.5) * line + rng.integers(-1, 2)
        pen.text((x, y), word, font=_font(name, size), fill=(ink, ink, ink), anchor="lm")
    return canvas


@cache  # two fonts x some twenty sizes
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name, size)
