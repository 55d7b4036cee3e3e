"""Small pictures of images and clips, for the page."""

import io
from dataclasses import replace
from functools import lru_cache

from PIL import Image

from lco_jax.data.images import load_pixels
from lco_jax.data.media import MediaConfig
from lco_jax.data.video import load_video
from lco_jax.searching.library import File

SIDE = 480  # pixels of the longer one
DECODE_SECONDS = 10.0  # to decode a file; less where --decode-seconds is
KEPT = 1000  # the last ones that are kept in memory, of some 20 kB each
FRAMES = 4  # of a clip that are decoded; one of them is shown


class Thumbnails:
    """`File` -> a small WebP, upright, also of formats that browsers do not read.

    A file is decoded once, while its thumbnail is among those kept. media: the caps, which hold
    here, too.
    """

    def __init__(self, media: MediaConfig):
        seconds = min(media.decode_seconds, DECODE_SECONDS)
        self._caps = replace(
            media,
            decode_seconds=seconds,
            max_frames=FRAMES,
            use_audio_in_video=False,
        )
        self._kept = lru_cache(KEPT)(self._made)

    def __call__(self, file: File) -> bytes:
        """The thumbnail of an image, or of a frame of a clip. Raises `NotAsListed`, and `LcoError`
        for a file that cannot be decoded within the caps.
        """
        file.check()
        return self._kept(file)

    def _made(self, file: File) -> bytes:
        if file.kind == "video":
            frames = load_video(file.path, "thumbnail", self._caps, _small).frames
            pixels = frames[len(frames) // 3]  # many clips begin in black
        else:
            pixels = load_pixels(file.path, "thumbnail", self._caps, _small)
        content = io.BytesIO()
        Image.fromarray(pixels).save(content, "WEBP", quality=90)
        file.check()  # it may have been another one meanwhile
        return content.getvalue()


def _small(height: int, width: int, frames: int = 1) -> tuple[int, int]:
    """(height, width) of a thumbnail. A small picture keeps its size. frames: of a clip."""
    scale = min(1.0, SIDE / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))
