"""Valid sounds, and what their samples are."""

import io
from collections.abc import Callable

import numpy as np
import soundfile

from benchmarks.fuzz.images import Made

FORMATS = (  # libsndfile's container, sample formats, ending
    ("WAV", ("PCM_U8", "PCM_16", "PCM_24", "PCM_32", "FLOAT", "DOUBLE", "ULAW", "ALAW"), ".wav"),
    ("WAV", ("IMA_ADPCM", "MS_ADPCM"), ".wav"),
    ("WAVEX", ("PCM_16", "PCM_24", "FLOAT"), ".wav"),
    ("RF64", ("PCM_16", "FLOAT"), ".wav"),
    ("FLAC", ("PCM_S8", "PCM_16", "PCM_24"), ".flac"),
    ("OGG", ("VORBIS", "OPUS"), ".ogg"),
    ("MP3", ("MPEG_LAYER_III",), ".mp3"),
    ("AIFF", ("PCM_16", "PCM_24", "FLOAT"), ".aiff"),
    ("AU", ("PCM_16", "ULAW"), ".au"),
    ("CAF", ("PCM_16",), ".caf"),
    ("W64", ("PCM_16",), ".w64"),
)
RATES = (8000, 16000, 22050, 44100, 48000)
OPUS_RATES = (8000, 16000, 24000, 48000)


def wave(rng: np.random.Generator, seconds: float, rate: int, channels: int) -> np.ndarray:
    """Tones and noise, float64 [samples, channels], within full scale."""
    time = np.arange(int(seconds * rate)) / rate
    tones = [
        0.3 * np.sin(2 * np.pi * rng.uniform(80, rate / 3) * time + channel)
        for channel in range(channels)
    ]
    noise = rng.normal(0, 0.02, (len(time), channels))
    return np.stack(tones, axis=1) + noise


def sound(rng: np.random.Generator) -> Made:
    """One of the formats; at any usual rate, with one or more channels."""
    name, subtypes, ending = FORMATS[rng.integers(len(FORMATS))]
    subtype = str(rng.choice(subtypes))
    rate = int(rng.choice(OPUS_RATES if subtype == "OPUS" else RATES))
    lossy = subtype in ("VORBIS", "OPUS", "MPEG_LAYER_III", "IMA_ADPCM", "MS_ADPCM")
    channels = int(rng.integers(1, 3)) if lossy else int(rng.choice([1, 1, 2, 6]))
    samples = wave(rng, float(rng.choice([0.8, 1.0, 2.0])), rate, channels)
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, subtype=subtype, format=name)
    content = stream.getvalue()
    decoded, rate = soundfile.read(io.BytesIO(content), dtype="float32", always_2d=True)
    right = decoded.mean(axis=1)
    what = f"{name} {subtype}, {channels} channels at {rate} Hz"
    return Made("audio", what, ending, content, right, rate)


def streamed(rng: np.random.Generator) -> Made:
    """A WAV whose sizes were not known when its header was written, as ffmpeg writes to a pipe."""
    stream = io.BytesIO()
    samples = wave(rng, 1.0, 16000, 1)
    soundfile.write(stream, samples, 16000, subtype="PCM_16", format="WAV")
    content = bytearray(stream.getvalue())
    right, _ = soundfile.read(io.BytesIO(bytes(content)), dtype="float32")
    data = content.index(b"data") + 4
    content[4:8] = content[data : data + 4] = b"\xff\xff\xff\xff"
    return Made("audio", "WAV of unknown length", ".wav", bytes(content), right, 16000)


MAKERS: tuple[Callable[[np.random.Generator], Made], ...] = (sound, sound, sound, streamed)
