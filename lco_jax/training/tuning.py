"""Which parameters of a model a run trains, as a tree, and how they join the frozen ones.

Dimensions: D hidden; those of a LoRA factor are in `core/lora.py`.

The tree is {"decoder": …, tower: …, "head": …, "projection": …}. It mirrors the parameters: LoRA
factors stand in the place of the decoder's matrices, arrays in the place of parameters that are
trained in full, in float32 whatever the model's dtype is. Beside them may be "log_temperatures",
which belong to the loss and to no model. The projection is no part of the
checkpoint's model: a matrix [D, D] behind it (the paper's "linear projection only"), which begins
as the identity, or as the one that the checkpoint has.
"""

import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array

from lco_jax.core import lora
from lco_jax.core.errors import LcoError

# value of config.tune.decoder, and words of .towers -> pattern of what is trained in full
DECODER = {"lora": None, "full": r"(decoder|head)\..+", "projection": None, "none": None}
TOWERS = {
    "none": None,
    "projectors": r"(visual\.merger|vision_tower\.projector|audio_tower\.proj)\..+",
    "all": r"(visual|vision_tower|audio_tower)\..+",
    "visual": r"visual\..+",
    "vision_tower": r"vision_tower\..+",
    "audio_tower": r"audio_tower\..+",
}

OF_LOSS = "log_temperatures"  # a trainable parameter that is no part of the model

Tree = dict[str, Any]


@dataclass(frozen=True)
class TuneConfig:
    """decoder: a key of `DECODER`; towers: keys of `TOWERS`, between commas."""

    decoder: str = "lora"
    towers: str = "none"

    def __post_init__(self) -> None:
        if self.decoder not in DECODER:
            known = ", ".join(DECODER)
            raise LcoError(f"config.tune.decoder is {self.decoder!r}; it is one of: {known}")
        for word in self.towers.split(","):
            if word not in TOWERS:
                known = ", ".join(TOWERS)
                raise LcoError(f"config.tune.towers has {word!r}; it is one of: {known}")
        if self.decoder == "none" and not self.trains_towers:
            raise LcoError("config.tune trains nothing: decoder and towers are both none")

    @property
    def trains_towers(self) -> bool:
        """Whether anything of a tower is trained."""
        return any(TOWERS[word] for word in self.towers.split(","))

    def in_full(self, path: str) -> bool:
        """Whether the parameter at a dotted path is trained in full."""
        patterns = [DECODER[self.decoder], *(TOWERS[word] for word in self.towers.split(","))]
        return any(pattern and re.fullmatch(pattern, path) for pattern in patterns)


def init(key: Array, params: Tree, tune: TuneConfig, config: lora.LoraConfig) -> Tree:
    """The tree at step 0: new adapters, and copies of the parameters that are trained in full.

    Traceable; shapes give shapes.
    """
    flat = flatten_dict(params, sep=".")
    in_full = {path: x.astype(jnp.float32) for path, x in flat.items() if tune.in_full(path)}
    tuned = unflatten_dict(in_full, sep=".")
    if tune.decoder == "lora":
        tuned["decoder"] = lora.init(key, params["decoder"], config)
    if tune.decoder == "projection":
        tuned["projection"] = params.get("projection") or _identity(params)
    return tuned


def _identity(params: Tree) -> Tree:
    """A projection that changes nothing."""
    hidden = params["decoder"]["norm"]["weight"].shape[-1]
    return {"weight": jnp.eye(hidden, dtype=jnp.float32)}


def frozen(params: Tree, tune: TuneConfig) -> Tree:
    """`params` without those that are trained in full: the tree has their only copy."""
    flat = flatten_dict(params, sep=".")
    return unflatten_dict({path: x for path, x in flat.items() if not tune.in_full(path)}, sep=".")


def attach(params: Tree, tuned: Tree, config: lora.LoraConfig) -> Tree:
    """`params` (frozen or all) with the trainable parameters of the model in their places."""
    tuned = {part: tree for part, tree in tuned.items() if part != OF_LOSS}
    decoder = lora.attach(params.get("decoder", {}), tuned.get("decoder", {}), config)
    flat = flatten_dict(params, sep=".") | flatten_dict(tuned, sep=".")
    others = {path: x for path, x in flat.items() if not path.startswith("decoder.")}
    return {"decoder": decoder, **unflatten_dict(others, sep=".")}


def count(tuned: Tree) -> int:
    """The number of trainable parameters."""
    return sum(x.size for x in jax.tree.leaves(tuned))
