"""Analyse how a model aligns two modalities, layer by layer, before and after contrastive learning.

    python -m lco_jax.analyze --model=builtin:lab --adapter=runs/base/adapter \\
        --input=pairs.jsonl --output=analysis
    python -m lco_jax.analyze --model=Qwen/Qwen2.5-VL-3B-Instruct --after-model=exports/vl3b \\
        --dtype=bfloat16 --input=photos.json --a=image --b=text --limit=2000 --output=analysis

--input: pairs (anchor and positive of a record), as .jsonl or .parquet in the format of training
data, or a .json that holds one source of a configuration, such as {"kind": "files", "glob": …,
"pattern": …, "caption": …}.

Writes into --output: analysis.json (every number, with its definition), analysis.md (a summary),
anisotropy.png, alignment.png and gap.png (over layers), space.png (the last layer in two
dimensions), and, where there are captions, generator.png (what contrastive learning costs the
generator). docs/analysis.md explains how to read them.
"""

import argparse
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.analysis.layer_plots import plot_generator, plot_layers, plot_space
from lco_jax.analysis.measures import ALIGNMENT, CCA_DIMENSIONS, DEFINITIONS, Side, measure_layers
from lco_jax.analysis.pairs import Captions, Pairs, draw_pairs
from lco_jax.analysis.token_cost import Losses, token_cost
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_adapter
from lco_jax.core.console import progress_bar, say
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import write_json, write_text, written_aside
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.sources import open_file
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.plots import subject_of
from lco_jax.flags import add_path, new_parser
from lco_jax.generator import OmniGenerator

Models = dict[str, tuple[str, str | None]]  # "before", "after" -> a checkpoint and an adapter


class Findings(NamedTuple):
    """What was found in each model, "before" and "after".

    layers: as of `measure_layers`; last: both sides' unit vectors of the last layer; losses: of the
    captions, if there are any.
    """

    layers: dict[str, dict[str, Any]]
    last: dict[str, tuple[np.ndarray, np.ndarray]]
    losses: dict[str, Losses]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("analyze", __doc__)
    add = parser.add_argument
    add("--model", required=True, help="a checkpoint folder or hub id: before")
    add("--adapter", help="a PEFT adapter folder or hub id: the same model after")
    add("--after-model", help="a checkpoint folder or hub id: after, where there is no adapter")
    add_path(parser, "--input", "pairs: .jsonl, .parquet, or a source in .json", ["--data"])
    add("--a", default="", help="modality of one side (default: as in the first record)")
    add("--b", default="", help="modality of the other")
    captions = "pairs with a text that the generator is to write (default: --input)"
    add_path(parser, "--captions", captions, required=False)
    add_path(parser, "--output", "the folder to write", ["--out"])
    add("--k", type=int, default=10, help="nearest neighbours (default: 10)")
    add("--limit", type=int, default=1000, help="draw at most so many pairs (default: 1000)")
    add("--seed", type=int, default=0, help="of the draw and of the bootstrap (default: 0)")
    add("--max-length", type=int, help="cut texts to so many tokens")
    add("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser


def main() -> None:
    """Draw pairs, look at one model, then at the other, then write everything at once."""
    args = make_parser().parse_args()
    models = _models(args)
    pairs = _draw(args)
    captioned = _draw_captions(args) if args.captions else pairs
    drawn = {
        f"--input={args.input}": pairs,
        f"--captions={args.captions}": captioned,
    }
    _check_models(models, drawn)
    say(f"{_counted(pairs)}, drawn with seed {args.seed} ({_left_out(pairs)})")
    keep_compiled()
    findings = Findings({}, {}, {})
    with written_aside(args.output) as folder:
        for run in models:
            _look(run, models[run], pairs, captioned, args, findings)
        facts = _facts(args, pairs)
        facts["generator"] = token_cost(findings.losses, args.seed) if findings.losses else None
        _write(folder, facts, findings)
    say((args.output / "analysis.md").read_text(encoding="utf-8"))


def _models(args: argparse.Namespace) -> Models:
    for flag, value, least in (
        ("k", args.k, 2),
        ("limit", args.limit, args.k + 2),
    ):
        if value < least:
            raise LcoError(f"--{flag}={value}: it must be at least {least}")
    if args.adapter and args.after_model:
        raise LcoError("--adapter and --after-model both name what came after; give one of them")
    models: Models = {"before": (args.model, None)}
    if args.adapter or args.after_model:
        models["after"] = (
            args.after_model or args.model,
            args.adapter,
        )
    return models


def _draw(args: argparse.Namespace) -> Pairs:
    """The pairs of --input."""
    pairs = draw_pairs(
        open_file(args.input),
        args.a,
        args.b,
        args.limit,
        args.seed,
    )
    if len(pairs.a) < args.k + 2:
        raise LcoError(
            f"--input={args.input} has {_counted(pairs)} ({_left_out(pairs)}); "
            f"--k={args.k} takes at least {args.k + 2}"
        )
    return pairs


def _draw_captions(args: argparse.Namespace) -> Pairs:
    """The pairs of --captions."""
    pairs = draw_pairs(
        open_file(args.captions),
        "",
        "",
        args.limit,
        args.seed,
        distinct=False,
    )
    if pairs.captions() is None:
        raise LcoError(f"--captions={args.captions} has no text on either side")
    return pairs


def _counted(pairs: Pairs) -> str:
    return f"{len(pairs.a):,} pairs of {' and '.join(pairs.kinds)}"


def _left_out(pairs: Pairs) -> str:
    return f"{pairs.duplicates:,} repeat a side, {pairs.others:,} are of other modalities"


def _check_models(models: Models, drawn: Mapping[str, Pairs]) -> None:
    """Raise now, and not after an hour, for what no model takes. drawn: by flag."""
    for path, adapter in models.values():
        checkpoint = open_checkpoint(path)
        known = checkpoint.backbone.modalities
        for flag, pairs in drawn.items():
            if unknown := pairs.modalities - set(known):
                raise LcoError(f"{flag} holds {min(unknown)}, and {path} takes {', '.join(known)}")
        if adapter:
            read_adapter(adapter, checkpoint)


def _look(
    run: str,
    checkpoint: tuple[str, str | None],
    pairs: Pairs,
    captioned: Pairs,
    args: argparse.Namespace,
    findings: Findings,
) -> None:
    """Load one model, and add to the findings what it makes of the pairs and the captions."""
    path, adapter = checkpoint
    captions = captioned.captions()
    kind = OmniEmbedder if captions is None else OmniGenerator
    kinds = pairs.modalities | captioned.modalities
    model = kind.from_pretrained(path, adapter, args.dtype, modalities=kinds)
    states_a = _states(
        model,
        pairs.a,
        f"{run}: {pairs.names[0]}",
        path,
        args.max_length,
    )
    states_b = _states(
        model,
        pairs.b,
        f"{run}: {pairs.names[1]}",
        path,
        args.max_length,
    )
    findings.layers[run] = measure_layers(states_a, states_b, pairs.names, args.k)
    sides = [Side(states[-1], "last", args.k) for states in (states_a, states_b)]
    findings.last[run] = (sides[0].unit, sides[1].unit)
    if captions is not None:
        findings.losses[run] = _losses(model, captions, f"{run}: captions", args.max_length)


def _losses(model: OmniGenerator, captions: Captions, name: str, max_length: int | None) -> Losses:
    """The losses of the captions' tokens."""
    inputs, answers, prompt = captions
    with progress_bar(total=len(inputs), desc=name, unit="input") as bar:
        return model.token_losses(
            inputs, answers, prompt=prompt, max_length=max_length, progress=bar
        )


def _states(
    model: OmniEmbedder,
    inputs: list[Any],
    name: str,
    path: str,
    max_length: int | None,
) -> np.ndarray:
    """The states of one side's inputs, [L + 1, N, D]. path: of the model."""
    with progress_bar(total=len(inputs), desc=name, unit="input") as bar:
        states = model.encode_layers(inputs, max_length=max_length, progress=bar)
    if not np.isfinite(states).all():
        raise LcoError(f"{path} has states that are not finite ({name}); try --dtype=float32")
    return states


def _facts(args: argparse.Namespace, pairs: Pairs) -> dict[str, Any]:
    """What analysis.json has beside the numbers."""
    facts = {}
    for name, value in vars(args).items():
        facts[name] = str(value) if isinstance(value, Path) else value
    return {
        **facts,
        "sides": pairs.names,
        "pairs": len(pairs.a),
        "duplicates": pairs.duplicates,
        "others": pairs.others,
        "cca_dimensions": CCA_DIMENSIONS,
        "definitions": DEFINITIONS,
    }


def _write(folder: Path, facts: dict[str, Any], findings: Findings) -> None:
    """Write the numbers, the summary and the pictures."""
    layers, cost = findings.layers, facts["generator"]
    write_json(folder / "analysis.json", facts | layers)
    write_text(folder / "analysis.md", _summary(facts, layers))
    subject = subject_of(facts["model"], Path(facts["input"]).name, f"{facts['pairs']:,} pairs")
    plot_layers(folder / "anisotropy.png", subject, layers, ["anisotropy"])
    alignment = [measure.__name__ for measure in ALIGNMENT]
    chance = facts["k"] / (facts["pairs"] - 1)
    plot_layers(folder / "alignment.png", subject, layers, alignment, chance)
    plot_layers(folder / "gap.png", subject, layers, ["modality_gap"])
    plot_space(folder / "space.png", subject, findings.last, facts["sides"])
    if cost and "difference" in cost:
        plot_generator(
            folder / "generator.png",
            subject,
            findings.losses,
            cost["difference"],
        )


def _summary(
    facts: Mapping[str, Any],
    runs: Mapping[str, Mapping[str, Any]],
) -> str:
    """The last layer and the mean over layers, what is not defined, and the generator's cost."""
    sides = " and ".join(facts["sides"])
    titles = [f"{run}, {what}" for what in ("last layer", "mean of layers") for run in runs]
    lines = [
        f"{facts['pairs']:,} pairs of {sides} from {facts['input']}, k = {facts['k']}.",
        "",
        f"| measure | {' | '.join(titles)} |",
        "|---" * (len(titles) + 1) + "|",
    ]
    for name in DEFINITIONS:
        if name == "anisotropy":
            for side in facts["sides"]:
                values = [found[name][side] for found in runs.values()]
                lines.append(_row(f"{name}, {side}", values))
        else:
            lines.append(_row(name, [found[name] for found in runs.values()]))
    for run, found in runs.items():
        lines += _undefined(run, found["undefined"])
    if facts["generator"]:
        lines.append(_cost(facts["generator"], runs))
    return "\n".join(lines) + "\n"


def _row(name: str, columns: list[list[float | None]]) -> str:
    """columns: of each run the values over layers."""
    known = [[value for value in values if value is not None] for values in columns]
    cells = [values[-1] for values in columns]
    cells += [sum(values) / len(values) if values else None for values in known]
    shown = ["—" if cell is None else f"{cell:.3f}" for cell in cells]
    return f"| {name} | {' | '.join(shown)} |"


def _undefined(run: str, gaps: list[dict[str, Any]]) -> list[str]:
    """A sentence for each reason."""
    where: dict[str, list[str]] = defaultdict(list)
    for gap in gaps:
        place = f"{gap['measure']} at layer {gap['layer']}"
        if place not in where[gap["reason"]]:
            where[gap["reason"]].append(place)
    return [
        f"\nNot defined {run}, as {reason}: {', '.join(places)}."
        for reason, places in where.items()
    ]


def _cost(cost: Mapping[str, Any], runs: Mapping[str, Any]) -> str:
    """What a token of the captions costs the generator."""
    means = []
    for run in runs:
        perplexity = cost[run]["perplexity"] or np.inf
        nats = cost[run]["nats_per_token"]
        means.append(f"{nats:.3f} nats (perplexity {perplexity:.4g}) {run}")
    text = f"\nA token of {cost['captions']:,} captions costs {', '.join(means)}."
    if change := cost.get("difference"):
        interval = f"[{change['low']:+.4f}, {change['high']:+.4f}]"
        difference = f"{change['nats_per_token']:+.4f}"
        text += f" The difference is {difference}, its 95 % interval {interval}."
    return text


if __name__ == "__main__":
    run_main(main)
