"""Pictures -> the numbers that towers read, as transformers' PIL image processors compute them.

Those cannot be used: importing one imports torchvision where it is installed, and fails where that
is broken. Ours are equal to the last bit (a test compares them), and serve clips as well, for which
there is no PIL processor.

Pictures stay uint8 until they are on the device, where towers normalise them
(`models.layers.normalised`).

Dimensions: X and Y the height and width of a picture.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


def scale_of(settings: Mapping[str, Any]) -> np.ndarray:
    """How levels become what towers read, (level / divisor - mean) / std: float32 [3 channels, 3].

    settings: of the checkpoint's image processor, checked.
    """
    divisor = 1 / settings.get("rescale_factor", 1 / 255)
    mean = settings.get("image_mean", CLIP_MEAN)
    std = settings.get("image_std", CLIP_STD)
    return np.stack([np.full(3, divisor), mean, std], axis=1).astype(np.float32)
