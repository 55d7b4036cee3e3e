"""Chat messages with media -> tokens, positions and tower inputs, for whichever checkpoint; and tower inputs -> rows.

Dimensions: P shards of the rows.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json
from lco_jax.core.hf_config import complete
from lco_jax.core.packing import TokenSequence, bucket
from lco_jax.data.content import KINDS, Messages, media_parts
from lco_jax.data.llava import LlavaMedia
from lco_jax.data.media import MediaConfig
from lco_jax.data.positions import line_positions
from lco_jax.data.prompts import ChatTokenizer
from lco_jax.data.qwen import QwenMedia
from lco_jax.data.tower_rows import Processed, TowerRows

MediaRows = dict[str, dict[str, np.ndarray]]  # tower -> argument -> rows
MediaShape = dict[str, tuple[int, int]]  # tower -> the width of its rows, and how many a shard has


class Processor:
    """What a checkpoint's tokenizer, template and processors do, in numpy.

    folder: a checkpoint folder. max_tokens: what the model's context holds; longer inputs raise by name.
    media: caps on media. video_positions: "4.57" or "5", whose positions Qwen2.5-VL's videos get.
    modalities: what is taken; whatever else comes raises by name.
    """

    def __init__(
        self,
        folder: str | Path,
        max_tokens: int = 32768,
        media: MediaConfig | None = None,
        video_positions: str = "4.57",
        modalities: tuple[str, ...] = KINDS,
    ):
        self.folder, self.max_tokens = Path(folder), max_tokens
        config = read_json(self.folder / "config.json")
        thinker = config.get("thinker_config")  # of a full Qwen2.5-Omni
        config = complete({"model_type": "qwen2_5_omni_thinker", **thinker} if thinker else config)
        media = MediaConfig() if media is None else media
        self.tokenizer = ChatTokenizer(self.folder)
        self.modalities = modalities
        if config.get("model_type") == "llava_next":
            self.codec: QwenMedia | LlavaMedia = LlavaMedia(self.folder, config, media)
        else:
            self.codec = QwenMedia(self.folder, config, media, video_positions)

    @property
    def rows(self) -> dict[str, TowerRows]:
        """How each tower's rows are laid out."""
        return self.codec.rows

    def __call__(
        self, conversations: Sequence[Messages], names: Sequence[str] | None = None
    ) -> list[Processed]:
        """Chat messages -> what the model reads. names: what errors call them. Raises for the first that is bad."""
        names = names or [f"input {i}" for i in range(len(conversations))]
        results = self.attempt(conversations, names)
        if errors := [result for result in results if isinstance(result, LcoError)]:
            raise errors[0]
        return results  # type: ignore[return-value]

    def attempt(
        self, conversations: Sequence[Messages], names: Sequence[str]
    ) -> list[Processed | LcoError]:
        """As calling it, with an error in the place of each bad input."""
        rendered = [
            self._render(messages, name)
            for messages, name in zip(conversations, names, strict=True)
        ]
        ids = iter(self.tokenizer.ids([text for text in rendered if isinstance(text, str)]))
        return [
            self._process(messages, next(ids), name) if isinstance(text, str) else text
            for messages, text, name in zip(conversations, rendered, names, strict=True)
        ]

    def _render(self, messages: Messages, name: str) -> str | LcoError:
        try:
            return self.tokenizer.render(_without_media(messages))
        except Exception as error:  # a template may raise anything on turns it does not foresee
            reason = str(error).strip() or type(error).__name__
            return LcoError(
                f"{name}: the checkpoint's chat template does not take these messages: {reason:.200}"
            )

    def _process(self, messages: Messages, ids: np.ndarray, name: str) -> Processed | LcoError:
        try:
            parts = media_parts(messages)
            if closed := [part["type"] for part in parts if part["type"] not in self.modalities]:
                raise LcoError(
                    f"{name} has {closed[0]}, and this model takes {', '.join(self.modalities)}"
                )
            if parts:
                loaded = [(part["type"], self.codec.load(part, name)) for part in parts]
                if "audio" not in self.modalities and any(
                    getattr(x, "sound", None) is not None for _, x in loaded
                ):
                    raise LcoError(
                        f"{name} has a video with sound, and this model takes {', '.join(self.modalities)}"
                    )
                processed = self.codec.expand(ids, loaded, name)
            else:
                processed = Processed(ids, line_positions(0, len(ids)))
        except LcoError as error:
            return error
        return self.fitting(processed, name)

    def fitting(self, processed: Processed, name: str) -> Processed | LcoError:
        """It, or what is wrong where the model's context does not hold it."""
        if len(processed) <= self.max_tokens:
            return processed
        return LcoError(
            f"{name}: {len(processed)} tokens (template included), and the model takes {self.max_tokens}; "
            "cut texts with max_length, and media by their caps"
        )


def _without_media(messages: Messages) -> Messages:
    """The messages as templates need them: media parts by their type alone."""
    return [
        {
            **message,
            "content": [
                p if p["type"] == "text" else {"type": p["type"]} for p in message["content"]
            ],
        }
        for message in messages
    ]


def widest(layouts: Mapping[str, TowerRows], inputs: Sequence[Processed]) -> dict[str, int]:
    """Of each tower, the least width of rows that holds every medium; 0 where there are none for
    it."""
    found = {tower: _items(tower, inputs) for tower in sorted(layouts)}
    return {tower: layouts[tower].width(items) if items else 0 for tower, items in found.items()}


def with_room(need: MediaShape, floor: MediaShape) -> MediaShape:
    """A shape that holds `need`: as many rows as `floor` has wherever that does; else few
    values."""
    shape = {}
    for tower, (width, count) in need.items():
        least = floor.get(tower, (0, 0))[1]
        shape[tower] = (width, least if count <= least else bucket(count, 4))
    return shape


class PackedMedia:
    """The media of each shard's inputs, laid into tower rows; how many rows there will be is told
    afterwards.

    widths: of each tower's rows; 0 for a tower that gets none. need: the least shape that holds
    them.
    """

    def __init__(
        self,
        layouts: Mapping[str, TowerRows],
        shards: Sequence[Sequence[Processed]],
        widths: Mapping[str, int],
    ):
        self.layouts, self.inputs = layouts, shards
        towers = [tower for tower in sorted(widths) if widths[tower]]
        self.items = {tower: [_items(tower, inputs) for inputs in shards] for tower in towers}
        self.packed = {
            tower: [layouts[tower].assign(items, widths[tower]) for items in self.items[tower]]
            for tower in towers
        }
        self.need: MediaShape = {
            tower: (widths[tower], max((one.rows for one in self.packed[tower]), default=0))
            for tower in towers
        }

    def sequences(self, shape: MediaShape) -> list[list[TokenSequence]]:
        """Each shard's inputs, their media's tokens where they lie if the rows have a shape."""
        slots: list[dict[str, Any]] = [{} for _ in self.inputs]
        offset = 0
        for tower, (width, count) in shape.items():
            for shard, where in enumerate(self.packed[tower]):
                slots[shard][tower] = iter([tokens + offset for tokens in where.tokens])
            offset += count * self.layouts[tower].tokens_per_row(width)
        return [
            [_with_slots(one, slots[shard]) for one in inputs]
            for shard, inputs in enumerate(self.inputs)
        ]

    def fill(self, shape: MediaShape) -> MediaRows:
        """The rows, P times as many as a shard has."""
        return {
            tower: self.layouts[tower].fill(
                list(zip(self.items[tower], self.packed[tower], strict=True)), count, width
            )
            for tower, (width, count) in shape.items()
        }


def pack_media(
    layouts: Mapping[str, TowerRows], shards: Sequence[Sequence[Processed]]
) -> tuple[Callable[[], MediaRows], list[list[TokenSequence]], MediaShape]:
    """Lay the media of each shard's inputs into tower rows, where there is one process: (what makes
    the rows, the inputs' tokens, the rows' shape)."""
    media = PackedMedia(
        layouts, shards, widest(layouts, [one for inputs in shards for one in inputs])
    )
    shape = with_room(media.need, {})
    return partial(media.fill, shape), media.sequences(shape), shape


def _items(tower: str, inputs: Sequence[Processed]) -> list[Any]:
    return [placed.item for one in inputs for placed in one.media if placed.tower == tower]


def _with_slots(one: Processed, slots: dict[str, Any]) -> TokenSequence:
    if not one.media:
        return TokenSequence(one.input_ids, one.position_ids, answer=one.answer)
    media_slots = np.full(len(one), -1, np.int32)
    for placed in one.media:
        media_slots[placed.at] = next(slots[placed.tower])
    return TokenSequence(one.input_ids, one.position_ids, media_slots, one.answer)
