"""Pictures -> the numbers that towers read, as transformers' PIL image processors compute them.

Those cannot be used: importing one imports torchvision where it is installed, and fails where that
is broken. Ours are equal to the last bit (a test compares them), and serve clips as well, for which
there is no PIL processor.

Pictures stay uint8 until they are on the device, where towers normalise them
(`models.layers.normalised`).

Dimensions: X and Y the height and width of a picture.
"""

from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
BICUBIC = 3  # PIL's number for it, and so the configs'
FLAT_FILES = {
    "image_processor": "preprocessor_config.json",
    "video_processor": "video_preprocessor_config.json",
    "feature_extractor": "preprocessor_config.json",
}


def read_scale(folder: Path) -> np.ndarray:
    """How levels become what towers read, (level / divisor - mean) / std: float32 [3 channels, 3].

    Raises for settings of the checkpoint's image processor that are not implemented.
    """
    config, file = processor_config(folder, "image_processor")
    resample = config.get("resample", BICUBIC)
    if resample != BICUBIC:
        raise LcoError(f"{file}: resample is {resample!r}; only {BICUBIC} (bicubic) is supported")
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if config.get(key) is False:
            raise LcoError(f"{file}: {key} is false, which is not supported")
    divisor = 1 / config.get("rescale_factor", 1 / 255)
    mean = config.get("image_mean", CLIP_MEAN)
    std = config.get("image_std", CLIP_STD)
    return np.stack([np.full(3, divisor), mean, std], axis=1).astype(np.float32)


def processor_config(folder: Path, part: str) -> tuple[dict[str, Any], Path]:
    """(a checkpoint's configuration, its file) of one of `FLAT_FILES`.

    transformers 5.x nests all parts in processor_config.json, and prefers that file. The hub's
    files and those of 4.x are flat. Clips without a part use that of images. Raises where there is
    no file.
    """
    nested = folder / "processor_config.json"
    if nested.exists():
        config = read_json(nested).get(part)
        if isinstance(config, dict):
            return config, nested
    flat = folder / FLAT_FILES[part]
    if part == "video_processor" and not flat.exists():
        return processor_config(folder, "image_processor")
    return read_json(flat), flat
