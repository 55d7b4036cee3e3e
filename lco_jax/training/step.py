"""The training step: embed, compare, differentiate, update. One jitted, donated function on a mesh.

Dimensions: C GradCache chunks, R streams, S sequences of a stream, B records, M hard negatives a record, D hidden.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array
from jax.sharding import Mesh

from lco_jax.core import lora
from lco_jax.core.packing import Batch, PackedTokens
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import constrain, replicated, shardings
from lco_jax.core.weights import GOLDEN_RATIO
from lco_jax.models.decoder import Decoder, embed
from lco_jax.models.model import MediaPrograms, Model
from lco_jax.training.losses import by_record, info_nce, takes_ring, whole

State = dict[str, Any]  # {"step": int32, "adapters": tree, "optimizer": optax state}; all of it is checkpointed
Step = Callable[[State, dict[str, Any], Batch], tuple[State, dict[str, Array]]]


def init_state(adapters: dict[str, Any], tx: optax.GradientTransformation) -> State:
    """Step 0 of a run. Jit it with `out_shardings` from `state_shardings` to have it on a mesh."""
    return {"step": jnp.int32(0), "adapters": adapters, "optimizer": tx.init(adapters)}


def state_shardings(adapters: dict[str, Any], tx: optax.GradientTransformation, mesh: Mesh) -> State:
    """A sharding for every leaf of the state (`jit` of `tx.init` alone would drop them)."""
    by_rule = shardings(adapters, mesh)
    moments = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, adapters),
        by_rule,
        transform_non_params=lambda _: replicated(mesh),
    )
    return {"step": replicated(mesh), "adapters": by_rule, "optimizer": moments}


def embed_chunks(decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None) -> Array:
    """Streams of [C, R, T] and their media tokens [P, M, D] -> embeddings [C, R, S, D], one chunk in memory at a time.

    GradCache (Gao et al. 2021, arXiv 2101.06983) as a scan over checkpointed chunks: the forward pass keeps embeddings
    only, the backward pass recomputes one chunk at a time, and the gradients are exact.
    """
    one = partial(embed, decoder, params, media=media)
    if tokens.input_ids.shape[0] == 1:
        return one(tokens.map(lambda x: x[0]))[None]
    return jax.lax.map(jax.checkpoint(one), tokens)


def contrastive_loss(
    adapters: dict[str, Any],
    params: dict[str, Any],
    batch: Batch,
    media: Array | None,
    decoder: Decoder,
    config: lora.LoraConfig,
    temperature: float,
    seed: Array | int,
    ignore_duplicates: bool = False,
    candidates: str = "auto",
) -> tuple[Array, dict[str, Array]]:
    """InfoNCE of a global batch under `adapters`.

    params: the decoder's; media: what its towers made of the batch; seed: the step's dropout key; candidates: gathered
    or left split, as `takes_ring` has it.
    """
    embeddings = embed_chunks(decoder, lora.attach(params, adapters, config, seed), batch.tokens, media)
    sequences, content, hidden = batch.sequences, batch.content, embeddings.shape[-1]
    ring = takes_ring(candidates, sequences[:, 1:].size, hidden)
    if ring:
        sequences, content = whole(sequences, -1), whole(content)
        sides = by_record(embeddings, sequences)
    else:
        flat = constrain(embeddings.reshape(-1, hidden))  # every device needs every candidate
        sides = flat[jnp.maximum(sequences, 0)]
    return info_nce(sides, sequences >= 0, temperature, content if ignore_duplicates else None, ring=ring)


def make_train_step(
    model: Model,
    tx: optax.GradientTransformation,
    config: lora.LoraConfig,
    temperature: float,
    seed: int,
    mesh: Mesh,
    state_sharding: State,
    ignore_duplicates: bool = False,
    candidates: str = "auto",
) -> Step:
    """(state, frozen parameters, batch) -> (state, metrics). Call it inside `jax.set_mesh(mesh)`.

    A step whose loss or gradient is not finite changes nothing but the step count, and says so in `metrics["finite"]`.
    Towers are frozen and run in a program of their own: no chunk's backward pass repeats them, and the shapes of media
    and of rows, which vary apart, are compiled apart.
    """

    def update(
        state: State, params: dict[str, Any], batch: Batch, media: Array | None
    ) -> tuple[State, dict[str, Array]]:
        dropout_seed = jnp.uint32(seed) + state["step"].astype(jnp.uint32) * jnp.uint32(GOLDEN_RATIO)
        loss = partial(
            contrastive_loss,
            decoder=model.decoder,
            config=config,
            temperature=temperature,
            seed=dropout_seed,
            ignore_duplicates=ignore_duplicates,
            candidates=candidates,
        )
        (_, metrics), grads = jax.value_and_grad(loss, has_aux=True)(state["adapters"], params, batch, media)
        norm = optax.tree.norm(grads)
        updates, optimizer = tx.update(grads, state["optimizer"], state["adapters"])
        new = {"adapters": optax.apply_updates(state["adapters"], updates), "optimizer": optimizer}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        old = {key: state[key] for key in new}
        kept = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        tokens = sum(jnp.sum(group >= 0) for group in batch.tokens.rows)
        return {"step": state["step"] + 1, **kept}, {**metrics, "grad_norm": norm, "finite": finite, "tokens": tokens}

    update = jax.jit(update, donate_argnums=0, out_shardings=(state_sharding, replicated(mesh)))
    towers, shapes = MediaPrograms(model, mesh), ShapeLog("training step")

    def train_step(state: State, params: dict[str, Any], batch: Batch) -> tuple[State, dict[str, Array]]:
        media = towers(params, batch.media)
        batch = replace(batch, media={})
        shapes.note(batch, media)
        state, metrics = update(state, params["decoder"], batch, media)
        return state, {**metrics, "programs": len(towers) + len(shapes)}

    return train_step
