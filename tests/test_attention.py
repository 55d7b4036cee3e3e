"""Attention: every way to compute it is the plain one, gradients too; rows are what their streams hold."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lco_jax import LcoError, make_mesh
from lco_jax.core.packing import WIDTHS, Shape, TokenSequence, fill, pack_stream, width_of
from lco_jax.core.target import target_platform
from lco_jax.models import attention, streams
from lco_jax.models.attention import attend_last, attend_rows


def draw(*shape, seed=0, dtype=jnp.float32):
    return jnp.array(np.random.default_rng(seed).normal(size=shape), dtype)


def inputs(tokens, rows=2, heads=2, groups=3, size=16, dtype=jnp.float32):
    shapes = (
        (rows, tokens, heads, groups, size),
        (rows, tokens, heads, size),
        (rows, tokens, heads, size),
    )
    return [draw(*shape, seed=i, dtype=dtype) for i, shape in enumerate(shapes)]


def textbook(query, key, value, segment_ids, causal):
    """softmax(Q Kᵀ / √H) V in numpy, float64, a query at a time."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    out = np.zeros(query.shape)
    for b, t, k, g in np.ndindex(query.shape[:4]):
        seen = [
            s
            for s in range(key.shape[1])
            if (s <= t or not causal)
            and (segment_ids is None or segment_ids[b, s] == segment_ids[b, t])
        ]
        scores = key[b, seen, k] @ query[b, t, k, g] / query.shape[-1] ** 0.5
        weights = np.exp(scores - scores.max())
        out[b, t, k, g] = weights @ value[b, seen, k] / weights.sum()
    return out


def value_and_gradients(query, key, value, segment_ids, causal, implementation):
    def run(*qkv):
        mixed = attention.attention(*qkv, segment_ids, causal, implementation)
        return jnp.sum(jnp.sin(mixed.astype(jnp.float32))), mixed

    gradients, mixed = jax.jit(jax.grad(run, argnums=(0, 1, 2), has_aux=True))(query, key, value)
    return mixed, *gradients


SEGMENTS = np.stack(
    [np.repeat([1, 2, 0, 3], [40, 88, 20, 108]), np.repeat([1, 2, 3, 0], [1, 127, 100, 28])]
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
    want = value_and_gradients(*(x.astype(jnp.float32) for x in qkv), segment_ids, causal, "xla")
    for got, wanted in zip(
        value_and_gradients(*qkv, segment_ids, causal, "splash"), want, strict=True
    ):
        assert got.dtype == dtype
        np.testing.assert_allclose(
            got.astype(jnp.float32), wanted, atol=tolerance * max(float(abs(wanted).max()), 1)
        )


@pytest.mark.parametrize(("segment_ids", "causal"), CASES)
def test_the_triton_kernel_equals_xla(segment_ids, causal):
    """The GPU's kernel for segments, interpreted; a head_dim that is no power of two."""
    qkv = inputs(256, size=24)
    want = value_and_gradients(*qkv, segment_ids, causal, "xla")
    for got, wanted in zip(
        value_and_gradients(*qkv, segment_ids, causal, "triton"), want, strict=True
    ):
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(float(abs(wanted).max()), 1))


@pytest.mark.parametrize("kernel", ["triton", "splash"])
@pytest.mark.parametrize("causal", [True, False])
def test_rows_that_are_no_whole_blocks(kernel, causal):
    """They are lengthened inside, and nothing attends to what is added."""
    qkv = inputs(577, rows=1, heads=1, groups=2)
    want = value_and_gradients(*qkv, None, causal, "xla")
    for got, wanted in zip(value_and_gradients(*qkv, None, causal, kernel), want, strict=True):
        assert got.shape == wanted.shape
        np.testing.assert_allclose(got, wanted, atol=2e-5 * max(float(abs(wanted).max()), 1))


@pytest.mark.parametrize("kernel", ["triton", "splash"])
def test_nothing_leaks_from_one_segment_to_another(kernel):
    """Change one segment's queries, keys and values: no other's result or gradient moves by a bit."""
    qkv = inputs(256, rows=1, groups=1)
    ids = SEGMENTS[:1]
    changed = [x.at[:, 40:128].multiply(-7.0) for x in qkv]
    others = ids[0] != 2
    runs = (value_and_gradients(*x, ids, False, kernel) for x in (qkv, changed))
    for before, after in zip(*runs, strict=True):
        np.testing.assert_array_equal(before[0, others], after[0, others])
        assert (np.asarray(before)[0, ~others] != np.asarray(after)[0, ~others]).any()


@pytest.mark.parametrize("kernel", ["triton", "splash"])
def test_kernels_on_a_mesh(monkeypatch, kernel):
    qkv = inputs(128, rows=4)
    want = value_and_gradients(*qkv, None, True, "xla")
    with jax.set_mesh(make_mesh(2, 2, 2)):
        chosen = []
        monkeypatch.setattr(attention, "_in_blocks", lambda *_: chosen.append("xla"))
        got = value_and_gradients(*qkv, None, True, kernel)
    assert not chosen
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, atol=2e-5 * max(float(abs(y).max()), 1))


def test_rows_are_little_longer_than_sequences_and_of_lengths_that_kernels_tile(monkeypatch):
    assert all(width % 128 == 0 for width in WIDTHS if width >= 128)
    assert all(
        width % 512 == 0 for width in WIDTHS if width >= 2048
    )  # splash attention's largest blocks
    assert width_of(33_000) / 33_000 < 1.13
    for length in (
        *range(4097, 60_000, 997),
        *(width + 1 for width in WIDTHS if 4096 <= width < 2**20),
    ):
        assert length <= width_of(length) <= 1.125 * length
    sizes = []
    monkeypatch.setattr(attention, "_attend", lambda q, *_: sizes.append(q.shape[1]) or q)
    for width in WIDTHS:
        query, key, _ = (
            jax.ShapeDtypeStruct(x, jnp.float32)
            for x in ((1, width, 1, 1, 8), (1, width, 1, 8), ())
        )
        sizes.clear()
        jax.eval_shape(lambda q, k: attention.attention(q, k, k, None, True, "xla"), query, key)
        assert (
            sizes[0] * width <= 4 * attention.BLOCK**2
        )  # scores in memory at once: every width has a good divisor


def test_splash_lowers_for_a_tpu(monkeypatch):
    """Its program for the real machine, forwards and backwards: there is none here to run it."""
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    qkv = inputs(1024, size=128, dtype=jnp.bfloat16)
    total = lambda *qkv: attention.attention(*qkv).astype(jnp.float32).sum()
    text = jax.jit(jax.grad(total)).trace(*qkv).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("tpu_custom_call") >= 3


def test_what_auto_takes(monkeypatch):
    def chosen(tokens, backend, segment_ids=None, **changes):
        monkeypatch.setattr(jax, "default_backend", lambda: backend)
        query = inputs(tokens, **{"size": 128, "dtype": jnp.bfloat16, **changes})[0]
        return attention._choose(query, segment_ids, "auto")

    monkeypatch.setattr("lco_jax.models.kernels._cudnn_works", lambda *_: True)
    assert chosen(1024, "gpu") == "cudnn"
    assert (
        chosen(1024, "gpu", dtype=jnp.float32)
        == chosen(64, "gpu")
        == chosen(1024, "gpu", size=256)
        == "xla"
    )
    assert (
        chosen(1024, "gpu", segment_ids=np.ones((2, 1024)))
        == chosen(1024, "gpu", size=12)
        == "triton"
    )
    assert chosen(1024, "tpu") == chosen(1024, "tpu", segment_ids=np.ones((2, 1024))) == "splash"
    assert chosen(64, "tpu") == "xla"
    assert chosen(577, "tpu") == "splash"
    assert chosen(1024, "cpu") == "xla"
    monkeypatch.setattr("lco_jax.models.kernels._cudnn_works", lambda *_: False)
    assert chosen(1024, "gpu") == "triton"
    with pytest.raises(
        LcoError, match="attention is 'flash'; it is one of: auto, xla, cudnn, triton, splash"
    ):
        attention.attention(*inputs(8), implementation="flash")


def test_a_program_has_the_kernels_of_its_mesh(monkeypatch):
    """And not those of the machine that compiles it."""
    query = inputs(1024, rows=8, dtype=jnp.bfloat16)[0]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert attention._choose(query, None, "auto") == "splash"
    with jax.set_mesh(make_mesh(8, 1, 1)):
        assert target_platform() == "cpu"
        assert attention._choose(query, None, "auto") == "xla"


def test_cudnn_that_does_not_compile_is_told_and_not_used(monkeypatch, caplog):
    from lco_jax.models import kernels

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")  # and there is none
    kernels._cudnn_works.cache_clear()
    qkv = inputs(1024, rows=1, heads=1, groups=1, dtype=jnp.bfloat16)
    assert attention._choose(qkv[0], None, "auto") == "triton"
    kernels._cudnn_works.cache_clear()
    assert "cuDNN's attention is not used" in caplog.text


def test_a_group_of_rows_in_parts(monkeypatch):
    """Rows a part at a time, on several streams, change nothing."""
    query, key, value = (
        draw(2, 6, 2, 32, 3, 16),
        draw(2, 6, 2, 32, 16, seed=1),
        draw(2, 6, 2, 32, 16, seed=2),
    )

    def run(*qkv):
        mixed = attend_rows(*qkv)
        return jnp.sum(jnp.sin(mixed)), mixed

    want = jax.grad(run, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    monkeypatch.setattr(attention, "SCORES", 2 * 3 * 32 * 32 * 2)
    got = jax.grad(run, argnums=(0, 1, 2), has_aux=True)(query, key, value)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_the_last_token_attends_as_it_does_among_all():
    query, key, value = inputs(32)
    lengths = [20, 32]
    whole = attention.attention(query, key, value)
    want = np.stack([whole[b, n - 1] for b, n in enumerate(lengths)])
    valid = np.arange(32) < np.array(lengths)[:, None]
    last = jnp.stack([query[b, n - 1] for b, n in enumerate(lengths)])
    key, value = (jnp.swapaxes(x, 1, 2) for x in (key, value))
    np.testing.assert_allclose(attend_last(last, key, value, valid), want, atol=1e-6)


# ---- between streams and rows


@pytest.fixture(params=[1, 2])
def packed_streams(request):
    """Streams whose sequences begin with none, some or all of a prefix, in rows of two widths, with room to spare."""
    rng = np.random.default_rng(0)
    prefix = np.arange(50, 56, dtype=np.int32)
    packed = []
    for _ in range(request.param):
        lengths = [(6, 20), (6, 33), (2, 9), (0, 12), (6, 1), (4, 40)]
        ids = [
            np.concatenate([prefix[:n], rng.integers(0, 40, m)]).astype(np.int32)
            for n, m in lengths
        ]
        sequences = [TokenSequence(x, np.zeros((len(x), 3), np.int32)) for x in ids]
        packed.append(pack_stream(sequences, prefix))
    tokens, which = fill(packed, [range(6)] * len(packed), Shape(130, {32: 5, 48: 3}), prefix)
    return tokens.map(jnp.asarray), packed, which


def test_rows_hold_the_sequences_and_come_home(packed_streams):
    tokens, packed, which = packed_streams
    x = draw(len(packed), 130, 2, 3)
    rows = streams.to_rows(x, tokens)
    for r, (stream, slots) in enumerate(zip(packed, which, strict=True)):
        for at, slot in zip(stream.at, slots, strict=True):
            row = rows[0][r, slot] if slot < 5 else rows[1][r, slot - 5]
            np.testing.assert_array_equal(jnp.swapaxes(row, 0, 1)[: len(at)], x[r, at])
    home = streams.from_rows(rows, tokens)
    there = np.asarray(tokens.home >= 0)
    np.testing.assert_array_equal(home[there], x[there])
    assert (np.asarray(home)[~there] == 0).all()


def test_gathers_have_the_gradient_of_gathers(packed_streams):
    """Against jax's own transposes, with whatever does not belong to a sequence left out, as in a decoder it is."""
    tokens, packed, _ = packed_streams
    x = draw(len(packed), 130, 4)

    def by_head(group, seed):
        streams, count, width = group.shape
        return draw(streams, count, 4, width, seed=seed)

    weights = [by_head(x, seed=i) * (x >= 0)[:, :, None] for i, x in enumerate(tokens.rows)]

    def through_rows(x, to_rows):
        return sum(
            jnp.sum(jnp.sin(y) * w) for y, w in zip(to_rows(x, tokens), weights, strict=True)
        )

    plain = lambda x, tokens: streams._to_rows(x, tokens.rows)
    got, want = (jax.grad(through_rows)(x, f) for f in (streams.to_rows, plain))
    there = np.asarray(tokens.home >= 0)
    np.testing.assert_allclose(got[there], want[there], atol=1e-5)
    assert (np.asarray(got)[~there] == 0).all()

    rows = [by_head(group, seed=9 + i) for i, group in enumerate(tokens.rows)]
    weight = draw(len(packed), 130, 4, seed=7) * (tokens.home >= 0)[..., None]

    def home(rows, from_rows):
        return jnp.sum(jnp.sin(from_rows(rows)) * weight)

    def plainly(rows):
        flat = jnp.concatenate(
            [jnp.swapaxes(y, 2, 3).reshape(len(packed), -1, 4) for y in rows], axis=1
        )
        return jnp.take_along_axis(flat, jnp.maximum(tokens.home, 0)[..., None], axis=1)

    got, want = (
        jax.grad(home)(rows, lambda rows: streams.from_rows(rows, tokens)),
        jax.grad(home)(rows, plainly),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
