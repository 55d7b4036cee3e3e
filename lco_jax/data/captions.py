"""Captions made from a template, and media files whose names hold what the template asks for."""

import re
from collections.abc import Mapping
from functools import partial
from glob import iglob
from pathlib import Path
from string import Formatter
from typing import Any

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.prompts import EXTENSIONS, check_text, is_media_file
from lco_jax.data.records import Record
from lco_jax.data.scan import Scan, Source


class Caption:
    """A template such as "a photo of a {label}." in Python's format syntax.

    fields: the names there are. values: of some fields, what to write for each value: {"digit": {"7": "seven"}}.
    where: names the source in errors.
    """

    def __init__(
        self, template: str, fields: list[str], values: Mapping[str, Mapping] | None, where: str
    ):
        values = values or {}
        with explained(f"{where}: the caption {template!r} is no template", ValueError, TypeError):
            names = {
                re.split(r"[.\[]", name)[0]
                for _, name, _, _ in Formatter().parse(template)
                if name is not None
            }
        if unknown := sorted((names | set(values)) - set(fields)):
            there = ", ".join(fields) or "none"
            raise LcoError(
                f"{where} has no field {unknown[0]!r} for its caption; those there are: {there}"
            )
        if wrong := [name for name in values if not isinstance(values[name], Mapping)]:
            raise LcoError(
                f"{where}: values.{wrong[0]} must be a mapping, and is {values[wrong[0]]!r:.60}"
            )
        self.template, self.fields = template, names
        self.values = {
            name: {str(key): text for key, text in values[name].items()} for name in values
        }

    def __call__(self, row: Mapping[str, Any], where: str) -> str:
        """The caption of a row that holds (at least) `self.fields`."""
        row = {name: row[name] for name in self.fields}
        for name in self.fields & set(self.values):
            if (key := str(row[name])) not in self.values[name]:
                raise LcoError(f"{where}: values.{name} has nothing for {key!r}")
            row[name] = self.values[name][key]
        unfit = f"{where}: the caption {self.template!r} cannot be filled in"
        with explained(unfit, ValueError, TypeError, LookupError, AttributeError):
            return self.template.format(**row)


def captioned(media: dict[str, Any], caption: str, reverse: bool, where: str) -> Record:
    """A record of one part and its caption; the caption is the anchor if `reverse`."""
    check_text(caption, f"{where}: the caption")
    if not caption.strip():
        raise LcoError(f"{where}: the caption is empty")
    anchor, positive = (caption, (media,)) if reverse else ((media,), caption)
    return Record(anchor, positive, (), where)


class FilesSource(Source):
    """Images, audio files or videos, each with a caption made from its name. Holds their paths in memory.

    glob: which files (`**` goes through folders). pattern: a regular expression for the end of a path, from the start
    of a name or folder on; its named groups are the caption's fields. reverse: the caption is the anchor.
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
        with explained(f"the pattern {pattern!r} is no regular expression", re.error):
            groups = list(re.compile(pattern).groupindex)
            self.pattern = re.compile(
                f"(?:.*/)?(?:{pattern})"
            )  # a name's tail must not pass for a name
        self.caption, self.reverse = (
            Caption(caption, groups, values, f"the pattern {pattern!r}"),
            reverse,
        )
        scan = Scan(on_bad)
        for path in sorted(path for path in iglob(glob, recursive=True) if Path(path).is_file()):
            scan.check(partial(self._read, path), path)
        scan.finish(glob)
        self.paths, self.skipped, self.modalities = scan.kept, scan.skipped, scan.modalities

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Record:
        return self._read(self.paths[index])

    def _read(self, path: str) -> Record:
        if not (kind := is_media_file(path)):
            endings = ", ".join(ending for endings in EXTENSIONS.values() for ending in endings)
            raise LcoError(
                f"{path} is no image, video or audio file by its name; the endings are {endings}"
            )
        if not (match := self.pattern.fullmatch(Path(path).as_posix())):
            raise LcoError(f"{path} does not match the pattern; let glob select the files that do")
        caption = self.caption(match.groupdict(), path)
        media = {"type": kind, kind: str(Path(path).absolute())}
        return captioned(media, caption, self.reverse, path)
