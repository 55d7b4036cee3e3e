"""Attention: every kernel gives what the plain one gives, gradients too; rows and streams agree."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params

from lco_jax import LcoError, make_mesh
from lco_jax.core.packing import TokenSequence, fill, pack_stream
from lco_jax.core.prefixes import Prefixes
from lco_jax.core.stream_shapes import WIDTHS, Shape, width_of
from lco_jax.core.target import target_platform
from lco_jax.models import attention, kernels, streams
from lco_jax.models.attention import attend_last, attend_rows


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(tokens, rows=2, heads=2, groups=3, size=16, dtype=jnp.float32):
    """Queries, keys and values, as `attention` takes them."""
    query = draw(rows, tokens, heads, groups, size, seed=0, dtype=dtype)
    key = draw(rows, tokens, heads, size, seed=1, dtype=dtype)
    value = draw(rows, tokens, heads, size, seed=2, dtype=dtype)
    return [query, key, value]


def textbook(query, key, value, segment_ids, causal):
    """softmax(Q Kᵀ / √H) V in numpy, float64, a query at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    positions = np.arange(key.shape[1])
    out = np.zeros(query.shape)
    for b, t, k, g in np.ndindex(query.shape[:4]):
        seen = positions <= t if causal else positions >= 0
        if segment_ids is not None:
            seen &= segment_ids[b] == segment_ids[b, t]
        scores = key[b, seen, k] @ query[b, t, k, g] / query.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, t, k, g] = weights @ value[b, seen, k] / weights.sum()
    return out


def assert_close(got, want, tolerance):
    """Results and gradients, each as close as its largest value allows."""
    for x, y in zip(got, want, strict=True):
        assert x.shape == y.shape
        largest = max(float(abs(y).max()), 1)
        np.testing.assert_allclose(x.astype(jnp.float32), y, atol=tolerance * largest)


def value_and_gradients(query, key, value, segment_ids, causal, implementation):
    def run(*qkv):
        mixed = attention.attention(*qkv, segment_ids, causal, implementation)
        return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

    gradients, mixed = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return mixed, *gradients


SEGMENTS = np.stack(
    [
        np.repeat([1, 2, 0, 3], [40, 88, 20, 108]),
        np.repeat([1, 2, 3, 0], [1, 127, 100, 28]),
    ]
)
CASES = [(None, True), (SEGMENTS, False), (SEGMENTS, True)]


@pytest.mark.parametrize(("segment_ids", "causal"), CASES)
def test_xla_is_the_textbooks(segment_ids, causal):
    qkv = inputs(256)
    got = attention.attention(*qkv, segment_ids, causal, "xla")
    assert np.abs(got - textbook(*qkv, segment_ids, causal)).max() < 1e-5


@pytest.mark.parametrize(("segment_ids", "causal"), CASES)
def test_blocks_equal_the_whole(monkeypatch, segment_ids, causal):
    qkv = inputs(256)
    whole = value_and_gradients(*qkv, segment_ids, causal, "xla")
    monkeypatch.setattr(attention, "BLOCK", 32)
    blocks = value_and_gradients(*qkv, segment_ids, causal, "xla")
    for got, want in zip(blocks, whole, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize(("segment_ids", "causal"), CASES)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(jnp.float32, 2e-5), pytest.param(jnp.bfloat16, 4e-2, marks=pytest.mark.slow)],
)
def test_splash_equals_xla(segment_ids, causal, dtype, tolerance):
    """The TPU's kernel, interpreted; a head_dim that is no multiple of its lanes."""
    qkv = inputs(256, dtype=dtype)
    exact = [x.astype(jnp.float32) for x in qkv]
    want = value_and_gradients(*exact, segment_ids, causal, "xla")
    got = value_and_gradients(*qkv, segment_ids, causal, "splash")
    assert all(x.dtype == dtype for x in got)
    assert_close(got, want, tolerance)


@pytest.mark.parametrize(("segment_ids", "causal"), CASES)
def test_the_triton_kernel_equals_xla(segment_ids, causal):
    """The GPU's kernel for segments, interpreted; a head_dim that is no power of two."""
    qkv = inputs(256, size=24)
    want = value_and_gradients(*qkv, segment_ids, causal, "xla")
    got = value_and_gradients(*qkv, segment_ids, causal, "triton")
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("kernel", ["triton", "splash"])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_are_no_whole_blocks(kernel, causal):
    """The kernels lengthen them, and nothing attends to what is added."""
    qkv = inputs(577, rows=1, heads=1, groups=2)
    want = value_and_gradients(*qkv, None, causal, "xla")
    got = value_and_gradients(*qkv, None, causal, kernel)
    assert_close(got, want, 2e-5)


@pytest.mark.parametrize("kernel", ["triton", "splash"])
def test_nothing_leaks_from_one_segment_to_another(kernel):
    """Change one segment's inputs: no other's result or gradient moves by a bit."""
    qkv = inputs(256, rows=1, groups=1)
    ids = SEGMENTS[:1]
    is_changed = ids[0] == 2
    changed = [x.at[:, is_changed].multiply(-7.0) for x in qkv]
    run = partial(value_and_gradients, segment_ids=ids, causal=False, implementation=kernel)
    for before, after in zip(run(*qkv), run(*changed), strict=True):
        np.testing.assert_array_equal(before[0, ~is_changed], after[0, ~is_changed])
        assert (before[0, is_changed] != after[0, is_changed]).any()


@pytest.mark.parametrize("kernel", ["triton", "splash"])
def test_kernels_on_a_mesh(monkeypatch, kernel):
    qkv = inputs(128, rows=4)
    want = value_and_gradients(*qkv, None, True, "xla")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        chosen = []
        monkeypatch.setattr(attention, "_in_blocks", lambda *_: chosen.append("xla"))
        got = value_and_gradients(*qkv, None, True, kernel)
    assert not chosen
    assert_close(got, want, 2e-5)


def test_rows_are_little_longer_than_sequences_and_of_lengths_that_kernels_tile():
    assert all(width % 128 == 0 for width in WIDTHS if width >= 128)
    large = [width for width in WIDTHS if width >= 2048]
    assert all(width % 512 == 0 for width in large)  # splash attention's largest blocks
    assert width_of(33_000) / 33_000 < 1.13
    just_above = [width + 1 for width in WIDTHS if 4096 <= width < 2**20]
    for length in (*range(4097, 60_000, 997), *just_above):
        assert length <= width_of(length) <= 1.125 * length


@pytest.mark.parametrize("width", WIDTHS)
def test_every_width_has_a_good_divisor(width):
    """The scores that are in memory at once are bounded."""
    assert attention._block_size(width) * width <= 4 * attention.BLOCK**2


def test_splash_lowers_for_a_tpu(monkeypatch):
    """Its program for the real machine, forwards and backwards: there is none here to run it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    qkv = inputs(1024, size=128, dtype=jnp.bfloat16)

    def total(*qkv):
        return attention.attention(*qkv).astype(jnp.float32).sum()

    text = jax.jit(jax.grad(total)).trace(*qkv).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


def test_what_auto_takes(monkeypatch):
    def chosen(tokens, backend, segment_ids=None, **changes):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        query = inputs(tokens, **{"size": 128, "dtype": jnp.bfloat16, **changes})[0]
        return attention._choose(query, segment_ids, "auto")

    segments = np.ones((2, 1024))
    monkeypatch.setattr(kernels, "_cudnn_works", lambda *_: True)
    assert chosen(1024, "gpu") == "cudnn"
    assert chosen(1024, "gpu", dtype=jnp.float32) == "xla"
    assert chosen(64, "gpu") == "xla"
    assert chosen(1024, "gpu", size=256) == "xla"
    assert chosen(1024, "gpu", segment_ids=segments) == "triton"
    assert chosen(1024, "gpu", size=12) == "triton"
    assert chosen(1024, "tpu") == "splash"
    assert chosen(1024, "tpu", segment_ids=segments) == "splash"
    assert chosen(577, "tpu") == "splash"
    assert chosen(64, "tpu") == "xla"
    assert chosen(1024, "cpu") == "xla"
    monkeypatch.setattr(kernels, "_cudnn_works", lambda *_: False)
    assert chosen(1024, "gpu") == "triton"
    known = "attention is 'flash'; it is one of: auto, xla, cudnn, triton, splash"
    with pytest.raises(LcoError, match=known):
        attention.attention(*inputs(8), implementation="flash")


def test_a_program_has_the_kernels_of_its_mesh(monkeypatch):
    """And not those of the machine that compiles it."""
    query = inputs(1024, rows=8, dtype=jnp.bfloat16)[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention._choose(query, None, "auto") == "splash"
    with jax.set_mesh(make_mesh(8, 1, 1)):
        assert target_platform() == "cpu"
        assert attention._choose(query, None, "auto") == "xla"


def test_cudnn_that_does_not_compile_is_logged_and_not_used(monkeypatch, caplog):
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # and there is none
    kernels._cudnn_works.cache_clear()
    qkv = inputs(1024, rows=1, heads=1, groups=1, dtype=jnp.bfloat16)
    assert attention._choose(qkv[0], None, "auto") == "triton"
    kernels._cudnn_works.cache_clear()
    assert "cuDNN's attention is not used" in caplog.text


def rows_with_gradients(query, key, value):
    """`attend_rows` and its gradients; the largest array of scores that its program has."""

    def run(*qkv):
        mixed = attend_rows(*qkv)
        return jnp.sum(jnp.sin(mixed)), mixed

    program = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))
    traced = program.trace(query, key, value)
    gradients, mixed = program(query, key, value)
    return [mixed, *gradients], largest_array(traced.jaxpr.jaxpr)


def largest_array(jaxpr):
    """The elements of the largest array that is computed in a program or in those within it."""
    largest = 0
    for equation in jaxpr.eqns:
        sizes = [variable.aval.size for variable in equation.outvars]
        within = [largest_array(inner) for inner in jaxprs_in_params(equation.params)]
        largest = max([largest, *sizes, *within])
    return largest


@pytest.mark.parametrize(
    ("width", "block", "at_once"),
    [
        (32, 1024, 2),  # rows of one block, two at a time
        (64, 32, 1),  # rows wider than a block, one at a time
    ],
)
def test_a_group_of_rows_in_parts(monkeypatch, width, block, at_once):
    """Rows a part at a time, on several streams, change nothing and bound the memory."""
    streams, rows, heads, groups = 2, 6, 2, 3
    query = draw(streams, rows, heads, width, groups, 2)
    key = draw(streams, rows, heads, width, 2, seed=1)
    value = draw(streams, rows, heads, width, 2, seed=2)
    want, all_scores = rows_with_gradients(query, key, value)
    assert all_scores == streams * rows * heads * groups * width**2

    scores_of_row = heads * groups * width * min(width, block)
    monkeypatch.setattr(attention, "BLOCK", block)
    monkeypatch.setattr(attention, "SCORES", scores_of_row * at_once)
    got, scores = rows_with_gradients(query, key, value)
    assert scores <= streams * at_once * scores_of_row
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5)


def test_the_last_token_attends_as_it_does_among_all():
    query, key, value = inputs(32)
    rows, lengths = np.arange(2), np.array([20, 32])
    among_all = attention.attention(query, key, value)
    want = among_all[rows, lengths - 1]
    last = query[rows, lengths - 1]
    valid = np.arange(32) < lengths[:, None]
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    np.testing.assert_allclose(attend_last(last, key, value, valid), want, atol=1e-6)


# ---- between streams and rows


LENGTHS = [(6, 20), (6, 33), (2, 9), (0, 12), (6, 1), (4, 40)]  # of the prefix, of the rest
LAYOUT = Shape(130, {32: 5, 48: 3})


@pytest.fixture(params=[1, 2])
def packed_streams(request):
    """Streams of sequences that begin with none, some or all of a prefix, and how they are packed.

    Their rows have two widths, and room to spare.
    """
    rng = np.random.default_rng(0)
    prefix = np.arange(50, 56, dtype=np.int32)
    packed = []
    for _ in range(request.param):
        sequences = []
        for shared, own in LENGTHS:
            ids = np.concatenate([prefix[:shared], rng.integers(0, 40, own)]).astype(np.int32)
            positions = np.zeros((len(ids), 3), np.int32)
            sequences.append(TokenSequence(ids, positions))
        packed.append(pack_stream(sequences, Prefixes.of(prefix)))
    tokens, slots = fill(packed, [range(6)] * len(packed), LAYOUT, Prefixes.of(prefix))
    return tokens.map(jnp.asarray), packed, slots


def test_rows_hold_the_sequences_and_come_home(packed_streams):
    tokens, packed, slots = packed_streams
    x = draw(len(packed), 130, 2, 3)
    rows = jax.jit(streams.to_rows)(x, tokens)
    home = np.asarray(jax.jit(streams.from_rows)(rows, tokens))
    x, narrow, wide = np.asarray(x), *map(np.asarray, rows)
    for r, stream in enumerate(packed):
        for indices, slot in zip(stream.at, slots[r], strict=True):
            row = narrow[r, slot] if slot < 5 else wide[r, slot - 5]
            by_token = row.swapaxes(0, 1)
            np.testing.assert_array_equal(by_token[: len(indices)], x[r, indices])
    is_token = np.asarray(tokens.home >= 0)
    np.testing.assert_array_equal(home[is_token], x[is_token])
    assert (home[~is_token] == 0).all()


def draw_rows(tokens, seed):
    """Values of 4 heads in the rows of each width."""
    shapes = [(len(group), group.shape[1], 4, group.shape[2]) for group in tokens.rows]
    return [draw(*shape, seed=seed + i) for i, shape in enumerate(shapes)]


def test_the_gradient_of_a_gather_to_rows(packed_streams):
    """Against jax's own transpose. Slots of no sequence are left out, as in a decoder."""
    tokens, packed, _ = packed_streams
    x = draw(len(packed), 130, 4)
    weights = []
    for weight, group in zip(draw_rows(tokens, seed=0), tokens.rows, strict=True):
        weights.append(weight * (group >= 0)[:, :, None])

    def loss(x, to_rows):
        rows = to_rows(x)
        return sum(jnp.sum(jnp.sin(y) * w) for y, w in zip(rows, weights, strict=True))

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got = gradient(x, partial(streams.to_rows, tokens=tokens))
    want = gradient(x, partial(streams._to_rows, groups=tokens.rows))
    is_token = np.asarray(tokens.home >= 0)
    np.testing.assert_allclose(got[is_token], want[is_token], atol=1e-5)
    assert (np.asarray(got)[~is_token] == 0).all()


def test_the_gradient_of_a_gather_from_rows(packed_streams):
    """Against jax's own transpose."""
    tokens, packed, _ = packed_streams
    rows = draw_rows(tokens, seed=9)
    weight = draw(len(packed), 130, 4, seed=7) * (tokens.home >= 0)[..., None]

    def plain(rows):
        by_token = [jnp.swapaxes(y, 2, 3).reshape(len(packed), -1, 4) for y in rows]
        slots = jnp.maximum(tokens.home, 0)[..., None]
        return jnp.take_along_axis(jnp.concatenate(by_token, axis=1), slots, axis=1)

    def loss(rows, from_rows):
        return jnp.sum(jnp.sin(from_rows(rows)) * weight)

    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    got = gradient(rows, partial(streams.from_rows, tokens=tokens))
    want = gradient(rows, plain)
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)
