"""The training step of a run that does not exist: compiled for absent devices, from shapes alone.

Dimensions: B records, M hard negatives a record.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, abstract_decoder
from lco_jax.core.prefixes import Branches
from lco_jax.core.sharding import row_shards
from lco_jax.core.stream_shapes import Shape, width_of
from lco_jax.models.decoder import Decoder
from lco_jax.training import memory, tuning
from lco_jax.training.state import Training
from lco_jax.training.step import contrastive_loss, make_update

PREFIX = 14  # tokens of the prompt that texts share: those of Qwen's template


@dataclass(frozen=True)
class Workload:
    """What a step is given.

    sides: [B, 2 + M]. prefix: the tokens that texts share, as `Prefixes` has them. shape: of
    streams, by chunk_tokens and mesh.
    """

    sides: tuple[int, int]
    prefix: Branches
    shape: Callable[[int, Mesh], Shape]


def even(sides: tuple[int, int], tokens: int) -> Workload:
    """Texts of `tokens` tokens each, the shared prefix among them."""
    rest = max(tokens - PREFIX, 1)

    def shape(chunk_tokens: int, mesh: Mesh) -> Shape:
        texts = math.ceil(sides[0] * sides[1] / row_shards(mesh))
        chunks = math.ceil(texts * rest / chunk_tokens) if chunk_tokens else 1
        texts = math.ceil(texts / chunks)
        rows = {width_of(PREFIX + rest): texts}
        return Shape(PREFIX + texts * rest, rows, chunks)

    return Workload(sides, ((0, 0, PREFIX),), shape)


@dataclass(frozen=True)
class Step:
    """A run's step on a mesh, in shapes. config: the run's."""

    config: ConfigDict
    checkpoint: Checkpoint
    mesh: Mesh
    workload: Workload

    @cached_property
    def training(self) -> Training:
        """What the run trains, and how."""
        steps = self.config["train"]["steps"] or self.config["optimizer"]["warmup_steps"] + 1
        return Training.build(self.config, self.checkpoint, steps, self.mesh)

    @cached_property
    def params(self) -> dict[str, Any]:
        """The model's parameters with shardings. A run on text loads no towers."""
        dtype, quantize = self.config["model"]["dtype"], self.config["model"]["quantize"]
        return {"decoder": abstract_decoder(self.checkpoint, self.mesh, dtype, quantize)}

    @property
    def frozen(self) -> dict[str, Any]:
        """The parameters that the run leaves as they are."""
        return tuning.frozen(self.params, self.training.tune)

    def decoder(self, remat: str = "full") -> Decoder:
        """The model under a remat policy."""
        model = self.config["model"]
        is_trained = self.config["tune"]["decoder"] == "full"
        dtype = jnp.dtype(model["dtype"])
        decoder = Decoder(self.checkpoint.config, dtype, remat, model["attention"], is_trained)
        return decoder.clone(pooling=model["pooling"])

    def shape(self, chunk_tokens: int) -> Shape:
        """The shape of a device's streams."""
        return self.workload.shape(chunk_tokens, self.mesh)

    def batch(self, chunk_tokens: int) -> Any:
        """The batch, as shapes."""
        sides, prefix = self.workload.sides, self.workload.prefix
        objective = self.training.objective
        teacher, guide = bool(objective.teacher), objective.guide_dimension
        shape = self.shape(chunk_tokens)
        return memory.abstract_batch(shape, sides, prefix, self.mesh, None, teacher, guide)

    def candidates(self, backend: str) -> list[memory.Candidate]:
        """What `train` would choose from on such devices."""
        remat = self.config["model"]["remat"]
        chunk_tokens = self.config["train"]["chunk_tokens"]
        tokens = self.shape(max(chunk_tokens, 0)).tokens
        return memory.candidates(remat, chunk_tokens, tokens, backend)

    def rough(self, candidate: memory.Candidate) -> int:
        """An estimate of the bytes that a device needs."""
        return memory.rough_bytes(
            self.checkpoint.config,
            self.training.sharded_abstract,
            self.frozen,
            candidate.remat,
            self.shape(candidate.chunk_tokens).tokens,
            jnp.dtype(self.config["model"]["dtype"]).itemsize,
            self.mesh.shape["tensor"],
        )

    def lower(self, remat: str, chunk_tokens: int) -> jax.stages.Lowered:
        """The update, traced and ready to be compiled for the mesh's devices."""
        training = self.training
        decoder = self.decoder(remat)
        loss = partial(
            contrastive_loss,
            decoder=decoder,
            config=training.lora,
            objective=training.objective,
        )
        update = make_update(loss, training.tx, self.config["seed"], self.mesh, training.shardings)
        # the shapes are made before the mesh of absent devices is set: then nothing can run
        given = training.sharded_abstract, self.frozen, self.batch(chunk_tokens), None
        with jax.set_mesh(self.mesh):
            return update.lower(*given)
