"""The published recipes: `paper` is arXiv 2510.11693, `reference` the code released with it.

The paper decays the rate with a cosine and uses α = 16 for text alone. The code decays it
linearly, uses α = 128 and trains over a base in 4 bits. A gap in a reproduction can be attributed
only if both can be run.
"""

from ml_collections import ConfigDict

RECIPES = {
    "paper": {"lora.alpha": 16.0, "optimizer.schedule": "cosine", "train.batch_size": 768},
    "reference": {
        "lora.alpha": 128.0,
        "optimizer.schedule": "linear",
        "train.batch_size": 1056,
        "model.quantize": "nf4",
    },
}
COMMON = {
    "lora.rank": 64,
    "lora.dropout": 0.05,
    "data.max_length": 650,
    "train.epochs": 2.0,
    "train.temperature": 0.03,
    "optimizer.learning_rate": 4e-4,
    "optimizer.warmup_steps": 100,
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 1.0,
    "checkpoint.every": 100,
    "export.dtype": "bfloat16",
    "model.dtype": "bfloat16",
    "model.remat": "auto",
    "train.chunk_tokens": -1,
}


def apply(config: ConfigDict, recipe: str) -> ConfigDict:
    """Set the keys of `recipe`; "" leaves the config as it is."""
    if recipe:
        if recipe not in RECIPES:
            raise ValueError(f"there is no recipe {recipe!r}; there are: {', '.join(RECIPES)}")
        config.update_from_flattened_dict({**COMMON, **RECIPES[recipe]})
    return config
