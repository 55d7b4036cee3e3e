"""Pictures and clips of meanings.

Dimensions: S = 56 pixels a side, a grid of GRID pixels. Things are drawn four times as large and
shrunk, at most 26 pixels wide, so four fit; corners lie on the grid, which the model's patches
share, so that what a thing looks like is learned within minutes.
"""

from functools import cache

import numpy as np
from PIL import Image, ImageDraw

from laboratory.worlds.concepts import Motion, Pair, Things, pick

SIDE, CELL, GRID, FINE = 56, 28, 7, 4
FRAMES, STEP = 4, 7  # of a clip, and pixels that its thing moves from one to the next
ANGLES = (-8, -4, 0, 4, 8)  # degrees
PIXELS = {
    "small": 14,
    "large": 28,
}  # the width of a thing with the pixel around it that keeps it from the next
RGB = {
    "red": (214, 40, 40),
    "green": (46, 150, 60),
    "blue": (40, 80, 210),
    "yellow": (240, 200, 20),
    "purple": (140, 50, 170),
    "black": (25, 25, 25),
}
# how each thing is drawn in the unit square: (what of PIL's, where, ink or paper)
PARTS = {
    "circle": [("ellipse", (0.02, 0.02, 0.98, 0.98), 1)],
    "square": [("rectangle", (0.08, 0.08, 0.92, 0.92), 1)],
    "triangle": [("polygon", ((0.5, 0.02), (0.99, 0.93), (0.01, 0.93)), 1)],
    "cross": [
        ("rectangle", (0.36, 0.02, 0.64, 0.98), 1),
        ("rectangle", (0.02, 0.36, 0.98, 0.64), 1),
    ],
    "bell": [
        ("ellipse", (0.24, 0.04, 0.76, 0.6), 1),
        ("polygon", ((0.24, 0.3), (0.76, 0.3), (0.97, 0.76), (0.03, 0.76)), 1),
        ("rectangle", (0.46, 0.7, 0.54, 0.84), 1),
        ("ellipse", (0.39, 0.8, 0.61, 0.99), 1),
    ],
    "drum": [
        ("rectangle", (0.08, 0.36, 0.92, 0.8), 1),
        ("ellipse", (0.08, 0.64, 0.92, 0.96), 1),
        ("ellipse", (0.08, 0.2, 0.92, 0.52), 1),
        ("ellipse", (0.19, 0.27, 0.81, 0.45), 0),
        ("polygon", ((0.4, 0.36), (0.9, 0.0), (0.98, 0.08), (0.46, 0.42)), 1),
    ],
    "horn": [
        (
            "polygon",
            ((0.02, 0.42), (0.5, 0.4), (0.9, 0.1), (0.9, 0.9), (0.5, 0.6), (0.02, 0.58)),
            1,
        ),
        ("ellipse", (0.8, 0.06, 0.99, 0.94), 1),
        ("ellipse", (0.86, 0.24, 0.94, 0.76), 0),
    ],
    "bird": [
        ("ellipse", (0.18, 0.32, 0.8, 0.84), 1),
        ("ellipse", (0.54, 0.08, 0.9, 0.46), 1),
        ("polygon", ((0.84, 0.2), (1.0, 0.3), (0.84, 0.36)), 1),
        ("polygon", ((0.0, 0.3), (0.32, 0.5), (0.2, 0.72)), 1),
        ("ellipse", (0.7, 0.18, 0.78, 0.26), 0),
        ("rectangle", (0.42, 0.8, 0.48, 0.99), 1),
        ("rectangle", (0.56, 0.8, 0.62, 0.99), 1),
    ],
}


def picture(meaning: Things | Pair, rng: np.random.Generator) -> Image.Image:
    """An RGB image of S x S."""
    canvas = paper(SIDE, SIDE, rng)
    if isinstance(meaning, Things):
        size, room = PIXELS[meaning.size], CELL if meaning.count > 1 else SIDE
        for cell in rng.permutation(4)[: meaning.count]:
            corner = np.array([cell % 2, cell // 2]) * (room if meaning.count > 1 else 0)
            x, y = (corner + [_place(room - size, rng) for _ in range(2)]).tolist()
            _paste(canvas, meaning.thing, meaning.colour, size, x, y, rng)
        return canvas
    across = _place(SIDE - CELL, rng)  # where both are, on the axis that does not order them
    for i, one in enumerate((meaning.first, meaning.second)):
        size = pick(rng, tuple(PIXELS.values()))
        along, beside = (
            CELL * i + _place(CELL - size, rng),
            across + _place(min(CELL - size, GRID), rng),
        )
        x, y = (along, beside) if meaning.way == "left of" else (beside, along)
        _paste(canvas, one.thing, one.colour, size, x, y, rng)
    return canvas


def clip(meaning: Motion, rng: np.random.Generator) -> list[Image.Image]:
    """Four RGB images of S x S, in which the thing moves at an even speed."""
    size = PIXELS[meaning.size]
    start, across = _place(SIDE - (FRAMES - 1) * STEP - size, rng), _place(SIDE - size, rng)
    angle, places = pick(rng, ANGLES), [start + STEP * i for i in range(FRAMES)]
    frames, back = [], paper(SIDE, SIDE, rng)
    for place in places if meaning.direction in ("right", "down") else places[::-1]:
        x, y = (place, across) if meaning.direction in ("left", "right") else (across, place)
        frame = back.copy()
        frame.paste(RGB[meaning.colour], (x + 1, y + 1), _mask(meaning.thing, size - 2, angle))
        frames.append(frame)
    return frames


def paper(width: int, height: int, rng: np.random.Generator) -> Image.Image:
    """A light ground with a little grain."""
    level = int(rng.integers(228, 250))
    grain = (level + rng.integers(-5, 6, (height, width), np.int16)).astype(np.uint8)
    return Image.fromarray(grain).convert("RGB")


def _place(room: int, rng: np.random.Generator) -> int:
    """A multiple of GRID, at most `room`."""
    return GRID * int(rng.integers(room // GRID + 1))


def _paste(
    canvas: Image.Image,
    thing: str,
    colour: str,
    size: int,
    x: int,
    y: int,
    rng: np.random.Generator,
) -> None:
    shade = tuple(int(np.clip(level + rng.integers(-12, 13), 0, 255)) for level in RGB[colour])
    canvas.paste(shade, (x + 1, y + 1), _mask(thing, size - 2, pick(rng, ANGLES)))


@cache  # things x sizes x angles
def _mask(thing: str, size: int, angle: int) -> Image.Image:
    fine = size * FINE
    mask = Image.new("L", (fine, fine))
    pen = ImageDraw.Draw(mask)
    for shape, where, ink in PARTS[thing]:
        getattr(pen, shape)([round(v * (fine - 1)) for v in np.ravel(where)], fill=255 * ink)
    return mask.rotate(angle, Image.Resampling.BICUBIC).reduce(FINE)
