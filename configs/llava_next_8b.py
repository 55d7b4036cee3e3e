"""LLaVA-NeXT over Llama 3 8B on all-NLI, with the paper's text-only recipe.

`llava_next_8b:reference` takes the recipe of the released code.

    lco train --config=llava_next_8b --data=my.jsonl --eval=heldout.jsonl

Published (arXiv 2510.11693): points of a figure alone, beside its scaling law; no table of this
model is at hand.

Tried on tiny random checkpoints of this family, against transformers, peft and torch (tests/ hold
the bounds), and never on the real weights: there are no numbers of our own yet.
"""

from ml_collections import ConfigDict

from lco_jax.configs import qwen2_5_omni_3b


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from the Omni 3B's."""
    config = qwen2_5_omni_3b.get_config(recipe)
    config.name = "llava_next_8b"
    config.model.path = "llava-hf/llama3-llava-next-8b-hf"
    return config
