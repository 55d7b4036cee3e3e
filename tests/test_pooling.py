"""Mean pooling: transformers' averaged states, however sequences are packed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import torch
from reference_media import audio, golden, image, user

from lco_jax import LcoError, OmniEmbedder, make_mesh
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.core import lora
from lco_jax.core.packing import TokenSequence, fill, pack_stream
from lco_jax.core.prefixes import Prefixes
from lco_jax.core.stream_shapes import Shape, padded_shape
from lco_jax.data.positions import line_positions
from lco_jax.data.prompts import PROMPTS, as_messages
from lco_jax.models.pooling import POOLINGS, pool


@pytest.mark.parametrize("family", ["vl", "omni", "llava_qwen2"])
def test_texts_have_the_mean_of_transformers_states(cases, family):
    case = cases[family]
    ours = OmniEmbedder.from_pretrained(case.path, pooling="mean", modalities=("text",))
    got = ours.encode(reference.TEXTS)
    ids = ours.tokenizer([as_messages(text, "") for text in reference.TEXTS])
    assert len({len(one) for one in ids}) > 2
    with torch.no_grad():
        want = reference.embed(case.model, ids, "mean").numpy()
    assert np.abs(got - want).max() < 1e-5
    last = OmniEmbedder.from_pretrained(case.path, modalities=("text",)).encode(reference.TEXTS)
    assert np.abs(got - last).max() > 1e-2


@pytest.mark.parametrize("family", ["vl", "omni"])
def test_media_count_among_the_tokens(cases, family):
    """Pictures of two sizes with and without text beside a text, in one batch of each."""
    case = cases[family]
    chats = [
        user(image(0, 60, 90), PROMPTS["image"]),
        user("a text", PROMPTS["text"]),
        user("what is this?", image(1, 120, 60), PROMPTS["mixed"]),
    ]
    if family == "omni":
        chats.append(user(audio(0, 1.3), PROMPTS["audio"]))
    want = golden(case.model, case.path, chats, together=family == "vl", pooling="mean")
    ours = OmniEmbedder.from_pretrained(case.path, pooling="mean")
    assert np.abs(ours.encode(chats) - want.embeddings).max() < 1e-5


@pytest.fixture(scope="module")
def tiny_mean():
    checkpoint = open_checkpoint("builtin:tiny")
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params = load_model(checkpoint, mesh, towers=(), pooling="mean")
    return model.decoder, params["decoder"]


LENGTHS = ((6, 20), (6, 33), (3, 9), (0, 12), (11, 25), (9, 4))  # of the beginning, of the rest
SHARED = np.arange(50, 61, dtype=np.int32)
OTHER = np.concatenate([SHARED[:4], np.arange(70, 75, dtype=np.int32)])


def sequences():
    rng = np.random.default_rng(0)
    found = []
    for number, (shared, own) in enumerate(LENGTHS):
        begins = (OTHER if number % 2 else SHARED)[:shared]
        ids = np.concatenate([begins, rng.integers(0, 40, own)]).astype(np.int32)
        found.append(TokenSequence(ids, line_positions(0, len(ids))))
    return found


def packed(prefix):
    given = sequences()
    stream = pack_stream(given, prefix)
    tokens, slots = fill([stream], [range(len(given))], padded_shape(stream.need, Shape()), prefix)
    return tokens, slots[0], stream


ONE, TWO = Prefixes.of(SHARED), Prefixes.of(SHARED, OTHER)


CONFIG = lora.LoraConfig(rank=4, alpha=8, dropout=0.0)


@pytest.fixture(scope="module")
def vectors_and_gradients(tiny_mean):
    """A function of (pooling, tokens, slots): the sequences' pooled states, and the gradients of
    adapters under a loss of them.
    """
    decoder, params = tiny_mean
    adapters = lora.init(jax.random.key(0), params, CONFIG)
    adapters = jax.tree.map(lambda x: x + 0.02, adapters)
    wanted = np.random.default_rng(1).normal(size=(len(LENGTHS), 128)).astype(np.float32)

    def loss(adapters, decoder, tokens, slots):
        pooled = pool(decoder, lora.attach(params, adapters, CONFIG), tokens)
        pooled = pooled.reshape(-1, pooled.shape[-1])[slots]
        return jnp.sum(pooled * wanted) / 10, pooled

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnums=1)

    def both(pooling, tokens, slots):
        (_, vectors), grads = run(adapters, decoder.clone(pooling=pooling), tokens, slots)
        return np.asarray(vectors), jax.tree.leaves(jax.device_get(grads))

    return both


@pytest.fixture(scope="module")
def apart(vectors_and_gradients):
    """pooling -> what each sequence has in a stream of its own."""
    streams = [pack_stream([one], Prefixes.of()) for one in sequences()]
    shape = padded_shape(Shape(64, {48: 1}), Shape())
    tokens, slots = fill(streams, [[i] for i in range(len(streams))], shape, Prefixes.of())
    of_stream = tokens.last_tokens.shape[1]
    slots = np.array([of_stream * stream + slot for stream, [slot] in enumerate(slots)])
    return {pooling: vectors_and_gradients(pooling, tokens, slots) for pooling in POOLINGS}


@pytest.mark.parametrize("prefix", [Prefixes.of(), ONE, TWO], ids=["none", "one", "two"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_vectors_and_gradients_are_the_same_however_beginnings_are_shared(
    vectors_and_gradients, apart, prefix, pooling
):
    """Against each sequence in a stream of its own, also for two branches of beginnings."""
    tokens, slots, _ = packed(prefix)
    vectors, grads = vectors_and_gradients(pooling, tokens, slots)
    want, want_grads = apart[pooling]
    assert np.abs(vectors - want).max() < 1e-5
    for got, one in zip(grads, want_grads, strict=True):
        assert np.abs(got - one).max() < 1e-5 * max(1, np.abs(one).max())


def test_what_beginnings_cost():
    """Each token of the beginnings is in a stream once."""
    lengths = [len(one) for one in sequences()]
    without, one, two = (packed(prefix)[2].length for prefix in (None, ONE, TWO))
    assert packed(Prefixes.of())[2].length == sum(lengths)
    assert one == 11 + sum(lengths) - (6 + 4 + 3 + 0 + 11 + 4)
    assert two == 11 + 5 + sum(lengths) - (6 + 6 + 3 + 0 + 11 + 9)
    assert without <= two
    assert TWO.branches == ((0, 0, 11), (11, 4, 5))


def test_an_unknown_pooling_is_named():
    with pytest.raises(LcoError, match="pooling is 'max'; it is one of: last, mean"):
        OmniEmbedder.from_pretrained("builtin:tiny", pooling="max")
