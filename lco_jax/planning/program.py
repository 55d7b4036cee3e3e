"""The training step of a run that does not exist: compiled for devices that are not there, from shapes alone.

Dimensions: B records, M hard negatives a record.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, placed_decoder
from lco_jax.core.packing import Shape, width_of
from lco_jax.core.sharding import row_shards
from lco_jax.models.decoder import Decoder
from lco_jax.models.model import Model
from lco_jax.planning import hlo
from lco_jax.planning.hardware import Hardware
from lco_jax.training import memory, tuning
from lco_jax.training.run import Training
from lco_jax.training.step import contrastive_loss, make_update

# XLA's CPU programs widen what is bfloat16 before they compute, and would hoist that of all weights and activations out
# of the loop over layers. Machine code, which nobody runs, is not optimised: buffers are the same.
OPTIONS = {"xla_disable_hlo_passes": "while-loop-invariant-code-motion", "xla_backend_optimization_level": "0"}
HEAD = 14  # tokens of the prompt that texts share: those of Qwen's template


@dataclass(frozen=True)
class Workload:
    """What a step is given. sides: [B, 2 + M]. head: tokens that texts share. shape: of streams, by chunk and mesh."""

    sides: tuple[int, int]
    head: int
    shape: Callable[[int, Mesh], Shape]


def even(sides: tuple[int, int], tokens: int) -> Workload:
    """Texts of `tokens` tokens each, the shared head among them."""
    own = max(tokens - HEAD, 1)

    def shape(chunk_tokens: int, mesh: Mesh) -> Shape:
        texts = -(-sides[0] * sides[1] // row_shards(mesh))
        chunks = -(-texts * own // chunk_tokens) if chunk_tokens else 1
        texts = -(-texts // chunks)
        return Shape(HEAD + texts * own, {width_of(HEAD + own): texts}, chunks)

    return Workload(sides, HEAD, shape)


@dataclass(frozen=True)
class Step:
    """A run's step on a mesh, in shapes. config: the run's."""

    config: ConfigDict
    checkpoint: Checkpoint
    mesh: Mesh
    hardware: Hardware
    workload: Workload

    @cached_property
    def training(self) -> Training:
        steps = self.config["train"]["steps"] or self.config["optimizer"]["warmup_steps"] + 1
        return Training.build(self.config, self.checkpoint, steps, self.mesh)

    @cached_property
    def params(self) -> dict[str, Any]:
        """The model's, placed; of towers a run on text loads none."""
        model = self.config["model"]
        return {"decoder": placed_decoder(self.checkpoint, self.mesh, model["dtype"], model["quantize"])}

    def decoder(self, remat: str = "full") -> Decoder:
        dtype = jnp.dtype(self.config["model"]["dtype"])
        return Decoder(self.checkpoint.config, dtype, dtype, remat, tuned=self.config["tune"]["decoder"] == "full")

    def shape(self, chunk_tokens: int) -> Shape:
        return self.workload.shape(chunk_tokens, self.mesh)

    def choose(self, chunk_tokens: int) -> memory.Choice:
        """Policy and chunk as `train` would choose them there; chunk_tokens as it has it. Raises where none fits."""
        there = int(self.hardware.memory * (1 - memory.MARGIN))
        given = self.params, self.training, self.mesh, self.workload.sides, self.shape
        config = {"model": self.config["model"], "train": {"chunk_tokens": chunk_tokens}}
        return memory.choose_for(config, Model(self.decoder(), {}), *given, there=there, backend=self.hardware.backend)

    def compile(self, remat: str, chunk_tokens: int) -> tuple[dict[str, int], hlo.Counts]:
        """(bytes of a device by kind, what it does in a step)."""
        training, mesh, shape = self.training, self.mesh, self.shape(chunk_tokens)
        state, frozen = training.placed, tuning.frozen(self.params, training.tune)
        batch = memory.abstract_batch(shape, self.workload.sides, self.workload.head, mesh)
        train = self.config["train"]
        options = {key: train[key] for key in ("temperature", "ignore_duplicates", "candidates", "two_way")}
        loss = partial(contrastive_loss, decoder=self.decoder(remat), config=training.lora, **options)
        update = make_update(loss, training.tx, self.config["seed"], mesh, training.shardings)
        with jax.set_mesh(mesh):
            counts, compiled = compile_split(update.lower(state, frozen, batch, None), mesh, self.hardware.domain)
        found, dtype = compiled.memory_analysis(), self.config["model"]["dtype"]
        besides = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
        decoder, settings = self.checkpoint.config, training.lora
        held = memory.resident_bytes(self.params, training, decoder, mesh, self.workload.sides, 0)
        held -= memory.held_bytes((self.params, state))
        there = shape, dtype, settings.rank, settings.dropout, mesh.shape["tensor"], self.hardware.backend
        active = memory.activation_bytes(decoder, remat, *there)
        activations = besides * active // (active + held)  # XLA does not say which is which
        return {
            "weights": memory.held_bytes(frozen), "adapters": memory.held_bytes(state["tuned"]),
            "optimiser": memory.held_bytes(state["optimizer"]), "batch": memory.held_bytes(batch),
            "activations": activations, "temporaries": besides - activations,
        }, counts  # fmt: skip


def compile_split(lowered: Any, mesh: Mesh, domain: int = 2**31) -> tuple[hlo.Counts, Any]:
    """(what one device does, compiled). What is counted is the program as XLA writes it down once it is split."""
    with tempfile.TemporaryDirectory(prefix="lco_jax_plan_") as folder:
        compiled = lowered.compile({**OPTIONS, "xla_dump_to": folder, "xla_dump_hlo_pass_re": "spmd-partitioning"})
        split = [path.read_text(encoding="utf-8") for path in Path(folder).glob("*after_spmd-partitioning*.txt")]
    (text,) = split or [lowered.as_text(dialect="hlo")]  # of one device there is nothing to split
    return hlo.count(text, dict(mesh.shape), domain), compiled
