"""`OmniGenerator`: a checkpoint as what it was before it embedded, a function from inputs to answers.

Dimensions: N inputs, D hidden, R streams, S sequences of a stream, T tokens of a stream, A tokens of a batch's answers,
M new tokens at most, E tokens that end a turn.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json
from lco_jax.core.packing import PackedTokens, bucket
from lco_jax.core.sharding import replicated, row_shards
from lco_jax.data.inference import BLOCK_INPUTS, MAX_TOKENS, InferenceBatch, blocks_of
from lco_jax.data.inputs import Preparation, named, one_ahead, prepare_ahead
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import Prompt, asked
from lco_jax.data.tower_rows import Processed
from lco_jax.embedder import OmniEmbedder, is_single
from lco_jax.models.cache import Cache
from lco_jax.models.decoder import Decoder
from lco_jax.models.head import greedy, head_of, token_losses
from lco_jax.models.streams import take

AT_ONCE = 64  # sequences decoded together, unless a batch size is given


class OmniGenerator(OmniEmbedder):
    """Generates text from text, images, audio, video and any mix of them, and embeds them, too. Build one with
    `from_pretrained`, which also loads the vocabulary head.

    ends: the token ids that end a turn: int32 [E].
    """

    HEAD = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        decoder, everywhere = self.model.decoder, replicated(self.mesh)
        self.ends = np.array(turn_ends(self.processor), np.int32)
        self._losses = jax.jit(partial(_answer_losses, decoder), out_shardings=everywhere)
        self._prefill = jax.jit(partial(_prefill, decoder), static_argnums=3)
        self._decode = jax.jit(
            partial(_decode, decoder), donate_argnums=1, out_shardings=(everywhere, None)
        )

    def generate(
        self, inputs: Sequence[Any], max_new_tokens: int = 64, **options: Any
    ) -> list[str]:
        """What the model says after each input, greedily, without the tokens that end its turn.

        options: as of `generate_ids`.
        """
        return [
            self.tokenizer.tokenizer.decode(ids[~np.isin(ids, self.ends)], skip_special_tokens=True)
            for ids in self.generate_ids(inputs, max_new_tokens, **options)
        ]

    def generate_ids(
        self,
        inputs: Sequence[Any],
        max_new_tokens: int = 64,
        *,
        prompt: Prompt = asked,
        batch_size: int | None = None,
        max_length: int | None = None,
        progress: tqdm | None = None,
        workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """The token ids that `generate` decodes, int32 [at most M], the one that ended the turn included.

        inputs (a list, or a single one), max_length, workers, progress, names: as of `encode`. Chat messages are
        rendered as they are; a content with a text asks for itself, and any other is followed by one of
        `prompts.QUESTIONS`; or all contents by `prompt`.
        batch_size: the most inputs decoded together, by default 64; no answer depends on it.
        Raises for the first input that is bad, or leaves no room for `max_new_tokens` in the model's context.
        """
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise LcoError(f"{name} is {value}; it must be at least 1")
        inputs = [inputs] if is_single(inputs) else inputs
        preparation = Preparation(self.processor, prompt, max_length)
        generated: list[np.ndarray] = []
        prepared = prepare_ahead(preparation, named(inputs, names), workers)
        shards = row_shards(self.mesh)
        for ready in one_ahead(blocks_of(prepared, BLOCK_INPUTS, raises=True, shards=shards)):
            first = len(generated)
            where = names[first:] if names else [f"input {first + i}" for i in range(len(ready))]
            self._check_room(ready, where, max_new_tokens, f"max_new_tokens={max_new_tokens}")
            generated += self._generate(ready, max_new_tokens, batch_size or AT_ONCE, progress)
        return generated

    def _generate(
        self,
        ready: Sequence[Processed],
        max_new_tokens: int,
        batch_size: int,
        progress: tqdm | None,
    ) -> list[np.ndarray]:
        """`generate_ids` of what is ready."""
        generated: list[np.ndarray] = [np.zeros(0, np.int32)] * len(ready)

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            prefilled = self._prefill(self.params, batch.tokens, self._media(batch), max_new_tokens)
            return self._decode(self.params, prefilled, self.ends)[0], batch.sequences

        for indices, (ids, sequences) in self._run(ready, start, batch_size, MAX_TOKENS, progress):
            for i, mine in zip(
                indices, np.asarray(ids).reshape(-1, max_new_tokens)[sequences], strict=True
            ):
                ended = np.flatnonzero(np.isin(mine, self.ends))
                generated[i] = mine[: ended[0] + 1] if len(ended) else mine
        return generated

    def token_losses(
        self,
        inputs: Sequence[Any],
        answers: Sequence[str],
        *,
        prompt: Prompt = asked,
        max_length: int | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What each answer costs the generator: -log p summed over its tokens, in nats, float32 [N]; their number [N].

        The token that ends the answer's turn is one of them. inputs and options: as of `encode`, `prompt` as of
        `generate_ids`; answers are never cut.
        """
        prompts = self._prepare(inputs, prompt, max_length)
        targets = self.tokenizer.answers(answers)
        ready = [one.answered(ids) for one, ids in zip(prompts, targets, strict=True)]
        self._check_room(ready, [f"input {i}" for i in range(len(ready))], 0, "its answer")
        losses, counts = np.zeros(len(ready), np.float32), np.array([len(ids) for ids in targets])

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            mine = [targets[i] for i in batch.inputs]
            spoken = np.concatenate(
                [at[-len(ids) :] for at, ids in zip(batch.at, mine, strict=True)]
            )
            room = (0, bucket(len(spoken)) - len(spoken))
            wanted = np.pad(np.concatenate(mine), room)
            each = self._losses(
                self.params, batch.tokens, self._media(batch), np.pad(spoken, room), wanted
            )
            return each, np.repeat(np.arange(len(mine)), [len(ids) for ids in mine])

        for indices, (each, whose) in self._run(ready, start, None, max_tokens, progress):
            losses[indices] = np.bincount(whose, np.asarray(each)[: len(whose)])
        return losses, counts

    def _check_room(
        self, ready: Sequence[Processed], names: Sequence[str], more: int, what: str
    ) -> None:
        """Raise for the first input that does not leave the context room for so many tokens `more`."""
        context = self.processor.max_tokens
        if long := [
            name for one, name in zip(ready, names, strict=False) if len(one) + more > context
        ]:
            raise LcoError(f"{long[0]} and {what} exceed the model's {context} tokens")


def turn_ends(processor: Processor) -> list[int]:
    """The token ids that end a turn: generation_config.json's, else the model configuration's, else the tokenizer's."""
    folder = processor.folder
    config = read_json(folder / "config.json")
    places = [config.get("thinker_config") or {}, config, config.get("text_config") or {}]
    if (folder / "generation_config.json").exists():
        places = [read_json(folder / "generation_config.json"), *places]
    places.append({"eos_token_id": processor.tokenizer.tokenizer.eos_token_id})
    found = next(
        (place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), []
    )
    return found if isinstance(found, list) else [found]


def _answer_losses(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: PackedTokens,
    media: Array | None,
    spoken: Array,
    wanted: Array,
) -> Array:
    """The loss of each of A tokens, `wanted` after those that lie at `spoken` of the R · T: float32 [A]."""
    states = decoder.apply({"params": params["decoder"]}, tokens, media, "tokens")
    flat = states.reshape(-1, states.shape[-1])
    return token_losses(flat[spoken][None], head_of(params), wanted[None])[0]


Prefilled = tuple[Array, Array, Cache]


def _prefill(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None, new: int
) -> Prefilled:
    """Prompts -> each sequence's first new token, and its position, int32 [R, S] (-1 where there is no sequence); and
    their cache, with room for `new` tokens. Positions go on as in `Processed.followed_by`."""
    states, cache = decoder.apply({"params": params["decoder"]}, tokens, media, "cache")
    last = take(jnp.max(tokens.position_ids, axis=-1), tokens.last_tokens)
    positions = jnp.where(cache.lengths > 0, last + 1, -1)
    return greedy(states, head_of(params)), positions, cache.with_room(new)


def _decode(
    decoder: Decoder, params: dict[str, Any], prefilled: Prefilled, ends: Array
) -> tuple[Array, Prefilled]:
    """What `_prefill` left -> the new tokens, int32 [R, S, M], arbitrary after the first of `ends` (int32 [E]); and
    what was given, whose memory is used again. Stops when every sequence has ended."""
    first, positions, cache = prefilled
    ids = jnp.zeros((*first.shape, cache.columns - cache.width), jnp.int32).at[..., 0].set(first)
    ended = (positions < 0) | jnp.isin(first, ends)
    zeros = jnp.zeros_like(first)

    def unfinished(state: tuple[Array, Array, Cache]) -> Array:
        ids, ended, cache = state
        return (cache.generated + 1 < ids.shape[-1]) & ~jnp.all(ended)

    def step(state: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        ids, ended, cache = state
        at = jnp.broadcast_to((positions + cache.generated)[..., None], (*positions.shape, 3))
        newest = ids[..., cache.generated]
        tokens = PackedTokens(newest, at, zeros.astype(jnp.uint32), zeros - 1, (), zeros, zeros)
        states, cache = decoder.apply(
            {"params": params["decoder"]}, tokens, of="cache", cache=cache
        )
        following = greedy(states, head_of(params))
        return ids.at[..., cache.generated].set(following), ended | jnp.isin(following, ends), cache

    ids, _, cache = jax.lax.while_loop(unfinished, step, (ids, ended, cache))
    return ids, (first, positions, cache)
