"""Packed rows: many short sequences side by side in rows of one static length, told apart by segment ids.

Dimensions: C GradCache chunks, R rows, T tokens in a row, S slots (the most sequences a row holds), N sequences,
B records, M hard negatives a record (the most).

No sequence is ever padded to the longest and none can see another, so an embedding cannot depend on its neighbours.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from functools import partial
from typing import NamedTuple

import jax
import numpy as np
from jax import Array

from lco_jax.core.weights import GOLDEN_RATIO


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["input_ids", "segment_ids", "position_ids", "token_keys", "last_tokens", "media_slots"],
    meta_fields=[],
)
@dataclass(frozen=True)
class PackedRows:
    """The decoder's input; leading axes are free (the training step puts GradCache chunks before R).

    input_ids: int32 [R, T]. segment_ids: int32 [R, T], 1, 2, … along a row, 0 for padding.
    position_ids: int32 [R, T, 3], restarting at 0 in every segment; the axes are time, height and width (M-RoPE).
    token_keys: uint32 [R, T], identity of a token (sequence, position), for dropout.
    last_tokens: int32 [R, S], index in its row of each segment's last token; 0 in empty slots.
    media_slots: int32 [R, T], which media token of the row's shard takes the token's place; -1 for none.
    """

    input_ids: Array
    segment_ids: Array
    position_ids: Array
    token_keys: Array
    last_tokens: Array
    media_slots: Array

    def map(self, function: Callable[[Array], Array]) -> "PackedRows":
        """`function` applied to every array."""
        return PackedRows(**{field.name: function(getattr(self, field.name)) for field in fields(self)})


@partial(jax.tree_util.register_dataclass, data_fields=["rows", "sequences", "content", "media"], meta_fields=[])
@dataclass(frozen=True)
class Batch:
    """A global batch on the mesh.

    rows: `PackedRows` of [C, R, T], rows split over the mesh axes (data, fsdp).
    sequences: int32 [B, 2 + M], replicated: where anchor, positive and negatives of each record lie among the
    C · R · S slots; -1 for a negative that a record does not have, and throughout for a record that was left out.
    content: int32 [B, 2 + M], replicated: equal for sides that say the same.
    media: what each tower reads: tower -> argument -> rows, split over the mesh as the batch's are; {} for text alone.
    """

    rows: PackedRows
    sequences: Array
    content: Array
    media: dict[str, dict[str, Array]]


class Placement(NamedTuple):
    """Where each of N sequences went: row [N], slot within the row [N], first token's index [N]."""

    row: np.ndarray
    slot: np.ndarray
    start: np.ndarray

    @property
    def num_rows(self) -> int:
        return int(self.row.max(initial=-1)) + 1

    @property
    def num_slots(self) -> int:
        return int(self.slot.max(initial=-1)) + 1


def place(lengths: Iterable[int], row_length: int) -> Placement:
    """Best fit, longest first: each sequence goes to the fullest row that still holds it. Deterministic."""
    lengths = np.fromiter(lengths, np.int64)
    if len(lengths) and lengths.max() > row_length:
        raise ValueError(f"a sequence of {lengths.max()} tokens does not fit a row of {row_length}")
    free = np.full(len(lengths), row_length, np.int64)  # as many rows as sequences is always enough
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
    return Placement(row, slot, start)


@dataclass(frozen=True)
class TokenSequence:
    """Tokens on the host. input_ids: int32 [n]; position_ids: int32 [n, 3]; media_slots: int32 [n], None for text."""

    input_ids: np.ndarray
    position_ids: np.ndarray
    media_slots: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)


def fill_rows(
    sequences: Iterable[TokenSequence],
    sequence_ids: Iterable[int],
    placement: Placement,
    num_rows: int,
    row_length: int,
    num_slots: int,
) -> PackedRows:
    """N sequences -> `PackedRows` of [num_rows, row_length], as `placement` says.

    sequence_ids: an identity of each sequence that does not depend on packing (the dropout key of its tokens).
    """
    shape = (num_rows, row_length)
    input_ids, segment_ids = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    media_slots = np.full(shape, -1, np.int32)
    position_ids, token_keys = np.zeros((*shape, 3), np.int32), np.zeros(shape, np.uint32)
    last_tokens = np.zeros((num_rows, num_slots), np.int32)
    for sequence, identity, row, slot, start in zip(sequences, sequence_ids, *placement, strict=True):
        span = slice(start, start + len(sequence))
        input_ids[row, span], position_ids[row, span] = sequence.input_ids, sequence.position_ids
        segment_ids[row, span] = slot + 1
        token_keys[row, span] = np.uint32(identity * GOLDEN_RATIO % 2**32) + np.arange(len(sequence), dtype=np.uint32)
        last_tokens[row, slot] = start + len(sequence) - 1
        if sequence.media_slots is not None:
            media_slots[row, span] = sequence.media_slots
    return PackedRows(input_ids, segment_ids, position_ids, token_keys, last_tokens, media_slots)


def bucket(n: int, granularity: int = 8) -> int:
    """The least m ≥ n of the form k · 2^j with k ≤ 2 · granularity: few distinct sizes, waste under 1 / granularity."""
    step = 1
    while n > 2 * granularity * step:
        step *= 2
    return -(-n // step) * step
