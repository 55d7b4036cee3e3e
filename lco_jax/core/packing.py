"""Packed streams: many sequences in one stream of tokens, in which a beginning that they share lies once.

Dimensions: C GradCache chunks, R streams (one a device's share), T tokens of a stream, W width and N rows of a group of
attention rows, U slots of all a stream's attention rows (Σ N · W), S sequences of a stream (Σ N), B records, M hard
negatives a record (the most), P tokens of the prefix.

In a causal decoder a token's state depends on what stands before it and on nothing else. So sequences that begin alike
can share the tokens of their beginning, and every matrix product runs over the stream, which has no padding but at its
end. Attention alone needs whole sequences: `rows` says which tokens of the stream make up each, and they are gathered
into groups of a few widths, begun at the left, where plain causal attention never sees a pad.
"""

import heapq
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from lco_jax.core.weights import GOLDEN_RATIO, fold_in

TILE = 128  # lanes of a TPU's registers
# Of attention rows, up to a million tokens. From 128 on they are multiples of what the kernels tile, 128, from 1,024
# on of 256, from 2,048 on of 512; from 4,096 on a row is longer than its sequence by an eighth at most.
WIDTHS = (
    *(32, 48, 64, 96),
    *range(128, 1024, 128),
    *range(1024, 2048, 256),
    *range(2048, 4096, 512),
    *(eighths * 2**i for i in range(9, 17) for eighths in range(8, 16)),
    2**20,
)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=[
        "input_ids",
        "position_ids",
        "token_keys",
        "media_slots",
        "rows",
        "home",
        "last_tokens",
    ],
    meta_fields=["prefix_length"],
)
@dataclass(frozen=True)
class PackedTokens:
    """The decoder's input; leading axes are free (the training step puts GradCache chunks before R).

    input_ids: int32 [R, T]. position_ids: int32 [R, T, 3]; the axes are time, height and width (M-RoPE).
    token_keys: uint32 [R, T], identity of a token (sequence, position), for dropout.
    media_slots: int32 [R, T], which media token of the stream's shard takes the token's place; -1 for none.
    rows: int32 [R, N, W] for each width: where in the stream each token of a sequence lies; -1 after its end.
    home: int32 [R, T], the first of the U slots at which a token stands; -1 for padding.
    last_tokens: int32 [R, S], where each sequence's last token lies; 0 for the empty rows.
    prefix_length: P where at most the stream's first P tokens are shared, and lie in the same column of every row that
    has them (training, whose backward pass relies on it); None where any may be (inference).
    """

    input_ids: Array
    position_ids: Array
    token_keys: Array
    media_slots: Array
    rows: tuple[Array, ...]
    home: Array
    last_tokens: Array
    prefix_length: int | None = None

    def map(self, function: Callable[[Array], Array]) -> "PackedTokens":
        """`function` applied to every array."""
        return jax.tree.map(function, self)

    def with_seed(self, seed: Array | int) -> "PackedTokens":
        """The same tokens with other dropout masks for each seed."""
        return replace(self, token_keys=fold_in(self.token_keys, seed))


@partial(jax.tree_util.register_dataclass, data_fields=["at", "ids", "record"], meta_fields=[])
@dataclass(frozen=True)
class Answers:
    """What a generator is to say. at: int32 [C, R, A], the token of the stream that says it; ids: int32 [C, R, A], what
    it says; record: int32 [C, R, A], whose it is in the batch; -1 beyond the last."""

    at: Array
    ids: Array
    record: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "sequences", "content", "media", "answers"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """A global batch on the mesh.

    tokens: `PackedTokens` of [C, R, …], streams split over the mesh axes (data, fsdp).
    sequences: int32 [B, 2 + M], replicated: where anchor, positive and negatives of each record lie among the
    C · R · S sequences; -1 for a negative that a record does not have, and throughout for a record that was left out.
    content: int32 [B, 2 + M], replicated: equal for sides that say the same.
    Of a batch that P processes share, both are [B / P, R, 2 + M] and split as the streams are: a
    process has its own records, number p + i · P at [i, the first of its streams]; the step gathers
    them (`whole`).
    media: what each tower reads: tower -> argument -> rows, split over the mesh as the batch's are; {} for text alone.
    answers: the tokens that generative training predicts, split as the streams are; None in contrastive training.
    """

    tokens: PackedTokens
    sequences: Array
    content: Array
    media: dict[str, dict[str, Array]]
    answers: Answers | None = None

    def whole(self, processes: int) -> "Batch":
        """With `sequences` and `content` of all records, for every device."""
        if processes == 1:
            return self

        def gathered(table: Array) -> Array:
            count, streams, sides = table.shape
            each = table.reshape(count, processes, streams // processes, sides)
            return each[:, :, 0].reshape(count * processes, sides)

        return replace(self, sequences=gathered(self.sequences), content=gathered(self.content))


@dataclass(frozen=True)
class TokenSequence:
    """Tokens on the host. input_ids: int32 [n]; position_ids: int32 [n, 3]; media_slots: int32 [n], None for text.

    answer: int32 [m], what the last m tokens are each to be followed by; None where nothing is to be said.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    media_slots: np.ndarray | None = None
    answer: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True)
class Shape:
    """Static sizes of a stream. tokens: T; rows: N of each width W; chunks: C; answers: A."""

    tokens: int = 0
    rows: Mapping[int, int] = field(default_factory=dict)
    chunks: int = 1
    answers: int = 0


class Stream(NamedTuple):
    """Sequences laid into one stream. at: of each, where its tokens lie: int32 [n]; length: how many tokens it took."""

    sequences: list[TokenSequence]
    at: list[np.ndarray]
    length: int

    @property
    def need(self) -> Shape:
        """The least shape that holds it."""
        said = sum(len(one.answer) for one in self.sequences if one.answer is not None)
        return Shape(self.length, Counter(width_of(len(x)) for x in self.at), answers=said)


def bucket(n: int, granularity: int = 8) -> int:
    """The least m ≥ n of the form k · 2^j with k ≤ 2 · granularity: few distinct sizes, waste under 1 / granularity."""
    step = 1
    while n > 2 * granularity * step:
        step *= 2
    return -(-n // step) * step


def tiled(n: int) -> int:
    """n tokens, rounded up to whole tiles of a TPU's registers where that costs little."""
    return -(-n // TILE) * TILE if n >= 32 * TILE else n


def width_of(length: int) -> int:
    """The width of the attention row that a sequence of so many tokens is given."""
    return WIDTHS[bisect_left(WIDTHS, length)]


def common_length(a: np.ndarray, b: np.ndarray) -> int:
    """How many items a and b have in common at their beginning."""
    differ = a[: len(b)] != b[: len(a)]
    return int(differ.argmax()) if differ.any() else len(differ)


def pack_stream(sequences: Sequence[TokenSequence], prefix: np.ndarray | None) -> Stream:
    """Lay sequences side by side, each without what lies there already.

    prefix: token ids [P] at the start of the stream, the only ones that are shared (training, where dropout must be a
    sequence's own and gradients of what is shared are summed); None: every common beginning is shared.
    """
    ids = [_text_ids(one, i) for i, one in enumerate(sequences)]
    order: Iterable[int] = range(len(ids))
    if prefix is None:
        order = sorted(
            order, key=lambda i: ids[i].tobytes()
        )  # in any order of tokens the like lie side by side
    before = np.zeros(0, np.int32) if prefix is None else prefix
    before_at = np.arange(len(before), dtype=np.int32)
    length, at = len(before), [before_at] * len(ids)
    for i in order:
        shared = common_length(ids[i], before)
        own = len(ids[i]) - shared
        at[i] = np.concatenate(
            [before_at[:shared], np.arange(length, length + own, dtype=np.int32)]
        )
        length += own
        if prefix is None:
            before, before_at = ids[i], at[i]
    return Stream(list(sequences), at, length)


def _text_ids(one: TokenSequence, i: int) -> np.ndarray:
    """Its token ids, with a number of its own for media, which no other sequence shares."""
    return (
        one.input_ids
        if one.media_slots is None
        else np.where(one.media_slots < 0, one.input_ids, -1 - i)
    )


def spread(sizes: Iterable[int], bins: int) -> np.ndarray:
    """Which of `bins` each item goes to: the largest first, each to the least filled. Deterministic."""
    sizes = np.fromiter(sizes, np.int64)
    filled = [(0, i) for i in range(bins)]
    chosen = np.zeros(len(sizes), np.int64)
    for i in np.argsort(-sizes, kind="stable"):
        total, chosen[i] = filled[0]
        heapq.heapreplace(filled, (total + int(sizes[i]), int(chosen[i])))
    return chosen


def padded_shape(need: Shape, floor: Shape) -> Shape:
    """A shape that holds `need`: `floor` wherever that does, so that batches alike have one shape; else few values.

    A sequence may lie in a wider row than it needs, so what one group lacks the spare rows of a wider one give.
    """
    rows, lacking = dict(floor.rows) or {WIDTHS[0]: 1}, 0
    for width in sorted({*need.rows, *floor.rows}, reverse=True):
        lacking += need.rows.get(width, 0) - floor.rows.get(width, 0)
        if lacking > 0:
            rows[width] = bucket(floor.rows.get(width, 0) + lacking, 4)
            lacking = floor.rows.get(width, 0) + lacking - rows[width]
    tokens = floor.tokens if need.tokens <= floor.tokens else tiled(bucket(need.tokens, 16))
    answers = floor.answers if need.answers <= floor.answers else bucket(need.answers, 16)
    return Shape(tokens, dict(sorted(rows.items())), max(need.chunks, floor.chunks), answers)


def in_widths(need: Shape, widths: Iterable[int]) -> Shape:
    """`need` with each row in the least of `widths` that holds it, or in its own where none does.

    Streams whose longest sequences differ a little then need the same rows, and the largest of their needs is no larger
    than one of them.
    """
    rows, known = Counter[int](), sorted(widths)
    for width, count in need.rows.items():
        at = bisect_left(known, width)
        rows[known[at] if at < len(known) else width] += count
    return replace(need, rows=rows)


def largest(shapes: Iterable[Shape]) -> Shape:
    """The least shape that holds each of `shapes`."""
    shapes = list(shapes)
    widths = sorted({width for shape in shapes for width in shape.rows})
    rows = {width: max(shape.rows.get(width, 0) for shape in shapes) for width in widths}
    most = lambda size: max(getattr(shape, size) for shape in shapes)
    return Shape(most("tokens"), rows, most("chunks"), most("answers"))


def fill(
    streams: Sequence[Stream],
    identities: Sequence[Sequence[int]],
    shape: Shape,
    prefix: np.ndarray | None,
) -> tuple[PackedTokens, list[np.ndarray]]:
    """R streams -> their arrays in `shape`, and for each stream which of its S sequences each one became.

    identities: of each sequence, a number that does not depend on packing: the dropout keys of its own tokens come from
    it, those of the prefix's tokens are the same everywhere.
    """
    size, slots = (len(streams), shape.tokens), sum(shape.rows.values())
    input_ids, position_ids = np.zeros(size, np.int32), np.zeros((*size, 3), np.int32)
    token_keys, media_slots = np.zeros(size, np.uint32), np.full(size, -1, np.int32)
    rows = {
        width: np.full((len(streams), count, width), -1, np.int32)
        for width, count in shape.rows.items()
    }
    home, last_tokens = np.full(size, -1, np.int32), np.zeros((len(streams), slots), np.int32)
    widths = sorted(shape.rows)
    counts = [shape.rows[width] for width in widths]
    first_row = dict(zip(widths, np.cumsum([0, *counts]), strict=False))
    first_slot = dict(
        zip(
            widths,
            np.cumsum([0, *(w * n for w, n in zip(widths, counts, strict=True))]),
            strict=False,
        )
    )
    became, prefix_length = [], 0 if prefix is None else len(prefix)
    for r, (stream, numbers) in enumerate(zip(streams, identities, strict=True)):
        used, which = dict.fromkeys(widths, 0), np.zeros(len(stream.at), np.int64)
        for i in sorted(
            range(len(stream.at)), key=lambda i: -len(stream.at[i])
        ):  # the long ones have less choice
            one, at = stream.sequences[i], stream.at[i]
            width = next(w for w in widths if w >= len(at) and used[w] < shape.rows[w])
            row, used[width] = used[width], used[width] + 1
            which[i] = first_row[width] + row
            last_tokens[r, which[i]] = at[-1]
            rows[width][r, row, : len(at)] = at
            new = np.flatnonzero(home[r, at] < 0)
            home[r, at[new]] = first_slot[width] + row * width + new
            input_ids[r, at[new]], position_ids[r, at[new]] = (
                one.input_ids[new],
                one.position_ids[new],
            )
            keys = np.uint32(numbers[i] * GOLDEN_RATIO % 2**32) + new.astype(np.uint32)
            token_keys[r, at[new]] = np.where(at[new] < prefix_length, new.astype(np.uint32), keys)
            if one.media_slots is not None:
                media_slots[r, at[new]] = one.media_slots[new]
        became.append(which)
    groups = tuple(rows[width] for width in widths)
    arrays = (input_ids, position_ids, token_keys, media_slots, groups, home, last_tokens)
    return PackedTokens(*arrays, None if prefix is None else len(prefix)), became


def fill_answers(
    streams: Sequence[Stream], records: Sequence[Sequence[int]], count: int
) -> Answers:
    """The answers of R streams, at most `count` tokens each: int32 [R, A]. records: of each sequence, its number."""
    at, ids, record = (np.full((len(streams), count), -1, np.int32) for _ in range(3))
    for r, stream in enumerate(streams):
        end = 0
        for one, where, number in zip(stream.sequences, stream.at, records[r], strict=True):
            if one.answer is not None and len(one.answer):
                begin, end = end, end + len(one.answer)
                at[r, begin:end], ids[r, begin:end] = where[-len(one.answer) :], one.answer
                record[r, begin:end] = number
    return Answers(at, ids, record)


class RowAssignment(NamedTuple):
    """Where each of N items went: row [N], slot within the row [N], first place taken [N]."""

    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.row.max(initial=-1)) + 1


def assign_rows(lengths: Iterable[int], row_length: int) -> RowAssignment:
    """Best fit, longest first: each item goes to the fullest row that still holds it. Deterministic."""
    lengths = np.fromiter(lengths, np.int64)
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"an item of {lengths.max()} does not fit a row of {row_length}")
    free = np.full(len(lengths), row_length, np.int64)  # as many rows as items is always enough
    used = np.zeros(len(lengths), np.int64)
    row, slot, start = (np.zeros(len(lengths), np.int32) for _ in range(3))
    opened = 0
    for i in np.argsort(-lengths, kind="stable"):
        room = np.where(free[:opened] >= lengths[i], free[:opened], row_length + 1)
        best = int(room.argmin()) if opened and room.min() <= row_length else opened
        opened = max(opened, best + 1)
        row[i], slot[i], start[i] = best, used[best], row_length - free[best]
        free[best] -= lengths[i]
        used[best] += 1
    return RowAssignment(row, slot, start)
