"""The laboratory: the paper's law in small, on two cores.

    python -m laboratory --config=configs/lab.py          three seeds, in under 40 minutes
    python -m laboratory --config=configs/lab.py:short    one seed, a small world: a smoke test
    python -m laboratory --config=configs/lab.py:real --config.data_dir=DIR
    python -m laboratory --config=configs/lab.py:smollm2 --config.data_dir=DIR
    python -m laboratory --config=configs/lab.py:options --config.generators=runs/lab_smollm2
    python -m laboratory --config=configs/lab.py:sentences

The last three are on a real language model, SmolLM2-135M, and take hours: one gives it Whisper's
ears and fresh eyes; one, with those, tries each addition to the paper's recipe; one compares
configs/smollm2.py with the recipe in torch.

DIR holds tfds/ (cifar10 and mnist as array_record files) and fsdd/ (the wav files of the Free
Spoken Digit Dataset). docs/laboratory.md explains what is measured, and how a claim is decided. The
laboratory is part of the repository and not of the package.
"""

from dataclasses import asdict

from ml_collections import ConfigDict, config_dict

from laboratory import backbone, real, worlds
from lco_jax.configs import base

FORMS = ("", "short", "real", "smollm2", "options", "sentences")


def get_config(form: str = "") -> ConfigDict:
    """form: one of `FORMS`."""
    if form not in FORMS:
        raise ValueError(f"there is no form {form!r}; there are: {', '.join(FORMS[1:])}")
    if form == "smollm2":
        return _smollm2()
    if form == "options":
        return _options()
    if form == "sentences":
        return _sentences()
    config = ConfigDict()
    config.name = f"lab_{form}" if form else "lab"
    config.world = "made"
    config.data_dir = config_dict.placeholder(str)
    config.seeds = (10, 11, 12)  # rates and the world's difficulty were chosen on seed 0
    config.sizes = asdict(worlds.Sizes())
    config.geometry = asdict(backbone.Geometry())
    # steps of generative training; the checkpoint of each is measured and tuned
    config.stages = (0, 600, 1800)
    config.ways = ("full", "projection", "clip")  # of tuning the last of them, beside lora
    # gist: answering the embedding prompt itself, which aligns before any tuning
    # (docs/laboratory.md)
    config.mix = ConfigDict(
        {"image": 0.35, "video": 0.15, "audio": 0.25, "page": 0.1, "text": 0.15, "gist": 0.0}
    )
    config.templates = ("a {}",)  # a class is described by its label in each of these
    config.answers = 64  # held-out records of each kind that are answered
    config.answer_tokens = 40  # the most of an answer
    config.pretrain = _pretraining()
    config.contrast = _training("contrast")  # equal steps and data for every way of tuning
    config.contrast.train.batch_size = 64
    config.contrast.train.steps = 60
    config.rates = ConfigDict({"lora": 2e-3, "full": 5e-4, "projection": 2e-3, "clip": 2e-3})
    if form == "real":
        _make_real(config)
    if form == "short":
        _make_short(config)
    return config


def _training(name: str) -> ConfigDict:
    """What both trainings have in common: base, at this scale."""
    config = base.get_config()
    config.name = name
    config.data.media = ConfigDict(
        {**config.data.media.to_dict(), "video_min_pixels": backbone.MEDIA.video_min_pixels}
    )
    config.eval.path = ""
    config.checkpoint.every = 10_000
    return config


def _pretraining() -> ConfigDict:
    """The generative training."""
    config = _training("pretrain")
    config.tune.decoder = "full"
    config.tune.towers = "all"
    config.train.batch_size = 32
    config.optimizer.learning_rate = 1e-3
    config.optimizer.beta2 = 0.95
    config.optimizer.warmup_steps = 50
    config.checkpoint.every = 50
    return config


def _make_real(config: ConfigDict) -> None:
    """Photos, written and spoken digits."""
    config.world = "real"
    config.sizes = asdict(real.Sizes())
    config.templates = ("{}",)
    config.stages = (0, 300, 1000)
    config.mix = ConfigDict({"image": 0.45, "audio": 0.35, "text": 0.2, "gist": 0.0})


def _smollm2() -> ConfigDict:
    """A real language model, which gets ears and eyes (laboratory/assembled.py)."""
    config = ConfigDict()
    config.name = "lab_smollm2"
    config.world = "assembled"
    config.data_dir = config_dict.placeholder(str)
    config.seeds = (10, 11, 12, 13, 14)  # rates and steps were chosen on seed 0
    config.language = "smollm2-135m"
    config.audio = "whisper-base"
    eyes = {"vision_hidden": 192, "vision_depth": 4, "vision_heads": 4, "vision_mlp": 512}
    config.captioner = asdict(backbone.Geometry(**eyes, patch=14))
    config.audio_window = 200  # mel frames that the encoder sees at once: two seconds
    config.sizes = asdict(real.Sizes(tests=10))  # media of a class
    config.stages = (0, 10, 20, 40, 60, 100, 160)  # steps of generative training
    config.ways = ("plain", "classes", "full", "projection", "pairs")
    config.mix = ConfigDict({"image": 0.6, "audio": 0.4})
    config.answers = 30
    config.answer_tokens = 24
    config.sts = ("builtin:stsb-test",)
    config.eyes = _pretraining()  # of the captioner
    config.eyes.train.batch_size = 64
    config.eyes.train.steps = 1000
    config.eyes.checkpoint.every = 250
    config.pretrain = _training("pretrain")
    config.pretrain.tune.decoder = "none"
    config.pretrain.tune.towers = "projectors,visual"
    config.pretrain.train.batch_size = 24
    config.pretrain.optimizer.learning_rate = 1e-3
    config.pretrain.optimizer.schedule = "constant"  # so that checkpoints compare
    config.pretrain.checkpoint.every = 10
    config.pretrain.export.merged = False
    config.contrast = _tuning()
    config.rates = ConfigDict(
        {"plain": 3e-4, "classes": 3e-4, "full": 3e-5, "projection": 1e-3, "pairs": 3e-4}
    )
    return config


def _tuning() -> ConfigDict:
    """The contrastive tuning of a real language model, on texts."""
    config = _training("contrast")
    config.lora.dropout = 0.0
    config.train.batch_size = 32
    config.train.steps = 16
    config.optimizer.warmup_steps = 4
    config.export.merged = False
    return config


def _options() -> ConfigDict:
    """Additions to the recipe, each alone, on the generators of lab:smollm2
    (laboratory/options.py).
    """
    config = ConfigDict()
    config.name = "lab_options"
    config.world = "options"
    config.generators = config_dict.placeholder(str)
    config.seeds = (10, 11, 12, 13, 14)
    config.options = (
        "recipe",
        "two_way",
        "learned_temperature",
        "own_scores",
        "base_scores",
        "hard_weight",
        "matryoshka",
    )
    config.held_out = 100  # triplets of the world's texts that are measured and not trained on
    config.pairs = 500  # of sentences, of each file
    config.contrast = _tuning()
    config.contrast.optimizer.learning_rate = 3e-4
    return config


def _sentences() -> ConfigDict:
    """configs/smollm2.py and the recipe in torch, by seed (laboratory/sentences.py)."""
    config = ConfigDict()
    config.name = "lab_sentences"
    config.world = "sentences"
    config.seeds = (10, 11, 12, 13, 14)
    config.sts = ("builtin:stsb-dev", "builtin:stsb-test")
    return config


def _make_short(config: ConfigDict) -> None:
    """A few minutes of everything."""
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
