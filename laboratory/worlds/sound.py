"""Sounds of meanings. Dimensions: N samples, mono, 16 kHz, at most 1.2 s."""

import numpy as np

from laboratory.worlds.concepts import Sound

RATE = 16_000  # Hz
EVENT = 0.26  # seconds that one sound takes
GAPS = {"fast": 0.14, "slow": 0.3, None: 0.19}  # seconds from one onset to the next
PAUSE = 0.31  # from the last onset of a group to the first of the next
PITCH = {  # Hz: where the thing is high, and where it is low
    "bell": (1500.0, 520.0), "drum": (230.0, 75.0), "horn": (620.0, 190.0), "bird": (4200.0, 2000.0),
    "clock": (3400.0, 1100.0), "rising tone": (900.0, 280.0), "falling tone": (900.0, 280.0),
}  # fmt: skip


def sound(meaning: Sound, rng: np.random.Generator) -> np.ndarray:
    """Float32 [N] within ±1, ending with its last event; onsets, pitch and loudness jittered, a little noise."""
    onsets, at = [], 0.02
    for group in meaning.groups:
        onsets.append([at + i * GAPS[meaning.tempo] + rng.uniform(0, 0.012) for i in range(group.count)])
        at = onsets[-1][-1] + PAUSE
    total = int((onsets[-1][-1] + EVENT) * RATE)
    mixed = rng.normal(0, 0.003, total)
    for group, times in zip(meaning.groups, onsets, strict=True):
        pitch = PITCH[group.thing][group.pitch == "low"] * rng.uniform(0.95, 1.05)
        for time in times:
            begin = int(time * RATE)
            event = _event(group.thing, pitch, rng)[: total - begin]
            mixed[begin : begin + len(event)] += event * rng.uniform(0.8, 1.0)
    return (mixed * rng.uniform(0.35, 0.7) / np.abs(mixed).max()).astype(np.float32)


def _event(thing: str, pitch: float, rng: np.random.Generator) -> np.ndarray:
    t = np.arange(int(EVENT * RATE)) / RATE
    edges = np.minimum(1.0, np.minimum(t, EVENT - t) / 0.004)  # no clicks
    if thing == "bell":  # inharmonic partials, the higher the shorter
        partials = ((1.0, 14), (2.76, 22), (5.4, 40))
        return edges * sum(np.exp(-decay * t) * np.sin(2 * np.pi * pitch * k * t) / k**0.5 for k, decay in partials)
    if thing == "drum":  # a burst of noise, and a thump that falls
        thump = np.exp(-20 * t) * np.sin(2 * np.pi * pitch * (t + 0.02 * (1 - np.exp(-30 * t))))
        return edges * (thump + 0.5 * np.exp(-60 * t) * rng.normal(0, 1, len(t)))
    if thing == "clock":  # a click that rings a moment
        return edges * np.exp(-90 * t) * np.sin(2 * np.pi * pitch * t)
    if thing == "horn":  # a saw with a soft attack, held
        saw = sum(np.sin(2 * np.pi * pitch * k * t) / k for k in range(1, 9))
        return saw * np.minimum(1.0, np.minimum(t / 0.02, np.maximum(0.2 - t, 0) / 0.03)) * 0.8
    if thing == "bird":  # two quick sweeps
        phase = np.cumsum(pitch * (1 + 0.25 * np.sin(2 * np.pi * t / 0.07))) / RATE
        return np.sin(2 * np.pi * phase) * np.clip(np.sin(np.pi * t / 0.15), 0, 1) * (t < 0.15)
    bend = t / 0.2 if thing == "rising tone" else 1 - t / 0.2
    phase = np.cumsum(pitch * 2 ** np.clip(bend, 0, 1)) / RATE
    return np.sin(2 * np.pi * phase) * np.minimum(1.0, np.minimum(t / 0.01, np.maximum(0.2 - t, 0) / 0.02))
