"""LLaVA-NeXT over Llama 3 8B on all-NLI, with the paper's text-only recipe.

`llava_next_8b:reference` takes the recipe of the released code.
"""

from ml_collections import ConfigDict

from lco_jax.configs import qwen2_5_omni_3b


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from the Omni 3B's."""
    config = qwen2_5_omni_3b.get_config(recipe)
    config.name = "llava_next_8b"
    config.model.path = "llava-hf/llama3-llava-next-8b-hf"
    return config
