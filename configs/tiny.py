"""An untrained Qwen2.5-VL and English triplets: a model that learns from nothing.

python -m lco_jax.train --config=tiny
"""

from ml_collections import ConfigDict

from lco_jax.configs import base, recipes


def get_config(recipe: str = "") -> ConfigDict:
    """What differs from base: a model without knowledge wants a higher rate, and longer."""
    config = base.get_config()
    config.name = "tiny"
    config.model.path = "builtin:tiny"
    config.data.sources.bundled.path = "assets:triplets_train.jsonl"
    config.train.batch_size = 48
    config.train.epochs = 6.0
    config.optimizer.learning_rate = 4e-3
    config.eval.path = "assets:triplets_heldout.jsonl"
    return recipes.apply(config, recipe)
