"""The decoder's sizes, read from a Hugging Face config.json in any of its spellings."""

from dataclasses import dataclass
from functools import partial
from typing import Any

from lco_jax.core import hf_config
from lco_jax.core.errors import LcoError

# Of any size, of a context, and of the layers of a decoder or a tower. To compile a program for
# what is far larger takes hours.
LARGEST, LONGEST, MOST_LAYERS = 2**24, 2**31 - 1, 10_000
WITHOUT_BIAS = ("llama", "mistral")  # the q, k and v of others have a bias


def positive(config: dict[str, Any], key: str, where: str, most: int = LARGEST) -> int:
    """config[key], an integer above 0. Raises, by `where` and key, for anything else."""
    value = config.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
        raise LcoError(f"{where}.{key} is {value!r:.60}, and must be an integer above 0")
    if value > most:
        raise LcoError(f"{where}.{key} is {value!r:.60}, and must be at most {most}")
    return value


def check_multiple(whole: tuple[str, int], of: tuple[str, int], where: str) -> None:
    """Raise unless the first size is a multiple of the second. Both are a key and a value."""
    if whole[1] % of[1]:
        raise LcoError(f"{where}: {whole[0]} is {whole[1]}, and no multiple of {of[0]}, {of[1]}")


def section(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """config[key], a tower's part of a config.json. Raises if there is none."""
    if not isinstance(config.get(key), dict):
        raise LcoError(f"{where} has no {key}, which one of its towers needs")
    return config[key]


@dataclass(frozen=True)
class DecoderConfig:
    """The sizes of a text decoder.

    mrope_section: rotary frequencies of each axis (time, height, width).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, ...]
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool

    @classmethod
    def from_hf(cls, config: dict[str, Any], where: str) -> "DecoderConfig":
        """Read a flat (hub, transformers 4.x) or nested (`text_config`, 5.x) config.

        where: names the file in errors. Raises for settings that this decoder does not support.
        """
        text = hf_config.text_section(config, where)
        rope = text["rope_parameters"]

        need = partial(_size, text, where=where)
        _check_supported(text, rope, where)
        heads = need("num_attention_heads")
        kv_heads = need("num_key_value_heads") if text.get("num_key_value_heads") else heads
        head_dim = need("head_dim") if text.get("head_dim") else need("hidden_size") // heads
        check_multiple(("num_attention_heads", heads), ("num_key_value_heads", kv_heads), where)
        theta = {"rope_theta": rope.get("rope_theta") or text.get("rope_theta")}
        return cls(
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_layers=need("num_hidden_layers", most=MOST_LAYERS),
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=head_dim,
            rms_norm_eps=_positive_number(text, "rms_norm_eps", where),
            rope_theta=_positive_number(theta, "rope_theta", where),
            mrope_section=_mrope_section(rope, head_dim, where),
            max_position_embeddings=need("max_position_embeddings", most=LONGEST),
            tie_word_embeddings=text["tie_word_embeddings"],
            qkv_bias=text.get("model_type") not in WITHOUT_BIAS,
        )


def _size(text: dict[str, Any], key: str, where: str, most: int = LARGEST) -> int:
    _positive_number(text, key, where)
    return positive(text, key, f"{where}: text decoder", most)


def _positive_number(text: dict[str, Any], key: str, where: str) -> float:
    value = text.get(key)
    if value is None:
        raise LcoError(f"{where} has no {key!r}, which a text decoder needs")
    if not isinstance(value, int | float) or not 0 < value < 3e38:
        raise LcoError(f"{where}: {key} is {value!r:.60}, and must be a number above 0")
    return float(value)


def _check_supported(text: dict[str, Any], rope: dict[str, Any], where: str) -> None:
    """Raise for a setting that this decoder does not have."""
    kind = text.get("model_type")
    if rope["rope_type"] not in ("default", "mrope"):
        raise LcoError(
            f"{where}: rope type {rope['rope_type']!r} is not supported (default and mrope are)"
        )
    _check_window(text, where)
    if kind in WITHOUT_BIAS and (text.get("attention_bias") or text.get("mlp_bias")):
        raise LcoError(f"{where}: attention_bias and mlp_bias are not supported for {kind}")
    activation = text.get("hidden_act", "silu")
    if activation != "silu":
        raise LcoError(f"{where}: hidden_act {activation!r} is not supported (silu is)")


def _check_window(text: dict[str, Any], where: str) -> None:
    """Raise for a window of attention, unless all positions lie in it."""
    key = ""
    if text.get("use_sliding_window"):
        key = "use_sliding_window is true"
    window = text.get("sliding_window") if text.get("model_type") == "mistral" else None
    if window and not isinstance(window, int):
        raise LcoError(f"{where}: sliding_window is {window!r:.60}, and must be an integer")
    if window and window < _positive_number(text, "max_position_embeddings", where):
        key = f"sliding_window is {window}"
    if key:
        raise LcoError(f"{where}: {key}; sliding-window attention is not supported")


def _mrope_section(rope: dict[str, Any], head_dim: int, where: str) -> tuple[int, ...]:
    half = head_dim // 2
    given = rope.get("mrope_section") or (half,)
    if not isinstance(given, list | tuple) or not all(type(x) is int and x >= 0 for x in given):
        raise LcoError(
            f"{where}: mrope_section is {given!r:.60}, and must be a list of integers, 0 or more"
        )
    section = tuple(given)
    if head_dim % 2 or not half:
        raise LcoError(f"{where}: head_dim is {head_dim}, and must be an even number above 0")
    if sum(section) != half:
        raise LcoError(
            f"{where}: mrope_section {section} does not add up to half the head_dim, {half}"
        )
    return section
