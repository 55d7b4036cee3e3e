"""The training step of a run that does not exist: compiled for devices that are not there, from shapes alone.

Dimensions: B records, M hard negatives a record.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, placed_decoder
from lco_jax.core.packing import Shape, width_of
from lco_jax.core.sharding import row_shards
from lco_jax.models.decoder import Decoder
from lco_jax.training import memory, tuning
from lco_jax.training.state import Training
from lco_jax.training.step import contrastive_loss, make_update

PREFIX = 14  # tokens of the prompt that texts share: those of Qwen's template


@dataclass(frozen=True)
class Workload:
    """What a step is given.

    sides: [B, 2 + M]. prefix: tokens that texts share. shape: of streams, by chunk_tokens and mesh.
    """

    sides: tuple[int, int]
    prefix: int
    shape: Callable[[int, Mesh], Shape]


def even(sides: tuple[int, int], tokens: int) -> Workload:
    """Texts of `tokens` tokens each, the shared prefix among them."""
    own = max(tokens - PREFIX, 1)

    def shape(chunk_tokens: int, mesh: Mesh) -> Shape:
        texts = -(-sides[0] * sides[1] // row_shards(mesh))
        chunks = -(-texts * own // chunk_tokens) if chunk_tokens else 1
        texts = -(-texts // chunks)
        return Shape(PREFIX + texts * own, {width_of(PREFIX + own): texts}, chunks)

    return Workload(sides, PREFIX, shape)


@dataclass(frozen=True)
class Step:
    """A run's step on a mesh, in shapes. config: the run's."""

    config: ConfigDict
    checkpoint: Checkpoint
    mesh: Mesh
    workload: Workload

    @cached_property
    def training(self) -> Training:
        """What the run tunes, and how."""
        steps = self.config["train"]["steps"] or self.config["optimizer"]["warmup_steps"] + 1
        return Training.build(self.config, self.checkpoint, steps, self.mesh)

    @cached_property
    def params(self) -> dict[str, Any]:
        """The model's, placed; of towers a run on text loads none."""
        model = self.config["model"]
        return {
            "decoder": placed_decoder(self.checkpoint, self.mesh, model["dtype"], model["quantize"])
        }

    @property
    def frozen(self) -> dict[str, Any]:
        """The parameters that the run leaves as they are."""
        return tuning.frozen(self.params, self.training.tune)

    def decoder(self, remat: str = "full") -> Decoder:
        """The model under a remat policy."""
        model, tuned = self.config["model"], self.config["tune"]["decoder"] == "full"
        dtype = jnp.dtype(model["dtype"])
        return Decoder(self.checkpoint.config, dtype, dtype, remat, model["attention"], tuned)

    def shape(self, chunk_tokens: int) -> Shape:
        """Of a device's streams."""
        return self.workload.shape(chunk_tokens, self.mesh)

    def batch(self, chunk_tokens: int) -> Any:
        """The batch, as shapes."""
        given = self.shape(chunk_tokens), self.workload.sides, self.workload.prefix
        return memory.abstract_batch(*given, self.mesh)

    def candidates(self, chunk_tokens: int, backend: str) -> list[memory.Candidate]:
        """What `train` would choose from on such devices. chunk_tokens: as the configuration has it."""
        remat = self.config["model"]["remat"]
        return memory.candidates(
            remat, chunk_tokens, self.shape(max(chunk_tokens, 0)).tokens, backend
        )

    def rough(self, one: memory.Candidate) -> int:
        """About the bytes of a device."""
        itemsize, tensor = (
            jnp.dtype(self.config["model"]["dtype"]).itemsize,
            self.mesh.shape["tensor"],
        )
        tokens, state = self.shape(one.chunk_tokens).tokens, self.training.sharded_abstract
        return memory.rough_bytes(
            self.checkpoint.config, state, self.frozen, one.remat, tokens, itemsize, tensor
        )

    def lower(self, remat: str, chunk_tokens: int) -> jax.stages.Lowered:
        """The update, traced and ready to be compiled for the mesh's devices."""
        training, train = self.training, self.config["train"]
        keys = "temperature", "ignore_duplicates", "two_way"
        options = {key: train[key] for key in keys}
        decoder = self.decoder(remat)
        loss = partial(contrastive_loss, decoder=decoder, config=training.lora, **options)
        update = make_update(loss, training.tx, self.config["seed"], self.mesh, training.shardings)
        given = (
            training.sharded_abstract,
            self.frozen,
            self.batch(chunk_tokens),
            None,
        )  # made before nothing can run any more
        with jax.set_mesh(self.mesh):
            return update.lower(*given)
