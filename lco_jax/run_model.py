"""A run's model: the towers that its data need, and its parameters on the mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, load_model
from lco_jax.checkpoint.usage import usage_of
from lco_jax.core.console import say
from lco_jax.core.errors import LcoError
from lco_jax.data.media import MediaConfig
from lco_jax.data.scan import Source
from lco_jax.models.model import Model


def towers_for(
    checkpoint: Checkpoint,
    sources: Mapping[str, Source],
    held_out: Mapping[str, Source],
    media: MediaConfig,
) -> list[str]:
    """The towers that the data needs. Raises for data that the checkpoint does not take."""
    backbone = checkpoint.backbone
    used: set[str] = set()
    named = {f"held-out data {name}": source for name, source in held_out.items()}
    for name, source in {**named, **sources}.items():
        refused = sorted(source.modalities - set(backbone.modalities))
        if refused:
            taken = ", ".join(backbone.modalities)
            raise LcoError(f"{name} holds {refused[0]}, and this checkpoint takes {taken}")
        used |= source.modalities
    if media.use_audio_in_video and "video" in used:
        used.add("audio")
    return backbone.towers_for(used)


def load(
    config: ConfigDict, checkpoint: Checkpoint, mesh: Mesh, towers: list[str], generative: bool
) -> tuple[Model, dict[str, Any]]:
    """The model on the mesh, and its parameters."""
    if not generative:
        _say_pooling(config, checkpoint)
    remat = config.model.remat
    model, params = load_model(
        checkpoint,
        mesh,
        config.model.dtype,
        towers,
        config.model.tower_dtype or None,
        head=generative,
        quantize=config.model.quantize,
        remat="full" if remat == "auto" else remat,  # until a policy is chosen
        attention=config.model.attention,
        pooling=config.model.pooling,
    )
    if config.tune.decoder == "full":
        model = dataclasses.replace(model, decoder=model.decoder.clone(tuned=True))
    return model, params


def _say_pooling(config: ConfigDict, checkpoint: Checkpoint) -> None:
    """That the run pools otherwise than its base, if it does."""
    pooled = usage_of(checkpoint, None).pooling
    if pooled != config.model.pooling and jax.process_index() == 0:
        say(f"{config.model.path} pools as {pooled!r}, and config.model.pooling says otherwise")
