"""lco-jax: language-centric omnimodal embeddings (LCO-Embedding, arXiv 2510.11693) in JAX."""

import os
import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

os.environ.setdefault(
    "TRANSFORMERS_NO_ADVISORY_WARNINGS", "1"
)  # that torch is absent is how it should be

if TYPE_CHECKING:
    from lco_jax.core.errors import LcoError
    from lco_jax.core.sharding import make_mesh
    from lco_jax.core.small_vectors import quantize_embeddings
    from lco_jax.data.media import MediaConfig
    from lco_jax.embedder import OmniEmbedder
    from lco_jax.generator import OmniGenerator
    from lco_jax.hub import push_to_hub
    from lco_jax.pretrain import pretrain
    from lco_jax.train import train

__version__ = "0.1.0"
__all__ = [
    "LcoError",
    "MediaConfig",
    "OmniEmbedder",
    "OmniGenerator",
    "make_mesh",
    "pretrain",
    "push_to_hub",
    "quantize_embeddings",
    "train",
]
# Imported when they are asked for: the processes that decode media do without jax.
PLACES = {
    "LcoError": "lco_jax.core.errors",
    "make_mesh": "lco_jax.core.sharding",
    "MediaConfig": "lco_jax.data.media",
    "OmniEmbedder": "lco_jax.embedder",
    "OmniGenerator": "lco_jax.generator",
    "pretrain": "lco_jax.pretrain",
    "push_to_hub": "lco_jax.hub",
    "quantize_embeddings": "lco_jax.core.small_vectors",
    "train": "lco_jax.train",
}


def __getattr__(name: str) -> Any:
    if name not in PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(PLACES[name]), name)


class _Package(ModuleType):
    """This package, in which `train` is the function, whatever was imported before.

    Python binds a module to its name in the package when it is first imported. `python -m
    lco_jax.train` must stay, so there is a module lco_jax.train; what it binds is its function. A
    package whose __init__ imports the function has that, too, but ours imports nothing heavy.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name in PLACES and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
