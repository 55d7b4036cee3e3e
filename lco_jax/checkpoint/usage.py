"""How a model with or without an adapter is to be used, and what an adapter has to say of it."""

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.checkpoint.peft import adapter_folder
from lco_jax.checkpoint.sentence_transformers import USAGE_FILES, Usage, read_usage, says_usage
from lco_jax.core.errors import LcoError


def usage_of(checkpoint: Checkpoint, adapter: str | PathLike[str] | None) -> Usage:
    """How a model, perhaps with an adapter, is to be used: as the adapter's folder says, or else
    as the checkpoint's.
    """
    folder = None if adapter is None else adapter_folder(adapter)
    if folder is not None and says_usage(folder):
        return read_usage(folder)
    return read_usage(checkpoint.folder)


def common_usage(adapters: Sequence[str], checkpoint: Checkpoint) -> Usage:
    """How the average of adapters is to be used. Raises unless all are used alike."""
    first, *others = adapters
    usage = usage_of(checkpoint, first)
    for other in others:
        if usage_of(checkpoint, other) != usage:
            raise LcoError(
                f"{first} and {other} differ in pooling or prompts, as {USAGE_FILES[0]} "
                f"and {USAGE_FILES[1]} have them, and cannot be averaged"
            )
    return usage


def usage_beside(usage: Usage, base: Path) -> Usage | None:
    """What an adapter's folder has to say of its usage; None where all is as without it."""
    return None if usage == read_usage(base) == Usage() else usage
