"""The encoder of a Whisper on disk, as the audio tower of Qwen2.5-Omni.

Qwen's tower is Whisper's encoder, which sees a window of sound at a time, and a projector behind
it. A folder of the hub is read, or one of CTranslate2 (`model.bin`), as faster-whisper has it.
"""

import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lco_jax.checkpoint.omni import AudioSizes
from lco_jax.checkpoint.parts import Source, source_of
from lco_jax.checkpoint.tensors import TensorFolder, check_finite
from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import check_is_file, read_json, resolve
from lco_jax.core.wheels import fetch
from lco_jax.models.config import positive

FILES = ["*.json", "*.safetensors", "README.md"]
CTRANSLATE2_FILES = ["model.bin"]
PUBLISHED = "whisper-base"
POSITIONS_DIFFER = 1e-3  # float16 of a number up to 1 differs by a half of this
_SPEC = "WhisperSpec"
_VERSION = 6  # of CTranslate2's format
_TORN = (struct.error, UnicodeDecodeError, IndexError, ValueError)
_DTYPES = (np.float32, np.int8, np.int16, np.int32, np.float16)  # by CTranslate2's numbers
_LAYER = (  # CTranslate2's names -> Qwen's, within a layer; queries, keys and values are one matrix
    ("self_attention/layer_norm/gamma", "self_attn_layer_norm.weight"),
    ("self_attention/layer_norm/beta", "self_attn_layer_norm.bias"),
    ("self_attention/linear_1/weight", "self_attn.out_proj.weight"),
    ("self_attention/linear_1/bias", "self_attn.out_proj.bias"),
    ("ffn/layer_norm/gamma", "final_layer_norm.weight"),
    ("ffn/layer_norm/beta", "final_layer_norm.bias"),
    ("ffn/linear_0/weight", "fc1.weight"),
    ("ffn/linear_0/bias", "fc1.bias"),
    ("ffn/linear_1/weight", "fc2.weight"),
    ("ffn/linear_1/bias", "fc2.bias"),
)


@dataclass(frozen=True)
class Encoder:
    """tensors: by their names in Qwen's tower (conv1.weight, layers.0.fc1.bias, ln_post.weight …).
    positions: float32 [frames, D], which Qwen's tower computes and does not store.
    """

    heads: int
    tensors: dict[str, np.ndarray]
    positions: np.ndarray
    source: Source

    def sizes(self, window: int) -> AudioSizes:
        """Of Qwen's tower. window: mel frames that it is to see at once, at most a Whisper's."""
        most = 2 * len(self.positions)
        if window > most:
            raise LcoError(
                f"{self.source.given} sees {most} mel frames at once; a window of {window} is wider"
            )
        numbers = [name.split(".")[1] for name in self.tensors if name.startswith("layers.")]
        return AudioSizes(
            hidden=self.positions.shape[1],
            layers=len(set(numbers)),
            heads=self.heads,
            mlp=self.tensors["layers.0.fc1.weight"].shape[0],
            mel_bins=self.tensors["conv1.weight"].shape[1],
            window=window,
        )


def read_whisper(path_or_id: str | Path) -> Encoder:
    """Open `PUBLISHED`, which is fetched, a folder of the hub or of CTranslate2, or a hub id.

    Raises for a model of another kind, a torn file, and for positions that are not the sinusoids of
    Whisper, which Qwen's tower cannot store.
    """
    is_published = str(path_or_id) == PUBLISHED
    folder = fetch(PUBLISHED) if is_published else resolve(path_or_id, FILES)
    binary = folder / "model.bin"
    patterns = CTRANSLATE2_FILES if binary.exists() else FILES
    source = source_of(path_or_id, folder, patterns)
    encoder = (_read_ctranslate2 if binary.exists() else _read_hub)(folder, source)
    _check(encoder, folder)
    return encoder


def _check(encoder: Encoder, folder: Path) -> None:
    """Raise for what is not an encoder of Whisper."""
    positions = encoder.positions
    for name, axes in (("conv1.weight", 3), ("layers.0.fc1.weight", 2)):
        if name not in encoder.tensors or encoder.tensors[name].ndim != axes:
            raise LcoError(f"{folder} has no {name} of {axes} axes, which an encoder has")
    if positions.ndim != 2 or positions.shape[1] % 2 or positions.shape[1] < 4:
        raise LcoError(f"{folder}: the encoder's positions have shape {positions.shape}")
    check_finite(positions, f"{folder}: the encoder's positions")
    if np.abs(positions - sinusoids(*positions.shape)).max() > POSITIONS_DIFFER:
        raise LcoError(f"{folder}: the encoder's positions are not Whisper's sinusoids")
    if positions.shape[1] % encoder.heads:
        raise LcoError(f"{folder}: {encoder.heads} heads do not divide {positions.shape[1]}")
    for name, values in encoder.tensors.items():
        check_finite(values, f"{folder}: {name}")


def sinusoids(frames: int, width: int) -> np.ndarray:
    """Whisper's positions, float32 [frames, width]: half of them sines, half cosines."""
    rates = np.exp(-np.log(10_000.0) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(frames)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _read_hub(folder: Path, source: Source) -> Encoder:
    file = folder / "config.json"
    config = read_json(file)
    if config.get("model_type") != "whisper":
        raise LcoError(f"{file}: model_type is {config.get('model_type')!r:.60}, and not whisper")
    if config.get("activation_function", "gelu") != "gelu" or config.get("scale_embedding"):
        raise LcoError(f"{file}: its activation_function or scale_embedding is not supported")
    stored, tensors = TensorFolder(folder), {}
    for key in stored:
        _, found, name = key.rpartition("encoder.")
        if found and "decoder." not in key:
            tensors[name] = stored.read(key).astype(np.float32)
    for part in ("weight", "bias"):
        tensors[f"ln_post.{part}"] = _take(tensors, f"layer_norm.{part}", folder)
    positions = _take(tensors, "embed_positions.weight", folder)
    heads = positive(config, "encoder_attention_heads", str(file))
    return Encoder(heads, tensors, positions, source)


def _take(tensors: dict[str, np.ndarray], name: str, where: Path) -> np.ndarray:
    if name not in tensors:
        raise LcoError(f"{where} has no {name}, which an encoder of Whisper has")
    return tensors.pop(name)


Take = Callable[[str], np.ndarray]  # the name of a variable of CTranslate2's encoder -> float32


def _read_ctranslate2(folder: Path, source: Source) -> Encoder:
    file = folder / "model.bin"
    stored = _read_variables(file)

    def take(name: str) -> np.ndarray:
        values = _take(stored, f"encoder/{name}", file)
        if values.dtype.kind != "f":
            raise LcoError(f"{file}: {name} is quantised, and only float weights are supported")
        return values.astype(np.float32)

    tensors = {}
    for name in ("conv1", "conv2"):
        tensors[f"{name}.weight"] = take(f"{name}/weight")
        tensors[f"{name}.bias"] = take(f"{name}/bias")
    layers = {name.split("/")[1] for name in stored if name.startswith("encoder/layer_")}
    for layer in sorted(layers - {"layer_norm"}):
        tensors |= _layer_of_ctranslate2(take, layer, file)
    tensors["ln_post.weight"] = take("layer_norm/gamma")
    tensors["ln_post.bias"] = take("layer_norm/beta")
    heads = _take(stored, "encoder/num_heads", file)
    if heads.size != 1 or not 0 < heads.item() < 2**15:
        raise LcoError(f"{file}: encoder/num_heads must be one number above 0")
    return Encoder(int(heads.item()), tensors, take("position_encodings/encodings"), source)


def _layer_of_ctranslate2(take: Take, layer: str, file: Path) -> dict[str, np.ndarray]:
    """The tensors of a layer, such as layer_0, by their names in Qwen's tower."""
    ours = f"layers.{layer.removeprefix('layer_')}"
    tensors = {f"{ours}.{name}": take(f"{layer}/{theirs}") for theirs, name in _LAYER}
    for part in ("weight", "bias"):
        together = take(f"{layer}/self_attention/linear_0/{part}")
        if len(together) % 3:
            raise LcoError(f"{file}: {layer}'s queries, keys and values are of unequal widths")
        for kind, values in zip("qkv", np.split(together, 3), strict=True):
            tensors[f"{ours}.self_attn.{kind}_proj.{part}"] = values
    # 0 in Whisper, and not stored by Qwen
    del tensors[f"{ours}.self_attn.k_proj.bias"]
    return tensors


def _read_variables(file: Path) -> dict[str, np.ndarray]:
    """The variables of a model.bin of CTranslate2, by name."""
    check_is_file(file)
    torn = explained(f"{file} is torn, or no model of CTranslate2", *_TORN)
    with open(file, "rb") as stream, torn:
        (version,) = _unpack(stream, "<I")
        name = _read_name(stream)
        if version != _VERSION or name != _SPEC:
            raise LcoError(f"{file} holds {name!r:.60}, version {version}, and no Whisper")
        _, count = _unpack(stream, "<II")
        return dict(_read_variable(stream) for _ in range(count))


def _read_variable(stream: BinaryIO) -> tuple[str, np.ndarray]:
    name = _read_name(stream)
    (rank,) = _unpack(stream, "<B")
    shape = _unpack(stream, f"<{rank}I")
    dtype, size = _unpack(stream, "<BI")
    values = np.frombuffer(stream.read(size), _DTYPES[dtype])
    return name, values.reshape(shape)


def _read_name(stream: BinaryIO) -> str:
    (length,) = _unpack(stream, "<H")
    return stream.read(length).rstrip(b"\0").decode()


def _unpack(stream: BinaryIO, form: str) -> tuple[Any, ...]:
    return struct.unpack(form, stream.read(struct.calcsize(form)))
