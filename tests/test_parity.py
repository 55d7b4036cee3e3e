"""Text embeddings equal those of transformers, and do not depend on what else is in the batch."""

import math

import jax
import numpy as np
import pytest
import reference
import torch
import transformers
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl

from lco_jax import OmniEmbedder, make_mesh
from lco_jax.core.packing import TokenSequence, fill, pack_stream
from lco_jax.core.prefixes import Prefixes
from lco_jax.core.stream_shapes import Shape, padded_shape
from lco_jax.data.positions import line_positions
from lco_jax.models.layers import apply_rotary, rotary_angles, rotation_of
from lco_jax.models.pooling import embed

TOLERANCE = 1e-5  # tells right from almost right: never loosen it


def golden(case, embedder, inputs):
    return reference.embed(case.model, embedder.tokenizer(inputs)).numpy()


def user(text):
    return [{"role": "user", "content": [{"type": "text", "text": text}]}]


def prompted(text):
    """A text as `encode` renders it."""
    return user(text + "\nSummarize the above text in one word:")


def test_embeddings_equal_transformers(case):
    embedder = OmniEmbedder.from_pretrained(case.path)
    want = golden(case, embedder, [prompted(text) for text in reference.TEXTS])
    got = embedder.encode(reference.TEXTS)
    assert got.dtype == np.float32
    assert np.abs(got - want).max() < TOLERANCE
    cosines = want @ want.T
    others = ~np.eye(len(want), dtype=bool)
    assert np.abs(cosines)[others].min() < 0.9  # the texts do differ


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


def text_embedder(case, mesh):
    """An embedder without towers on a mesh of these sizes."""
    devices = jax.devices()[: math.prod(mesh)]
    mesh = make_mesh(*mesh, devices=devices)
    return OmniEmbedder.from_pretrained(case.path, mesh=mesh, modalities=["text"])


@pytest.fixture(scope="module")
def vectors_alone(cases):
    """Of each text by itself, on one device."""
    embedder = text_embedder(cases["omni"], (1, 1, 1))
    return embedder.encode(reference.TEXTS, batch_size=1)


@pytest.mark.parametrize(
    "mesh",
    [
        (1, 1, 1),
        (2, 2, 2),
        *(pytest.param(x, marks=pytest.mark.slow) for x in ((8, 1, 1), (1, 8, 1), (1, 1, 8))),
    ],
)
def test_same_vectors_alone_in_any_batch_and_on_any_mesh(cases, vectors_alone, mesh):
    texts, want = reference.TEXTS, vectors_alone
    embedder = text_embedder(cases["omni"], mesh)
    for batch_size in (4, 64):
        got = embedder.encode(texts, batch_size=batch_size)
        assert np.abs(got - want).max() < TOLERANCE
    alone = embedder.encode(texts[:2], batch_size=1)
    assert np.abs(alone - want[:2]).max() < TOLERANCE
    backwards = embedder.encode(texts[::-1] * 5)
    assert np.abs(backwards[: len(want)][::-1] - want).max() < TOLERANCE


@pytest.mark.parametrize("shared", [0, 7, None])
def test_a_sequence_does_not_see_its_neighbours(cases, shared):
    """Change one sequence of a stream: no other embedding may move by a bit.

    shared: tokens of a prefix that all begin with; None: inference, where any tokens may be shared.
    """
    embedder = text_embedder(cases["vl"], (1, 1, 1))
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 500, n).astype(np.int32) for n in (30, 25, 20, 40, 13)]
    prefix = None if shared is None else Prefixes.of(np.arange(shared, dtype=np.int32))
    first = shared or 0
    for ids in sequences:
        ids[:first] = np.arange(first)
    layout = Shape(160, {32: 4, 48: 4})

    @jax.jit
    def embeddings(tokens):
        return embed(embedder.model.decoder, embedder.params, tokens)

    def run(sequences):
        packed = [TokenSequence(ids, line_positions(0, len(ids))) for ids in sequences]
        stream = pack_stream(packed, prefix)
        assert padded_shape(stream.need, layout) == layout
        tokens, slots = fill([stream], [range(5)], layout, prefix)
        return np.asarray(embeddings(tokens))[0, slots[0]]

    before = run(sequences)
    for changed in range(5):
        others = [ids.copy() for ids in sequences]
        others[changed][first:] = (others[changed][first:] + 1) % 500
        moved = np.abs(run(others) - before).max(axis=1)
        assert moved[changed] > 1e-3
        assert (np.delete(moved, changed) == 0).all()


def test_mrope_equals_transformers():
    """Positions that differ by axis, which those of a text never do."""
    section = [2, 3, 3]
    config = transformers.Qwen2_5_VLTextConfig(
        hidden_size=32,
        num_attention_heads=2,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
    )
    rng = np.random.default_rng(0)
    positions = rng.integers(0, 900, (2, 7, 3))
    x = rng.normal(size=(2, 7, 3, 16)).astype(np.float32)
    embedding = modeling_qwen2_5_vl.Qwen2_5_VLRotaryEmbedding(config)
    cos, sin = embedding(torch.tensor(x), torch.tensor(positions).permute(2, 0, 1))
    by_head = torch.tensor(x).transpose(1, 2)
    want, _ = modeling_qwen2_5_vl.apply_rotary_pos_emb(by_head, by_head, cos, sin)
    angles = rotary_angles(positions, 16, 1e6, tuple(section))
    got = apply_rotary(x, rotation_of(angles))
    assert np.abs(np.asarray(got) - want.transpose(1, 2).numpy()).max() < 1e-5


def test_long_texts(cases):
    """Beyond one block of attention, among short ones."""
    case = cases["vl"]
    embedder = text_embedder(case, (1, 1, 1))
    texts = ["a short one", "many different words " * 300]
    turns = [prompted(text) for text in texts]
    assert len(embedder.tokenizer(turns)[1]) > 1024
    # One by one: left padding would give the short text positions in the thousands, whose angles
    # float32 rounds.
    want = np.concatenate([golden(case, embedder, [turn]) for turn in turns])
    assert np.abs(embedder.encode(texts) - want).max() < TOLERANCE


def test_bfloat16_stays_close_and_float32_out(cases):
    exact = OmniEmbedder.from_pretrained(cases["vl"].path).encode(reference.TEXTS)
    half = OmniEmbedder.from_pretrained(cases["vl"].path, dtype="bfloat16").encode(reference.TEXTS)
    assert half.dtype == np.float32
    assert (half * exact).sum(-1).min() > 0.995
