"""Anything that moves -> uint8 frames."""

import logging
import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, check_keys, is_number
from lco_jax.data.arrays import as_numpy, decoder_kind
from lco_jax.data.audio import load_audio, load_sound_of_video
from lco_jax.data.decoder import SizeRule, decode, plain_fields
from lco_jax.data.frame_choice import FrameChoice, frames_to_keep
from lco_jax.data.frames import FrameReader, NotSought
from lco_jax.data.images import CHANNELS, load_pixels, resize
from lco_jax.data.media import MediaConfig, MediaFile, decoding, resolve

ALL = FrameChoice()
_decoders_lock = threading.Lock()
logger = logging.getLogger(__name__)


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
    source: Any,
    where: str,
    config: MediaConfig,
    size_rule: SizeRule | None = None,
    choice: FrameChoice = ALL,
) -> Video:
    """The sampled frames of a video.

    source, one of:
    - a path, bytes, a data: URI or a URL (see `media.resolve`), sampled at `config.fps`, and with
      the file's sound if `config.use_audio_in_video`. The frames are turned as the file's display
      matrix asks, unless `config.upright` is False;
    - {"array": …, "fps": …, "audio": …}, the latter two optional. array: uint8, or floats in
      [0, 1], of frames x height x width (x 1, 3 or 4 channels; they may come second where no doubt
      is possible). It is sampled only if `fps` is above `config.fps`; without `fps`, its frames
      count as sampled. audio: anything that `load_audio` takes, for all frames;
    - a numpy array, which is the same as {"array": …};
    - a list of frames, each anything that `load_image` takes, all of one size. They count as
      sampled;
    - a VideoDecoder, as of torchcodec and datasets, which is the same as its file.

    where: how errors begin, for example "input 3". size_rule: each frame is resized (bicubic) as
    soon as it is decoded, so that no more than the sampled ones are in memory; None: not resized.
    choice: which frames are taken, in place of those that `config` says.
    """
    if isinstance(source, np.ndarray):
        source = {"array": source}
    if isinstance(source, dict):
        return _from_array(source, where, config, size_rule, choice)
    if decoder_kind(source) == "video":
        return _from_decoder(source, where, config, size_rule, choice)
    if isinstance(source, list | tuple):
        if not source:
            raise LcoError(f"{where}: video is an empty list; give at least one frame")
        keep = partial(min, config.max_frames)
        numbers = choice.frames(len(source), None, keep, f"{where}: video of {len(source)} images")
        return Video(_sample(source, numbers, where, config, size_rule))
    or_else = ', a list of images, a numpy array or {"array": …, "fps": …}'
    file = resolve(source, "video", where, config, or_else)
    if config.use_audio_in_video:
        _check_sound(choice, file.label)
    frames = decode("video", file, config, size_rule, choice=plain_fields(choice))
    audio = load_sound_of_video(file, config) if config.use_audio_in_video else None
    return Video(frames, audio=audio)


def _check_sound(choice: FrameChoice, label: str) -> None:
    """Raise where a video that comes with its sound would be cut."""
    if choice.is_part:
        cut = "video_start and video_end do not cut its sound"
        raise LcoError(f"{label}: {cut}; cut both before, or leave its sound out")


def frames_of_decoder(
    decoder: Any, config: MediaConfig, label: str, choice: FrameChoice = ALL
) -> np.ndarray:
    """uint8 [T, …]: of torchcodec's VideoDecoder, the frames that would be taken of its file.

    It decodes in this process, without the bounds that files have.
    """
    with decoding(label):
        total = int(decoder.metadata.num_frames)
        rate = float(decoder.metadata.average_fps)
    keep = partial(frames_to_keep, rate=rate, config=config)
    numbers = choice.frames(total, rate, keep, label)
    with _decoders_lock, decoding(label):  # a decoder may be in several inputs
        return as_numpy(decoder.get_frames_at(numbers).data)


def _from_decoder(
    decoder: Any, where: str, config: MediaConfig, size_rule: SizeRule | None, choice: FrameChoice
) -> Video:
    label = f"{where}: {type(decoder).__name__}"
    array = frames_of_decoder(decoder, config, label, choice)
    array = _frames_first_channels_last(array, f"{label} of shape {array.shape}")
    if config.use_audio_in_video:
        logger.warning("%s has no sound, and is taken without", label)
    return Video(_sample(array, range(len(array)), where, config, size_rule))


def decode_video(
    file: MediaFile, config: MediaConfig, size_rule: SizeRule | None, choice: FrameChoice = ALL
) -> np.ndarray:
    """The sampled frames of a file, decoded in this process.

    Read once, and again if the file has more or fewer frames than its packets promise.
    """
    reader = FrameReader(file, config)
    total, rate = reader.header()
    if choice.why_not(total, rate):
        total = reader.count()  # before it is refused
    frames, found = _read_frames(reader, total, rate, size_rule, choice)
    if found not in (0, total):
        frames, _ = _read_frames(reader, found, rate, size_rule, choice)
    if not frames:
        raise LcoError(f"{file.label} holds no frame that can be decoded")
    return np.stack(frames)


def _read_frames(
    reader: FrameReader, total: int, rate: float, size_rule: SizeRule | None, choice: FrameChoice
) -> tuple[list[np.ndarray], int]:
    """(the chosen frames of `total`, the number of frames that there are)."""
    total = max(total, 1)
    keep = partial(frames_to_keep, rate=rate, config=reader.config)
    wanted = choice.frames(total, rate, keep, reader.file.label)
    frames: list[np.ndarray] = []
    try:
        for pixels in reader.sought(wanted):
            _append(frames, pixels, size_rule, len(wanted))
    except NotSought:
        frames.clear()
    if frames:
        return frames, total
    for pixels in reader.all_decoded(wanted):
        _append(frames, pixels, size_rule, len(wanted))
    return frames, reader.found


def _append(
    frames: list[np.ndarray], pixels: np.ndarray, size_rule: SizeRule | None, count: int
) -> None:
    """Append one of `count` frames: the first in the size that the rule gives, others in the first
    one's size.
    """
    size = pixels.shape[:2]
    if frames:
        size = frames[0].shape[:2]
    elif size_rule:
        size = size_rule(*size, count)
    frames.append(resize(pixels, *size))


def _from_array(
    source: dict[str, Any],
    where: str,
    config: MediaConfig,
    size_rule: SizeRule | None,
    choice: FrameChoice,
) -> Video:
    check_keys(source, ("array", "fps", "audio"), f"{where}: video")
    array = source.get("array")
    if not isinstance(array, np.ndarray):
        raise LcoError(f"{where}: video array is a {type(array).__name__}; give a numpy array")
    label = f"{where}: video array of shape {array.shape}"
    array = _frames_first_channels_last(array, label)
    if not len(array):
        raise LcoError(f"{label} has no frames")
    rate = _rate(source.get("fps"), label)
    audio = source.get("audio")
    if audio is not None:
        _check_sound(choice, label)
    numbers = choice.frames(len(array), rate, partial(_kept, rate=rate, config=config), label)
    frames = _sample(array, numbers, where, config, size_rule)
    covered = numbers[-1] - numbers[0] + 1
    fps = rate
    if rate is not None and len(numbers) < covered:
        fps = rate * len(numbers) / covered
    if audio is not None:
        audio = load_audio(audio, where, config)
    return Video(frames, fps, audio)


def _rate(fps: Any, label: str) -> float | None:
    if fps is None:
        return None
    if not is_number(fps, Real) or not 0 < fps < math.inf:
        raise LcoError(f"{label} has an fps of {fps!r:.40}; it must be a number above 0")
    return float(fps)


def _kept(count: int, rate: float | None, config: MediaConfig) -> int:
    """How many of so many frames of an array are taken."""
    if rate is None:
        return min(count, config.max_frames)
    if rate > config.fps or count > config.max_frames:
        return frames_to_keep(count, rate, config)
    return count


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
    numbers: Sequence[int],
    where: str,
    config: MediaConfig,
    size_rule: SizeRule | None,
) -> np.ndarray:
    """The frames of these numbers, which must agree in size: uint8 [T, height, width, 3]."""
    frames: list[np.ndarray] = []
    first = None
    for index in numbers:
        image = load_pixels(source[index], f"{where}: frame {index}", config)
        height, width = image.shape[:2]
        first = first or (width, height)
        if (width, height) != first:
            raise LcoError(
                f"{where}: frame {index} is {width} x {height}, and frame 0 is "
                f"{first[0]} x {first[1]}; the frames of a video must have one size"
            )
        _append(frames, image, size_rule, len(numbers))
    return np.stack(frames)
