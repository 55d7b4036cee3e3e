"""How media are laid into the towers' rows: whole, apart, and in few shapes."""

import numpy as np
import pytest

from lco_jax.core.packing import bucket
from lco_jax.data.qwen import smart_resize
from lco_jax.data.tower_rows import ChunkRows, Mel, Patches, PatchRows, TileRows, Tiles, mel_tokens

SCALE = np.array([[255, 0.5, 0.3], [255, 0.4, 0.2], [255, 0.3, 0.1]], np.float32)


def patches(rng, frames, height, width):
    values = rng.integers(0, 256, (frames * height * width, 3, 1, 4), dtype=np.uint8)
    return Patches(values, (frames, height, width), SCALE)


@pytest.mark.parametrize(("window", "merge"), [(8, 2), (4, 2), (8, 4)])
def test_frames_lie_whole_in_a_row_and_windows_in_a_sub_row(window, merge):
    rng = np.random.default_rng(0)
    sizes = [(1, 4, 4), (3, 8, 12), (1, 36, 20), (2, 20, 44), (1, 4, 100), (5, 4, 8), (1, 48, 48)]
    items = [patches(rng, *size) for size in sizes]
    rows = PatchRows(window, merge, (3, 1, 4))
    width = rows.width(items)
    packed = rows.assign(items, width)
    slots = np.concatenate(packed.inputs)
    assert len(set(slots)) == len(slots)  # nothing twice
    assert slots.max() < packed.rows * width
    filled = rows.fill([(items, packed)], packed.rows, width)
    flat = {key: value.reshape(-1, *value.shape[2:]) for key, value in filled.items()}
    frame_ids, window_ids = filled["frame_ids"].reshape(-1), filled["window_ids"].reshape(-1)
    assert (frame_ids > 0).sum() == len(slots)
    for item, where in zip(items, packed.inputs, strict=True):
        frames, height, columns = item.grid
        for frame in where.reshape(frames, -1):
            assert len({slot // width for slot in frame}) == 1  # in one row
            assert len(set(frame_ids[frame])) == 1
            for one in set(window_ids[frame]):
                inside = frame[window_ids[frame] == one]
                assert len({slot // rows.sub_row for slot in inside}) == 1  # in one sub-row
                corner = flat["coordinates"][inside]
                assert (np.ptp(corner, axis=0) < window).all()
                assert len({tuple(x // window) for x in corner}) == 1
        assert len(set(frame_ids[where])) == frames
        np.testing.assert_array_equal(flat["patches"][where].reshape(-1, 3, 1, 4), item.values)
        assert (filled["scale"][where // width] == SCALE).all()
        assert flat["coordinates"][where].max(axis=0).tolist() == [height - 1, columns - 1]
    squares = np.stack([x.reshape(-1, merge**2) for x in (slots,)])[0]
    assert (squares[:, 0] % merge**2 == 0).all()  # a token's patches side by side
    assert (np.diff(squares, axis=1) == 1).all()
    np.testing.assert_array_equal(np.concatenate(packed.tokens), squares[:, 0] // merge**2)


def test_chunks_and_tiles():
    rng = np.random.default_rng(0)
    sounds = [Mel(rng.normal(size=(n, 5)).astype(np.float32)) for n in (7, 40, 41, 100, 3)]
    rows = ChunkRows(20, 5)
    packed = rows.assign(sounds, 40)
    assert packed.rows == 1 + 1 + 2 + 3 + 1
    assert [len(tokens) for tokens in packed.tokens] == [
        mel_tokens(len(sound.values)) for sound in sounds
    ]
    assert mel_tokens(100) == ((100 - 1) // 2 + 1 - 2) // 2 + 1  # as upstream writes it
    filled = rows.fill([(sounds, packed), ([], rows.assign([], 40))], packed.rows, 40)
    assert filled["frames"].tolist() == [7, 40, 40, 1, 40, 40, 20, 3] + [0] * packed.rows
    np.testing.assert_array_equal(filled["mel"][4:7].reshape(-1, 5)[:100], sounds[3].values)
    images = [
        Tiles(rng.integers(0, 256, (n, 3, 6, 6), dtype=np.uint8), np.arange(4), SCALE)
        for n in (3, 2)
    ]
    tiles = TileRows(5, 6)
    packed = tiles.assign(images, 1)
    assert [tokens.tolist() for tokens in packed.tokens] == [[0, 1, 2, 3], [15, 16, 17, 18]]
    filled = tiles.fill([(images, packed)], 6, 1)
    assert (filled["pixels"][3:5] == images[1].values).all()
    assert (filled["scale"][:5] == SCALE).all()
    assert (filled["scale"][5] == 1).all()  # nothing is divided by zero


def test_128_seconds_are_16_times_8():
    """Chunks never see each other: one clip and sixteen that are as long together are the very same rows."""
    rows = ChunkRows(100, 128)
    one, many = [Mel(np.zeros((12_800, 128)))], [Mel(np.zeros((800, 128))) for _ in range(16)]
    assert rows.assign(one, 200).rows == rows.assign(many, 200).rows == 64


def test_few_shapes_in_a_long_run():
    """Batches of 32 photographs of any size between 100 and 700 pixels, as in training: a dozen programs, no more."""
    rng = np.random.default_rng(0)
    rows = PatchRows(8, 2, (3, 2, 196))
    shapes, work, used = set(), 0, 0
    for _ in range(150):
        items = []
        for height, width in rng.integers(100, 700, (32, 2)):
            height, width = smart_resize(int(height), int(width), 28, 3136, 12_845_056)
            items.append(Patches(np.zeros(0, np.uint8), (1, height // 14, width // 14), SCALE))
        width = rows.width(items)
        count = bucket(rows.assign(items, width).rows, 4)
        shapes.add((count, width))
        work, used = work + count * width, used + sum(item.grid[1] * item.grid[2] for item in items)
    assert len(shapes) <= 12
    assert work / used < 1.25  # and little of it is padding
