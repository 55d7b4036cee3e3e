"""Multimodal rotary positions (M-RoPE), and the order of tokens where a clip has sound.

Dimensions: N tokens of one medium. Positions have three axes: time, height, width.
Sources: `get_rope_index` of modeling_qwen2_5_vl.py and modeling_qwen2_5_omni.py, and the Omni
processor.
"""

from itertools import chain, zip_longest

import numpy as np


def grid_positions(start: int, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Positions [N, 3] of a grid of merged patches.

    start: the least position. times: when each frame is, counted from `start`: int [frames].
    """
    axes = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    positions = np.stack(axes, axis=-1).reshape(-1, 3) + start
    return positions.astype(np.int32)


def line_positions(start: int, length: int) -> np.ndarray:
    """Positions [N, 3] of text and sound, which only have an order: the same on every axis."""
    line = np.arange(start, start + length, dtype=np.int32)
    return np.repeat(line[:, None], 3, axis=1)


def frame_times(frames: int, seconds_per_frame: float, ids_per_second: float) -> np.ndarray:
    """Position on the time axis of each merged frame: int [frames]. In float32, as upstream."""
    seconds = np.arange(frames, dtype=np.float32) * np.float32(seconds_per_frame)
    return (seconds * np.float32(ids_per_second)).astype(np.int64)


def interleave(video_times: np.ndarray, audio_length: int, chunk: int) -> np.ndarray:
    """Whether each token of a clip with sound is a sound's: bool [N + audio_length].

    video_times: the time of each of N video tokens, on the scale on which a sound's token lasts 1.
    Both are cut into chunks of `chunk`. The pictures of a chunk come before its sound.
    """
    pictures = _chunk_lengths(video_times, chunk)
    sounds = _chunk_lengths(np.arange(audio_length), chunk)
    in_turns = chain.from_iterable(zip_longest(pictures, sounds, fillvalue=0))
    lengths = np.array(list(in_turns))
    is_sound = np.arange(len(lengths)) % 2 == 1
    return np.repeat(is_sound, lengths)


def _chunk_lengths(times: np.ndarray, chunk: int) -> list[int]:
    """How many tokens each chunk has. A token ends at most one chunk, which is upstream's rule."""
    ends: list[int] = []
    for i, time in enumerate(times.tolist()):
        if time >= chunk * (len(ends) + 1):
            ends.append(i)
    return np.diff([0, *ends, len(times)]).tolist()
