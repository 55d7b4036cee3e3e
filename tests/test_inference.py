"""How inputs are packed into forward passes, with little padding on any number of devices."""

import json
from pathlib import Path

import numpy as np
import pytest

from lco_jax.data import inference
from lco_jax.data.positions import line_positions
from lco_jax.data.tower_rows import Processed

NLI = json.loads((Path(__file__).parent.parent / "benchmarks" / "snli_lengths.json").read_text())


def text(*parts):
    ids = np.concatenate(parts).astype(np.int32)
    return Processed(ids, line_positions(0, len(ids)))


def sentences(count, seed=0):
    """Texts as long as SNLI's, in its prompt; some words are frequent."""
    rng = np.random.default_rng(seed)
    lengths = rng.choice(np.ravel(NLI["lengths"]), count)
    return [text(NLI["prefix"], rng.zipf(1.3, n) % 8000, NLI["suffix"]) for n in lengths]


def documents(count, seed=1):
    rng = np.random.default_rng(seed)
    return [text(rng.integers(0, 8000, n)) for n in rng.integers(100, 3000, count)]


def passes(ready, shards, batch_size=None, max_tokens=inference.MAX_TOKENS):
    """(members, the batch) of each forward pass of `encode`. Every input is in one."""
    batches = list(inference.batches_of(ready, batch_size, max_tokens, shards))
    assert sorted(i for members in batches for mine in members for i in mine) == [
        *range(len(ready))
    ]
    return [(members, inference.pack(ready, members, {})) for members in batches]


def tokens_of(packed):
    """(the tokens of a batch, those that are not padding)."""
    return packed.tokens.input_ids.size, sum(stream.length for stream in packed.streams)


def shapes_of(batches):
    return {(one.tokens.input_ids.shape, *(x.shape for x in one.tokens.rows)) for _, one in batches}


@pytest.mark.parametrize("shards", [1, 4, 8])
@pytest.mark.parametrize(
    ("ready", "programs"),
    [
        (sentences(300), 2),
        (sentences(2500), 3),
        (sentences(8192), 5),
        (sentences(3000) + documents(60), 12),
    ],
)
def test_little_is_padded_and_few_programs_compiled(shards, ready, programs):
    batches = passes(ready, shards)
    padded, real = np.sum([tokens_of(one) for _, one in batches], axis=0)
    assert padded <= 1.1 * real
    assert len(shapes_of(batches)) <= programs
    slots = sum(group.size for _, one in batches for group in one.tokens.rows)
    assert slots <= 3.5 * sum(map(len, ready))
    for _, one in batches:
        assert max(stream.length for stream in one.streams) <= inference.MAX_TOKENS
        assert one.tokens.input_ids.shape[1] % 128 == 0 or one.tokens.input_ids.shape[1] <= 2048


def test_a_pass_holds_so_many_tokens_of_each_device():
    assert len(passes(sentences(8192), 8)) < len(passes(sentences(8192), 1)) / 4
    short = passes(sentences(1000), 2, max_tokens=500)
    assert all(stream.length <= 500 for _, one in short for stream in one.streams)
    assert np.mean([stream.length for _, one in short for stream in one.streams]) > 400


def test_one_long_input_lets_the_others_fill_their_devices_as_far():
    rng = np.random.default_rng(0)
    ready = [text(rng.integers(0, 99, n)) for n in (3000, *[2900] * 7)]
    ((members, packed),) = passes(ready, 4, max_tokens=1000)[:1]
    assert sorted(map(len, members)) == [1, 1, 1, 1]
    assert packed.tokens.input_ids.shape[1] < 3200


def test_common_tokens_are_packed_once_a_device():
    """Copies of a text go to one device, which has each of five long instructions at most once."""
    rng = np.random.default_rng(0)
    once = sentences(500)
    asked = [
        text(rule, one.input_ids) for rule in rng.integers(0, 99, (5, 200)) for one in once[:100]
    ]
    for ready, more in ((once * 4, 0), (asked, 7 * 5 * 200)):
        alone, apart = (
            sum(tokens_of(one)[1] for _, one in passes(ready, shards)) for shards in (1, 8)
        )
        assert apart <= 1.15 * alone + more


@pytest.mark.parametrize("batch_size", [1, 5, 32])
def test_batch_size_counts_the_inputs_of_all_devices(batch_size):
    sizes = [sum(map(len, members)) for members, _ in passes(sentences(100), 8, batch_size)]
    assert max(sizes) == batch_size
    assert sum(size < batch_size for size in sizes) <= 4  # the last of each width


def test_the_same_vectors_on_one_device_and_eight(tiny):
    from lco_jax import OmniEmbedder, make_mesh

    texts = [f"text {i} " + "of several words " * (i % 3) for i in range(30)]
    one = make_mesh(devices=tiny.mesh.devices.reshape(-1)[:1])
    alone = OmniEmbedder.from_pretrained("builtin:tiny", mesh=one).encode(texts)
    np.testing.assert_allclose(tiny.encode(texts, max_tokens=64), alone, atol=1e-6)


def test_a_picture_travels_as_bytes_and_once(tiny):
    """A megapixel takes at most 3.8 MB, also beside a clip, whose patches have two pictures."""
    rng = np.random.default_rng(0)
    picture = {"type": "image", "image": rng.integers(0, 256, (1000, 1000, 3), np.uint8)}
    clip = {"type": "video", "video": rng.integers(0, 256, (4, 56, 84, 3), np.uint8)}
    ready = tiny.processor([[{"role": "user", "content": [part]}] for part in (picture, clip)])
    for inputs in (ready[:1], ready):
        (members,) = inference.batches_of(inputs, len(inputs), 16_384, 1)
        media = inference.pack(inputs, members, tiny.processor.rows).media()
        assert sum(x.nbytes for x in media["visual"].values()) <= 3.8e6
        assert media["visual"]["patches"].dtype == np.uint8
        assert ("visual/clips" in media) == (len(inputs) == 2)
    assert media["visual/clips"]["patches"].shape[-1] == 2 * media["visual"]["patches"].shape[-1]


@pytest.mark.parametrize("shards", [1, 4, 8])
def test_little_is_padded_beside_pictures(tiny, shards):
    rng = np.random.default_rng(0)
    pictures = [
        rng.integers(0, 256, (*size, 3), np.uint8) for size in rng.integers(100, 500, (60, 2))
    ]
    parts = [[{"role": "user", "content": [{"type": "image", "image": one}]}] for one in pictures]
    ready = sentences(1500) + tiny.processor(parts)
    over = real = 0
    for members in inference.batches_of(ready, None, inference.MAX_TOKENS, shards):
        padded, held = tokens_of(inference.pack(ready, members, tiny.processor.rows))
        over, real = over + padded, real + held
    assert over <= 1.1 * real
