"""Presets: what configurations take from other embedders."""

import numpy as np
import pytest

from lco_jax import contrastive
from lco_jax.configs import base, recipes
from lco_jax.training import cli
from lco_jax.training.objective import LossConfig
from lco_jax.training.run import check_config


@pytest.mark.parametrize("preset", recipes.PRESETS)
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
    assert {key for key in flat if flat[key] != before[key]} == recipes.PRESETS[preset].keys()
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
