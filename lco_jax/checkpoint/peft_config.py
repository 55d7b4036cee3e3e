"""What a PEFT adapter_config.json says, of which we take what changes the result as PEFT takes it.

Every field of peft 0.21's LoraConfig is named here. A regular expression of such a file runs where
it can be ended (`data/foreign.py`).
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lco_jax.checkpoint.peft_targets import Targets
from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.files import read_json
from lco_jax.data.foreign import matching

CONFIG = "adapter_config.json"
logger = logging.getLogger(__name__)

LARGEST = 3e38  # of a number, as float32 holds it
_UNSET = (None, False, "none", [], {})  # how a PEFT config says that it does not ask for something
_MERGE = "merge the adapter in peft (merge_and_unload, save_pretrained) and give the merged model"
# What changes the result and has no place in A and B.
_UNSUPPORTED = (
    "use_dora", "bias", "lora_bias", "layer_replication", "target_parameters",
    "trainable_token_indices", "alora_invocation_tokens", "use_qalora", "use_bdlora",
    "arrow_config", "kasa_config", "monteclora_config",
)  # fmt: skip
# What changes no result when a saved adapter is loaded onto linear layers. velora is of the
# backward pass. PEFT itself sets fan_in_fan_out to false for linear layers.
_WITHOUT_EFFECT = (
    "peft_type", "task_type", "inference_mode", "base_model_name_or_path", "revision",
    "auto_mapping", "peft_version", "fan_in_fan_out", "megatron_config", "megatron_core",
    "loftq_config", "eva_config", "corda_config", "lora_ga_config", "velora_config",
    "qalora_group_size", "runtime_config", "ensure_weight_tying",
)  # fmt: skip
_READ = (
    "r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern",
    "init_lora_weights", "modules_to_save", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern",
)  # fmt: skip
# How A and B began, where the base stayed as it was. Anything else may have changed the base.
_PLAIN_INITS = ("gaussian", "eva", "orthogonal", "mica")
_CONVERTED = ("pissa", "olora", "corda", "lora_ga")  # PEFT turns these into plain LoRA


@dataclass(frozen=True)
class PeftConfig:
    """The settings of an adapter that count.

    rank_pattern, alpha_pattern: {pattern of a module's name: its own value}. targets: the modules
    that are adapted. saves_head: whether the adapter has a vocabulary head of its own.
    """

    file: Path
    rank: int
    alpha: float
    dropout: float
    use_rslora: bool
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    targets: Targets
    saves_head: bool

    def settings_of(self, modules: Sequence[str]) -> dict[str, tuple[int, float]]:
        """(rank, factor of its B A) of each module, by its name in the file of weights.

        Raises for a pattern that is no regular expression, or takes too long.
        """
        ranks = self._by_pattern("rank_pattern", modules, self.rank)
        alphas = self._by_pattern("alpha_pattern", modules, self.alpha)
        divisor = math.sqrt if self.use_rslora else float
        return {
            module: (rank, alpha / divisor(rank))
            for module, rank, alpha in zip(modules, ranks, alphas, strict=True)
        }

    def _by_pattern(self, key: str, modules: Sequence[str], default: Any) -> list[Any]:
        """Each module's value of the first pattern that matches the end of its name, as in PEFT."""
        values = getattr(self, key)
        if not values:
            return [default] * len(modules)
        patterns = [rf"(.*\.)?({pattern})" for pattern in values]
        found = matching(patterns, modules, f"{self.file}: {key}")
        given = list(values.values())
        return [
            given[which[0]] if which else values.get(module, default)
            for module, which in zip(modules, found, strict=True)
        ]


def read_config(file: Path) -> PeftConfig:
    """Read an adapter_config.json. Raises, by key, for what is not supported."""
    content = read_json(file)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise LcoError(f"{file}: peft_type is {kind!r:.60}; only LORA adapters are supported")
    _check_supported(content, file)
    _check_init(content.get("init_lora_weights"), file)
    _check_unknown(content, file)
    rank = _number(content.get("r"), "r", file)
    dropout = _number(content.get("lora_dropout") or 0.0, "lora_dropout", file)
    if not 0 <= dropout < 1:
        raise LcoError(f"{file}: lora_dropout is {dropout}, and must lie in [0, 1)")
    ranks = _pattern(content, "rank_pattern", file)
    return PeftConfig(
        file=file,
        rank=_rank(rank, "r", file),
        alpha=_number(content.get("lora_alpha"), "lora_alpha", file),
        dropout=dropout,
        use_rslora=_switch(content, "use_rslora", file),
        rank_pattern={key: _rank(value, "rank_pattern", file) for key, value in ranks.items()},
        alpha_pattern=_pattern(content, "alpha_pattern", file),
        targets=Targets.read(content, file),
        saves_head=_saves_head(content, file),
    )


def _check_supported(content: dict[str, Any], file: Path) -> None:
    for key in _UNSUPPORTED:
        if content.get(key) not in _UNSET:
            raise LcoError(f"{file}: {key} = {content[key]!r:.60} is not supported; {_MERGE}")


def _check_init(init: Any, file: Path) -> None:
    """Raise for an adapter that belongs to a base that its initialisation changed."""
    if init is None or isinstance(init, bool):
        return
    name = init.lower() if isinstance(init, str) else ""
    if name in _PLAIN_INITS:
        return
    cure = _MERGE
    if name.startswith(_CONVERTED):
        cure = (
            "save it in peft as a plain LoRA (save_pretrained(…, "
            "path_initial_model_for_weight_conversion=…)), or " + _MERGE
        )
    raise LcoError(
        f"{file}: init_lora_weights = {init!r:.60} changes the base model, and the adapter does "
        f"not fit the original one; {cure}"
    )


def _check_unknown(content: dict[str, Any], file: Path) -> None:
    """Refuse a setting of a newer PEFT that switches something on; pass over what is only a value.

    PEFT switches by true, or by an object or a list that is not empty.
    """
    for key in content.keys() - {*_UNSUPPORTED, *_WITHOUT_EFFECT, *_READ}:
        value = content[key]
        if value in _UNSET:
            continue
        if value is True or isinstance(value, dict | list):
            raise LcoError(f"{file}: {key} = {value!r:.60} is not known here; {_MERGE}")
        logger.warning("%s: %s is not known here, and is ignored", file, key)


def _saves_head(content: dict[str, Any], file: Path) -> bool:
    """Whether lm_head is saved whole, which no embedding depends on. Raises for other modules."""
    modules = content.get("modules_to_save")
    if modules in _UNSET:
        return False
    if modules not in ("lm_head", ["lm_head"]) or content.get("ensure_weight_tying"):
        raise LcoError(f"{file}: modules_to_save = {modules!r:.60} is not supported; {_MERGE}")
    return True


def _pattern(content: dict[str, Any], key: str, file: Path) -> dict[str, Any]:
    """rank_pattern or alpha_pattern: {a regular expression: a number}."""
    given = content.get(key) or {}
    if not isinstance(given, dict):
        raise LcoError(f"{file}: {key} is {given!r:.60}, and must be an object")
    for pattern, value in given.items():
        _number(value, f"{key} of {pattern!r:.60}", file)
    return given


def _switch(content: dict[str, Any], key: str, file: Path) -> bool:
    given = content.get(key)
    if given is not None and not isinstance(given, bool):
        raise LcoError(f"{file}: {key} is {given!r:.60}, and must be true or false")
    return bool(given)


def _number(value: Any, key: str, file: Path) -> Any:
    if not is_number(value) or not abs(value) < LARGEST:
        raise LcoError(f"{file}: {key} is {value!r:.60}, and must be a number")
    return value


def _rank(value: Any, key: str, file: Path) -> int:
    if value < 1 or value != int(value):
        raise LcoError(f"{file}: {key} is {value!r:.60}, and a rank is an integer above 0")
    return int(value)
