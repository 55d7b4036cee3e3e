"""An omnimodal model made of parts: a language model, an audio tower, a vision tower.

The result is the thinker of Qwen2.5-Omni in the hub's layout. The language model is its decoder,
with the same answers as before. The audio tower is a Whisper's encoder, and the vision tower that
of another Qwen2.5-VL or Omni, or either is fresh. The projectors that connect them are fresh, so
the model does not understand media until it is trained to (`lco_jax.pretrain`).
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.checkpoint import omni
from lco_jax.checkpoint.chat_template import chat_template
from lco_jax.checkpoint.language import Language, read_language
from lco_jax.checkpoint.tensors import TensorFolder, write_tensors
from lco_jax.checkpoint.whisper import Encoder, read_whisper
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve, write_json, write_text, written_aside

_VOCABULARY_MULTIPLE = 64  # matrix products of such sizes are faster
_VISION_TYPES = ("qwen2_5_vl", "qwen2_5_omni_thinker", "qwen2_5_omni")
_VISUAL = re.compile(r"(?:thinker\.)?(?:model\.)?visual\.(.+)")
Tower = dict[str, np.ndarray]  # by the hub's keys


@dataclass(frozen=True)
class Fresh:
    """The sizes of towers that are not given, and the window of a Whisper's encoder."""

    vision: omni.VisionSizes = field(default_factory=lambda: omni.VisionSizes(256, 4, 4, 512))
    audio: omni.AudioSizes = field(default_factory=lambda: omni.AudioSizes(128, 2, 4, 256))


def assemble(
    output: Path,
    language: str | Path,
    audio: str | Path | None = None,
    vision: str | Path | None = None,
    fresh: Fresh | None = None,
    seed: int = 0,
    cached: bool = False,
) -> None:
    """Write the model to the folder `output`, in float32; equal arguments give equal bytes.

    language: a folder, hub id or .gguf of Llama's or Qwen2's architecture. audio: a Whisper's
    folder or hub id. vision: a checkpoint whose vision tower is taken. seed: of what is fresh.
    cached: several processes may write `output` at once; the first wins. Raises `LcoError`, before
    anything is written, for a part that does not fit.
    """
    fresh = fresh or Fresh()
    model = read_language(language)
    beginning = model.beginning()
    audio_config, audio_tensors = _audio(audio, fresh.audio, model.text["hidden_size"])
    vision_config, vision_tensors = _vision(vision, fresh.vision, model.text["hidden_size"])
    ids = _add_tokens(model)
    rows = max(model.tokenizer.get_vocab_size(), _embeddings(model).shape[0])
    rows = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    text = {"vocab_size": rows, **model.text}
    config = omni.thinker_config(text, vision_config, audio_config, ids, model.ends)
    tensors = _tensors(model, config, audio_tensors | vision_tensors, seed)
    with written_aside(Path(output), first_wins=cached) as aside:
        _write_files(aside, model, config, beginning)
        write_tensors(aside / "model.safetensors", tensors)


# ---- the language model


def _add_tokens(model: Language) -> dict[str, int]:
    """Give the tokenizer the tokens of media; returns their ids."""
    tokens = list(omni.TOKENS.values())
    model.tokenizer.add_special_tokens(tokens)
    return {token: model.tokenizer.token_to_id(token) for token in tokens}


def _embeddings(model: Language) -> np.ndarray:
    table = model.read("model.embed_tokens.weight")
    if table is None:
        raise LcoError(f"{model.source} has no embeddings of tokens")
    return table


def _decoder_tensor(model: Language, key: str, shape: tuple[int, ...]) -> np.ndarray:
    """A tensor of the decoder, of the shape that config.json makes it."""
    values = model.read(key)
    if values is None and key.endswith("_proj.bias"):
        return np.zeros(shape, np.float32)  # Llama has none
    if values is None:
        raise LcoError(f"{model.source} has no {key}")
    if key in ("model.embed_tokens.weight", "lm_head.weight"):
        missing = shape[0] - len(values)
        # the mean is no likely answer of the model, and no unlikely input
        values = np.concatenate([values, np.repeat(values.mean(0, keepdims=True), missing, 0)])
    if values.shape != shape:
        raise LcoError(f"{model.source}: {key} has shape {values.shape}, and must have {shape}")
    return values


def _tensors(model: Language, config: dict[str, Any], towers: Tower, seed: int) -> Tower:
    """Every tensor of the model, by the hub's keys."""
    rng = np.random.default_rng(seed)
    deviation = float(_embeddings(model).std())
    shapes = dict(omni.tensor_shapes(config))
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = shapes["model.embed_tokens.weight"]
    unknown = sorted(towers.keys() - shapes.keys())
    if unknown:
        raise LcoError(f"a tower has {unknown[0]}, which Qwen2.5-Omni's does not have")
    tensors: Tower = {}
    for key, shape in shapes.items():
        if key.startswith(("model.", "lm_head.")):
            tensors[key] = _decoder_tensor(model, key, shape)
        elif key in towers:
            if towers[key].shape != shape:
                found = towers[key].shape
                raise LcoError(f"a tower's {key} has shape {found}, and must have {shape}")
            tensors[key] = towers[key]
        else:
            tensors[key] = omni.draw(key, shape, config, rng, deviation)
    return tensors


# ---- the towers


def _audio(
    path: str | Path | None, sizes: omni.AudioSizes, width: int
) -> tuple[dict[str, Any], Tower]:
    """(`audio_config`, the tensors that are not fresh)."""
    if path is None:
        return sizes.config(width), {}
    encoder = read_whisper(path)
    given = omni.AudioSizes(
        hidden=encoder.positions.shape[1],
        layers=encoder.layers,
        heads=encoder.heads,
        mlp=_matrix(encoder, "layers.0.fc1.weight").shape[0],
        mel_bins=_matrix(encoder, "conv1.weight").shape[1],
        window=sizes.window,
    )
    return given.config(width), {f"audio_tower.{n}": v for n, v in encoder.tensors.items()}


def _matrix(encoder: Encoder, name: str) -> np.ndarray:
    if name not in encoder.tensors:
        raise LcoError(f"{encoder.source} has no {name}, which an encoder of Whisper has")
    return encoder.tensors[name]


def _vision(
    path: str | Path | None, sizes: omni.VisionSizes, width: int
) -> tuple[dict[str, Any], Tower]:
    """(`vision_config`, the tensors that are not fresh)."""
    if path is None:
        return sizes.config(width), {}
    folder = resolve(path, ["*.json", "*.safetensors"])
    config = read_json(folder / "config.json")
    if config.get("model_type") not in _VISION_TYPES:
        known = ", ".join(_VISION_TYPES)
        kind = config.get("model_type")
        raise LcoError(f"{folder}: model_type {kind!r:.60} has no such vision tower; {known} have")
    section = config.get("thinker_config", config).get("vision_config")
    if not isinstance(section, dict):
        raise LcoError(f"{folder}/config.json has no vision_config")
    stored, tensors = TensorFolder(folder), {}
    for key in stored:
        match = _VISUAL.fullmatch(key)
        # the last matrix of the projector makes vectors of another width
        if match and not match[1].startswith("merger.mlp.2."):
            values = stored.read(key).astype(np.float32)
            tensors |= _split_qkv(f"visual.{match[1]}", values)
    section = {**section, "model_type": "qwen2_5_omni_vision_encoder", "out_hidden_size": width}
    return section, tensors


def _split_qkv(key: str, values: np.ndarray) -> Tower:
    """Qwen2.5-VL has queries, keys and values in one matrix, Omni in three."""
    if ".attn.qkv." not in key:
        return {key: values}
    parts = np.split(values, 3)
    return {key.replace(".qkv.", f".{n}."): part for n, part in zip("qkv", parts, strict=True)}


# ---- the files


def _write_files(folder: Path, model: Language, config: dict[str, Any], beginning: str) -> None:
    """Everything but the weights."""
    model.tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    tokens = {key[:-3]: model.tokenizer.id_to_token(i) for key, i in model.ends.items()}
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": model.text["max_position_embeddings"],
        "extra_special_tokens": omni.TOKENS,
        **tokens,
    }
    write_json(folder / "tokenizer_config.json", tokenizer_config)
    write_text(folder / "chat_template.jinja", chat_template(omni.MARKERS, beginning))
    patch, mel_bins = config["vision_config"]["patch_size"], config["audio_config"]["num_mel_bins"]
    preprocessor = omni.preprocessor_config(patch, mel_bins)
    write_json(folder / "preprocessor_config.json", preprocessor)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", model.ends)
