"""lco-jax: language-centric omnimodal embeddings (LCO-Embedding, arXiv 2510.11693) in JAX."""

import os

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # that torch is absent is how it should be

from lco_jax.core.errors import LcoError
from lco_jax.core.sharding import make_mesh
from lco_jax.data.media import MediaConfig
from lco_jax.embedder import OmniEmbedder
from lco_jax.generator import OmniGenerator

__version__ = "0.1.0"
__all__ = ["LcoError", "MediaConfig", "OmniEmbedder", "OmniGenerator", "make_mesh"]
