"""LLaVA-NeXT's processor, without torch: an image -> tiles and the order in which their tokens reach the decoder.

Dimensions: N tokens a side of a tile, X height and width of a tile.
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
from lco_jax.data.images import load_image
from lco_jax.data.media import MediaConfig
from lco_jax.data.pixels import read_scale, resize
from lco_jax.data.positions import line_positions
from lco_jax.data.tower_rows import MediaTokens, Processed, TileRows, Tiles, TowerRows


class LlavaMedia:
    """Images of one checkpoint."""

    def __init__(self, folder: Path, config: dict[str, Any], media: MediaConfig):
        self.folder, self.media = folder, media
        vision = config["vision_config"]
        self.image_size, self.side = (
            vision["image_size"],
            vision["image_size"] // vision["patch_size"],
        )
        self.pinpoints = [tuple(size) for size in config["image_grid_pinpoints"]]
        self.rows: dict[str, TowerRows] = {
            "vision_tower": TileRows(self.side**2 + 1, self.image_size)
        }
        self.placeholder = config.get("image_token_index", config.get("image_token_id"))

    @cached_property
    def scale(self) -> np.ndarray:
        """How pictures are normalised: float32 [3, 3], as of `read_scale`."""
        return read_scale(self.folder)

    def load(self, part: dict[str, Any], where: str) -> Tiles:
        """The image of a chat part."""
        if part["type"] != "image":
            raise LcoError(f"{where} has {part['type']}, which this checkpoint does not take")
        if options := sorted(part.keys() - {"type", "image"}):
            raise LcoError(
                f"{where}: an image has {options[0]}, and LLaVA-NeXT's tiles have sizes of their own"
            )
        image = np.asarray(load_image(part["image"], where, self.media))
        height, width = image.shape[:2]
        best = self._best_resolution(height, width)
        tiles = np.stack(
            [resize(image, self.image_size, self.image_size), *self._tiles(image, best)]
        )
        return Tiles(tiles.transpose(0, 3, 1, 2), self._order(height, width, best), self.scale)

    def _tiles(self, image: np.ndarray, best: tuple[int, int]) -> np.ndarray:
        """uint8 [X, X, 3] each: the image, fitted into `best` and padded with black, cut row by row."""
        height, width = image.shape[:2]
        if best[1] / width < best[0] / height:
            fitted = min(math.ceil(height * (best[1] / width)), best[0]), best[1]
        else:
            fitted = best[0], min(math.ceil(width * (best[0] / height)), best[1])
        top, left = (best[0] - fitted[0]) // 2, (best[1] - fitted[1]) // 2
        canvas = np.zeros((*best, 3), np.uint8)
        canvas[top : top + fitted[0], left : left + fitted[1]] = resize(image, *fitted)
        size = self.image_size
        return rearrange(canvas, "(down x) (across y) c -> (down across) x y c", x=size, y=size)

    def _order(self, height: int, width: int, best: tuple[int, int]) -> np.ndarray:
        """The base tile's tokens; then those of the tiled image without its padding, a newline after each row."""
        down, across = best[0] // self.image_size, best[1] // self.image_size
        n = self.side
        tile, token = np.arange(down * across).reshape(down, across), np.arange(n * n).reshape(n, n)
        # grid[i, j]: the token at row i and column j of the whole image; tile 0 is the base
        grid = (1 + tile)[:, None, :, None] * (n * n + 1) + token[None, :, None, :]
        grid = grid.reshape(down * n, across * n)
        if width / height > grid.shape[1] / grid.shape[0]:
            padding = (grid.shape[0] - int(round(height * (grid.shape[1] / width), 7))) // 2
            grid = grid[padding : grid.shape[0] - padding]
        else:
            padding = (grid.shape[1] - int(round(width * (grid.shape[0] / height), 7))) // 2
            grid = grid[:, padding : grid.shape[1] - padding]
        newlines = np.full((len(grid), 1), n * n)  # every tile's last token is the same newline
        return np.concatenate(
            [token.reshape(-1), np.concatenate([grid, newlines], axis=1).reshape(-1)]
        )

    def _best_resolution(self, height: int, width: int) -> tuple[int, int]:
        """The tiling in which most of the image's pixels survive, and of those the one that wastes the least."""

        def fitness(size: tuple[int, int]) -> tuple[int, int]:
            scale = min(size[1] / width, size[0] / height)
            kept = min(int(width * scale) * int(height * scale), width * height)
            return kept, kept - size[0] * size[1]

        return max(self.pinpoints, key=fitness)  # the first of equals, as upstream

    def expand(self, ids: np.ndarray, media: list[tuple[str, Tiles]], where: str) -> Processed:
        """Token ids with one placeholder an image -> the tokens and positions of the whole."""
        found = np.flatnonzero(ids == self.placeholder)
        if len(found) != len(media):
            raise LcoError(
                f"{where}: {len(media)} images and {len(found)} placeholders; does its text hold <image>?"
            )
        counts = np.ones(len(ids), np.int64)
        counts[found] = [len(tiles.order) for _, tiles in media]
        ends = np.cumsum(counts)
        placed = [
            MediaTokens("vision_tower", tiles, np.arange(ends[i] - counts[i], ends[i]))
            for i, (_, tiles) in zip(found, media, strict=True)
        ]
        return Processed(np.repeat(ids, counts), line_positions(0, int(ends[-1])), tuple(placed))
