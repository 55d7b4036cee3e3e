"""Training runs and adapters → merged models; several adapters or models → their average.

    python -m lco_jax.convert --input=runs/base --output=exports/base
    python -m lco_jax.convert --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=A --output=merged
    python -m lco_jax.convert soup --model=BASE --adapters A B C --weights 2 1 1 --output=soup
    python -m lco_jax.convert soup --model=BASE --adapters A B C --rank=64 --merge --output=soup
    python -m lco_jax.convert soup --model=BASE --adapters A B C --greedy --validate=dev.csv \\
        --kind=sts --output=soup
    python -m lco_jax.convert soup --models M1 M2 --output=averaged
    python -m lco_jax.convert --input=runs/vl7b --push=owner/name --private

Writes a merged model in the hub's layout to OUTPUT and, of a run, its PEFT adapter to
OUTPUT-adapter. A soup of adapters is an adapter with a soup.json (and OUTPUT-merged); a soup of
models is a model. Each file is read back and compared when it is written.

--push uploads to the Hugging Face hub what OUTPUT holds. Without --output it uploads what is there:
a run's merged/ and adapter/, or the exported folder that --input names.
"""

import argparse
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lco_jax import hub
from lco_jax.checkpoint import soup
from lco_jax.checkpoint.base import hub_id_of
from lco_jax.checkpoint.card import About, Section, adapter_card
from lco_jax.checkpoint.export import export_merged, write_model
from lco_jax.checkpoint.hf import DTYPES, Checkpoint, open_checkpoint
from lco_jax.checkpoint.peft import has_adapters, read_adapter, write_peft
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.tensors import SHARD_BYTES
from lco_jax.checkpoint.usage import common_usage, usage_beside, usage_of, with_dimension
from lco_jax.core import lora
from lco_jax.core.console import say
from lco_jax.core.errors import DONE, LcoError, run_main
from lco_jax.core.files import AnyPath, as_path, local_path, reaching, read_json, write_json
from lco_jax.core.sharding import replicated
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation import local_tasks
from lco_jax.evaluation.plots import plot_spectrum, subject_of
from lco_jax.flags import add_path, new_parser
from lco_jax.training.card import about_run
from lco_jax.training.instructions import usage_of_run
from lco_jax.training.run import run_config, tuned_of_run
from lco_jax.uploads import add_push_flags, beside, check_upload_flags, pushed_folders

DTYPE = "bfloat16"  # of what is written, where --dtype is not given
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
    output = "the folder to write (without it, --push uploads what is there)"
    add_path(parser, "--output", output, earlier=["--out"], required=False)
    # no defaults, so that it is known whether they are given
    parser.add_argument("--dtype", choices=list(DTYPES), help=f"of models (default: {DTYPE})")
    size = f"of one file (default: {SHARD_BYTES / 1e9:g})"
    parser.add_argument("--max-shard-size", type=float, metavar="GB", help=size)
    shorter = "how many of the first numbers the model's vectors are to have (default: all)"
    parser.add_argument("--truncate-dim", type=int, help=shorter)
    add_push_flags(parser)
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
    if args.max_shard_size is not None and args.max_shard_size <= 0:
        raise LcoError(f"--max-shard-size is {args.max_shard_size}; it must be positive")
    if args.command == "soup":
        _check_soup_flags(args)
    else:
        _refuse_soup_flags(args)
        if args.output is None:
            check_upload_flags(args)
        else:
            _check_export_flags(args)
    is_run = args.output is not None and args.input is not None
    run = run_config(args.input) if is_run else None
    pushed = pushed_folders(args, run)
    api = hub.open_repositories(list(pushed), args.private or None) if pushed else None
    if args.command == "soup":
        _soup(args)
    elif run is not None:
        _export_run(args, run)
    elif args.output is not None:
        _export_model(args)
    for repo_id, folder in pushed.items():
        say(f"uploaded {folder}: {hub.upload(api, folder, repo_id)}")
    return DONE


def _shard_bytes(args: argparse.Namespace) -> int:
    return SHARD_BYTES if args.max_shard_size is None else int(args.max_shard_size * 1e9)


def _dtype(args: argparse.Namespace) -> str:
    return args.dtype or DTYPE


# ---- exports


def _export_run(args: argparse.Namespace, run: Mapping[str, Any]) -> None:
    """Write the merged model and the adapter of a run. run: its configuration."""
    found = tuned_of_run(args.input, args.step, run)
    say(f"{args.input}: step {found.step}, trained from {found.source}")
    about = about_run(run, _results(args.input), found.step)
    base = found.source, found.checkpoint
    usage = with_dimension(usage_of_run(run), args.truncate_dim, found.checkpoint)
    _write_merged(args, args.output, base, found.parameters, found.lora, about, usage)
    if has_adapters(found.parameters.get("decoder", {})):
        folder = beside(args.output, "adapter")
        card = adapter_card(found.checkpoint, found.source, about, found.lora, usage)
        beside_it = usage_beside(usage, found.checkpoint)
        adapters = found.parameters["decoder"]
        write_peft(folder, adapters, found.lora, found.source, card, beside_it)
        say(f"adapter: {folder}")


def _results(workdir: AnyPath) -> dict[str, Any]:
    """The content of a run's results.json; empty if it has none yet."""
    with reaching(workdir):
        file = workdir / "results.json"
        return read_json(file) if file.exists() else {}


def _export_model(args: argparse.Namespace) -> None:
    """Write a model, perhaps with an adapter."""
    checkpoint = open_checkpoint(args.model)
    tuned, config, about = {}, None, None
    if args.adapter:
        tuned, config = read_adapter(args.adapter, checkpoint, head=True)
        made = f"{{base}} with the adapter {_shown(args.adapter)} added to its weights."
        about = About(made, "with an adapter")
    base = args.model, checkpoint
    usage = with_dimension(usage_of(checkpoint, args.adapter), args.truncate_dim, checkpoint)
    _write_merged(args, args.output, base, tuned, config, about, usage)


def _write_merged(
    args: argparse.Namespace,
    output: Path,
    base: tuple[str, Checkpoint],
    tuned: dict[str, Any],
    config: lora.LoraConfig | None,
    about: About | None,
    usage: Usage,
) -> None:
    """base: as it was given, and opened. usage: of the model."""
    source, checkpoint = base
    dtype, most = _dtype(args), _shard_bytes(args)
    export_merged(source, output, tuned, config, dtype, most, about, checkpoint, usage)
    say(f"merged model ({dtype}): {output}")


def _shown(name: str) -> str:
    """An adapter or a model as a card names it: a hub id, or the end of a path."""
    return hub_id_of(name) or "/".join(Path(name).parts[-2:])


def _refuse_soup_flags(args: argparse.Namespace) -> None:
    for name in SOUP_FLAGS:
        if getattr(args, name):
            raise LcoError(f"--{name} goes with soup: python -m lco_jax.convert soup …")


def _check_export_flags(args: argparse.Namespace) -> None:
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
    names = args.adapters or args.models
    weights = soup.normalized_weights(args.weights, len(names))
    if args.adapters:
        _average_adapters(args, weights)
        return
    checkpoint, average = soup.average_models(names, weights)
    about = _about_soup("models", names, weights)
    usage = with_dimension(usage_of(checkpoint, None), args.truncate_dim, checkpoint)
    options = {"source": names[0], "about": about, "usage": usage}
    write_model(checkpoint, args.output, average, _dtype(args), _shard_bytes(args), **options)
    say(f"average of {len(names)} models ({_dtype(args)}): {args.output}")


def _about_soup(
    kind: str, names: Sequence[str], weights: Sequence[float], greedy: str = ""
) -> About:
    """What the cards of a soup tell. kind: of its members. greedy: how they were chosen."""
    rows = [(_shown(name), weight) for name, weight in zip(names, weights, strict=True) if weight]
    words = "A soup is the weighted average of what several runs learned (arXiv 2203.05482)."
    made = f"A soup of {len(rows)} {kind}, averaged with lco-jax; the base is {{base}}."
    members = Section("Members", f"{words} {greedy}".strip(), ("member", "weight"), rows)
    return About(made, "a soup", relation="merge", sections=(members,))


def _check_soup_flags(args: argparse.Namespace) -> None:
    if args.output is None:
        raise LcoError("a soup needs --output, the folder to write")
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
    if args.truncate_dim is not None and args.adapters and not args.merge:
        raise LcoError("--truncate-dim is of a model; a soup of adapters has one with --merge")


def _average_adapters(args: argparse.Namespace, weights: list[float]) -> None:
    """Average, choose and reduce as the flags say; then write."""
    checkpoint = open_checkpoint(args.model)
    adapters = soup.read_adapters(args.adapters, checkpoint)
    common_usage(args.adapters, checkpoint)
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
    about = _about_soup("adapters", args.adapters, weights, _greedy_in_words(args, report))
    _write_adapter(args, checkpoint, adapter, report, spectra, about)


def _write_adapter(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    adapter: soup.Adapter,
    report: dict[str, Any],
    spectra: dict[str, np.ndarray] | None,
    about: About,
) -> None:
    """Write an adapter with its report and, of a reduced one, a plot of the singular values; then
    the merged model, if it is asked for.
    """
    usage = with_dimension(common_usage(args.adapters, checkpoint), args.truncate_dim, checkpoint)
    card = adapter_card(checkpoint, args.model, about, adapter[1], usage)
    write_peft(args.output, *adapter, args.model, card, usage_beside(usage, checkpoint))
    write_json(args.output / "soup.json", report)
    count = sum(1 for one in report["adapters"] if one["weight"])
    say(f"average of {count} adapters, of rank {report['rank']}: {args.output}")
    if spectra is not None:
        subject = subject_of(args.model, f"average of {count} adapters")
        plot_spectrum(args.output / "spectrum.png", subject, spectra, args.rank)
        error = report["relative_error"]
        worst = f"{error['max']:.3g} in the worst matrix"
        say(f"relative error of the delta: {error['overall']:.3g} overall, {worst}")
    if args.merge:
        folder = beside(args.output, "merged")
        base = args.model, checkpoint
        _write_merged(args, folder, base, {"decoder": adapter[0]}, adapter[1], about, usage)


def _greedy_in_words(args: argparse.Namespace, report: dict[str, Any]) -> str:
    """How a greedy soup was chosen, with the score it was chosen by; "" for another soup."""
    if "greedy" not in report:
        return ""
    best = [step["together"] for step in report["greedy"] if step["kept"]][-1]
    number = local_tasks.KINDS[args.kind][2]
    return (
        f"These were kept of {len(args.adapters)}, because each did not lower {number} on "
        f"{Path(args.validate).name}, which is {best:.4f} with all of them. That number chose the "
        "members, so it is no score on held-out data."
    )


def _equal_weights(chosen: Sequence[int], count: int) -> list[float]:
    return [1 / len(chosen) if i in chosen else 0.0 for i in range(count)]


def _greedy(
    args: argparse.Namespace, adapters: Sequence[soup.Adapter]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The adapters that the greedy soup keeps, and its steps. The base is loaded once."""
    usage = common_usage(args.adapters, open_checkpoint(args.model))
    options = {"dtype": _dtype(args), "pooling": usage.pooling}
    embedder = OmniEmbedder.from_pretrained(args.model, **options)
    embedder.set_instructions(usage.instructions)
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
    encode = partial(embedder.encode, show_progress_bar=True)
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
