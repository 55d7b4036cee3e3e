"""What each addition to the paper's recipe does on a real language model, at equal data and steps.

Worlds, eyes and generators are those of a finished `lab:smollm2`. Every option tunes the same base
on the same texts, which speak of none of the test's classes, and is measured beside the towers of
the best generator. What is there is not made again.
"""

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from laboratory import classes, measure
from laboratory.assembled import PLAIN, Bench, make_base, open_scored, parameters, tidy
from laboratory.shared import claim, finished, once
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, write_json, write_text
from lco_jax.data.sources import JsonlSource
from lco_jax.evaluation.retrieval import retrieval
from lco_jax.evaluation.sts import ScoredPairs, agreement
from lco_jax.job import say
from lco_jax.train import train
from lco_jax.vector_form import unit

RECIPE = "recipe"
SHARES = (1, 2, 4, 8, 16)  # a vector's first 1/n numbers are kept


class Option(NamedTuple):
    """says: what it is. changes: keys of a training's configuration."""

    says: str
    changes: dict[str, Any]


OPTIONS = {
    RECIPE: Option("the paper's recipe", {}),
    "two_way": Option("InfoNCE both ways", {"train.two_way": True}),
    "learned_temperature": Option("a learned temperature", {"loss.learn_temperature": True}),
    "own_scores": Option(
        "no negatives above the positive, by the model's own scores",
        {"loss.false_negatives": "own"},
    ),
    "base_scores": Option(
        "no negatives above the positive, by the scores of the model before tuning",
        {"loss.false_negatives": "base"},
    ),
    "hard_weight": Option("hard negatives count three times", {"loss.hard_weight": 3.0}),
    "matryoshka": Option("prefixes of 1/2, 1/4, 1/8 and 1/16 of the vector, too", {}),
}


def experiment(config: ConfigDict, workdir: Path, command: str) -> dict[str, Any]:
    """Run or go on; writes results.json into `workdir` and returns its content."""
    generators = _generators(config)
    results: dict[str, Any] = {"config": claim(workdir, config), "command": command, "runs": []}
    with tqdm(total=len(config.options) * len(config.seeds), desc="options", unit="run") as bar:
        for seed in config.seeds:
            bench = Bench(generators, Path(config.generators) / f"seed-{seed}", seed)
            folder = workdir / f"seed-{seed}"
            for name in config.options:
                bar.set_postfix_str(f"seed {seed}: {name}")
                make = partial(_run, config, bench, folder, name)
                found = once(folder / f"{name}.json", make)
                results["runs"].append({"seed": seed, "option": name, **found})
                bar.update()
            tidy(bench)
    write_json(workdir / "results.json", results)
    say(f"\n{len(results['runs'])} runs; {workdir / 'results.json'}")
    return results


def _generators(config: ConfigDict) -> ConfigDict:
    """The configuration of the experiment whose generators are used. Raises for what cannot be."""
    if strange := [name for name in config.options if name not in OPTIONS]:
        raise LcoError(f"config.options has {strange[0]!r}; these are: {', '.join(OPTIONS)}")
    if RECIPE not in config.options:
        raise LcoError(f"config.options lacks {RECIPE!r}, which all others are compared with")
    file = Path(config.generators or "") / "results.json"
    if not config.generators or not file.exists():
        raise LcoError(
            f"config.generators is {config.generators!r}; give the folder of a finished lab:smollm2"
        )
    made = ConfigDict(read_json(file)["config"])
    missing = [seed for seed in config.seeds if seed not in made.seeds]
    if missing:
        raise LcoError(f"config.seeds has {missing[0]}, and {file} does not")
    return made


def _run(config: ConfigDict, bench: Bench, folder: Path, name: str) -> dict[str, Any]:
    """Train and measure one option of one seed."""
    make_base(bench)
    held_out = _texts(bench, folder, config.held_out)
    settings = config.contrast.copy_and_resolve_references()
    settings.update_from_flattened_dict(_changes(name, bench))
    settings.data.sources = {"contrast": {"kind": "jsonl", "path": str(folder / "train.jsonl")}}
    settings.model.path, settings.seed = str(bench.base), bench.seed
    trained = finished(train(settings, folder / name))
    bench.model.params = parameters(bench, bench.config.stages[-1], folder / name)
    return {
        "first_loss": trained["first_loss"],
        "last_loss": trained["last_loss"],
        **_measure(config, bench, held_out),
    }


def _changes(name: str, bench: Bench) -> dict[str, Any]:
    """What an option changes. The lengths of prefixes depend on the model."""
    if name != "matryoshka":
        return OPTIONS[name].changes
    return {"loss.matryoshka": tuple(bench.model.dimension // share for share in SHARES[1:])}


def _texts(bench: Bench, folder: Path, held_out: int) -> Path:
    """Part the world's plain texts into train.jsonl and heldout.jsonl, which is returned."""
    lines = (bench.world / PLAIN).read_text(encoding="utf-8").splitlines(keepends=True)
    if held_out >= len(lines):
        raise LcoError(f"config.held_out is {held_out}; {bench.world / PLAIN} has {len(lines)}")
    random.Random(bench.seed).shuffle(lines)
    write_text(folder / "train.jsonl", "".join(lines[held_out:]))
    file = folder / "heldout.jsonl"
    write_text(file, "".join(lines[:held_out]))
    return file


# ---- measuring


def _measure(config: ConfigDict, bench: Bench, held_out: Path) -> dict[str, Any]:
    """Every number of the bench's model."""

    def as_it_is(states: np.ndarray) -> np.ndarray:
        return states

    found = classes.measure(bench.model.encode_layers, as_it_is, bench.kinds)
    encode = measure.once(bench.model.encode)
    pairs = {name: _spread(some, config.pairs) for name, some in open_scored(bench.config).items()}
    records = list(JsonlSource(held_out))
    return {
        "representation": found["representation"],
        "text": {name: agreement(encode, some).spearman for name, some in pairs.items()},
        "retrieval": retrieval(encode, records).recall_at_1,
        "small": {name: _small(encode, some) for name, some in pairs.items()},
    }


def _spread(pairs: ScoredPairs, count: int) -> ScoredPairs:
    """At most so many of the pairs, evenly spaced."""
    total = len(pairs.scores)
    chosen = np.unique(np.linspace(0, total - 1, min(count, total)).round().astype(int))
    sides = [[side[i] for i in chosen] for side in (pairs.first, pairs.second, pairs.scores)]
    return ScoredPairs(pairs.path, *sides)


def _small(encode: measure.Encode, pairs: ScoredPairs) -> dict[str, float]:
    """{form: Spearman's correlation} of smaller vectors: prefixes of them, and signs."""

    def head(share: int, inputs: list[Any]) -> np.ndarray:
        vectors = encode(inputs)
        return unit(vectors[:, : vectors.shape[1] // share])

    def signs(inputs: list[Any]) -> np.ndarray:
        return unit(np.where(encode(inputs) > 0, 1.0, -1.0))

    forms: dict[str, Callable[[list[Any]], np.ndarray]] = {
        f"1/{share}": partial(head, share) for share in SHARES
    }
    forms["binary"] = signs
    return {name: agreement(form, pairs).spearman for name, form in forms.items()}
