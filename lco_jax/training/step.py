"""The training steps, contrastive and generative: a loss, its gradient, an update.

Dimensions: C chunks, R streams, T tokens, S sequences and A answer tokens of a stream, B records,
M hard negatives a record, P shards of the streams, D hidden.
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
from lco_jax.core.packing import Answers, Batch, PackedTokens
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import constrain, current_row_shards, replicated
from lco_jax.core.weights import GOLDEN_RATIO
from lco_jax.models.decoder import Decoder
from lco_jax.models.head import head_of, token_losses
from lco_jax.models.model import MediaPrograms, Model
from lco_jax.models.pooling import embed
from lco_jax.models.streams import take
from lco_jax.training import tuning
from lco_jax.training.objective import Labels, LossConfig, contrastive
from lco_jax.training.optimizer import Optimizer
from lco_jax.training.state import State

Params = dict[str, Any]
Metrics = dict[str, Array]
Loss = Callable[..., tuple[Array, Metrics]]  # of (tuned, params, batch, media, seed=…)


# ---- the losses


def contrastive_loss(
    tuned: Params,
    params: Params,
    batch: Batch,
    media: Array | None,
    decoder: Decoder,
    config: lora.LoraConfig,
    objective: LossConfig,
    seed: Array | int,
) -> tuple[Array, Metrics]:
    """`contrastive` of a global batch under the trainable parameters `tuned` and frozen `params`.

    media: the batch's media tokens. seed: the step's dropout key.
    """
    tuned_params = tuning.attach(params, tuned, config)
    labels = Labels(batch.sequences >= 0, batch.content, batch.kinds, batch.teacher)
    seeded = replace(batch, tokens=batch.tokens.with_seed(seed))
    embeddings = _by_record(decoder, tuned_params, seeded, media)
    guide = batch.guide
    if objective.false_negatives == "base":
        guide = jax.lax.stop_gradient(_by_record(decoder, params, batch, media))
    return contrastive(embeddings, labels, objective, tuned.get("log_temperatures"), guide)


def _by_record(decoder: Decoder, params: Params, batch: Batch, media: Array | None) -> Array:
    """The embeddings of each record's contents: [B, 2 + M, D]."""
    embeddings = embed_chunks(decoder, params, batch.tokens, media)
    embeddings = embeddings.reshape(-1, embeddings.shape[-1])
    embeddings = constrain(embeddings)  # every device needs every candidate
    return embeddings[jnp.maximum(batch.sequences, 0)]


def generative_loss(
    tuned: Params,
    params: Params,
    batch: Batch,
    media: Array | None,
    model: Model,
    config: lora.LoraConfig,
    seed: Array | int,
) -> tuple[Array, Metrics]:
    """-log p of the answers' tokens, in nats, the mean over those of the global batch.

    media: the media tokens of frozen towers; None where the loss runs the towers, so that gradients
    reach their trainable parameters.
    """
    params = tuning.attach(params, tuned, config)
    if media is None:
        media = model.media_tokens(params, batch.media, current_row_shards())

    def chunk_losses(chunk: tuple[PackedTokens, Answers]) -> Array:
        tokens, answers = chunk
        states = model.decoder.apply({"params": params["decoder"]}, tokens, media, "tokens")
        states = take(states, jnp.maximum(answers.at, 0))
        return token_losses(states, head_of(params), answers.ids)

    losses = in_chunks(chunk_losses, (batch.tokens.with_seed(seed), batch.answers))  # [C, R, A]
    loss = losses.sum() / jnp.sum(batch.answers.ids >= 0)
    by_record = _mean_by_record(losses, batch.answers.record, len(batch.sequences))
    return loss, {"loss": loss, "record_losses": by_record}


def _mean_by_record(losses: Array, record: Array, records: int) -> Array:
    """Tokens' losses -> [B]; -inf for a record without tokens. record: whose each is, or -1."""
    record = jnp.where(record < 0, records, record)  # padding goes to a record of its own
    zeros = jnp.zeros(records + 1)
    sums = zeros.at[record].add(losses)[:-1]
    counts = zeros.at[record].add(1.0)[:-1]
    return jnp.where(counts > 0, sums / jnp.maximum(counts, 1), -jnp.inf)


def embed_chunks(
    decoder: Decoder, params: Params, tokens: PackedTokens, media: Array | None = None
) -> Array:
    """Streams [C, R, T] and their media tokens [P, M, D] -> embeddings [C, R, S, D]."""
    return in_chunks(partial(embed, decoder, params, media=media), tokens)


def in_chunks(function: Callable[[Any], Array], chunks: Any) -> Array:
    """`function` of every chunk (leading axis C of each array), one in memory at a time: [C, …].

    GradCache (Gao et al. 2021, arXiv 2101.06983) as a scan over checkpointed chunks: the forward
    pass stores results only, the backward pass recomputes one chunk at a time, and the gradients
    are exact.
    """
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        only = jax.tree.map(lambda x: x[0], chunks)
        return function(only)[None]
    return jax.lax.map(jax.checkpoint(function), chunks)


# ---- the update


def make_update(
    loss: Loss, tx: Optimizer, seed: int, mesh: Mesh, state_sharding: State
) -> jax.stages.Wrapped:
    """(state, frozen parameters, batch, media tokens) -> (state, metrics), jitted.

    The state is donated. A step whose loss or gradient is not finite changes nothing but the step
    count, and `metrics["finite"]` is False. It does not advance the schedule either, whose rate at
    this step is `metrics["learning_rate"]`. `metrics["record_losses"]`: [B], as of `info_nce`.
    """

    def update(
        state: State, params: Params, batch: Batch, media: Array | None
    ) -> tuple[State, Metrics]:
        batch = batch.gathered(jax.process_count())
        step_loss = partial(loss, seed=_dropout_seed(seed, state["step"]))
        gradient = jax.value_and_grad(step_loss, has_aux=True)
        (value, metrics), grads = gradient(state["tuned"], params, batch, media)
        norm = optax.tree.norm(grads)
        finite = jnp.isfinite(value) & jnp.isfinite(norm)
        metrics["grad_norm"] = norm
        metrics["finite"] = finite
        metrics["tokens"] = sum(jnp.sum(group >= 0) for group in batch.tokens.rows)
        metrics["learning_rate"] = tx.rate(state["optimizer"])
        return _next_state(state, grads, finite, tx), metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(state_sharding, replicated(mesh)))


def _dropout_seed(seed: int, step: Array) -> Array:
    """uint32, another one for every step."""
    return jnp.uint32(seed) + step.astype(jnp.uint32) * jnp.uint32(GOLDEN_RATIO)


def _next_state(state: State, grads: Params, finite: Array, tx: Optimizer) -> State:
    """The state after a step, updated only if the step is `finite`."""
    updates, optimizer = tx.update(grads, state["optimizer"], state["tuned"])
    new = {"tuned": optax.apply_updates(state["tuned"], updates), "optimizer": optimizer}
    old = {key: state[key] for key in new}
    kept = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
    return {"step": state["step"] + 1, **kept}


class Step:
    """(state, frozen parameters, batch) -> (state, metrics). Call it inside `jax.set_mesh(mesh)`.

    Frozen `towers` run in programs of their own: no chunk's backward pass repeats them, and the
    shapes of media and of rows, which vary independently, are compiled separately.
    """

    def __init__(self, name: str, update: jax.stages.Wrapped, towers: MediaPrograms | None):
        self.update = update
        self.towers = towers
        self.shapes = ShapeLog(name)

    def __call__(self, state: State, params: Params, batch: Batch) -> tuple[State, Metrics]:
        """One step; the state is donated."""
        media = None if self.towers is None else self.towers(params, batch.media)
        params, batch = self._without_towers(params, batch)
        self.shapes.note(batch, media)
        state, metrics = self.update(state, params, batch, media)
        programs = len(self.shapes) + (0 if self.towers is None else len(self.towers))
        return state, {**metrics, "programs": programs}

    def lower(self, state: Any, params: Params, batch: Batch) -> jax.stages.Lowered:
        """The update's program, ready to be compiled, for arrays or for shapes with shardings."""
        media = None if self.towers is None else self.towers.abstract(params, batch.media)
        return self.update.lower(state, *self._without_towers(params, batch), media)

    def _without_towers(self, params: Params, batch: Batch) -> tuple[Params, Batch]:
        """The parameters and the batch as the update takes them."""
        if self.towers is None:
            return params, batch
        params = {part: tree for part, tree in params.items() if part not in self.towers.shapes}
        return params, replace(batch, media={})


def make_train_step(
    model: Model,
    tx: Optimizer,
    config: lora.LoraConfig,
    objective: LossConfig,
    seed: int,
    mesh: Mesh,
    state_sharding: State,
) -> Step:
    """The contrastive step."""
    loss = partial(
        contrastive_loss,
        decoder=model.decoder,
        config=config,
        objective=objective,
    )
    update = make_update(loss, tx, seed, mesh, state_sharding)
    return Step("training step", update, MediaPrograms(model, mesh))


def make_pretrain_step(
    model: Model,
    tx: Optimizer,
    config: lora.LoraConfig,
    seed: int,
    mesh: Mesh,
    state_sharding: State,
    trains_towers: bool = False,
) -> Step:
    """The generative step. trains_towers: the towers are part of it, and gradients reach them."""
    loss = partial(generative_loss, model=model, config=config)
    update = make_update(loss, tx, seed, mesh, state_sharding)
    towers = None if trains_towers else MediaPrograms(model, mesh)
    return Step("pretraining step", update, towers)
