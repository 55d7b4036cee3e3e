"""Text embeddings equal those of transformers, and do not depend on what else is in the batch."""

import jax
import numpy as np
import pytest
import reference
import torch
import transformers

from lco_jax import OmniEmbedder, make_mesh
from lco_jax.core.packing import Shape, TokenSequence, fill, pack_stream, padded_shape
from lco_jax.data.positions import line_positions
from lco_jax.models.decoder import embed
from lco_jax.models.layers import apply_rotary, rotary_angles, rotation_of

TOLERANCE = 1e-5  # tells right from almost right: never loosen it


def golden(case, embedder, inputs):
    return reference.embed(case.model, embedder.tokenizer(inputs)).numpy()


def user(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def test_embeddings_equal_transformers(case):
    embedder = OmniEmbedder.from_pretrained(case.path)
    want = golden(
        case,
        embedder,
        [user(t + "\nSummarize the above text in one word:") for t in reference.TEXTS],
    )
    got = embedder.encode(reference.TEXTS)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < TOLERANCE
    assert (
        np.abs(want @ want.T - np.eye(len(want)))[~np.eye(len(want), dtype=bool)].min() < 0.9
    )  # texts do differ


def test_chat_messages_are_rendered_as_they_are(cases):
    case = cases["vl"]
    embedder = OmniEmbedder.from_pretrained(case.path)
    system = [{"role": "system", "content": "You only speak in nouns."}]
    inputs = [
        system + user("one two"),
        user("three"),
        [*user("a"), {"role": "assistant", "content": "b"}, *user("c")],
    ]
    assert np.abs(embedder.encode(inputs) - golden(case, embedder, inputs)).max() < TOLERANCE


def test_rendered_text_is_the_references(cases):
    tokenizer = OmniEmbedder.from_pretrained(cases["vl"].path).tokenizer
    assert tokenizer.render(user("Hi.\nSummarize the above text in one word:")) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\nHi.\n"
        "Summarize the above text in one word:<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    "mesh",
    [(1, 1, 1), (2, 2, 2), (8, 1, 1), (1, 8, 1), pytest.param((1, 1, 8), marks=pytest.mark.slow)],
)
def test_same_vectors_alone_in_any_batch_and_on_any_mesh(cases, mesh):
    devices = jax.devices()[: int(np.prod(mesh))]
    embedder = OmniEmbedder.from_pretrained(
        cases["omni"].path, mesh=make_mesh(*mesh, devices=devices)
    )
    alone = OmniEmbedder.from_pretrained(
        cases["omni"].path, mesh=make_mesh(devices=jax.devices()[:1])
    )
    want = np.stack([alone.encode(text) for text in reference.TEXTS])
    for batch_size in (1, 4, 64):
        assert (
            np.abs(embedder.encode(reference.TEXTS, batch_size=batch_size) - want).max() < TOLERANCE
        )
    backwards = embedder.encode(reference.TEXTS[::-1] * 5)
    assert np.abs(backwards[: len(want)][::-1] - want).max() < TOLERANCE


@pytest.mark.parametrize("shared", [0, 7, None])
def test_a_sequence_does_not_see_its_neighbours(cases, shared):
    """Change one sequence of a stream: no other embedding may move by a bit. shared: tokens that all begin with."""
    embedder = OmniEmbedder.from_pretrained(cases["vl"].path)
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 500, n).astype(np.int32) for n in (30, 25, 20, 40, 13)]
    prefix = np.arange(shared or 0, dtype=np.int32)
    for ids in sequences:
        ids[: len(prefix)] = prefix
    shape = Shape(160, {32: 4, 48: 4})

    @jax.jit
    def embeddings(tokens):
        return embed(embedder.model.decoder, embedder.params, tokens)

    def run(sequences):
        packed = [TokenSequence(ids, line_positions(0, len(ids))) for ids in sequences]
        stream = pack_stream(packed, None if shared is None else prefix)
        assert padded_shape(stream.need, shape) == shape
        tokens, which = fill([stream], [range(5)], shape, None if shared is None else prefix)
        return np.asarray(embeddings(tokens))[0, which[0]]

    before = run(sequences)
    for changed in range(5):
        others = [s.copy() for s in sequences]
        others[changed][len(prefix) :] = (others[changed][len(prefix) :] + 1) % 500
        moved = np.abs(run(others) - before).max(axis=1)
        assert moved[changed] > 1e-3
        assert (np.delete(moved, changed) == 0).all()


def test_mrope_equals_transformers():
    """Positions that differ by axis, which text never has: the place of the towers to come."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
        Qwen2_5_VLRotaryEmbedding,
        apply_rotary_pos_emb,
    )

    section = [2, 3, 3]
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=32,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    )
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 900, (2, 7, 3))
    x = rng.normal(size=(2, 7, 3, 16)).astype(np.float32)
    cos, sin = Qwen2_5_VLRotaryEmbedding(config)(
        torch.tensor(x), torch.tensor(positions).permute(2, 0, 1)
    )
    heads_first = torch.tensor(x).transpose(1, 2)
    want, _ = apply_rotary_pos_emb(heads_first, heads_first, cos, sin)
    got = apply_rotary(x, rotation_of(rotary_angles(positions, 16, 1e6, tuple(section))))
    assert np.abs(np.asarray(got) - want.transpose(1, 2).numpy()).max() < 1e-5


def test_long_texts(cases):
    """Beyond one block of attention, among short ones."""
    case = cases["vl"]
    embedder = OmniEmbedder.from_pretrained(case.path, mesh=make_mesh(devices=jax.devices()[:1]))
    texts = ["a short one", "many different words " * 300]
    turns = [user(text + "\nSummarize the above text in one word:") for text in texts]
    assert len(embedder.tokenizer(turns)[1]) > 1024
    # one by one: left padding would give the short text positions in the thousands, whose angles float32 rounds
    want = np.concatenate([golden(case, embedder, [turn]) for turn in turns])
    assert np.abs(embedder.encode(texts) - want).max() < TOLERANCE


def test_bfloat16_stays_close_and_float32_out(cases):
    exact = OmniEmbedder.from_pretrained(cases["vl"].path).encode(reference.TEXTS)
    half = OmniEmbedder.from_pretrained(cases["vl"].path, dtype="bfloat16").encode(reference.TEXTS)
    assert half.dtype == np.float32
    assert (half * exact).sum(-1).min() > 0.995
