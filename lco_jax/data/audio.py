"""Anything that sounds -> float32, mono, 16 kHz."""

import itertools
import logging
import math
from collections.abc import Iterator
from numbers import Real
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr

from lco_jax.core.errors import LcoError, check_keys
from lco_jax.data.media import (
    Deadline,
    MediaConfig,
    Medium,
    decoded,
    decoding,
    open_container,
    resolve,
)
from lco_jax.data.tower_rows import mel_tokens

RATE = 16_000  # Hz, the model's
HOP = 160  # samples a mel frame
MIN_RATE, MAX_RATE = (
    1,
    768_000,
)  # Hz; the highest that is in use, and a lowest that keeps the result finite
MAX_CHANNELS = 8  # of an array; an axis longer than this is time
LOUDEST = 1e6  # 1 is full scale; samples that are torn reach 1e38, of which no spectrum is finite
BLOCK_SECONDS = 10  # decoded at once
logger = logging.getLogger(__name__)


def audio_tokens(samples: int) -> int:
    """Tokens that the Qwen2.5-Omni audio tower makes of so many samples."""
    return mel_tokens(-(-samples // HOP))


MIN_SAMPLES = next(n for n in itertools.count(1) if audio_tokens(n) >= 1)  # 321, or 20 ms


class _Sound(NamedTuple):
    """mono: float32 [samples], at most one more than max_audio_seconds. seconds: of the whole, as the header has it."""

    mono: np.ndarray
    rate: float
    seconds: float


def load_audio(source: Any, where: str, config: MediaConfig) -> np.ndarray:
    """Sound as float32 [samples], mono, 16 kHz.

    source: a path, bytes, a data: URI, a URL (see `media.resolve`); {"array": …, "sampling_rate": Hz}, or the two as a
    tuple. Arrays are [samples], [channels, samples] or [samples, channels]; int16, int32 and uint8 are scaled to
    [-1, 1], floats are kept as they are. where: how errors begin, for example "input 3".

    Channels are averaged and then resampled as the reference's loader does it (soxr, HQ). What is longer than
    `max_audio_seconds` is cut, with a warning, and not decoded beyond. Silence is valid. Raises for anything else, and
    for what is too short to make a token.
    """
    if isinstance(source, dict):
        check_keys(source, ("array", "sampling_rate", "sample_rate", "path"), f"{where}: audio")
        source = source.get("array"), source.get("sampling_rate", source.get("sample_rate"))
    if isinstance(source, tuple) and len(source) == 2:
        if not isinstance(source[0], np.ndarray):
            raise LcoError(
                f"{where}: audio array is a {type(source[0]).__name__}; give a numpy array"
            )
        label = f"{where}: audio array of shape {source[0].shape}"
        mono, rate, seconds = _from_array(*source, label, config)
    else:
        medium = resolve(
            source, "audio", where, config, ' or {"array": numpy array, "sampling_rate": Hz}'
        )
        label, (mono, rate, seconds) = medium.label, _from_file(medium, config)
    if not len(mono):
        raise LcoError(f"{label} is empty")
    if not np.isfinite(mono).all():
        raise LcoError(f"{label} holds NaN or infinity")
    if (peak := np.abs(mono).max()) > LOUDEST:
        raise LcoError(f"{label} is torn: its samples reach {peak:.3g}, and 1 is full scale")
    if len(mono) > (limit := _limit(rate, config)):
        length = f"{seconds:.1f}" if seconds * rate > limit else f"more than {limit / rate:.1f}"
        logger.warning(
            "%s: cut from %s to %.1f seconds (max_audio_seconds)", label, length, limit / rate
        )
        mono = mono[:limit]
    if rate != RATE:
        samples = math.ceil(len(mono) * (RATE / rate))
        with decoding(label):
            mono = soxr.resample(mono, rate, RATE, quality="HQ")
        # librosa, which the reference loads with, cuts or fills up to exactly this length
        mono = np.pad(mono[:samples], (0, max(0, samples - len(mono))))
    if audio_tokens(len(mono)) < 1:
        raise LcoError(
            f"{label} is too short: {len(mono)} samples at 16 kHz ({len(mono) / RATE:.4f} seconds), and the model "
            f"needs {MIN_SAMPLES}"
        )
    return mono


def _limit(rate: float, config: MediaConfig) -> int:
    return max(1, int(config.max_audio_seconds * rate))


def _check_rate(rate: Any, label: str) -> float:
    if not isinstance(rate, Real) or isinstance(rate, bool) or not MIN_RATE <= rate <= MAX_RATE:
        raise LcoError(
            f"{label} has a sampling rate of {rate!r:.40}; it must be {MIN_RATE} to {MAX_RATE} Hz"
        )
    return float(rate)


def _from_array(array: np.ndarray, rate: Any, label: str, config: MediaConfig) -> _Sound:
    if rate is None:
        raise LcoError(f'{label} has no "sampling_rate"; give it, in Hz')
    rate = _check_rate(rate, label)
    if not array.size:
        raise LcoError(f"{label} is empty")
    if array.ndim == 2:
        if min(array.shape) > MAX_CHANNELS or array.shape[0] == array.shape[1]:
            raise LcoError(
                f"{label} is in no known layout; give [samples], or [channels, samples] or [samples, channels] with "
                f"more samples than channels and at most {MAX_CHANNELS} channels"
            )
        array = array.T if array.shape[0] < array.shape[1] else array
    elif array.ndim != 1:
        raise LcoError(f"{label} must have one axis, or two of which one is channels")
    seconds = len(array) / rate
    array = array[: _limit(rate, config) + 1]
    if array.dtype == np.uint8:
        array = (array.astype(np.float32) - 128) / 128
    elif array.dtype in (np.int16, np.int32):
        array = (array / -float(np.iinfo(array.dtype).min)).astype(np.float32)
    elif np.issubdtype(array.dtype, np.floating):
        with np.errstate(over="ignore"):  # a float64 that becomes infinite is found later
            array = array.astype(np.float32)
    else:
        raise LcoError(f"{label} holds {array.dtype}; give floats, int16, int32 or uint8")
    return _Sound(array if array.ndim == 1 else _mono(array), rate, seconds)


def _mono(frames: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] -> [samples]."""
    with np.errstate(all="ignore"):  # infinities are found later
        return np.mean(frames, axis=1)


def _from_file(medium: Medium, config: MediaConfig) -> _Sound:
    """libsndfile first, as the reference; PyAV for what it does not know (m4a, the sound of videos)."""
    deadline = Deadline(config.decode_seconds, medium.label)
    with decoding(medium.label), medium.open() as stream:
        try:  # by descriptor, for it would believe a name that ends in .raw
            file = _SoundFile(
                stream if isinstance(medium.content, bytes) else stream.fileno(), closefd=False
            )
        except soundfile.SoundFileError:
            return _through_av(medium, deadline, config)
        with file:
            rate = _check_rate(file.samplerate, medium.label)
            mono = _gather(_blocks(file), _limit(rate, config), deadline)
            return _Sound(mono, rate, file.frames / rate)


class _SoundFile(soundfile.SoundFile):
    """Read from front to end. Its base class seeks to where it is after each read, and in MP3 that loses samples."""

    def seekable(self) -> bool:
        return False


def _blocks(file: soundfile.SoundFile) -> Iterator[np.ndarray]:
    """float32 [samples, channels] until the file ends, whatever its header says."""
    size = BLOCK_SECONDS * file.samplerate // file.channels + 1
    while len(block := file.read(size, dtype="float32", always_2d=True)):
        yield block


def _through_av(medium: Medium, deadline: Deadline, config: MediaConfig) -> _Sound:
    with open_container(medium, deadline, config.max_image_pixels) as container:
        stream = next(
            (track for track in container.streams.audio if track.codec_context is not None), None
        )
        if stream is None:
            raise LcoError(f"{medium.label} has no sound track that can be decoded")
        frames = decoded(container, stream, deadline)
        if (first := next(frames, None)) is None:
            raise LcoError(f"{medium.label} has a sound track of which nothing can be decoded")
        rate = _check_rate(
            first.sample_rate, medium.label
        )  # not the header's: decoders may double it
        planar = av.AudioResampler(
            format="fltp"
        )  # of any sample type float32 [channels, samples]; rate unchanged
        parts = (
            part.to_ndarray().T
            for frame in itertools.chain([first], frames)
            for part in planar.resample(frame)
        )
        mono = _gather(parts, _limit(rate, config), deadline)
        seconds = (
            stream.duration * stream.time_base
            if stream.duration
            else (container.duration or 0) / av.time_base
        )
        return _Sound(mono, rate, float(seconds))


def _gather(blocks: Iterator[np.ndarray], limit: int, deadline: Deadline) -> np.ndarray:
    """Blocks of [samples, channels] as one mono array, of one sample more than `limit` if there are that many."""
    parts, samples = [np.zeros(0, np.float32)], 0
    for block in blocks:
        deadline.check()
        parts.append(_mono(block))
        samples += len(block)
        if samples > limit:
            break
    return np.concatenate(parts)[: limit + 1]
