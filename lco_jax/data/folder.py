"""What a folder of media holds, listed once: the files to embed, and how many others there are.

A list is taken at the start of a work and kept with it, so files that come meanwhile move no row.
"""

import json
import os
import stat
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path

from PIL import features

from lco_jax.core.errors import LcoError, reason
from lco_jax.data.names import KIND_OF_ENDING

HEIF = ("heic", "heif")  # what a plugin of Pillow decodes
HIDDEN, LINKS, CLOSED = "hidden", "links to folders", "folders that cannot be read"
NAMED = 3  # of the files that have come, gone or changed


@dataclass(frozen=True)
class Listing:
    """What a folder held when it was listed. Hidden entries and links to folders are left out.

    files: the name within the folder of each file that ends like a medium -> text that changes
    with the file; in the order of the names.
    left_out: what the others are (their ending, such as ".txt", or words) -> how many.
    faults: a file, or a folder with a slash after it -> why it cannot be read.
    """

    files: Mapping[str, str]
    left_out: Mapping[str, int]
    faults: Mapping[str, str] = field(default_factory=dict)

    def fingerprint(self) -> str:
        """Text that differs when files have changed: how many, and a digest of them."""
        digest = blake2b(digest_size=8)
        for name, state in self.files.items():
            digest.update(f"{name}\0{state}\0".encode(errors="surrogateescape"))
        return f"{len(self.files)} files with digest {digest.hexdigest()}"

    def check(self, what: str) -> None:
        """Raise if there is no file."""
        if not self.files:
            others = f"; {rest_in_words(self.left_out)}" if self.left_out else ""
            raise LcoError(f"{what} holds no image, video or audio file{others}")

    def changes(self, now: "Listing") -> dict[str, list[str]]:
        """The names of the files that have come since, are gone, or are not what they were."""
        both = self.files.keys() & now.files.keys()
        return {
            "new": [name for name in now.files if name not in self.files],
            "gone": [name for name in self.files if name not in now.files],
            "changed": [
                name for name in self.files if name in both and self.files[name] != now.files[name]
            ],
        }

    def to_bytes(self) -> bytes:
        """As a file keeps it."""
        return json.dumps({"files": self.files, "left_out": self.left_out}).encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> "Listing":
        """What `to_bytes` made."""
        return cls(**json.loads(content))


def _by_count(pair: tuple[str, int]) -> tuple[int, str]:
    return -pair[1], pair[0]


def rest_in_words(left_out: Mapping[str, int]) -> str:
    """What is left out, as `Listing` has it; "" if nothing is."""
    most_first = sorted(left_out.items(), key=_by_count)
    counts = ", ".join(f"{what} {count:,}" for what, count in most_first)
    return f"left out: {counts}" if counts else ""


def changes_in_words(changes: Mapping[str, list[str]]) -> str:
    """A sentence about what `Listing.changes` found; "" if that is nothing."""
    verbs = {"new": "new and not in it", "gone": "gone", "changed": "changed"}
    found = [f"{_some(names)} {verbs[how]}" for how, names in changes.items() if names]
    return f"since the folder was listed: {'; '.join(found)}" if found else ""


def _some(names: list[str]) -> str:
    shown = ", ".join(printable(name) for name in names[:NAMED])
    more = ", …" if len(names) > NAMED else ""
    return f"{len(names):,} ({shown}{more})"


def file_kind(name: str) -> str | None:
    """The kind of medium that a file's ending promises, if there is a decoder for it."""
    ending = _ending(name).removeprefix(".")
    if ending in HEIF:
        return "image" if find_spec("pillow_heif") else None
    if ending == "avif" and not features.check("avif"):
        return None
    return KIND_OF_ENDING.get(ending)


def _ending(name: str) -> str:
    """The ending of a file's name in lower case, with its dot; "" if it has none."""
    return os.path.splitext(name)[1].lower()


def as_id(name: str) -> str:
    """A name as text. Bytes of it that are not UTF-8 become \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")


def printable(name: str) -> str:
    """A name on one line, for messages."""
    return name if name.isprintable() else ascii(as_id(name))


def list_folder(folder: Path) -> Listing:
    """List a folder of a disk, and all below it. Raises `OSError` if itself cannot be read."""
    files: dict[str, str] = {}
    faults: dict[str, str] = {}
    left_out = Counter[str]()
    folders = [""]
    while folders:
        within = folders.pop()
        try:
            with os.scandir(os.path.join(folder, within)) as found:
                entries = list(found)
        except OSError as error:
            if not within:
                raise
            faults[within] = reason(error)
            left_out[CLOSED] += 1
            continue
        for entry in entries:
            name = within + entry.name
            if entry.is_dir(follow_symlinks=False) and not is_hidden(entry.name):
                folders.append(f"{name}/")
            elif what := _left_out_as(entry):
                left_out[what] += 1
            else:
                files[name], fault = _look_at(entry.path)
                if fault:
                    faults[name] = fault
    return Listing(dict(sorted(files.items())), dict(left_out), faults)


def _left_out_as(entry: os.DirEntry) -> str | None:
    """What an entry counts as if it is left out, else None."""
    if not is_hidden(entry.name) and os.path.isdir(entry.path):
        return LINKS
    return left_out_as(entry.name)


def left_out_as(name: str) -> str | None:
    """What a file counts as if its name says that it is left out, else None."""
    if is_hidden(name):
        return HIDDEN
    if file_kind(name):
        return None
    return printable(_ending(name)) or "no ending"


def is_hidden(name: str) -> bool:
    """Whether a name, or that of a folder in it, begins with a dot."""
    return any(part.startswith(".") for part in name.split("/"))


def _look_at(path: str) -> tuple[str, str]:
    """(text that changes with a file, why it cannot be read or "")."""
    try:
        about = os.stat(path)
    except OSError as error:
        return "", "a broken link" if isinstance(error, FileNotFoundError) else reason(error)
    state = f"{about.st_size} {about.st_mtime_ns}"
    return state, "" if stat.S_ISREG(about.st_mode) else "a pipe or a device"
