"""Pictures -> the numbers towers read: what transformers' PIL image processors compute, in a few lines of numpy.

They cannot be used themselves: importing one imports torchvision where it is installed, and fails where that is broken.
Ours are equal to the last bit (a test holds it), and serve the frames of clips as well, which have no PIL processor.

Dimensions: T pictures, X and Y their height and width.
"""

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # PIL's number for it, and so the configs'


@dataclass(frozen=True)
class Pixels:
    """How a checkpoint normalises pictures: mean and std of each channel, after `scale`."""

    mean: tuple[float, ...] = CLIP_MEAN
    std: tuple[float, ...] = CLIP_STD
    scale: float = 1 / 255

    @classmethod
    def read(cls, folder: Path) -> "Pixels":
        """From preprocessor_config.json. Raises for what is not implemented."""
        path = folder / "preprocessor_config.json"
        config = read_json(path)
        if config.get("resample", BICUBIC) != BICUBIC:
            raise LcoError(f"{path}: resample is {config['resample']!r}; only {BICUBIC} (bicubic) is supported")
        if off := [key for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key) is False]:
            raise LcoError(f"{path}: {off[0]} is false, which is not supported")
        mean, std = tuple(config.get("image_mean", CLIP_MEAN)), tuple(config.get("image_std", CLIP_STD))
        return cls(mean, std, config.get("rescale_factor", 1 / 255))

    def normalize(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 [T, X, Y, 3] -> float32 [T, 3, X, Y]."""
        levels = _levels(self)
        return np.stack([levels[channel][pictures[..., channel]] for channel in range(3)], axis=1)


@lru_cache
def _levels(pixels: Pixels) -> np.ndarray:
    """What each of the 256 levels of each channel becomes: float32 [3, 256]."""
    scaled = (np.arange(256, dtype=np.float64) * pixels.scale).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (pixels.mean, pixels.std))
    return (scaled - mean) / std


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [X, Y, 3] -> uint8 [height, width, 3], bicubic."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
