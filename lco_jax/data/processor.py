"""Chat messages with media -> tokens, positions and tower inputs, for whichever checkpoint; and tower inputs -> rows.

Dimensions: P shards of the rows.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json
from lco_jax.core.hf_config import complete
from lco_jax.core.packing import TokenSequence, bucket
from lco_jax.data.llava import LlavaMedia
from lco_jax.data.media import MediaConfig
from lco_jax.data.positions import line_positions
from lco_jax.data.prompts import KINDS, ChatTokenizer, Messages, media_parts
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

    def __call__(self, conversations: Sequence[Messages], names: Sequence[str] | None = None) -> list[Processed]:
        """Chat messages -> what the model reads. names: what errors call them. Raises for the first that is bad."""
        names = names or [f"input {i}" for i in range(len(conversations))]
        results = self.attempt(conversations, names)
        if errors := [result for result in results if isinstance(result, LcoError)]:
            raise errors[0]
        return results  # type: ignore[return-value]

    def attempt(self, conversations: Sequence[Messages], names: Sequence[str]) -> list[Processed | LcoError]:
        """As calling it, with an error in the place of each bad input."""
        rendered = [self._render(messages, name) for messages, name in zip(conversations, names, strict=True)]
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
            return LcoError(f"{name}: the checkpoint's chat template does not take these messages: {reason:.200}")

    def _process(self, messages: Messages, ids: np.ndarray, name: str) -> Processed | LcoError:
        try:
            parts = media_parts(messages)
            if closed := [part["type"] for part in parts if part["type"] not in self.modalities]:
                raise LcoError(f"{name} has {closed[0]}, and this model takes {', '.join(self.modalities)}")
            if parts:
                loaded = [(part["type"], self.codec.load(part, name)) for part in parts]
                if "audio" not in self.modalities and any(getattr(x, "sound", None) is not None for _, x in loaded):
                    raise LcoError(f"{name} has a video with sound, and this model takes {', '.join(self.modalities)}")
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
        {**message, "content": [p if p["type"] == "text" else {"type": p["type"]} for p in message["content"]]}
        for message in messages
    ]


def lay_media(
    layouts: dict[str, TowerRows],
    shards: Sequence[Sequence[Processed]],
    agree: Callable[[np.ndarray], np.ndarray] = lambda need: need,
    floor: MediaShape | None = None,
) -> tuple[Callable[[], MediaRows], list[list[TokenSequence]], MediaShape]:
    """Lay the media of each shard's inputs into tower rows: (what makes the rows, P times as many as a shard has; the
    inputs' tokens; the least shape that holds them).

    agree: makes the shapes of all processes one (the largest): int array -> int array, elementwise. floor: a shape to
    keep to wherever it does.
    """
    floor = floor or {}
    known = sorted(layouts)
    items = {
        tower: [[placed.item for one in inputs for placed in one.media if placed.tower == tower] for inputs in shards]
        for tower in known
    }
    need = np.array([max(layouts[t].width(x) for x in items[t]) if any(items[t]) else 0 for t in known], np.int64)
    widths = np.maximum(agree(need), [floor.get(tower, (0, 0))[0] for tower in known])
    laid = {t: [layouts[t].lay(x, int(w)) for x in items[t]] for t, w in zip(known, widths, strict=True) if w}
    need = np.array([max((x.rows for x in laid[t]), default=0) if t in laid else 0 for t in known], np.int64)
    shape = {t: (int(w), int(n)) for t, w, n in zip(known, widths, agree(need), strict=True) if w}
    sizes: MediaShape = {}
    slots: list[dict[str, Any]] = [{} for _ in shards]
    offset = 0
    for tower, (width, count) in shape.items():
        least = floor.get(tower, (0, 0))[1]
        count = least if count <= least else bucket(count, 4)
        sizes[tower] = (width, count)
        for shard, where in enumerate(laid[tower]):
            slots[shard][tower] = iter([tokens + offset for tokens in where.tokens])
        offset += count * layouts[tower].tokens_per_row(width)

    def rows() -> MediaRows:
        return {
            t: layouts[t].fill(list(zip(items[t], laid[t], strict=True)), count, width)
            for t, (width, count) in sizes.items()
        }

    return rows, [[_with_slots(one, slots[shard]) for one in inputs] for shard, inputs in enumerate(shards)], shape


def _with_slots(one: Processed, slots: dict[str, Any]) -> TokenSequence:
    if not one.media:
        return TokenSequence(one.input_ids, one.position_ids, answer=one.answer)
    media_slots = np.full(len(one), -1, np.int32)
    for placed in one.media:
        media_slots[placed.at] = next(slots[placed.tower])
    return TokenSequence(one.input_ids, one.position_ids, media_slots, one.answer)
