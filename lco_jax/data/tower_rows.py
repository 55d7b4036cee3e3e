"""Media -> the rows that towers read, and where each medium's tokens come out.

Dimensions: P shards of the rows, N rows of a shard, T inputs in a row (patches), W sub-rows in it, V values of a patch,
C mel channels, X height and width of a tile, K tokens that a row gives.

A tower turns rows into rows of tokens. What a medium is made of (frames, chunks, tiles) never sees the rest, so the
parts are laid into rows like texts into the decoder's: side by side, each whole in one row, all rows of one length.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, NamedTuple, Protocol

import numpy as np

from lco_jax.core.packing import assign_rows, bucket
from lco_jax.data.positions import line_positions

WINDOWED = 128  # patches in the sub-rows in which windows are attended: whole tiles of a matrix unit, little waste


@dataclass(frozen=True)
class Patches:
    """An image or a clip. values: uint8 [frames · height · width, 3, pictures, pixels], squares side by side.

    pictures: of a patch; an image has one, which stands for all. grid: frames (of so many pictures), and patches down
    and across. scale: float32 [3, 3], how the levels of each channel are normalised (`pixels.read_scale`).
    """

    values: np.ndarray
    grid: tuple[int, int, int]
    scale: np.ndarray


@dataclass(frozen=True)
class Mel:
    """A sound. values: float32 [mel frames, C]."""

    values: np.ndarray


@dataclass(frozen=True)
class Tiles:
    """An image cut into tiles. values: uint8 [tiles, 3, X, X]; scale: as of `Patches`.

    order: which of its tiles' tokens it gives the decoder: indices into tiles × K (a tile's last is the newline).
    """

    values: np.ndarray
    order: np.ndarray
    scale: np.ndarray


TowerInput = Patches | Mel | Tiles


class MediaTokens(NamedTuple):
    """A medium in a sequence. at: the index in the sequence of each of its tokens, in their order: int [tokens].

    tower: the tower's name; media of one tower that are laid into rows of their own have it with a part after a slash.
    """

    tower: str
    item: TowerInput
    at: np.ndarray


@dataclass(frozen=True)
class Processed:
    """One input, ready for the model. input_ids: int32 [n]; position_ids: int32 [n, 3]; media: in any order.

    answer: int32 [m], what the last m tokens are each to be followed by (`answered`), if anything.
    """

    input_ids: np.ndarray
    position_ids: np.ndarray
    media: tuple[MediaTokens, ...] = ()
    answer: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    def followed_by(self, ids: np.ndarray) -> "Processed":
        """With text of these token ids after it, which goes on from the last token's position, as upstream's does."""
        positions = line_positions(int(self.position_ids[-1].max()) + 1, len(ids))
        return Processed(
            np.append(self.input_ids, ids),
            np.concatenate([self.position_ids, positions]),
            self.media,
        )

    def answered(self, ids: np.ndarray) -> "Processed":
        """As it stands before the last token of an answer of these ids, and what is to follow each."""
        return replace(self.followed_by(ids[:-1]), answer=ids)


class RowLayout(NamedTuple):
    """Where the parts of one shard's media went. rows: how many it took.

    inputs: of each item, where its inputs lie among the rows' (in whatever unit the tower's `fill` takes).
    tokens: of each item, which of the N · K tokens are its own: int [tokens].
    """

    rows: int
    inputs: list[np.ndarray]
    tokens: list[np.ndarray]


class TowerRows(Protocol):
    """How the rows of one tower are laid out."""

    def width(self, items: Iterable[Any]) -> int:
        """The least row length that holds each part of `items`; it takes few values."""

    def assign(self, items: Sequence[Any], width: int) -> RowLayout:
        """Lay one shard's items into rows of `width`."""

    def fill(
        self, shards: Sequence[tuple[Sequence[Any], RowLayout]], rows: int, width: int
    ) -> dict[str, np.ndarray]:
        """The tower's arguments, P · `rows` rows each."""

    def tokens_per_row(self, width: int) -> int:
        """K."""


class _Frame(NamedTuple):
    """A frame's patches: `slots` [n], where each lies in the frame's own sub-rows; `windows` [n], the window of each,
    from 0; `coordinates` [n, 2], its row and column. sub_rows: how many they fill, 0 if less than one."""

    slots: np.ndarray
    windows: np.ndarray
    coordinates: np.ndarray
    sub_rows: int


@dataclass(frozen=True)
class PatchRows:
    """Qwen2.5's vision tower. window: patches of a window's side; merge: of a token's side.

    shape: of a patch, (channels, pictures, pixels); V is their product.
    """

    window: int
    merge: int
    shape: tuple[int, int, int]

    @property
    def sub_row(self) -> int:
        """Patches of a sub-row: as many whole windows as `WINDOWED` holds."""
        return self.window**2 * max(WINDOWED // self.window**2, 1)

    def width(self, items: Iterable[Patches]) -> int:
        """Sub-rows of the largest frame, rounded up to one of a few sizes, in patches."""
        return self.sub_row * bucket(
            max((self._frame(item).sub_rows for item in items), default=1) or 1, 3
        )

    def _frame(self, item: Patches) -> _Frame:
        return _frame(item.grid[1:], self.window // self.merge, self.merge, self.sub_row)

    def assign(self, items: Sequence[Patches], width: int) -> RowLayout:
        """Small frames share sub-rows, larger ones have their own; sub-rows share rows."""
        frames = [
            (self._frame(item), i) for i, item in enumerate(items) for _ in range(item.grid[0])
        ]
        small = [len(frame.slots) for frame, _ in frames if not frame.sub_rows]
        shared = assign_rows(small, self.sub_row)
        large = [frame.sub_rows for frame, _ in frames if frame.sub_rows]
        spread = assign_rows([1] * shared.num_rows + large, width // self.sub_row)
        begin = (
            spread.row * (width // self.sub_row) + spread.start
        ) * self.sub_row  # of each shared sub-row or frame
        starts_small = iter(begin[shared.row] + shared.start)
        starts_large = iter(begin[shared.num_rows :])
        slots: list[list[np.ndarray]] = [[] for _ in items]
        for frame, i in frames:
            slots[i].append(
                int(next(starts_large if frame.sub_rows else starts_small)) + frame.slots
            )
        inputs = [np.concatenate(parts) for parts in slots]
        return RowLayout(
            spread.num_rows, inputs, [x[:: self.merge**2] // self.merge**2 for x in inputs]
        )

    def tokens_per_row(self, width: int) -> int:
        """A token a square of merge × merge patches."""
        return width // self.merge**2

    def fill(
        self, shards: Sequence[tuple[Sequence[Patches], RowLayout]], rows: int, width: int
    ) -> dict[str, np.ndarray]:
        """patches uint8 [P · N, T, V], scale [P · N, 3, 3], coordinates [P · N, T, 2], frame_ids [P · N, T],
        window_ids [P · N, W, T / W]."""
        room = len(shards) * rows * width
        patches, coordinates = (
            np.zeros((room, *self.shape), np.uint8),
            np.zeros((room, 2), np.int32),
        )
        frame_ids, window_ids = np.zeros(room, np.int32), np.zeros(room, np.int32)
        scale = np.ones((len(shards) * rows, 3, 3), np.float32)
        for shard, (items, packed) in enumerate(shards):
            frames = windows = 0  # so far in this shard: ids need only differ within it
            for item, slots in zip(items, packed.inputs, strict=True):
                frame, count = self._frame(item), item.grid[0]
                slots = slots + shard * rows * width
                patches[slots] = item.values
                scale[np.unique(slots // width)] = item.scale
                coordinates[slots] = np.tile(frame.coordinates, (count, 1))
                which = np.repeat(np.arange(count), len(frame.slots))
                each = int(frame.windows.max()) + 1
                frame_ids[slots] = frames + 1 + which
                window_ids[slots] = windows + 1 + which * each + np.tile(frame.windows, count)
                frames, windows = frames + count, windows + count * each
        shape = (len(shards) * rows, width)
        return {
            "patches": patches.reshape(*shape, -1),
            "scale": scale,
            "coordinates": coordinates.reshape(*shape, 2),
            "frame_ids": frame_ids.reshape(shape),
            "window_ids": window_ids.reshape(shape[0], width // self.sub_row, self.sub_row),
        }


@lru_cache(maxsize=256)  # the sizes of a batch
def _frame(grid: tuple[int, int], window: int, merge: int, sub_row: int) -> _Frame:
    """Lay out one frame. grid: patches down and across; window: squares of merge × merge patches on a window's side."""
    height, width = grid[0] // merge, grid[1] // merge
    i, j, a, b = (
        x.reshape(-1) for x in np.indices((height, width, merge, merge))
    )  # the order patches come in
    coordinates = np.stack([i * merge + a, j * merge + b], axis=1).astype(np.int32)
    windows = ((i // window) * -(-width // window) + j // window).astype(np.int32)
    if len(windows) <= sub_row:
        return _Frame(np.arange(len(windows), dtype=np.int32), windows, coordinates, 0)
    sizes = np.bincount(windows)
    placed = assign_rows(sizes, sub_row)
    order = np.argsort(windows, kind="stable")
    within = np.empty(len(windows), np.int32)  # the place of each patch among its window's
    within[order] = np.arange(len(windows)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    slots = placed.row[windows] * sub_row + placed.start[windows] + within
    return _Frame(slots, windows, coordinates, placed.num_rows)


def mel_tokens(frames: int) -> int:
    """How many tokens Qwen2.5-Omni's tower makes of so many mel frames: a convolution of stride 2, then pairs."""
    return (frames + 1) // 2 // 2


@dataclass(frozen=True)
class ChunkRows:
    """Qwen2.5-Omni's audio tower: a row is a chunk of 2 · n_window mel frames and gives n_window / 2 tokens.

    channels: C.
    """

    n_window: int
    channels: int

    def width(self, items: Iterable[Mel]) -> int:
        """Every row is as long as a chunk."""
        return 2 * self.n_window

    def assign(self, items: Sequence[Mel], width: int) -> RowLayout:
        """A clip's chunks in consecutive rows; `inputs` holds the first."""
        chunks = [-(-len(item.values) // width) for item in items]
        first = np.cumsum([0, *chunks])
        tokens = [np.arange(mel_tokens(len(item.values))) for item in items]
        starts = [x * (self.n_window // 2) for x in first]
        return RowLayout(
            int(first[-1]),
            list(first[:-1]),
            [x + start for x, start in zip(tokens, starts, strict=False)],
        )

    def tokens_per_row(self, width: int) -> int:
        """A token every four frames."""
        return width // 4

    def fill(
        self, shards: Sequence[tuple[Sequence[Mel], RowLayout]], rows: int, width: int
    ) -> dict[str, np.ndarray]:
        """mel [P · N, 2 · n_window, C], frames [P · N]."""
        mel = np.zeros((len(shards) * rows * width, self.channels), np.float32)
        frames = np.zeros(len(shards) * rows, np.int32)
        for shard, (items, packed) in enumerate(shards):
            for item, first in zip(items, packed.inputs, strict=True):
                row, length = shard * rows + int(first), len(item.values)
                mel[row * width : row * width + length] = item.values
                full, rest = divmod(length, width)
                frames[row : row + full] = width
                if rest:
                    frames[row + full] = rest
        return {"mel": mel.reshape(-1, width, self.channels), "frames": frames}


@dataclass(frozen=True)
class TileRows:
    """LLaVA-NeXT's tower: a row is a tile. tokens: K, the newline included; size: X."""

    tokens: int
    size: int

    def width(self, items: Iterable[Tiles]) -> int:
        """Every row is one tile."""
        return 1

    def assign(self, items: Sequence[Tiles], width: int) -> RowLayout:
        """An image's tiles in consecutive rows; `inputs` holds the first."""
        first = np.cumsum([0, *(len(item.values) for item in items)])
        tokens = [
            start * self.tokens + item.order for start, item in zip(first, items, strict=False)
        ]
        return RowLayout(int(first[-1]), list(first[:-1]), tokens)

    def tokens_per_row(self, width: int) -> int:
        """A token a patch, and the newline."""
        return self.tokens

    def fill(
        self, shards: Sequence[tuple[Sequence[Tiles], RowLayout]], rows: int, width: int
    ) -> dict[str, np.ndarray]:
        """pixels uint8 [P · N, 3, X, X], scale [P · N, 3, 3]."""
        pixels = np.zeros((len(shards) * rows, 3, self.size, self.size), np.uint8)
        scale = np.ones((len(pixels), 3, 3), np.float32)
        for shard, (items, packed) in enumerate(shards):
            for item, first in zip(items, packed.inputs, strict=True):
                row = shard * rows + int(first)
                pixels[row : row + len(item.values)] = item.values
                scale[row : row + len(item.values)] = item.scale
        return {"pixels": pixels, "scale": scale}
