"""Captions made from a template, and media files whose names hold what the template asks for."""

import os
import re
from collections.abc import Mapping, Sequence
from glob import iglob
from pathlib import Path
from string import Formatter
from typing import Any

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.content import Content, check_text
from lco_jax.data.names import KIND_OF_ENDING, media_kind
from lco_jax.data.records import Record
from lco_jax.data.scan import Scan, Source


class Caption:
    """A template such as "a photo of a {label}." in Python's format syntax.

    fields: the names it may ask for. values: words for the values of some fields, such as
    {"digit": {"7": "seven"}}. where: names the source in errors.
    """

    def __init__(
        self,
        template: str,
        fields: Sequence[str],
        values: Mapping[str, Mapping] | None,
        where: str,
    ):
        values = values or {}
        with explained(f"{where}: the caption {template!r} is no template", ValueError, TypeError):
            asked = [name for _, name, _, _ in Formatter().parse(template) if name is not None]
        self.template = template
        self.fields = {re.split(r"[.\[]", name)[0] for name in asked}
        self.values: dict[str, dict[str, Any]] = {}
        unknown = sorted({*self.fields, *values} - set(fields))
        if unknown:
            there = ", ".join(fields) or "none"
            raise LcoError(
                f"{where} has no field {unknown[0]!r} for its caption; those there are: {there}"
            )
        for name, words in values.items():
            if not isinstance(words, Mapping):
                raise LcoError(f"{where}: values.{name} must be a mapping, and is {words!r:.60}")
            self.values[name] = {str(value): word for value, word in words.items()}

    def __call__(self, row: Mapping[str, Any], where: str) -> str:
        """The caption of a row that holds (at least) `self.fields`."""
        filled = {name: self._word(name, row[name], where) for name in self.fields}
        unfit = f"{where}: the caption {self.template!r} cannot be filled in"
        with explained(unfit, ValueError, TypeError, LookupError, AttributeError):
            return self.template.format(**filled)

    def _word(self, name: str, value: Any, where: str) -> Any:
        if name not in self.values:
            return value
        words = self.values[name]
        if str(value) not in words:
            raise LcoError(f"{where}: values.{name} has nothing for {str(value)!r}")
        return words[str(value)]


def captioned(kind: str, medium: Any, caption: str, reverse: bool, where: str) -> Record:
    """A record of a medium and its caption; the caption is the anchor if `reverse`."""
    check_text(caption, f"{where}: the caption")
    if not caption.strip():
        raise LcoError(f"{where}: the caption is empty")
    content: Content = ({"type": kind, kind: medium},)
    anchor, positive = (caption, content) if reverse else (content, caption)
    return Record(anchor, positive, (), where)


class FilesSource(Source):
    """Images, audio files or videos, each with a caption made from its name.

    The paths are in memory. glob: which files (`**` goes through folders). pattern: a regular
    expression for the end of a path, from the start of a file's or folder's name; its named groups
    are the caption's fields. reverse: the caption is the anchor.
    """

    def __init__(
        self,
        glob: str,
        pattern: str,
        caption: str,
        values: Mapping[str, Mapping] | None = None,
        reverse: bool = False,
        on_bad: str = "error",
    ):
        where = f"the pattern {pattern!r}"
        with explained(f"{where} is no regular expression", re.error):
            groups = list(re.compile(pattern).groupindex)
            self.pattern = re.compile(f"(?:.*/)?(?:{pattern})")  # no match within a name
        self.caption = Caption(caption, groups, values, where)
        self.reverse = reverse
        scan = Scan(on_bad)
        for path in sorted(filter(os.path.isfile, iglob(os.path.expanduser(glob), recursive=True))):
            scan.check(self._read, path, keep=path)
        scan.finish(glob)
        self.digests = scan.digests
        self.paths, self.skipped, self.modalities = scan.kept, scan.skipped, scan.modalities

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        return self._read(self.paths[index])

    def _read(self, path: str) -> Record:
        kind = media_kind(path)
        if kind is None:
            endings = ", ".join(KIND_OF_ENDING)
            raise LcoError(
                f"{path} is no image, video or audio file by its name; the endings are {endings}"
            )
        match = self.pattern.fullmatch(Path(path).as_posix())
        if match is None:
            raise LcoError(f"{path} does not match the pattern; let glob select the files that do")
        caption = self.caption(match.groupdict(), path)
        return captioned(kind, os.path.abspath(path), caption, self.reverse, path)
