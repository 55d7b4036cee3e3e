"""The laboratory: the paper's law in small, on two cores.

    python -m laboratory --config=configs/lab.py            three seeds, in under 40 minutes
    python -m laboratory --config=configs/lab.py:short      one seed, a small world: that everything runs
    python -m laboratory --config=configs/lab.py:real --config.data_dir=DIR

DIR holds tfds/ (cifar10 and mnist as array_record files) and fsdd/ (the Free Spoken Digit Dataset's wavs).
docs/laboratory.md says what is measured, and how a claim is decided.
"""

from dataclasses import asdict

from ml_collections import ConfigDict, config_dict

from configs import base
from laboratory import backbone, real, worlds


def get_config(form: str = "") -> ConfigDict:
    """form: "", "short" or "real"."""
    config = ConfigDict()
    config.name = f"lab_{form}" if form else "lab"
    config.world = "real" if form == "real" else "made"
    config.data_dir = config_dict.placeholder(str)
    config.seeds = (10, 11, 12)  # rates and the world's difficulty were chosen on seed 0
    config.sizes = asdict(real.Sizes() if form == "real" else worlds.Sizes())
    config.geometry = asdict(backbone.Geometry())
    config.stages = (
        0,
        600,
        1800,
    )  # steps of generative training; each checkpoint is measured and tuned
    config.ways = ("full", "projection", "clip")  # of tuning the last of them, beside lora
    # gist: answering the embedding prompt itself, which aligns before any tuning (docs/laboratory.md)
    config.mix = ConfigDict(
        {"image": 0.35, "video": 0.15, "audio": 0.25, "page": 0.1, "text": 0.15, "gist": 0.0}
    )
    config.templates = (
        ("{}",) if form == "real" else ("a {}",)
    )  # what stands for a class is its label in these
    config.answers = 64  # held-out records of each kind that are answered
    config.answer_tokens = 40  # the most of an answer

    config.pretrain = _training("pretrain")
    config.pretrain.tune.decoder = "full"
    config.pretrain.tune.towers = "all"
    config.pretrain.train.batch_size = 32
    config.pretrain.optimizer.learning_rate = 1e-3
    config.pretrain.optimizer.beta2 = 0.95
    config.pretrain.optimizer.warmup_steps = 50
    config.pretrain.checkpoint.every = 50

    config.contrast = _training("contrast")  # equal steps and data for every way of tuning
    config.contrast.train.batch_size = 64
    config.contrast.train.steps = 60
    config.rates = ConfigDict({"lora": 2e-3, "full": 5e-4, "projection": 2e-3, "clip": 2e-3})

    if form == "real":
        config.stages = (0, 300, 1000)
        config.mix = ConfigDict({"image": 0.45, "audio": 0.35, "text": 0.2, "gist": 0.0})
    elif form == "short":
        config.seeds = (0,)
        config.sizes = asdict(worlds.Sizes.small())
        config.stages = (0, 8)
        config.ways = ("projection", "clip")
        config.answers = 6
        config.pretrain.checkpoint.every = 8
        config.pretrain.train.batch_size = 16
        config.pretrain.optimizer.warmup_steps = 2
        config.contrast.train.batch_size = 16
        config.contrast.train.steps = 4
        config.contrast.optimizer.warmup_steps = 1
    elif form:
        raise ValueError(f"there is no form {form!r}; there are: short, real")
    return config


def _training(name: str) -> ConfigDict:
    """Of either training: base, at this scale."""
    config = base.get_config()
    config.name = name
    config.data.media = ConfigDict(
        {**config.data.media.to_dict(), "video_min_pixels": backbone.MEDIA.video_min_pixels}
    )
    config.eval.path = ""
    config.checkpoint.every = 10_000
    return config
