"""Pictures -> the numbers towers read: what transformers' PIL image processors compute, in a few lines of numpy.

They cannot be used themselves: importing one imports torchvision where it is installed, and fails where that is broken.
Ours are equal to the last bit (a test holds it), and serve the frames of clips as well, which have no PIL processor.

Pictures stay uint8 until they are on the device, where towers normalise them (`models.layers.normalised`).

Dimensions: X and Y the height and width of a picture.
"""

from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # PIL's number for it, and so the configs'


def read_scale(folder: Path) -> np.ndarray:
    """How levels become what towers read, (level / divisor - mean) / std: float32 [3 channels, 3].

    Raises for what is not implemented.
    """
    config, where = processor_config(folder, "image_processor")
    if config.get("resample", BICUBIC) != BICUBIC:
        raise LcoError(
            f"{where}: resample is {config['resample']!r}; only {BICUBIC} (bicubic) is supported"
        )
    if off := [
        key for key in ("do_resize", "do_rescale", "do_normalize") if config.get(key) is False
    ]:
        raise LcoError(f"{where}: {off[0]} is false, which is not supported")
    divisor = 1 / config.get("rescale_factor", 1 / 255)
    mean, std = config.get("image_mean", CLIP_MEAN), config.get("image_std", CLIP_STD)
    return np.stack([np.full(3, divisor), mean, std], axis=1).astype(np.float32)


def processor_config(folder: Path, part: str) -> tuple[dict[str, Any], Path]:
    """(configuration, its file) of a checkpoint's image_processor, video_processor or feature_extractor.

    transformers 5.x nests all parts in processor_config.json, and takes those first; the hub's files and 4.x's are
    flat, preprocessor_config.json or video_preprocessor_config.json. Clips fall back on images' part. Raises if there
    is none.
    """
    nested = folder / "processor_config.json"
    if nested.exists() and isinstance(config := read_json(nested).get(part), dict):
        return config, nested
    flat = folder / (
        "video_preprocessor_config.json"
        if part == "video_processor"
        else "preprocessor_config.json"
    )
    if part == "video_processor" and not flat.exists():
        return processor_config(folder, "image_processor")
    return read_json(flat), flat


def resize(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """uint8 [X, Y, 3] -> uint8 [height, width, 3], bicubic."""
    if picture.shape[:2] == (height, width):
        return picture
    return np.asarray(Image.fromarray(picture).resize((width, height), Image.Resampling.BICUBIC))
