"""The sizes that Qwen's pictures are resized to."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from lco_jax.core.errors import LcoError, is_number
from lco_jax.data.decoder import SizeRule
from lco_jax.data.frame_choice import FACTOR
from lco_jax.data.images import MAX_RATIO

# tokens of a picture for which a part names its size: qwen_vl_utils' limits
LEAST_TOKENS, MOST_TOKENS = 4, 16_384
SIDES = ("resized_height", "resized_width")
PIXELS = ("min_pixels", "max_pixels", "total_pixels")
ROOM = 1.05  # how far total_pixels may push max_pixels down, in min_pixels


def size_rule_of(
    part: Mapping[str, Any], limits: tuple[int, int], factor: int, where: str
) -> SizeRule:
    """What a part's picture, or each frame of its video, is resized to.

    part: it may have any of `SIDES` and `PIXELS`, with the meaning of qwen_vl_utils.
    limits: the fewest and most pixels, for a part that asks for no others. factor: sides are its
    multiples. where: how errors begin.
    """
    sides = [name for name in SIDES if name in part]
    if sides:
        return _fixed(part, sides, factor, where)
    least, most = part.get("min_pixels", limits[0]), part.get("max_pixels", limits[1])
    total = part.get("total_pixels")
    _check_pixels(least, most, total, where)

    def rule(height: int, width: int, frames: int = 1) -> tuple[int, int]:
        room = most
        if total is not None:
            together = frames + frames % FACTOR  # the last fills up its patch
            share = max(min(limits[1], total / together * FACTOR), int(least * ROOM))
            room = min(most if "max_pixels" in part else share, share)
        return smart_resize(height, width, factor, least, room)

    return rule


def _check_pixels(least: Any, most: Any, total: Any, where: str) -> None:
    """Raise for numbers of pixels that cannot be. total: None if it is not given."""
    numbers = is_number(least, Integral) and is_number(most, Integral)
    if not numbers or not 0 < least <= most:
        raise LcoError(
            f"{where}: min_pixels {least!r:.40} and max_pixels {most!r:.40} must be whole "
            "numbers above 0, in this order"
        )
    if total is not None and (not is_number(total, Integral) or total <= 0):
        raise LcoError(f"{where}: total_pixels is {total!r:.40}; it must be a whole number above 0")


def _fixed(part: Mapping[str, Any], sides: list[str], factor: int, where: str) -> SizeRule:
    """The size that a part names, in multiples of `factor`."""
    if len(sides) == 1:
        raise LcoError(f"{where} has {sides[0]} alone; give {' and '.join(SIDES)}")
    others = [name for name in PIXELS if name in part]
    if others:
        raise LcoError(f"{where} has both {sides[0]} and {others[0]}; keep one")
    height, width = (part[name] for name in SIDES)
    for name, side in zip(SIDES, (height, width), strict=True):
        if not is_number(side, Integral) or side < factor:
            raise LcoError(
                f"{where}: {name} is {side!r:.40}; it must be a whole number from {factor}"
            )
    if max(height, width) > MAX_RATIO * min(height, width):
        raise LcoError(
            f"{where}: {height} x {width} is longer than {MAX_RATIO} times its shorter side"
        )
    least, most = LEAST_TOKENS * factor**2, MOST_TOKENS * factor**2
    size = smart_resize(height, width, factor, least, most)
    return lambda *_: size


def smart_resize(
    height: int, width: int, factor: int, min_pixels: float, max_pixels: float
) -> tuple[int, int]:
    """Upstream's size: multiples of `factor`, nearest to the given ones, scaled into the limits."""
    sides = (height, width)
    rounded = [round(side / factor) * factor for side in sides]  # Python rounds half to even
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rounded = [max(factor, math.floor(side / shrink / factor) * factor) for side in sides]
    elif math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rounded = [math.ceil(side * grow / factor) * factor for side in sides]
    return rounded[0], rounded[1]
