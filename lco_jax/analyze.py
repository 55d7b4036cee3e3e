"""Analyse how a model aligns two modalities, layer by layer, before and after contrastive learning.

    python -m lco_jax.analyze --model=builtin:lab --adapter=runs/base/adapter --data=pairs.jsonl --out=analysis
    python -m lco_jax.analyze --model=Qwen/Qwen2.5-VL-3B-Instruct --after-model=exports/vl3b --dtype=bfloat16 \\
        --data=photos.json --a=image --b=text --limit=2000 --out=analysis

--data: pairs (anchor and positive of a record), as .jsonl or .parquet in the format of training data, or a .json that
holds one source of a configuration, such as {"kind": "files", "glob": …, "pattern": …, "caption": …}.

What it leaves in --out: analysis.json (every number, with its definition), analysis.md (a summary), anisotropy.png,
alignment.png and gap.png (over layers), space.png (the last layer in two dimensions), and, where there are captions,
generator.png (what contrastive learning costs the generator). docs/analysis.md says how to read them.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from lco_jax.analysis import measures, plots
from lco_jax.analysis.generator import Losses, token_cost
from lco_jax.analysis.pairs import Pairs, draw_pairs
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_peft
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import local_path, write_json, write_text, written_aside
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.sources import open_file
from lco_jax.embedder import OmniEmbedder
from lco_jax.generator import OmniGenerator


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.analyze",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="a checkpoint folder or hub id: before")
    parser.add_argument("--adapter", help="a PEFT adapter folder or hub id: the same model after")
    parser.add_argument(
        "--after-model", help="a checkpoint folder or hub id: after, where there is no adapter"
    )
    parser.add_argument(
        "--data", type=local_path, required=True, help="pairs: .jsonl, .parquet, or a source in .json"
    )
    parser.add_argument(
        "--a", default="", help="modality of one side (default: as in the first record)"
    )
    parser.add_argument("--b", default="", help="modality of the other")
    parser.add_argument(
        "--captions", type=local_path, help="pairs with a text to tell the generator (default: --data)"
    )
    parser.add_argument("--out", type=local_path, required=True, help="the folder to write")
    parser.add_argument("--k", type=int, default=10, help="nearest neighbours (default: 10)")
    parser.add_argument(
        "--limit", type=int, default=1000, help="the most pairs, drawn by --seed (default: 1000)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of the drawing and the bootstrap (default: 0)"
    )
    parser.add_argument("--max-length", type=int, help="cut texts to so many tokens")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    return parser.parse_args()


def main() -> int:
    """Draw pairs, look at one model, then at the other; numbers and pictures appear when all are there."""
    args = parse_args()
    for flag, value, least in (("k", args.k, 2), ("limit", args.limit, args.k + 2)):
        if value < least:
            raise LcoError(f"--{flag}={value}: it must be at least {least}")
    if args.adapter and args.after_model:
        raise LcoError("--adapter and --after-model both say what came after; give one of them")
    pairs = draw_pairs(open_file(args.data), args.a, args.b, args.limit, args.seed)
    found = f"{len(pairs.a):,} pairs of {' and '.join(pairs.kinds)}"
    left_out = f"{pairs.duplicates:,} repeat a side, {pairs.others:,} are of other modalities"
    if len(pairs.a) < args.k + 2:
        raise LcoError(
            f"--data={args.data} has {found} ({left_out}); --k={args.k} takes at least {args.k + 2}"
        )
    told = pairs  # whose captions the generator is to say
    if args.captions:
        told = draw_pairs(open_file(args.captions), "", "", args.limit, args.seed, distinct=False)
        if told.captions() is None:
            raise LcoError(f"--captions={args.captions} has no text on either side")
    models = {"before": (args.model, None)}
    if args.adapter or args.after_model:
        models["after"] = (args.after_model or args.model, args.adapter)
    for path, adapter in models.values():  # what is wrong is found now, and not after an hour
        known = open_checkpoint(path).backbone.modalities
        for flag, drawn in ((f"--data={args.data}", pairs), (f"--captions={args.captions}", told)):
            if closed := drawn.modalities - set(known):
                raise LcoError(f"{flag} holds {min(closed)}, and {path} takes {', '.join(known)}")
        if adapter:
            read_peft(adapter)
    print(f"{found}, drawn with seed {args.seed} ({left_out})")

    with written_aside(args.out) as folder:
        keep_compiled()
        runs, last, losses = {}, {}, {}
        for run, (path, adapter) in models.items():
            states, losses[run] = _look(run, path, adapter, pairs, told, args)
            runs[run] = measures.measure_layers(*states, pairs.names, args.k)
            last[run] = [
                measures.Side(x[-1], name, args.k).unit
                for x, name in zip(states, pairs.names, strict=True)
            ]
            del states  # before the next model's come
        facts = {
            name: str(value) if isinstance(value, Path) else value
            for name, value in vars(args).items()
        }
        facts |= {
            "sides": pairs.names,
            "pairs": len(pairs.a),
            "duplicates": pairs.duplicates,
            "others": pairs.others,
        }
        facts["cca_dimensions"] = measures.CCA_DIMENSIONS
        facts["generator"] = token_cost(losses, args.seed) if told.captions() else None
        facts["definitions"] = {
            name: measure.__doc__.split("\n")[0] for name, measure in measures.MEASURES.items()
        }
        write_json(folder / "analysis.json", facts | runs)
        write_text(folder / "analysis.md", _summary(facts, runs))
        plots.plot_layers(folder / "anisotropy.png", runs, ["anisotropy"])
        alignment, chance = (
            [measure.__name__ for measure in measures.ALIGNMENT],
            args.k / (len(pairs.a) - 1),
        )
        plots.plot_layers(folder / "alignment.png", runs, alignment, chance)
        plots.plot_layers(folder / "gap.png", runs, ["modality_gap"])
        plots.plot_space(folder / "space.png", last, pairs.names)
        if facts["generator"] and "after" in losses:
            plots.plot_generator(folder / "generator.png", losses, facts["generator"]["difference"])
    print((args.out / "analysis.md").read_text(encoding="utf-8"))
    return 0


def _look(
    run: str, path: str, adapter: str | None, pairs: Pairs, told: Pairs, args: argparse.Namespace
) -> tuple[list[np.ndarray], Losses | None]:
    """One model's states of both sides, each [L + 1, N, D], and its losses of the captions, if there are any."""
    captions, kinds = told.captions(), pairs.modalities | told.modalities
    kind = OmniEmbedder if captions is None else OmniGenerator
    embedder = kind.from_pretrained(path, adapter, args.dtype, modalities=kinds)
    states = []
    for inputs, name in zip((pairs.a, pairs.b), pairs.names, strict=True):
        with tqdm(total=len(inputs), desc=f"{run}: {name}", unit="input") as bar:
            states.append(embedder.encode_layers(inputs, max_length=args.max_length, progress=bar))
        if not np.isfinite(states[-1]).all():
            raise LcoError(f"{path} has states of {name} that are not finite; try --dtype=float32")
    if captions is None:
        return states, None
    inputs, answers, prompt = captions
    with tqdm(total=len(inputs), desc=f"{run}: captions", unit="input") as bar:
        return states, embedder.token_losses(
            inputs, answers, prompt=prompt, max_length=args.max_length, progress=bar
        )


def _summary(facts: dict[str, Any], runs: dict[str, dict[str, Any]]) -> str:
    """analysis.md: a table of the last layer and the mean over layers, the gaps, and what the generator pays."""
    heads = [f"{run}, {what}" for what in ("last layer", "mean of layers") for run in runs]
    lines = [
        f"{facts['pairs']:,} pairs of {' and '.join(facts['sides'])} from {facts['data']}, k = {facts['k']}.",
        "",
    ]
    lines += [f"| measure | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for name in measures.MEASURES:
        for side in facts["sides"] if name == "anisotropy" else [""]:
            columns = [found[name][side] if side else found[name] for found in runs.values()]
            known = [[value for value in values if value is not None] for values in columns]
            cells = [values[-1] for values in columns] + [
                sum(x) / len(x) if x else None for x in known
            ]
            shown = ["—" if value is None else f"{value:.3f}" for value in cells]
            lines.append(f"| {name}{side and f', {side}'} | {' | '.join(shown)} |")
    for run, found in runs.items():
        gaps: dict[str, list[str]] = {}
        for gap in found["undefined"]:
            gaps.setdefault(gap["reason"], []).append(f"{gap['measure']} at layer {gap['layer']}")
        lines += [
            f"\nNot defined {run}, as {reason}: {', '.join(dict.fromkeys(where))}."
            for reason, where in gaps.items()
        ]
    if cost := facts["generator"]:
        costs = {
            run: (cost[run]["nats_per_token"], cost[run]["perplexity"] or np.inf) for run in runs
        }
        means = [
            f"{nats:.3f} nats (perplexity {perplexity:.4g}) {run}"
            for run, (nats, perplexity) in costs.items()
        ]
        lines += [f"\nA token of {cost['captions']:,} captions costs {', '.join(means)}."]
        if change := cost.get("difference"):
            interval = f"[{change['low']:+.4f}, {change['high']:+.4f}]"
            lines[-1] += (
                f" The difference is {change['nats_per_token']:+.4f}, its 95 % interval {interval}."
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    run_main(main)
