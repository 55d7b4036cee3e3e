"""The files of a guide, which `lco mine` leaves in its folder of vectors."""

from pathlib import Path

from lco_jax.core.errors import explained
from lco_jax.core.files import expanded, fingerprint

CONTENTS, VECTORS = "contents.jsonl", "vectors.npy"
KEY = "config.loss.guide"


def guide_files(folder: str) -> list[Path]:
    """The files of a guide; none where the folder is ""."""
    return [expanded(folder) / name for name in (CONTENTS, VECTORS)] if folder else []


def guide_fingerprint(folder: str) -> str:
    """Text that differs when a guide has other vectors or contents."""
    with explained(f"{KEY}={folder} cannot be read", OSError):
        return fingerprint((file.name, file.stat()) for file in guide_files(folder))
