"""Sounds of meanings. Dimensions: N samples, mono, 16 kHz, at most 1.2 s."""

import numpy as np

from laboratory.worlds.concepts import Sound

RATE = 16_000  # Hz
EVENT = 0.26  # seconds that one sound takes
GAPS = {"fast": 0.15, "slow": 0.3, None: 0.2}  # seconds from one onset to the next
HELD = 0.7  # of a gap, at most that what is sustained takes: a silence tells one from the next
PAUSE = 0.31  # from the last onset of a group to the first of the next
PITCH = {  # Hz: where the thing is high, and where it is low
    "bell": (1500.0, 520.0),
    "drum": (230.0, 75.0),
    "horn": (620.0, 190.0),
    "bird": (4200.0, 2000.0),
    "rising tone": (900.0, 280.0),
    "falling tone": (900.0, 280.0),
}


def sound(meaning: Sound, rng: np.random.Generator) -> np.ndarray:
    """Float32 [N] within ±1, ending with its last event; onsets, pitch and loudness jittered, a
    little noise.
    """
    onsets, at, gap = [], 0.02, GAPS[meaning.tempo]
    for group in meaning.groups:
        onsets.append([at + i * gap + rng.uniform(0, 0.012) for i in range(group.count)])
        at = onsets[-1][-1] + PAUSE
    total = int((onsets[-1][-1] + EVENT) * RATE)
    mixed = rng.normal(0, 0.003, total)
    for group, times in zip(meaning.groups, onsets, strict=True):
        pitch = PITCH[group.thing][group.pitch == "low"] * rng.uniform(0.95, 1.05)
        for time in times:
            begin = int(time * RATE)
            event = _event(group.thing, pitch, min(HELD * gap, 0.2), rng)[: total - begin]
            mixed[begin : begin + len(event)] += event * rng.uniform(0.8, 1.0)
    return (mixed * rng.uniform(0.35, 0.7) / np.abs(mixed).max()).astype(np.float32)


def _event(thing: str, pitch: float, length: float, rng: np.random.Generator) -> np.ndarray:
    """One sound; those that do not die away take `length` seconds."""
    t = np.arange(int(EVENT * RATE)) / RATE
    edges = np.minimum(1.0, np.minimum(t, EVENT - t) / 0.004)  # no clicks
    if thing == "bell":  # inharmonic partials, the higher the shorter
        partials = ((1.0, 14), (2.76, 22), (5.4, 40))
        return edges * sum(
            np.exp(-decay * t) * np.sin(2 * np.pi * pitch * k * t) / k**0.5 for k, decay in partials
        )
    if thing == "drum":  # a burst of noise, and a thump that falls
        thump = np.exp(-20 * t) * np.sin(2 * np.pi * pitch * (t + 0.02 * (1 - np.exp(-30 * t))))
        return edges * (thump + 0.5 * np.exp(-60 * t) * rng.normal(0, 1, len(t)))
    held = np.clip(np.minimum(t / 0.012, (length - t) / 0.025), 0, 1)
    if thing == "horn":  # a saw
        return held * sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 9))
    if thing == "bird":  # two quick sweeps
        bend = 0.4 * np.sin(4 * np.pi * t / length)
    else:
        bend = np.clip(t / length if thing == "rising tone" else 1 - t / length, 0, 1)
    return held * np.sin(2 * np.pi * np.cumsum(pitch * 2**bend) / RATE)
