"""The pairs of factors in an adapter_model.safetensors, checked against its adapter_config.json.

Dimensions: O output features, I input features, r rank.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lco_jax.checkpoint.peft_config import CONFIG, PeftConfig
from lco_jax.checkpoint.tensors import check_finite, is_float, read_tensors
from lco_jax.core.errors import LcoError

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."  # of every key, before the name of a module
_FACTOR = re.compile(r"(.+)\.lora_([AB])(?:\.\w+)?\.weight")
_Halves = dict[str, dict[str, np.ndarray]]  # module -> "a" or "b" -> the factor


@dataclass(frozen=True)
class Pair:
    """The factors of one matrix, A [r, I] and B [O, r]. scale: the factor of B A."""

    a: np.ndarray
    b: np.ndarray
    scale: float


def read_pairs(
    file: Path, config: PeftConfig, our_name: Callable[[str], str]
) -> tuple[dict[str, Pair], dict[str, np.ndarray]]:
    """The pairs of factors, by our name, and all other tensors, by key; float32.

    our_name: of a module, by its name in the file; it raises for a module that is unknown. Raises
    for what PEFT would not load, or would pass over.
    """
    halves, saved = _read_factors(file)
    if not halves and not saved:
        raise LcoError(f"{file} holds no LoRA weights")
    modules = list(halves)
    names = {module: our_name(module) for module in modules}
    _check_pairs(file, halves, names)
    _check_adapted(file, config, modules)
    settings = config.settings_of(modules)
    pairs = {}
    for module, pair in halves.items():
        rank, scale = settings[module]
        for half, value in pair.items():
            _check_rank(value, half, rank, f"{file}: {PREFIX}{module}.lora_{half.upper()}.weight")
        pairs[names[module]] = Pair(**pair, scale=scale)
    return pairs, saved


def _read_factors(file: Path) -> tuple[_Halves, dict[str, np.ndarray]]:
    """The factors by module, and all other tensors by key."""
    halves: _Halves = defaultdict(dict)
    saved: dict[str, np.ndarray] = {}
    for key, stored in read_tensors(file).items():
        if not key.startswith(PREFIX):
            raise LcoError(f"{file}: unknown key {key}")
        value = _as_float32(stored, f"{file}: {key}")
        match = _FACTOR.fullmatch(key.removeprefix(PREFIX))
        if match is None:
            saved[key] = value
            continue
        module, half = match[1], match[2].lower()
        if half in halves[module]:
            raise LcoError(f"{file}: {key} is the same parameter as another key")
        halves[module][half] = value
    return halves, saved


def _as_float32(value: np.ndarray, what: str) -> np.ndarray:
    if not is_float(value.dtype):
        raise LcoError(f"{what} holds {value.dtype}, and must hold floating-point numbers")
    with np.errstate(over="ignore"):
        value = value.astype(np.float32)
    check_finite(value, what)
    return value


def _check_pairs(file: Path, halves: _Halves, names: dict[str, str]) -> None:
    """Raise for two modules that are the same one, and for half a pair."""
    modules: dict[str, str] = {}
    for module, pair in halves.items():
        first = modules.setdefault(names[module], module)
        if first != module:
            raise LcoError(f"{file}: {module} and {first} are the same parameter")
        if len(pair) < 2:
            raise LcoError(f"{file}: {module} has an A without its B, or a B without its A")


def _check_adapted(file: Path, config: PeftConfig, modules: Sequence[str]) -> None:
    """Raise for a module that the configuration does not name: PEFT passes over its factors."""
    missing = config.targets.missing(modules)
    if missing:
        raise LcoError(
            f"{file} adapts {missing[0]}, which is not among the modules that {CONFIG} names "
            "(target_modules and the like): PEFT would pass over it; name it, or take it out"
        )


def _check_rank(value: np.ndarray, half: str, rank: int, what: str) -> None:
    """Raise for a factor of another rank than the configuration has."""
    found = None
    if value.ndim == 2:
        found = value.shape[0 if half == "a" else 1]
    if found != rank:
        raise LcoError(f"{what} has rank {found}, and {CONFIG} says r = {rank}")
