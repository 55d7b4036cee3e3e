"""What the tokenizer's files of a checkpoint hold, checked: each value has a type.

transformers takes some wrong values for others (a switch that is Infinity is on), and for others
raises what names neither file nor key.
"""

from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.files import read_json
from lco_jax.data.processor_files import Rule, check

_SWITCHES = ("lstrip", "rstrip", "normalized", "single_word", "special")  # of a token
_SWITCH = Rule(lambda value: isinstance(value, bool), "true or false")
_STRING = Rule(lambda value: isinstance(value, str), "a string")


def _is_token(value: Any) -> bool:
    """Whether a value is the text of a token, or an object that describes one."""
    if not isinstance(value, dict):
        return isinstance(value, str)
    switches = all(isinstance(value.get(key, False), bool) for key in _SWITCHES)
    return isinstance(value.get("content"), str) and switches


def _are_tokens(value: Any) -> bool:
    given = value.values() if isinstance(value, dict) else value
    return isinstance(value, dict | list) and all(map(_is_token, given))


def _is_decoder(value: Any) -> bool:
    return isinstance(value, dict) and all(
        key.isascii() and key.isdecimal() and len(key) < 10
        and isinstance(token, dict) and _is_token(token)
        for key, token in value.items()
    )  # fmt: skip


def _is_template(value: Any) -> bool:
    if isinstance(value, str):
        return True
    return isinstance(value, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str)
        and isinstance(one.get("template"), str)
        for one in value
    )  # fmt: skip


_TOKEN = Rule(_is_token, 'a token: a string, or an object with a "content" and switches')
_TOKENS = Rule(_are_tokens, "a list or an object of tokens")
_NAMES = ("bos", "eos", "unk", "sep", "pad", "cls", "mask", "image", "audio", "video")
TOKENS: dict[str, Rule] = {
    **{f"{name}_token": _TOKEN for name in _NAMES},
    "additional_special_tokens": _TOKENS,
    "extra_special_tokens": _TOKENS,
}
RULES = {
    "tokenizer_config.json": {
        **TOKENS,
        "add_prefix_space": _SWITCH,
        "add_bos_token": _SWITCH,
        "add_eos_token": _SWITCH,
        "clean_up_tokenization_spaces": _SWITCH,
        "split_special_tokens": _SWITCH,
        "legacy": _SWITCH,
        "tokenizer_class": _STRING,
        "errors": _STRING,
        "padding_side": Rule(lambda value: value in ("left", "right"), "'left' or 'right'"),
        "truncation_side": Rule(lambda value: value in ("left", "right"), "'left' or 'right'"),
        "model_max_length": Rule(lambda value: is_number(value) and value >= 1, "1 or more"),
        "added_tokens_decoder": Rule(_is_decoder, "an object of tokens by their numbers"),
        "chat_template": Rule(
            _is_template, "a string, or a list of objects with a name and a template each"
        ),
    },
    "special_tokens_map.json": TOKENS,
    "chat_template.json": {"chat_template": _STRING},
}

NEVER_NULL = ("added_tokens_decoder", "split_special_tokens")  # in transformers


def check_files(folder: Path) -> None:
    """Raise, by file and key, for the first value of a wrong type."""
    for name, rules in RULES.items():
        file = folder / name
        if not file.exists():
            continue
        content = read_json(file)
        check(content, file, rules)
        for key in NEVER_NULL:
            if content.get(key, "") is None:
                raise LcoError(f"{file}: {key} is null, and must be {rules[key].says}")
