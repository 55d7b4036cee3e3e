"""Anything that sounds -> float32, mono, 16 kHz."""

import itertools
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from numbers import Real
from typing import Any, NamedTuple

import av
import numpy as np
import soundfile
import soxr

from lco_jax.core.errors import LcoError, check_keys, explained, is_number
from lco_jax.data.arrays import as_numpy
from lco_jax.data.containers import decoded, open_container
from lco_jax.data.decoder import decode
from lco_jax.data.media import MediaConfig, MediaFile, decoding, resolve
from lco_jax.data.tower_rows import mel_tokens

RATE = 16_000  # Hz, the model's
HOP = 160  # samples a mel frame
MIN_SAMPLES = 321  # the fewest that make a token, 20 ms
# in Hz: the highest in use, and a lowest that keeps the result finite
MIN_RATE = 1000
MAX_RATE = 768_000
MAX_CHANNELS = 8  # of an array; an axis longer than this is time
# 1 is full scale, which mixes may exceed a little. Beyond this, samples are integers that were
# made floats and not scaled, or those of a torn file.
LOUDEST = 32.0
QUIET = 2**23  # an int32 sound within this may have samples of 24 bits, or of 16
RATE_KEYS = ("sampling_rate", "sample_rate")
BLOCK_SECONDS = 10  # decoded at once
logger = logging.getLogger(__name__)


def audio_tokens(samples: int) -> int:
    """Tokens that the Qwen2.5-Omni audio tower makes of so many samples."""
    return mel_tokens(-(-samples // HOP))


class NoSound(LcoError):
    """A file has no sound track."""


class _Sound(NamedTuple):
    """Sound as it was given, at the rate that it was given at.

    mono: float32 [samples], at most one more than `max_audio_seconds` allows. rate: in Hz.
    seconds: of all of it, by the file's header. label: how errors begin.
    """

    mono: np.ndarray
    rate: float
    seconds: float
    label: str


def load_audio(source: Any, where: str, config: MediaConfig) -> np.ndarray:
    """Sound as float32 [samples], mono, 16 kHz.

    source: a path, bytes, a data: URI, a URL (see `media.resolve`); {"array": …, "sampling_rate" or
    "sample_rate": Hz}, or the two as a tuple; or an AudioDecoder, as of torchcodec and datasets.
    Arrays, and lists of numbers, are [samples], [channels, samples] or [samples, channels]. int8,
    int16, int32 and uint8 are scaled to [-1, 1]; floats must have that scale.
    where: how errors begin, for example "input 3".

    Channels are averaged and then resampled as in the reference's loader (soxr, HQ). Sound longer
    than `max_audio_seconds` is cut, with a warning; the rest is not decoded. Silence is valid.
    Raises for anything else, and for sound too short to make a token.
    """
    given = _array_of(source, where)
    if given is not None:
        return _of_array(_from_array(*given, where, config), config)
    or_else = ' or {"array": numpy array, "sampling_rate": Hz}'
    return decode("audio", resolve(source, "audio", where, config, or_else), config)


def decode_audio(file: MediaFile, config: MediaConfig) -> np.ndarray:
    """Sound as in `load_audio`, decoded in this process."""
    sound = _from_file(file, config)
    _check_samples(sound.mono, sound.label)
    mono = _cut(sound, config)
    label, rate = sound.label, sound.rate
    del sound  # which may hold as much again
    return _long_enough(resample(mono, rate, label), label)


def load_sound_of_video(file: MediaFile, config: MediaConfig) -> np.ndarray | None:
    """The sound of a video as in `load_audio`; None, with a warning, if the video has none."""
    samples = decode("sound", file, config)
    if len(samples):
        return samples
    logger.warning("%s has no sound, and is taken without", file.label)
    return None


def decode_sound_of_video(file: MediaFile, config: MediaConfig) -> np.ndarray:
    """The sound of a video, decoded in this process; no samples if the video has none."""
    try:
        return decode_audio(file, config)
    except NoSound:
        return np.zeros(0, np.float32)


def _of_array(sound: _Sound, config: MediaConfig) -> np.ndarray:
    """Sound as in `load_audio`. To resample may take long: that happens in another process."""
    _check_samples(sound.mono, sound.label)
    mono = _cut(sound, config)
    if sound.rate != RATE:
        file = MediaFile(sound.label, mono.tobytes())
        mono = decode("samples", file, config, rate=sound.rate)
    return _long_enough(mono, sound.label)


def _array_of(source: Any, where: str) -> tuple[Any, Any] | None:
    """(array, sampling rate) if that is what the source is."""
    if hasattr(source, "get_all_samples"):
        with decoding(f"{where}: {type(source).__name__}"):
            samples = source.get_all_samples()
            return as_numpy(samples.data), samples.sample_rate
    if isinstance(source, dict):
        check_keys(source, ("array", *RATE_KEYS, "path"), f"{where}: audio")
        rates = [source[key] for key in RATE_KEYS if source.get(key) is not None]
        if len(rates) == 2 and rates[0] != rates[1]:
            raise LcoError(f"{where}: audio has two rates, {rates[0]!r:.40} and {rates[1]!r:.40}")
        return source.get("array"), rates[0] if rates else None
    if isinstance(source, tuple) and len(source) == 2:
        return source
    return None


def _long_enough(mono: np.ndarray, label: str) -> np.ndarray:
    if len(mono) < MIN_SAMPLES:
        raise LcoError(
            f"{label} is too short: {len(mono)} samples at 16 kHz "
            f"({len(mono) / RATE:.4f} seconds), and the model needs {MIN_SAMPLES}"
        )
    return mono


def _check_samples(mono: np.ndarray, label: str) -> None:
    if not len(mono):
        raise LcoError(f"{label} is empty")
    if not np.isfinite(mono).all():
        raise LcoError(f"{label} holds NaN or infinity")
    peak = np.abs(mono).max()
    if peak > LOUDEST:
        raise LcoError(
            f"{label} has samples of up to {peak:.3g}, and 1 is full scale: it is torn, or holds "
            "unscaled integers (divide those of 16 bits by 32768)"
        )


def _cut(sound: _Sound, config: MediaConfig) -> np.ndarray:
    """The samples that `max_audio_seconds` allows."""
    limit = _limit(sound.rate, config)
    if len(sound.mono) > limit:
        kept = limit / sound.rate
        known = sound.seconds > kept  # some headers give less than there is
        length = f"{sound.seconds:.1f}" if known else f"more than {kept:.1f}"
        logger.warning(
            "%s: cut from %s to %.1f seconds (max_audio_seconds)", sound.label, length, kept
        )
    return sound.mono[:limit]


def _limit(rate: float, config: MediaConfig) -> int:
    return max(1, int(config.max_audio_seconds * rate))


def resample(mono: np.ndarray, rate: float, label: str) -> np.ndarray:
    """float32 [samples] at 16 kHz, as many as the reference's loader, librosa, would give."""
    if rate == RATE:
        return mono
    samples = math.ceil(len(mono) * (RATE / rate))
    with decoding(label):
        mono = soxr.resample(mono, rate, RATE, quality="HQ")
    missing = max(0, samples - len(mono))
    return np.pad(mono[:samples], (0, missing))


def _check_rate(rate: Any, label: str) -> float:
    if not is_number(rate, Real) or not MIN_RATE <= rate <= MAX_RATE:
        raise LcoError(
            f"{label} has a sampling rate of {rate!r:.40}; it must be {MIN_RATE} to {MAX_RATE} Hz"
        )
    return float(rate)


def _from_array(array: Any, rate: Any, where: str, config: MediaConfig) -> _Sound:
    if isinstance(array, list | tuple):
        array = _from_list(array, f"{where}: audio array is no list of numbers")
    if not isinstance(array, np.ndarray):
        raise LcoError(f"{where}: audio array is a {type(array).__name__}; give a numpy array")
    label = f"{where}: audio array of shape {array.shape}"
    if rate is None:
        raise LcoError(f'{label} has no "sampling_rate"; give it, in Hz')
    rate = _check_rate(rate, label)
    array = _samples_first(array, label)
    seconds = len(array) / rate
    frames = _as_float32(array[: _limit(rate, config) + 1], label)
    mono = frames if frames.ndim == 1 else _mono(frames)
    return _Sound(mono, rate, seconds, label)


def _from_list(numbers: Sequence[Any], complaint: str) -> np.ndarray:
    """A list of numbers, or one for each channel. complaint: the error for anything else."""
    with explained(complaint, ValueError, TypeError):
        array = np.asarray(numbers)
    if array.dtype.kind not in "iuf":
        raise LcoError(complaint)
    return array


def _samples_first(array: np.ndarray, label: str) -> np.ndarray:
    """[samples] or [samples, channels]."""
    if not array.size:
        raise LcoError(f"{label} is empty")
    if array.ndim == 1:
        return array
    if array.ndim != 2:
        raise LcoError(f"{label} must have one axis, or two of which one is channels")
    first, second = array.shape
    if min(first, second) > MAX_CHANNELS or first == second:
        raise LcoError(
            f"{label} is in no known layout; give [samples], or [channels, samples] or [samples, "
            f"channels] with more samples than channels and at most {MAX_CHANNELS} channels"
        )
    return array.T if first < second else array


def _as_float32(array: np.ndarray, label: str) -> np.ndarray:
    """Integers become floats in [-1, 1]."""
    if array.dtype == np.uint8:
        levels = array.astype(np.float32)
        return (levels - 128) / 128
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    if array.dtype in (np.int8, np.int16, np.int32):
        _check_width(array, label)
        full_scale = -float(np.iinfo(array.dtype).min)
        return (array / full_scale).astype(np.float32)
    if not np.issubdtype(array.dtype, np.floating):
        scale = "give floats of full scale 1, int8, int16, int32 or uint8"
        raise LcoError(f"{label} holds {array.dtype}, whose full scale is not known; {scale}")
    with np.errstate(over="ignore"):  # `_check_samples` finds a float64 that becomes infinite
        return array.astype(np.float32)


def _check_width(array: np.ndarray, label: str) -> None:
    """Raise for int32 whose samples may be of 16 or 24 bits.

    Nothing tells those from quiet ones of 32 bits: zeros in the lower bits also come from samples
    of fewer bits that were shifted.
    """
    if array.dtype != np.int32 or not array.any():
        return
    loudest = max(-int(array.min()), int(array.max()) + 1)
    if loudest <= QUIET:
        bits = "int16" if loudest <= 2**15 else "24 bits"
        raise LcoError(
            f"{label} holds int32 within the range of {bits}, so that its full scale is not known; "
            "give samples of 16 bits as array.astype(np.int16), those of 24 bits as array / 2**23, "
            "and quiet ones that fill 32 bits as array / 2**31"
        )


def _mono(frames: np.ndarray) -> np.ndarray:
    """float32 [samples, channels] -> [samples]."""
    with np.errstate(all="ignore"):  # `_check_samples` finds infinities
        return np.mean(frames, axis=1)


def _from_file(file: MediaFile, config: MediaConfig) -> _Sound:
    """Read with libsndfile, as in the reference, or with PyAV what that cannot (m4a, videos)."""
    with file.open() as stream:
        # a descriptor, since libsndfile would believe a name that ends in .raw
        content = stream if isinstance(file.content, bytes) else stream.fileno()
        try:
            sound = _SoundFile(content, closefd=False)
        except soundfile.SoundFileError:
            return _through_av(file, config)
        with sound:
            rate = _check_rate(sound.samplerate, file.label)
            mono = _gather(_blocks(sound, file.label), _limit(rate, config))
            return _Sound(mono, rate, sound.frames / rate, file.label)


class _SoundFile(soundfile.SoundFile):
    """Read from front to end. The base class seeks after each read, and loses samples of MP3."""

    def seekable(self) -> bool:
        return False


def _blocks(sound: soundfile.SoundFile, label: str) -> Iterator[np.ndarray]:
    """float32 [samples, channels] until the file ends, whatever its header has."""
    size = BLOCK_SECONDS * sound.samplerate // sound.channels + 1
    while True:
        with decoding(label):
            block = sound.read(size, dtype="float32", always_2d=True)
        if not len(block):
            return
        yield block


def _through_av(file: MediaFile, config: MediaConfig) -> _Sound:
    with open_container(file, config) as container:
        tracks = (one for one in container.streams.audio if one.codec_context is not None)
        track = next(tracks, None)
        if track is None:
            raise NoSound(f"{file.label} has no sound track that can be decoded")
        frames = decoded(container, track)
        first = next(frames, None)
        if first is None:
            raise LcoError(f"{file.label} has a sound track of which nothing can be decoded")
        rate = _check_rate(first.sample_rate, file.label)  # decoders may double the header's
        blocks = _samples_of(itertools.chain([first], frames), file.label)
        mono = _gather(blocks, _limit(rate, config))
        seconds = (container.duration or 0) / av.time_base
        return _Sound(mono, rate, seconds, file.label)


def _samples_of(frames: Iterable[av.AudioFrame], label: str) -> Iterator[np.ndarray]:
    """Frames of any sample type and layout as float32 [samples, channels], at their rate."""
    resampler = av.AudioResampler(format="flt")  # PyAV crashes on more than 8 planes ("fltp")
    for frame in frames:
        with decoding(label):
            blocks = resampler.resample(frame)
        for block in blocks:
            with decoding(label):
                samples = block.to_ndarray().reshape(-1, block.layout.nb_channels)
            yield np.asfortranarray(samples)  # whose mean adds channel by channel


def _gather(blocks: Iterator[np.ndarray], limit: int) -> np.ndarray:
    """Blocks of [samples, channels] as one mono array: at most one sample more than `limit`."""
    parts = [np.zeros(0, np.float32)]
    samples = 0
    for block in blocks:
        parts.append(_mono(block))
        samples += len(block)
        if samples > limit:
            break
    return np.concatenate(parts)[: limit + 1]
