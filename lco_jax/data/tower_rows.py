"""Media -> the rows that towers read, and which tokens of those rows belong to each medium.

Dimensions: P shards, N rows of a shard, T patches of a row, W sub-rows of a row, V values of a
patch, C mel channels, X height and width of a tile, K tokens that a row gives.

A tower turns rows into rows of tokens. The parts of a medium (frames, chunks, tiles) do not see one
another, so they are packed into rows as texts are for the decoder: side by side, each within one
row, all rows of one width.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from einops import rearrange

from lco_jax.core.bins import assign_rows, bucket
from lco_jax.data.positions import line_positions

# Patches of a sub-row, in which windows are attended: full tiles of a matrix unit, little padding.
WINDOWED = 128
Arrays = dict[str, np.ndarray]  # a tower's arguments


@dataclass(frozen=True)
class Patches:
    """An image or a clip.

    values: uint8 [frames · height · width, 3, pictures, pixels], the patches of a token side by
    side. A patch of an image has one picture, which stands for as many as the tower takes.
    grid: (frames of so many pictures, patches down, patches across).
    scale: float32 [3, 3], how the levels of each channel are normalised (`pixels.scale_of`).
    """

    values: np.ndarray
    grid: tuple[int, int, int]
    scale: np.ndarray

    @property
    def nbytes(self) -> int:
        return self.values.nbytes


@dataclass(frozen=True)
class Segments:
    """A medium that shares no row: the chunks of a sound, or the tiles of an image.

    rows: the tower's arguments for it: [rows, …]. order: which tokens of its rows the decoder
    reads, as indices into rows × K.
    """

    rows: Arrays
    order: np.ndarray

    def __len__(self) -> int:
        """How many rows."""
        return len(next(iter(self.rows.values())))

    @property
    def nbytes(self) -> int:
        return sum(values.nbytes for values in self.rows.values())


TowerInput = Patches | Segments


class MediaTokens(NamedTuple):
    """The tokens of a medium in a sequence.

    tower: the name of the tower that makes them. Media of one tower that are packed into
    separate rows have a suffix after a slash. medium: what the tower reads.
    at: the index in the sequence of each of its tokens, in their order: int [tokens].
    """

    tower: str
    medium: TowerInput
    at: np.ndarray


@dataclass(frozen=True)
class Processed:
    """One input, ready for the model.

    input_ids: int32 [n]. position_ids: int32 [n, 3]. media: in any order.
    answer: int32 [m], the token that should follow each of the last m (`answered`), or None.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    media: tuple[MediaTokens, ...] = ()
    answer: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def followed_by(self, ids: np.ndarray) -> "Processed":
        """With these token ids of a text after it, at the positions upstream gives them."""
        start = int(self.position_ids[-1].max()) + 1
        positions = line_positions(start, len(ids))
        return Processed(
            np.append(self.input_ids, ids),
            np.concatenate([self.position_ids, positions]),
            self.media,
        )

    def answered(self, ids: np.ndarray) -> "Processed":
        """With an answer of these token ids after it, all but the last, and what follows each."""
        return replace(self.followed_by(ids[:-1]), answer=ids)


class MediaAssignment(NamedTuple):
    """Where one shard's media go in the rows of a tower.

    num_rows: how many rows they take. inputs: of each medium, where its parts go: the slot of each
    patch, or the first of its rows. tokens: of each medium, which of the N · K tokens are its:
    int [tokens].
    """

    num_rows: int
    inputs: list[Any]
    tokens: list[np.ndarray]


class Frame(NamedTuple):
    """Where the patches of a frame go, in the order in which they come.

    slots: int [n], within the frame's sub-rows. windows: int [n], the window of each, from 0.
    coordinates: int32 [n, 2], its row and column. sub_rows: how many the frame fills; 0 for a frame
    that shares a sub-row with others.
    """

    slots: np.ndarray
    windows: np.ndarray
    coordinates: np.ndarray
    sub_rows: int


@lru_cache(maxsize=256)  # the sizes of a batch
def arrange_frame(grid: tuple[int, int], window: int, merge: int, sub_row: int) -> Frame:
    """Give the patches of a frame their slots, each window within one sub-row.

    grid: patches down and across. window, merge: patches of a window's and of a token's side.
    sub_row: patches of a sub-row.
    """
    coordinates = rearrange(  # patches come token by token
        np.indices(grid),
        "coordinate (y a) (x b) -> (y x a b) coordinate",
        a=merge,
        b=merge,
    )
    row, column = coordinates.T // window
    windows_across = column.max() + 1
    windows = row * windows_across + column
    slots = np.arange(len(windows))
    sub_rows = 0
    if len(windows) > sub_row:
        slots, sub_rows = _pack_windows(windows, sub_row)
    return Frame(slots, windows, coordinates.astype(np.int32), sub_rows)


def _pack_windows(windows: np.ndarray, sub_row: int) -> tuple[np.ndarray, int]:
    """(the slot of each patch, the number of sub-rows), from the window of each patch."""
    sizes = np.bincount(windows)
    assigned = assign_rows(sizes, sub_row)
    begins = assigned.row * sub_row + assigned.start
    # sorted by window, the patches of each are in one run, which moves to where its window begins
    by_window = np.argsort(windows, kind="stable")
    runs = np.cumsum(sizes) - sizes
    moves = np.repeat(begins - runs, sizes)
    slots = np.empty(len(windows), np.int64)
    slots[by_window] = np.arange(len(windows)) + moves
    return slots, assigned.num_rows


@dataclass(frozen=True)
class PatchRows:
    """Rows of Qwen2.5's vision tower.

    window: patches of a window's side. merge: patches of a token's side. patch_shape: (channels,
    pictures, pixels); V is their product.
    """

    window: int
    merge: int
    patch_shape: tuple[int, int, int]

    @property
    def sub_row(self) -> int:
        """Patches of a sub-row: as many full windows as `WINDOWED` holds, and at least one."""
        full_window = self.window**2
        return full_window * max(WINDOWED // full_window, 1)

    def width(self, media: Sequence[Patches]) -> int:
        """In patches: the sub-rows of the largest frame, rounded up to one of few sizes."""
        most = max((self._frame(medium).sub_rows for medium in media), default=1)
        return self.sub_row * bucket(max(most, 1), 3)

    def tokens_per_row(self, width: int) -> int:
        """A token is a square of merge × merge patches."""
        return width // self.merge**2

    def _frame(self, medium: Patches) -> Frame:
        return arrange_frame(medium.grid[1:], self.window, self.merge, self.sub_row)

    def assign(self, media: Sequence[Patches], width: int) -> MediaAssignment:
        """Small frames share sub-rows, larger ones do not."""
        frames = [self._frame(medium) for medium in media for _ in range(medium.grid[0])]
        starts, num_rows = self._starts(frames, width)
        area = self.merge**2
        slots, tokens = [], []
        for medium in media:
            frame = self._frame(medium)
            begins = [next(starts) for _ in range(medium.grid[0])]
            of_medium = np.add.outer(begins, frame.slots).reshape(-1)
            slots.append(of_medium)
            tokens.append(of_medium[::area] // area)
        return MediaAssignment(num_rows, slots, tokens)

    def _starts(self, frames: Sequence[Frame], width: int) -> tuple[Iterator[int], int]:
        """(the slot at which each frame begins, the number of rows)."""
        small = [len(frame.slots) for frame in frames if not frame.sub_rows]
        large = [frame.sub_rows for frame in frames if frame.sub_rows]
        shared = assign_rows(small, self.sub_row)
        per_row = width // self.sub_row
        assigned = assign_rows([1] * shared.num_rows + large, per_row)
        sub_rows = assigned.row * per_row + assigned.start
        begins = sub_rows * self.sub_row  # of each shared sub-row, then of each large frame
        of_small = iter(begins[shared.row] + shared.start)
        of_large = iter(begins[shared.num_rows :])
        sides = (of_large if frame.sub_rows else of_small for frame in frames)
        return map(next, sides), assigned.num_rows

    def empty(self, rows: int, width: int) -> Arrays:
        """patches uint8 [rows, T, V]; scale [rows, 3, 3]; coordinates [rows, T, 2]; frame_ids
        [rows, T]; window_ids [rows, W, T / W]. Ids are 0 for padding."""
        windowed = (rows, width // self.sub_row, self.sub_row)
        return {
            "patches": np.zeros((rows, width, math.prod(self.patch_shape)), np.uint8),
            "scale": np.ones((rows, 3, 3), np.float32),
            "coordinates": np.zeros((rows, width, 2), np.int32),
            "frame_ids": np.zeros((rows, width), np.int32),
            "window_ids": np.zeros(windowed, np.int32),
        }

    def write(self, arrays: Arrays, media: Sequence[Patches], assigned: MediaAssignment) -> None:
        """Write one shard's media into its arrays. Ids of frames and windows differ within it."""
        width = arrays["frame_ids"].shape[1]
        scale = arrays["scale"]
        patches = arrays["patches"].reshape(-1, *self.patch_shape)
        coordinates = arrays["coordinates"].reshape(-1, 2)
        frame_ids = arrays["frame_ids"].reshape(-1)
        window_ids = arrays["window_ids"].reshape(-1)
        next_frame = next_window = 1
        for medium, slots in zip(media, assigned.inputs, strict=True):
            frame = self._frame(medium)
            windows = int(frame.windows.max()) + 1
            patches[slots] = medium.values
            scale[np.unique(slots // width)] = medium.scale
            for of_frame in slots.reshape(medium.grid[0], -1):
                coordinates[of_frame] = frame.coordinates
                frame_ids[of_frame] = next_frame
                window_ids[of_frame] = next_window + frame.windows
                next_frame += 1
                next_window += windows


@dataclass(frozen=True)
class SegmentRows:
    """Rows of one segment each. tokens: K. blank: the tower's arguments for an empty row."""

    tokens: int
    blank: Arrays

    def width(self, media: Sequence[Segments]) -> int:
        """In segments."""
        return 1

    def tokens_per_row(self, width: int) -> int:
        """K."""
        return self.tokens

    def assign(self, media: Sequence[Segments], width: int) -> MediaAssignment:
        """A medium's segments in consecutive rows; `inputs` are the first."""
        begins, tokens = [], []
        end = 0
        for medium in media:
            begins.append(end)
            tokens.append(end * self.tokens + medium.order)
            end += len(medium)
        return MediaAssignment(end, begins, tokens)

    def empty(self, rows: int, width: int) -> Arrays:
        """The tower's arguments for so many rows without media."""
        return {key: np.repeat(x[None], rows, axis=0) for key, x in self.blank.items()}

    def write(self, arrays: Arrays, media: Sequence[Segments], assigned: MediaAssignment) -> None:
        """Write one shard's media into its arrays."""
        for medium, first in zip(media, assigned.inputs, strict=True):
            for key, values in medium.rows.items():
                arrays[key][first : first + len(medium)] = values


def mel_tokens(frames: int) -> int:
    """Tokens that Qwen2.5-Omni's tower makes of so many mel frames: it halves them twice."""
    return (frames + 1) // 2 // 2


def chunk_rows(n_window: int, channels: int) -> SegmentRows:
    """Rows of Qwen2.5-Omni's audio tower: chunks of 2 · n_window mel frames. channels: C."""
    mel = np.zeros((2 * n_window, channels), np.float32)
    frames = np.zeros((), np.int32)
    return SegmentRows(n_window // 2, {"mel": mel, "frames": frames})


def chunks_of(mel: np.ndarray, n_window: int) -> Segments:
    """A sound for the audio tower. mel: float32 [frames, C]; zeros fill the last chunk."""
    width = 2 * n_window
    left = np.arange(len(mel), 0, -width)  # frames from each chunk's first to the end
    missing = len(left) * width - len(mel)
    padded = np.pad(mel, ((0, missing), (0, 0)))
    frames = np.minimum(left, width).astype(np.int32)
    rows = {"mel": padded.reshape(len(left), width, -1), "frames": frames}
    return Segments(rows, np.arange(mel_tokens(len(mel))))


def tile_rows(tokens: int, size: int) -> SegmentRows:
    """Rows of LLaVA-NeXT's tower: tiles. tokens: K, the last of which is the newline; size: X."""
    pixels = np.zeros((3, size, size), np.uint8)
    return SegmentRows(tokens, {"pixels": pixels, "scale": np.ones((3, 3), np.float32)})


def tiles_of(pixels: np.ndarray, order: np.ndarray, scale: np.ndarray) -> Segments:
    """An image for LLaVA-NeXT's tower. pixels: uint8 [tiles, 3, X, X]; order: as in `Segments`;
    scale: as in `Patches`."""
    return Segments({"pixels": pixels, "scale": np.stack([scale] * len(pixels))}, order)


TowerRows = PatchRows | SegmentRows  # how media are packed into the rows of one tower


def fill(
    tower_rows: TowerRows,
    shards: Sequence[tuple[Sequence[Any], MediaAssignment]],
    rows: int,
    width: int,
) -> Arrays:
    """The tower's arguments, so many `rows` of each shard: [P · N, …]."""
    arrays = tower_rows.empty(len(shards) * rows, width)
    for i, (media, assigned) in enumerate(shards):
        of_shard = slice(i * rows, (i + 1) * rows)
        tower_rows.write({key: x[of_shard] for key, x in arrays.items()}, media, assigned)
    return arrays
