"""What images, sound and video share: caps, where bytes come from, calls of decoders."""

import base64
import binascii
import http.client
import io
import math
import os
import re
import stat
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

from lco_jax.core.errors import LcoError, explained, is_number, printable, reason

_open_files_lock = threading.Lock()
SOCKET_SECONDS = 30.0  # how long a server may be silent
CHUNK = 1 << 20  # bytes read from a server at once
# of urllib; those of ftp:, file: and data:, which a redirect may name, are left out
URL_HANDLERS = (
    urllib.request.ProxyHandler,
    urllib.request.UnknownHandler,
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPRedirectHandler,
    urllib.request.HTTPErrorProcessor,
)


def _cap(default: Any, meaning: str) -> Any:
    """A field of `MediaConfig`. The commands' help shows its `meaning`."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class MediaConfig:
    """Every cap on the media that users give. Raises for a value out of range, with its name."""

    fps: float = _cap(2.0, "frames a second that are taken of a video (as the reference)")
    max_frames: int = _cap(64, "the most frames that are taken of a video; at least 2")
    image_max_side: int | None = _cap(
        None, "first shrink longer images to so many pixels a side (reference: 700)"
    )
    image_min_pixels: int | None = _cap(
        None, "enlarge smaller images to so many pixels (None: the checkpoint's)"
    )
    image_max_pixels: int | None = _cap(
        None, "shrink bigger images to so many pixels (None: the checkpoint's)"
    )
    video_min_pixels: int | None = _cap(None, "the same of each frame")
    video_max_pixels: int | None = _cap(
        602_112, "the same of each frame; the lesser of it and the checkpoint's"
    )
    max_audio_seconds: float = _cap(300.0, "cut longer sound, with a warning")
    max_image_pixels: int = _cap(
        200_000_000, "refuse bigger images and frames before they are decoded"
    )
    max_file_bytes: int = _cap(
        2_000_000_000, "refuse bigger files and downloads before they are read"
    )
    max_decode_bytes: int = _cap(
        2_000_000_000, "refuse files that take more memory to be decoded, beside their own bytes"
    )
    decode_seconds: float = _cap(
        120.0, "the longest that a file may take to fetch, and to decode, in CPU time"
    )
    upright: bool = _cap(
        True, "turn images and videos as their orientation tag asks (False: as they are stored)"
    )
    allow_remote: bool = _cap(
        False, "fetch http and https addresses; only for inputs that you trust with your network"
    )
    use_audio_in_video: bool = _cap(False, "embed the sound of a video file with it")

    def __post_init__(self):
        for cap in fields(self):
            self._check_value(cap.name, cap.type)
        self._check_order("image_min_pixels", "image_max_pixels")
        self._check_order("video_min_pixels", "video_max_pixels")

    def _check_value(self, name: str, kind: Any) -> None:
        value = getattr(self, name)
        least = 2 if name == "max_frames" else 1
        if kind is bool:
            valid = isinstance(value, bool)
            rule = "True or False"
        elif kind is float:
            valid = is_number(value, Real) and 0 < value < math.inf
            rule = "a number greater than 0"
        else:
            valid = is_number(value, Integral) and value >= least
            rule = f"a whole number of at least {least}"
        if kind == int | None:
            valid = valid or value is None
            rule = f"{rule} or None"
        if not valid:
            raise LcoError(f"media.{name} is {value!r:.60}; it must be {rule}")

    def _check_order(self, lower: str, upper: str) -> None:
        least, most = getattr(self, lower), getattr(self, upper)
        if least is not None and most is not None and least > most:
            raise LcoError(f"media.{lower} is {least}, and {upper} only {most}")


@dataclass(frozen=True)
class MediaFile:
    """The encoded bytes of a medium, within the caps.

    label: how errors begin, for example "input 3: image cat.png". content: the bytes, or the path
    of a regular file.
    """

    label: str
    content: bytes | Path

    def open(self) -> BinaryIO:
        """A new stream of the bytes, at their beginning."""
        if isinstance(self.content, bytes):
            return io.BytesIO(self.content)
        with _reading(self.label):
            return self.content.open("rb")


def resolve(
    source: Any, kind: str, where: str, config: MediaConfig, or_else: str = ""
) -> MediaFile:
    """The file that a path, a file:// or data: URI, an http(s) URL, bytes or an open file mean.

    A MediaFile is returned as it is. URLs are fetched here, into memory. Files are opened only if
    they are regular ones, and are not read yet.

    kind: "image", "audio" or "video", for errors. or_else: what else a caller takes, for errors.
    Raises for other types, where there is nothing to read, and for more bytes than the caps allow.
    """
    if isinstance(source, MediaFile):
        return source
    if isinstance(source, bytes | bytearray):
        return _in_memory(bytes(source), f"{where}: {kind} of {len(source)} bytes", config)
    if hasattr(source, "read") and not isinstance(source, os.PathLike):
        return _in_memory(*_read_open(source, f"{where}: {kind}", config), config)
    if not isinstance(source, str | os.PathLike):
        raise LcoError(
            f"{where}: {kind} cannot be a {type(source).__name__}; give a path, bytes, "
            f"a data: URI, a URL{or_else}"
        )
    name = os.fsdecode(source)
    scheme = _scheme(name)
    if scheme == "data":
        return _from_data_uri(name, f"{where}: {kind} in a data: URI", config)
    label = f"{where}: {kind} {_shown(name)}"
    if scheme in ("http", "https"):
        return _from_url(name, label, config)
    if scheme == "file":
        return _from_path(_path_of(name), label, config)
    if scheme:
        raise LcoError(
            f"{label} cannot be fetched; give a path, or a data:, file:, http: or https: address"
        )
    return _from_path(name, label, config)


def local_path(name: str | os.PathLike[str]) -> str | None:
    """The path that a path or a file:// URI names, its ~ expanded; None for other addresses."""
    name = os.fsdecode(name)
    scheme = _scheme(name)
    if scheme == "file":
        return _path_of(name)
    return None if scheme else os.path.expanduser(name)


def _scheme(name: str) -> str:
    """The scheme of an address in lower case, or "" for a path."""
    found = re.match("data(?=:)|[a-z][a-z0-9+.-]+(?=://)", name, re.IGNORECASE)
    return found[0].lower() if found else ""


def _path_of(uri: str) -> str:
    """The path in a file:// URI. It may be percent-encoded."""
    path = uri[len("file://") :].removeprefix("localhost")
    try:
        return path if os.path.exists(path) else unquote(path)
    except ValueError:  # a NUL
        return path


def _shown(name: str) -> str:
    """A path or URL for errors: on one line, not too long, and without the secrets in a URL."""
    if _scheme(name) in ("http", "https"):
        try:
            parts = urlsplit(name)
            name = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        except ValueError:  # an invalid URL has no secrets; fetching it shows what is wrong
            pass
    return printable(name if len(name) <= 200 else f"{name[:200]}…")


def _from_path(name: str, label: str, config: MediaConfig) -> MediaFile:
    with _reading(label):
        path = Path(name).expanduser()
        status = path.stat()
    if stat.S_ISDIR(status.st_mode):
        raise LcoError(f"{label} is a folder; give a file")
    if not stat.S_ISREG(status.st_mode):  # to open a pipe would wait for someone to write to it
        raise LcoError(f"{label} is a pipe or a device; give a regular file")
    check_bytes(status.st_size, label, config)
    with _reading(label):
        path.open("rb").close()
    return MediaFile(label, path)


@contextmanager
def _reading(label: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise LcoError(f"{label} does not exist") from error
    # ValueError: the name has a NUL; RuntimeError: there is no such user
    except (OSError, ValueError, RuntimeError) as error:
        raise LcoError(f"{label} cannot be read: {reason(error)}") from error


def _read_open(file: Any, label: str, config: MediaConfig) -> tuple[bytes, str]:
    """(the bytes of a file that a caller has opened, the label with its name).

    It is read from its beginning, where that can be, and left where it was. One file may be in
    several inputs, which different threads read.
    """
    name = getattr(file, "name", None)
    label = f"{label} {_shown(name)}" if isinstance(name, str) else f"{label} in an open file"
    if isinstance(file, io.TextIOBase):
        raise LcoError(f'{label} is open as text; open it with "rb"')
    with _open_files_lock, _reading(label):
        seekable = getattr(file, "seekable", bool)()
        place = file.tell() if seekable else 0
        if seekable:
            file.seek(0)
        content = file.read(config.max_file_bytes + 1)
        if seekable:
            file.seek(place)
    if not isinstance(content, bytes):
        raise LcoError(f'{label} does not give bytes; open it with "rb"')
    return content, label


def _from_data_uri(uri: str, label: str, config: MediaConfig) -> MediaFile:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise LcoError(f"{label} has no comma, after which its data would follow")
    content = unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        compact = b"".join(content.split())
        with explained(f"{label} is not valid base64", binascii.Error):
            content = base64.b64decode(compact, validate=True)
    return _in_memory(content, label, config)


def _in_memory(content: bytes, label: str, config: MediaConfig) -> MediaFile:
    check_bytes(len(content), label, config)
    return MediaFile(label, content)


def check_bytes(size: int, label: str, config: MediaConfig) -> None:
    """Raise for a medium without bytes, or with more than the caps allow."""
    if size == 0:
        raise LcoError(f"{label} is empty")
    if size > config.max_file_bytes:
        raise LcoError(
            f"{label} has {size} bytes or more, and max_file_bytes is {config.max_file_bytes}"
        )


def _from_url(url: str, label: str, config: MediaConfig) -> MediaFile:
    if not config.allow_remote:
        raise LcoError(f"{label} is remote, and nothing is fetched unless you set allow_remote")
    end = time.monotonic() + config.decode_seconds
    opener = urllib.request.OpenerDirector()
    for handler in URL_HANDLERS:
        opener.add_handler(handler())
    content = bytearray()
    with explained(f"{label} cannot be fetched", OSError, http.client.HTTPException, ValueError):
        request = urllib.request.Request(url, headers={"User-Agent": "lco-jax"})
        timeout = min(SOCKET_SECONDS, config.decode_seconds)
        with opener.open(request, timeout=timeout) as response:
            promised = response.length or 0
            # read1 returns what has come, so that a slow server cannot outlast the deadline
            while chunk := response.read1(CHUNK):
                content += chunk
                check_bytes(max(len(content), promised), label, config)
                if time.monotonic() > end:
                    raise LcoError(took_too_long(label, config))
    if len(content) < promised:
        raise LcoError(
            f"{label} cannot be fetched: the server sent {len(content)} of {promised} bytes"
        )
    return _in_memory(bytes(content), label, config)


def took_too_long(label: str, config: MediaConfig) -> str:
    """The sentence for a file that is slower than the caps allow."""
    return f"{label} takes more than {config.decode_seconds:g} seconds (decode_seconds)"


@contextmanager
def decoding(label: str) -> Iterator[None]:
    """Around calls of a decoder: whatever it raises becomes an LcoError that begins with `label`.

    On torn data decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error,
    IndexError, ZeroDivisionError, UnicodeDecodeError, av.FFmpegError, … A lack of memory stays
    what it is.
    """
    try:
        yield
    except (LcoError, MemoryError):
        raise
    except Exception as error:
        raise LcoError(f"{label} cannot be decoded: {reason(error)}") from error
