"""Presets: what configurations take from other embedders."""

import json

import numpy as np
import pytest

from lco_jax import contrastive
from lco_jax.configs import base, recipes
from lco_jax.core.packing import MODALITIES
from lco_jax.training import cli
from lco_jax.training.objective import LossConfig
from lco_jax.training.run import check_config

# by hand, and not from `recipes`
PUBLISHED = {
    # arXiv 2601.03666, table of ablations: learned T .0130, I .0127, V .0223, A .0219; CORAL λ .05
    "e5_omni": {
        "loss.temperatures": [0.013, 0.0127, 0.0223, 0.0219],  # in the order of MODALITIES
        "loss.learn_temperature": True,
        "loss.coral": 0.05,
    },
    # arXiv 2605.08384: symmetric InfoNCE and Matryoshka
    "jina": {"train.two_way": True, "loss.matryoshka": [1024, 512, 256, 128, 64, 32]},
    # arXiv 2507.04590: sub-batches of 64 of 1,024 (table 4), LoRA of rank 16 (figure 2); the others
    # are those of its script, train_v2-qwen2vl-2B.sh
    "vlm2vec": {
        "train.batch_size": 1024,
        "data.sub_batch": 64,
        "lora.rank": 16,
        "lora.alpha": 64.0,
        "lora.dropout": 0.1,
        "train.temperature": 0.02,
        "optimizer.learning_rate": 5e-5,
        "optimizer.schedule": "linear",
    },
}


def test_every_preset_is_published():
    assert recipes.PRESETS.keys() == PUBLISHED.keys()
    assert MODALITIES == ("text", "image", "video", "audio")


@pytest.mark.parametrize("preset", PUBLISHED)
@pytest.mark.parametrize(
    ("name", "dimension"),
    [
        ("qwen2_5_vl_3b", 2048),
        ("qwen2_5_vl_7b", 3584),
        ("qwen2_5_omni_3b", 2048),
        ("qwen2_5_omni_7b", 3584),
        ("llava_next_8b", 4096),
    ],
)
def test_presets_fit_the_real_models(name, dimension, preset):
    """Their keys exist, go together, and differ from the paper's where they say so."""
    config = cli.parse(["train", f"--config={name}:{preset}"], "").config
    check_config(config)
    objective = LossConfig.of(config)
    objective.check_dimension(dimension)
    paper = cli.parse(["train", f"--config={name}:paper"], "").config
    flat, before = (dict(flatten(one.to_dict())) for one in (config, paper))
    changed = {key: value for key, value in flat.items() if value != before[key]}
    assert json.loads(json.dumps(changed)) == PUBLISHED[preset]
    assert config.model.path == paper.model.path


def flatten(tree, above=()):
    """(dotted key, value) of what a configuration holds."""
    for key, value in tree.items():
        if isinstance(value, dict):
            yield from flatten(value, (*above, key))
        else:
            yield ".".join((*above, key)), value


@pytest.mark.parametrize("preset", recipes.PRESETS)
def test_a_preset_trains(preset, tmp_path):
    """Its additions go through a step of the built-in model, whose vectors are shorter."""
    config = base.get_config()
    keys = {key: value for key, value in recipes.PRESETS[preset].items() if "loss." in key}
    config.update_from_flattened_dict(keys)
    config.loss.matryoshka = tuple(one for one in config.loss.matryoshka if one < 128)
    config.train.two_way = recipes.PRESETS[preset].get("train.two_way", False)
    config.train.batch_size, config.train.steps, config.optimizer.warmup_steps = 8, 2, 1
    config.data.sub_batch = 4
    config.model.path = "builtin:tiny"
    config.data.sources = {"a": {"kind": "jsonl", "path": "assets:lab/text.jsonl"}}
    config.eval.path, config.export.merged = "", False
    found = contrastive.train(config, tmp_path / "run")
    assert np.isfinite(found["last_loss"])
