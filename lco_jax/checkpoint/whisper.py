"""The encoder of a Whisper on disk, as the audio tower of Qwen2.5-Omni.

Qwen's tower is Whisper's encoder, which sees a window of sound at a time, and a projector behind
it. A folder of the hub is read, or one of CTranslate2 (`model.bin`), as faster-whisper has it.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from lco_jax.checkpoint.tensors import TensorFolder, check_finite
from lco_jax.core.errors import LcoError
from lco_jax.core.files import check_is_file, read_json, resolve

FILES = ["*.json", "*.safetensors"]
_SPEC = "WhisperSpec"
_VERSION = 6  # of CTranslate2's format
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
    source: str

    @property
    def layers(self) -> int:
        return len({name.split(".")[1] for name in self.tensors if name.startswith("layers.")})


def read_whisper(path_or_id: str | Path) -> Encoder:
    """Open a folder of the hub or of CTranslate2, or a hub id.

    Raises for a model of another kind, a torn file, and for positions that are not the sinusoids of
    Whisper, which Qwen's tower cannot store.
    """
    folder = resolve(path_or_id, FILES)
    binary = folder / "model.bin"
    encoder = _read_ctranslate2(binary) if binary.exists() else _read_hub(folder)
    wanted = sinusoids(*encoder.positions.shape)
    if np.abs(encoder.positions - wanted).max() > 1e-3:
        raise LcoError(f"{folder}: the encoder's positions are not Whisper's sinusoids")
    for name, values in encoder.tensors.items():
        check_finite(values, f"{folder}: {name}")
    return encoder


def sinusoids(frames: int, width: int) -> np.ndarray:
    """Whisper's positions, float32 [frames, width]: half of them sines, half cosines."""
    rates = np.exp(-np.log(10_000.0) / (width // 2 - 1) * np.arange(width // 2))
    angles = np.arange(frames)[:, None] * rates
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)


def _read_hub(folder: Path) -> Encoder:
    file = folder / "config.json"
    config = read_json(file)
    if config.get("model_type") != "whisper":
        raise LcoError(f"{file}: model_type is {config.get('model_type')!r:.60}, and not whisper")
    stored, tensors = TensorFolder(folder), {}
    for key in stored:
        _, found, name = key.rpartition("encoder.")
        if found and "decoder." not in key:
            tensors[name] = stored.read(key).astype(np.float32)
    for part in ("weight", "bias"):
        tensors[f"ln_post.{part}"] = _take(tensors, f"layer_norm.{part}", folder)
    positions = _take(tensors, "embed_positions.weight", folder)
    heads = config.get("encoder_attention_heads")
    if not isinstance(heads, int):
        raise LcoError(f"{file}: encoder_attention_heads is {heads!r:.60}, and must be a number")
    return Encoder(heads, tensors, positions, str(folder))


def _take(tensors: dict[str, np.ndarray], name: str, where: Path) -> np.ndarray:
    if name not in tensors:
        raise LcoError(f"{where} has no {name}, which an encoder of Whisper has")
    return tensors.pop(name)


def _read_ctranslate2(file: Path) -> Encoder:
    stored = _read_variables(file)
    tensors = {}
    layers = {name.split("/")[1] for name in stored if name.startswith("encoder/layer_")}
    layers.discard("layer_norm")

    def take(name: str) -> np.ndarray:
        values = _take(stored, f"encoder/{name}", file)
        if values.dtype.kind != "f":
            raise LcoError(f"{file}: {name} is quantised, and only float weights are supported")
        return values.astype(np.float32)

    for name in ("conv1", "conv2"):
        tensors[f"{name}.weight"] = take(f"{name}/weight")
        tensors[f"{name}.bias"] = take(f"{name}/bias")
    for layer in sorted(layers):
        ours = f"layers.{layer.removeprefix('layer_')}"
        for theirs, name in _LAYER:
            tensors[f"{ours}.{name}"] = take(f"{layer}/{theirs}")
        attention = f"{layer}/self_attention/linear_0"
        weights = np.split(take(f"{attention}/weight"), 3)
        biases = np.split(take(f"{attention}/bias"), 3)
        for part, weight, bias in zip("qkv", weights, biases, strict=True):
            tensors[f"{ours}.self_attn.{part}_proj.weight"] = weight
            if part != "k":  # 0 in Whisper, and not stored by Qwen
                tensors[f"{ours}.self_attn.{part}_proj.bias"] = bias
    tensors["ln_post.weight"] = take("layer_norm/gamma")
    tensors["ln_post.bias"] = take("layer_norm/beta")
    heads = int(_take(stored, "encoder/num_heads", file))
    return Encoder(heads, tensors, take("position_encodings/encodings"), str(file))


def _read_variables(file: Path) -> dict[str, np.ndarray]:
    """The variables of a model.bin of CTranslate2, by name."""
    check_is_file(file)
    with open(file, "rb") as stream:
        try:
            (version,) = _unpack(stream, "<I")
            name = _read_name(stream)
            _, count = _unpack(stream, "<II")
            if version != _VERSION or name != _SPEC:
                raise LcoError(f"{file} holds {name!r:.60}, version {version}, and no Whisper")
            return dict(_read_variable(stream) for _ in range(count))
        except (struct.error, UnicodeDecodeError, IndexError, ValueError) as error:
            raise LcoError(f"{file} is torn, or no model of CTranslate2") from error


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
