"""What a model is, in a few lines: its `repr`."""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.data.instructions import IN_WORDS
from lco_jax.data.prompts import PROMPTS
from lco_jax.models.config import DecoderConfig


@dataclass(frozen=True)
class Origin:
    """What `from_pretrained` made a model of.

    path: the folder or hub id. family: config.json's model_type. adapter: its folder or hub id.
    quantize: how the decoder is stored, "" if as its dtype.
    """

    path: str
    family: str
    adapter: str | None = None
    quantize: str = ""


def described(embedder: Any) -> str:
    """An `OmniEmbedder` in a few lines. Nothing of it is computed with."""
    decoder = embedder.model.decoder
    mesh = embedder.mesh
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    stored = jnp.dtype(decoder.dtype).name
    lines = [
        f"{', '.join(embedder.modalities)} -> {_numbers(embedder)}",
        f"{_short(decoder_size(decoder.config))} parameters in the decoder"
        f" ({decoder.config.num_layers} layers of {decoder.config.hidden_size})",
    ]
    origin = embedder.origin
    if origin is not None:
        lines[1] = f"{origin.family}, {lines[1]}"
        stored = f"{stored}, decoder in {origin.quantize}" if origin.quantize else stored
        lines.append(f"from {origin.path}")
    if origin is not None and origin.adapter is not None:
        lines.append(f"adapter {origin.adapter}")
    lines += _usage(embedder)
    lines.append(f"{stored}, on {mesh.size} {mesh.devices.flat[0].platform} ({axes})")
    inner = "\n".join(f"  {line}" for line in lines)
    return f"{type(embedder).__name__}(\n{inner}\n)"


def _numbers(embedder: Any) -> str:
    """How many numbers its vectors have."""
    width, every = embedder.truncate_dim, f"{embedder.dimension} numbers"
    return every if width is None else f"the first {width} of {every}"


def _usage(embedder: Any) -> list[str]:
    """Lines about pooling and prompts that are not the paper's."""
    lines = []
    pooling = embedder.model.decoder.pooling
    if pooling != "last":
        lines.append(f"{pooling} of all tokens' states")
    names = [name for name in embedder.prompts if name not in PROMPTS]
    if names:
        lines.append(f"prompts {', '.join(names)}, {IN_WORDS[embedder.prompt_place]}")
    return lines


def decoder_size(config: DecoderConfig) -> int:
    """How many parameters a decoder has, its table of tokens among them."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract_params(config)))


def _short(number: int) -> str:
    """3_085_938_688 -> "3.09B"."""
    for unit, size in (("B", 10**9), ("M", 10**6), ("k", 10**3)):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)
