"""Qwen2.5-Omni-3B on all-NLI, with the paper's text-only recipe.

`qwen2_5_omni_3b:reference` takes the recipe of the released code.
"""

from ml_collections import ConfigDict

from lco_jax.configs import base


def get_config(recipe: str = "paper") -> ConfigDict:
    """What differs from base."""
    config = base.get_config(recipe)
    config.name = "qwen2_5_omni_3b"
    config.model.path = "Qwen/Qwen2.5-Omni-3B"
    config.data.sources = {
        "all-nli": {
            "kind": "parquet",
            "path": "sentence-transformers/all-nli",
            "files": "triplet/train-*.parquet",
        }
    }
    config.eval.path = ""
    return config
