"""The laboratory's experiment on a language model, whole, on tiny parts and tiny sets of data."""

import dataclasses
import json
import re

import pytest
import reference_parts as parts
from test_laboratory_real import data_dir  # noqa: F401 (a fixture)
from tfds_files import TEXT, class_label, write_tfds

from configs import lab, smollm2
from laboratory import (
    assembled,
    assembled_report,
    backbone,
    options,
    options_report,
    real,
    recipe,
)
from lco_jax.checkpoint.assembly import assemble
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.errors import LcoError
from lco_jax.data.processor import Processor
from lco_jax.train import train

LABELS = ("entailment", "neutral", "contradiction")
NLI = [
    ("A man is cooking in a kitchen.", "A man is making food.", "The kitchen is empty."),
    ("Two women are talking on a bench.", "Women are sitting.", "Women are swimming."),
    ("A dog runs.", "An animal runs.", "A dog sleeps."),
]


@pytest.fixture(scope="module")
def sets(data_dir):  # noqa: F811
    """CIFAR-10, MNIST, spoken digits and SNLI."""
    rows = [
        {"premise": text.encode(), "hypothesis": other.encode(), "label": label}
        for text, entailed, contradicted in NLI
        for other, label in ((entailed, 0), (contradicted, 2))
    ]
    features = {"premise": TEXT, "hypothesis": TEXT, "label": class_label(3)}
    rows_of = {"train": rows, "test": rows[:2]}
    write_tfds(data_dir / "tfds", "snli", features, rows_of, {"label": LABELS})
    return data_dir


@pytest.fixture(scope="module")
def config(sets, tmp_path_factory):
    """The configuration of the real experiment, with everything as small as it can be."""
    folder = tmp_path_factory.mktemp("tiny parts")
    parts.build_language("llama_tied", folder / "language")
    parts.build_whisper(folder / "ears")
    pairs = folder / "pairs.csv"
    lines = [f"a man {i},a woman {i},{i % 6}" for i in range(8)]
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = lab.get_config("smollm2")
    config.data_dir = str(sets)
    config.seeds = (0,)
    config.ways = ("plain", "projection", "pairs")
    config.language, config.audio = str(folder / "language"), str(folder / "ears")
    config.audio_window = 120
    config.captioner = dataclasses.asdict(backbone.Geometry(patch=14))
    config.sizes = dataclasses.asdict(real.small())
    config.stages = (0, 1, 2)
    config.answers, config.answer_tokens = 3, 2
    config.sts = (str(pairs),)
    for training, steps in ((config.eyes, 2), (config.pretrain, 2), (config.contrast, 2)):
        training.train.batch_size, training.train.steps = 2, steps
        training.optimizer.warmup_steps = 1
        training.checkpoint.every = 1
    return config


@pytest.mark.slow
def test_the_recipe_in_torch_does_what_training_does(config, tmp_path):
    """A batch of all records: its first loss depends on no order and on no adapter."""
    assemble(tmp_path / "model", config.language, seed=0)
    lines = [dict(zip(("anchor", "positive", "negative"), texts, strict=True)) for texts in NLI]
    data = tmp_path / "nli.jsonl"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    settings = smollm2.get_config()
    settings.model.path, settings.eval.sts = str(tmp_path / "model"), ""
    settings.data.sources.snli.path = str(data)
    settings.train.batch_size, settings.train.steps = len(NLI), 12
    settings.optimizer.warmup_steps = 2
    ours = train(settings, tmp_path / "ours")
    checkpoint = open_checkpoint(settings.model.path)
    model = recipe.load(settings, checkpoint.folder)
    triplets = recipe.read_triplets(settings, Processor(checkpoint.folder))
    losses = recipe.fit(model, triplets, settings)
    assert len(losses) == 12
    assert losses[0] == pytest.approx(ours["first_loss"], abs=1e-4)
    assert losses[-1] < losses[0]
    # rates are ours: 0 at the first step, so that the second has the same loss
    assert losses[1] == pytest.approx(losses[0], abs=1e-6)


@pytest.fixture(scope="module")
def made(config, tmp_path_factory):
    """A folder of the experiment, and what it returned."""
    folder = tmp_path_factory.mktemp("made") / "lab"
    return folder, assembled.experiment(config, folder, "the command")


@pytest.mark.slow
def test_the_experiment_runs_and_goes_on(config, made, tmp_path):
    folder, results = made
    runs = {(run["seed"], run["generative_steps"], run["tune"]): run for run in results["runs"]}
    ways = ("none", *config.ways)
    wanted = {(0, "none"), (0, "plain"), (1, "none"), (1, "plain"), *((2, way) for way in ways)}
    assert runs.keys() == {(0, *run) for run in wanted}
    for (_, steps, way), run in runs.items():
        assert all(0 <= value <= 1 for value in run["representation"].values())
        assert ("text" in run) == (steps == 2 and way in ("none", "plain"))
        assert ("generative" in run) == (way == "none" or steps == 2)
    # the language model is frozen in generative training: texts keep their states, media do not
    first, last = (runs[0, steps, "none"]["layers"] for steps in (0, 2))
    assert first["anisotropy_of_text"] == last["anisotropy_of_text"]
    assert first["anisotropy"]["photo"] != last["anisotropy"]["photo"]
    plain = (folder / "seed-0/world/contrast/plain.jsonl").read_text(encoding="utf-8")
    texts = [json.loads(line)["anchor"] for line in plain.splitlines()]
    assert texts == [NLI[0][0], NLI[0][0]]  # the others name classes: "two" and "dog"

    calls = [folder / "seed-0/parts" / f"{name}.json" for name in ("run-plain-2", "eyes")]
    before = calls[1].stat().st_mtime_ns
    calls[0].unlink()
    again = assembled.experiment(config, folder, "the command")
    assert calls[1].stat().st_mtime_ns == before

    def numbers(found):
        return [
            {key: value for key, value in run.items() if key != "seconds"} for run in found["runs"]
        ]

    assert numbers(again) == numbers(results)
    sentences = {"command": "", "before": {}, "runs": []}
    sentences["before"] = {"pairs": 0.1}
    sentences["runs"] = [{"seed": 0, "way": "ours", "scores": {"pairs": 0.2}}]
    assembled_report.write(again, sentences, tmp_path / "page")
    assert "undecided" in (tmp_path / "page" / "report.md").read_text(encoding="utf-8")


@pytest.mark.slow
def test_options_are_compared_on_the_generators_of_the_experiment(made, tmp_path, sets):
    config = lab.get_config("options")
    config.generators, config.seeds = str(made[0]), (0,)
    config.options, config.held_out, config.pairs = ("recipe", "matryoshka"), 1, 6
    config.contrast.train.batch_size, config.contrast.train.steps = 1, 2
    config.contrast.optimizer.warmup_steps = 1
    config.contrast.optimizer.learning_rate = 1e-2
    results = options.experiment(config, tmp_path / "options", "the command")
    recipe, other = results["runs"]
    assert (recipe["option"], other["option"]) == ("recipe", "matryoshka")
    for run in results["runs"]:
        assert run["small"]["pairs"]["1/1"] == run["text"]["pairs"]
        assert len(run["small"]["pairs"]) == 6
    assert recipe["last_loss"] != other["last_loss"]
    assert recipe["representation"].keys() == other["representation"].keys()
    again = options.experiment(config, tmp_path / "options", "the command")
    assert again == results
    options_report.write(results, tmp_path / "page")
    page = (tmp_path / "page" / "report.md").read_text(encoding="utf-8")
    (row,) = [line for line in page.splitlines() if line.startswith("| `matryoshka`: ")]
    # one seed has no interval: of pairs, SNLI and three kinds of media
    assert row.count(options_report.NOTHING) == 5


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"options": ("recipe", "magic")}, "'magic'; these are: recipe, two_way"),
        ({"options": ("two_way",)}, "lacks 'recipe'"),
        ({"generators": None}, "give the folder of a finished lab:smollm2"),
        ({"generators": "/nowhere"}, "'/nowhere'; give the folder"),
    ],
)
def test_options_that_cannot_be_compared(tmp_path, changes, says):
    config = lab.get_config("options")
    config.update(changes)
    with pytest.raises(LcoError, match=re.escape(says)):
        options.experiment(config, tmp_path, "the command")


def of_seeds(*runs):
    """Runs of two options: (seed, the recipe's number, the other's)."""
    for seed, ours, other in runs:
        yield {"seed": seed, "option": "recipe", "retrieval": ours}
        yield {"seed": seed, "option": "two_way", "retrieval": other}


@pytest.mark.parametrize(
    ("runs", "verdict"),
    [
        ([(0, 0.5, 0.61), (1, 0.2, 0.30), (2, 0.9, 0.99)], options_report.HELPS),
        ([(0, 0.61, 0.5), (1, 0.30, 0.2), (2, 0.99, 0.9)], options_report.HURTS),
        ([(0, 0.5, 0.61), (1, 0.2, 0.10), (2, 0.9, 0.91)], options_report.NOTHING),
        ([(0, 0.5, 0.9)], options_report.NOTHING),
    ],
)
def test_a_verdict_is_of_differences_by_seed(runs, verdict):
    found = options_report.difference(
        [*of_seeds(*runs)], "two_way", lambda run: run.get("retrieval")
    )
    assert options_report.verdict(found) == verdict
