"""The media of a batch, packed into the rows of each tower.

Dimensions: P shards of the batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from lco_jax.core.bins import bucket
from lco_jax.core.packing import TokenSequence
from lco_jax.data.tower_rows import Arrays, MediaAssignment, Processed, TowerRows, fill

MediaRows = dict[str, Arrays]  # tower -> its arguments
MediaShape = dict[str, tuple[int, int]]  # tower -> (the width of its rows, how many a shard has)


def row_widths(rows: Mapping[str, TowerRows], inputs: Sequence[Processed]) -> dict[str, int]:
    """Tower -> the least width of rows that holds each of its media; 0 for a tower without any."""
    media = {tower: _media_of(tower, inputs) for tower in sorted(rows)}
    return {tower: rows[tower].width(found) if found else 0 for tower, found in media.items()}


def padded_media_shape(need: MediaShape, floor: MediaShape) -> MediaShape:
    """A shape that holds `need`: as many rows as in `floor` where they do; else few values."""
    shape = {}
    for tower, (width, count) in need.items():
        _, least = floor.get(tower, (0, 0))
        shape[tower] = (width, least if count <= least else bucket(count, 4))
    return shape


class PackedMedia:
    """The media of each shard's inputs, in rows. How many rows a shard has is decided later.

    rows: tower -> how its media are packed. widths: tower -> the width of its rows; 0 for a tower
    without media. need: the least shape that holds them.
    """

    def __init__(
        self,
        rows: Mapping[str, TowerRows],
        shards: Sequence[Sequence[Processed]],
        widths: Mapping[str, int],
    ):
        self.rows = rows
        self.shards = shards
        self.packed: dict[str, list[tuple[list[Any], MediaAssignment]]] = {}
        self.need: MediaShape = {}
        for tower in sorted(widths):
            width = widths[tower]
            if width:
                media = [_media_of(tower, inputs) for inputs in shards]
                assigned = [rows[tower].assign(found, width) for found in media]
                self.packed[tower] = list(zip(media, assigned, strict=True))
                self.need[tower] = (width, max(one.num_rows for one in assigned))

    def sequences(self, shape: MediaShape) -> list[list[TokenSequence]]:
        """Each shard's inputs, with the slots of their media's tokens if the rows have a shape."""
        slots: list[dict[str, list[np.ndarray]]] = [{} for _ in self.shards]
        offset = 0
        for tower, (width, count) in shape.items():
            for i, (_, assigned) in enumerate(self.packed[tower]):
                slots[i][tower] = [offset + tokens for tokens in assigned.tokens]
            offset += count * self.rows[tower].tokens_per_row(width)
        return [_with_slots(inputs, slots[i]) for i, inputs in enumerate(self.shards)]

    def fill(self, shape: MediaShape) -> MediaRows:
        """Each tower's rows, P times as many as a shard has."""
        return {
            tower: fill(self.rows[tower], self.packed[tower], count, width)
            for tower, (width, count) in shape.items()
        }


def pack_media(
    rows: Mapping[str, TowerRows], shards: Sequence[Sequence[Processed]]
) -> tuple[Callable[[], MediaRows], list[list[TokenSequence]]]:
    """(what makes the towers' rows, each shard's inputs), where there is one process."""
    every = [one for inputs in shards for one in inputs]
    media = PackedMedia(rows, shards, row_widths(rows, every))
    shape = padded_media_shape(media.need, {})
    return partial(media.fill, shape), media.sequences(shape)


def _media_of(tower: str, inputs: Sequence[Processed]) -> list[Any]:
    return [one.medium for each in inputs for one in each.media if one.tower == tower]


def _with_slots(
    inputs: Sequence[Processed], slots: Mapping[str, Sequence[np.ndarray]]
) -> list[TokenSequence]:
    """slots: tower -> those of each of its media, in the order of the inputs."""
    remaining = {tower: iter(of_media) for tower, of_media in slots.items()}
    sequences = []
    for one in inputs:
        media_slots = None
        if one.media:
            media_slots = np.full(len(one), -1, np.int32)
            for tokens in one.media:
                media_slots[tokens.at] = next(remaining[tokens.tower])
        sequences.append(TokenSequence(one.input_ids, one.position_ids, media_slots, one.answer))
    return sequences
