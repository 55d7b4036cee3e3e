"""Qwen2.5-VL-3B-Instruct on all-NLI, with the paper's text-only recipe.

`qwen2_5_vl_3b:reference` takes the recipe of the released code.
"""

from ml_collections import ConfigDict

from lco_jax.configs import qwen2_5_omni_3b


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from the Omni 3B's."""
    config = qwen2_5_omni_3b.get_config(recipe)
    config.name = "qwen2_5_vl_3b"
    config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"
    return config
