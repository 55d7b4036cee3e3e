"""What a config.json leaves to transformers, and how transformers 4 and 5 spell it.

transformers writes only what differs from the defaults of its configuration classes, so those
classes say what is missing. They do not read the file itself: they replace a missing hidden_size or
rope_theta by another model's, drop rope_parameters beside rope_scaling, and invent towers that the
file does not have. Each of these is an error here.
"""

from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING

from lco_jax.core.errors import LcoError, explained

# LLaVA-NeXT's files state next to nothing of these text models. Qwen's state all but the epsilon.
_TEXTS_BY_DEFAULTS = ("llama", "mistral", "qwen2")
_NUMBERS_BY_DEFAULTS = (
    "position_id_per_seconds",
    "seconds_per_chunk",
    "image_token_index",
    "image_grid_pinpoints",
)


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes a model, with the defaults of its towers.

    config: has a `model_type` that transformers knows. A tower that it does not have stays absent.
    """
    defaults = CONFIG_MAPPING[config["model_type"]]()
    config = dict(config)
    for key in _NUMBERS_BY_DEFAULTS:
        if hasattr(defaults, key):
            config.setdefault(key, getattr(defaults, key))
    for key in ("vision_config", "audio_config"):
        tower = config.get(key)
        if isinstance(tower, dict):
            stated = {name: value for name, value in tower.items() if value is not None}
            tower_class = type(getattr(defaults, key))
            config[key] = {**tower_class().to_dict(), **stated}
    return config


def text_section(config: dict[str, Any], where: str) -> dict[str, Any]:
    """What a config.json says of its text decoder, with the defaults of the decoder's class.

    It is in `text_config` (transformers 5) or beside everything else (the hub). The settings of the
    rope are merged in `rope_parameters`. where: the file's name in errors.
    """
    nested = config.get("text_config") or {}
    if not isinstance(nested, dict):
        raise LcoError(f"{where}: text_config is {nested!r:.60}, and must be an object")
    stated = {**config, **nested}
    defaults = _text_defaults(stated.get("model_type"), nested, where)
    rope = defaults.get("rope_parameters", {})
    for key in ("rope_scaling", "rope_parameters"):  # of transformers 4 and 5
        given = stated.get(key) or {}
        if not isinstance(given, dict):
            raise LcoError(f"{where}: {key} is {given!r:.60}, and must be an object")
        rope = {**rope, **given}
    if rope.get("rope_type", "default") == "default":
        rope["rope_type"] = rope.get("type", "default")
    tied = config.get("tie_word_embeddings") or nested.get("tie_word_embeddings")
    return {
        **defaults,
        **stated,
        "rope_parameters": rope,
        "tie_word_embeddings": bool(tied),
    }


def _text_defaults(kind: Any, nested: dict[str, Any], where: str) -> dict[str, Any]:
    if kind in _TEXTS_BY_DEFAULTS:
        with explained(f"{where}: text_config", StrictDataclassError):
            return CONFIG_MAPPING[kind](**nested).to_dict()
    if isinstance(kind, str) and kind in CONFIG_MAPPING:
        text_config = CONFIG_MAPPING[kind]().get_text_config()
        return {"rms_norm_eps": text_config.rms_norm_eps}
    return {}
