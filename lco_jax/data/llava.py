"""LLaVA-NeXT's processor, without torch: an image -> tiles, and the order of their tokens.

Dimensions: N tokens of a tile's side, X height and width of a tile.
Sources: image_processing_llava_next.py, and `pack_image_features` and `unpad_image` of
modeling_llava_next.py, which are an order of tokens and nothing else.
"""

import math
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from einops import rearrange

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json
from lco_jax.data.codec import Expansion, MediaCodec, of_medium
from lco_jax.data.images import load_pixels, resize
from lco_jax.data.media import MediaConfig
from lco_jax.data.positions import line_positions
from lco_jax.data.processor_files import NESTED, PICTURE_RULES, Rule, check, equal, sizes
from lco_jax.data.tower_rows import Segments, tile_rows, tiles_of

TOWER = "vision_tower"
Size = tuple[int, int]  # height, width
MOST_CANVASES, MOST_TILES = 1000, 64  # the tiles along a side of a canvas


class LlavaMedia(MediaCodec):
    """Images of one checkpoint."""

    def __init__(self, folder: Path, config: dict[str, Any], media: MediaConfig):
        super().__init__(folder, config, media, ("image",))
        vision = config["vision_config"]
        self.tile = vision["image_size"]
        self.patch = vision["patch_size"]
        self.side = self.tile // self.patch
        check(config, self.file, {"image_grid_pinpoints": canvases(self.tile)})
        self.canvases = [tuple(size) for size in config["image_grid_pinpoints"]]
        newline = 1
        self.rows[TOWER] = tile_rows(self.side**2 + newline, self.tile)

    def picture_rules(self) -> dict[str, Rule]:
        of_model = ", as config.json has it"
        return {
            **PICTURE_RULES,
            "size": sizes(equal(self.tile, of_model)),
            "crop_size": sizes(equal(self.tile, of_model)),
            "image_grid_pinpoints": equal(self.config["image_grid_pinpoints"], of_model),
        }

    @cached_property
    def image_settings(self) -> tuple[dict[str, Any], Path]:
        """As the base class has it. The other file's patch size must be the model's, too."""
        nested = self.folder / NESTED
        if nested.exists():
            rules = {"patch_size": equal(self.patch, ", as config.json has it")}
            check(read_json(nested), nested, rules)
        return super().image_settings

    def load(self, part: dict[str, Any], where: str) -> Segments:
        """The image of a chat part."""
        if part["type"] != "image":
            raise LcoError(f"{where} has {part['type']}, which this checkpoint does not take")
        options = sorted(part.keys() - {"type", "image"})
        if options:
            raise LcoError(
                f"{where}: an image has {options[0]}, and the sizes of LLaVA-NeXT's tiles are fixed"
            )
        image = load_pixels(part["image"], where, self.media)
        size = image.shape[:2]
        canvas = self._best_canvas(size)
        overview = resize(image, self.tile, self.tile)
        tiles = np.stack([overview, *self._tiles(image, canvas)])
        return tiles_of(tiles.transpose(0, 3, 1, 2), self._order(size, canvas), self.scale)

    def _best_canvas(self, size: Size) -> Size:
        """The canvas that keeps most of the image's pixels, and of those the smallest."""

        def fitness(canvas: Size) -> tuple[int, int]:
            scale = _scale(size, canvas)
            kept = min(int(size[1] * scale) * int(size[0] * scale), math.prod(size))
            return kept, -math.prod(canvas)

        return max(self.canvases, key=fitness)  # the first of equals, as upstream

    def _tiles(self, image: np.ndarray, canvas: Size) -> np.ndarray:
        """uint8 [tiles, X, X, 3]: the image in the middle of a black canvas, cut row by row."""
        scale = _scale(image.shape[:2], canvas)
        height = min(math.ceil(image.shape[0] * scale), canvas[0])
        width = min(math.ceil(image.shape[1] * scale), canvas[1])
        top = (canvas[0] - height) // 2
        left = (canvas[1] - width) // 2
        pixels = np.zeros((*canvas, 3), np.uint8)
        pixels[top : top + height, left : left + width] = resize(image, height, width)
        return rearrange(
            pixels,
            "(down x) (across y) c -> (down across) x y c",
            x=self.tile,
            y=self.tile,
        )

    def _order(self, size: Size, canvas: Size) -> np.ndarray:
        """Which tokens the decoder reads, as in `Segments`.

        Those of the overview, then the rows of the canvas without its padding, each followed by a
        newline.
        """
        down = canvas[0] // self.tile
        across = canvas[1] // self.tile
        newline = self.side**2  # its index among a tile's tokens, the last
        tokens = np.arange((1 + down * across) * (newline + 1))
        by_tile = tokens.reshape(-1, newline + 1)[:, :newline]
        grid = rearrange(
            by_tile[1:],
            "(down across) (y x) -> (down y) (across x)",
            down=down,
            y=self.side,
        )
        scale = _scale(size, grid.shape)
        for axis, length in enumerate(grid.shape):
            real = int(round(size[axis] * scale, 7))
            padding = (length - real) // 2
            grid = grid.take(range(padding, length - padding), axis)
        rows = np.pad(grid, ((0, 0), (0, 1)), constant_values=newline)  # all newlines are alike
        return np.concatenate([by_tile[0], rows.reshape(-1)])

    def expansion(self, medium: Segments, start: int) -> Expansion:
        """An image's tokens, at positions as those of a text."""
        positions = line_positions(start, len(medium.order))
        return of_medium(self.placeholders["image"], positions, TOWER, medium)


def canvases(tile: int) -> Rule:
    """What image_grid_pinpoints must be: sizes of whole tiles. tile: the side of one."""

    def holds(value: Any) -> bool:
        return (
            isinstance(value, list)
            and 0 < len(value) <= MOST_CANVASES
            and all(map(_is_size, value))
        )

    def _is_size(size: Any) -> bool:
        return (
            isinstance(size, list | tuple)
            and len(size) == 2
            and all(side in range(tile, MOST_TILES * tile + 1, tile) for side in size)
        )

    return Rule(holds, f"a list of [height, width], each one to {MOST_TILES} times {tile}")


def _scale(size: Size, room: Size) -> float:
    """By how much an image is scaled to fill as much of a room as it can."""
    return min(room[0] / size[0], room[1] / size[1])
