"""Anything that is an image -> upright pixels in RGB."""

import struct
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image

from lco_jax.core.errors import LcoError
from lco_jax.data.decoder import SizeRule, decode
from lco_jax.data.lazy import LazyImage, Opened, lazy_image
from lco_jax.data.media import MediaConfig, MediaFile, check_bytes, decoding, resolve

# those that Pillow decodes by itself; for EPS it would start another program
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB"),
    *("TIFF", "AVIF", "JPEG2000", "PPM", "PCX", "TGA"),
    "HEIF",  # with pillow_heif, which `decode_process.py` registers
)
# what Pillow's formats raise for a file of another format
NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
MAX_RATIO = 200  # of the longer side to the shorter; the Qwen processors' limit
CHANNELS = (1, 3, 4)
# an orientation as in EXIF -> what makes the picture upright
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
STRIP_BYTES = 1 << 24  # of a picture that is made opaque, at once
# Pillow decodes an image when it is first used, and two threads at once damage it.
_pillow_lock = threading.Lock()


def load_image(source: Any, where: str, config: MediaConfig) -> Image.Image:
    """An image in mode RGB, upright, independent of any file. It takes what `load_pixels` does."""
    return Image.fromarray(load_pixels(source, where, config))


def load_pixels(
    source: Any, where: str, config: MediaConfig, size_rule: SizeRule | None = None
) -> np.ndarray:
    """An image as uint8 [height, width, 3], upright.

    source: a path, bytes, a data: URI, a URL (see `media.resolve`), a PIL image, which may be
    opened and not decoded yet, a `LazyImage` of one, or a numpy array:
    uint8, or floats in [0, 1], of height x width (x 1, 3 or 4 channels). Channels may come first
    where no doubt is possible. where: how errors begin, for example "input 3". size_rule: the size
    that it is resized to (bicubic); None: the original one.

    Transparent pixels are blended with white, 16-bit greys keep their upper 8 bits, and an
    animation gives its first frame. The image is turned as its EXIF orientation asks, unless
    `config.upright` is False. Raises for anything else, and for torn files: no image is loaded in
    part. A PIL image stays as it is.
    """
    if isinstance(source, np.ndarray):
        label = f"{where}: image array of shape {source.shape}"
        return _finished(_from_array(source, label, config), config, size_rule)
    if isinstance(source, Image.Image):
        label = f"{where}: PIL image"
        check_size(source.width, source.height, label, config)
        with _pillow_lock:
            lazy = lazy_image(source, label, config.max_file_bytes + 1)
        if lazy is None:
            return _finished(_from_pil(source, label, config), config, size_rule)
        source = lazy
    if isinstance(source, LazyImage):
        file = replace(source, label=f"{where}: PIL image")
        check_bytes(len(source.content), file.label, config)
        return decode("image", file, config, size_rule, opened=asdict(source.opened))
    file = resolve(source, "image", where, config, ", a PIL image or a numpy array")
    return decode("image", file, config, size_rule)


def decode_image(
    file: MediaFile,
    config: MediaConfig,
    size_rule: SizeRule | None,
    opened: Opened | None = None,
) -> np.ndarray:
    """An image as in `load_pixels`, decoded in this process. opened: of a PIL image's file."""
    with file.open() as stream:
        image = _open(stream, file.label, [opened.format] if opened else FORMATS)
        check_size(*image.size, file.label, config)
        if opened:
            with decoding(file.label):
                opened.apply(image, file.label)
            check_size(*image.size, file.label, config)
        return _finished(_from_pil(image, file.label, config), config, size_rule)


def _from_pil(image: Image.Image, label: str, config: MediaConfig) -> Image.Image:
    """In mode RGB and upright. It may be the same image."""
    turn = None
    with decoding(label), _pillow_lock:
        image.load()
        if config.upright:
            turn = TURNS.get(_orientation(image))
    image = _to_rgb(image, label)
    return image if turn is None else image.transpose(turn)


def _orientation(image: Image.Image) -> Any:
    """As in EXIF, or None. A torn tag asks for nothing."""
    with suppress(Exception):  # Pillow's parser raises whatever the bytes lead to
        return image.getexif().get(ExifTags.Base.Orientation)
    return None


def _finished(image: Image.Image, config: MediaConfig, size_rule: SizeRule | None) -> np.ndarray:
    """The pixels of an image in RGB, in the size that the cap and the rule give."""
    side = config.image_max_side
    if side is not None and max(image.size) > side:
        image = image.copy()  # it may be the caller's
        image.thumbnail((side, side))
    if size_rule is not None:
        image = _resized(image, *size_rule(image.height, image.width))
    return np.asarray(image)


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [X, Y, 3] -> uint8 [height, width, 3], bicubic."""
    return np.asarray(_resized(Image.fromarray(picture), height, width))


def _resized(image: Image.Image, height: int, width: int) -> Image.Image:
    """It may be the same image."""
    if image.size == (width, height):
        return image
    return image.resize((width, height), Image.Resampling.BICUBIC)


def check_size(width: int, height: int, label: str, config: MediaConfig) -> None:
    """Raise for an image or a frame that has no pixels or too many, or that is a mere line."""
    if not width or not height:
        raise LcoError(f"{label} is {width} x {height} and has no pixels")
    if width * height > config.max_image_pixels:
        raise LcoError(
            f"{label} is {width} x {height} pixels, and max_image_pixels is "
            f"{config.max_image_pixels}"
        )
    ratio = max(width, height) / min(width, height)
    if ratio > MAX_RATIO:
        raise LcoError(
            f"{label} is {width} x {height}: the absolute aspect ratio must be smaller than "
            f"{MAX_RATIO}, and is {ratio:.1f}"
        )


def _open(stream: BinaryIO, label: str, formats: Sequence[str]) -> Image.Image:
    """The image with its header read and nothing decoded.

    `Image.open` would warn and refuse by a limit of Pillow's, which holds for the entire process.
    """
    Image.init()
    prefix = stream.read(16)
    for name in formats:
        factory, accepts = Image.OPEN.get(name, (None, None))  # a build of Pillow may lack a format
        with decoding(label), suppress(*NOT_THIS_FORMAT):
            # `accepts` returns a string where a build lacks the format's library
            if factory and (accepts is None or accepts(prefix) is True):
                stream.seek(0)
                return factory(stream, "")
    raise LcoError(f"{label} is torn, or in no format that is read here ({', '.join(formats)})")


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """In mode RGB. Pillow would clip 16 bits to 8, which whitens most pictures."""
    with decoding(label):
        if image.mode.startswith("I;16"):
            upper_bits = np.asarray(image) >> 8
            return Image.fromarray(upper_bits.astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            _check_levels(np.asarray(image), image.mode, label)
        if image.has_transparency_data:
            return _over_white(image)
        return image if image.mode == "RGB" else image.convert("RGB")


def _over_white(image: Image.Image) -> Image.Image:
    """An image without its transparency. Strip by strip: it is in memory twice, not four times."""
    result = Image.new("RGB", image.size, (255, 255, 255))
    bytes_per_row = 4 * image.width
    height = max(1, STRIP_BYTES // bytes_per_row)
    for top in range(0, image.height, height):
        box = (0, top, image.width, min(top + height, image.height))
        strip = image.crop(box).convert("RGBA")
        result.paste(strip, box, mask=strip.getchannel("A"))
    return result


def _check_levels(levels: np.ndarray, mode: str, label: str) -> None:
    if not (levels.min() >= 0 and levels.max() <= 255):  # so that NaN is refused, too
        raise LcoError(
            f"{label} has 32-bit pixels (mode {mode}) beyond 0 to 255; scale it to 8 bits"
        )


def _from_array(array: np.ndarray, label: str, config: MediaConfig) -> Image.Image:
    if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.ndim != 2 and not (array.ndim == 3 and array.shape[2] in CHANNELS):
        raise LcoError(
            f"{label} is in no known layout; give height x width, or height x width x 1, 3 or 4 "
            "channels"
        )
    height, width = array.shape[:2]
    check_size(width, height, label, config)
    pixels = np.ascontiguousarray(_as_uint8(array, label))
    return _to_rgb(Image.fromarray(pixels), label)


def _as_uint8(array: np.ndarray, label: str) -> np.ndarray:
    """Levels from 0 to 255. Floats in [0, 1] are multiplied by 255 and rounded."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise LcoError(f"{label} holds {array.dtype}; give uint8, or floats in [0, 1]")
    if not np.isfinite(array).all():
        raise LcoError(f"{label} holds NaN or infinity")
    least, most = array.min(), array.max()
    if least < 0 or most > 1:
        raise LcoError(
            f"{label} holds {array.dtype} from {least:g} to {most:g}; floats must be in [0, 1]"
        )
    scaled = array * np.asarray(255, array.dtype)
    return np.rint(scaled).astype(np.uint8)
