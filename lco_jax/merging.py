"""What all exports of `convert` have in common: dtype, files, and how cards name their parts."""

import argparse
from pathlib import Path
from typing import Any

from lco_jax.checkpoint.base import hub_id_of
from lco_jax.checkpoint.card import About
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.tensors import SHARD_BYTES
from lco_jax.core import lora
from lco_jax.core.console import say

DTYPE = "bfloat16"  # of what is written, where --dtype is not given


def shard_bytes(args: argparse.Namespace) -> int:
    """The most bytes of one file."""
    return SHARD_BYTES if args.max_shard_size is None else int(args.max_shard_size * 1e9)


def dtype_of(args: argparse.Namespace) -> str:
    """Of what is written."""
    return args.dtype or DTYPE


def write_merged(
    args: argparse.Namespace,
    output: Path,
    base: tuple[str, Checkpoint],
    tuned: dict[str, Any],
    config: lora.LoraConfig | None,
    about: About | None,
    usage: Usage,
) -> None:
    """Write a merged model, and say so. base: as it was given, and opened. usage: of the model."""
    source, checkpoint = base
    dtype, most = dtype_of(args), shard_bytes(args)
    export_merged(source, output, tuned, config, dtype, most, about, checkpoint, usage)
    say(f"merged model ({dtype}): {output}")


def shown(name: str) -> str:
    """An adapter or a model as a card names it: a hub id, or the end of a path."""
    return hub_id_of(name) or "/".join(Path(name).parts[-2:])
