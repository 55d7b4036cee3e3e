"""Anything that is an image -> PIL, RGB."""

import struct
from contextlib import suppress
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError
from lco_jax.data.media import MediaConfig, decoding, resolve

# those that Pillow decodes by itself; for EPS it would start another program
FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "DIB"),
    *("TIFF", "AVIF", "JPEG2000", "PPM", "PCX", "TGA"),
)
# what Pillow's formats raise for a file of another format
NOT_THIS_FORMAT = (SyntaxError, IndexError, TypeError, struct.error)
MAX_RATIO = 200  # of the longer side to the shorter; the Qwen processors' limit
CHANNELS = (1, 3, 4)


def load_image(source: Any, where: str, config: MediaConfig) -> Image.Image:
    """An image in mode RGB and its original size, independent of any file.

    source: a path, bytes, a data: URI, a URL (see `media.resolve`), a PIL image, or a numpy array:
    uint8, or floats in [0, 1], of height x width (x 1, 3 or 4 channels). Channels may come first
    where no doubt is possible. where: how errors begin, for example "input 3".

    Transparent pixels are blended with white, 16-bit greys keep their upper 8 bits, and an
    animation gives its first frame. The EXIF orientation is not applied, as in the reference.
    Raises for anything else, and for torn files: no image is loaded in part.
    """
    image = _load(source, where, config)
    side = config.image_max_side
    if side is not None and max(image.size) > side:
        image.thumbnail((side, side))
    return image


def _load(source: Any, where: str, config: MediaConfig) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source, f"{where}: image array of shape {source.shape}", config)
    if isinstance(source, Image.Image):
        label = f"{where}: PIL image"
        check_size(*source.size, label, config)
        return _to_rgb(source, label)
    file = resolve(source, "image", where, config, ", a PIL image or a numpy array")
    with file.open() as stream:
        image = _open(stream, file.label)
        check_size(*image.size, file.label, config)
        return _to_rgb(image, file.label)


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


def _open(stream: BinaryIO, label: str) -> Image.Image:
    """The image with its header read and nothing decoded.

    `Image.open` would warn and refuse by a limit of Pillow's, which holds for the entire process.
    """
    Image.init()
    prefix = stream.read(16)
    for name in FORMATS:
        factory, accepts = Image.OPEN.get(name, (None, None))  # a build of Pillow may lack a format
        with decoding(label), suppress(*NOT_THIS_FORMAT):
            # `accepts` returns a string where a build lacks the format's library
            if factory and (accepts is None or accepts(prefix) is True):
                stream.seek(0)
                return factory(stream, "")
    raise LcoError(f"{label} is torn, or in no format that is read here ({', '.join(FORMATS)})")


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """A new image in mode RGB. Pillow would clip 16 bits to 8, which whitens most pictures."""
    with decoding(label):
        image.load()
        if image.mode.startswith("I;16"):
            upper_bits = np.asarray(image) >> 8
            return Image.fromarray(upper_bits.astype(np.uint8)).convert("RGB")
        if image.mode in ("I", "F"):
            _check_levels(np.asarray(image), image.mode, label)
        if not image.has_transparency_data:
            return image.convert("RGB")
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white


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
