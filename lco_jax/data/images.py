"""Anything that is an image -> PIL, RGB."""

import struct
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError
from lco_jax.data.media import MediaConfig, decoding, resolve

# what Pillow decodes by itself; it would also start other programs (for EPS)
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "GIF",
    "BMP",
    "DIB",
    "TIFF",
    "AVIF",
    "JPEG2000",
    "PPM",
    "PCX",
    "TGA",
)
MAX_RATIO = 200  # of the longer side to the shorter; the Qwen processors' limit
CHANNELS = (1, 3, 4)


def load_image(source: Any, where: str, config: MediaConfig) -> Image.Image:
    """An image in mode RGB, of its own size, that holds no file open.

    source: a path, bytes, a data: URI, a URL (see `media.resolve`), a PIL image, or a numpy array: uint8, or floats in
    [0, 1], of height x width (x 1, 3 or 4 channels); channels may come first where no doubt is possible.
    where: how errors begin, for example "input 3".

    Transparency is laid over white, 16-bit greys keep their upper 8 bits, and an animation gives its first frame. The
    EXIF orientation is not applied, as the reference does not. Raises for anything else, and for files that are torn:
    no image is loaded in part.
    """
    image = _load(source, where, config)
    side = config.image_max_side
    if side is not None and max(image.size) > side:
        image = image.copy()  # it may be the caller's
        image.thumbnail((side, side))
    return image


def _load(source: Any, where: str, config: MediaConfig) -> Image.Image:
    if isinstance(source, np.ndarray):
        return _from_array(source, f"{where}: image array of shape {source.shape}", config)
    if isinstance(source, Image.Image):
        label = f"{where}: PIL image"
        check_size(*source.size, label, config)
        with decoding(label):  # its file may only be read now
            return _to_rgb(source, label)
    medium = resolve(source, "image", where, config, ", a PIL image or a numpy array")
    with decoding(medium.label), medium.open() as stream:
        image = _open(stream, medium.label)
        check_size(*image.size, medium.label, config)
        return _to_rgb(image, medium.label)


def check_size(width: int, height: int, label: str, config: MediaConfig) -> None:
    """Raise for an image or a frame without pixels, with too many, or that is a mere line."""
    if not width or not height:
        raise LcoError(f"{label} is {width} x {height} and has no pixels")
    if width * height > config.max_image_pixels:
        raise LcoError(
            f"{label} is {width} x {height} pixels, and max_image_pixels is {config.max_image_pixels}"
        )
    if (ratio := max(width, height) / min(width, height)) > MAX_RATIO:
        raise LcoError(
            f"{label} is {width} x {height}: the absolute aspect ratio must be smaller than {MAX_RATIO}, "
            f"and is {ratio:.1f}"
        )


def _open(stream: BinaryIO, label: str) -> Image.Image:
    """The image with its header read and nothing decoded.

    Not `Image.open`: that warns and refuses by a limit of Pillow's, which only a change for the whole process moves.
    """
    Image.init()
    prefix = stream.read(16)
    for name in FORMATS:
        factory, accept = Image.OPEN.get(name, (None, None))  # a build of Pillow may lack one,
        try:
            if factory is None or (
                accept and accept(prefix) is not True
            ):  # or say here which library it misses
                continue
            stream.seek(0)
            return factory(stream, "")
        except (
            SyntaxError,
            IndexError,
            TypeError,
            struct.error,
        ):  # how Pillow's formats say: not mine
            continue
    raise LcoError(f"{label} is torn, or in no format that is read here ({', '.join(FORMATS)})")


def _to_rgb(image: Image.Image, label: str) -> Image.Image:
    """A new image in mode RGB. Pillow's own conversion would clip 16 bits to 8, which makes most pictures white."""
    image.load()
    if image.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in ("I", "F"):
        values = np.asarray(image)
        if not (values.min() >= 0 and values.max() <= 255):  # NaN is neither
            raise LcoError(
                f"{label} has 32-bit pixels (mode {image.mode}) beyond 0 to 255; scale it to 8 bits"
            )
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, (255, 255, 255))
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


def _from_array(array: np.ndarray, label: str, config: MediaConfig) -> Image.Image:
    if array.ndim == 3 and array.shape[2] not in CHANNELS and array.shape[0] in CHANNELS:
        array = array.transpose(1, 2, 0)
    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in CHANNELS):
        raise LcoError(
            f"{label} is in no known layout; give height x width, or height x width x 1, 3 or 4 channels"
        )
    check_size(array.shape[1], array.shape[0], label, config)
    pixels = _as_uint8(array, label)
    if pixels.ndim == 3 and pixels.shape[2] == 1:
        pixels = pixels[:, :, 0]
    return _to_rgb(Image.fromarray(np.ascontiguousarray(pixels)), label)


def _as_uint8(array: np.ndarray, label: str) -> np.ndarray:
    """uint8 as it is, floats in [0, 1] times 255 and rounded."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise LcoError(f"{label} holds {array.dtype}; give uint8, or floats in [0, 1]")
    if not np.isfinite(array).all():
        raise LcoError(f"{label} holds NaN or infinity")
    if array.min() < 0 or array.max() > 1:
        raise LcoError(
            f"{label} holds {array.dtype} from {array.min():g} to {array.max():g}; floats must be in [0, 1]"
        )
    return np.rint(array * np.asarray(255, array.dtype)).astype(np.uint8)
