"""Valid videos, and what their frames are."""

import io
import struct
from collections.abc import Callable
from fractions import Fraction

import av
import numpy as np
from PIL import Image

from benchmarks.fuzz.images import Made

CONTAINERS = (  # of FFmpeg: container, codec, pixel format, ending
    ("mp4", "mpeg4", "yuv420p", ".mp4"),
    ("mp4", "libx264", "yuv420p", ".mp4"),
    ("mov", "libx264", "yuv420p", ".mov"),
    ("matroska", "libx264", "yuv420p", ".mkv"),
    ("matroska", "ffv1", "bgr0", ".mkv"),
    ("webm", "libvpx-vp9", "yuv420p", ".webm"),
    ("webm", "libvpx", "yuv420p", ".webm"),
    ("avi", "mpeg4", "yuv420p", ".avi"),
    ("avi", "mjpeg", "yuvj420p", ".avi"),
)
RATES = (1, 2, 8, 25, Fraction(30000, 1001), Fraction(25, 2), Fraction(1, 2), 120)
# the sizes of the model's input, so that resizing does not hide what is wrong
WIDTH, HEIGHT = 64, 48
MATRICES = {  # degrees clockwise -> a, b, c, d of a track's display matrix
    90: (0, 1, -1, 0),
    180: (-1, 0, 0, -1),
    270: (0, -1, 1, 0),
}
FPS, LEAST, MOST = 2.0, 4, 8  # the worker's sampling


def written(
    rng: np.random.Generator, container: str, codec: str, pixels: str, rate: Fraction, frames: int
) -> bytes:
    """A video of a picture that moves."""
    stream = io.BytesIO()
    scene = rng.integers(0, 256, (6, 12, 3), np.uint8)
    still = np.asarray(Image.fromarray(scene).resize((2 * WIDTH, HEIGHT)))
    # without identifiers that FFmpeg draws at random
    with av.open(stream, "w", format=container, options={"fflags": "+bitexact"}) as out:
        track = out.add_stream(codec, rate=rate)
        track.width, track.height, track.pix_fmt = WIDTH, HEIGHT, pixels
        for i in range(frames):
            moved = np.ascontiguousarray(np.roll(still, 7 * i, axis=1)[:, :WIDTH])
            out.mux(track.encode(av.VideoFrame.from_ndarray(moved, "rgb24")))
        out.mux(track.encode())
    return stream.getvalue()


def sampled(content: bytes) -> np.ndarray:
    """The frames that the reference's rule takes of a file, decoded one after the other."""
    with av.open(io.BytesIO(content)) as file:
        track = file.streams.video[0]
        rate = float(track.average_rate)
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(track)]
    most = min(MOST, len(frames))
    wanted = min(max(len(frames) / rate * FPS, LEAST), most)
    kept = max(int(wanted) // 2 * 2, 1)
    places = np.rint(np.linspace(0, len(frames) - 1, kept)).astype(int)
    return np.stack([frames[i] for i in places])


def video(rng: np.random.Generator) -> Made:
    """One of the containers at an odd or usual rate."""
    container, codec, pixels, ending = CONTAINERS[rng.integers(len(CONTAINERS))]
    rate = Fraction(RATES[rng.integers(len(RATES))])
    if codec in ("mpeg4", "libvpx") and rate < 1:
        rate = Fraction(1)
    count = int(rng.choice([1, 2, 5, 8, 17, 30]))
    content = written(rng, container, codec, pixels, rate, count)
    what = f"{container} {codec}, {count} frames at {rate}"
    return Made("video", what, ending, content, sampled(content))


def turned(rng: np.random.Generator) -> Made:
    """An mp4 with a display matrix, as phones write it."""
    degrees = int(rng.choice([90, 180, 270]))
    content = written(rng, "mp4", "libx264", "yuv420p", Fraction(4), 10)
    frames = np.rot90(sampled(content), -degrees // 90, axes=(1, 2))
    right = np.ascontiguousarray(frames)
    return Made("video", f"mp4 turned by {degrees}", ".mp4", with_matrix(content, degrees), right)


def with_matrix(content: bytes, degrees: int) -> bytes:
    """The file with another display matrix in the header of its track."""
    edited = bytearray(content)
    start = edited.index(b"tkhd") + 44  # a box of version 0
    a, b, c, d = (value * 65536 for value in MATRICES[degrees])
    edited[start : start + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    return bytes(edited)


MAKERS: tuple[Callable[[np.random.Generator], Made], ...] = (video, video, turned)
