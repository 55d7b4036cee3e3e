"""An omnimodal model made of parts: a language model, an audio tower, a vision tower.

The result is the thinker of Qwen2.5-Omni in the hub's layout. The language model is its decoder,
with the same answers as before. The audio tower is a Whisper's encoder, and the vision tower that
of another Qwen2.5-VL or Omni, or either is fresh. The projectors that connect them are fresh, so
the model does not understand media until it is trained to (`lco_jax.pretrain`).
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.checkpoint import omni
from lco_jax.checkpoint.card import assembled_card, write_card
from lco_jax.checkpoint.chat_template import extended
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.language import HEAD, Language, read_language
from lco_jax.checkpoint.parts import NOTE, Source
from lco_jax.checkpoint.tensors import SHARD_BYTES, write_shards
from lco_jax.checkpoint.vision import Tower, read_vision
from lco_jax.checkpoint.whisper import Encoder, read_whisper
from lco_jax.core.errors import LcoError
from lco_jax.core.files import check_target, write_json, write_text, written_aside

EMBEDDINGS = "model.embed_tokens.weight"
_VOCABULARY_MULTIPLE = 64  # matrix products of such sizes are faster
FRESH = "fresh"  # in the place of a name
_UNUSED = "audio_tower.audio_bos_eos_token."
_PROJECTORS = ("audio_tower.proj.", "visual.merger.mlp.2.")


@dataclass(frozen=True)
class Fresh:
    """The sizes of towers that are not given, and the window of a Whisper's encoder."""

    vision: omni.VisionSizes = field(default_factory=lambda: omni.VisionSizes(256, 4, 4, 512))
    audio: omni.AudioSizes = field(default_factory=lambda: omni.AudioSizes(128, 2, 4, 256))


@dataclass(frozen=True)
class Parts:
    """What a model is made of. audio, vision: None if the tower is fresh."""

    language: Language
    audio: Encoder | None
    vision: Tower | None

    @property
    def sources(self) -> dict[str, Source | None]:
        """Where each part comes from; None for what is fresh."""
        return {
            "language model": self.language.source,
            "audio tower": self.audio.source if self.audio else None,
            "vision tower": self.vision.source if self.vision else None,
            "projectors": None,
        }

    @property
    def towers(self) -> dict[str, np.ndarray]:
        """The towers' tensors that are not fresh, by the hub's keys."""
        tensors = dict(self.vision.tensors) if self.vision else {}
        if self.audio:
            tensors |= {f"audio_tower.{name}": one for name, one in self.audio.tensors.items()}
        return tensors


def assemble(
    output: Path,
    language: str | Path,
    audio: str | Path | None = None,
    vision: str | Path | None = None,
    fresh: Fresh | None = None,
    seed: int = 0,
    cached: bool = False,
) -> dict[str, Any]:
    """Write the model to the folder `output`, in float32; equal arguments give equal bytes.

    language: a folder, hub id or .gguf of Llama's or Qwen2's architecture, or "smollm2-135m".
    audio: a Whisper's folder or hub id, or "whisper-base". vision: the folder or hub id of a
    checkpoint whose vision tower is taken. What is named without a path is fetched. seed: of what
    is fresh. cached: several processes may write `output` at once; the first wins.

    Returns what parts.json holds: {part: {"name", "licence", "sha256", "parameters"}}, and "fresh"
    in the place of a name. Raises `LcoError`, before anything is written, for a part that does not
    fit.
    """
    check_target(Path(output))
    parts = _read_parts(language, audio, vision)
    model = parts.language
    template = extended(model.chat_template, model.end_tokens, omni.MARKERS, str(model.where))
    config = _config(parts, fresh or Fresh())
    shapes = _shapes(config, parts)
    towers = _tower_tensors(shapes, config, parts, seed)
    note = {**_note(parts, shapes), "seed": seed}
    with written_aside(Path(output), first_wins=cached) as aside:
        _write_files(aside, parts, config, template)
        write_json(aside / NOTE, note)
        _write_weights(aside, towers, model, shapes)
        write_card(aside, assembled_card(Path(output).name, open_checkpoint(aside)))
    return note


def _read_parts(language: str | Path, audio: str | Path | None, vision: str | Path | None) -> Parts:
    """The parts that `assemble` is given. Raises for what cannot be read."""
    return Parts(
        language=read_language(language),
        audio=None if audio is None else read_whisper(audio),
        vision=None if vision is None else read_vision(vision),
    )


# ---- configuration


def _config(parts: Parts, fresh: Fresh) -> dict[str, Any]:
    """What config.json holds. The tokenizer gets the tokens of media."""
    model = parts.language
    width = model.sizes.hidden_size
    vision = parts.vision.sizes if parts.vision else fresh.vision
    audio = parts.audio.sizes(fresh.audio.window) if parts.audio else fresh.audio
    ids = _add_tokens(model)
    rows = max(model.sizes.vocab_size, max(model.tokenizer.get_vocab().values()) + 1)
    rows = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    text = {"vocab_size": rows, **model.text}
    return omni.thinker_config(text, vision.config(width), audio.config(width), ids, model.ends)


def _add_tokens(model: Language) -> dict[str, int]:
    """Give the tokenizer the tokens of media that it lacks; returns the ids of all of them."""
    tokens = list(omni.TOKENS.values())
    model.tokenizer.add_special_tokens(tokens)
    return {token: model.tokenizer.token_to_id(token) for token in tokens}


# ---- tensors


def _shapes(config: dict[str, Any], parts: Parts) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor, by the hub's keys. Raises for a tower that does not fit."""
    shapes = dict(omni.tensor_shapes(config))
    if not config["tie_word_embeddings"]:
        shapes[HEAD] = shapes[EMBEDDINGS]
    for part, prefix in ((parts.audio, "audio_tower."), (parts.vision, "visual.")):
        if part is not None:
            wanted = {key: one for key, one in shapes.items() if key.startswith(prefix)}
            found = {key: one for key, one in parts.towers.items() if key.startswith(prefix)}
            _check_tower(found, wanted, str(part.source.given))
    return shapes


def _check_tower(
    found: dict[str, np.ndarray], wanted: dict[str, tuple[int, ...]], where: str
) -> None:
    """Raise for a tensor of a tower that is missing, misshapen or unknown."""
    for key, shape in wanted.items():
        if key.startswith((*_PROJECTORS, _UNUSED)):
            continue
        if key not in found:
            raise LcoError(f"{where} has no {key}, which its configuration asks for")
        if found[key].shape != shape:
            raise LcoError(f"{where}: {key} has shape {found[key].shape}, and must have {shape}")
    unknown = sorted(found.keys() - wanted.keys())
    if unknown:
        raise LcoError(f"{where}: {unknown[0]:.80} has no place in Qwen2.5-Omni")


def _tower_tensors(
    shapes: dict[str, tuple[int, ...]], config: dict[str, Any], parts: Parts, seed: int
) -> dict[str, np.ndarray]:
    """Every tensor outside the decoder: those that are given, and the fresh ones."""
    rng = np.random.default_rng(seed)
    deviation = float(parts.language.read(EMBEDDINGS).std())
    tensors = parts.towers
    for key, shape in shapes.items():
        if key not in tensors and not _is_decoder(key):
            tensors[key] = omni.draw(key, shape, config, rng, deviation)
    return tensors


def _write_weights(
    folder: Path,
    towers: dict[str, np.ndarray],
    model: Language,
    shapes: dict[str, tuple[int, ...]],
) -> None:
    """The shards of all tensors. Those of the decoder are read one by one."""

    def tensor(key: str) -> np.ndarray:
        return towers[key] if key in towers else _decoder_tensor(model, key, shapes[key])

    sizes = {key: 4 * math.prod(shape) for key, shape in shapes.items()}
    write_shards(folder, sizes, tensor, SHARD_BYTES)


def _decoder_tensor(model: Language, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the decoder, of the shape that config.json makes it."""
    if key.endswith("_proj.bias") and not model.sizes.qkv_bias:
        return np.zeros(shape, np.float32)
    values = model.read(key)
    if key in (EMBEDDINGS, HEAD):
        missing = shape[0] - len(values)
        # the mean is no likely answer of the model, and no unlikely input
        values = np.concatenate([values, np.repeat(values.mean(0, keepdims=True), missing, 0)])
    return values


def _is_decoder(key: str) -> bool:
    return key.startswith(("model.", "lm_head."))


# ---- the files


def _note(parts: Parts, shapes: dict[str, tuple[int, ...]]) -> dict[str, Any]:
    """What it is made of: of each part its source and its parameters."""
    counts = dict.fromkeys(parts.sources, 0)
    for key, shape in shapes.items():
        counts[_part_of(key)] += math.prod(shape)
    return {
        part: {**(source.note() if source else {"name": FRESH}), "parameters": counts[part]}
        for part, source in parts.sources.items()
    }


def _part_of(key: str) -> str:
    """The part that a tensor belongs to, as `Parts.sources` names it."""
    if _is_decoder(key):
        return "language model"
    if key.startswith(_PROJECTORS):
        return "projectors"
    return "audio tower" if key.startswith("audio_tower.") else "vision tower"


def _write_files(folder: Path, parts: Parts, config: dict[str, Any], template: str) -> None:
    """Everything but the weights."""
    model = parts.language
    model.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.sizes.max_position_embeddings,
        "extra_special_tokens": omni.TOKENS,
        **model.end_tokens,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_text(folder / "chat_template.jinja", template)
    vision = config["vision_config"]
    preprocessor = omni.preprocessor_config(
        vision["patch_size"], config["audio_config"]["num_mel_bins"]
    )
    preprocessor["merge_size"] = vision["spatial_merge_size"]
    preprocessor["temporal_patch_size"] = vision["temporal_patch_size"]
    if parts.vision:
        preprocessor |= parts.vision.processor
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", model.ends)
