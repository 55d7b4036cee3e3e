"""Checkpoint + adapter -> merged model, a training run -> adapter and merged model, or several -> their average.

    python -m lco_jax.convert --workdir=runs/base --out=exports/base
    python -m lco_jax.convert --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=my/adapter --out=merged --dtype=bfloat16
    python -m lco_jax.convert soup --model=BASE --adapters A B C --weights 2 1 1 --out=soup [--rank=64] [--merge]
    python -m lco_jax.convert soup --model=BASE --adapters A B C --greedy --validate=dev.csv --kind=sts --out=soup
    python -m lco_jax.convert soup --models M1 M2 --out=averaged

Writes OUT (merged, Hugging Face layout) and, with --workdir, OUT-adapter (PEFT). Everything written is read back and
compared before it is called done. A soup of adapters is an adapter OUT, soup.json in it (and OUT-merged); of models, a
model OUT.
"""

import argparse
from collections.abc import Sequence
from typing import Any

import jax

from lco_jax.checkpoint import soup
from lco_jax.checkpoint.export import export_merged, write_model
from lco_jax.checkpoint.hf import DTYPES, open_checkpoint
from lco_jax.checkpoint.peft import has_adapters, read_peft, write_peft
from lco_jax.core import lora
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import as_path, local_path, write_json
from lco_jax.core.sharding import replicated
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation import own
from lco_jax.evaluation.plots import plot_spectrum
from lco_jax.training.run import tuned_of_run

SOUP = (
    "adapters",
    "models",
    "weights",
    "rank",
    "merge",
    "greedy",
    "validate",
    "kind",
)  # flags of soups alone


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "command", nargs="?", choices=["soup"], help="average instead of converting one"
    )
    parser.add_argument(
        "--workdir", type=as_path, help="a training run, one of whose checkpoints is exported"
    )
    parser.add_argument("--step", type=int, help="which of the --workdir's (default: the newest)")
    parser.add_argument(
        "--model", help="a checkpoint folder or hub id (with --workdir: the run's own)"
    )
    parser.add_argument(
        "--adapter", help="a PEFT adapter folder or hub id; none: the model as it is"
    )
    parser.add_argument("--out", type=local_path, required=True, help="the folder to write")
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of models (default bfloat16)"
    )
    parser.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file (default 5)"
    )
    group = parser.add_argument_group("soup")
    group.add_argument(
        "--adapters",
        nargs="+",
        default=[],
        help="PEFT adapters of --model, of any ranks and targets",
    )
    group.add_argument(
        "--models", nargs="+", default=[], help="checkpoints; what lies beside weights: the first's"
    )
    group.add_argument(
        "--weights",
        nargs="+",
        type=float,
        help="one for each, divided by their sum; default: equal",
    )
    group.add_argument(
        "--rank",
        type=int,
        help="reduce the sum to this rank by SVD; default: exact, the ranks' sum",
    )
    group.add_argument("--merge", action="store_true", help="write OUT-merged, too")
    group.add_argument(
        "--greedy",
        action="store_true",
        help="the best, then each that does not lower the soup's score",
    )
    group.add_argument(
        "--validate", help="what --greedy scores with: files as `lco_jax.evaluate` takes"
    )
    group.add_argument(
        "--media-root", type=local_path, help="where relative paths of media in --validate start"
    )
    own.add_flags(parser, "--validate")
    return parser.parse_args()


def main() -> int:
    """Export, and say where."""
    args = parse_args()
    if args.max_shard_size <= 0:
        raise LcoError(f"--max-shard-size is {args.max_shard_size}; it must be positive")
    if args.command == "soup":
        return _soup(args)
    if given := [name for name in SOUP if getattr(args, name)]:
        raise LcoError(f"--{given[0]} goes with soup: python -m lco_jax.convert soup …")
    if args.step is not None and args.workdir is None:
        raise LcoError("--step goes with --workdir")
    if (args.workdir is None) == (args.model is None):
        raise LcoError(
            "give either --workdir (a training run) or --model (a checkpoint), and not both"
        )
    source, tuned, config = args.model, {}, None
    if args.workdir is not None:
        if args.adapter:
            raise LcoError("--adapter goes with --model; a --workdir brings its own")
        source, tuned, config, step = tuned_of_run(args.workdir, args.step)
        print(f"{args.workdir}: step {step}, trained from {source}")
    elif args.adapter:
        tuned["decoder"], config = read_peft(args.adapter)
    export_merged(source, args.out, tuned, config, args.dtype, int(args.max_shard_size * 1e9))
    print(f"merged model ({args.dtype}): {args.out}")
    if args.workdir is not None and has_adapters(tuned.get("decoder", {})):
        write_peft(args.out.with_name(f"{args.out.name}-adapter"), tuned["decoder"], config, source)
        print(f"adapter: {args.out}-adapter")
    return 0


def _soup(args: argparse.Namespace) -> int:
    """Average, write, and say what was kept."""
    names, shard = args.adapters or args.models, int(args.max_shard_size * 1e9)
    given = {
        name
        for name in ("workdir", "adapter", "model", "adapters", "models")
        if getattr(args, name)
    }
    if given not in ({"model", "adapters"}, {"models"}):
        raise LcoError("a soup is of --model and --adapters, or of --models")
    if args.models and (args.greedy or args.rank or args.merge):
        raise LcoError("--greedy, --rank and --merge go with --adapters")
    if args.rank is not None and args.rank < 1:
        raise LcoError(f"--rank is {args.rank}; it must be at least 1")
    if args.greedy != bool(args.validate and args.kind) or (args.greedy and args.weights):
        raise LcoError(
            "--greedy needs --validate and --kind, which nothing else does, and sets the weights itself"
        )
    weights = soup.shares(args.weights, len(names))
    if args.models:
        checkpoint, tensor = soup.average_models(names, weights)
        write_model(checkpoint, args.out, tensor, args.dtype, shard)
        print(f"average of {len(names)} models ({args.dtype}): {args.out}")
        return 0
    adapters = soup.read_adapters(names, open_checkpoint(args.model))
    report: dict[str, Any] = {"model": args.model}
    if args.greedy:
        kept, report["greedy"] = _greedy(args, adapters)
        weights = [1 / len(kept) if i in kept else 0.0 for i in range(len(names))]
    chosen = [i for i, weight in enumerate(weights) if weight]
    result = soup.average_adapters([adapters[i] for i in chosen], [weights[i] for i in chosen])
    parts = [
        {"adapter": name, "weight": weight} for name, weight in zip(names, weights, strict=True)
    ]
    report |= {"adapters": parts, "rank": result[1].rank}
    spectra = None
    if args.rank:
        result, spectra = soup.reduce_rank(result, args.rank)
        report |= {"rank": args.rank, "relative_error": soup.rank_errors(spectra, args.rank)}
    write_peft(args.out, *result, args.model)
    write_json(args.out / "soup.json", report)
    print(f"average of {len(chosen)} adapters, of rank {report['rank']}: {args.out}")
    if spectra:
        plot_spectrum(args.out / "spectrum.png", spectra, args.rank)
        error = report["relative_error"]
        print(
            f"relative error of the delta: {error['overall']:.3g} overall, {error['max']:.3g} in the worst matrix"
        )
    if args.merge:
        merged = args.out.with_name(f"{args.out.name}-merged")
        export_merged(args.model, merged, {"decoder": result[0]}, result[1], args.dtype, shard)
        print(f"merged model ({args.dtype}): {merged}")
    return 0


def _greedy(
    args: argparse.Namespace, adapters: Sequence[soup.Adapter]
) -> tuple[list[int], list[dict[str, Any]]]:
    """Which adapters the greedy soup keeps, and its steps. The base is loaded once, and one program serves all."""
    embedder = OmniEmbedder.from_pretrained(args.model, dtype=args.dtype)
    base, (_, _, main_number) = embedder.params["decoder"], own.KINDS[args.kind]

    def score(chosen: list[int]) -> float:
        weights = [
            1 / len(chosen) if i in chosen else 0.0 for i in range(len(adapters))
        ]  # zeros keep the shapes
        tree, config = soup.average_adapters(adapters, weights)
        tree = jax.device_put(tree, replicated(embedder.mesh))
        embedder.params = {**embedder.params, "decoder": lora.attach(base, tree, config)}
        encode = lambda inputs: embedder.encode(inputs, show_progress=True)
        value = own.evaluate(encode, args.kind, args.validate, **own.options_of(args)).numbers[
            main_number
        ]
        print(
            f"{main_number} {value:.4f}: {' + '.join(args.adapters[i] for i in chosen)}", flush=True
        )
        return value

    kept, steps = soup.greedy(len(adapters), score)
    print(f"\n{'alone':>8}{'soup':>8}  kept")
    for step in steps:
        step["adapter"] = args.adapters[step.pop("index")]
        print(
            f"{step['alone']:8.4f}{step['together']:8.4f}  {'yes' if step['kept'] else 'no':5}{step['adapter']}"
        )
    return kept, steps


if __name__ == "__main__":
    run_main(main)
