"""The training steps, contrastive and generative: a loss, its gradient, an update. One jitted, donated function each.

Dimensions: C chunks, R streams, T tokens, S sequences and A answer tokens of a stream, B records, M hard negatives a
record, P shards of the streams, D hidden.
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
from lco_jax.core.sharding import constrain, current_row_shards, replicated, shardings
from lco_jax.core.weights import GOLDEN_RATIO
from lco_jax.models.decoder import Decoder, embed
from lco_jax.models.head import head_of, token_losses
from lco_jax.models.model import MediaPrograms, Model
from lco_jax.models.streams import take
from lco_jax.training import tuning
from lco_jax.training.losses import by_record, info_nce, takes_ring, whole
from lco_jax.training.optimizer import Optimizer

State = dict[
    str, Any
]  # {"step": int32, "tuned": tree, "optimizer": optax state}; all of it is checkpointed
Loss = Callable[
    ..., tuple[Array, dict[str, Array]]
]  # (tuned, params, batch, media, seed=) -> loss and metrics
Update = jax.stages.Wrapped  # a jitted (state, params, batch, media) -> (state, metrics)


def init_state(tuned: dict[str, Any], tx: Optimizer) -> State:
    """Step 0 of a run. Jit it with `out_shardings` from `state_shardings` to have it on a mesh."""
    return {"step": jnp.int32(0), "tuned": tuned, "optimizer": tx.init(tuned)}


def state_shardings(tuned: dict[str, Any], tx: Optimizer, mesh: Mesh) -> State:
    """A sharding for every leaf of the state (`jit` of `tx.init` alone would drop them)."""
    by_rule = shardings(tuned, mesh)
    moments = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, tuned),
        by_rule,
        transform_non_params=lambda _: replicated(mesh),
    )
    return {"step": replicated(mesh), "tuned": by_rule, "optimizer": moments}


def in_chunks(one: Callable[[Any], Array], chunks: Any) -> Array:
    """`one` of every chunk (leading axis C of each array), one in memory at a time: [C, …].

    GradCache (Gao et al. 2021, arXiv 2101.06983) as a scan over checkpointed chunks: the forward pass keeps results
    only, the backward pass recomputes one chunk at a time, and the gradients are exact.
    """
    if jax.tree.leaves(chunks)[0].shape[0] == 1:
        return one(jax.tree.map(lambda x: x[0], chunks))[None]
    return jax.lax.map(jax.checkpoint(one), chunks)


def embed_chunks(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None = None
) -> Array:
    """Streams of [C, R, T] and their media tokens [P, M, D] -> embeddings [C, R, S, D]."""
    return in_chunks(partial(embed, decoder, params, media=media), tokens)


def contrastive_loss(
    tuned: dict[str, Any],
    params: dict[str, Any],
    batch: Batch,
    media: Array | None,
    decoder: Decoder,
    config: lora.LoraConfig,
    temperature: float,
    seed: Array | int,
    ignore_duplicates: bool = False,
    candidates: str = "auto",
    two_way: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """InfoNCE of a global batch under what is `tuned` of `params`.

    media: what the towers made of the batch; seed: the step's dropout key; candidates: gathered or left split, as
    `takes_ring` has it; two_way: the mean of this and of the loss of each positive among all anchors (CLIP's, Radford
    et al. 2021, arXiv 2103.00020).
    """
    tokens = batch.tokens.with_seed(seed)
    embeddings = embed_chunks(decoder, tuning.attach(params, tuned, config), tokens, media)
    sequences, content, hidden = batch.sequences, batch.content, embeddings.shape[-1]
    ring = takes_ring(candidates, sequences[:, 1:].size, hidden)
    if ring:
        sequences, content = whole(sequences, -1), whole(content)
        sides = by_record(embeddings, sequences)
    else:
        flat = constrain(embeddings.reshape(-1, hidden))  # every device needs every candidate
        sides = flat[jnp.maximum(sequences, 0)]
    present, content = sequences >= 0, content if ignore_duplicates else None
    loss, metrics = info_nce(sides, present, temperature, content, ring=ring)
    if two_way:
        turned = [None if x is None else x[:, 1::-1] for x in (sides, present, content)]
        back, others = info_nce(turned[0], turned[1], temperature, turned[2], ring=ring)
        loss, metrics["rows"] = (loss + back) / 2, (metrics["rows"] + others["rows"]) / 2
    return loss, {**metrics, "loss": loss, "rows": metrics["rows"][: len(batch.sequences)]}


def generative_loss(
    tuned: dict[str, Any],
    params: dict[str, Any],
    batch: Batch,
    media: Array | None,
    model: Model,
    config: lora.LoraConfig,
    seed: Array | int,
) -> tuple[Array, dict[str, Array]]:
    """-log p of the answers' tokens, in nats, the mean over those of the global batch, under what is `tuned`.

    media: what frozen towers made of the batch; None where the loss runs them, and gradients reach what is tuned there.
    """
    params = tuning.attach(params, tuned, config)
    if media is None:
        media = model.media_tokens(params, batch.media, current_row_shards())

    def one(chunk: tuple[PackedTokens, Answers]) -> Array:
        tokens, answers = chunk
        states = model.decoder.apply({"params": params["decoder"]}, tokens, media, "tokens")
        return token_losses(take(states, jnp.maximum(answers.at, 0)), head_of(params), answers.ids)

    losses = in_chunks(one, (batch.tokens.with_seed(seed), batch.answers))
    records = len(batch.sequences)
    loss = losses.sum() / jnp.sum(batch.answers.ids >= 0)
    record = jnp.where(
        batch.answers.record < 0, records, batch.answers.record
    )  # one more, for padding
    sums, counts = (jnp.zeros(records + 1).at[record].add(x)[:-1] for x in (losses, 1.0))
    return loss, {
        "loss": loss,
        "rows": jnp.where(counts > 0, sums / jnp.maximum(counts, 1), -jnp.inf),
    }


class Step:
    """(state, frozen parameters, batch) -> (state, metrics). Call it inside `jax.set_mesh(mesh)`.

    Frozen `towers` run in a program of their own: no chunk's backward pass repeats them, and the shapes of media and of
    rows, which vary apart, are compiled apart.
    """

    def __init__(self, name: str, update: Update, towers: MediaPrograms | None):
        self.update, self.towers, self.shapes = update, towers, ShapeLog(name)

    def __call__(
        self, state: State, params: dict[str, Any], batch: Batch
    ) -> tuple[State, dict[str, Array]]:
        """One step; the state is donated."""
        media = None if self.towers is None else self.towers(params, batch.media)
        params, batch = self._of_update(params, batch)
        self.shapes.note(batch, media)
        state, metrics = self.update(state, params, batch, media)
        programs = len(self.shapes) + (0 if self.towers is None else len(self.towers))
        return state, {**metrics, "programs": programs}

    def lower(self, state: Any, params: dict[str, Any], batch: Batch) -> jax.stages.Lowered:
        """The update's program, ready to be compiled, for arrays or shapes that know where they lie."""
        media = None if self.towers is None else self.towers.abstract(params, batch.media)
        return self.update.lower(state, *self._of_update(params, batch), media)

    def _of_update(self, params: dict[str, Any], batch: Batch) -> tuple[dict[str, Any], Batch]:
        """What of its arguments the update takes."""
        if self.towers is None:
            return params, batch
        params = {part: tree for part, tree in params.items() if part not in self.towers.shapes}
        return params, replace(batch, media={})


def make_train_step(
    model: Model,
    tx: Optimizer,
    config: lora.LoraConfig,
    temperature: float,
    seed: int,
    mesh: Mesh,
    state_sharding: State,
    **options: Any,
) -> Step:
    """The contrastive step. options: as of `contrastive_loss`."""
    loss = partial(
        contrastive_loss, decoder=model.decoder, config=config, temperature=temperature, **options
    )
    return Step(
        "training step",
        make_update(loss, tx, seed, mesh, state_sharding),
        MediaPrograms(model, mesh),
    )


def make_pretrain_step(
    model: Model,
    tx: Optimizer,
    config: lora.LoraConfig,
    seed: int,
    mesh: Mesh,
    state_sharding: State,
    tunes_towers: bool = False,
) -> Step:
    """The generative step. tunes_towers: whether gradients are to reach the towers, which then are part of the step."""
    loss = partial(generative_loss, model=model, config=config)
    towers = None if tunes_towers else MediaPrograms(model, mesh)
    return Step("pretraining step", make_update(loss, tx, seed, mesh, state_sharding), towers)


def make_update(loss: Loss, tx: Optimizer, seed: int, mesh: Mesh, state_sharding: State) -> Update:
    """(state, frozen parameters, batch, media tokens) -> (state, metrics), jitted; the state is donated.

    A step whose loss or gradient is not finite changes nothing but the step count, and says so in
    `metrics["finite"]`; the schedule does not advance either, whose rate at this step
    `metrics["learning_rate"]` is. `metrics["rows"]` [B] holds each record's loss (as of
    `info_nce`), `batch` a number that tells which batch it was.
    """

    def update(
        state: State, params: dict[str, Any], batch: Batch, media: Array | None
    ) -> tuple[State, dict[str, Array]]:
        batch = batch.gathered(jax.process_count())
        dropout_seed = jnp.uint32(seed) + state["step"].astype(jnp.uint32) * jnp.uint32(
            GOLDEN_RATIO
        )
        of = partial(loss, seed=dropout_seed)
        (_, metrics), grads = jax.value_and_grad(of, has_aux=True)(
            state["tuned"], params, batch, media
        )
        norm = optax.tree.norm(grads)
        updates, optimizer = tx.update(grads, state["optimizer"], state["tuned"])
        new = {"tuned": optax.apply_updates(state["tuned"], updates), "optimizer": optimizer}
        finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        old = {key: state[key] for key in new}
        kept = jax.tree.map(lambda x, y: jnp.where(finite, x, y), new, old)
        tokens = sum(jnp.sum(group >= 0) for group in batch.tokens.rows)
        said = batch.content.astype(jnp.uint32).ravel()
        which = jnp.sum(
            said * (2 * jnp.arange(said.size, dtype=jnp.uint32) + 1)
        )  # equal content in an equal order
        metrics |= {"grad_norm": norm, "finite": finite, "tokens": tokens, "batch": which}
        metrics["learning_rate"] = tx.rate(state["optimizer"])
        return {"step": state["step"] + 1, **kept}, metrics

    return jax.jit(update, donate_argnums=0, out_shardings=(state_sharding, replicated(mesh)))
