"""What the families of checkpoints share: placeholders give way to the tokens of their media.

Dimensions: N consecutive tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core import hf_config
from lco_jax.core.errors import LcoError
from lco_jax.data import processor_files
from lco_jax.data.media import MediaConfig
from lco_jax.data.pixels import scale_of
from lco_jax.data.positions import line_positions
from lco_jax.data.processor_files import PICTURE_RULES, Rule
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


class MediaCodec(ABC):
    """How a checkpoint reads media.

    config: the part of its config.json that describes the model. kinds: of the media that it takes.
    rows: tower -> how its media are packed. placeholders: kind of a medium -> its token id.
    SETTINGS: kind of a medium -> the property that reads and checks its settings.
    """

    SETTINGS: Mapping[str, str] = MappingProxyType({"image": "image_settings"})

    def __init__(
        self, folder: Path, config: Mapping[str, Any], media: MediaConfig, kinds: Sequence[str]
    ):
        self.folder = folder
        self.file = folder / "config.json"
        self.config = config
        self.media = media
        self.vocab_size = self._vocab_size()
        self.rows: dict[str, TowerRows] = {}
        self.placeholders = {kind: self.token_id(kind) for kind in kinds}

    def _vocab_size(self) -> int:
        text = hf_config.text_section(dict(self.config), str(self.file))
        processor_files.check(text, self.file, {"vocab_size": processor_files.whole(1, 2**31 - 1)})
        return text["vocab_size"]

    def token_id(self, name: str) -> int:
        """A special token's id in config.json, in either spelling of its key. Raises if it has
        none.
        """
        key = f"{name}_token_id"
        if key not in self.config:
            key = f"{name}_token_index"
        rules = {key: processor_files.whole(0, self.vocab_size - 1)}
        processor_files.check(self.config, self.file, rules)
        if self.config.get(key) is None:
            raise LcoError(f"{self.file} has no {name}_token_id, the token that stands for one")
        return self.config[key]

    def picture_rules(self) -> dict[str, Rule]:
        """What the settings of an image or a video processor must be: {key: rule}."""
        return PICTURE_RULES

    @cached_property
    def image_settings(self) -> tuple[dict[str, Any], Path]:
        """(the settings of the checkpoint's image processor, checked; their file)."""
        return processor_files.read_settings(self.folder, "image_processor", self.picture_rules())

    @cached_property
    def scale(self) -> np.ndarray:
        """How pictures are normalised: float32 [3, 3], as in `scale_of`."""
        return scale_of(self.image_settings[0])

    def check_settings(self, kinds: Iterable[str]) -> None:
        """Raise, by file and key, for a setting that media of these kinds cannot have."""
        for kind in self.placeholders.keys() & set(kinds):
            getattr(self, self.SETTINGS[kind])

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
