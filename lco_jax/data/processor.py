"""Chat messages with media -> tokens, positions and towers' inputs, for whichever checkpoint."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, TooLong
from lco_jax.core.files import read_json
from lco_jax.core.hf_config import complete
from lco_jax.data.codec import MediaCodec
from lco_jax.data.content import KINDS, Messages, media_parts
from lco_jax.data.llava import LlavaMedia
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor_files import has_settings
from lco_jax.data.prompts import ChatTokenizer
from lco_jax.data.qwen import QwenMedia
from lco_jax.data.tower_rows import Processed, TowerRows


class Processor:
    """What a checkpoint's tokenizer, template and processors do, in numpy.

    folder: a checkpoint folder. max_tokens: as many as the model's context has; a longer input is
    an error. media: caps on media. video_positions: "4.57" or "5", the release of transformers
    whose positions Qwen2.5-VL's videos get. modalities: the kinds of content that are taken; others
    are an error. Errors begin with the input's name.
    """

    def __init__(
        self,
        folder: str | Path,
        max_tokens: int = 32768,
        media: MediaConfig | None = None,
        video_positions: str = "4.57",
        modalities: tuple[str, ...] = KINDS,
    ):
        self.folder = Path(folder)
        self.max_tokens = max_tokens
        self.modalities = modalities
        self.tokenizer = ChatTokenizer(self.folder)
        config = _model_config(self.folder)
        media = media or MediaConfig()
        self.codec: MediaCodec
        if config.get("model_type") == "llava_next":
            self.codec = LlavaMedia(self.folder, config, media)
        else:
            self.codec = QwenMedia(self.folder, config, media, video_positions)
        if has_settings(self.folder):  # whoever embeds texts alone may have no such file
            self.codec.check_settings(modalities)

    @property
    def rows(self) -> dict[str, TowerRows]:
        """Tower -> how media are packed into its rows."""
        return self.codec.rows

    def __call__(
        self, conversations: Sequence[Messages], names: Sequence[str] | None = None
    ) -> list[Processed]:
        """Chat messages -> what the model reads. names: of the inputs, for errors.

        Raises for the first bad input.
        """
        if names is None:
            names = [f"input {i}" for i in range(len(conversations))]
        results = []
        for result in self.attempt(conversations, names):
            if isinstance(result, LcoError):
                raise result
            results.append(result)
        return results

    def attempt(
        self, conversations: Sequence[Messages], names: Sequence[str]
    ) -> list[Processed | LcoError]:
        """The same, with an error in the place of each bad input."""
        rendered = self.tokenizer.render_all([_without_media(chat) for chat in conversations])
        ids = iter(self.tokenizer.ids([text for text in rendered if isinstance(text, str)]))
        results: list[Processed | LcoError] = []
        for messages, text, name in zip(conversations, rendered, names, strict=True):
            if isinstance(text, str):
                results.append(self._process(messages, next(ids), name))
            else:
                results.append(LcoError(f"{name}: {text}"))
        return results

    def _process(self, messages: Messages, ids: np.ndarray, name: str) -> Processed | LcoError:
        if not len(ids):
            return LcoError(f"{name}: the checkpoint's chat template and tokenizer leave no token")
        try:
            media = [self._load(part, name) for part in media_parts(messages)]
            processed = self.codec.expand(ids, media, name)
            return self.checked(processed, name)
        except LcoError as error:
            return error

    def _load(self, part: dict[str, Any], name: str) -> tuple[str, Any]:
        """(the kind of a part's medium, the medium)."""
        kind = part["type"]
        takes = ", ".join(self.modalities)
        if kind not in self.modalities:
            raise LcoError(f"{name} has {kind}, and this model takes {takes}")
        medium = self.codec.load(part, name)
        if "audio" not in self.modalities and getattr(medium, "sound", None) is not None:
            raise LcoError(f"{name} has a video with sound, and this model takes {takes}")
        return kind, medium

    def checked(self, processed: Processed, name: str) -> Processed | LcoError:
        """The input, or an error if it is longer than the model's context, or of other tokens."""
        if len(processed) > self.max_tokens:
            return TooLong(
                f"{name}: {len(processed)} tokens (template included), and the model takes "
                f"{self.max_tokens}; cut texts with max_length, and media by their caps"
            )
        largest = int(processed.input_ids.max())
        if largest >= self.codec.vocab_size:
            return LcoError(
                f"{name}: the tokenizer of {self.folder} makes token {largest} of it, and the "
                f"model has {self.codec.vocab_size} (vocab_size in config.json)"
            )
        return processed


def _model_config(folder: Path) -> dict[str, Any]:
    """The configuration of the model that embeds: of a full Qwen2.5-Omni, its thinker's."""
    config = read_json(folder / "config.json")
    if "thinker_config" in config:
        config = {"model_type": "qwen2_5_omni_thinker", **config["thinker_config"]}
    return complete(config)


def _without_media(messages: Messages) -> Messages:
    """The messages for the template, to which a medium's part is its type alone."""
    return [
        {**message, "content": [_without_medium(part) for part in message["content"]]}
        for message in messages
    ]


def _without_medium(part: dict[str, Any]) -> dict[str, Any]:
    return part if part["type"] == "text" else {"type": part["type"]}
