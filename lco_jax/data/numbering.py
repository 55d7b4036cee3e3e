"""Numbers of contents, the same for equal ones: texts of the same words, and media whose files hold
the same bytes.
"""

import hashlib
import os
from hashlib import blake2b
from typing import Any

from lco_jax.data.content import ADDRESS, Content, Part
from lco_jax.data.records import content_key


class EqualFiles:
    """A value of each media file that is the same for files that hold the same bytes.

    A file is read only where another has its size.
    """

    def __init__(self) -> None:
        self._first: dict[int, str] = {}  # size -> the first file of it
        self._digests: dict[str, bytes] = {}

    def __call__(self, path: str) -> Any:
        if ADDRESS.match(path):
            return path
        try:
            size = os.path.getsize(path)
            first = self._first.setdefault(size, path)
            is_first = path == first or self._digest(path) == self._digest(first)
        except OSError:  # whoever embeds it says why it cannot be read
            return path
        return (size, b"" if is_first else self._digest(path))

    def _digest(self, path: str) -> bytes:
        if path not in self._digests:
            with open(path, "rb") as file:
                self._digests[path] = hashlib.file_digest(file, "blake2b").digest()
        return self._digests[path]


class Numbering:
    """Gives each content a number from 0, the same to equal ones."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._equal_files = EqualFiles()

    def __len__(self) -> int:
        return len(self._numbers)

    def number(self, content: Content) -> int:
        """The number of a content; that of a new one is the next."""
        return self._numbers.setdefault(self._digest(content), len(self._numbers))

    def find(self, content: Content) -> int | None:
        """The number of a content that has one."""
        return self._numbers.get(self._digest(content))

    def _digest(self, content: Content) -> bytes:
        key = content_key(self._by_bytes(content))
        return blake2b(repr(key).encode(), digest_size=16).digest()

    def _by_bytes(self, content: Content) -> Any:
        if isinstance(content, str):
            return content
        return tuple(
            {key: self._of_value(key, value, part) for key, value in part.items()}
            for part in content
        )

    def _of_value(self, key: str, value: Any, part: Part) -> Any:
        if key != part["type"] or key == "text":
            return value
        if isinstance(value, list):
            return tuple(map(self._equal_files, value))
        return self._equal_files(value)
