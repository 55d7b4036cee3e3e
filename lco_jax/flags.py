"""The flags that several commands share, each defined once, and what is made of them.

Every command reads from --input and writes to --output. Names that a flag had earlier still work; help does not list
them.
"""

import argparse
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeVar

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.core.buckets import on_disk
from lco_jax.core.errors import LcoError
from lco_jax.core.files import fingerprint
from lco_jax.core.quantize import KINDS
from lco_jax.data.media import MediaConfig
from lco_jax.embedder import OmniEmbedder
from lco_jax.models.attention import IMPLEMENTATIONS

TEXTS_A_PART, MEDIA_A_PART = 8192, 512  # inputs that are embedded together
M = TypeVar("M", bound=OmniEmbedder)


def new_parser(command: str, doc: str | None) -> argparse.ArgumentParser:
    """A parser whose help is the module's docstring. command: the module's name within the package."""
    return argparse.ArgumentParser(
        prog=f"python -m lco_jax.{command}",
        description=doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def add_path(
    parser: argparse.ArgumentParser,
    flag: str,
    help: str,
    earlier: Sequence[str] = (),
    required: bool = True,
    kind: Callable[[str], Any] = on_disk,
) -> None:
    """A flag for a path. earlier: the flag's earlier names, which still work and which help does not list."""
    group = parser.add_mutually_exclusive_group(required=required)
    group.add_argument(flag, type=kind, help=help)
    for name in earlier:
        group.add_argument(name, dest=flag.strip("-"), type=kind, help=argparse.SUPPRESS)


def add_corpus_flags(parser: argparse.ArgumentParser, on_error: str) -> None:
    """The flags of whatever embeds a corpus: the model, how it embeds, and the caps on media."""
    parser.add_argument(
        "--on-error",
        choices=["raise", "skip"],
        default=on_error,
        help="of media that cannot be read",
    )
    parser.add_argument(
        "--part-size",
        type=int,
        help=f"inputs embedded together (default: {TEXTS_A_PART}; {MEDIA_A_PART} with media)",
    )
    add_model_flags(parser)


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """Those of the model, of how it reads inputs, and the caps on media."""
    parser.add_argument("--model", required=True, help="a checkpoint folder or hub id")
    parser.add_argument("--adapter", help="a PEFT adapter folder or hub id")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument(
        "--quantize", choices=["", *KINDS], default="", help="hold the decoder in fewer bits"
    )
    parser.add_argument("--attention", choices=IMPLEMENTATIONS, default="auto", help="the kernel")
    parser.add_argument(
        "--batch-size", type=int, help="the most inputs in a forward pass; by default any number"
    )
    parser.add_argument("--max-length", type=int, help="cut texts to so many tokens")
    parser.add_argument("--prompt", help="instead of the reference's, placed after the content")
    parser.add_argument("--media-root", type=on_disk, help="where relative paths of media start")
    parser.add_argument(
        "--workers", type=int, help="processes that prepare media (default: one a CPU, at most 8)"
    )
    group = parser.add_argument_group("caps on media")
    for field in fields(MediaConfig):
        flag, text = _flag(field.name), field.metadata["meaning"]
        if field.type is bool:
            group.add_argument(flag, action="store_true", help=text)
        else:
            default = "" if field.default is None else f" (default: {field.default:,})"
            group.add_argument(
                flag, type=float if field.type is float else int, help=text + default
            )


def workers(args: argparse.Namespace, media: bool) -> int:
    """Processes that prepare inputs. media: whether there are enough of them for processes by default."""
    return args.workers if args.workers is not None else min(os.cpu_count() or 1, 8) if media else 0


def media_config(args: argparse.Namespace) -> MediaConfig:
    """The caps on media. Raises for any number among the flags that makes no sense."""
    for name, least in (
        ("batch_size", 1),
        ("max_length", 1),
        ("max_new_tokens", 1),
        ("part_size", 1),
        ("workers", 0),
    ):
        if (value := getattr(args, name, None)) is not None and value < least:
            raise LcoError(f"{_flag(name)}={value}: it must be at least {least}")
    given = {field.name: getattr(args, field.name) for field in fields(MediaConfig)}
    try:
        return MediaConfig(**{name: value for name, value in given.items() if value is not None})
    except LcoError as error:
        raise LcoError(
            re.sub(r"^media\.(\w+)", lambda found: _flag(found[1]), str(error))
        ) from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def load_embedder(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    media: MediaConfig,
    modalities: tuple[str, ...] | None,
    kind: type[M] = OmniEmbedder,
) -> M:
    """The embedder, or other `kind`, that the flags ask for. modalities: None for all."""
    return kind.from_pretrained(
        checkpoint.folder,
        args.adapter,
        args.dtype,
        modalities=modalities,
        media=media,
        quantize=args.quantize,
        attention=args.attention,
    )


def embedding_settings(
    args: argparse.Namespace, media: MediaConfig, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Flag -> value of all that the vector of a given input depends on."""
    work = {
        _flag(name): getattr(args, name) for name in ("dtype", "quantize", "prompt", "max_length")
    }
    work |= {_flag(field.name): getattr(media, field.name) for field in fields(media)}
    work |= {
        "--model": args.model,
        "--adapter": args.adapter,
        "what --model holds": _files(args.model, checkpoint),
    }
    return work if args.adapter is None else {**work, "what --adapter holds": _files(args.adapter)}


def _files(path_or_id: str, checkpoint: Checkpoint | None = None) -> str:
    """What tells whether weights have changed: of a folder its files' sizes and times, of a hub id the revision."""
    folder = Path(path_or_id).expanduser()
    if folder.is_dir():
        return fingerprint(
            (file.name, file.stat()) for file in sorted(folder.iterdir()) if file.is_file()
        )
    return str(path_or_id) if checkpoint is None else checkpoint.folder.name
