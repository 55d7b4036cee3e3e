"""What a checkpoint's files say of its processors, checked: each value has a type and a range.

A value that the files leave out, or that is null, is the default.
"""

from collections.abc import Callable, Mapping
from numbers import Integral
from pathlib import Path
from typing import Any, NamedTuple

from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.files import read_json

NESTED = "processor_config.json"
FLAT_FILES = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
}
MOST_PIXELS = 2**31 - 1


class Rule(NamedTuple):
    """What a value must be. says: the same in words."""

    holds: Callable[[Any], bool]
    says: str


def equal(wanted: Any, why: str = "") -> Rule:
    """One value, of one type. why: stands after it in errors."""
    return Rule(lambda value: type(value) is type(wanted) and value == wanted, f"{wanted!r}{why}")


def whole(least: int, most: int) -> Rule:
    """A whole number in a range."""
    return Rule(
        lambda value: is_number(value, Integral) and least <= value <= most,
        f"a whole number from {least} to {most}",
    )


def number(least: float, most: float) -> Rule:
    """A number in a range."""
    return Rule(
        lambda value: is_number(value) and least <= value <= most,
        f"a number from {least:g} to {most:g}",
    )


def three(rule: Rule) -> Rule:
    """A list of three values, as the channels of a picture have them."""
    return Rule(
        lambda value: isinstance(value, list) and len(value) == 3 and all(map(rule.holds, value)),
        f"a list of three, each {rule.says}",
    )


def sizes(rule: Rule) -> Rule:
    """An object of sizes."""
    return Rule(
        lambda value: (
            isinstance(value, dict)
            and all(size is None or rule.holds(size) for size in value.values())
        ),
        f"an object of sizes, each {rule.says}",
    )


_PIXELS = whole(1, MOST_PIXELS)
_ALWAYS = equal(True, "; nothing else is supported")
PICTURE_RULES = {  # of images and of clips
    "resample": equal(3, ", which is bicubic; nothing else is supported"),
    "do_resize": _ALWAYS,
    "do_rescale": _ALWAYS,
    "do_normalize": _ALWAYS,
    "rescale_factor": number(1e-6, 1),
    "image_mean": three(number(-1000, 1000)),
    "image_std": three(number(1e-6, 1000)),
    "min_pixels": _PIXELS,
    "max_pixels": _PIXELS,
    "size": sizes(_PIXELS),
}
_OF_WHISPER = ", as in Whisper; nothing else is supported"
SOUND_RULES = {
    "sampling_rate": equal(16_000, _OF_WHISPER),
    "hop_length": equal(160, _OF_WHISPER),
    "n_fft": equal(400, _OF_WHISPER),
    "padding_side": equal("right", _OF_WHISPER),
    "padding_value": number(0, 0),
    "dither": number(0, 0),
    "chunk_length": whole(1, 36_000),
}


def has_settings(folder: Path) -> bool:
    """Whether a checkpoint says anything of its processors."""
    return any((folder / file).exists() for file in (NESTED, *FLAT_FILES.values()))


def read_settings(
    folder: Path, part: str, rules: Mapping[str, Rule]
) -> tuple[dict[str, Any], Path]:
    """(a checkpoint's settings, their file) of one of `FLAT_FILES`.

    rules: by key. Raises where there is no file, and by file and key for a value that breaks its
    rule.
    """
    content, file = _part(folder, part)
    content = {key: value for key, value in content.items() if value is not None}
    check(content, file, rules)
    return content, file


def check(content: Mapping[str, Any], file: Path, rules: Mapping[str, Rule]) -> None:
    """Raise for the first value that breaks its rule."""
    for key, rule in rules.items():
        value = content.get(key)
        if value is not None and not rule.holds(value):
            raise LcoError(f"{file}: {key} is {value!r:.60}, and must be {rule.says}")


def _part(folder: Path, part: str) -> tuple[dict[str, Any], Path]:
    """transformers 5.x nests all parts in one file, and prefers that. The hub's files and those of
    4.x are flat. Clips without a part use that of images.
    """
    nested = folder / NESTED
    if nested.exists():
        content = read_json(nested).get(part)
        if isinstance(content, dict):
            return content, nested
        if content is not None:
            raise LcoError(f"{nested}: {part} is {content!r:.60}, and must be an object")
    flat = folder / FLAT_FILES[part]
    if part == "video_processor" and not flat.exists():
        return _part(folder, "image_processor")
    return read_json(flat), flat


def pixel_limits(
    settings: Mapping[str, Any], file: Path | None, default: tuple[int, int]
) -> tuple[int, int]:
    """The fewest and most pixels that settings allow, in either spelling. file: they are of it."""
    size = settings.get("size") or {}
    least = settings.get("min_pixels") or size.get("shortest_edge") or default[0]
    most = settings.get("max_pixels") or size.get("longest_edge") or default[1]
    if least > most:
        raise LcoError(
            f"{file}: min_pixels (or size.shortest_edge) is {least}, and max_pixels (or "
            f"size.longest_edge) {most}, which is less"
        )
    return least, most


def token_ids(given: Any, vocab_size: int, what: str) -> list[int]:
    """The ids in a value that is one or a list of them. Raises, by `what`, for anything else."""
    ids = given if isinstance(given, list) else [given]
    if not ids or not all(is_number(one, Integral) and 0 <= one < vocab_size for one in ids):
        raise LcoError(
            f"{what} is {given!r:.60}, and must hold tokens of the model, 0 to {vocab_size - 1}"
        )
    return ids
