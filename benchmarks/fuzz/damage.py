"""Files that are torn, or whose headers lie."""

import struct
import zlib
from collections.abc import Callable

import numpy as np

from benchmarks.fuzz.images import Made

Damage = Callable[[np.random.Generator, bytes], tuple[str, bytes]]
HEADER = 128  # bytes at the beginning of a file
# those within the default of max_image_pixels, and far beyond it
PNG_SIZES = ((14_100, 14_100), (13_000, 13_000), (40_000, 40_000), (60_000, 1), (5_000, 5_000))
EXTREMES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)


def cut(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """The file ends early."""
    size = int(rng.integers(1, max(2, int(0.8 * len(content)))))
    return f"cut to {size} of {len(content)} bytes", content[:size]


def flip(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """Some bits anywhere are others."""
    torn = bytearray(content)
    count = int(rng.choice([1, 5, 50, 500]))
    for place in rng.integers(0, len(torn), count):
        torn[place] ^= 1 << int(rng.integers(8))
    return f"{count} bits flipped", bytes(torn)


def edit_header(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """A number of the header is an extreme one."""
    torn = bytearray(content)
    place = int(rng.integers(0, max(1, min(HEADER, len(torn)) - 4)))
    width = str(rng.choice(["<I", ">I", "<H", ">H", "B"]))
    value = EXTREMES[rng.integers(len(EXTREMES))] & (256 ** struct.calcsize(width) - 1)
    struct.pack_into(width, torn, place, value)
    return f"header[{place}] = {value} ({width})", bytes(torn[: len(content)])


def zeros(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """A stretch is zeros."""
    torn = bytearray(content)
    start = int(rng.integers(0, len(torn)))
    size = min(int(rng.integers(1, len(torn) + 1)), len(torn) - start)
    torn[start : start + size] = bytes(size)
    return f"{size} zeros at {start}", bytes(torn)


def repeat(rng: np.random.Generator, content: bytes) -> tuple[str, bytes]:
    """A stretch comes again."""
    start, end = sorted(rng.integers(0, len(content) + 1, 2).tolist())
    times = int(rng.choice([1, 3, 50]))
    return (
        f"{start} to {end} again, {times} times",
        content[:end] + content[start:end] * times + content[end:],
    )


ANY: tuple[Damage, ...] = (cut, cut, flip, flip, edit_header, edit_header, zeros, repeat)


def spliced(rng: np.random.Generator, first: bytes, second: bytes) -> tuple[str, bytes]:
    """The beginning of one file and the end of another."""
    at, then = int(rng.integers(1, len(first))), int(rng.integers(1, len(second)))
    return f"the first {at} bytes, then another file from byte {then}", first[:at] + second[then:]


# ---- files that promise more than they have


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png_bomb(rng: np.random.Generator) -> Made:
    """Zeros of many pixels, which compress a thousandfold."""
    width, height = PNG_SIZES[rng.integers(len(PNG_SIZES))]
    bits, colour = [(1, 0), (8, 3), (8, 0), (16, 2), (8, 6)][rng.integers(5)]
    interlaced = int(rng.integers(2))
    channels = {0: 1, 2: 3, 3: 1, 6: 4}[colour]
    row = bytes(1 + (width * bits * channels + 7) // 8)
    compressor = zlib.compressobj(9)
    parts = [compressor.compress(row) for _ in range(min(height, 14_100))]
    data = b"".join(parts) + compressor.flush()
    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, interlaced)
    palette = _chunk(b"PLTE", bytes(768)) if colour == 3 else b""
    content = b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + palette
    content += _chunk(b"IDAT", data) + _chunk(b"IEND", b"")
    what = f"PNG bomb {width} x {height}, {bits} bits, colour {colour}, interlaced {interlaced}"
    return Made("image", what, ".png", content)


def gif_bomb(rng: np.random.Generator) -> Made:
    """A screen of many pixels, and an image of one."""
    width, height = [(65_535, 65_535), (14_100, 14_100), (13_000, 13_000)][rng.integers(3)]
    content = b"GIF89a" + struct.pack("<HHBBB", width, height, 0x80, 0, 0) + bytes(6)
    inner = (width, height) if rng.integers(2) else (1, 1)
    content += b"," + struct.pack("<HHHHB", 0, 0, *inner, 0) + b"\x02\x02\x44\x01\x00;"
    return Made("image", f"GIF bomb {width} x {height}, image {inner}", ".gif", content)


def bmp_bomb(rng: np.random.Generator) -> Made:
    """A size in the header without its pixels, or run-lengths that never come."""
    width, height = [(14_000, 14_000), (2**31 - 1, 1), (30_000, -30_000)][rng.integers(3)]
    bits, compression = [(24, 0), (8, 1), (1, 0)][rng.integers(3)]
    head = struct.pack("<IiiHHIIiiII", 40, width, height, 1, bits, compression, 0, 1, 1, 2, 0)
    content = b"BM" + struct.pack("<IHHI", 200, 0, 0, 62) + head + bytes(8) + b"\x00\x01" * 20
    return Made("image", f"BMP bomb {width} x {height}, {bits} bits", ".bmp", content)


def wav_bomb(rng: np.random.Generator) -> Made:
    """A header of extreme rates, channels and sizes."""
    rate = int(rng.choice([0, 1, 3, 768_000, 2**31 - 1, 2**32 - 1]))
    channels = int(rng.choice([0, 1, 255, 65_535]))
    bits = int(rng.choice([0, 1, 8, 16, 24, 64]))
    size = int(rng.choice([0, 4000, 2**31 - 1, 2**32 - 1]))
    kind = int(rng.choice([1, 3, 2, 17, 85, 0xFFFE, 0]))
    block = channels * bits // 8 & 0xFFFF
    form = struct.pack("<HHIIHH", kind, channels, rate, rate * block & 0xFFFFFFFF, block, bits)
    content = b"RIFF" + struct.pack("<I", 36 + 4000) + b"WAVEfmt " + struct.pack("<I", 16) + form
    content += b"data" + struct.pack("<I", size) + rng.bytes(4000)
    what = f"WAV kind {kind}, {channels} channels, {rate} Hz, {bits} bits, {size} bytes"
    return Made("audio", what, ".wav", content)


BOMBS = (png_bomb, gif_bomb, bmp_bomb, wav_bomb)
