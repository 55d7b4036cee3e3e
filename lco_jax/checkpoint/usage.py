"""How a model with or without an adapter is to be used, and what an adapter has to say of it."""

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.checkpoint.peft import adapter_folder
from lco_jax.checkpoint.sentence_transformers import USAGE_FILES, Usage, read_usage, says_usage
from lco_jax.core.errors import LcoError, check_at_least_1


def usage_of(
    checkpoint: Checkpoint, adapter: str | PathLike[str] | None, pooling: str | None = None
) -> Usage:
    """How a model, perhaps with an adapter, is to be used: as the adapter's folder says, or else
    as the checkpoint's. pooling: in the place of what the folder says.
    """
    folder = None if adapter is None else adapter_folder(adapter)
    if folder is None or not says_usage(folder):
        folder = checkpoint.folder
    return read_usage(folder, checkpoint.config.hidden_size, pooling)


def with_dimension(usage: Usage, truncate_dim: int | None, checkpoint: Checkpoint) -> Usage:
    """A usage whose vectors have so many of the first numbers; None: as many as it says. Raises for
    more than there are.
    """
    check_at_least_1(truncate_dim=truncate_dim)
    size = checkpoint.config.hidden_size
    width = truncate_dim or usage.truncate_dim or size
    if width > size:
        raise LcoError(f"truncate_dim is {width}; the model's vectors have {size}")
    return replace(usage, truncate_dim=None if width == size else width)


def common_usage(adapters: Sequence[str], checkpoint: Checkpoint) -> Usage:
    """How the average of adapters is to be used. Raises unless all are used alike."""
    return _alike(adapters, [usage_of(checkpoint, adapter) for adapter in adapters])


def usage_beside(usage: Usage, base: Checkpoint) -> Usage | None:
    """What an adapter's folder has to say of its usage; None where it and its base are used as the
    paper's model is.
    """
    as_in_the_paper = usage == Usage() and usage_of(base, None) == Usage()
    return None if as_in_the_paper else usage


def common_usage_of_models(names: Sequence[str], checkpoints: Sequence[Checkpoint]) -> Usage:
    """How the average of models is to be used. Raises unless all are used alike."""
    return _alike(names, [usage_of(checkpoint, None) for checkpoint in checkpoints])


def _alike(names: Sequence[str], usages: Sequence[Usage]) -> Usage:
    """The usage that all have, which names call."""
    for name, usage in zip(names, usages, strict=True):
        if usage != usages[0]:
            raise LcoError(
                f"{names[0]} and {name} differ in pooling, prompts or truncate_dim, as "
                f"{USAGE_FILES[0]} and {USAGE_FILES[1]} have them, and cannot be averaged"
            )
    return usages[0]
