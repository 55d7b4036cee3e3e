"""The command `convert soup`: the average of several adapters, or of several models."""

import argparse
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from lco_jax.checkpoint import soup
from lco_jax.checkpoint.card import About, Section, adapter_card
from lco_jax.checkpoint.export import write_model
from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.usage import common_usage, usage_beside, with_dimension
from lco_jax.core import lora
from lco_jax.core.console import say
from lco_jax.core.errors import LcoError
from lco_jax.core.files import local_path, write_json
from lco_jax.core.sharding import replicated
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation import local_tasks
from lco_jax.evaluation.plots import plot_spectrum, subject_of
from lco_jax.merging import dtype_of, shard_bytes, shown, write_merged
from lco_jax.sides import encode_sides
from lco_jax.uploads import beside

FLAGS = ("adapters", "models", "weights", "rank", "merge", "greedy", "validate", "kind")


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of soups."""
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


def check_flags(args: argparse.Namespace) -> None:
    """Raise for flags of a soup that do not go together."""
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


def refuse_flags(args: argparse.Namespace) -> None:
    """Raise for flags of soups, where none is asked for."""
    for name in FLAGS:
        if getattr(args, name):
            raise LcoError(f"--{name} goes with soup: python -m lco_jax.convert soup …")


def average(args: argparse.Namespace) -> None:
    """Average adapters or models."""
    names = args.adapters or args.models
    weights = soup.normalized_weights(args.weights, len(names))
    if args.adapters:
        _average_adapters(args, weights)
        return
    checkpoint, tensors, usage = soup.average_models(names, weights)
    write_model(
        checkpoint,
        args.output,
        tensors,
        dtype_of(args),
        shard_bytes(args),
        source=names[0],
        about=_about_soup("models", names, weights),
        usage=with_dimension(usage, args.truncate_dim, checkpoint),
    )
    say(f"average of {len(names)} models ({dtype_of(args)}): {args.output}")


def _about_soup(
    kind: str, names: Sequence[str], weights: Sequence[float], greedy: str = ""
) -> About:
    """What the cards of a soup tell. kind: of its members. greedy: how they were chosen."""
    rows = [(shown(name), weight) for name, weight in zip(names, weights, strict=True) if weight]
    words = "A soup is the weighted average of what several runs learned (arXiv 2203.05482)."
    made = f"A soup of {len(rows)} {kind}, averaged with lco-jax; the base is {{base}}."
    members = Section("Members", f"{words} {greedy}".strip(), ("member", "weight"), rows)
    return About(made, "a soup", relation="merge", sections=(members,))


def _average_adapters(args: argparse.Namespace, weights: list[float]) -> None:
    """Average, choose and reduce as the flags say; then write."""
    checkpoint = open_checkpoint(args.model)
    adapters = soup.read_adapters(args.adapters, checkpoint)
    usage = with_dimension(common_usage(args.adapters, checkpoint), args.truncate_dim, checkpoint)
    report: dict[str, Any] = {"model": args.model}
    if args.greedy:
        kept, report["greedy"] = _greedy(args, adapters, usage)
        weights = _equal_weights(kept, len(adapters))
    named = zip(args.adapters, weights, strict=True)
    report["adapters"] = [{"adapter": name, "weight": weight} for name, weight in named]
    chosen = [i for i, weight in enumerate(weights) if weight]
    adapter = soup.average_adapters([adapters[i] for i in chosen], [weights[i] for i in chosen])
    spectra = None
    if args.rank:
        adapter, spectra = soup.reduce_rank(adapter, args.rank)
        report["relative_error"] = soup.rank_errors(spectra, args.rank)
    about = _about_soup("adapters", args.adapters, weights, _greedy_in_words(args, report))
    _write_adapter(args, checkpoint, adapter, report, spectra, about, usage)


def _write_adapter(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    adapter: soup.Adapter,
    report: dict[str, Any],
    spectra: dict[str, np.ndarray] | None,
    about: About,
    usage: Usage,
) -> None:
    """Write an adapter with its report and, of a reduced one, a plot of the singular values; then
    the merged model, if it is asked for.
    """
    card = adapter_card(checkpoint, args.model, about, adapter[1], usage)
    write_peft(args.output, *adapter, args.model, card, usage_beside(usage, checkpoint))
    report["rank"] = adapter[1].rank
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
        write_merged(args, folder, base, {"decoder": adapter[0]}, adapter[1], about, usage)


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
    args: argparse.Namespace, adapters: Sequence[soup.Adapter], usage: Usage
) -> tuple[list[int], list[dict[str, Any]]]:
    """The adapters that the greedy soup keeps, and its steps. The base is loaded once.

    usage: of the soup that is written, as which each is scored.
    """
    options = {"dtype": dtype_of(args), "pooling": usage.pooling}
    embedder = OmniEmbedder.from_pretrained(args.model, **options)
    embedder.tokenizer.check_place(usage.instructions.place)
    embedder.set_instructions(usage.instructions)
    embedder.truncate_dim = usage.truncate_dim
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
    options = local_tasks.options_of(args)
    if args.kind == "retrieval":
        options["encode_sides"] = partial(encode_sides, embedder, encode)
    outcome = local_tasks.evaluate(encode, args.kind, args.validate, **options)
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
