"""What of a model a run tunes: a tree that mirrors the parameters, and how the two are put together.

Dimensions: D hidden; of a LoRA factor, as in `core/lora.py`.

The tree is {"decoder": …, tower: …, "head": …, "projection": …}: LoRA factors in the place of the decoder's matrices,
arrays in the place of what is tuned whole, which are float32 whatever the model's dtype is. The projection is none of
the model's: a matrix [D, D] behind it (the paper's "linear projection only"), at first the identity, or that which the
checkpoint has.
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

DECODER = {"lora": None, "full": r"(decoder|head)\..+", "projection": None}  # what is tuned whole
TOWERS = {
    "none": None,
    "projectors": r"(visual\.merger|vision_tower\.projector|audio_tower\.proj)\..+",
    "all": r"(visual|vision_tower|audio_tower)\..+",
}

Tree = dict[str, Any]


@dataclass(frozen=True)
class TuneConfig:
    """decoder: a key of `DECODER`; towers: of `TOWERS`."""

    decoder: str = "lora"
    towers: str = "none"

    def __post_init__(self) -> None:
        for key, known in (("decoder", DECODER), ("towers", TOWERS)):
            if getattr(self, key) not in known:
                raise LcoError(
                    f"config.tune.{key} is {getattr(self, key)!r}; it is one of: {', '.join(known)}"
                )

    def whole(self, path: str) -> bool:
        """Whether the parameter at a dotted path is tuned whole."""
        patterns = DECODER[self.decoder], TOWERS[self.towers]
        return any(pattern and re.fullmatch(pattern, path) for pattern in patterns)


def init(key: Array, params: Tree, tune: TuneConfig, config: lora.LoraConfig) -> Tree:
    """The tree at step 0: new adapters, and what is tuned whole as `params` has it. Traceable; shapes give shapes."""
    flat = flatten_dict(params, sep=".")
    tuned = unflatten_dict(
        {p: x.astype(jnp.float32) for p, x in flat.items() if tune.whole(p)}, sep="."
    )
    if tune.decoder == "lora":
        tuned["decoder"] = lora.init(key, params["decoder"], config)
    if tune.decoder == "projection":
        none = {"weight": jnp.eye(params["decoder"]["norm"]["weight"].shape[-1], dtype=jnp.float32)}
        tuned["projection"] = params.get("projection", none)
    return tuned


def frozen(params: Tree, tune: TuneConfig) -> Tree:
    """`params` without what is tuned whole, of which the tuned tree has the only copy."""
    flat = flatten_dict(params, sep=".")
    return unflatten_dict({path: x for path, x in flat.items() if not tune.whole(path)}, sep=".")


def attach(params: Tree, tuned: Tree, config: lora.LoraConfig) -> Tree:
    """`params` (frozen or all) with what is tuned in its place."""
    decoder = lora.attach(params.get("decoder", {}), tuned.get("decoder", {}), config)
    others = lambda tree: flatten_dict({k: v for k, v in tree.items() if k != "decoder"}, sep=".")
    return {"decoder": decoder, **unflatten_dict({**others(params), **others(tuned)}, sep=".")}


def count(tuned: Tree) -> int:
    """How many numbers are tuned."""
    return sum(x.size for x in jax.tree.leaves(tuned))
