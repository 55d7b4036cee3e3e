"""lco-jax: language-centric omnimodal embeddings (LCO-Embedding, arXiv 2510.11693) in JAX."""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # that torch is absent is how it should be

if TYPE_CHECKING:
    from lco_jax.core.errors import LcoError
    from lco_jax.core.sharding import make_mesh
    from lco_jax.data.media import MediaConfig
    from lco_jax.embedder import OmniEmbedder
    from lco_jax.generator import OmniGenerator
    from lco_jax.hub import push_to_hub

__version__ = "0.1.0"
__all__ = ["LcoError", "MediaConfig", "OmniEmbedder", "OmniGenerator", "make_mesh", "push_to_hub"]
# Imported when they are asked for: the processes that decode media do without jax.
PLACES = {
    "LcoError": "lco_jax.core.errors",
    "make_mesh": "lco_jax.core.sharding",
    "MediaConfig": "lco_jax.data.media",
    "OmniEmbedder": "lco_jax.embedder",
    "OmniGenerator": "lco_jax.generator",
    "push_to_hub": "lco_jax.hub",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)
