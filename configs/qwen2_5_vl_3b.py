"""Qwen2.5-VL-3B-Instruct on all-NLI, with the paper's text-only recipe.

`qwen2_5_vl_3b:reference` takes the recipe of the released code.

    lco train --config=qwen2_5_vl_3b --data=my.jsonl --eval=heldout.jsonl

Published (arXiv 2510.11693), LoRA on text alone: 66.3 for a 3B model (which family is not at hand),
the mean of six groups of tasks, after 4.7 H20 hours. A mean of MIEB(lite) for this model is not at
hand.

Tried on tiny random checkpoints of this family, against transformers, peft and torch (tests/ hold
the bounds), and never on the real weights: there are no numbers of our own yet.
"""

from ml_collections import ConfigDict

from lco_jax.configs import qwen2_5_omni_3b


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from the Omni 3B's."""
    config = qwen2_5_omni_3b.get_config(recipe)
    config.name = "qwen2_5_vl_3b"
    config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    return config
