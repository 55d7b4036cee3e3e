"""The flags that several commands share, each defined once, and what is made of them.

Every command reads from --input and writes to --output. Names that a flag had earlier still work;
help does not list them.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.checkpoint.usage import usage_of
from lco_jax.core import console
from lco_jax.core.console import say
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, fingerprint, local_path
from lco_jax.core.quantize import KINDS
from lco_jax.data.instructions import IN_WORDS, PLACES, Instructions
from lco_jax.data.media import MediaConfig
from lco_jax.embedder import OmniEmbedder
from lco_jax.models.attention import IMPLEMENTATIONS
from lco_jax.sentence_methods import all_prompts, document_name, query_name

TEXTS_A_UNIT, MEDIA_A_UNIT = 8192, 512  # inputs that are embedded together
# what numbers among the flags must be at least
LEAST = {
    "batch_size": 1,
    "max_length": 1,
    "max_new_tokens": 1,
    "part_size": 1,
    "truncate_dim": 1,
    "actors": 1,
    "workers": 0,
}
ToPath = Callable[[str], AnyPath]
M = TypeVar("M", bound=OmniEmbedder)


class _Parser(argparse.ArgumentParser):
    """A parser whose complaints are JSON, too, where that was asked for."""

    def error(self, message: str) -> NoReturn:
        if console.in_json():
            raise LcoError(message)
        super().error(message)


def new_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring. command: the module's name within the
    package.
    """
    name = sys.argv[0]  # of `lco embed`, what was typed
    return _Parser(
        prog=name if name.startswith("lco ") else f"python -m lco_jax.{command}",
        description=doc,
        parents=[console.flags()],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_path(
    parser: argparse.ArgumentParser,
    flag: str,
    help: str,
    earlier: Sequence[str] = (),
    required: bool = True,
    kind: ToPath = local_path,
) -> None:
    """A flag for a path. earlier: the flag's earlier names, which still work and which help does
    not list.
    """
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(flag, type=kind, help=help)
    for name in earlier:
        group.add_argument(name, dest=flag.strip("-"), type=kind, help=argparse.SUPPRESS)


def add_corpus_flags(
    parser: argparse.ArgumentParser,
    on_error: str,
    media_root: ToPath = local_path,
    part_size: int | None = None,
    max_length: int | None = None,
) -> None:
    """The flags of whatever embeds a corpus: the model, how it embeds, and the caps on media.

    on_error, part_size, max_length: the defaults of these flags.
    """
    add_on_error(parser, on_error)
    default = f"{TEXTS_A_UNIT}; {MEDIA_A_UNIT} with media" if part_size is None else part_size
    parser.add_argument(
        "--part-size", type=int, default=part_size, help=f"inputs of a unit (default: {default})"
    )
    add_model_flags(parser, media_root, max_length)
    parser.add_argument(
        "--prompt-name", help="of a prompt that the model was trained with: query, document, …"
    )
    parser.add_argument(
        "--prompt-place",
        choices=PLACES,
        help="where prompts stand (default: as the model was trained; else instead of the one "
        "after the content)",
    )


def add_ray_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of work that actors of a Ray cluster may share."""
    group = parser.add_argument_group("many processes")
    group.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="share the work among actors of a Ray cluster (by default: started on this machine)",
    )
    group.add_argument(
        "--actors",
        type=int,
        help="how many (default: one a GPU or TPU chip of the cluster, or one a machine)",
    )
    group.add_argument(
        "--actor-resources",
        type=_resources,
        metavar="NAME=N,…",
        help="what an actor takes, as Ray calls it (default: GPU=1, TPU=1 or CPU=1)",
    )


def check_ray(args: argparse.Namespace) -> None:
    """Raise for flags of actors without --ray."""
    if args.ray is None and (args.actors or args.actor_resources):
        raise LcoError("--actors and --actor-resources go with --ray")


def _resources(text: str) -> dict[str, float]:
    """{name: amount} of what "TPU=4,CPU=8" says."""
    pairs = [pair.partition("=") for pair in text.split(",")]
    try:
        found = {name: float(amount) for name, _, amount in pairs}
    except ValueError as error:
        raise LcoError(f"--actor-resources={text}: give NAME=N, such as TPU=4") from error
    if not all(name and amount > 0 for name, amount in found.items()):
        raise LcoError(f"--actor-resources={text}: give NAME=N with N above 0, such as TPU=4")
    return found


def add_on_error(parser: argparse.ArgumentParser, default: str) -> None:
    """The flag that says what a bad input does."""
    parser.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default=default,
        help="for an input that cannot be read (default: %(default)s)",
    )


def add_model_flags(
    parser: argparse.ArgumentParser,
    media_root: ToPath = local_path,
    max_length: int | None = None,
) -> None:
    """The flags of the model, of how it reads inputs, and the caps on media."""
    parser.add_argument("--model", required=True, help="a checkpoint folder or hub id")
    parser.add_argument("--adapter", help="a PEFT adapter folder or hub id")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--quantize", choices=["", *KINDS], default="", help="store the decoder in fewer bits"
    )
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, default="auto", help="the kernel")
    parser.add_argument(
        "--batch-size", type=int, help="the most inputs in a forward pass; by default any number"
    )
    parser.add_argument(
        "--max-length",
        type=int,
        default=max_length,
        help=f"cut texts to so many tokens (default: {max_length or 'no cut'})",
    )
    parser.add_argument(
        "--prompt",
        help="an instruction of each input (default: the reference's prompt, after the content)",
    )
    parser.add_argument("--media-root", type=media_root, help="where relative paths of media start")
    parser.add_argument(
        "--workers", type=int, help="processes that prepare media (default: one a CPU, at most 8)"
    )
    group = parser.add_argument_group("caps on media")
    for field in fields(MediaConfig):
        flag, text = flag_of(field.name), field.metadata["meaning"]
        if field.type is bool:
            text = f"{text} (default: {'yes' if field.default else 'no'})"
            group.add_argument(flag, action=argparse.BooleanOptionalAction, help=text)
        else:
            default = "" if field.default is None else f" (default: {field.default:,})"
            group.add_argument(
                flag, type=float if field.type is float else int, help=text + default
            )


def workers(args: argparse.Namespace, media: bool, cpus: int | None = None) -> int:
    """Processes that prepare inputs.

    media: whether there are enough of them for processes by default. cpus: how many may be used, by
    default all.
    """
    if args.workers is not None:
        return args.workers
    return min(os.cpu_count() or 1 if cpus is None else cpus, 8) if media else 0


def media_config(args: argparse.Namespace) -> MediaConfig:
    """The caps on media. Raises for any number among the flags that makes no sense."""
    check_least(args, LEAST)
    given = {field.name: getattr(args, field.name) for field in fields(MediaConfig)}
    if args.prompt is not None and getattr(args, "prompt_name", None) is not None:
        raise LcoError("--prompt and --prompt-name exclude each other; give one")
    try:
        return MediaConfig(**{name: value for name, value in given.items() if value is not None})
    except LcoError as error:
        message = re.sub(r"^media\.(\w+)", _flag_of_match, str(error))
        raise LcoError(message) from error


def check_least(args: argparse.Namespace, least: Mapping[str, int]) -> None:
    """Raise for a number that is less than it must be. least: name -> bound; a flag that was not
    given, or that the command does not have, is left alone.
    """
    for name, bound in least.items():
        value = getattr(args, name, None)
        if value is not None and value < bound:
            raise LcoError(f"{flag_of(name)}={value}: it must be at least {bound}")


def _flag_of_match(found: re.Match[str]) -> str:
    return flag_of(found[1])


def flag_of(name: str) -> str:
    """The flag that gives an attribute of the parsed command line."""
    return f"--{name.replace('_', '-')}"


def load_embedder(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    media: MediaConfig,
    modalities: tuple[str, ...] | None,
    kind: type[M] = OmniEmbedder,
) -> M:
    """The embedder, or other `kind`, that the flags ask for. modalities: None for all."""
    embedder = kind.from_pretrained(
        checkpoint.folder,
        args.adapter,
        args.dtype,
        modalities=modalities,
        media=media,
        quantize=args.quantize,
        attention=args.attention,
    )
    place = getattr(args, "prompt_place", None)
    if place is not None:
        embedder.tokenizer.check_place(place)
        embedder.prompt_place = place
    return embedder


def embedding_settings(
    args: argparse.Namespace, media: MediaConfig, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Flag -> value of all that the vector of a given input depends on."""
    names = ("model", "adapter", "dtype", "quantize", "prompt", "max_length")
    settings = {flag_of(name): getattr(args, name) for name in names}
    settings |= {flag_of(field.name): getattr(media, field.name) for field in fields(media)}
    settings["what --model holds"] = _state_of(args.model, checkpoint.folder.name)
    if args.adapter is not None:
        settings["what --adapter holds"] = _state_of(args.adapter, str(args.adapter))
    return settings | usage_settings(args, checkpoint)


def usage_settings(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Flag or words -> value of how the model is used, without what is the paper's."""
    usage = usage_of(checkpoint, args.adapter)
    instructions = usage.instructions
    _check_prompt_name(args, instructions)
    settings = {
        "--prompt-name": args.prompt_name,
        "--prompt-place": args.prompt_place,
        "pooling": None if usage.pooling == "last" else usage.pooling,
        "the model's prompts": dict(instructions.prompts) or None,
        "where they stand": instructions.place if instructions.prompts else None,
    }
    return {name: value for name, value in settings.items() if value is not None}


def check_prompt_name(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise for a --prompt-name that the model has no prompt of."""
    _check_prompt_name(args, usage_of(checkpoint, args.adapter).instructions)


def _check_prompt_name(args: argparse.Namespace, instructions: Instructions) -> None:
    known = all_prompts(instructions)
    if args.prompt_name is not None and args.prompt_name not in known:
        there = ", ".join(known)
        raise LcoError(f"--prompt-name={args.prompt_name}: the model has the prompts {there}")


def say_prompts(args: argparse.Namespace, checkpoint: Checkpoint, queries: bool) -> None:
    """Say which instructions inputs have, if any. queries: whether some of them are queries."""
    instructions = usage_of(checkpoint, args.adapter).instructions
    place = args.prompt_place or instructions.place
    prompts = all_prompts(instructions)
    names = {"inputs": None}
    if queries:
        names = {"queries": query_name(prompts), "documents": document_name(prompts)}
    for what, name in names.items():
        chosen = args.prompt_name or name or instructions.default or ""
        text = prompts.get(chosen, "") if args.prompt is None else args.prompt
        if text:
            say(f"the instruction of {what} is {text!r} ({IN_WORDS[place]})", aside=True)


def _state_of(path_or_id: str, otherwise: str) -> str:
    """Text that differs when weights have changed: of a folder its files' sizes and times; else
    `otherwise`.
    """
    folder = Path(path_or_id).expanduser()
    if not folder.is_dir():
        return otherwise
    files = [file for file in sorted(folder.iterdir()) if file.is_file()]
    return fingerprint((file.name, file.stat()) for file in files)
