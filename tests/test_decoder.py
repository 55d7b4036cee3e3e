"""Decoding in processes of their own: clock, memory, end; films that are turned or sought."""

import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.reduction import ForkingPickler

import av
import numpy as np
import pillow_heif
import psutil
import pytest
import soundfile
import soxr
from PIL import Image, ImageFile
from processes import command_of, until

from lco_jax import LcoError
from lco_jax.data import decoder
from lco_jax.data.audio import decode_audio, load_audio
from lco_jax.data.content import as_content
from lco_jax.data.frames import FrameReader
from lco_jax.data.images import decode_image, load_pixels
from lco_jax.data.inputs import _Pickler
from lco_jax.data.media import MediaConfig, MediaFile
from lco_jax.data.video import decode_video, load_video

CONFIG = MediaConfig()
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 32, 3), np.uint8)


def segment(kind, content):
    return bytes([0xFF, kind]) + (len(content) + 2).to_bytes(2, "big") + content


def progressive_jpeg(side, scans):
    """A valid grey JPEG of a few bytes for each pass over all of its pixels."""
    size = side.to_bytes(2, "big") * 2
    frame = segment(0xC2, b"\x08" + size + b"\x01\x01\x11\x00")
    dc_table = segment(0xC4, b"\x00\x01" + bytes(15) + b"\x00")
    ac_table = segment(0xC4, b"\x10\x01" + bytes(15) + b"\xe0")
    blocks = (-(-side // 8)) ** 2
    dc_scan = segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes(-(-blocks // 8))
    bits = ("0" + "1" * 14) * -(-blocks // 32767)
    bits += "1" * (-len(bits) % 8)
    runs = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\x00")
    ac_scan = segment(0xDA, b"\x01\x01\x00\x01\x3f\x00") + runs
    tables = segment(0xDB, b"\x00" + b"\x01" * 64) + frame + dc_table + ac_table
    return b"\xff\xd8" + tables + dc_scan + ac_scan * scans + b"\xff\xd9"


def palette_png(width, height):
    """One colour, half transparent, of a few kilobytes."""

    def chunk(kind, content):
        checksum = zlib.crc32(kind + content).to_bytes(4, "big")
        return len(content).to_bytes(4, "big") + kind + content + checksum

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + b"\x01\x03\x00\x00\x00"
    rows = zlib.compress(bytes((1 + -(-width // 8)) * height), 9)
    chunks = chunk(b"IHDR", header) + chunk(b"PLTE", bytes(6)) + chunk(b"tRNS", b"\x80")
    return b"\x89PNG\r\n\x1a\n" + chunks + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def small(height, width):
    return 28, 28


def png(image, **options):
    stream = io.BytesIO()
    image.save(stream, "PNG", **options)
    return stream.getvalue()


# ---- bounds


def test_a_slow_picture_is_ended_and_others_go_on():
    slow = progressive_jpeg(6000, 400)
    hasty = MediaConfig(decode_seconds=0.5)
    start = time.monotonic()
    for source in (slow, Image.open(io.BytesIO(slow))):
        with pytest.raises(LcoError, match=r"^input 3: .* takes more than 0.5 seconds"):
            load_pixels(source, "input 3", hasty)
    np.testing.assert_array_equal(load_pixels(png(Image.fromarray(RGB)), "x", hasty), RGB)
    assert time.monotonic() - start < 30


def test_resampling_is_timed():
    """Of a file and of an array."""
    samples = RNG.standard_normal(5_000_000).astype(np.float32) * 0.1
    stream = io.BytesIO()
    soundfile.write(stream, samples, 655_349, format="WAV")
    hasty = MediaConfig(decode_seconds=0.02)
    for source in (stream.getvalue(), (samples, 655_349)):
        with pytest.raises(LcoError, match=r"^input 3: audio .* \(decode_seconds\)"):
            load_audio(source, "input 3", hasty)
    wanted = soxr.resample(samples[:100_000], 44_100, 16_000, quality="HQ")
    got = load_audio((samples[:100_000], 44_100), "input 3", CONFIG)
    np.testing.assert_array_equal(got[: len(wanted)], wanted)


def test_the_clock_counts_the_decoders_own_time():
    """Not the time during which it has to wait for others."""
    hasty = MediaConfig(decode_seconds=0.5)

    def late(height, width):
        time.sleep(1)
        return 28, 28

    assert load_pixels(png(Image.fromarray(RGB)), "x", hasty, late).shape == (28, 28, 3)


SLEEPY_DRIVER = """
import time
from PIL import Image, ImageFile

class Sleepy(ImageFile.ImageFile):
    format = "HEIF"

    def _open(self):
        self._size, self._mode = (8, 8), "RGB"

    def load(self):
        time.sleep(1000)

def register_heif_opener():
    Image.register_open("HEIF", Sleepy, lambda prefix: prefix.startswith(b"sleepy"))
"""
READS_A_SLEEPY_FILE = """
import os, sys, time
sys.path.insert(0, {folder!r})  # where the driver is
from lco_jax import LcoError
from lco_jax.data import decoder
from lco_jax.data.images import load_pixels
from lco_jax.data.media import MediaConfig

decoder.LEAST_SLEEP_SECONDS = 2.0
config = MediaConfig(decode_seconds=0.5)
assert load_pixels({good!r}, "good", config).shape == (24, 32, 3)
sleepy = decoder._pool.idle[0].process
start = time.monotonic()
try:
    load_pixels({folder!r} + "/a.heic", "input 3", config)
except LcoError as error:
    print(error)
assert 2 <= time.monotonic() - start < 20
assert sleepy.returncode == -9
assert load_pixels({good!r}, "good", config).shape == (24, 32, 3)
"""


def test_a_decoder_that_sleeps_is_ended(tmp_path):
    """It uses no CPU time. The file is named, and another process takes the next one."""
    (tmp_path / "pillow_heif.py").write_text(SLEEPY_DRIVER)
    (tmp_path / "a.heic").write_bytes(b"sleepy" + bytes(100))
    good = png(Image.fromarray(RGB))
    program = READS_A_SLEEPY_FILE.format(folder=str(tmp_path), good=good)
    result = subprocess.run(
        (sys.executable, "-c", program), capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == (
        f"input 3: image {tmp_path}/a.heic cannot be read: its decoder waited 2.5 seconds "
        "for a disk, a network or a driver that does not answer\n"
    )


def test_a_decoder_that_is_stopped_is_ended(monkeypatch):
    """Also one that takes no more of a file than its pipe holds."""
    monkeypatch.setattr(decoder, "LEAST_SLEEP_SECONDS", 1.0)
    content = png(Image.fromarray(RGB))
    load_pixels(content, "x", CONFIG)
    for process in _decoders(os.getpid()):
        process.suspend()
    hasty = MediaConfig(decode_seconds=0.2)
    with pytest.raises(LcoError, match=r"^input 3: image of .* cannot be read: .* 1 seconds"):
        load_pixels(content + bytes(5_000_000), "input 3", hasty)
    np.testing.assert_array_equal(load_pixels(content, "x", CONFIG), RGB)


def test_a_busy_decoder_does_not_sleep(monkeypatch):
    """It works for longer than it may sleep, and others take the CPUs from it."""
    monkeypatch.setattr(decoder, "LEAST_SLEEP_SECONDS", 1.0)
    monkeypatch.setattr(decoder, "SLEEP_FACTOR", 0.0)
    program = "import time\nend = time.monotonic() + 60\nwhile time.monotonic() < end: pass"
    others = [subprocess.Popen((sys.executable, "-c", program)) for _ in range(4)]
    try:
        start = time.monotonic()
        pixels = load_pixels(progressive_jpeg(6000, 800), "x", CONFIG, small)
        assert time.monotonic() - start > 3
    finally:
        for other in others:
            other.kill()
            other.wait()
    assert pixels.shape == (28, 28, 3)


def test_memory_is_bounded():
    """A palette with transparency was in memory four times in 32 bits a pixel."""
    picture = palette_png(6000, 6000)  # 36 million pixels: 36 MB, and 144 MB in RGB
    frugal = MediaConfig(max_decode_bytes=250_000_000)
    pixels = load_pixels(picture, "input 3", frugal, small)
    assert set(pixels.ravel()) == {127}
    for most in (100_000_000, 20_000_000):
        config = MediaConfig(max_decode_bytes=most)
        with pytest.raises(LcoError, match=f"^input 3: image of .* more than {most} bytes of"):
            load_pixels(picture, "input 3", config, small)
    np.testing.assert_array_equal(load_pixels(png(Image.fromarray(RGB)), "x", CONFIG), RGB)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["TIFF", "GIF", "WEBP", "PNG"])
def test_the_cap_on_pixels_is_ours_alone(kind):
    """Pillow refuses 179 million of them in some formats, whatever a caller allows."""
    size = (16_000, 11_500)
    if kind == "WEBP":  # which has no longer side
        size = (16_383, 10_930)
    stream = io.BytesIO()
    options = {"compression": "tiff_deflate"} if kind == "TIFF" else {}
    Image.new("L", size, 99).save(stream, kind, **options)
    config = MediaConfig(max_decode_bytes=4_000_000_000)  # WebP's decoder has four copies
    pixels = load_pixels(stream.getvalue(), "x", config, small)
    assert set(np.unique(pixels)) <= {98, 99, 100}


@pytest.mark.parametrize("kind", [signal.SIGKILL, signal.SIGSEGV])
def test_a_decoder_that_dies_takes_one_file_with_it(kind):
    content = png(Image.fromarray(RGB))
    before = _decoders(os.getpid())

    def kill(height, width):
        for process in _decoders(os.getpid()):
            process.send_signal(kind)
        return 28, 28

    with pytest.raises(LcoError, match=f"^input 3: .* its decoder was ended by {kind.name}"):
        load_pixels(content, "input 3", CONFIG, kill)
    np.testing.assert_array_equal(load_pixels(content, "x", CONFIG), RGB)
    assert not set(before) & set(_decoders(os.getpid()))


def _decoders(parent):
    """The processes that decode for another one."""
    children = psutil.Process(parent).children()
    return [child for child in children if "decode_process" in command_of(child)]


def test_decoders_end_with_a_killed_parent_and_need_no_main_guard(tmp_path):
    path = tmp_path / "a.png"
    path.write_bytes(png(Image.fromarray(RGB)))
    script = tmp_path / "script.py"
    script.write_text(
        "from lco_jax.data.images import load_pixels\n"
        "from lco_jax.data.media import MediaConfig\n"
        f"load_pixels({str(path)!r}, 'x', MediaConfig())\n"
        "print('ready', flush=True)\n"
        "input()\n"
    )
    with subprocess.Popen(
        (sys.executable, script), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path
    ) as process:
        assert process.stdout.readline() == b"ready\n"
        decoders = _decoders(process.pid)
        assert decoders
        process.kill()
    until(lambda: not any(command_of(one) for one in decoders), 60)


def test_a_decoder_imports_no_jax():
    program = (
        "import sys, lco_jax.data.decode_process\n"
        "print(sorted({'jax', 'flax', 'transformers', 'torch', 'orbax'} & set(sys.modules)))"
    )
    result = subprocess.run((sys.executable, "-c", program), capture_output=True, check=True)
    assert result.stdout == b"[]\n"


def test_many_threads_share_the_decoders_and_a_lazy_image(tmp_path):
    """The caller's image stays as it is, and can be used afterwards."""
    pixels = RNG.integers(0, 256, (300, 400, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True)
    for kind in ("png", "bmp", "webp"):
        path = tmp_path / f"a.{kind}"
        if kind != "webp":
            Image.fromarray(pixels).save(path)
        image = Image.open(path)
        barrier = threading.Barrier(8)

        def load(_, image=image, barrier=barrier):
            barrier.wait()
            return load_pixels(image, "x", CONFIG)

        with ThreadPoolExecutor(8) as pool:
            for loaded in pool.map(load, range(8)):
                np.testing.assert_array_equal(loaded, pixels)
        np.testing.assert_array_equal(np.asarray(image), pixels)


LAZY = (  # what Pillow opens; of ICO it decodes a picture to open it
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "AVIF", "JPEG2000", "PPM", "PCX"),
    *("TGA", "MPO", "SGI", "DDS", "QOI", "ICNS", "HEIF"),
)
ANIMATED = ("GIF", "WEBP", "AVIF", "TIFF", "PNG", "MPO", "HEIF")
NOISE = np.random.default_rng(2).integers(0, 256, (3, 150, 203, 3), np.uint8)


@pytest.fixture
def elsewhere(monkeypatch):
    """Forbids that this process decodes a picture, of any of Pillow's formats."""
    pillow_heif.register_heif_opener()
    Image.init()

    def here(*_):
        raise AssertionError("decoded in the caller's process")

    def forbid():
        for base in (ImageFile.ImageFile, *ImageFile.ImageFile.__subclasses__()):
            for kind in (base, *base.__subclasses__()):
                if "load" in vars(kind):
                    monkeypatch.setattr(kind, "load", here)

    return forbid


def saved(kind, frames, **options):
    """A file of these frames."""
    images = [Image.fromarray(frame) for frame in frames]
    stream = io.BytesIO()
    if len(images) > 1:
        options |= {"save_all": True, "append_images": images[1:]}
    images[0].save(stream, kind, **options)
    return stream.getvalue()


def as_prepared(image):
    """The pixels that a caller sees of an image of its own."""
    return np.asarray(image.convert("RGB"))


@pytest.mark.parametrize("kind", LAZY)
def test_a_lazy_image_of_any_format_is_decoded_elsewhere(kind, elsewhere, tmp_path):
    pillow_heif.register_heif_opener()
    content = saved(kind, NOISE[:1])
    path = tmp_path / "a"
    path.write_bytes(content)
    wanted = as_prepared(Image.open(path))
    lazy = [Image.open(path), Image.open(io.BytesIO(content))]
    elsewhere()
    for image in lazy:
        np.testing.assert_array_equal(load_pixels(image, "x", CONFIG), wanted)
    if len(content) > 40_000:
        capped = MediaConfig(max_file_bytes=40_000)
        with pytest.raises(LcoError, match=r"^input 3: PIL image has 40001 bytes or more"):
            load_pixels(lazy[1], "input 3", capped)


@pytest.mark.parametrize("kind", ANIMATED)
def test_a_later_frame_of_a_lazy_image_is_decoded_elsewhere(kind, elsewhere):
    pillow_heif.register_heif_opener()
    content = saved(kind, NOISE)
    wanted, lazy = [], []
    for frame in (2, 1, 0):
        for images in (wanted, lazy):
            image = Image.open(io.BytesIO(content))
            image.seek(frame)
            images.append(image)
    wanted = [as_prepared(image) for image in wanted]
    assert len({pixels.tobytes() for pixels in wanted}) == 3
    elsewhere()
    for image, pixels in zip(lazy, wanted, strict=True):
        np.testing.assert_array_equal(load_pixels(image, "x", CONFIG), pixels)


@pytest.mark.parametrize("kind", ANIMATED)
def test_a_frame_after_a_decoded_one_is_right(kind):
    """Here Pillow may have no file any more (WEBP, AVIF, HEIF): its own frame is taken."""
    pillow_heif.register_heif_opener()
    for exclusive in (False, True):
        content = saved(kind, NOISE)
        with tempfile.NamedTemporaryFile() as file:
            file.write(content)
            file.flush()
            image = Image.open(file.name if exclusive else io.BytesIO(content))
            image.load()
            image.seek(1)
            got = load_pixels(image, "x", CONFIG)
            other = Image.open(io.BytesIO(content))
            other.seek(1)
            np.testing.assert_array_equal(got, as_prepared(other))


@pytest.mark.parametrize("size", [(100, 70), (50, 37), (25, 18), (203, 150), (60, 140)])
@pytest.mark.parametrize("mode", ["RGB", "L", "YCbCr", None])
def test_a_draft_of_a_lazy_image_is_decoded_elsewhere(size, mode, elsewhere):
    content = saved("JPEG", NOISE[:1])
    drafts = [Image.open(io.BytesIO(content)) for _ in range(2)]
    for image in drafts:
        image.draft(mode, size)
    wanted = as_prepared(drafts[0])
    elsewhere()
    np.testing.assert_array_equal(load_pixels(drafts[1], "x", CONFIG), wanted)


def test_a_reduced_jpeg_2000_is_decoded_elsewhere(elsewhere):
    content = saved("JPEG2000", NOISE[:1])
    reduced = [Image.open(io.BytesIO(content)) for _ in range(2)]
    for image in reduced:
        image.reduce = 2
    wanted = as_prepared(reduced[0])
    assert wanted.shape == (38, 51, 3)
    elsewhere()
    np.testing.assert_array_equal(load_pixels(reduced[1], "x", CONFIG), wanted)


def test_a_lazy_image_of_another_size_than_its_file_is_refused():
    content = saved("ICNS", NOISE[:1])
    image = Image.open(io.BytesIO(content))
    image.size = (128, 128)
    with pytest.raises(LcoError, match=r"^input 3: PIL image is .*; call its load\(\) before$"):
        load_pixels(image, "input 3", CONFIG)
    image.load()
    assert load_pixels(image, "input 3", CONFIG).shape[0] == image.height


def test_a_slow_draft_is_ended():
    """The clock is that of files."""
    image = Image.open(io.BytesIO(progressive_jpeg(6000, 400)))
    image.draft("L", (6000, 6000))
    with pytest.raises(LcoError, match=r"^input 3: PIL image takes more than 0.3 seconds"):
        load_pixels(image, "input 3", MediaConfig(decode_seconds=0.3))


def test_a_lazy_image_is_sent_to_a_process_as_its_file(elsewhere):
    """To pickle it would decode it."""
    content = saved("GIF", NOISE)
    wanted, image = (Image.open(io.BytesIO(content)) for _ in range(2))
    for one in (wanted, image):
        one.seek(1)
    pixels = as_prepared(wanted)
    elsewhere()
    sent = ForkingPickler.loads(bytes(_Pickler.dumps([(image, "input 3")])))
    [(lazy, name)] = sent
    [part] = as_content(lazy, name)
    np.testing.assert_array_equal(load_pixels(part["image"], name, CONFIG), pixels)
    with pytest.raises(LcoError, match=r"^input 3: PIL image has .* bytes or more"):
        load_pixels(part["image"], name, MediaConfig(max_file_bytes=100))


def test_an_image_that_was_changed_in_memory_is_not_its_file():
    drawn = Image.open(io.BytesIO(png(Image.fromarray(RGB))))
    drawn.paste((0, 0, 0), (0, 0, *drawn.size))
    assert not load_pixels(drawn, "x", CONFIG).any()


def test_another_process_decodes_the_same(tmp_path):
    path = tmp_path / "ä b.png"
    path.write_bytes(png(Image.fromarray(RGB)))
    file = MediaFile("x", path)
    np.testing.assert_array_equal(load_pixels(path, "x", CONFIG), decode_image(file, CONFIG, None))
    stream = io.BytesIO()
    soundfile.write(stream, RNG.uniform(-1, 1, 9000), 22_050, format="WAV")
    sound = MediaFile("x", stream.getvalue())
    np.testing.assert_array_equal(
        load_audio(stream.getvalue(), "x", CONFIG), decode_audio(sound, CONFIG)
    )


# ---- films


def film(codec, container, count, size=(64, 48), rate=30, group=25, **options):
    """A film of moving noise, with a key frame every `group` frames."""
    stream = io.BytesIO()
    picture = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), np.uint8)
    with av.open(stream, "w", format=container) as file:
        video = file.add_stream(codec, rate=rate, options=options)
        video.width, video.height = size
        video.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
        video.gop_size = group
        for i in range(count):
            moved = np.roll(picture, i, axis=1)
            moved[:8, :8] = i % 256
            file.mux(video.encode(av.VideoFrame.from_ndarray(moved, format="rgb24")))
        file.mux(video.encode(None))
    return stream.getvalue()


SOUGHT = [
    ("libx264", "mp4", {"bf": "3"}),
    ("libx264", "matroska", {"bf": "2", "x264-params": "open-gop=1"}),
    ("libx264", "mpegts", {}),
    ("libx265", "mp4", {"x265-params": "log-level=none:open-gop=1"}),
    ("mpeg4", "avi", {}),
    ("mpeg4", "mp4", {"bf": "2"}),
    ("libvpx", "webm", {"auto-alt-ref": "1", "lag-in-frames": "16", "deadline": "realtime"}),
    ("libvpx-vp9", "webm", {"deadline": "realtime", "cpu-used": "8"}),
    ("mpeg2video", "mpegts", {"bf": "2"}),
    ("mjpeg", "mov", {}),
]


@pytest.mark.parametrize(("codec", "container", "options"), SOUGHT)
def test_seeking_gives_the_frames_of_decoding_all(monkeypatch, codec, container, options):
    content = film(codec, container, 700, **options)
    file = MediaFile("x", content)
    config = MediaConfig(max_frames=8)
    decoded = []
    count = FrameReader.all_decoded
    monkeypatch.setattr(FrameReader, "all_decoded", lambda *a: decoded.append(1) or count(*a))
    sought = decode_video(file, config, None)
    if codec not in ("libvpx", "libvpx-vp9"):  # those have packets without a frame
        assert not decoded
    monkeypatch.setattr(FrameReader, "sought", lambda *a: iter(()))
    np.testing.assert_array_equal(sought, decode_video(file, config, None))
    assert len(sought) == 8
    np.testing.assert_array_equal(sought, load_video(content, "x", config).frames)


def turned(content, matrix):
    """An mp4 with another display matrix: a, b, c, d of its track."""
    changed = bytearray(content)
    at = content.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65_536 for value in matrix)
    numbers = np.array([a, b, 0, c, d, 0, 0, 0, 1 << 30], ">i4")
    changed[at : at + 36] = numbers.tobytes()
    return bytes(changed)


@pytest.mark.parametrize(
    ("matrix", "turn"),
    [
        ((0, 1, -1, 0), Image.Transpose.ROTATE_270),  # what phones write for portrait
        ((-1, 0, 0, -1), Image.Transpose.ROTATE_180),
        ((0, -1, 1, 0), Image.Transpose.ROTATE_90),
        ((-1, 0, 0, 1), Image.Transpose.FLIP_LEFT_RIGHT),
        ((1, 0, 0, -1), Image.Transpose.FLIP_TOP_BOTTOM),
        ((0, 1, 1, 0), Image.Transpose.TRANSPOSE),
    ],
)
def test_videos_are_upright(matrix, turn):
    content = film("libx264", "mp4", 30)
    phone = turned(content, matrix)
    stored = load_video(content, "x", CONFIG).frames
    upright = [np.asarray(Image.fromarray(frame).transpose(turn)) for frame in stored]
    asked = []

    def size_rule(height, width, _):
        asked.append((height, width))
        return height, width

    frames = load_video(phone, "x", CONFIG, size_rule).frames
    np.testing.assert_array_equal(frames, np.stack(upright))
    assert asked == [frames.shape[1:3]]
    raw = load_video(phone, "x", MediaConfig(upright=False)).frames
    np.testing.assert_array_equal(raw, stored)
