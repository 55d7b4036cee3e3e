"""`OmniGenerator`: a checkpoint as what it was before it embedded, a function from inputs to what is said about them.

Dimensions: N inputs, D hidden, R streams, S sequences of a stream, T tokens of a stream, A tokens of a batch's answers,
M tokens that are said at most, E tokens that end a turn.
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
from lco_jax.core.sharding import replicated
from lco_jax.data.inference import MAX_TOKENS, InferenceBatch
from lco_jax.data.prompts import Prompt, asked
from lco_jax.data.tower_rows import Processed
from lco_jax.embedder import OmniEmbedder
from lco_jax.models.cache import Cache
from lco_jax.models.decoder import Decoder
from lco_jax.models.head import head_of, likeliest, token_losses
from lco_jax.models.streams import to_rows

AT_ONCE = 64  # sequences that are gone on with together, unless it is said


class OmniGenerator(OmniEmbedder):
    """Says what follows text, images, audio, video and any mix of them; embeds them, too. Build one with
    `from_pretrained`, which also loads the vocabulary head.

    ends: the token ids that end a turn: int32 [E].
    """

    HEAD = True

    def __init__(self, *args: Any):
        super().__init__(*args)
        decoder, everywhere = self.model.decoder, replicated(self.mesh)
        self.ends = np.array(_ends(self), np.int32)
        self._losses = jax.jit(partial(_answer_losses, decoder), out_shardings=everywhere)
        self._begin = jax.jit(partial(_begin, decoder), static_argnums=3)
        self._go_on = jax.jit(partial(_go_on, decoder), donate_argnums=1, out_shardings=(everywhere, None))

    def generate(
        self,
        inputs: Sequence[Any],
        max_new_tokens: int = 64,
        *,
        prompt: Prompt | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        progress: tqdm | None = None,
        workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> list[str]:
        """What the model says after each input, greedily, without the tokens that end its turn.

        inputs, max_length, workers, progress, names: as of `encode`. Chat messages are rendered as they are; a content
        with a text asks for itself, any other is followed by `prompts.QUESTIONS`; or all contents by `prompt`.
        batch_size: the most inputs that are gone on with together, by default 64; no answer depends on it.
        Raises for the first input that is bad, or leaves no room for `max_new_tokens` in the model's context.
        """
        options = {"prompt": prompt, "batch_size": batch_size, "max_length": max_length, "progress": progress}
        said = self.generate_ids(inputs, max_new_tokens, **options, workers=workers, names=names)
        spoken = [ids[:-1] if len(ids) and ids[-1] in self.ends else ids for ids in said]
        return [self.tokenizer.tokenizer.decode(ids, skip_special_tokens=True) for ids in spoken]

    def generate_ids(
        self,
        inputs: Sequence[Any],
        max_new_tokens: int = 64,
        *,
        prompt: Prompt | None = None,
        batch_size: int | None = None,
        max_length: int | None = None,
        progress: tqdm | None = None,
        workers: int = 0,
        names: Sequence[str] | None = None,
    ) -> list[np.ndarray]:
        """As `generate`: the token ids, int32 [at most M], the one that ended the turn included."""
        for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
            if value is not None and value < 1:
                raise LcoError(f"{name} is {value}; it must be at least 1")
        ready = self._prepare(inputs, asked if prompt is None else prompt, max_length, workers, names)
        self._check_room(ready, max_new_tokens, f"max_new_tokens={max_new_tokens}", names)
        said: list[np.ndarray] = [np.zeros(0, np.int32)] * len(ready)

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            begun = self._begin(self.params, batch.tokens, self._media(batch), max_new_tokens)
            return self._go_on(self.params, begun, self.ends)[0], batch.sequences

        for indices, (ids, sequences) in self._run(ready, start, batch_size or AT_ONCE, MAX_TOKENS, progress):
            for i, mine in zip(indices, np.asarray(ids).reshape(-1, max_new_tokens)[sequences], strict=True):
                ended = np.flatnonzero(np.isin(mine, self.ends))
                said[i] = mine[: ended[0] + 1] if len(ended) else mine
        return said

    def token_losses(
        self,
        inputs: Sequence[Any],
        answers: Sequence[str],
        *,
        prompt: Prompt | None = None,
        max_length: int | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
    ) -> tuple[np.ndarray, np.ndarray]:
        """What each answer costs the generator: -log p summed over its tokens, in nats, float32 [N]; their number [N].

        The token that ends the answer's turn is one of them. inputs and options: as of `encode`, with its prompts;
        answers are never cut.
        """
        prompts = self._prepare(inputs, prompt, max_length)
        targets = self.tokenizer.answers(answers)
        ready = [one.followed_by(ids[:-1]) for one, ids in zip(prompts, targets, strict=True)]
        self._check_room(ready, 0, "its answer")
        losses, counts = np.zeros(len(ready), np.float32), np.array([len(ids) for ids in targets])

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            mine = [targets[i] for i in batch.inputs]
            spoken = np.concatenate([at[-len(ids) :] for at, ids in zip(batch.at, mine, strict=True)])
            room = (0, bucket(len(spoken)) - len(spoken))
            wanted = np.pad(np.concatenate(mine), room)
            each = self._losses(self.params, batch.tokens, self._media(batch), np.pad(spoken, room), wanted)
            return each, np.repeat(np.arange(len(mine)), [len(ids) for ids in mine])

        for indices, (each, whose) in self._run(ready, start, None, max_tokens, progress):
            losses[indices] = np.bincount(whose, np.asarray(each)[: len(whose)])
        return losses, counts

    def _check_room(self, ready: Sequence[Processed], more: int, what: str, names: Sequence[str] | None = None) -> None:
        """Raise for the first input that does not leave the context room for so many tokens `more`."""
        context = self.processor.max_tokens
        if long := [i for i, one in enumerate(ready) if len(one) + more > context]:
            name = names[long[0]] if names else f"input {long[0]}"
            raise LcoError(f"{name} and {what} exceed the model's {context} tokens")


def _ends(generator: OmniGenerator) -> list[int]:
    """What ends a turn: as generation_config.json says, else the model's configuration, else the tokenizer."""
    folder = generator.processor.folder
    config = read_json(folder / "config.json")
    places = [config.get("thinker_config") or {}, config, config.get("text_config") or {}]
    if (folder / "generation_config.json").exists():
        places = [read_json(folder / "generation_config.json"), *places]
    places.append({"eos_token_id": generator.tokenizer.tokenizer.eos_token_id})
    found = next((place["eos_token_id"] for place in places if place.get("eos_token_id") is not None), [])
    return found if isinstance(found, list) else [found]


def _answer_losses(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None, spoken: Array, wanted: Array
) -> Array:
    """The loss of each of A tokens, `wanted` after those that lie at `spoken` of the R · T: float32 [A]."""
    states = decoder.apply({"params": params["decoder"]}, tokens, media, "tokens")
    flat = states.reshape(-1, states.shape[-1])
    return token_losses(flat[spoken][None], head_of(params), wanted[None])[0]


Begun = tuple[Array, Array, Cache]


def _begin(decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None, new: int) -> Begun:
    """Prompts -> the first token that each sequence says, and that one's position, int32 [R, S] (-1 where there is no
    sequence); and their cache, with room for `new` tokens. Text goes on after the largest position of any axis."""
    states, cache = decoder.apply({"params": params["decoder"]}, tokens, media, "cache")
    [positions], rows = to_rows(jnp.max(tokens.position_ids, axis=-1), tokens), tokens.rows[0]
    last = jnp.max(jnp.where(rows >= 0, positions, -2), axis=-1)
    return likeliest(states, head_of(params)), last + 1, cache.with_room(new)


def _go_on(decoder: Decoder, params: dict[str, Any], begun: Begun, ends: Array) -> tuple[Array, Begun]:
    """What `_begin` left -> the tokens that are said, int32 [R, S, M], arbitrary after the first of `ends`; and what
    was given, whose memory is used again."""
    first, positions, cache = begun
    said = jnp.zeros((*first.shape, cache.keys.shape[3] - cache.width), jnp.int32).at[..., 0].set(first)
    over = (positions < 0) | jnp.isin(first, ends)

    def goes_on(state: tuple[Array, Array, Cache]) -> Array:
        said, over, cache = state
        return (cache.said + 1 < said.shape[-1]) & ~jnp.all(over)

    def say(state: tuple[Array, Array, Cache]) -> tuple[Array, Array, Cache]:
        said, over, cache = state
        ids = said[..., cache.said]
        where = jnp.broadcast_to((positions + cache.said)[..., None], (*ids.shape, 3))
        nothing = jnp.zeros_like(ids)
        tokens = PackedTokens(ids, where, nothing.astype(jnp.uint32), nothing - 1, (), nothing, nothing)
        states, cache = decoder.apply({"params": params["decoder"]}, tokens, of="cache", cache=cache)
        ids = likeliest(states, head_of(params))
        return said.at[..., cache.said].set(ids), over | jnp.isin(ids, ends), cache

    said, _, cache = jax.lax.while_loop(goes_on, say, (said, over, cache))
    return said, (first, positions, cache)
