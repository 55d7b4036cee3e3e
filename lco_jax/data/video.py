"""Anything that moves -> uint8 frames."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, check_keys, is_number
from lco_jax.data.audio import load_audio, load_sound_of_video
from lco_jax.data.decoder import SizeRule, decode
from lco_jax.data.frames import FrameReader, NotSought
from lco_jax.data.images import CHANNELS, load_pixels, resize
from lco_jax.data.media import MediaConfig, MediaFile, resolve

MIN_FRAMES = 4  # of a file; this and the factor are the reference's
FACTOR = 2  # frames that the model takes together


@dataclass(frozen=True)
class Video:
    """Frames and what is known of them.

    frames: uint8 [T, H, W, 3]. fps: of these frames, which positions in time depend on. None for
    files and wherever no rate was given: positions then assume 2, since the reference does not
    pass its processor the rate at which it sampled a file.
    audio: float32 [samples] at 16 kHz, or None.
    """

    frames: np.ndarray
    fps: float | None = None
    audio: np.ndarray | None = None


def load_video(
    source: Any, where: str, config: MediaConfig, size_rule: SizeRule | None = None
) -> Video:
    """The sampled frames of a video.

    source, one of:
    - a path, bytes, a data: URI or a URL (see `media.resolve`), sampled at `config.fps`, and with
      the file's sound if `config.use_audio_in_video`. The frames are turned as the file's display
      matrix asks, unless `config.upright` is False;
    - {"array": …, "fps": …, "audio": …}, the latter two optional. array: uint8, or floats in
      [0, 1], of frames x height x width (x 1, 3 or 4 channels; they may come second where no doubt
      is possible). It is sampled only if `fps` is above `config.fps`; without `fps`, its frames
      count as sampled. audio: anything that `load_audio` takes;
    - a numpy array, which is the same as {"array": …};
    - a list of frames, each anything that `load_image` takes, all of one size. They count as
      sampled.

    where: how errors begin, for example "input 3". size_rule: each frame is resized (bicubic) as
    soon as it is decoded, so that no more than the sampled ones are in memory; None: not resized.
    """
    if isinstance(source, np.ndarray):
        source = {"array": source}
    if isinstance(source, dict):
        return _from_array(source, where, config, size_rule)
    if isinstance(source, list | tuple):
        if not source:
            raise LcoError(f"{where}: video is an empty list; give at least one frame")
        kept = min(len(source), config.max_frames)
        return Video(_sample(source, kept, where, config, size_rule))
    or_else = ', a list of images, a numpy array or {"array": …, "fps": …}'
    file = resolve(source, "video", where, config, or_else)
    frames = decode("video", file, config, size_rule)
    audio = load_sound_of_video(file, config) if config.use_audio_in_video else None
    return Video(frames, audio=audio)


def sampled_indices(total: int, kept: int) -> np.ndarray:
    """int64 [kept]: which of `total` frames are kept, the first and the last among them.

    In float32 and from both ends, as torch.linspace does it: the reference rounds its values, and
    halves are common.
    """
    if kept == 1:
        return np.zeros(1, np.int64)
    steps = np.float32(kept - 1)
    index = np.arange(kept, dtype=np.float32)
    last = np.float32(total - 1)
    step = last / steps
    from_start = step * index
    from_end = last - step * index[::-1]
    values = np.where(index < kept // 2, from_start, from_end)
    return np.rint(values).astype(np.int64)


def frames_to_keep(total: int, rate: float, config: MediaConfig) -> int:
    """The reference's rule: an even number, as many as `config.fps` takes, 4 to `max_frames`."""
    most = min(config.max_frames // FACTOR * FACTOR, total)
    wanted = min(max(total / rate * config.fps, MIN_FRAMES), most)
    return max(int(wanted) // FACTOR * FACTOR, 1)


def decode_video(file: MediaFile, config: MediaConfig, size_rule: SizeRule | None) -> np.ndarray:
    """The sampled frames of a file, decoded in this process.

    Read once, and again if the file has more or fewer frames than its packets promise.
    """
    reader = FrameReader(file, config)
    total, rate = reader.header()
    frames, found = _read_frames(reader, total, rate, size_rule)
    if found not in (0, total):
        frames, _ = _read_frames(reader, found, rate, size_rule)
    if not frames:
        raise LcoError(f"{file.label} holds no frame that can be decoded")
    return np.stack(frames)


def _read_frames(
    reader: FrameReader, total: int, rate: float, size_rule: SizeRule | None
) -> tuple[list[np.ndarray], int]:
    """(the kept frames of `total`, the number of frames that there are)."""
    total = max(total, 1)
    wanted = sampled_indices(total, frames_to_keep(total, rate, reader.config)).tolist()
    frames: list[np.ndarray] = []
    try:
        for pixels in reader.sought(wanted):
            _append(frames, pixels, size_rule)
    except NotSought:
        frames.clear()
    if frames:
        return frames, total
    for pixels in reader.all_decoded(wanted):
        _append(frames, pixels, size_rule)
    return frames, reader.found


def _append(frames: list[np.ndarray], pixels: np.ndarray, size_rule: SizeRule | None) -> None:
    """Append a frame: the first in the size that the rule gives, others in the first one's size."""
    size = pixels.shape[:2]
    if frames:
        size = frames[0].shape[:2]
    elif size_rule:
        size = size_rule(*size)
    frames.append(resize(pixels, *size))


def _from_array(
    source: dict[str, Any], where: str, config: MediaConfig, size_rule: SizeRule | None
) -> Video:
    check_keys(source, ("array", "fps", "audio"), f"{where}: video")
    array = source.get("array")
    if not isinstance(array, np.ndarray):
        raise LcoError(f"{where}: video array is a {type(array).__name__}; give a numpy array")
    label = f"{where}: video array of shape {array.shape}"
    array = _frames_first_channels_last(array, label)
    if not len(array):
        raise LcoError(f"{label} has no frames")
    kept, fps = _sampling(len(array), source.get("fps"), label, config)
    frames = _sample(array, kept, where, config, size_rule)
    audio = source.get("audio")
    if audio is not None:
        audio = load_audio(audio, where, config)
    return Video(frames, fps, audio)


def _sampling(total: int, fps: Any, label: str, config: MediaConfig) -> tuple[int, float | None]:
    """(how many frames of an array are kept, their frames a second)."""
    if fps is None:
        return min(total, config.max_frames), None
    if not is_number(fps, Real) or not 0 < fps < math.inf:
        raise LcoError(f"{label} has an fps of {fps!r:.40}; it must be a number above 0")
    kept = total
    if fps > config.fps or total > config.max_frames:
        kept = frames_to_keep(total, fps, config)
    if kept == total:
        return kept, float(fps)
    return kept, float(fps) * kept / total


def _frames_first_channels_last(array: np.ndarray, label: str) -> np.ndarray:
    """[T, H, W] or [T, H, W, C] of any size, where there is no doubt."""
    if array.ndim == 4 and array.shape[3] in CHANNELS:
        return array
    if array.ndim == 4 and array.shape[1] in CHANNELS:
        return array.transpose(0, 2, 3, 1)
    if array.ndim == 3 and array.shape[2] not in CHANNELS:  # or it would be an image in colour
        return array
    raise LcoError(
        f"{label} is in no known layout; give frames x height x width, or frames x height x width "
        "x 1, 3 or 4 channels"
    )


def _sample(
    source: Sequence[Any] | np.ndarray,
    kept: int,
    where: str,
    config: MediaConfig,
    size_rule: SizeRule | None,
) -> np.ndarray:
    """So many of these frames, which must agree in size: uint8 [T, height, width, 3]."""
    frames: list[np.ndarray] = []
    first = None
    for index in sampled_indices(len(source), kept).tolist():
        image = load_pixels(source[index], f"{where}: frame {index}", config)
        height, width = image.shape[:2]
        first = first or (width, height)
        if (width, height) != first:
            raise LcoError(
                f"{where}: frame {index} is {width} x {height}, and frame 0 is "
                f"{first[0]} x {first[1]}; the frames of a video must have one size"
            )
        _append(frames, image, size_rule)
    return np.stack(frames)
