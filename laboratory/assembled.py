"""The experiment on a real language model: learn to say, then open by text.

A language model gets ears (Whisper's encoder) and eyes (a vision tower that a small captioner was
trained with, from nothing). Generative training teaches the projectors, and the eyes, to put into
the language model what media show; the language model stays as it is. So one adapter, trained on
texts alone, fits the checkpoints of every stage: it never saw a tower.

A seed is a world (which speakers and classes are held out, which media), eyes, projectors, the
order of the data and the adapters. Each run's numbers are in a file of their own, and an experiment
that is started again does only what is missing.
"""

import json
import math
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from laboratory import backbone, classes, measure, real, worlds
from laboratory.shared import SeedFolder, check_stages, claim, finished, once
from lco_jax.checkpoint.assembly import Fresh, assemble
from lco_jax.checkpoint.export import export_merged
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.files import write_json, write_text
from lco_jax.data.sources import open_source
from lco_jax.evaluation.sts import ScoredPairs, agreement, open_pairs, read_scored
from lco_jax.generator import OmniGenerator
from lco_jax.job import say
from lco_jax.pretrain import pretrain
from lco_jax.train import train
from lco_jax.training import tuning
from lco_jax.training.run import tuned_of_run

SEEN = ("photo", "written")  # kinds of what eyes see
PLAIN, CLASSES, MEDIA = "contrast/plain.jsonl", "contrast/text.jsonl", "contrast/media.jsonl"
# what is tuned on, and what differs from LoRA: `plain` texts speak of none of the test's classes
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": (PLAIN, {}),
    "classes": (CLASSES, {}),
    "full": (PLAIN, {"tune.decoder": "full"}),
    "projection": (PLAIN, {"tune.decoder": "projection"}),
    "pairs": (MEDIA, {"train.two_way": True, "train.ignore_duplicates": True}),
}
OF_TEXT = ("none", "plain", "classes")  # ways whose sentences are measured: it takes minutes
QUESTIONS = (  # what the language model is asked, to see what tuning costs it
    "What is the capital of France?",
    "What is the capital of Italy?",
    "What is the largest planet of the solar system?",
    "How many days are in a week?",
    "Who wrote Romeo and Juliet?",
    "What is the opposite of hot?",
    "What is the chemical symbol of water?",
    "Which animal says meow?",
    "What do bees make?",
    "What colour is the sky on a clear day?",
    "What is 2 plus 2?",
    "Which season comes after winter?",
    "What is frozen water called?",
    "Name a fruit that is yellow.",
    "What is the first month of the year?",
    "How many legs does a spider have?",
    "What is the capital of Japan?",
    "Which planet do we live on?",
    "What is the plural of mouse?",
    "What do cows drink?",
    "Translate hello to Spanish.",
    "What gas do plants take in?",
    "How many hours are in a day?",
    "What is the language of Brazil?",
)

# other words for what the test shows
OTHER_WORDS = (
    "puppy", "kitten", "pony", "stallion", "aircraft", "jet", "vehicle", "van", "sailboat",
    "vessel", "pickup", "toad", "stag", "doe", "animal", "number", "digit", "speak", "voice",
)  # fmt: skip


class Bench(SeedFolder):
    """One seed's folder, and the model in it."""

    @property
    def base(self) -> Path:
        """The assembled model, whose towers have learned nothing."""
        return self.folder / "base"

    @cached_property
    def kinds(self) -> dict[str, classes.Kind]:
        return classes.read_kinds(self.world)

    @cached_property
    def loaded(self) -> tuple[OmniGenerator, dict[str, Any]]:
        """The base and its parameters. Its programs serve every stage and way."""
        model = OmniGenerator.from_pretrained(self.base)
        return model, model.params

    @property
    def model(self) -> OmniGenerator:
        """The base, or what stands in the place of its parameters."""
        return self.loaded[0]


def experiment(config: ConfigDict, workdir: Path, command: str) -> dict[str, Any]:
    """Run or go on; writes results.json into `workdir` and returns its content."""
    _check(config)
    results: dict[str, Any] = {"config": claim(workdir, config), "command": command}
    results |= {"worlds": [], "runs": []}
    # the world, eyes, a generator, its tunings and its runs
    per_seed = 3 + len(config.ways) + len(list(_wanted(config)))
    with tqdm(total=per_seed * len(config.seeds), desc="laboratory", unit="part") as bar:
        for seed in config.seeds:
            bench = Bench(config, workdir / f"seed-{seed}", seed)
            results["worlds"].append(_once(bench, "world", partial(_make_world, bench), bar))
            results["runs"] += _runs(bench, bar)
            tidy(bench)
    seconds = [one["seconds"] for one in (*results["worlds"], *results["runs"])]
    results["minutes"] = sum(seconds) / 60
    write_json(workdir / "results.json", results)
    say(f"\n{results['minutes']:.1f} minutes; {workdir / 'results.json'}")
    return results


def _check(config: ConfigDict) -> None:
    """Raise, by key, for what no experiment can have."""
    check_stages(config)
    if config.stages[0] != 0:
        raise LcoError(f"config.stages begins with {config.stages[0]}; begin with 0, no training")
    if strange := [way for way in config.ways if way not in WAYS]:
        raise LcoError(f"config.ways has {strange[0]!r}; these are: {', '.join(WAYS)}")
    if not config.data_dir:
        raise LcoError(
            "config.data_dir is missing: the folder with tfds/ (cifar10, mnist and snli as "
            "array_record) and fsdd/"
        )


def _once(bench: Bench, name: str, make: Callable[[], dict[str, Any]], bar: tqdm) -> dict[str, Any]:
    """The seed's part of this name, made if it is absent, and the seconds that it took."""

    def timed() -> dict[str, Any]:
        began = time.perf_counter()
        bar.set_postfix_str(f"seed {bench.seed}: {name}")
        return {**make(), "seconds": time.perf_counter() - began}

    part = once(bench.folder / "parts" / f"{name}.json", timed)
    bar.update()
    return part


def tidy(bench: Bench) -> None:
    """Remove what is large and can be made again."""
    for name in ("base", "best", "blank"):
        shutil.rmtree(bench.folder / name, ignore_errors=True)


# ---- the world and the generators


def _make_world(bench: Bench) -> dict[str, Any]:
    """The world, with texts that do not speak of its classes."""
    config, data_dir = bench.config, Path(bench.config.data_dir)
    shutil.rmtree(bench.world, ignore_errors=True)  # of a start that was killed in the midst
    real.write(bench.world, data_dir, bench.seed, real.Sizes(**config.sizes))
    texts = [*_plain_texts(data_dir)]
    write_text(bench.world / PLAIN, "".join(texts))
    _part_heldout(bench.world / "heldout")
    return {"seed": bench.seed, "chance": classes.chance(bench.kinds), "plain_texts": len(texts)}


def _open_eyes(bench: Bench) -> dict[str, Any]:
    """A small captioner, trained from nothing; its vision tower is what the base takes."""
    blank, settings = bench.folder / "blank", bench.config.eyes.copy_and_resolve_references()
    geometry = backbone.Geometry(**bench.config.captioner)
    backbone.write(blank, worlds.texts(bench.world), bench.seed, geometry)
    images = str(bench.world / "generative/image.jsonl")
    settings.data.sources = {"image": {"kind": "jsonl", "path": images}}
    settings.eval.path = ",".join(str(bench.world / f"heldout/{k}.jsonl") for k in SEEN)
    settings.model.path, settings.seed = str(blank), bench.seed
    results = finished(pretrain(settings, bench.folder / "eyes"))
    return {"loss": results["after"]["loss"]}


def make_base(bench: Bench) -> None:
    """Assemble the model if it is absent."""
    config = bench.config
    if not bench.base.exists():
        fresh = Fresh(audio=replace(Fresh().audio, window=config.audio_window))
        assemble(
            bench.base,
            config.language,
            config.audio,
            bench.folder / "eyes" / "merged",
            fresh,
            bench.seed,
        )


def _part_heldout(folder: Path) -> None:
    """A file of held-out answers for each kind: what generates well is measured by kind."""
    lines: dict[str, list[str]] = {name: [] for name in real.KINDS}
    kinds = {}
    for name, kind in real.KINDS.items():
        kinds |= {kind.canonical(label): name for label in kind.names}
    for file in sorted(folder.glob("*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            lines[kinds[json.loads(line)["positive"]]].append(f"{line}\n")
        file.unlink()
    for name, some in lines.items():
        write_text(folder / f"{name}.jsonl", "".join(some))


def _class_words() -> re.Pattern[str]:
    """A pattern of every word that says what a test shows."""
    words = set(OTHER_WORDS)
    for kind in real.KINDS.values():
        for names in kind.names.values():
            words |= {re.sub(r"^(a|an) ", "", name) for name in names}
    choices = "|".join(map(re.escape, sorted(words)))
    return re.compile(rf"\b({choices})(e?s)?\b", re.IGNORECASE)


def _plain_texts(data_dir: Path) -> Iterator[str]:
    """Triplets of SNLI in which no class of the test occurs, as lines of a jsonl."""
    pattern = _class_words()
    for split in ("train", "test"):
        about = {"kind": "tfds", "name": "snli", "split": split, "data_dir": str(data_dir / "tfds")}
        source = open_source("snli", about)
        for record in map(source.__getitem__, range(len(source))):
            texts = [record.anchor, record.positive, *record.negatives]
            if not any(pattern.search(str(text)) for text in texts):
                line = dict(zip(("anchor", "positive", "negative"), texts, strict=False))
                yield json.dumps(line) + "\n"


def _write_own_answers(bench: Bench) -> None:
    """heldout/text.jsonl: questions, and what the language model says before anything."""
    limit = bench.config.answer_tokens
    answers = bench.model.generate_ids(list(QUESTIONS), limit, prompt="")
    lines = [
        json.dumps({"anchor": question, "positive": bench.model.text_of(ids)}) + "\n"
        for question, ids in zip(QUESTIONS, answers, strict=True)
        if np.isin(ids, bench.model.ends).any()  # the answer came to its end
    ]
    if lines:
        write_text(bench.world / "heldout" / "text.jsonl", "".join(lines))


def _generate(bench: Bench) -> dict[str, Any]:
    """The generative training, with a checkpoint at every stage."""
    config = bench.config
    settings, last = config.pretrain.copy_and_resolve_references(), config.stages[-1]
    settings.data.sources = {
        name: {
            "kind": "jsonl",
            "path": str(bench.world / f"generative/{name}.jsonl"),
            "weight": weight,
        }
        for name, weight in config.mix.items()
        if weight
    }
    _write_own_answers(bench)
    settings.model.path, settings.seed, settings.train.steps = str(bench.base), bench.seed, last
    settings.checkpoint.keep = math.ceil(last / settings.checkpoint.every)
    results = finished(pretrain(settings, bench.folder / "generator"))
    return {"trained_parameters": results["trained_parameters"]}


# ---- tuning and measuring


def _tune(bench: Bench, way: str) -> dict[str, Any]:
    """Contrastive tuning: of the base, or, on pairs, of the best generator."""
    data, changes = WAYS[way]
    settings = bench.config.contrast.copy_and_resolve_references()
    settings.update_from_flattened_dict(changes)
    settings.optimizer.learning_rate = bench.config.rates[way]
    settings.data.sources = {"contrast": {"kind": "jsonl", "path": str(bench.world / data)}}
    settings.model.path = str(_best(bench) if way == "pairs" else bench.base)
    settings.seed = bench.seed
    results = finished(train(settings, bench.folder / way))
    return {key: results[key] for key in ("trained_parameters", "first_loss", "last_loss")}


def _best(bench: Bench) -> Path:
    """The best generator as a folder."""
    folder = bench.folder / "best"
    if not folder.exists():
        workdir, best = bench.folder / "generator", bench.config.stages[-1]
        run = tuned_of_run(workdir, best)
        export_merged(
            run.source, folder, run.parameters, run.lora, "float32", checkpoint=run.checkpoint
        )
    return folder


def _wanted(config: ConfigDict) -> Iterator[tuple[int, str]]:
    """(stage, way) of every run: plain tuning at each stage, the other ways at the best one."""
    best = config.stages[-1]
    for steps in config.stages:
        for way in ("none", *config.ways):
            if way in ("none", "plain") or steps == best:
                yield steps, way


def _runs(bench: Bench, bar: tqdm) -> Iterator[dict[str, Any]]:
    """Every run of a seed."""
    wanted = [*_wanted(bench.config)]
    parts = bench.folder / "parts"
    missing = [run for run in wanted if not (parts / f"{_name(*run)}.json").exists()]
    opened = _once(bench, "eyes", partial(_open_eyes, bench), bar)
    if missing:  # which needs the base, and a finished seed has none
        make_base(bench)
    generated = _once(bench, "generator", partial(_generate, bench), bar)
    tuned = {
        way: _once(bench, f"tuned-{way}", partial(_tune, bench, way), bar)
        for way in bench.config.ways
    }
    for steps, way in wanted:
        run = _once(bench, _name(steps, way), partial(_measure, bench, steps, way), bar)
        if way == "none" and steps == bench.config.stages[-1]:
            run["seconds"] += opened["seconds"] + generated["seconds"]
        if steps == bench.config.stages[-1] and way in tuned:
            run |= {key: value for key, value in tuned[way].items() if key != "seconds"}
            run["seconds"] += tuned[way]["seconds"]
        yield run


def _name(steps: int, way: str) -> str:
    return f"run-{way}-{steps}"


def _measure(bench: Bench, steps: int, way: str) -> dict[str, Any]:
    """Every number of one generator after one way of tuning."""
    config, best = bench.config, bench.config.stages[-1]
    run: dict[str, Any] = {"seed": bench.seed, "generative_steps": steps, "tune": way}
    tuned = None if way == "none" else bench.folder / way
    params = parameters(bench, steps, tuned)
    projection = params.pop("projection", None)
    bench.model.params = params

    def project(states: np.ndarray) -> np.ndarray:
        return states if projection is None else states @ np.asarray(projection["weight"])

    run |= classes.measure(bench.model.encode_layers, project, bench.kinds)
    if way == "none" or steps == best:
        run["generative"] = measure.generate_quality(
            bench.model, bench.world, config.answers, config.answer_tokens
        )
    if steps == best and way in OF_TEXT:
        run["text"] = _text_quality(bench, way)
    return run


def parameters(bench: Bench, steps: int, workdir: Path | None) -> dict[str, Any]:
    """The base's parameters with the towers of a stage, and what a run of tuning trained.

    workdir: of that run; None for no tuning.
    """
    _, params = bench.loaded
    runs = [(bench.folder / "generator", steps)] * (steps > 0)
    runs += [] if workdir is None else [(workdir, None)]
    for folder, step in runs:
        run = tuned_of_run(folder, step)
        # merged, so that all runs share the programs of plain arrays
        tuned = dict(run.parameters)
        decoder = lora.merge(params["decoder"], tuned.pop("decoder", {}), run.lora)
        params = {**tuning.attach(params, tuned, run.lora), "decoder": decoder}
    return params


def _text_quality(bench: Bench, way: str) -> dict[str, float]:
    """{file: Spearman's correlation} of scored pairs of sentences.

    Before tuning it is the language model's, the same for all seeds.
    """
    measured = partial(_agreements, bench)
    return once(bench.folder.parent / "text-before.json", measured) if way == "none" else measured()


def _agreements(bench: Bench) -> dict[str, float]:
    pairs = open_scored(bench.config)
    return {name: agreement(bench.model.encode, some).spearman for name, some in pairs.items()}


def open_scored(config: ConfigDict) -> dict[str, ScoredPairs]:
    """The pairs of sentences that people scored: `config.sts`, and SICK where the data have it."""
    pairs = dict(map(open_pairs, config.sts))
    sick = Path(config.data_dir) / "sts" / "SICK_trial.txt"
    if sick.exists():
        pairs["sick"] = read_scored(sick, columns="sentence_A,sentence_B,relatedness_score")
    return pairs
