"""The published recipes: `paper` is arXiv 2510.11693, `reference` the code released with it; and
presets, which take from other embedders what a configuration can say.

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


# over `paper`; docs/training.md says of each what is theirs, and what cannot be had
PRESETS = {
    # arXiv 2601.03666: where its learned temperatures ended is where ours begin
    "e5_omni": {
        "loss.temperatures": (0.013, 0.0127, 0.0223, 0.0219),
        "loss.learn_temperature": True,
        "loss.coral": 0.05,
    },
    # arXiv 2605.08384
    "jina": {"train.two_way": True, "loss.matryoshka": (1024, 512, 256, 128, 64, 32)},
    # arXiv 2507.04590; of its code train_v2-qwen2vl-2B.sh and the defaults in arguments.py
    "vlm2vec": {
        "lora.rank": 16,
        "lora.alpha": 64.0,
        "lora.dropout": 0.1,
        "train.batch_size": 1024,
        "train.temperature": 0.02,
        "data.sub_batch": 64,
        "optimizer.learning_rate": 5e-5,
        "optimizer.schedule": "linear",
    },
}


def apply(config: ConfigDict, recipe: str) -> ConfigDict:
    """Set the keys of `recipe`, a recipe or a preset; "" leaves the config as it is."""
    if recipe:
        known = {**RECIPES, **{name: RECIPES["paper"] | keys for name, keys in PRESETS.items()}}
        if recipe not in known:
            raise ValueError(f"there is no recipe {recipe!r}; there are: {', '.join(known)}")
        config.update_from_flattened_dict({**COMMON, **known[recipe]})
    return config
