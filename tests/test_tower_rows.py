"""How media are packed into the towers' rows: undivided, apart, and in few shapes."""

import numpy as np
import pytest

from lco_jax.core.bins import bucket
from lco_jax.data.qwen_sizes import smart_resize
from lco_jax.data.tower_rows import (
    Patches,
    PatchRows,
    chunk_rows,
    chunks_of,
    fill,
    mel_tokens,
    tile_rows,
    tiles_of,
)

SCALE = np.array([[255, 0.5, 0.3], [255, 0.4, 0.2], [255, 0.3, 0.1]], np.float32)


def patches(rng, frames, height, width):
    values = rng.integers(0, 256, (frames * height * width, 3, 1, 4), dtype=np.uint8)
    return Patches(values, (frames, height, width), SCALE)


@pytest.mark.parametrize(("window", "merge"), [(8, 2), (4, 2), (8, 4)])
def test_a_frame_lies_in_one_row_and_a_window_in_one_sub_row(window, merge):
    rng = np.random.default_rng(0)
    sizes = [(1, 4, 4), (3, 8, 12), (1, 36, 20), (2, 20, 44), (1, 4, 100), (5, 4, 8), (1, 48, 48)]
    images = [patches(rng, *size) for size in sizes]
    rows = PatchRows(window, merge, (3, 1, 4))
    width = rows.width(images)
    packed = rows.assign(images, width)
    slots = np.concatenate(packed.inputs)
    assert len(set(slots)) == len(slots)  # nothing twice
    assert slots.max() < packed.num_rows * width
    filled = fill(rows, [(images, packed)], packed.num_rows, width)
    flat = {key: value.reshape(-1, *value.shape[2:]) for key, value in filled.items()}
    frame_ids, window_ids = filled["frame_ids"].reshape(-1), filled["window_ids"].reshape(-1)
    assert (frame_ids > 0).sum() == len(slots)
    for image, where in zip(images, packed.inputs, strict=True):
        frames, height, columns = image.grid
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
        np.testing.assert_array_equal(flat["patches"][where].reshape(-1, 3, 1, 4), image.values)
        assert (filled["scale"][where // width] == SCALE).all()
        assert flat["coordinates"][where].max(axis=0).tolist() == [height - 1, columns - 1]
    squares = slots.reshape(-1, merge**2)
    assert (squares[:, 0] % merge**2 == 0).all()  # a token's patches side by side
    assert (np.diff(squares, axis=1) == 1).all()
    np.testing.assert_array_equal(np.concatenate(packed.tokens), squares[:, 0] // merge**2)


def test_chunks_and_tiles():
    rng = np.random.default_rng(0)
    mels = [rng.normal(size=(n, 5)).astype(np.float32) for n in (7, 40, 41, 100, 3)]
    sounds = [chunks_of(mel, 20) for mel in mels]
    rows = chunk_rows(20, 5)
    packed = rows.assign(sounds, 1)
    assert packed.num_rows == 1 + 1 + 2 + 3 + 1
    assert [len(tokens) for tokens in packed.tokens] == [mel_tokens(len(mel)) for mel in mels]
    assert mel_tokens(100) == ((100 - 1) // 2 + 1 - 2) // 2 + 1  # as upstream writes it
    filled = fill(rows, [(sounds, packed), ([], rows.assign([], 1))], packed.num_rows, 1)
    assert filled["frames"].tolist() == [7, 40, 40, 1, 40, 40, 20, 3] + [0] * packed.num_rows
    np.testing.assert_array_equal(filled["mel"][4:7].reshape(-1, 5)[:100], mels[3])
    pixels = [rng.integers(0, 256, (n, 3, 6, 6), dtype=np.uint8) for n in (3, 2)]
    images = [tiles_of(one, np.arange(4), SCALE) for one in pixels]
    tiles = tile_rows(5, 6)
    packed = tiles.assign(images, 1)
    assert [tokens.tolist() for tokens in packed.tokens] == [[0, 1, 2, 3], [15, 16, 17, 18]]
    filled = fill(tiles, [(images, packed)], 6, 1)
    assert (filled["pixels"][3:5] == pixels[1]).all()
    assert (filled["scale"][:5] == SCALE).all()
    assert (filled["scale"][5] == 1).all()  # nothing is divided by zero


def test_128_seconds_are_16_times_8():
    """One sound takes as many rows as sixteen that are as long together."""
    rows = chunk_rows(100, 128)
    one = [chunks_of(np.zeros((12_800, 128)), 100)]
    many = [chunks_of(np.zeros((800, 128)), 100) for _ in range(16)]
    assert rows.assign(one, 1).num_rows == rows.assign(many, 1).num_rows == 64


def test_few_shapes_in_a_long_run():
    """Batches of 32 photographs between 100 and 700 pixels, as in training: a dozen programs."""
    rng = np.random.default_rng(0)
    rows = PatchRows(8, 2, (3, 2, 196))
    shapes, work, used = set(), 0, 0
    for _ in range(150):
        images = []
        for height, width in rng.integers(100, 700, (32, 2)):
            height, width = smart_resize(int(height), int(width), 28, 3136, 12_845_056)
            grid = (1, height // 14, width // 14)
            images.append(Patches(np.zeros(0, np.uint8), grid, SCALE))
        width = rows.width(images)
        count = bucket(rows.assign(images, width).num_rows, 4)
        shapes.add((count, width))
        work += count * width
        used += sum(image.grid[1] * image.grid[2] for image in images)
    assert len(shapes) <= 12
    assert work / used < 1.25  # and little of it is padding
