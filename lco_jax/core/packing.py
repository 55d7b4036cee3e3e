"""Packing: the tokens of many sequences in one stream, and the rows in which they are attended.

Dimensions: C GradCache chunks, R streams (one on each shard), T tokens of a stream, W width and N
rows of a group of rows, U cells of all rows of a stream (Σ N · W), S slots of a stream (Σ N), B
records, M hard negatives of a record (at most), P tokens of the prefix, A answer tokens of a
stream.

A causal decoder computes a token's state from the tokens before it and from nothing else. So
sequences that begin alike share the tokens of their beginning, and projections and MLPs run over
one stream, which is padded only at its end. Attention needs each sequence in one piece. It runs in
rows: a row has one sequence, and tells where in the stream each of its tokens is. Three sequences,
their stream, and its rows in groups of two widths:

    A: the cat sat down      B: the cat ran      C: a dog

    index     0    1    2    3    4    5    6    7
    stream    a   dog  the  cat  ran  sat down   ·        T = 8; the last token is padding
    home      3    4    6    7    2    8    9   -1

    cells     0    1    2  |  3    4    5  |  6    7    8    9      U = 10
    rows      2    3    4  |  0    1   -1  |  2    3    5    6      W = 3, N = 2; then W = 4, N = 1
              B, in slot 0    C, in slot 1    A, in slot 2

A and B share "the cat". A token's home is the cell from which its result of attention is taken.
"""

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import itemgetter
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from lco_jax.core.prefixes import Branches, Prefixes, common_length, prefix_length
from lco_jax.core.stream_shapes import Shape, width_of
from lco_jax.core.weights import GOLDEN_RATIO, fold_in


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
    meta_fields=["branches"],
)
@dataclass(frozen=True)
class PackedTokens:
    """The decoder's input. The training step adds a leading axis of chunks, C, to every array.

    input_ids: int32 [R, T].
    position_ids: int32 [R, T, 3]; the axes are time, height and width (M-RoPE).
    token_keys: uint32 [R, T], the identity of a token (sequence, position), for dropout.
    media_slots: int32 [R, T], the index of the media token of the shard that replaces the token;
        -1 for text.
    rows: for each width int32 [R, N, W], the index in the stream of each token of a sequence; -1
        after the sequence's end.
    home: int32 [R, T], the cell of the rows that has the token's home; -1 for padding.
    last_tokens: int32 [R, S], the index in the stream of each slot's last token; 0 for empty rows.
    branches: where sequences share only tokens among the stream's first P, each of which has the
        same column in every row, those of `Prefixes` (training, whose backward pass relies on it).
        None where sequences share any beginning (inference).
    """

    input_ids: Array
    position_ids: Array
    token_keys: Array
    media_slots: Array
    rows: tuple[Array, ...]
    home: Array
    last_tokens: Array
    branches: Branches | None = None

    @property
    def prefix_length(self) -> int:
        """P."""
        return prefix_length(self.branches or ())

    def map(self, function: Callable[[Array], Array]) -> "PackedTokens":
        """Apply `function` to every array."""
        return jax.tree.map(function, self)

    def with_seed(self, seed: Array | int) -> "PackedTokens":
        """The same tokens, with other dropout masks for each seed."""
        return replace(self, token_keys=fold_in(self.token_keys, seed))


@partial(jax.tree_util.register_dataclass, data_fields=["at", "ids", "record"], meta_fields=[])
@dataclass(frozen=True)
class Answers:
    """The tokens that a generator has to predict; -1 after the last one.

    at: int32 [C, R, A], the index in the stream of the token whose state predicts.
    ids: int32 [C, R, A], the token to predict.
    record: int32 [C, R, A], the number of its record in the batch.
    """

    at: Array
    ids: Array
    record: Array


MODALITIES = ("text", "image", "video", "audio")  # bit k of a content's kinds is MODALITIES[k]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["tokens", "sequences", "content", "media", "answers", "kinds", "teacher", "guide"],
    meta_fields=[],
)
@dataclass(frozen=True)
class Batch:
    """A global batch on the mesh.

    tokens: `PackedTokens` of [C, R, …], with streams sharded over the mesh axes (data, fsdp).
    sequences: int32 [B, 2 + M], replicated: which of the C · R · S slots has the anchor, the
        positive and each negative of a record; -1 for a negative that a record does not have, and
        for all of a record that was skipped.
    content: int32 [B, 2 + M], replicated: equal numbers where contents are equal.
    media: the arguments of each tower: tower -> argument -> rows, sharded as streams are; {} for
        text.
    answers: the tokens that generative training predicts, sharded as streams are; None in
        contrastive training.
    kinds: int32 [B, 2 + M], replicated: the modalities of each content, as bits; 0 where there is
        none.
    teacher: float32 [B, 2 + M], replicated: a teacher's scores of anchor and content, NaN where
        there is none; None without a teacher.
    guide: float32 [B, 2 + M, G], replicated: the vectors of a guide, 0 where there is no content;
        None without a guide.

    With P > 1 processes, these tables are [B / P, R, 2 + M] and sharded as streams are. Record
    p + i · P is in row i of the first stream of process p. The step gathers them (`gathered`).
    """

    tokens: PackedTokens
    sequences: Array
    content: Array
    media: dict[str, dict[str, Array]]
    answers: Answers | None = None
    kinds: Array | None = None
    teacher: Array | None = None
    guide: Array | None = None

    def gathered(self, processes: int) -> "Batch":
        """The batch with the tables of all processes' records: [B, 2 + M] each."""
        if processes == 1:
            return self

        def gather(table: Array) -> Array:
            count, streams, *sides = table.shape
            by_process = table.reshape(count, processes, streams // processes, *sides)
            return by_process[:, :, 0].reshape(count * processes, *sides)

        names = ("sequences", "content", "kinds", "teacher", "guide")
        tables = {name: getattr(self, name) for name in names}
        return replace(self, **jax.tree.map(gather, tables))


@dataclass(frozen=True)
class TokenSequence:
    """A sequence on the host.

    input_ids: int32 [n].
    position_ids: int32 [n, 3].
    media_slots: int32 [n], as `PackedTokens` has it; None for text alone.
    answer: int32 [m], the tokens to predict from the last m tokens; None without an answer.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    media_slots: np.ndarray | None = None
    answer: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


class Stream(NamedTuple):
    """Sequences that are packed into one stream.

    at: for each sequence int32 [n], the index in the stream of each of its tokens.
    length: the number of tokens in the stream.
    """

    sequences: list[TokenSequence]
    at: list[np.ndarray]
    length: int

    @property
    def need(self) -> Shape:
        """The least shape that holds the stream."""
        rows = Counter(width_of(len(at)) for at in self.at)
        answers = [one.answer for one in self.sequences if one.answer is not None]
        return Shape(self.length, rows, answers=sum(map(len, answers)))


# ---- sequences -> a stream


def pack_stream(sequences: Sequence[TokenSequence], prefix: Prefixes | None) -> Stream:
    """Pack sequences side by side; of each, append only the tokens that it does not share.

    prefix: begins the stream, and sequences share no other tokens: in training, a sequence has
    dropout masks of its own, and gradients of shared tokens are sums. None: sequences share every
    common beginning.
    """
    ids = [_ids_to_compare(one, number) for number, one in enumerate(sequences)]
    at, length = _as_trie(ids) if prefix is None else _side_by_side(ids, prefix)
    return Stream(list(sequences), at, length)


def _side_by_side(ids: Sequence[np.ndarray], prefix: Prefixes) -> tuple[list[np.ndarray], int]:
    """`at` and `length` of the stream of sequences that share the prefix alone."""
    length = len(prefix)
    at = []
    for one in ids:
        shared = prefix.shared(one)
        appended = length + np.arange(len(one) - len(shared), dtype=np.int32)
        at.append(np.concatenate([shared, appended]))
        length += len(appended)
    return at, length


def _as_trie(ids: Sequence[np.ndarray]) -> tuple[list[np.ndarray], int]:
    """`at` and `length` of the stream of sequences that share every beginning."""
    before = before_at = np.zeros(0, np.int32)
    at = [before_at] * len(ids)
    length = 0
    # Any order of byte strings has those that begin alike side by side.
    for i in sorted(range(len(ids)), key=lambda i: ids[i].tobytes()):
        shared = common_length(ids[i], before)
        appended = length + np.arange(len(ids[i]) - shared, dtype=np.int32)
        at[i] = np.concatenate([before_at[:shared], appended])
        length += len(appended)
        before, before_at = ids[i], at[i]
    return at, length


def _ids_to_compare(sequence: TokenSequence, number: int) -> np.ndarray:
    """The token ids. Media tokens, which are never shared, get an id that no other sequence has."""
    if sequence.media_slots is None:
        return sequence.input_ids
    return np.where(sequence.media_slots < 0, sequence.input_ids, -1 - number)


# ---- streams -> arrays


def fill(
    streams: Sequence[Stream],
    identities: Sequence[Sequence[int]],
    shape: Shape,
    prefix: Prefixes | None,
) -> tuple[PackedTokens, list[np.ndarray]]:
    """Fill the arrays of R streams, on the host; also return the slots of each stream's sequences.

    identities: for each sequence, a number that does not depend on packing. The dropout keys of
        its tokens come from it; those of the prefix's tokens are the same everywhere.
    shape: holds each stream.
    prefix: what `pack_stream` got.
    """
    groups = sorted(shape.rows.items())
    sizes = [width * count for width, count in groups]
    cells = np.full((len(streams), sum(sizes)), -1, np.int32)
    tokens = _without_tokens(len(streams), shape, None if prefix is None else prefix.branches)
    all_slots = []
    for r, (stream, numbers) in enumerate(zip(streams, identities, strict=True)):
        arrays = tokens.map(itemgetter(r))
        slots = _fill_stream(arrays, cells[r], stream, numbers, groups)
        all_slots.append(slots)
    parts = np.split(cells, np.cumsum(sizes)[:-1], axis=1)
    rows = tuple(
        part.reshape(len(streams), count, width)
        for part, (width, count) in zip(parts, groups, strict=True)
    )
    return replace(tokens, rows=rows), all_slots


def _without_tokens(streams: int, shape: Shape, branches: Branches | None) -> PackedTokens:
    """Arrays of `shape` that hold no token yet, and no rows."""
    size = (streams, shape.tokens)
    slots = sum(shape.rows.values())
    return PackedTokens(
        input_ids=np.zeros(size, np.int32),
        position_ids=np.zeros((*size, 3), np.int32),
        token_keys=np.zeros(size, np.uint32),
        media_slots=np.full(size, -1, np.int32),
        rows=(),
        home=np.full(size, -1, np.int32),
        last_tokens=np.zeros((streams, slots), np.int32),
        branches=branches,
    )


def _fill_stream(
    tokens: PackedTokens,
    cells: np.ndarray,
    stream: Stream,
    identities: Sequence[int],
    groups: Sequence[tuple[int, int]],
) -> np.ndarray:
    """Fill the arrays of one stream, and the cells of its rows [U]; return its sequences' slots.

    groups: (W, N) of each group of rows, by width.
    """
    slots = np.zeros(len(stream.at), np.int64)
    for i, slot, first_cell in _choose_rows(stream, groups):
        at = stream.at[i]
        slots[i] = slot
        cells[first_cell : first_cell + len(at)] = at
        tokens.last_tokens[slot] = at[-1]
        new = np.flatnonzero(tokens.home[at] < 0)  # columns of the tokens that have no home yet
        tokens.home[at[new]] = first_cell + new
        _write_tokens(tokens, at[new], stream.sequences[i], new, identities[i])
    return slots


def _choose_rows(
    stream: Stream, groups: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int, int]]:
    """(sequence, slot, first cell of its row): the narrowest row that is free and long enough.

    The longest sequences come first, for they have the least choice.
    """
    widths = [width for width, _ in groups]
    free = _free_rows(groups)
    lengths = np.array([len(at) for at in stream.at])
    for i in np.argsort(-lengths, kind="stable"):
        group = bisect_left(widths, lengths[i])
        while not free[group]:
            group += 1
        slot, first_cell = free[group].popleft()
        yield int(i), slot, first_cell


def _free_rows(groups: Sequence[tuple[int, int]]) -> list[deque[tuple[int, int]]]:
    """(slot, first cell) of each row of each group."""
    free = []
    slot = cell = 0
    for width, count in groups:
        free.append(deque((slot + row, cell + row * width) for row in range(count)))
        slot += count
        cell += count * width
    return free


def _write_tokens(
    tokens: PackedTokens,
    where: np.ndarray,
    sequence: TokenSequence,
    columns: np.ndarray,
    identity: int,
) -> None:
    """Write to the stream, at the indices `where`, the tokens in some `columns` of a sequence."""
    tokens.input_ids[where] = sequence.input_ids[columns]
    tokens.position_ids[where] = sequence.position_ids[columns]
    own_keys = columns.astype(np.uint32) + np.uint32(identity * GOLDEN_RATIO % 2**32)
    in_prefix = where < tokens.prefix_length
    tokens.token_keys[where] = np.where(in_prefix, where.astype(np.uint32), own_keys)
    if sequence.media_slots is not None:
        tokens.media_slots[where] = sequence.media_slots[columns]


def fill_answers(
    streams: Sequence[Stream], records: Sequence[Sequence[int]], count: int
) -> Answers:
    """The answers of R streams on the host, at most `count` tokens each: int32 [R, A].

    records: for each stream, the number of each sequence's record.
    """
    answers = Answers(*(np.full((len(streams), count), -1, np.int32) for _ in range(3)))
    for r, (stream, numbers) in enumerate(zip(streams, records, strict=True)):
        begin = 0
        for sequence, at, number in zip(stream.sequences, stream.at, numbers, strict=True):
            if sequence.answer is None:
                continue
            length = len(sequence.answer)
            end = begin + length
            answers.at[r, begin:end] = at[len(at) - length :]
            answers.ids[r, begin:end] = sequence.answer
            answers.record[r, begin:end] = number
            begin = end
    return answers
