"""Our side of a duel: a process that trains or encodes on command, by the protocol of `duel.py`."""

import sys

sys.modules["torch"] = (
    None  # as on a machine without it: transformers would import it, and we never use it
)
from transformers.utils import is_torch_available

assert not is_torch_available()  # which it remembers
del sys.modules["torch"]

import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.data import read_triplets
from benchmarks.duel import peak_memory, serve
from benchmarks.flops import Work, forward_flops, step_flops
from benchmarks.presets import LORA, ON_DEVICE, PRESETS
from lco_jax import OmniEmbedder, make_mesh
from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.checkpoint.peft import layer_tensors, read_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.packing import Batch
from lco_jax.core.prefixes import Prefixes, common_length
from lco_jax.core.quantize import quantize
from lco_jax.core.sharding import shardings
from lco_jax.data import pipeline
from lco_jax.data.layouts import floor_of
from lco_jax.data.positions import line_positions
from lco_jax.data.processor import Processor
from lco_jax.data.records import TEXT
from lco_jax.data.tower_rows import Processed
from lco_jax.models.decoder import Decoder
from lco_jax.models.model import Model
from lco_jax.training import tuning
from lco_jax.training.objective import LossConfig
from lco_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from lco_jax.training.state import init_state, state_shardings
from lco_jax.training.step import contrastive_loss, embed_chunks, make_train_step

TEMPERATURE = 0.03


def open_model(
    spec: dict[str, Any], mesh: jax.sharding.Mesh
) -> tuple[Model, dict[str, Any], Processor]:
    """From the checkpoint on disk, or drawn on the device."""
    settings = {"remat": spec["remat"], "attention": spec["attention"]}
    if spec["preset"] in ON_DEVICE:
        config, dtype = PRESETS[spec["preset"]].decoder, jnp.dtype(spec["dtype"])
        params = {"decoder": _draw(abstract_params(config, dtype), spec["quantize"])}
        model = Model(Decoder(config, dtype, **settings), {})
        return model, params, Processor(builtin.build())
    checkpoint = open_checkpoint(spec["checkpoint"])
    settings["quantize"] = spec["quantize"]
    model, params = load_model(checkpoint, mesh, spec["dtype"], (), **settings)
    return model, params, Processor(checkpoint.folder)


def _draw(shapes: dict[str, Any], kind: str) -> dict[str, Any]:
    """Random parameters; the layers' matrices quantised as `kind` says, "" for not at all."""

    def draw(key: jax.Array, leaf: jax.ShapeDtypeStruct) -> Any:
        value = 0.02 * jax.random.normal(key, leaf.shape, leaf.dtype)
        if kind and len(leaf.shape) == 3:
            return jax.lax.map(lambda w: quantize(w, kind), value)
        return value

    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = []
    for key, leaf in zip(keys, leaves, strict=True):
        drawn.append(jax.jit(partial(draw, leaf=leaf))(key))
    return tree.unflatten(drawn)


def one_mesh() -> jax.sharding.Mesh:
    """All accelerators, or one CPU device with all cores."""
    return make_mesh(devices=jax.devices()[:1] if jax.default_backend() == "cpu" else None)


def unit(x: np.ndarray) -> np.ndarray:
    """Rows of unit length."""
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def prepared(ids: list[int]) -> Processed:
    """One text, as the processor would hand it over."""
    return Processed(np.array(ids, np.int32), line_positions(0, len(ids)))


class Training:
    """A step a round, over the same batches as the peer's."""

    def __init__(self, spec: dict[str, Any]):
        self.spec = spec
        self.done = 0
        self.work: Work | None = None
        self.mesh = one_mesh()
        self.triplets = read_triplets(Path(spec["data"]))
        self.model, self.params, self.processor = open_model(spec, self.mesh)
        self.config = lora.LoraConfig(LORA.rank, LORA.alpha, spec["dropout"])
        tx = make_optimizer(OptimizerConfig(schedule="constant"), 10**9)
        self.tuned, places = self._begin(tx)
        with jax.set_mesh(self.mesh):
            init = jax.jit(lambda tuned: init_state(tuned, tx), out_shardings=places)
            self.state = init(self.tuned)
        self.step = make_train_step(
            self.model, tx, self.config, LossConfig(TEMPERATURE), 0, self.mesh, places
        )
        self.layout = self._layout()

    def _layout(self) -> pipeline.Layout:
        """Of the batches: what the first two texts begin with in common is their prefix."""
        first, other = (np.array(self.triplets[i][i], np.int32) for i in (0, 1))
        prefix = Prefixes.of(first[: common_length(first, other)])
        layout = pipeline.Layout(self.spec["batch"], 1, prefix, self.spec["chunk_tokens"])
        sample = [self.local(k) for k in range(8)]
        return floor_of(sample, layout, self.processor, self.mesh)

    def _begin(self, tx: Optimizer) -> tuple[dict[str, Any], dict[str, Any]]:
        """The adapter of step 0, and the shardings of the state."""

        def fresh(key: jax.Array) -> dict[str, Any]:
            shapes = abstract_params(self.model.decoder.config)
            return {"decoder": lora.init(key, shapes, LORA)}

        shapes = jax.eval_shape(fresh, jax.random.key(0))
        places = state_shardings(shapes, tx, self.mesh)
        if self.spec["adapter"]:
            adapter = {"decoder": read_peft(self.spec["adapter"])[0]}
            return jax.device_put(adapter, shardings(shapes, self.mesh)), places
        return jax.jit(fresh)(jax.random.key(0)), places

    def local(self, k: int) -> pipeline.LocalBatch:
        """Batch k, which the peer reads alike."""
        size = self.spec["batch"]
        rows = [self.triplets[(k * size + i) % len(self.triplets)] for i in range(size)]
        inputs = [prepared(ids) for triplet in rows for ids in triplet]
        record, side = np.repeat(np.arange(size), 3), np.tile(np.arange(3), size)
        return pipeline.LocalBatch(
            inputs,
            record,
            side,
            content=np.arange(3 * size, dtype=np.int32),
            kinds=np.full(3 * size, TEXT, np.int32),
            teacher=np.full(3 * size, np.nan, np.float32),
        )

    def batch(self, k: int) -> Batch:
        batch = pipeline.global_batch(self.local(k), self.layout, self.processor.rows, self.mesh)
        chunks, streams, tokens = batch.tokens.input_ids.shape
        all_streams = chunks * streams
        rows = {group.shape[-1]: all_streams * group.shape[-2] for group in batch.tokens.rows}
        self.work = Work(
            all_streams * tokens, all_streams * batch.tokens.last_tokens.shape[-1], rows
        )
        return batch

    def round(self) -> dict[str, Any]:
        """One step: packing, forward, backward, update."""
        with jax.set_mesh(self.mesh):
            start = time.perf_counter()
            batch = self.batch(self.done)
            self.state, metrics = self.step(self.state, self.params, batch)
            metrics = jax.device_get(metrics)
            seconds = time.perf_counter() - start
        self.done += 1
        real = int(sum((np.asarray(group) >= 0).sum() for group in batch.tokens.rows))
        return {
            "seconds": seconds,
            "loss": float(metrics["loss"]),
            "tokens": real,
            "programs": metrics["programs"],
        }

    def check(self, path: str) -> dict[str, Any]:
        """Embeddings and adapter gradients of the first batch, to compare number by number."""
        batch = self.batch(0)
        with jax.set_mesh(self.mesh):
            loss = jax.jit(
                jax.value_and_grad(partial(_loss, self.model.decoder, self.config), has_aux=True)
            )
            (value, embeddings), grads = loss(self.tuned, self.params, batch)
        named = {}
        for layer, module, a, b in layer_tensors(jax.device_get(grads["decoder"])):
            named |= {f"{layer}.{module}.A": a, f"{layer}.{module}.B": b}
        np.savez(path, loss=float(value), embeddings=np.asarray(embeddings), **named)
        return {}

    def finish(self) -> dict[str, Any]:
        """What is told at the end."""
        config = PRESETS[self.spec["preset"]].decoder
        flops = step_flops(config, LORA.rank, self.work, self.spec["remat"])
        if self.spec["chunk_tokens"]:  # GradCache: every chunk forwards once more
            flops += forward_flops(config, LORA.rank, self.work)
        return {"flops": flops, "stream_tokens": self.work.tokens, "last_tokens": self.work.last,
                "rows": self.work.rows, **peak_memory()}  # fmt: skip


def _loss(
    decoder: Decoder, config: lora.LoraConfig, tuned: Any, params: Any, batch: Batch
) -> tuple:
    """The loss, and the embeddings that it was made of."""
    loss, _ = contrastive_loss(
        tuned, params, batch, None, decoder, config, LossConfig(TEMPERATURE), 0
    )
    embeddings = embed_chunks(decoder, tuning.attach(params, tuned, config), batch.tokens)
    return loss, embeddings.reshape(-1, embeddings.shape[-1])[batch.sequences]


class Encoding:
    """All texts a round; adapters merged, as an embedder has them."""

    def __init__(self, spec: dict[str, Any]):
        mesh = one_mesh()
        if spec["preset"] in ON_DEVICE:
            model, params, processor = open_model({**spec, "remat": "none"}, mesh)
            self.embedder = OmniEmbedder(model, params, processor, mesh)
        else:
            options = {
                "quantize": spec["quantize"],
                "attention": spec["attention"],
                "modalities": ("text",),
            }
            self.embedder = OmniEmbedder.from_pretrained(
                spec["checkpoint"], spec["adapter"] or None, spec["dtype"], mesh, **options
            )
        texts = [ids for triplet in read_triplets(Path(spec["data"])) for ids in triplet][
            : spec["batch"]
        ]
        self.ready = [prepared(ids) for ids in texts]

    def round(self) -> dict[str, Any]:
        """Packing, forward passes, vectors on the host."""
        start = time.perf_counter()
        unit(self.embedder.embed(self.ready)).astype(np.float16)
        return {"seconds": time.perf_counter() - start, "tokens": sum(map(len, self.ready)),
                "programs": len(self.embedder.decoder_shapes)}  # fmt: skip

    def check(self, path: str) -> dict[str, Any]:
        """The embeddings."""
        np.savez(path, embeddings=unit(self.embedder.embed(self.ready)))
        return {}

    def finish(self) -> dict[str, Any]:
        """What is told at the end."""
        return peak_memory()


SIDES: dict[str, Callable[[dict[str, Any]], Any]] = {"train": Training, "encode": Encoding}

if __name__ == "__main__":
    serve(SIDES, sys.argv[1])
