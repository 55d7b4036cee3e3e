"""What each key of a configuration may be, checked before anything is opened."""

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Protocol

from lco_jax.checkpoint.hf import DTYPES
from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.quantize import KINDS
from lco_jax.data.instructions import PLACES
from lco_jax.data.mixture import APART
from lco_jax.models.attention import IMPLEMENTATIONS
from lco_jax.models.decoder import REMAT_POLICIES
from lco_jax.models.pooling import POOLINGS
from lco_jax.training.objective import GUIDES, TEACHERS, LossConfig
from lco_jax.training.tuning import DECODER, TOWERS

SEEDS = 2**31  # of grain and of jax


class Rule(Protocol):
    """What a value must be. The text of a rule completes "it must be …"."""

    def allows(self, value: Any) -> bool: ...


@dataclass(frozen=True)
class Whole:
    """A whole number from `least` on, and below `below`."""

    least: int
    below: float = math.inf

    def allows(self, value: Any) -> bool:
        return is_number(value, Integral) and self.least <= value < self.below

    def __str__(self) -> str:
        limit = "" if self.below == math.inf else f", below {self.below:,}"
        return f"a whole number, {self.least} or more{limit}"


@dataclass(frozen=True)
class Number:
    """A finite number above or from `least` on, and below `below`."""

    least: float
    below: float = math.inf
    may_be_least: bool = False

    def allows(self, value: Any) -> bool:
        if not is_number(value):
            return False
        is_least = self.may_be_least and value == self.least
        return is_least or self.least < value < self.below

    def __str__(self) -> str:
        start = f"{self.least:g} or more" if self.may_be_least else f"above {self.least:g}"
        limit = "and finite" if self.below == math.inf else f"and below {self.below:g}"
        return f"{start} {limit}"


@dataclass(frozen=True)
class Choice:
    """One of some words."""

    words: tuple[str, ...]

    def allows(self, value: Any) -> bool:
        return value in self.words

    def __str__(self) -> str:
        *others, last = [word or "''" for word in self.words]
        return f"{', '.join(others)} or {last}"


@dataclass(frozen=True)
class Words:
    """Some of these words, between commas."""

    words: tuple[str, ...]

    def allows(self, value: Any) -> bool:
        return isinstance(value, str) and set(value.split(",")) <= set(self.words)

    def __str__(self) -> str:
        *others, last = self.words
        return f"{', '.join(others)} or {last}, or several of them between commas"


@dataclass(frozen=True)
class Kind:
    """A value of a type. words: how people call it."""

    type: type
    words: str

    def allows(self, value: Any) -> bool:
        return isinstance(value, self.type)

    def __str__(self) -> str:
        return self.words


@dataclass(frozen=True)
class OrNone:
    """What another rule allows, or None."""

    rule: Rule

    def allows(self, value: Any) -> bool:
        return value is None or self.rule.allows(value)

    def __str__(self) -> str:
        return f"{self.rule}, or None"


@dataclass(frozen=True)
class Several:
    """A list of values that another rule allows, perhaps empty."""

    rule: Rule

    def allows(self, value: Any) -> bool:
        return isinstance(value, list | tuple) and all(map(self.rule.allows, value))

    def __str__(self) -> str:
        return f"a list, each {self.rule}"


FLAG, TEXT = Kind(bool, "True or False"), Kind(str, "a text")
AT_LEAST_1, AT_LEAST_0 = Whole(1), Whole(0)
ABOVE_0, NOT_NEGATIVE = Number(0.0), Number(0.0, may_be_least=True)
FRACTION = Number(0.0, below=1.0, may_be_least=True)
LESS_THAN_HALF = Number(0.0, below=0.5, may_be_least=True)
RULES: dict[str, Rule] = {
    "name": TEXT,
    "seed": Whole(0, below=SEEDS),
    "model.path": TEXT,
    "model.dtype": Choice(tuple(DTYPES)),
    "model.tower_dtype": Choice(("", *DTYPES)),
    "model.quantize": Choice(("", *KINDS)),
    "model.remat": Choice(("auto", *REMAT_POLICIES)),
    "model.attention": Choice(tuple(IMPLEMENTATIONS)),
    "model.pooling": Choice(POOLINGS),
    "tune.decoder": Choice(tuple(DECODER)),
    "tune.towers": Words(tuple(TOWERS)),
    "lora.rank": AT_LEAST_1,
    "lora.alpha": ABOVE_0,
    "lora.dropout": FRACTION,
    "lora.use_rslora": FLAG,
    "lora.targets": TEXT,
    "data.on_bad": Choice(("error", "skip")),
    "data.batches": Choice(("mixed", "homogeneous")),
    "data.sub_batch": AT_LEAST_1,
    "data.keep_apart": Choice(APART),
    "data.sampling_temperature": ABOVE_0,
    "data.threads": AT_LEAST_1,
    "data.max_negatives": Whole(-1),
    "data.max_length": OrNone(AT_LEAST_1),
    "instructions.query": TEXT,
    "instructions.document": TEXT,
    "instructions.place": Choice(PLACES),
    "train.batch_size": AT_LEAST_1,
    "train.steps": AT_LEAST_0,
    "train.epochs": NOT_NEGATIVE,
    "train.temperature": ABOVE_0,
    "train.two_way": FLAG,
    "train.ignore_duplicates": FLAG,
    "train.chunk_tokens": Whole(-1),
    "train.max_nonfinite": AT_LEAST_1,
    "train.patience": NOT_NEGATIVE,
    "loss.temperatures": Several(ABOVE_0),
    "loss.learn_temperature": FLAG,
    "loss.matryoshka": Several(AT_LEAST_1),
    "loss.matryoshka_weights": Several(ABOVE_0),
    "loss.false_negatives": Choice(GUIDES),
    "loss.false_negative_margin": Number(-2.0, below=2.0),
    "loss.guide": TEXT,
    "loss.hard_weight": ABOVE_0,
    "loss.teacher": Choice(TEACHERS),
    "loss.teacher_weight": NOT_NEGATIVE,
    "loss.teacher_temperature": ABOVE_0,
    "loss.coral": NOT_NEGATIVE,
    "optimizer.learning_rate": NOT_NEGATIVE,
    "optimizer.schedule": Choice(("cosine", "linear", "constant")),
    "optimizer.warmup_steps": AT_LEAST_0,
    "optimizer.beta1": FRACTION,
    "optimizer.beta2": FRACTION,
    "optimizer.eps": ABOVE_0,
    "optimizer.weight_decay": NOT_NEGATIVE,
    "optimizer.clip_norm": NOT_NEGATIVE,
    "mesh.data": Whole(-1),
    "mesh.fsdp": Whole(-1),
    "mesh.tensor": Whole(-1),
    "checkpoint.every": AT_LEAST_1,
    "checkpoint.keep": AT_LEAST_1,
    "eval.path": TEXT,
    "eval.share": LESS_THAN_HALF,
    "eval.sts": TEXT,
    "eval.batch_size": OrNone(AT_LEAST_1),
    "export.merged": FLAG,
    "export.dtype": Choice(tuple(DTYPES)),
    "export.truncate_dim": OrNone(AT_LEAST_1),
    "log.tensorboard": FLAG,
    "log.wandb_project": TEXT,
}
ELSEWHERE = ("data.sources.", "data.media.")  # what opens them checks them
# Keys of earlier versions, and the value under which a configuration that still sets them runs.
REMOVED = {"train.candidates": "auto", "train.spike": 20.0}
# Keys that runs of earlier versions do not have, and the value that does what these did.
ADDED = {
    "eval.share": 0.0,
    "data.sub_batch": 1,
    "data.keep_apart": "",
    "data.sampling_temperature": 1.0,
    "model.pooling": "last",
    "instructions.query": "",
    "instructions.document": "",
    "instructions.place": "before",
    **{f"loss.{key}": value for key, value in LossConfig.defaults().items()},
}


def check_values(flat: Mapping[str, Any]) -> None:
    """Raise, by key, for a value that no run can have. flat: dotted key -> value."""
    for key, rule in RULES.items():
        if key not in flat:
            advice = "begin from lco_jax.configs.base.get_config()"
            raise LcoError(f"the configuration has no key {key!r}; {advice}")
        if not rule.allows(flat[key]):
            raise LcoError(f"config.{key} is {flat[key]!r:.60}; it must be {rule}")
    for key, default in REMOVED.items():
        if flat.get(key, default) != default:
            raise LcoError(f"config.{key} does not exist any more; leave it out")
    for key in flat:
        if key not in RULES and key not in REMOVED and not f"{key}.".startswith(ELSEWHERE):
            raise LcoError(f"the configuration sets config.{key}, which is no key{hint(key)}")
    _check_together(flat)


def _check_together(flat: Mapping[str, Any]) -> None:
    """What keys must be beside others."""
    steps, warmup = flat["train.steps"], flat["optimizer.warmup_steps"]
    if not steps and not flat["train.epochs"]:
        raise LcoError("config.train.epochs is 0; it must be above 0 where train.steps is 0")
    if steps and warmup >= steps:
        raise LcoError(
            f"config.optimizer.warmup_steps is {warmup}; it must be less than config.train.steps, "
            f"which is {steps}"
        )
    if flat["train.batch_size"] % flat["data.sub_batch"]:
        raise LcoError(
            f"config.data.sub_batch is {flat['data.sub_batch']}; it must divide "
            f"config.train.batch_size, which is {flat['train.batch_size']}"
        )
    if flat["data.sub_batch"] > 1 and flat["data.batches"] == "homogeneous":
        raise LcoError(
            "config.data.sub_batch goes with config.data.batches=mixed; homogeneous batches are "
            "of one source as a whole"
        )
    if bool(flat["loss.guide"]) != (flat["loss.false_negatives"] == "guide"):
        raise LcoError(
            "config.loss.guide, a folder of vectors, goes with config.loss.false_negatives=guide"
        )
    if flat["tune.decoder"] == "full":
        _check_full(flat)
    try:
        re.compile(flat["lora.targets"])
    except re.error as error:
        wrong = f"config.lora.targets {flat['lora.targets']!r} is not a regular expression"
        raise LcoError(f"{wrong}: {error}") from error


def _check_full(flat: Mapping[str, Any]) -> None:
    """What goes with a decoder that is trained in full."""
    others = "goes with config.tune.decoder = lora or projection"
    if flat["loss.false_negatives"] == "base":
        replaced = "a model that is trained in full replaces the model before tuning"
        raise LcoError(f"config.loss.false_negatives=base {others}: {replaced}")
    if flat["model.quantize"]:
        cannot = "a quantised decoder cannot be trained in full"
        raise LcoError(f"config.model.quantize {others}: {cannot}")


# ---- what a user may have meant

# Names that others give to keys: torch, transformers' TrainingArguments, peft.
OTHER_NAMES = {
    "lr": "optimizer.learning_rate",
    "max_lr": "optimizer.learning_rate",
    "peak_lr": "optimizer.learning_rate",
    "wd": "optimizer.weight_decay",
    "betas": "optimizer.beta1",
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_epsilon": "optimizer.eps",
    "epsilon": "optimizer.eps",
    "warmup": "optimizer.warmup_steps",
    "grad_clip": "optimizer.clip_norm",
    "max_grad_norm": "optimizer.clip_norm",
    "lr_scheduler_type": "optimizer.schedule",
    "scheduler": "optimizer.schedule",
    "bs": "train.batch_size",
    "batch": "train.batch_size",
    "per_device_train_batch_size": "train.batch_size",
    "train_batch_size": "train.batch_size",
    "max_steps": "train.steps",
    "num_steps": "train.steps",
    "num_train_epochs": "train.epochs",
    "num_epochs": "train.epochs",
    "temp": "train.temperature",
    "tau": "train.temperature",
    "mini_batch_size": "train.chunk_tokens",
    "r": "lora.rank",
    "lora_r": "lora.rank",
    "lora_rank": "lora.rank",
    "lora_alpha": "lora.alpha",
    "lora_dropout": "lora.dropout",
    "target_modules": "lora.targets",
    "gradient_checkpointing": "model.remat",
    "model_name": "model.path",
    "model_name_or_path": "model.path",
    "torch_dtype": "model.dtype",
    "bf16": "model.dtype",
    "precision": "model.dtype",
    "load_in_4bit": "model.quantize",
    "attn_implementation": "model.attention",
    "num_workers": "data.threads",
    "dataloader_num_workers": "data.threads",
    "max_seq_length": "data.max_length",
    "save_steps": "checkpoint.every",
    "save_total_limit": "checkpoint.keep",
    "per_device_eval_batch_size": "eval.batch_size",
    "run_name": "name",
}


def hint(key: str, known: Mapping[str, Any] = RULES) -> str:
    """A clause that names the key which a user may have meant; "" where nothing is near."""
    section, _, name = key.rpartition(".")
    meant = OTHER_NAMES.get(name.lower().replace("-", "_"))
    if meant not in known:
        meant = _nearest(section, name, known)
    if meant:
        return f"; did you mean {meant!r}?"
    there = [one.rpartition(".")[2] for one in known if one.rpartition(".")[0] == section]
    return f"; {section} has {', '.join(there)}" if section and there else ""


def _nearest(section: str, name: str, known: Mapping[str, Any]) -> str | None:
    """The known key that is most like another: of its section, else like it as a whole, else one
    whose last word is like it.
    """
    inside = {one.rpartition(".")[2]: one for one in known if one.rpartition(".")[0] == section}
    if found := difflib.get_close_matches(name, inside, n=1, cutoff=0.5):
        return inside[found[0]]
    if not inside and (found := difflib.get_close_matches(f"{section}.{name}", known, 1, 0.6)):
        return found[0]
    anywhere = {one.rpartition(".")[2]: one for one in known}
    found = difflib.get_close_matches(name, anywhere, n=1, cutoff=0.75)
    return anywhere[found[0]] if found else None
