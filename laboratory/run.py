"""The experiment: make a world, train a generator, tune its checkpoints, measure each of them.

Everything goes through what users have: `lco_jax.pretrain`, `lco_jax.train`, checkpoints on disk.
Each run's numbers are in a file of their own, and a laboratory that is started again measures only
what is missing.
"""

import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from laboratory import backbone, measure, real, report, theory, worlds
from laboratory.shared import SeedFolder, check_stages, claim, finished, once
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.sentence_transformers import read_projection
from lco_jax.core.errors import LcoError
from lco_jax.generator import OmniGenerator
from lco_jax.job import say
from lco_jax.pretrain import pretrain
from lco_jax.train import train
from lco_jax.training.run import tuned_of_run

TEXT, MEDIA = "contrast/text.jsonl", "contrast/media.jsonl"
WAYS: dict[
    str, tuple[str, dict[str, Any]]
] = {  # what is tuned on, and what differs from LoRA on texts
    "lora": (TEXT, {}),
    "full": (TEXT, {"tune.decoder": "full"}),
    "projection": (TEXT, {"tune.decoder": "projection"}),
    "clip": (MEDIA, {"train.two_way": True, "train.ignore_duplicates": True}),
}


class Bench(SeedFolder):
    """One seed's folder, its generators and what they were tuned to."""

    def stage(self, steps: int) -> Path:
        """The generator after so many steps."""
        return self.folder / f"generator-{steps}"

    def tuned(self, steps: int, way: str) -> Path:
        """The workdir of its tuning."""
        return self.folder / f"{way}-{steps}"


def experiment(config: ConfigDict, workdir: Path, command: str) -> dict[str, Any]:
    """Run or go on; writes report.md with its pictures and results.json into `workdir`, and returns
    the latter.
    """
    _check(config)
    results: dict[str, Any] = {
        "config": claim(workdir, config),
        "command": command,
        "minutes": 0.0,
        "worlds": [],
        "runs": [],
    }
    for seed in config.seeds:
        bench = Bench(config, workdir / f"seed-{seed}", seed)
        results["worlds"].append(once(bench.folder / "world.json", partial(_make_world, bench)))
        results["runs"] += _runs(bench)
    timed = [one["seconds"] for one in (*results["worlds"], *results["runs"])]
    results["minutes"] = sum(sum(seconds.values()) for seconds in timed) / 60
    report.write(results, workdir)
    say(f"\n{results['minutes']:.1f} minutes; {workdir / 'report.md'}")
    return results


def _check(config: ConfigDict) -> None:
    """Raise, by key, for what no experiment can have."""
    check_stages(config)
    if strange := [way for way in config.ways if way not in WAYS]:
        raise LcoError(f"config.ways has {strange[0]!r}; these are: {', '.join(WAYS)}")
    if config.world not in ("made", "real"):
        raise LcoError(f"config.world is {config.world!r}; it is one of: made, real")
    if config.world == "real" and not config.data_dir:
        raise LcoError(
            "config.data_dir is missing: the folder with tfds/ (cifar10, mnist as array_record) "
            "and fsdd/"
        )


def _make_world(bench: Bench) -> dict[str, Any]:
    """The world's folder, and a model that has learned nothing."""
    config, began = bench.config, time.perf_counter()
    say(f"\n== seed {bench.seed}: the world")
    if not bench.world.exists():
        if config.world == "made":
            worlds.write(bench.world, bench.seed, worlds.Sizes(**config.sizes))
        else:
            real.write(bench.world, Path(config.data_dir), bench.seed, real.Sizes(**config.sizes))
    if not bench.stage(0).exists():
        backbone.write(
            bench.stage(0),
            worlds.texts(bench.world),
            bench.seed,
            backbone.Geometry(**config.geometry),
        )
    chance = measure.chance(bench.world)
    return {"seed": bench.seed, "chance": chance, "seconds": {"world": time.perf_counter() - began}}


def _runs(bench: Bench) -> Iterator[dict[str, Any]]:
    """Every run of a seed: each generator before and after LoRA, and the best one after the other
    ways.
    """
    config, best = bench.config, bench.config.stages[-1]
    generated = once(bench.folder / "pretrained.json", partial(_generate, bench))
    generator: list[OmniGenerator] = []

    def load(folder: Path) -> OmniGenerator:
        """One object for all checkpoints of a geometry, so that its programs are compiled once."""
        new = OmniGenerator.from_pretrained(folder, media=backbone.MEDIA)
        if generator:
            generator[0].params = new.params
        else:
            generator.append(new)
        return generator[0]

    for steps in config.stages:
        for way in ("none", "lora", *(config.ways if steps == best else ())):
            make = partial(_run, bench, steps, way, load)
            run = once(bench.folder / "runs" / f"{way}-{steps}.json", make)
            if way == "none" and steps == best:
                run["seconds"]["pretrain"] = generated["seconds"]
            yield run


def _generate(bench: Bench) -> dict[str, Any]:
    """One generative training, and its checkpoints at every stage."""
    config, began = bench.config, time.perf_counter()
    say(f"\n== seed {bench.seed}: generative training")
    settings, workdir = config.pretrain.copy_and_resolve_references(), bench.folder / "pretrain"
    files = {
        kind: bench.world / f"generative/{kind}.jsonl"
        for kind, weight in config.mix.items()
        if weight
    }
    settings.data.sources = {
        kind: {"kind": "jsonl", "path": str(file), "weight": config.mix[kind]}
        for kind, file in files.items()
        if file.exists()
    }
    settings.model.path, settings.seed, settings.train.steps = (
        str(bench.stage(0)),
        bench.seed,
        config.stages[-1],
    )
    settings.checkpoint.keep = math.ceil(config.stages[-1] / settings.checkpoint.every)
    finished(pretrain(settings, workdir))
    for steps in config.stages:
        if not bench.stage(steps).exists():
            run = tuned_of_run(workdir, steps)
            export_merged(
                run.source,
                bench.stage(steps),
                run.parameters,
                run.lora,
                "float32",
                checkpoint=run.checkpoint,
            )
    return {"seconds": time.perf_counter() - began}


def _tune(bench: Bench, steps: int, way: str) -> dict[str, Any]:
    """Contrastive tuning of a stage."""
    say(f"\n== seed {bench.seed}: {way} from the generator of {steps} steps")
    data, changes = WAYS[way]
    settings = bench.config.contrast.copy_and_resolve_references()
    settings.update_from_flattened_dict(changes)
    settings.optimizer.learning_rate = bench.config.rates[way]
    settings.data.sources = {"contrast": {"kind": "jsonl", "path": str(bench.world / data)}}
    settings.model.path, settings.seed = str(bench.stage(steps)), bench.seed
    return finished(train(settings, bench.tuned(steps, way)))


def _run(
    bench: Bench, steps: int, way: str, load: Callable[[Path], OmniGenerator]
) -> dict[str, Any]:
    """Tune, if there is anything to be tuned, and measure."""
    run: dict[str, Any] = {
        "seed": bench.seed,
        "generative_steps": steps,
        "tune": way,
        "seconds": {},
    }
    base = folder = bench.stage(steps)
    if way != "none":
        began = time.perf_counter()
        run["trained_parameters"] = _tune(bench, steps, way)["trained_parameters"]
        folder = bench.tuned(steps, way) / "merged"
        run["seconds"]["tune"] = time.perf_counter() - began
    began = time.perf_counter()
    say(f"== seed {bench.seed}: measuring {way}, {steps} steps")
    model, world = load(folder), bench.world
    encode = measure.once(model.encode)
    run["representation"] = measure.represent(encode, world, bench.config.templates)
    run["theory"] = theory.information(encode, world)
    if way in ("none", "lora"):
        run["layers"] = measure.by_layer(model, world)
    if way == "none":
        run["generative"] = measure.generate_quality(
            model, world, bench.config.answers, bench.config.answer_tokens
        )
    elif way == "projection":
        run["theory"]["kl"] = theory.projection_kl(read_projection(folder, model.dimension))
    else:
        run["theory"]["kl"] = theory.decoder_kl(open_checkpoint(base), open_checkpoint(folder))
    run["seconds"]["measure"] = time.perf_counter() - began
    return run
