"""Qwen2.5-VL-7B-Instruct on all-NLI, with the paper's text-only recipe.

`qwen2_5_vl_7b:reference` takes the recipe of the released code.

    lco train --config=qwen2_5_vl_7b --data=my.jsonl --eval=heldout.jsonl

Published (arXiv 2510.11693), LoRA on text alone: 60.4 on MIEB(lite), the mean of 51 tasks. With
94,000 multimodal records more, which this configuration does not have: 67.6. For a 7B model (which
family is not at hand), LoRA on text alone: 72.0, the mean of six groups of tasks, after 9.3 H20
hours.

Tried on tiny random checkpoints of this family, against transformers, peft and torch (tests/ hold
the bounds), and never on the real weights: there are no numbers of our own yet.
"""

from ml_collections import ConfigDict

from lco_jax.configs import qwen2_5_omni_3b


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from the Omni 3B's."""
    config = qwen2_5_omni_3b.get_config(recipe)
    config.name = "qwen2_5_vl_7b"
    config.model.path = "Qwen/Qwen2.5-VL-7B-Instruct"
    return config
