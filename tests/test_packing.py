"""Packing: sequences in streams, streams in rows, and the shapes of both."""

import numpy as np
import pytest
from rows import row_of

from lco_jax.core.bins import assign_rows, bucket, cheapest_cut, spread
from lco_jax.core.packing import TokenSequence, fill, pack_stream
from lco_jax.core.prefixes import Prefixes
from lco_jax.core.stream_shapes import Shape, in_widths, padded_shape


@pytest.mark.parametrize("seed", range(20))
def test_assigned_rows_are_a_packing(seed):
    """Every item once, none beyond its row, no two on one token."""
    rng = np.random.default_rng(seed)
    row_length = int(rng.integers(1, 300))
    lengths = rng.integers(1, row_length + 1, int(rng.integers(1, 200)))
    assigned = assign_rows(lengths, row_length)
    assert all(len(part) == len(lengths) for part in assigned)
    taken = np.zeros((assigned.num_rows, row_length), int)
    for row, start, length in zip(assigned.row, assigned.start, lengths, strict=True):
        assert start >= 0
        assert start + length <= row_length
        taken[row, start : start + length] += 1
    assert taken.max() == 1
    assert taken.sum() == lengths.sum()
    assert taken.any(axis=1).all()
    assert all(
        np.array_equal(x, y)
        for x, y in zip(assign_rows(lengths, row_length), assigned, strict=True)
    )


def test_rows_of_nothing_and_of_too_much():
    assert assign_rows([], 16).num_rows == 0
    assert assign_rows([16, 16], 16).num_rows == 2
    with pytest.raises(ValueError, match="17 does not fit a row of 16"):
        assign_rows([3, 17], 16)


def sequences_of(lengths, rng, alphabet=3):
    """Token sequences that often begin alike."""
    return [
        TokenSequence(ids, np.tile(np.arange(n, dtype=np.int32)[:, None], 3))
        for n, ids in ((n, rng.integers(0, alphabet, n).astype(np.int32)) for n in lengths)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_common_beginnings_are_packed_once(seed):
    """A stream has the tokens of a trie of its sequences; with a prefix, only that is shared."""
    rng = np.random.default_rng(seed)
    sequences = sequences_of(rng.integers(1, 12, 60), rng)
    stream = pack_stream(sequences, None)
    assert stream.length == len(
        {tuple(s.input_ids[:n]) for s in sequences for n in range(1, len(s) + 1)}
    )
    prefix = rng.integers(0, 3, 4).astype(np.int32)
    shared = pack_stream(sequences, Prefixes.of(prefix))
    common = [
        sum(1 for n in range(1, 5) if tuple(s.input_ids[:n]) == tuple(prefix[:n]) and n <= len(s))
        for s in sequences
    ]
    assert shared.length == 4 + sum(len(s) - n for s, n in zip(sequences, common, strict=True))
    for one, with_prefix in ((stream, None), (shared, Prefixes.of(prefix))):
        tokens, which = fill([one], [range(60)], padded_shape(one.need, Shape()), with_prefix)
        for i, sequence in enumerate(sequences):
            at = row_of(tokens, (0,), which[0][i])
            assert np.array_equal(tokens.input_ids[0, at], sequence.input_ids)
        cells = np.concatenate([group.reshape(-1) for group in tokens.rows])
        real = np.flatnonzero(tokens.home[0] >= 0)
        assert np.array_equal(cells[tokens.home[0, real]], real)


def test_media_are_never_shared():
    rng = np.random.default_rng(0)
    text = sequences_of([9], rng)[0]
    slots = np.where(np.arange(9) == 4, 7, -1).astype(np.int32)
    twins = [TokenSequence(text.input_ids, text.position_ids, slots) for _ in range(2)]
    assert pack_stream(twins, None).length == 4 + 5 + 5


def test_the_prefix_has_the_same_dropout_keys_wherever_it_is_packed():
    rng = np.random.default_rng(0)
    prefix = np.arange(100, 106, dtype=np.int32)
    sequences = [
        TokenSequence(
            np.concatenate([prefix[:n], one.input_ids]), np.zeros((n + len(one), 3), np.int32)
        )
        for n, one in zip((6, 6, 3, 0), sequences_of([5, 7, 4, 6], rng), strict=True)
    ]

    def keys(chosen):
        stream = pack_stream([sequences[i] for i in chosen], Prefixes.of(prefix))
        tokens, _ = fill(
            [stream], [chosen], padded_shape(stream.need, Shape()), Prefixes.of(prefix)
        )
        return {
            i: tokens.token_keys[0, at].tolist() for i, at in zip(chosen, stream.at, strict=True)
        }

    together, alone = keys([0, 1, 2, 3]), [keys([i])[i] for i in range(4)]
    assert [together[i] for i in range(4)] == alone
    assert together[0][:6] == together[1][:6]
    assert together[2][:3] == together[0][:3]
    own = [key for i, n in enumerate((6, 6, 3, 0)) for key in together[i][n:]]
    assert len(set(own)) == len(own)


@pytest.mark.parametrize("seed", range(10))
def test_a_padded_shape_holds_what_it_must(seed):
    rng = np.random.default_rng(seed)
    sequences = sequences_of(rng.integers(1, 400, int(rng.integers(1, 80))), rng, alphabet=1000)
    stream = pack_stream(sequences, None)
    for floor in (Shape(), Shape(2000, {64: 20, 512: 3}), Shape(10**5, {512: 100})):
        shape = padded_shape(stream.need, floor)
        # `fill` raises if a sequence does not fit.
        tokens, which = fill([stream], [range(len(sequences))], shape, None)
        assert len(set(which[0])) == len(sequences)
        assert tokens.input_ids.shape == (1, shape.tokens)
        assert all(shape.rows[w] >= n for w, n in floor.rows.items())
    wide_floor = Shape(10**5, {512: 100})  # the widest group holds them all
    assert padded_shape(stream.need, wide_floor) == wide_floor
    assert in_widths(stream.need, [512]).rows == {512: len(sequences)}
    wide = in_widths(stream.need, [64])
    assert sum(wide.rows.values()) == len(sequences)
    assert {width: count for width, count in wide.rows.items() if width > 64} == {
        width: count for width, count in stream.need.rows.items() if width > 64
    }


def test_the_cheapest_cut_is_the_least_of_all_cuts():
    rng = np.random.default_rng(0)
    costs = rng.random((6, 7))

    def price(pieces):
        return sum(costs[begin, end] for begin, end in pieces)

    def cuts(begin):
        if begin == 6:
            return [[]]
        return [[(begin, end), *rest] for end in range(begin + 1, 7) for rest in cuts(end)]

    found = cheapest_cut(6, lambda begin, end: costs[begin, end])
    assert price(found) == min(map(price, cuts(0)))
    assert cheapest_cut(0, price) == []


def test_spread_is_even():
    sizes = np.random.default_rng(0).integers(1, 100, 500)
    totals = np.bincount(spread(sizes, 7), sizes)
    assert totals.max() - totals.min() <= sizes.max()


@pytest.mark.parametrize("granularity", [2, 8])
def test_bucket_bounds(granularity):
    sizes = range(1, 5000)
    buckets = [bucket(n, granularity) for n in sizes]
    assert all(n <= m for n, m in zip(sizes, buckets, strict=True))
    assert all((m - n) * granularity < n for n, m in zip(sizes, buckets, strict=True))
    assert buckets == sorted(buckets)
    assert all(bucket(m, granularity) == m for m in buckets)
    assert buckets[: 2 * granularity] == list(range(1, 2 * granularity + 1))
    doublings = int(np.ceil(np.log2(5000 / (2 * granularity))))
    assert len(set(buckets)) <= granularity * (2 + doublings)
