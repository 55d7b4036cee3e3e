"""PIL images that a caller has opened, and that PIL has yet to decode.

They are decoded where files are (`decoder.py`): their file's bytes go there, with what the caller
has asked of it: a later frame, a smaller draft.
"""

import os
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from PIL import ImageFile

from lco_jax.core.errors import LcoError
from lco_jax.data.media import MediaFile

HOLDS_PIXELS = ("WEBP", "AVIF")  # once they have decoded a frame, PIL has no file of them


@dataclass(frozen=True)
class Opened:
    """How a caller has opened a PIL image.

    format: Pillow's name of it. frame: from 0. size: (width, height) that the image says it has.
    mode, scale: of a draft of a JPEG, which is so many times smaller; 0: no draft. reduce: how many
    times JPEG 2000 halves the image. layers: of it, 0: all.
    """

    format: str
    frame: int
    size: tuple[int, int]
    mode: str
    scale: int = 0
    reduce: int = 0
    layers: int = 0

    @classmethod
    def of(cls, image: ImageFile.ImageFile) -> "Opened":
        """What is known of an image without decoding it."""
        of_jpeg_2000 = image.format == "JPEG2000"
        return cls(
            format="JPEG" if image.format == "MPO" else str(image.format),  # which finds out itself
            frame=image.tell(),
            size=image.size,
            mode=image.mode,
            scale=image.decoderconfig[0] if image.decoderconfig else 0,
            reduce=getattr(image, "_reduce", 0) if of_jpeg_2000 else 0,
            layers=getattr(image, "layers", 0) if of_jpeg_2000 else 0,
        )

    def apply(self, image: Any, label: str) -> None:
        """Bring a freshly opened image to where the caller's is. Raises where that cannot be."""
        if image.tell() != self.frame:
            image.seek(self.frame)
        if self.scale:
            width, height = image.size
            image.draft(self.mode, (width // self.scale, height // self.scale))
        elif image.format == "HEIF" and image.size != self.size:  # the size of its thumbnail
            image.draft(None, self.size)
        if self.reduce or self.layers:
            image.reduce, image.layers = self.reduce, self.layers
        if image.size != tuple(self.size):
            what = f"is {self.size[0]} x {self.size[1]}, and its file has another size"
            raise LcoError(f"{label} {what}; call its load() before")


@dataclass(frozen=True)
class LazyImage(MediaFile):
    """The file of a PIL image that is not decoded yet."""

    opened: Opened


def lazy_image(image: Any, label: str, most: int = -1) -> LazyImage | None:
    """The file of a PIL image, in as many bytes as there are, but at most `most` (-1: all).

    None where PIL has decoded the image, or has no file of it, or where its format is not Pillow's
    own, and unknown to other processes. EPS is left out: Pillow starts a program for it.
    """
    if not isinstance(image, ImageFile.ImageFile) or not _is_pending(image):
        return None
    file = image.fp
    with suppress(OSError, ValueError, AttributeError):  # closed, or not seekable
        place = file.tell()
        file.seek(0, os.SEEK_SET)
        content = file.read(most)
        file.seek(place)
        if content:
            return LazyImage(label, content, Opened.of(image))
    return None


def _is_pending(image: ImageFile.ImageFile) -> bool:
    """Whether PIL would decode the image from its file now."""
    own = type(image).__module__.startswith("PIL.") or image.format == "HEIF"
    is_stub = isinstance(image, ImageFile.StubImageFile)  # a handler of the caller's decodes it
    if image.fp is None or not own or is_stub or image.format in (None, "EPS"):
        return False
    was_decoded = getattr(image, "_im", image) is not None
    if image.format in HOLDS_PIXELS:
        return not was_decoded
    # HEIF has no tiles, and drops its file when it is decoded
    return bool(image.tile) or not was_decoded or image.format == "HEIF"
