"""What a config.json leaves unsaid: transformers has written only what differs from its classes' defaults."""

from typing import Any

from lco_jax.core.files import ASSETS, read_json

_DEFAULTS = read_json(ASSETS / "hf_defaults.json")  # a test compares with transformers
TEXT: dict[str, dict[str, Any]] = _DEFAULTS[
    "text"
]  # by the model_type of a text_config, or of a flat config
MODELS: dict[str, dict[str, Any]] = _DEFAULTS["models"]  # by the model_type of the whole


def complete(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a config.json that describes a model, with its class's defaults for what it leaves out.

    What is not there at all (no vision_config) stays absent: that is no class's default.
    """
    config = dict(config)
    for key, default in MODELS.get(config.get("model_type", ""), {}).items():
        if not isinstance(default, dict):
            config.setdefault(key, default)
        elif isinstance(config.get(key), dict):
            config[key] = {**default, **{k: v for k, v in config[key].items() if v is not None}}
    return config
