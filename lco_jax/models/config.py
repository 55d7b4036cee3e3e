"""The decoder's geometry, read from a Hugging Face config.json in any of its spellings."""

from dataclasses import dataclass
from typing import Any

from lco_jax.core import hf_config
from lco_jax.core.errors import LcoError

WITHOUT_BIAS = ("llama", "mistral")  # the others' q, k and v have one


def positive(config: dict[str, Any], key: str, where: str) -> int:
    """config[key], an integer above 0. Raises, by `where` and key, for anything else."""
    if not isinstance(config.get(key), int) or isinstance(config[key], bool) or config[key] < 1:
        raise LcoError(f"{where}.{key} is {config.get(key)!r:.60}, and must be an integer above 0")
    return config[key]


def section(config: dict[str, Any], key: str, where: str) -> dict[str, Any]:
    """config[key], a tower's part of a config.json. Raises if there is none."""
    if not isinstance(config.get(key), dict):
        raise LcoError(f"{where} has no {key}, which one of its towers needs")
    return config[key]


@dataclass(frozen=True)
class DecoderConfig:
    """Geometry of a text decoder. mrope_section: rotary frequencies per axis (time, height, width)."""

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

        `where` names the file in errors. Raises for what this decoder does not implement instead of ignoring it.
        """
        text = hf_config.text_section(config, where)
        kind, rope = text.get("model_type"), text["rope_parameters"]

        def need(key: str) -> Any:
            if text.get(key) is None:
                raise LcoError(f"{where} has no {key!r}, which a text decoder needs")
            if not isinstance(text[key], int | float) or not text[key] > 0:
                raise LcoError(f"{where}: {key} is {text[key]!r:.60}, and must be a number above 0")
            return text[key]

        rope_type = rope["rope_type"]
        if rope_type not in ("default", "mrope"):
            raise LcoError(
                f"{where}: rope type {rope_type!r} is not supported (default and mrope are)"
            )
        window = text.get("sliding_window") if kind == "mistral" else None
        if text.get("use_sliding_window") or (window and window < need("max_position_embeddings")):
            key = f"sliding_window is {window}" if window else "use_sliding_window is true"
            raise LcoError(f"{where}: {key}; sliding-window attention is not supported")
        if kind in WITHOUT_BIAS and (text.get("attention_bias") or text.get("mlp_bias")):
            raise LcoError(f"{where}: attention_bias and mlp_bias are not supported for {kind}")
        if text.get("hidden_act", "silu") != "silu":
            raise LcoError(f"{where}: hidden_act {text['hidden_act']!r} is not supported (silu is)")
        heads = need("num_attention_heads")
        head_dim = text.get("head_dim") or need("hidden_size") // heads
        section = tuple(rope.get("mrope_section") or (head_dim // 2,))
        if sum(section) != head_dim // 2:
            raise LcoError(
                f"{where}: mrope_section {section} does not add up to half the head_dim, {head_dim // 2}"
            )
        return cls(
            vocab_size=need("vocab_size"),
            hidden_size=need("hidden_size"),
            intermediate_size=need("intermediate_size"),
            num_layers=need("num_hidden_layers"),
            num_heads=heads,
            num_kv_heads=text.get("num_key_value_heads") or heads,
            head_dim=head_dim,
            rms_norm_eps=need("rms_norm_eps"),
            rope_theta=float(rope.get("rope_theta") or need("rope_theta")),
            mrope_section=section,
            max_position_embeddings=need("max_position_embeddings"),
            tie_word_embeddings=text["tie_word_embeddings"],
            qkv_bias=kind not in WITHOUT_BIAS,
        )
