"""What the families of checkpoints share: placeholders give way to the tokens of their media.

Dimensions: N consecutive tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.media import MediaConfig
from lco_jax.data.pixels import read_scale
from lco_jax.data.positions import line_positions
from lco_jax.data.prompts import MEDIA
from lco_jax.data.tower_rows import MediaTokens, Processed, TowerInput, TowerRows


class Expansion(NamedTuple):
    """Consecutive tokens: what takes the place of a placeholder, or a text.

    ids: int32 [N]. positions: int32 [N, 3]. end: the position of what follows.
    media: their `at` counts from the first of the N tokens.
    """

    ids: np.ndarray
    positions: np.ndarray
    end: int
    media: tuple[MediaTokens, ...] = ()


def of_text(ids: np.ndarray, start: int) -> Expansion:
    """A text at the positions from `start` on."""
    return Expansion(ids, line_positions(start, len(ids)), start + len(ids))


def of_medium(token: int, positions: np.ndarray, tower: str, medium: TowerInput) -> Expansion:
    """A medium as N placeholders. What follows goes on from the largest position."""
    count = len(positions)
    ids = np.full(count, token, np.int32)
    tokens = MediaTokens(tower, medium, np.arange(count))
    return Expansion(ids, positions, int(positions.max()) + 1, (tokens,))


def token_id(config: Mapping[str, Any], name: str) -> int | None:
    """A special token's id in a model's configuration, in either spelling of its key."""
    return config.get(f"{name}_token_id", config.get(f"{name}_token_index"))


class MediaCodec(ABC):
    """How a checkpoint reads media.

    rows: tower -> how its media are packed. placeholders: kind of a medium -> its token id.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], media: MediaConfig):
        self.folder = folder
        self.media = media
        self.rows: dict[str, TowerRows] = {}
        self.placeholders: dict[str, int] = {}
        for kind in MEDIA:
            token = token_id(config, kind)
            if token is not None:
                self.placeholders[kind] = token

    @cached_property
    def scale(self) -> np.ndarray:
        """How pictures are normalised: float32 [3, 3], as in `read_scale`."""
        return read_scale(self.folder)

    @abstractmethod
    def load(self, part: dict[str, Any], where: str) -> Any:
        """The medium of a chat part. where: how errors begin."""

    @abstractmethod
    def expansion(self, medium: Any, start: int) -> Expansion:
        """What takes the place of a medium, at the positions from `start` on."""

    def expand(self, ids: np.ndarray, media: Sequence[tuple[str, Any]], where: str) -> Processed:
        """A model's input, from token ids with one placeholder a medium.

        media: (kind, medium) of each, in the order of the placeholders. where: how errors begin.
        """
        places = np.flatnonzero(np.isin(ids, list(self.placeholders.values())))
        expected = [self.placeholders.get(kind) for kind, _ in media]
        if ids[places].tolist() != expected:
            raise LcoError(
                f"{where}: its {len(media)} media do not match the {len(places)} placeholders in "
                "its text; does the text name a special token?"
            )
        first_text, *texts = np.split(ids, places)
        pieces = [of_text(first_text, 0)]
        for (_, medium), text in zip(media, texts, strict=True):
            pieces.append(self.expansion(medium, pieces[-1].end))
            after = text[1:]  # without the placeholder
            pieces.append(of_text(after, pieces[-1].end))
        return _joined(pieces)


def _joined(pieces: Sequence[Expansion]) -> Processed:
    media: list[MediaTokens] = []
    length = 0
    for piece in pieces:
        media += [tokens._replace(at=length + tokens.at) for tokens in piece.media]
        length += len(piece.ids)
    ids = np.concatenate([piece.ids for piece in pieces])
    positions = np.concatenate([piece.positions for piece in pieces])
    return Processed(ids, positions, tuple(media))
