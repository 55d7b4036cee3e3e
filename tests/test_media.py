"""Loading images, sound and video: values, layouts, every refusal, and files that are torn."""

import base64
import io
import os
import re
import tempfile
import threading
import time
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, HTTPServer
from itertools import pairwise

import av
import numpy as np
import pillow_heif
import pytest
import soundfile
import soxr
import torch
from PIL import Image, ImageFile, ImageOps

from lco_jax import LcoError
from lco_jax.data.audio import MIN_SAMPLES, audio_tokens, decode_audio, load_audio
from lco_jax.data.frame_choice import sampled_indices
from lco_jax.data.images import load_image, load_pixels
from lco_jax.data.media import MediaConfig, MediaFile, resolve
from lco_jax.data.video import Video, load_video

CONFIG = MediaConfig()
RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (24, 32, 3), np.uint8)
TONE = (np.sin(np.arange(16000) / 20) * 0.4 * np.linspace(0, 1, 16000)).astype(np.float32)


def sentence(error, where="input 3: "):
    """The message of an LcoError: one line, no fragment, and it begins with the input's name."""
    text = str(error.value)
    assert text.startswith(where), text
    assert text.isprintable()
    assert not text.endswith(":")
    return text


def refused(load, source, *words, config=CONFIG):
    with pytest.raises(LcoError) as error:
        load(source, "input 3", config)
    text = sentence(error)
    for word in words:
        assert word in text, text
    return text


def image_bytes(image, kind, **options):
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def sound_bytes(samples, kind, rate=16000, **options):
    stream = io.BytesIO()
    soundfile.write(stream, samples, rate, format=kind, **options)
    return stream.getvalue()


def shade(i):
    return 4 * i + 8


def numbers(frames):
    """The frame numbers that `film` wrote in the brightness."""
    return np.rint((frames.mean((1, 2, 3)) - 8) / 4).astype(int).tolist()


def film(
    codec,
    container,
    count=30,
    size=(48, 32),
    rate=10,
    pixels="yuv420p",
    sound=None,
    seconds=3.0,
    options=None,
):
    """A video as bytes. Frame i has brightness shade(i) everywhere; sound: the codec of a tone."""
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/film"  # FFmpeg opens it again to move the header to the front
        with av.open(path, "w", format=container, options=options or {}) as file:
            video = file.add_stream(codec, rate=rate)
            video.width, video.height, video.pix_fmt = *size, pixels
            video.bit_rate = 4_000_000
            audio = file.add_stream(sound, rate=16000, layout="mono") if sound else None
            file.start_encoding()
            for i in range(count):
                picture = np.full((size[1], size[0], 3), shade(i), np.uint8)
                file.mux(video.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(video.encode(None))
            if sound:
                mux_sound(file, audio, np.resize(TONE, int(seconds * 16000)))
        with open(path, "rb") as stream:
            return stream.read()


def sound_track(codec, container, samples, rate=16000):
    """Sound at 16 kHz as bytes, through PyAV."""
    with tempfile.TemporaryDirectory() as folder:
        with av.open(f"{folder}/sound", "w", format=container) as file:
            mux_sound(file, file.add_stream(codec, rate=rate, layout="mono"), samples)
        with open(f"{folder}/sound", "rb") as stream:
            return stream.read()


def mux_sound(file, track, samples):
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples[None]), "fltp", "mono")
    frame.sample_rate = 16000
    size = track.codec_context.frame_size or 1024
    fifo = av.AudioFifo()
    for part in av.AudioResampler(track.format, track.layout, track.rate).resample(frame):
        fifo.write(part)
    while part := fifo.read(size) or fifo.read(size, partial=True):
        file.mux(track.encode(part))
    file.mux(track.encode(None))


# ---- the configuration


def test_the_defaults_are_the_references():
    assert (CONFIG.fps, CONFIG.max_frames, CONFIG.video_max_pixels) == (2.0, 64, 768 * 28 * 28)
    assert MediaConfig(
        fps=1, max_frames=np.int64(2), image_max_pixels=None
    )  # whole numbers do for floats


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[("fps", value) for value in (0, -1.0, float("nan"), float("inf"), "2", None, True)],
        *[("max_frames", value) for value in (1, 0, 2.5, None)],
        *[("image_min_pixels", value) for value in (0, -1, 1.5, "a")],
        *[("video_max_pixels", value) for value in (0, True)],
        *[
            ("max_audio_seconds", 0),
            ("max_image_pixels", None),
            ("max_file_bytes", 0),
            ("decode_seconds", -1),
        ],
        *[("allow_remote", 1), ("use_audio_in_video", "yes")],
    ],
)
def test_a_value_that_makes_no_sense_is_named(field, value):
    with pytest.raises(LcoError, match=rf"^media\.{field} is .*it must be "):
        MediaConfig(**{field: value})


def test_a_minimum_above_its_maximum_is_named():
    with pytest.raises(LcoError, match="image_min_pixels is 9"):
        MediaConfig(image_min_pixels=9, image_max_pixels=8)


# ---- where bytes come from


def test_every_way_to_give_a_file(tmp_path, monkeypatch):
    content = image_bytes(Image.fromarray(RGB), "PNG")
    path = tmp_path / "a cat%20.png"
    path.write_bytes(content)
    monkeypatch.setenv("HOME", str(tmp_path))
    encoded = base64.b64encode(content).decode()
    sources = [
        path,
        str(path),
        f"file://{path}",
        f"file://localhost{path}",
        path.as_uri(),
        "~/a cat%20.png",
        content,
        bytearray(content),
        f"data:image/png;base64,{encoded}",
        f"DATA:;base64,{encoded[:50]}\n{encoded[50:]}",
        "data:image/png," + "".join(f"%{byte:02x}" for byte in content),
        resolve(path, "image", "elsewhere", CONFIG),
    ]
    for source in sources:
        np.testing.assert_array_equal(np.asarray(load_image(source, "input 3", CONFIG)), RGB)


@pytest.mark.parametrize("load", [load_image, load_audio, load_video])
def test_what_cannot_be_read_is_named(tmp_path, load):
    (tmp_path / "empty").touch()
    (tmp_path / "big").write_bytes(bytes(11))
    os.mkfifo(tmp_path / "pipe")
    refused(load, tmp_path / "none.png", "none.png does not exist")
    refused(load, f"file://{tmp_path}/none.png", "none.png does not exist")
    refused(load, str(tmp_path / "empty" / "x"), "cannot be read: Not a directory")
    refused(load, tmp_path, "is a folder")
    refused(load, tmp_path / "empty", "is empty")
    refused(load, tmp_path / "pipe", "is a pipe or a device")
    refused(load, "/dev/zero", "/dev/zero is a pipe or a device")
    refused(
        load,
        tmp_path / "big",
        "11 bytes",
        "max_file_bytes is 10",
        config=MediaConfig(max_file_bytes=10),
    )
    refused(load, bytes(11), "max_file_bytes is 10", config=MediaConfig(max_file_bytes=10))
    refused(
        load, "data:,0123456789a", "max_file_bytes is 10", config=MediaConfig(max_file_bytes=10)
    )
    refused(load, "a\0b", "cannot be read", r"'a\x00b'")
    refused(load, "a\nb\udc80", r"'a\nb\udc80'")
    refused(load, "~nobody-of-that-name/x", "cannot be read")
    refused(load, "x" * 5000, "…")
    refused(load, "", "is a folder")  # as a path, it is the current one
    refused(load, b"", "0 bytes is empty")
    refused(load, "data:,", "is empty")
    refused(load, "data:image/png;base64", "has no comma")
    refused(load, "data:;base64,a&b=", "not valid base64")
    refused(load, "s3://bucket/cat.png", "s3://bucket/cat.png cannot be fetched; give")
    refused(
        load, "https://a.b/cat.png?key=secret", "https://a.b/cat.png is remote", "set allow_remote"
    )
    refused(load, b"no media in here" * 99, "1584 bytes")
    refused(load, 3, "cannot be a int; give")
    refused(load, None, "NoneType")


def test_a_file_that_may_not_be_read_is_named(tmp_path, monkeypatch):
    def denied(*_):
        raise PermissionError(13, "Permission denied")

    path = tmp_path / "cat.png"
    path.write_bytes(b"x")
    monkeypatch.setattr(type(path), "open", denied)  # the tests may run as root, whom no mode stops
    refused(load_image, path, "cat.png cannot be read: Permission denied")


class Server(BaseHTTPRequestHandler):
    """Answers by path."""

    content = image_bytes(Image.fromarray(RGB), "PNG")

    def do_GET(self):
        if self.path.startswith("/to"):
            self.send_response(302)
            self.send_header(
                "Location",
                {"/to-cat": "/cat", "/to-ftp": "ftp://a/b", "/to-file": "file:///etc/passwd"}[
                    self.path
                ],
            )
            self.end_headers()
            return
        self.send_response(404 if self.path == "/none" else 200)
        if self.path in ("/cat", "/short", "/none"):
            self.send_header("Content-Length", str(len(self.content) + (self.path == "/short")))
        self.end_headers()
        if self.path == "/slow":
            for _ in range(40):
                self.wfile.write(b"x")
                time.sleep(0.05)
        self.wfile.write(self.content)

    def log_message(self, *_):
        pass


def test_urls(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    server = HTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base, config = f"http://127.0.0.1:{server.server_port}", MediaConfig(allow_remote=True)
    try:
        for path in ("/cat", "/cat?a=b", "/to-cat", "/unsized"):
            np.testing.assert_array_equal(
                np.asarray(load_image(base + path, "input 3", config)), RGB
            )
        refused(load_image, base + "/none", "/none cannot be fetched", "404", config=config)
        refused(load_image, base + "/short", "of 2", "the server sent", config=config)
        refused(load_image, base + "/to-ftp", "cannot be fetched", config=config)
        refused(load_image, base + "/to-file", "cannot be fetched", config=config)
        small = MediaConfig(allow_remote=True, max_file_bytes=99)
        refused(load_image, base + "/cat", "max_file_bytes", config=small)
        refused(load_image, base + "/unsized", "max_file_bytes", config=small)
        hasty = MediaConfig(allow_remote=True, decode_seconds=0.2)
        refused(load_image, base + "/slow", "more than 0.2 seconds", config=hasty)
        refused(load_image, "http://127.0.0.1:1/x", "cannot be fetched", config=config)
        refused(load_image, "http://[broken/x", "cannot be fetched", config=config)
        refused(load_image, "http://", "cannot be fetched", config=config)
        refused(load_image, "http://a b/\n", "cannot be fetched", config=config)
    finally:
        server.shutdown()
        server.server_close()


# ---- images


@pytest.mark.parametrize(
    "kind", ["PNG", "BMP", "TIFF", "PPM", "TGA", "PCX", "WEBP", "GIF", "JPEG", "JPEG2000", "AVIF"]
)
def test_image_formats(tmp_path, kind):
    grid = np.repeat(
        np.repeat(RGB[::8, ::8], 8, 0), 8, 1
    )  # of 12 colours, so that GIF keeps it as well
    path = tmp_path / "cat.png"  # names do not matter
    options = {"WEBP": {"lossless": True}, "JPEG": {"quality": 95, "subsampling": 0}}
    path.write_bytes(image_bytes(Image.fromarray(grid), kind, **options.get(kind, {})))
    image = load_image(path, "input 3", CONFIG)
    assert (image.mode, image.size) == ("RGB", (32, 24))
    assert abs(np.asarray(image, int) - grid).max() <= {"JPEG": 12, "AVIF": 99}.get(
        kind, 0
    )  # and colours bleed


def test_modes_become_rgb():
    grey, alpha = RGB[:, :, 0], RGB[:, :, 1]
    pixels = {}
    for name, image in {
        "L": Image.fromarray(grey),
        "LA": Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)]),
        "RGBA": Image.fromarray(np.dstack([RGB, alpha])),
        "I;16": Image.fromarray(grey.astype(np.uint16) * 257),
        "I": Image.fromarray(grey.astype(np.int32)),
        "F": Image.fromarray(grey.astype(np.float32)),
        "1": Image.fromarray(grey > 127),
        "CMYK": Image.fromarray(RGB).convert("CMYK"),
        "YCbCr": Image.fromarray(RGB).convert("YCbCr"),
        "HSV": Image.fromarray(RGB).convert("HSV"),
        "P": Image.fromarray(RGB).quantize(16),
    }.items():
        assert image.mode == name
        loaded = load_image(image, "input 3", CONFIG)
        assert loaded.mode == "RGB"
        assert loaded is not image
        pixels[name] = np.asarray(loaded, int)
    for name in ("L", "I;16", "I", "F"):
        np.testing.assert_array_equal(pixels[name], grey[..., None].repeat(3, 2))
    np.testing.assert_array_equal(pixels["1"], (grey > 127)[..., None].repeat(3, 2) * 255)
    np.testing.assert_array_equal(pixels["CMYK"], RGB)
    weight = alpha[..., None] / 255
    assert abs(pixels["RGBA"] - (RGB * weight + 255 * (1 - weight))).max() <= 1
    assert abs(pixels["LA"] - (grey[..., None] * weight + 255 * (1 - weight))).max() <= 1


def test_transparency_lies_over_white():
    """As in the reference's to_rgb, of a file, and however a format stores transparency."""
    image = Image.fromarray(np.dstack([RGB, np.where(RGB[..., 0] > 99, 255, 0).astype(np.uint8)]))
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.split()[3])
    loaded = load_image(image_bytes(image, "PNG"), "input 3", CONFIG)
    np.testing.assert_array_equal(np.asarray(loaded), np.asarray(white))
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([10, 20, 30, 40, 50, 60])
    palette.paste(0, (0, 0, 4, 8))
    for kind in ("PNG", "GIF"):
        pixels = np.asarray(
            load_image(image_bytes(palette, kind, transparency=0), "input 3", CONFIG)
        )
        assert (pixels[:, :4] == 255).all()
        assert (pixels[:, 4:] == [40, 50, 60]).all()


@pytest.mark.parametrize("orientation", range(10))
def test_images_are_upright(tmp_path, orientation):
    """As `ImageOps.exif_transpose` makes them; 0 and 9 mean nothing."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.fromarray(RGB)
    stored.info["exif"] = exif.tobytes()
    upright = np.asarray(ImageOps.exif_transpose(stored))
    raw = MediaConfig(upright=False)
    for kind in ("PNG", "WEBP", "TIFF"):
        content = image_bytes(Image.fromarray(RGB), kind, exif=exif, lossless=True)
        path = tmp_path / "phone"
        path.write_bytes(content)
        uri = f"data:image/{kind.lower()};base64,{base64.b64encode(content).decode()}"
        loaded = Image.open(path)
        loaded.load()
        for source in (
            content,
            path,
            uri,
            Image.open(path),
            loaded,
            Image.open(io.BytesIO(content)),
        ):
            np.testing.assert_array_equal(load_pixels(source, "input 3", CONFIG), upright)
        if kind != "TIFF":  # which Pillow itself turns
            for source in (content, Image.open(path), loaded):
                np.testing.assert_array_equal(load_pixels(source, "input 3", raw), RGB)
    frames = load_video([stored, stored], "input 3", CONFIG).frames
    np.testing.assert_array_equal(frames, np.stack([upright, upright]))


def test_the_caps_on_size_see_the_upright_image():
    exif = Image.Exif()
    exif[0x0112] = 6
    content = image_bytes(Image.fromarray(RGB), "JPEG", exif=exif, quality=95)
    asked = []

    def size_rule(*size):
        asked.append(size)
        return 16, 12

    config = MediaConfig(image_max_side=16)
    pixels = load_pixels(content, "input 3", config, size_rule)
    assert (asked, pixels.shape) == ([(16, 12)], (16, 12, 3))
    wanted = ImageOps.exif_transpose(Image.open(io.BytesIO(content)))
    wanted.thumbnail((16, 16))
    np.testing.assert_array_equal(pixels, np.asarray(wanted))


def test_a_torn_orientation_asks_for_nothing():
    content = image_bytes(Image.fromarray(RGB), "PNG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09")
    np.testing.assert_array_equal(load_pixels(content, "input 3", CONFIG), RGB)


def test_animations_give_their_first_frame():
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (255, 0, 128)]
    for kind in ("GIF", "WEBP", "PNG", "TIFF"):
        content = image_bytes(
            frames[0], kind, save_all=True, append_images=frames[1:], lossless=True
        )
        assert load_image(content, "input 3", CONFIG).getpixel((3, 3)) == (255, 0, 0)


@pytest.mark.parametrize(
    ("array", "pixels"),
    [
        (RGB, RGB),
        (RGB.transpose(2, 0, 1), RGB),
        (RGB[::-1, ::2], RGB[::-1, ::2]),
        (RGB[:, :, 0], RGB[:, :, :1].repeat(3, 2)),
        (RGB[:, :, :1], RGB[:, :, :1].repeat(3, 2)),
        (RGB[None, :, :, 0], RGB[:, :, :1].repeat(3, 2)),
        (np.dstack([RGB, np.full((24, 32), 255, np.uint8)]), RGB),
        (np.dstack([RGB, np.zeros((24, 32), np.uint8)]), np.full_like(RGB, 255)),
        (RGB[:3, :4], RGB[:3, :4]),  # the last axis can be channels, so it is
        (RGB / np.float32(255), RGB),
        (RGB / 255.0, RGB),
        (np.eye(8, dtype=np.float16), np.eye(8, dtype=np.uint8)[..., None].repeat(3, 2) * 255),
        (np.array([[0.0, 1.0]]), np.array([[[0] * 3, [255] * 3]])),
    ],
)
def test_image_arrays(array, pixels):
    np.testing.assert_array_equal(np.asarray(load_image(array, "input 3", CONFIG)), pixels)


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (RGB[:, :, :2], "shape (24, 32, 2) is in no known layout; give height x width, or"),
        (RGB[None], "(1, 24, 32, 3) is in no known layout"),
        (RGB[0, 0], "(3,) is in no known layout"),
        (np.array(3, np.uint8), "() is in no known layout"),
        (RGB[:0], "32 x 0 and has no pixels"),
        (RGB.astype(int), "holds int64; give uint8, or floats in [0, 1]"),
        (RGB > 3, "holds bool"),
        (RGB.astype(complex), "holds complex128"),
        (RGB.astype(object), "holds object"),
        (RGB.astype(np.float32), "holds float32 from 0 to 255; floats must be in [0, 1]"),
        (RGB / 255.0 - 0.1, "from -0.1 to 0.9"),
        (np.full((8, 8), np.nan), "holds NaN or infinity"),
        (np.full((8, 8), np.inf), "holds NaN or infinity"),
        (
            np.zeros((1, 201), np.uint8),
            "the absolute aspect ratio must be smaller than 200, and is 201.0",
        ),
        (Image.new("RGB", (0, 5)), "0 x 5 and has no pixels"),
        (
            Image.new("L", (2, 402)),
            "PIL image is 2 x 402: the absolute aspect ratio must be smaller than 200",
        ),
        (Image.fromarray(np.full((8, 8), 256, np.int32)), "32-bit pixels (mode I) beyond 0 to 255"),
        (Image.fromarray(np.full((8, 8), np.nan, np.float32)), "32-bit pixels (mode F)"),
        ({"image": 3}, "image cannot be a dict; give"),
        ([1, 2], "cannot be a list"),
    ],
)
def test_images_that_are_refused(array, words):
    refused(load_image, array, words)


def test_big_images_are_refused_by_their_header_and_pillows_own_limit_is_out_of_it(monkeypatch):
    image = Image.fromarray(RGB)
    content = image_bytes(image, "PNG")
    at_limit, below = MediaConfig(max_image_pixels=768), MediaConfig(max_image_pixels=767)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source in (content, image, RGB):
            assert load_image(source, "input 3", at_limit).size == (32, 24)
    monkeypatch.setattr(ImageFile.ImageFile, "load", lambda _: pytest.fail("decoded"))
    for source in (content, image, RGB):
        refused(load_image, source, "32 x 24 pixels, and max_image_pixels is 767", config=below)
    bomb = bytearray(content)
    bomb[16:24] = (60000).to_bytes(4, "big") * 2
    bomb[29:33] = zlib.crc32(bomb[12:29]).to_bytes(4, "big")
    assert "60000 x 60000" in refused(load_image, bytes(bomb), "max_image_pixels is 200000000")
    assert Image.MAX_IMAGE_PIXELS == 10


@pytest.mark.parametrize(
    "kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF", "TGA"]
)
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_an_image_is_never_loaded_in_part(kind, part):
    content = image_bytes(Image.fromarray(RGB).resize((64, 64)), kind)
    refused(load_image, content[: int(len(content) * part)], "image of ")


def test_images_hold_no_file_and_start_no_program(tmp_path):
    path = tmp_path / "cat.gif"
    frames = [Image.new("RGB", (8, 8), (shade, 0, 0)) for shade in (255, 0)]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        image = load_image(path, "input 3", CONFIG)
        assert str(path) not in map(
            os.path.realpath, (f"/proc/self/fd/{n}" for n in os.listdir("/proc/self/fd"))
        )
    assert image.getpixel((0, 0)) == (255, 0, 0)
    refused(
        load_image,
        image_bytes(Image.fromarray(RGB), "EPS"),
        "no format that is read here (PNG, JPEG",
    )


# ---- sound


@pytest.mark.parametrize(
    ("kind", "subtype", "error"),
    [
        ("WAV", "PCM_16", 1e-4),
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "FLOAT", 0),
        ("FLAC", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("OGG", "VORBIS", 0.05),
        ("MP3", "MPEG_LAYER_III", 0.05),
    ],
)
def test_sound_formats(tmp_path, kind, subtype, error):
    path = tmp_path / "sound.raw"  # names do not matter
    path.write_bytes(sound_bytes(TONE, kind, subtype=subtype))
    samples = load_audio(path, "input 3", CONFIG)
    assert (samples.dtype, samples.ndim) == (np.float32, 1)
    np.testing.assert_allclose(samples[:16000], TONE, atol=error)


@pytest.mark.parametrize(
    ("kind", "subtype"), [("MP3", None), ("OGG", "VORBIS"), ("OGG", "OPUS"), ("FLAC", None)]
)
def test_blocks_join_without_a_seam(tmp_path, kind, subtype):
    """The reference uses soundfile.read, which would lose samples of MP3 between blocks."""
    path = tmp_path / "sound"
    path.write_bytes(sound_bytes(np.resize(TONE, 16000 * 35), kind, subtype=subtype))
    for source in (path, path.read_bytes()):
        samples = load_audio(source, "input 3", CONFIG)
        np.testing.assert_allclose(samples, soundfile.read(path, dtype="float32")[0], atol=1e-6)


@pytest.mark.parametrize(
    ("codec", "container", "rate", "error"),
    [
        ("aac", "mp4", 16000, 0.05),
        ("aac", "adts", 16000, 0.05),
        ("flac", "matroska", 16000, 1e-4),
        ("libopus", "webm", 48000, 0.05),
        ("pcm_s16le", "mov", 16000, 1e-4),
    ],
)
def test_sound_that_libsndfile_does_not_know(codec, container, rate, error):
    content = sound_track(codec, container, TONE, rate)
    with pytest.raises(soundfile.SoundFileError):
        soundfile.SoundFile(io.BytesIO(content))
    samples = load_audio(content, "input 3", CONFIG)
    assert samples.dtype == np.float32
    assert (
        abs(len(samples) - 16000) < 3000
    )  # encoders fill up to whole frames, and some put one before
    assert (
        min(
            np.abs(samples[lag:][:13000] - TONE[:13000]).max()
            for lag in range(len(samples) - 13000)
        )
        < error
    )


def test_sound_of_more_channels_than_eight():
    """PyAV crashes on as many planes; libsndfile does not read this container."""
    channels = TONE * np.linspace(0, 1, 16, dtype=np.float32)[:, None]
    packed = np.ascontiguousarray(channels.T).reshape(1, -1)
    frame = av.AudioFrame.from_ndarray(packed, "flt", "hexadecagonal")
    frame.sample_rate = 16000
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as file:
        track = file.add_stream("pcm_f32le", rate=16000, layout="hexadecagonal")
        file.mux(track.encode(frame))
        file.mux(track.encode(None))
    samples = load_audio(stream.getvalue(), "input 3", CONFIG)
    np.testing.assert_allclose(samples, channels.mean(axis=0), atol=1e-6)


def test_sound_is_averaged_and_resampled_as_the_reference_does():
    left, right = TONE, TONE[::-1]
    for rate in (8000, 11025, 22050, 44100, 48000):
        both = np.stack([left, right], 1)
        samples = load_audio(sound_bytes(both, "WAV", rate, subtype="FLOAT"), "input 3", CONFIG)
        wanted = soxr.resample((left + right) / 2, rate, 16000, quality="HQ")
        length = int(np.ceil(16000 * (16000 / rate)))  # librosa's
        assert len(samples) == length
        np.testing.assert_allclose(samples[: len(wanted)], wanted[:length], atol=1e-6)
        for source in (
            {"array": both, "sampling_rate": rate},
            {"array": both.T, "sample_rate": rate},
            (both, float(rate)),
        ):
            np.testing.assert_allclose(load_audio(source, "input 3", CONFIG), samples, atol=1e-6)


@pytest.mark.parametrize(
    ("array", "samples"),
    [
        (TONE, TONE),
        (TONE.astype(np.float64) * 30, TONE * 30),
        (np.zeros(16000), np.zeros(16000)),  # silence is a sound
        ((TONE * 32768).astype(np.int16), np.trunc(TONE * 32768) / 32768),
        (np.full(400, -(2**31), np.int32), np.full(400, -1)),
        (np.full(400, 255, np.uint8), np.full(400, 127 / 128)),
        (np.full((400, 2), [0, 256], np.int16), np.full(400, 128 / 32768)),
        (np.full((8, 400), 0.5), np.full(400, 0.5)),
        (TONE[:, None], TONE),
        (TONE[None], TONE),
    ],
)
def test_sound_arrays(array, samples):
    loaded = load_audio({"array": array, "sampling_rate": 16000, "path": None}, "input 3", CONFIG)
    assert loaded.dtype == np.float32
    np.testing.assert_allclose(loaded, samples, atol=1e-6)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (
            TONE,
            "audio cannot be a ndarray; give a path, bytes, a data: URI, a URL or "
            '{"array": numpy array, "sampling_rate": Hz}',
        ),
        ({"array": TONE}, 'has no "sampling_rate"'),
        ({"sampling_rate": 16000}, "audio array is a NoneType"),
        (
            {"array": ["loud"] * 999, "sampling_rate": 16000},
            "audio array is no list of numbers",
        ),
        ({"array": TONE, "sampling_rate": 16000, "offset": 3}, "unknown key 'offset'"),
        ((TONE, 16000, 3), "cannot be a tuple"),
        *[
            ((TONE, rate), "has a sampling rate of")
            for rate in (0, -1, 1e-9, 768001, np.nan, np.inf, "16000", True)
        ],
        ((TONE[:0], 16000), "is empty"),
        ((TONE.reshape(100, 160), 16000), "(100, 160) is in no known layout; give [samples]"),
        (
            (TONE.reshape(9, -1)[:, :1000] if len(TONE) % 9 == 0 else np.zeros((9, 1000)), 16000),
            "at most 8 channels",
        ),
        ((np.zeros((4, 4)), 16000), "(4, 4) is in no known layout"),
        ((np.zeros((2, 0)), 16000), "is empty"),
        ((np.zeros((1, 2, 400)), 16000), "must have one axis"),
        (
            (TONE.astype(np.int64), 16000),
            "holds int64, whose full scale is not known; give floats of full scale 1",
        ),
        ((TONE > 0, 16000), "holds bool"),
        (
            (TONE.astype(complex), 16000),
            "holds complex64" if TONE.astype(np.complex64) is None else "holds complex128",
        ),
        ((np.where(np.arange(999) == 7, np.nan, 0), 16000), "holds NaN or infinity"),
        ((np.where(np.arange(999) == 7, np.inf, 0), 16000), "holds NaN or infinity"),
        ((np.full(999, 1e300), 16000), "holds NaN or infinity"),
        ((np.full((999, 2), [np.inf, -np.inf]), 16000), "holds NaN or infinity"),
        ((np.full(999, 1e30), 16000), "has samples of up to 1e+30"),
        (
            (TONE[:320], 16000),
            "is too short: 320 samples at 16 kHz (0.0200 seconds), and the model needs 321",
        ),
        ((TONE[:1], 16000), "is too short: 1 samples"),
        ((TONE[:640], 48000), "is too short: 214 samples"),
        (sound_bytes(TONE[:0], "WAV"), "is empty"),
        (
            sound_bytes(np.where(np.arange(999) == 7, np.nan, 0), "WAV", subtype="FLOAT"),
            "holds NaN or infinity",
        ),
        (image_bytes(Image.fromarray(RGB), "PNG"), "has no sound track"),
    ],
)
def test_sound_that_is_refused(source, words):
    refused(load_audio, source, words)


def test_the_shortest_sound_makes_one_token():
    assert MIN_SAMPLES == 321
    assert audio_tokens(MIN_SAMPLES) == 1
    assert max(audio_tokens(samples) for samples in range(1, MIN_SAMPLES)) < 1
    assert audio_tokens(16000 * 30) == 750  # the model's 25 tokens a second
    assert len(load_audio((TONE[:MIN_SAMPLES], 16000), "input 3", CONFIG)) == MIN_SAMPLES


def test_long_sound_is_cut_with_a_warning_and_not_read_beyond(caplog, monkeypatch):
    config = MediaConfig(max_audio_seconds=2)
    long = np.resize(TONE, 16000 * 60)
    for source in (
        (long, 16000),
        sound_bytes(long, "FLAC"),
        film("mpeg4", "avi", 60, rate=1, sound="pcm_s16le", seconds=60),
    ):
        caplog.clear()
        samples = load_audio(source, "input 3", config)
        assert len(samples) == 32000
        np.testing.assert_allclose(samples, np.resize(TONE, 32000), atol=1e-4)
        (record,) = caplog.records
        assert record.message.startswith("input 3: audio ")
        assert "cut from 60.0 to 2.0 seconds (max_audio_seconds)" in record.message
    caplog.clear()
    assert len(load_audio((long[:32000], 16000), "input 3", config)) == 32000
    assert not caplog.records

    taken = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(
        soundfile.SoundFile, "read", lambda *a, **k: taken.append(len(b := read(*a, **k))) or b
    )
    decode_audio(MediaFile("x", sound_bytes(long, "WAV")), config)
    assert 16000 * 2 < sum(taken) < 16000 * 12
    refused(
        load_audio,
        sound_bytes(long, "WAV"),
        "decode_seconds",
        config=MediaConfig(decode_seconds=1e-9),
    )


# ---- video


def test_sampling_is_the_references():
    """Rounded as torch rounds: float64 would give another index for one pair of lengths in 100."""
    for total in [*range(2, 300), 1800, 12345, 107892]:
        for count in {2, 4, 6, 10, 30, 62, 64, total} & set(range(total + 1)):
            indices = sampled_indices(total, count)
            np.testing.assert_array_equal(
                indices, torch.linspace(0, total - 1, count).round().long().numpy()
            )
            assert all(a < b for a, b in pairwise(indices))


FILMS = [
    ("mpeg4", "mp4", "yuv420p"),
    ("libx264", "mp4", "yuv420p"),
    ("mpeg4", "avi", "yuv420p"),
    ("libx264", "mpegts", "yuv420p"),
    ("libvpx", "webm", "yuv420p"),
    ("libvpx-vp9", "webm", "yuv420p"),
    ("ffv1", "matroska", "bgr0"),
    ("mjpeg", "mov", "yuvj420p"),
    ("gif", "gif", "rgb8"),
]


@pytest.mark.parametrize(("codec", "container", "pixels"), FILMS)
def test_video_formats(tmp_path, codec, container, pixels):
    path = tmp_path / "film"
    path.write_bytes(film(codec, container, pixels=pixels))
    for source in (path, path.read_bytes()):
        video = load_video(source, "input 3", CONFIG)
        assert (video.frames.dtype, video.frames.shape) == (np.uint8, (6, 32, 48, 3))
        assert (video.fps, video.audio) == (None, None)
        assert numbers(video.frames) == [0, 6, 12, 17, 23, 29]
    if codec == "ffv1":  # lossless: exactly those pixels
        assert set(video.frames[2].ravel()) == {shade(12)}


@pytest.mark.parametrize(
    ("count", "rate", "config", "kept"),
    [
        (1, 10, CONFIG, [0]),
        (2, 10, CONFIG, [0, 1]),
        (3, 10, CONFIG, [0, 2]),
        (5, 10, CONFIG, [0, 1, 3, 4]),  # 1 wanted, 4 at least
        (35, 10, CONFIG, [0, 7, 14, 20, 27, 34]),  # 7 wanted, made even
        (20, 1, CONFIG, list(range(20))),  # never more than there are
        (21, 1, CONFIG, [int(x) for x in np.rint(np.linspace(0, 20, 20, dtype=np.float32))]),
        (50, 10, MediaConfig(max_frames=5), [0, 16, 33, 49]),
        (50, 10, MediaConfig(max_frames=2), [0, 49]),
        (50, 10, MediaConfig(fps=0.01), [0, 16, 33, 49]),
        (50, 10, MediaConfig(fps=1e9, max_frames=6), [0, 10, 20, 29, 39, 49]),
    ],
)
def test_how_many_frames_are_taken(count, rate, config, kept):
    video = load_video(
        film("ffv1", "matroska", count=count, rate=rate, pixels="bgr0"), "input 3", config
    )
    assert numbers(video.frames) == kept


def test_frames_are_resized_one_by_one():
    asked = []

    def size_rule(*size_and_count):
        asked.append(size_and_count)
        return 28, 56

    content = film("ffv1", "matroska", pixels="bgr0")
    frames = load_video(content, "input 3", CONFIG, size_rule).frames
    assert (asked, frames.shape, numbers(frames)) == (
        [(32, 48, 6)],
        (6, 28, 56, 3),
        [0, 6, 12, 17, 23, 29],
    )
    noise = RNG.integers(0, 256, (5, 24, 32, 3), np.uint8)
    wanted = np.stack(
        [Image.fromarray(frame).resize((56, 28), Image.Resampling.BICUBIC) for frame in noise]
    )
    for source in (noise, list(noise)):
        np.testing.assert_array_equal(
            load_video(source, "input 3", CONFIG, size_rule).frames, wanted
        )
    assert asked[1:] == [(24, 32, 5)] * 2


def test_a_torn_or_lying_file_gives_the_frames_that_exist():
    content = film("mpeg4", "mp4", count=30, options={"movflags": "faststart"}, size=(480, 320))
    cut = film("libvpx", "webm", count=30, size=(480, 320))
    with av.open(io.BytesIO(content)) as file:
        end = [packet.pos + packet.size for packet in file.demux(video=0) if packet.size]
    frames = load_video(content[: end[19]], "input 3", CONFIG).frames  # the header still has 30
    assert numbers(frames) == [0, 6, 13, 19]
    frames = load_video(cut[: int(len(cut) * 0.7)], "input 3", CONFIG).frames
    assert len(frames) in (2, 4)
    assert numbers(frames)[0] == 0
    avi = film("mpeg4", "avi", count=30)
    for claimed in (7, 3000, 2**31 - 1):
        lying = bytearray(avi)
        for place in (
            48,
            avi.index(b"strh") + 8 + 32,
        ):  # total frames of the file, length of the stream
            lying[place : place + 4] = claimed.to_bytes(4, "little")
        assert numbers(load_video(bytes(lying), "input 3", CONFIG).frames) == [0, 6, 12, 17, 23, 29]


def test_a_videos_own_sound():
    config = MediaConfig(use_audio_in_video=True)
    content = film("mpeg4", "mp4", sound="aac")
    video = load_video(content, "input 3", config)
    assert video.audio.dtype == np.float32
    assert abs(len(video.audio) - 48000) < 2048
    assert np.abs(video.audio).max() > 0.3
    np.testing.assert_array_equal(video.audio, load_audio(content, "input 3", CONFIG))
    assert load_video(content, "input 3", CONFIG).audio is None
    assert (
        len(
            load_video(
                content, "input 3", MediaConfig(use_audio_in_video=True, max_audio_seconds=1)
            ).audio
        )
        == 16000
    )
    refused(load_video, sound_bytes(TONE, "WAV"), "has no video stream")


CLIP = np.stack([np.full((8, 12, 3), shade(i), np.uint8) for i in range(60)])


@pytest.mark.parametrize(
    ("source", "kept", "fps"),
    [
        (CLIP[:7], list(range(7)), None),
        ({"array": CLIP[:7]}, list(range(7)), None),
        ({"array": CLIP[:7], "fps": None}, list(range(7)), None),
        ({"array": CLIP[:7], "fps": 2}, list(range(7)), 2),
        ({"array": CLIP[:7], "fps": 0.5}, list(range(7)), 0.5),
        ({"array": CLIP[:30], "fps": 10}, [0, 6, 12, 17, 23, 29], 2),
        ({"array": CLIP[:35], "fps": 10.0}, [0, 7, 14, 20, 27, 34], 6 * 10 / 35),
        ({"array": CLIP[:1], "fps": 10}, [0], 10),
        ({"array": CLIP[:3], "fps": 3}, [0, 2], 2),
        (CLIP[:7, :, :, 0], list(range(7)), None),
        (CLIP[:7, :, :, :1], list(range(7)), None),
        (
            np.concatenate([CLIP[:7], np.full((7, 8, 12, 1), 255, np.uint8)], 3),
            list(range(7)),
            None,
        ),
        (CLIP[:7].transpose(0, 3, 1, 2), list(range(7)), None),
        (CLIP[:7] / np.float32(255), list(range(7)), None),
        (list(CLIP[:7]), list(range(7)), None),
        (tuple(Image.fromarray(frame) for frame in CLIP[:7]), list(range(7)), None),
        ([image_bytes(Image.fromarray(frame), "PNG") for frame in CLIP[:3]], [0, 1, 2], None),
    ],
)
def test_video_arrays(source, kept, fps):
    video = load_video(source, "input 3", CONFIG)
    assert isinstance(video, Video)
    assert (numbers(video.frames), video.fps) == (kept, pytest.approx(fps))
    assert (video.frames.dtype, video.frames.shape[1:]) == (np.uint8, (8, 12, 3))


def test_long_arrays_and_lists_are_capped():
    config = MediaConfig(max_frames=5)
    spread = [0, 15, 30, 44, 59]
    assert numbers(load_video(CLIP, "input 3", config).frames) == spread
    missing = [
        frame if i in spread else "none.png" for i, frame in enumerate(CLIP)
    ]  # those are never opened
    assert numbers(load_video(missing, "input 3", config).frames) == spread
    video = load_video({"array": CLIP, "fps": 2}, "input 3", config)
    assert (numbers(video.frames), video.fps) == ([0, 20, 39, 59], pytest.approx(2 * 4 / 60))
    video = load_video({"array": CLIP, "audio": (TONE, 16000)}, "input 3", config)
    np.testing.assert_array_equal(video.audio, TONE)


@pytest.mark.parametrize(
    ("source", "words"),
    [
        (CLIP[:0], "(0, 8, 12, 3) has no frames"),
        ([], "is an empty list"),
        (CLIP[0], "(8, 12, 3) is in no known layout; give frames x height x width, or"),
        (CLIP[:, :, :, :2], "(60, 8, 12, 2) is in no known layout"),
        (CLIP[None], "no known layout"),
        (CLIP[:, :0], "frame 0: image array of shape (0, 12, 3) is 12 x 0 and has no pixels"),
        (CLIP.astype(int), "holds int64"),
        (np.full((4, 8, 8, 3), np.nan), "frame 0: image array of shape (8, 8, 3) holds NaN"),
        (CLIP.astype(np.float32), "floats must be in [0, 1]"),
        (np.zeros((4, 1, 201, 3), np.uint8), "aspect ratio"),
        ({"array": list(CLIP)}, "video array is a list; give a numpy array"),
        ({"frames": CLIP}, "unknown key 'frames'"),
        ({"array": CLIP, "audio": TONE}, "audio cannot be a ndarray"),
        *[
            ({"array": CLIP, "fps": fps}, "has an fps of")
            for fps in (0, -1, np.nan, np.inf, "2", True)
        ],
        (
            [CLIP[0], CLIP[0, :4]],
            "frame 1 is 12 x 4, and frame 0 is 12 x 8; the frames of a video must have one size",
        ),
        ([CLIP[0], "none.png"], "frame 1: image none.png does not exist"),
        ([[CLIP[0]]], "frame 0: image cannot be a list"),
        (
            film("mpeg4", "mp4", size=(804, 4)),
            "aspect ratio must be smaller than 200, and is 201.0",
        ),
        (film("mpeg4", "mp4")[:500], "cannot be decoded"),
        (film("mpeg4", "mp4", count=0), "video of "),
        (b"ffconcat version 1.0\nfile other.avi\n", "cannot be decoded"),
    ],
)
def test_videos_that_are_refused(source, words):
    refused(load_video, source, words)


def test_video_is_bounded_in_size_and_time():
    content = film("mpeg4", "mp4")
    refused(
        load_video,
        content,
        "48 x 32 pixels, and max_image_pixels",
        config=MediaConfig(max_image_pixels=999),
    )
    refused(load_video, CLIP, "max_image_pixels", config=MediaConfig(max_image_pixels=9))
    refused(
        load_video,
        content,
        "takes more than 1e-09 seconds (decode_seconds)",
        config=MediaConfig(decode_seconds=1e-9),
    )


@pytest.mark.parametrize("name", ["other.avi", "PATH"])
def test_a_video_reaches_no_other_file(tmp_path, monkeypatch, name):
    """FFmpeg opens the files in a playlist by default."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other.avi").write_bytes(film("mpeg4", "avi"))
    name = name.replace("PATH", str(tmp_path / "other.avi"))
    for text in (
        f"ffconcat version 1.0\nfile {name}\n",
        f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{name}\n#EXT-X-ENDLIST\n",
    ):
        (tmp_path / "list.m3u8").write_text(text)
        for load in (load_video, load_audio):
            refused(load, tmp_path / "list.m3u8", "cannot be decoded")


# ---- torn files


def torn_files(count):
    """(what loads it, torn bytes): valid files with bytes changed, parts cut or parts doubled."""
    picture = Image.fromarray(RGB).resize((48, 40), Image.Resampling.NEAREST)
    frames = [picture.rotate(angle) for angle in (0, 90, 180)]
    valid = [
        *[("image", image_bytes(picture, kind)) for kind in ("PNG", "JPEG", "WEBP")],
        ("image", image_bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])),
        *[("audio", sound_bytes(TONE[:6000], kind)) for kind in ("WAV", "FLAC", "OGG")],
        ("mp3", sound_bytes(TONE[:6000], "MP3")),
        ("audio", sound_bytes(TONE[:6000], "WAV", subtype="FLOAT")),
        ("clip", film("mpeg4", "mp4", 12, sound="aac")),
        ("clip", film("libx264", "mp4", 12, sound="aac", options={"movflags": "faststart"})),
        ("video", film("mpeg4", "avi", 12, sound="pcm_s16le")),
        ("video", film("mpeg4", "matroska", 12)),
    ]
    random = np.random.default_rng(7)
    for i in range(count):
        kind, content = valid[i % len(valid)]
        torn = np.frombuffer(content, np.uint8).copy()
        way = random.integers(4)
        span = min(len(torn), 200) if way == 1 else len(torn)  # headers are where the lies matter
        if way < 3:
            places = random.integers(0, span, random.integers(1, 1 + max(2, len(torn) // 200)))
            torn[places] = random.integers(0, 256, len(places))
        torn = torn.tobytes()
        if way >= 2:
            torn = torn[: random.integers(1, len(torn))] + torn[random.integers(len(torn)) :] * int(
                random.integers(2)
            )
        yield kind, torn


def load_torn(kind, content):
    """None if it loads to something valid, the sentence if it is refused; anything else fails."""
    config = MediaConfig(decode_seconds=5, use_audio_in_video=kind == "clip")
    try:
        if kind == "image":
            image = load_image(content, "input 3", config)
            assert image.mode == "RGB"
            assert min(np.asarray(image).shape) > 0
        elif kind in ("audio", "mp3"):
            samples = load_audio(content, "input 3", config)
            assert (samples.dtype, samples.ndim) == (np.float32, 1)
            assert np.isfinite(samples).all()
            assert len(samples) >= MIN_SAMPLES
        else:
            video = load_video(content, "input 3", config, lambda *_: (28, 28))
            assert video.frames.dtype == np.uint8
            assert video.frames.shape[1:] == (28, 28, 3)
            assert video.frames.shape[0] > 0
            assert video.audio is None or config.use_audio_in_video
            assert video.audio is None or np.isfinite(video.audio).all()
    except LcoError as error:
        return str(error)
    return None


def test_five_hundred_torn_files(capfd):
    loaded = refused_count = 0
    slowest = 0.0
    for kind, content in torn_files(500):
        start = time.monotonic()
        message = load_torn(kind, content)
        if message is None:
            loaded += 1
        else:
            refused_count += 1
            assert message.startswith("input 3: ")
            assert message.isprintable()
        slowest = max(slowest, time.monotonic() - start)
        printed = capfd.readouterr().err
        assert not printed or kind == "mp3", printed  # libmpg123 cannot be silenced
    assert loaded + refused_count == 500
    assert loaded > 50
    assert refused_count > 100
    assert slowest < 6


PCM = (9000 * np.sin(2 * np.pi * 440 * np.arange(16000) / 16000)).astype(np.int16)


@pytest.mark.parametrize("dtype", [">i2", "<i2", ">f4", ">f8", "float16"])
def test_sound_of_any_byte_order_is_the_same(dtype):
    scale = 1 if "i" in dtype else 32768
    array = (PCM / scale).astype(dtype)
    want = load_audio({"array": PCM, "sampling_rate": 16000}, "input 0", MediaConfig())
    got = load_audio({"array": array, "sampling_rate": 16000}, "input 0", MediaConfig())
    np.testing.assert_allclose(got, want, atol=1e-3 if dtype == "float16" else 1e-7)


@pytest.mark.parametrize(
    ("array", "rate", "says"),
    [
        (PCM.astype(np.float32), 16000, "9e+03, and 1 is full scale"),
        (PCM.astype(np.float64) / 100, 16000, "90, and 1 is full scale"),
        (PCM.astype(np.int32), 16000, "holds int32 within the range of int16"),
        (PCM.astype(np.int32) * 256, 16000, "holds int32 within the range of 24 bits"),
        (
            PCM.astype(np.int32) * 257,
            16000,
            "those of 24 bits as array / 2**23, and quiet ones that",
        ),
        (PCM.tolist(), 16000, "holds int64, whose full scale is not known"),
        ([[0.1, 0.2], [0.3]], 16000, "audio array is no list of numbers"),
        (PCM > 0, 16000, "holds bool"),
        (PCM, 16, "sampling rate of 16;"),
        (PCM, "16000", "sampling rate of '16000'"),
        (PCM, float("nan"), "sampling rate of nan"),
        (PCM, -16000, "sampling rate of -16000"),
    ],
)
def test_sound_of_another_scale_or_rate_is_refused(array, rate, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        load_audio({"array": array, "sampling_rate": rate}, "input 0", MediaConfig())


def test_sound_may_exceed_full_scale_a_little():
    array = PCM.astype(np.float32) / 9000 * 1.5
    got = load_audio({"array": array, "sampling_rate": 16000}, "input 0", MediaConfig())
    np.testing.assert_array_equal(got, array)


def test_a_silent_clip_is_taken_without_sound(tmp_path, caplog):
    path = tmp_path / "silent.mp4"
    frames = np.random.default_rng(0).integers(0, 255, (8, 64, 64, 3), np.uint8)
    with av.open(path, "w") as container:
        stream = container.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    video = load_video(path, "input 0", MediaConfig(use_audio_in_video=True))
    want = load_video(path, "input 0", MediaConfig())
    np.testing.assert_array_equal(video.frames, want.frames)
    assert video.audio is None
    assert "has no sound" in caplog.text


def test_heic_is_read_with_its_plugin(tmp_path):
    picture = Image.new("RGB", (64, 32), (200, 30, 40))
    path = tmp_path / "a.heic"
    pillow_heif.from_pillow(picture).save(path)
    got = np.asarray(load_image(path, "input 0", MediaConfig()))
    assert got.shape == (32, 64, 3)
    assert np.abs(got.astype(int) - (200, 30, 40)).max() < 8


@pytest.mark.parametrize("bits", [24, 32])
def test_int32_that_fills_its_range_is_scaled(bits):
    """Samples of 24 bits come in the upper ones, as soundfile, scipy and FFmpeg give them."""
    array = np.round(TONE.astype(np.float64) * 2 ** (bits - 1)).astype(np.int32)
    array <<= 32 - bits
    got = load_audio({"array": array, "sampling_rate": 16000}, "x", CONFIG)
    np.testing.assert_allclose(got, TONE, atol=1e-6)
    quiet = array // 2**9  # what the refusal says to pass
    with pytest.raises(LcoError, match=r"ones that fill 32 bits as array / 2\*\*31$"):
        load_audio({"array": quiet, "sampling_rate": 16000}, "x", CONFIG)
    got = load_audio({"array": quiet / 2**31, "sampling_rate": 16000}, "x", CONFIG)
    np.testing.assert_allclose(got, TONE / 2**9, atol=1e-8)
    silence = np.zeros(16000, np.int32)
    assert not load_audio({"array": silence, "sampling_rate": 16000}, "x", CONFIG).any()


class AudioDecoder:
    """As torchcodec's and datasets': it decodes when it is asked."""

    def __init__(self, data, sample_rate):
        self.data, self.sample_rate = data, sample_rate

    def get_all_samples(self):
        if self.data is None:
            raise RuntimeError("torn\nin many lines")
        return self

    def __getitem__(self, key):
        raise KeyError(key)


STEREO = np.stack([TONE, TONE / 2])
INT8 = np.round(TONE * 127).astype(np.int8)


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ({"array": TONE, "sample_rate": 16000}, TONE),
        ({"array": TONE, "sample_rate": 16000, "sampling_rate": None}, TONE),
        ({"array": TONE, "sample_rate": 16000, "sampling_rate": 16000.0}, TONE),
        ({"array": INT8, "sampling_rate": 16000}, INT8.astype(np.float32) / 128),
        ({"array": TONE.tolist(), "sampling_rate": 16000}, TONE),
        ({"array": STEREO.tolist(), "sampling_rate": 16000}, STEREO.mean(axis=0)),
        ((TONE.tolist(), 16000), TONE),
        (AudioDecoder(torch.from_numpy(STEREO), 16000), STEREO.mean(axis=0)),
        (AudioDecoder(torch.from_numpy(TONE[None]), 16000), TONE),
    ],
)
def test_other_spellings_of_sound(source, want):
    got = load_audio(source, "input 3", CONFIG)
    assert got.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_what_is_wrong_with_other_spellings_of_sound():
    two = {"array": TONE, "sample_rate": 16000, "sampling_rate": 8000}
    refused(load_audio, two, "audio has two rates, 8000 and 16000")
    refused(load_audio, AudioDecoder(None, 16000), "AudioDecoder cannot be decoded: torn")
    refused(load_audio, AudioDecoder(torch.from_numpy(TONE), 16), "a sampling rate of 16;")


def clip_bytes():
    stream = io.BytesIO()
    with av.open(stream, "w", format="mp4") as file:
        track = file.add_stream("mpeg4", rate=4)
        track.width = track.height = 32
        track.pix_fmt = "yuv420p"
        for shade in range(0, 240, 30):
            frame = np.full((32, 32, 3), shade, np.uint8)
            file.mux(track.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(track.encode())
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["image", "audio", "video"])
def test_open_files_are_media(tmp_path, kind):
    """Wherever they stand, which is where they are left; in several threads at once."""
    content, load = {
        "image": (image_bytes(Image.fromarray(RGB), "PNG"), load_pixels),
        "audio": (sound_bytes(TONE, "WAV"), load_audio),
        "video": (clip_bytes(), lambda *given: load_video(*given).frames),
    }[kind]
    path = tmp_path / "file"
    path.write_bytes(content)
    want = load(content, "x", CONFIG)
    with path.open("rb") as file, path.open("r", encoding="latin-1") as text:
        for source in (io.BytesIO(content), file, io.BufferedReader(io.BytesIO(content))):
            source.seek(7)
            with ThreadPoolExecutor(4) as pool:
                for got in pool.map(lambda _, x=source: load(x, "x", CONFIG), range(4)):
                    np.testing.assert_array_equal(got, want)
            assert source.tell() == 7
        capped = MediaConfig(max_file_bytes=50)
        refused(load, file, f"{kind} {path} has 51 bytes or more", config=capped)
        refused(load, text, f'{kind} {path} is open as text; open it with "rb"')
    refused(load, file, f"{kind} {path} cannot be read: I/O operation on closed file")
    refused(load, io.StringIO("x"), f'{kind} in an open file is open as text; open it with "rb"')
    refused(load, io.BytesIO(), f"{kind} in an open file is empty")
