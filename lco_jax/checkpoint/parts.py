"""What a model is made of, for the note that lies beside it: names, licences and checksums."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import metadata_load

from lco_jax.core.files import read_json
from lco_jax.core.wheels import SOURCE

logger = logging.getLogger(__name__)
README = "README.md"
NOTE = "parts.json"  # in the folder of an assembled model: what it was made of


@dataclass(frozen=True)
class Source:
    """Where a part comes from.

    given: as the user has it, a hub id or a path. files: what was read. licence: where known.
    """

    given: str | Path
    files: tuple[Path, ...]
    licence: str | None = None

    def note(self) -> dict[str, Any]:
        """Its name, its licence and the SHA-256 of its files; no path of this machine."""
        path = Path(self.given).expanduser()
        name = path.absolute().name if path.exists() else str(self.given)
        return {
            "name": name,
            "licence": self.licence,
            "sha256": {file.name: _sha256(file) for file in self.files},
        }


def source_of(given: str | Path, folder: Path, patterns: Sequence[str]) -> Source:
    """The source of a part that is the files of `folder` which match one of the patterns."""
    files = [
        file
        for file in sorted(folder.iterdir())
        if file.is_file() and any(fnmatch(file.name, pattern) for pattern in patterns)
    ]
    return Source(given, tuple(files), licence_of(folder))


def licence_of(folder: Path) -> str | None:
    """The licence in the note of what was fetched, or in a README.md as the hub has it."""
    licence = fetched_licence(folder) or front_matter(folder).get("license")
    return licence if isinstance(licence, str) else None


def fetched_licence(folder: Path) -> str | None:
    """The licence in the note of what was fetched; None for another folder."""
    if not (folder / SOURCE).is_file():
        return None
    licence = read_json(folder / SOURCE).get("licence")
    return licence if isinstance(licence, str) else None


def front_matter(folder: Path) -> dict[str, Any]:
    """The YAML head of a folder's README.md; empty if there is none, or none that can be read."""
    file = folder / README
    if not file.is_file():
        return {}
    try:
        return metadata_load(file) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        logger.warning("%s: its front matter is not valid YAML (%s)", file, type(error).__name__)
        return {}


def parts_of(folder: Path) -> dict[str, dict[str, Any]]:
    """What the note of an assembled model says of each part; empty for another model."""
    if not (folder / NOTE).is_file():
        return {}
    note = read_json(folder / NOTE)
    return {part: one for part, one in note.items() if isinstance(one, dict)}


def _sha256(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
