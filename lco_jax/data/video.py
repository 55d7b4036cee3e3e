"""Anything that moves -> uint8 frames."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np
from av.container import InputContainer
from av.stream import Disposition
from av.video.stream import VideoStream

from lco_jax.core.errors import LcoError, check_keys
from lco_jax.data.audio import load_audio
from lco_jax.data.images import CHANNELS, check_size, load_image
from lco_jax.data.media import (
    Deadline,
    MediaConfig,
    Medium,
    decoded,
    decoding,
    open_container,
    packets,
    resolve,
)
from lco_jax.data.pixels import resize

Fit = Callable[
    [int, int, int], tuple[int, int]
]  # (frames, height, width) -> the (height, width) they are resized to
MIN_FRAMES = 4  # of a file; this and the factor are the reference's
FACTOR = 2  # frames that the model takes together


@dataclass(frozen=True)
class Video:
    """frames: uint8 [T, H, W, 3]. fps: the rate that positions are to be told. audio: float32 [samples] at 16 kHz.

    fps is None for files and wherever it was not given: positions then assume 2, as the reference never tells its
    processor what a file was sampled at.
    """

    frames: np.ndarray
    fps: float | None = None
    audio: np.ndarray | None = None


def load_video(source: Any, where: str, config: MediaConfig, fit: Fit | None = None) -> Video:
    """The sampled frames of a video.

    source, one of:
    - a path, bytes, a data: URI or a URL (see `media.resolve`), sampled at `config.fps`; with its own sound if
      `config.use_audio_in_video`. Rotation in the metadata is not applied, as the reference does not;
    - {"array": …, "fps": …, "audio": …}, the latter two optional: uint8, or floats in [0, 1], of frames x height x
      width (x 1, 3 or 4 channels; they may come second where no doubt is possible). Sampled only if `fps` is above
      `config.fps`; without `fps`, they are taken as sampled already. audio: anything that `load_audio` takes;
    - a numpy array, which is the same as {"array": …};
    - a list of frames, each anything that `load_image` takes, all of one size and taken as sampled already.

    where: how errors begin, for example "input 3". fit: the size that each kept frame is resized to (bicubic) as soon
    as it is decoded, so that no more than those is ever held; None keeps the size.
    """
    if isinstance(source, np.ndarray):
        source = {"array": source}
    if isinstance(source, dict):
        return _from_array(source, where, config, fit)
    if isinstance(source, list | tuple):
        if not source:
            raise LcoError(f"{where}: video is an empty list; give at least one frame")
        indices = sampled_indices(len(source), min(len(source), config.max_frames))
        return Video(_load_all(source, indices, where, config, fit))
    medium = resolve(
        source,
        "video",
        where,
        config,
        ', a list of images, a numpy array or {"array": …, "fps": …}',
    )
    frames = _from_file(medium, config, fit)
    return Video(
        frames, audio=load_audio(medium, where, config) if config.use_audio_in_video else None
    )


def sampled_indices(total: int, kept: int) -> np.ndarray:
    """int64 [kept]: which of `total` frames are kept, the first and the last among them.

    In float32 and from both ends, as torch.linspace does it: the reference rounds its values, and halves are common.
    """
    if kept == 1:
        return np.zeros(1, np.int64)
    last, index = np.float32(total - 1), np.arange(kept, dtype=np.float32)
    step = last / np.float32(kept - 1)
    values = np.where(
        np.arange(kept) < kept // 2, step * index, last - step * (np.float32(kept - 1) - index)
    )
    return np.rint(values).astype(np.int64)


def frames_to_keep(total: int, rate: float, config: MediaConfig) -> int:
    """The reference's rule: an even number, as many as `config.fps` takes, from 4 to `max_frames`."""
    most = min(config.max_frames // FACTOR * FACTOR, total)
    wanted = min(max(total / rate * config.fps, MIN_FRAMES), most)
    return max(int(wanted) // FACTOR * FACTOR, 1)


def _from_file(medium: Medium, config: MediaConfig, fit: Fit | None) -> np.ndarray:
    """Decodes once if the container tells its number of frames right, and once more if it does not."""
    deadline = Deadline(config.decode_seconds, medium.label)
    with decoding(medium.label):
        with open_container(medium, deadline, config.max_image_pixels) as container:
            stream = _pictures(container, medium.label)
            if (
                stream.width and stream.height
            ):  # as the header has it; each kept frame is checked again
                check_size(stream.width, stream.height, medium.label, config)
            rate = float(stream.average_rate or stream.guessed_rate or config.fps)
            total = stream.frames or sum(1 for _ in packets(container, stream, deadline))
        kept, found = _decode(medium, total, rate, deadline, config, fit)
        if found not in (0, total):
            kept, _ = _decode(medium, found, rate, deadline, config, fit)
    if not kept:
        raise LcoError(f"{medium.label} holds no frame that can be decoded")
    return np.stack(kept)


def _pictures(container: InputContainer, label: str) -> VideoStream:
    """The first video stream that is no cover picture and has a decoder."""
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    raise LcoError(f"{label} has no video stream that can be decoded")


def _decode(
    medium: Medium,
    total: int,
    rate: float,
    deadline: Deadline,
    config: MediaConfig,
    fit: Fit | None,
) -> tuple[list[np.ndarray], int]:
    """One pass: the kept frames of `total` that are expected, and how many there really are."""
    count = frames_to_keep(max(total, 1), rate, config)
    wanted = set(sampled_indices(max(total, 1), count).tolist())
    kept, size, index = [], None, -1
    with open_container(medium, deadline, config.max_image_pixels) as container:
        stream = _pictures(container, medium.label)
        for index, frame in enumerate(decoded(container, stream, deadline)):
            if index not in wanted:
                continue
            check_size(frame.width, frame.height, medium.label, config)
            if (
                size is None
            ):  # the first frame is always wanted; later ones of another size follow it
                size = fit(count, frame.height, frame.width) if fit else (frame.height, frame.width)
            kept.append(resize(frame.to_ndarray(format="rgb24"), *size))
    return kept, index + 1


def _from_array(source: dict[str, Any], where: str, config: MediaConfig, fit: Fit | None) -> Video:
    check_keys(source, ("array", "fps", "audio"), f"{where}: video")
    array, fps = source.get("array"), source.get("fps")
    if not isinstance(array, np.ndarray):
        raise LcoError(f"{where}: video array is a {type(array).__name__}; give a numpy array")
    label = f"{where}: video array of shape {array.shape}"
    array = _frames_first_channels_last(array, label)
    if not (total := len(array)):
        raise LcoError(f"{label} has no frames")
    count = min(total, config.max_frames)
    if fps is not None:
        if not isinstance(fps, Real) or isinstance(fps, bool) or not 0 < fps < math.inf:
            raise LcoError(f"{label} has an fps of {fps!r:.40}; it must be a number above 0")
        if fps > config.fps or total > config.max_frames:
            count = frames_to_keep(total, fps, config)
        fps = float(fps) if count == total else float(fps) * count / total
    frames = _load_all(array, sampled_indices(total, count), where, config, fit)
    audio = None if source.get("audio") is None else load_audio(source["audio"], where, config)
    return Video(frames, fps, audio)


def _frames_first_channels_last(array: np.ndarray, label: str) -> np.ndarray:
    """[T, H, W] or [T, H, W, C] of any size, if there is no doubt."""
    if array.ndim == 4 and array.shape[3] not in CHANNELS and array.shape[1] in CHANNELS:
        return array.transpose(0, 2, 3, 1)
    if array.ndim in (3, 4) and (array.shape[-1] in CHANNELS) == (
        array.ndim == 4
    ):  # H x W x C is one image in colour
        return array
    layouts = "frames x height x width, or frames x height x width x 1, 3 or 4 channels"
    raise LcoError(f"{label} is in no known layout; give {layouts}")


def _load_all(
    source: Sequence[Any] | np.ndarray,
    indices: np.ndarray,
    where: str,
    config: MediaConfig,
    fit: Fit | None,
) -> np.ndarray:
    """The frames of these indices, which must agree in size, as uint8 [T, height, width, 3]."""
    kept: list[np.ndarray] = []
    first = size = None
    for index in indices.tolist():
        image = load_image(source[index], f"{where}: frame {index}", config)
        if first is None:
            first = image.size
            size = fit(len(indices), first[1], first[0]) if fit else (first[1], first[0])
        if image.size != first:
            raise LcoError(
                f"{where}: frame {index} is {image.width} x {image.height}, and frame 0 is {first[0]} x {first[1]}; "
                "the frames of a video must have one size"
            )
        kept.append(resize(np.asarray(image), *size))
    return np.stack(kept)
