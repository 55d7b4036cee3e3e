"""Which strings name media: the endings of files, addresses, and what looks like a file."""

import os
import re
from typing import Any

from lco_jax.core.errors import LcoError, printable
from lco_jax.data.media import local_path

EXTENSIONS = {
    "image": (
        *("png", "apng", "jpg", "jpeg", "jpe", "jfif", "webp", "gif", "bmp", "dib", "tif", "tiff"),
        *("ppm", "pgm", "pbm", "pnm", "pcx", "tga", "jp2", "j2k", "jpx", "avif", "heic", "heif"),
    ),
    "video": (
        *("mp4", "mkv", "webm", "avi", "mov", "m4v", "mpg", "mpeg", "wmv", "flv", "3gp", "3g2"),
        *("m2ts", "mts", "ogv", "vob", "asf"),
    ),
    "audio": (
        *("wav", "flac", "mp3", "ogg", "oga", "opus", "m4a", "aac", "aiff", "aif", "aifc"),
        *("wma", "caf", "amr", "mka", "w64"),
    ),
}
KIND_OF_ENDING = {ending: kind for kind, endings in EXTENSIONS.items() for ending in endings}
# endings of media that no decoder here reads; those that are common words or domains are left out
UNREAD = (
    *("svg", "svgz", "psd", "eps", "emf", "wmf", "xcf", "jxl", "ico", "icns", "exr", "dds"),
    *("cr2", "cr3", "nef", "arw", "dng", "orf", "rw2", "raf", "rmvb", "mxf", "swf", "y4m"),
    *("ape", "dsf", "dff", "wv", "midi", "mid"),
)
# what files of a single kind begin with; MP4, Matroska and Ogg may be sound or video
BEGINNINGS = {
    "image": re.compile(rb"\x89PNG|\xff\xd8\xff|GIF8|RIFF....WEBP|II\*\0|MM\0\*", re.DOTALL),
    "audio": re.compile(rb"RIFF....WAVE|fLaC|ID3", re.DOTALL),
    "video": re.compile(rb"RIFF....AVI ", re.DOTALL),
}
DATA_OF_A_KIND = re.compile(r"data:(image|video|audio)[/;]", re.IGNORECASE)
ENCODED_DATA = re.compile(r"data:[^,\s]*;base64,", re.IGNORECASE)
# bytes of the longest path, and of the longest name in it, that a system takes
LONGEST_PATH, LONGEST_NAME = 4096, 255


def media_kind(source: Any) -> str | None:
    """The kind of medium that a path or an address has by its ending, or None."""
    if not isinstance(source, str | os.PathLike):
        return None
    name = str(source)
    if name[:5].lower() == "data:":
        found = DATA_OF_A_KIND.match(name)
        return found[1].lower() if found else None
    return KIND_OF_ENDING.get(_ending(name))


def kind_of_bytes(content: Any) -> str | None:
    """The kind of medium that an encoded file has by its first bytes, where they tell, or None."""
    if not isinstance(content, bytes):
        return None
    return next((kind for kind, start in BEGINNINGS.items() if start.match(content)), None)


def _ending(name: str) -> str:
    """The ending of a path or an address, in lower case and without its dot; "" if it has none."""
    if name[:8].lower().startswith(("http://", "https://")):
        name = re.split("[?#]", name, maxsplit=1)[0]
    if "." not in name or "\n" in name:
        return ""
    return name.rsplit(".", 1)[-1].lower()


def kind_named(name: str | os.PathLike, where: str) -> str | None:
    """The kind of a media file, or None for a string that is a text."""
    kind = media_kind(name)
    path = local_path(name)
    text = 'text can be given as {"text": …}'
    if _ending(str(name)) in UNREAD and _may_be_path(str(name)):
        what = "ends like a medium in a format that is not read here"
        advice = "convert it, for example to .png, .mp4 or .wav"
        raise LcoError(f"{where}: {printable(str(name))} {what}; {advice}; {text}")
    if path is None:  # an address
        if kind is None and ENCODED_DATA.match(str(name)):
            give = 'give it as {"image": …}, {"audio": …} or {"video": …}'
            raise LcoError(f"{where}: a data: URI of no kind of medium; {give}")
        return kind
    is_there = os.path.isfile(path)
    if os.path.isdir(path):
        raise LcoError(f"{where}: {printable(str(name))} is a folder; give its files; {text}")
    if kind and is_there:
        return kind
    if isinstance(name, str) and not is_there and not _promises_file(name, kind):
        return None
    if kind is None:
        raise LcoError(
            f"{where}: {name} does not end like an image, video or audio file; "
            'give {"image": …} or the like, or {"text": …} for a text'
        )
    raise LcoError(f"{where}: {name} looks like a media file, and there is no such file; {text}")


def _promises_file(name: str, kind: str | None) -> bool:
    """Whether a string looks like a file that is not there: it ends like one, or is a file: URI."""
    if kind is None:
        return name[:7].lower() == "file://" and not any(map(str.isspace, name))
    return _may_be_path(name)


def _may_be_path(name: str) -> bool:
    """Whether a string is short enough. A line that is too long is a sentence, unless it is a
    single word.
    """
    encoded = name.encode(errors="surrogatepass")
    longest = max(map(len, encoded.split(b"/")))
    fits = len(encoded) <= LONGEST_PATH and longest <= LONGEST_NAME
    return fits or not any(map(str.isspace, name))
