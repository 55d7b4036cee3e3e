"""Training runs and adapters → merged models; several adapters or models → their average.

    python -m lco_jax.convert --input=runs/base --output=exports/base
    python -m lco_jax.convert --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=A --output=merged
    python -m lco_jax.convert soup --model=BASE --adapters A B C --weights 2 1 1 --output=soup
    python -m lco_jax.convert soup --model=BASE --adapters A B C --rank=64 --merge --output=soup
    python -m lco_jax.convert soup --model=BASE --adapters A B C --greedy --validate=dev.csv \\
        --kind=sts --output=soup
    python -m lco_jax.convert soup --models M1 M2 --output=averaged

Writes a merged model in the hub's layout to OUTPUT and, of a run, its PEFT adapter to
OUTPUT-adapter. A soup of adapters is an adapter with a soup.json (and OUTPUT-merged); a soup of
models is a model. Each file is read back and compared when it is written.
"""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lco_jax.checkpoint import soup
from lco_jax.checkpoint.export import export_merged, write_model
from lco_jax.checkpoint.hf import DTYPES, open_checkpoint
from lco_jax.checkpoint.peft import has_adapters, read_adapter, write_peft
from lco_jax.core import lora
from lco_jax.core.console import say
from lco_jax.core.errors import DONE, LcoError, run_main
from lco_jax.core.files import as_path, local_path, write_json
from lco_jax.core.sharding import replicated
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation import local_tasks
from lco_jax.evaluation.plots import plot_spectrum, subject_of
from lco_jax.flags import add_path, new_parser
from lco_jax.training.run import tuned_of_run

SOUP_FLAGS = ("adapters", "models", "weights", "rank", "merge", "greedy", "validate", "kind")


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("convert", __doc__)
    parser.add_argument(
        "command", nargs="?", choices=["soup"], help="average instead of converting one"
    )
    add_path(
        parser,
        "--input",
        "a training run, one of whose checkpoints is exported",
        earlier=["--workdir"],
        required=False,
        kind=as_path,
    )
    parser.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    parser.add_argument("--model", help="a checkpoint folder or hub id; a run knows its own")
    parser.add_argument(
        "--adapter", help="a PEFT adapter folder or hub id (default: the model as it is)"
    )
    add_path(parser, "--output", "the folder to write", earlier=["--out"])
    parser.add_argument(
        "--dtype", choices=list(DTYPES), default="bfloat16", help="of models (default: bfloat16)"
    )
    parser.add_argument(
        "--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file (default: 5)"
    )
    _add_soup_flags(parser)
    return parser


def _add_soup_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("soup")
    group.add_argument(
        "--adapters", nargs="+", default=[], help="PEFT adapters of --model, of any rank and target"
    )
    group.add_argument(
        "--models",
        nargs="+",
        default=[],
        help="checkpoints; files that are no weights come from the first",
    )
    group.add_argument(
        "--weights",
        nargs="+",
        type=float,
        help="one for each, divided by their sum (default: equal)",
    )
    group.add_argument(
        "--rank", type=int, help="reduce the sum to this rank by SVD (default: exact)"
    )
    group.add_argument("--merge", action="store_true", help="write OUTPUT-merged, too")
    group.add_argument(
        "--greedy",
        action="store_true",
        help="the best adapter, then each that does not lower the soup's score",
    )
    group.add_argument(
        "--validate", help="what --greedy scores with: files as `lco_jax.evaluate` takes them"
    )
    group.add_argument(
        "--media-root", type=local_path, help="where relative paths of media in --validate start"
    )
    local_tasks.add_flags(parser, "--validate")


def main() -> int:
    """Export or average, and print where."""
    args = make_parser().parse_args()
    if args.max_shard_size <= 0:
        raise LcoError(f"--max-shard-size is {args.max_shard_size}; it must be positive")
    if args.command == "soup":
        _soup(args)
    else:
        _export(args)
    return DONE


def _shard_bytes(args: argparse.Namespace) -> int:
    return int(args.max_shard_size * 1e9)


# ---- exports


def _export(args: argparse.Namespace) -> None:
    """Write the merged model, and the adapter of a run."""
    _check_export_flags(args)
    source, tuned, config = args.model, {}, None
    if args.input is not None:
        source, tuned, config, step = tuned_of_run(args.input, args.step)
        say(f"{args.input}: step {step}, trained from {source}")
    elif args.adapter:
        tuned, config = read_adapter(args.adapter, open_checkpoint(source), head=True)
    _write_merged(args, source, args.output, tuned, config)
    if args.input is not None and has_adapters(tuned.get("decoder", {})):
        folder = args.output.with_name(f"{args.output.name}-adapter")
        write_peft(folder, tuned["decoder"], config, source)
        say(f"adapter: {folder}")


def _write_merged(
    args: argparse.Namespace,
    source: str,
    output: Path,
    tuned: dict[str, Any],
    config: lora.LoraConfig | None,
) -> None:
    export_merged(source, output, tuned, config, args.dtype, _shard_bytes(args))
    say(f"merged model ({args.dtype}): {output}")


def _check_export_flags(args: argparse.Namespace) -> None:
    for name in SOUP_FLAGS:
        if getattr(args, name):
            raise LcoError(f"--{name} goes with soup: python -m lco_jax.convert soup …")
    if args.step is not None and args.input is None:
        raise LcoError("--step goes with --input")
    if (args.input is None) == (args.model is None):
        raise LcoError(
            "give either --input (a training run) or --model (a checkpoint), and not both"
        )
    if args.input is not None and args.adapter:
        raise LcoError("--adapter goes with --model; a run has its own")


# ---- soups


def _soup(args: argparse.Namespace) -> None:
    """Average adapters or models."""
    _check_soup_flags(args)
    names = args.adapters or args.models
    weights = soup.normalized_weights(args.weights, len(names))
    if args.adapters:
        _average_adapters(args, weights)
        return
    checkpoint, average = soup.average_models(names, weights)
    write_model(checkpoint, args.output, average, args.dtype, _shard_bytes(args))
    say(f"average of {len(names)} models ({args.dtype}): {args.output}")


def _check_soup_flags(args: argparse.Namespace) -> None:
    sources = ("input", "adapter", "model", "adapters", "models")
    given = {name for name in sources if getattr(args, name)}
    if given not in ({"model", "adapters"}, {"models"}):
        raise LcoError("a soup is of --model and --adapters, or of --models")
    if args.models and (args.greedy or args.rank or args.merge):
        raise LcoError("--greedy, --rank and --merge go with --adapters")
    if args.rank is not None and args.rank < 1:
        raise LcoError(f"--rank is {args.rank}; it must be at least 1")
    if args.greedy != bool(args.validate and args.kind):
        raise LcoError("--greedy needs --validate and --kind, which nothing else does")
    if args.greedy and args.weights:
        raise LcoError("--greedy sets the weights itself; leave out --weights")


def _average_adapters(args: argparse.Namespace, weights: list[float]) -> None:
    """Average, choose and reduce as the flags say; then write."""
    adapters = soup.read_adapters(args.adapters, open_checkpoint(args.model))
    report: dict[str, Any] = {"model": args.model}
    if args.greedy:
        kept, report["greedy"] = _greedy(args, adapters)
        weights = _equal_weights(kept, len(adapters))
    named = zip(args.adapters, weights, strict=True)
    report["adapters"] = [{"adapter": name, "weight": weight} for name, weight in named]
    chosen = [i for i, weight in enumerate(weights) if weight]
    adapter = soup.average_adapters([adapters[i] for i in chosen], [weights[i] for i in chosen])
    spectra = None
    if args.rank:
        adapter, spectra = soup.reduce_rank(adapter, args.rank)
        report["relative_error"] = soup.rank_errors(spectra, args.rank)
    report["rank"] = adapter[1].rank
    _write_adapter(args, adapter, report, spectra)
    if args.merge:
        folder = args.output.with_name(f"{args.output.name}-merged")
        _write_merged(args, args.model, folder, {"decoder": adapter[0]}, adapter[1])


def _write_adapter(
    args: argparse.Namespace,
    adapter: soup.Adapter,
    report: dict[str, Any],
    spectra: dict[str, np.ndarray] | None,
) -> None:
    """Write an adapter with its report and, of a reduced one, a plot of the singular values."""
    write_peft(args.output, *adapter, args.model)
    write_json(args.output / "soup.json", report)
    count = sum(1 for one in report["adapters"] if one["weight"])
    say(f"average of {count} adapters, of rank {report['rank']}: {args.output}")
    if spectra is not None:
        subject = subject_of(args.model, f"average of {count} adapters")
        plot_spectrum(args.output / "spectrum.png", subject, spectra, args.rank)
        error = report["relative_error"]
        worst = f"{error['max']:.3g} in the worst matrix"
        say(f"relative error of the delta: {error['overall']:.3g} overall, {worst}")


def _equal_weights(chosen: Sequence[int], count: int) -> list[float]:
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(count)]


def _greedy(
    args: argparse.Namespace, adapters: Sequence[soup.Adapter]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The adapters that the greedy soup keeps, and its steps. The base is loaded once."""
    embedder = OmniEmbedder.from_pretrained(args.model, dtype=args.dtype)
    base = embedder.params["decoder"]
    kept, steps = soup.greedy(len(adapters), partial(_score, args, adapters, embedder, base))
    for step in steps:
        step["adapter"] = args.adapters[step.pop("index")]
    _print_steps(steps)
    return kept, steps


def _score(
    args: argparse.Namespace,
    adapters: Sequence[soup.Adapter],
    embedder: OmniEmbedder,
    base: lora.Tree,
    chosen: list[int],
) -> float:
    """The main number of the average of the chosen adapters.

    Adapters that are left out have weight 0: shapes stay the same, and one program serves all.
    """
    tree, config = soup.average_adapters(adapters, _equal_weights(chosen, len(adapters)))
    tree = jax.device_put(tree, replicated(embedder.mesh))
    embedder.params = {**embedder.params, "decoder": lora.attach(base, tree, config)}
    encode = partial(embedder.encode, show_progress=True)
    outcome = local_tasks.evaluate(encode, args.kind, args.validate, **local_tasks.options_of(args))
    main_number = local_tasks.KINDS[args.kind][2]
    value = outcome.numbers[main_number]
    names = " + ".join(args.adapters[i] for i in chosen)
    say(f"{main_number} {value:.4f}: {names}")
    return value


def _print_steps(steps: list[dict[str, Any]]) -> None:
    say(f"\n{'alone':>8}{'soup':>8}  kept")
    for step in steps:
        scores = f"{step['alone']:8.4f}{step['together']:8.4f}"
        kept = "yes" if step["kept"] else "no"
        say(f"{scores}  {kept:5}{step['adapter']}")


if __name__ == "__main__":
    run_main(main)
