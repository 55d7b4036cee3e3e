"""`OmniGenerator`: a checkpoint as a function from inputs to answers, as it was before it embedded.

Dimensions: N inputs, D hidden, R streams, S slots of a stream, T tokens of a stream, A tokens of a
batch's answers, M new tokens (at most), E token ids that end a turn.
"""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

from lco_jax.arguments import check_on_error
from lco_jax.core.bins import bucket
from lco_jax.core.errors import LcoError, check_at_least_1
from lco_jax.core.files import read_json
from lco_jax.core.finite import check_results
from lco_jax.core.packing import PackedTokens
from lco_jax.core.sharding import replicated, row_shards
from lco_jax.data.inference import BLOCK_INPUTS, MAX_TOKENS, InferenceBatch, blocks_of
from lco_jax.data.inputs import Preparation, as_list, named, one_ahead, prepare_ahead
from lco_jax.data.processor import Processor
from lco_jax.data.processor_files import token_ids
from lco_jax.data.prompts import Prompt, asked
from lco_jax.data.tower_rows import Processed
from lco_jax.embedder import OmniEmbedder
from lco_jax.models.cache import Cache
from lco_jax.models.decoder import Decoder
from lco_jax.models.head import greedy, head_of, token_losses
from lco_jax.models.streams import take

AT_ONCE = 64  # inputs that are decoded together by default
logger = logging.getLogger(__name__)


class OmniGenerator(OmniEmbedder):
    """Generates text from text, images, audio, video and any mix of them; it also embeds.

    Build one with `from_pretrained`, which also loads the vocabulary head.
    ends: int32 [E], the token ids that end a turn.
    """

    LOADS_HEAD = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        decoder = self.model.decoder
        everywhere = replicated(self.mesh)
        self.ends = np.array(turn_ends(self.processor), np.int32)
        self._losses = jax.jit(partial(_answer_losses, decoder), out_shardings=everywhere)
        self._prefill = jax.jit(partial(_prefill, decoder), static_argnums=3)
        self._decode = jax.jit(
            partial(_decode, decoder), donate_argnums=1, out_shardings=(everywhere, None)
        )

    def generate(
        self, inputs: Sequence[Any], max_new_tokens: int = 64, **options: Any
    ) -> list[str | None]:
        """The greedy answer to each input, without the tokens that end its turn; None of one that
        was skipped.

        options: as `generate_ids` has them.
        """
        answers = self.generate_ids(inputs, max_new_tokens, **options)
        return [None if ids is None else self.text_of(ids) for ids in answers]

    def text_of(self, ids: np.ndarray) -> str:
        """An answer's token ids as text, without those that end its turn."""
        spoken = ids[~np.isin(ids, self.ends)]
        return self.tokenizer.tokenizer.decode(spoken, skip_special_tokens=True)

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
        on_error: str = "raise",
    ) -> list[np.ndarray | None]:
        """The token ids of each answer: int32 [M at most], with the one that ended the turn.

        inputs (a list or one input), max_length, workers, progress, names: as `encode` has them.
        prompt: for every content. By default, a content with a text is its own question, and any
            other gets one of `prompts.QUESTIONS`. Chat messages get none.
        batch_size: the most inputs that are decoded together. No answer depends on it in float32.
            In bfloat16 rounding may choose another token where two are nearly as likely.
        on_error: "raise" for the first input that is bad, or that leaves no room for
            `max_new_tokens` in the model's context; or "skip": None, and `skipped` says why.
        """
        check_at_least_1(max_new_tokens=max_new_tokens, batch_size=batch_size)
        check_on_error(on_error)
        items, _ = as_list(inputs)
        preparation = Preparation(self.processor, prompt, max_length)
        prepared = prepare_ahead(preparation, named(items, names), workers)
        raises = on_error == "raise"
        blocks = blocks_of(prepared, BLOCK_INPUTS, raises, shards=row_shards(self.mesh))
        generated: list[np.ndarray | None] = []
        self.skipped = {}
        for block in one_ahead(blocks):
            first = len(generated)
            here = range(first, first + len(block))
            where = {i: names[i] if names else f"input {i}" for i in here}
            good = self._good_of(block, where, max_new_tokens, raises)
            at_once = batch_size or AT_ONCE
            generated += self._answer_block(block, good, max_new_tokens, at_once, progress)
        return generated

    def _answer_block(
        self,
        block: Sequence[Processed | LcoError],
        good: Sequence[int],
        max_new_tokens: int,
        batch_size: int,
        progress: tqdm | None,
    ) -> list[np.ndarray | None]:
        """The token ids of each answer of a block; None where an input is not among the `good`."""
        ready = [block[i] for i in good]
        found = self._generate(ready, max_new_tokens, batch_size, progress)
        if progress is not None:
            progress.update(len(block) - len(good))
        answers: list[np.ndarray | None] = [None] * len(block)
        for i, ids in zip(good, found, strict=True):
            answers[i] = ids
        return answers

    def _good_of(
        self,
        block: Sequence[Processed | LcoError],
        names: Mapping[int, str],
        new: int,
        raises: bool,
    ) -> list[int]:
        """Which inputs of a block can be answered; the others are raised, or added to `skipped`.

        names: index among all inputs -> name, of the block's. new: tokens of an answer.
        """
        good = []
        for i, (one, (index, name)) in enumerate(zip(block, names.items(), strict=True)):
            try:
                if isinstance(one, LcoError):
                    raise one
                self._check_room([one], [name], new, f"max_new_tokens={new}")
                good.append(i)
            except LcoError as error:
                if raises:
                    raise
                logger.warning("skipped: %s", error)
                self.skipped[index] = str(error)
        return good

    def _generate(
        self,
        ready: Sequence[Processed],
        max_new_tokens: int,
        batch_size: int,
        progress: tqdm | None,
    ) -> list[np.ndarray]:
        """`generate_ids` of inputs that are ready."""

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            media = self._media_tokens(batch)
            prefilled = self._prefill(self.params, batch.tokens, media, max_new_tokens)
            ids, _ = self._decode(self.params, prefilled, self.ends)
            return ids, batch.slots

        generated: list[np.ndarray] = [np.zeros(0, np.int32)] * len(ready)
        for inputs, (ids, slots) in self._run(ready, start, batch_size, MAX_TOKENS, progress):
            ids_by_slot = np.asarray(ids).reshape(-1, max_new_tokens)
            for i, slot in zip(inputs, slots, strict=True):
                generated[i] = self._up_to_end(ids_by_slot[slot])
        return generated

    def _up_to_end(self, ids: np.ndarray) -> np.ndarray:
        """Token ids up to the first that ends a turn."""
        ends = np.flatnonzero(np.isin(ids, self.ends))
        return ids[: ends[0] + 1] if len(ends) else ids

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
        """(-log p of each given answer, in nats, float32 [N]; the number of its tokens [N]).

        The loss is summed over the answer's tokens and the one that ends its turn. Answers are
        never cut. prompt: as `generate_ids` has it; inputs and other options: as `encode` has them.
        """
        # what a generator is asked is no instruction, and has one place
        prompts = self._prepare(inputs, Preparation(self.processor, prompt, max_length))
        targets = self.tokenizer.answers(answers)
        ready = [one.answered(ids) for one, ids in zip(prompts, targets, strict=True)]
        where = [f"input {i}" for i in range(len(ready))]
        self._check_room(ready, where, 0, "its answer")

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            return self._start_losses(batch, [targets[i] for i in batch.inputs])

        losses = np.zeros(len(ready), np.float32)
        for indices, (each, answer) in self._run(ready, start, None, max_tokens, progress):
            losses[indices] = np.bincount(answer, np.asarray(each)[: len(answer)])
        check_results(losses[:, None], self.params, self.model.decoder.dtype)
        return losses, np.array([len(ids) for ids in targets])

    def _start_losses(
        self, batch: InferenceBatch, targets: list[np.ndarray]
    ) -> tuple[Array, np.ndarray]:
        """(the loss of each token of a batch's answers, padded; the number of its answer [A]).

        targets: the answer to each of the batch's inputs.
        """
        lengths = [len(ids) for ids in targets]
        predicting = [at[-length:] for at, length in zip(batch.at, lengths, strict=True)]
        total = sum(lengths)
        room = (0, bucket(total) - total)
        losses = self._losses(
            self.params,
            batch.tokens,
            self._media_tokens(batch),
            np.pad(np.concatenate(predicting), room),
            np.pad(np.concatenate(targets), room),
        )
        return losses, np.repeat(np.arange(len(targets)), lengths)

    def _check_room(
        self, ready: Sequence[Processed], names: Sequence[str], more: int, what: str
    ) -> None:
        """Raise for the first input that, with `more` tokens, exceeds the model's context."""
        context = self.processor.max_tokens
        for one, name in zip(ready, names, strict=True):
            if len(one) + more > context:
                raise LcoError(f"{name} and {what} exceed the model's {context} tokens")


def turn_ends(processor: Processor) -> list[int]:
    """The token ids that end a turn.

    They come from generation_config.json, else from config.json, else from the tokenizer.
    """
    file = processor.folder / "config.json"
    config = read_json(file)
    parts = (config.get("thinker_config"), config, config.get("text_config"))
    candidates = [(part, file) for part in parts if isinstance(part, dict)]
    generation = processor.folder / "generation_config.json"
    if generation.exists():
        candidates.insert(0, (read_json(generation), generation))
    vocab_size = processor.codec.vocab_size
    for candidate, file in candidates:
        ends = candidate.get("eos_token_id")
        if ends is not None:
            return token_ids(ends, vocab_size, f"{file}: eos_token_id")
    end = processor.tokenizer.tokenizer.eos_token_id
    return [] if end is None else [end]


# ---- the programs


def _answer_losses(
    decoder: Decoder,
    params: dict[str, Any],
    tokens: PackedTokens,
    media: Array | None,
    at: Array,
    targets: Array,
) -> Array:
    """The losses of A target tokens: float32 [A].

    at: int [A], the token among all R · T whose state predicts each. targets: int [A].
    """
    states = decoder.apply({"params": params["decoder"]}, tokens, media, "tokens")
    flat = states.reshape(-1, states.shape[-1])
    return token_losses(flat[at][None], head_of(params), targets[None])[0]


Prefilled = tuple[Array, Array, Cache]
Decoding = tuple[Array, Array, Cache]  # token ids so far, which sequences have ended, the cache


def _prefill(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None, new: int
) -> Prefilled:
    """Run the prompts: (each slot's first new token, its position, the prompts' cache).

    Tokens and positions are int32 [R, S]; a position is -1 in an empty slot. Positions continue as
    `Processed.followed_by` has them. The cache has room for `new` tokens.
    """
    states, cache = decoder.apply({"params": params["decoder"]}, tokens, media, "cache")
    last = take(jnp.max(tokens.position_ids, axis=-1), tokens.last_tokens)
    positions = jnp.where(cache.lengths > 0, last + 1, -1)
    return greedy(states, head_of(params)), positions, cache.with_room(new)


def _decode(
    decoder: Decoder, params: dict[str, Any], prefilled: Prefilled, ends: Array
) -> tuple[Array, Prefilled]:
    """Generate until every sequence has ended: the new tokens, int32 [R, S, M].

    After a sequence's end, its tokens are arbitrary. ends: int32 [E]. `prefilled` is donated, and
    returned again so that the loop can work in its memory.
    """
    first, positions, cache = prefilled
    new = cache.columns - cache.width
    ids = jnp.zeros((*first.shape, new), jnp.int32).at[..., 0].set(first)
    ended = (positions < 0) | jnp.isin(first, ends)

    def unfinished(state: Decoding) -> Array:
        _, ended, cache = state
        return (cache.generated + 1 < new) & ~jnp.all(ended)

    def step(state: Decoding) -> Decoding:
        ids, ended, cache = state
        newest = ids[..., cache.generated]
        position = positions + cache.generated
        following, cache = _next_token(decoder, params, newest, position, cache)
        ids = ids.at[..., cache.generated].set(following)
        return ids, ended | jnp.isin(following, ends), cache

    ids, _, cache = jax.lax.while_loop(unfinished, step, (ids, ended, cache))
    return ids, (first, positions, cache)


def _next_token(
    decoder: Decoder, params: dict[str, Any], ids: Array, positions: Array, cache: Cache
) -> tuple[Array, Cache]:
    """The token that follows each sequence's newest, and the cache with that one's keys and values.

    ids, positions: int32 [R, S], of the newest tokens.
    """
    zeros = jnp.zeros_like(ids)
    tokens = PackedTokens(
        input_ids=ids,
        position_ids=jnp.broadcast_to(positions[..., None], (*positions.shape, 3)),
        token_keys=zeros.astype(jnp.uint32),
        media_slots=zeros - 1,
        rows=(),
        home=zeros,
        last_tokens=zeros,
    )
    variables = {"params": params["decoder"]}
    states, cache = decoder.apply(variables, tokens, of="cache", cache=cache)
    return greedy(states, head_of(params)), cache
