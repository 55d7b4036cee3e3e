"""Multimodal rotary positions (M-RoPE) and the order of tokens where sound and pictures run together.

Dimensions: N tokens of one medium. Positions have three axes: time, height, width.
Sources: `get_rope_index` of modeling_qwen2_5_vl.py and modeling_qwen2_5_omni.py, and the Omni processor.
"""

import numpy as np


def grid_positions(start: int, times: np.ndarray, height: int, width: int) -> np.ndarray:
    """Positions [N, 3] of a grid of merged patches whose frames are at `times` (int [frames]), beginning at `start`."""
    t, h, w = np.meshgrid(times, np.arange(height), np.arange(width), indexing="ij")
    return (np.stack([t, h, w], axis=-1).reshape(-1, 3) + start).astype(np.int32)


def line_positions(start: int, length: int) -> np.ndarray:
    """Positions [N, 3] of what has only an order, as text and sound: the same on every axis."""
    return np.repeat(np.arange(start, start + length, dtype=np.int32)[:, None], 3, axis=1)


def frame_times(frames: int, seconds_per_frame: float, ids_per_second: float) -> np.ndarray:
    """Position on the time axis of each (merged) frame: int [frames]. In float32, as upstream rounds."""
    times = (
        np.arange(frames, dtype=np.float32)
        * np.float32(seconds_per_frame)
        * np.float32(ids_per_second)
    )
    return times.astype(np.int64)


def interleave(video_times: np.ndarray, audio_length: int, chunk: int) -> np.ndarray:
    """Whether each token of a clip with sound is sound: bool [N + audio_length].

    video_times: the time of each of N video tokens, on the scale on which a sound token lasts 1. Both streams are cut
    into chunks of `chunk` and packed chunk by chunk, the pictures of a chunk before its sound.
    """
    pictures, sounds = _cut(video_times, chunk), _cut(np.arange(audio_length), chunk)
    parts = []
    for i in range(max(len(pictures), len(sounds))):
        parts += [np.zeros(pictures[i], bool)] if i < len(pictures) else []
        parts += [np.ones(sounds[i], bool)] if i < len(sounds) else []
    return np.concatenate(parts)


def _cut(times: np.ndarray, chunk: int) -> list[int]:
    """How many tokens each chunk holds. A chunk ends where a time reaches its end; a token that is more than a chunk
    late still ends only one at a time, which is upstream's rule."""
    lengths, begun, end = [], 0, chunk
    while (late := np.flatnonzero(times[begun + bool(lengths) :] >= end)).size:
        at = begun + bool(lengths) + int(late[0])
        lengths.append(at - begun)
        begun, end = at, end + chunk
    return [*lengths, len(times) - begun]
