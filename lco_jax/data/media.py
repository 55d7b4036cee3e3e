"""What images, sound and video share: the caps, where their bytes come from, and a fence around decoders."""

import base64
import binascii
import http.client
import io
import itertools
import math
import os
import re
import stat
import time
import urllib.request
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import unquote, unquote_to_bytes, urlsplit

import av
import numpy as np
from av.container import InputContainer

from lco_jax.core.errors import LcoError, explained, reason

SOCKET_SECONDS = 30.0  # how long a server may say nothing
CHUNK = 1 << 20  # bytes read from a server at once


def _cap(default: Any, meaning: str) -> Any:
    """A field of `MediaConfig`; `meaning` also stands in the help of `lco_jax.embed`."""
    return field(default=default, metadata={"meaning": meaning})


@dataclass(frozen=True)
class MediaConfig:
    """Every cap on what users give. Raises for a value that makes no sense, naming the field."""

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
    decode_seconds: float = _cap(120.0, "the longest that a file may take to fetch, and to decode")
    allow_remote: bool = _cap(
        False, "fetch http and https addresses; only for inputs that you trust with your network"
    )
    use_audio_in_video: bool = _cap(False, "embed a video file's own sound with it")

    def __post_init__(self):
        for cap in fields(self):
            value = getattr(self, cap.name)
            if cap.type is bool:
                good, rule = isinstance(value, bool), "True or False"
            elif cap.type is float:
                good = _is(value, Real) and math.isfinite(value) and value > 0
                rule = "a number greater than 0"
            else:
                least = 2 if cap.name == "max_frames" else 1
                rule = f"a whole number of at least {least}" + (
                    " or None" if cap.type is not int else ""
                )
                good = (value is None and cap.type is not int) or (
                    _is(value, Integral) and value >= least
                )
            if not good:
                raise LcoError(f"media.{cap.name} is {value!r:.60}; it must be {rule}")
        for kind in ("image", "video"):
            least, most = getattr(self, f"{kind}_min_pixels"), getattr(self, f"{kind}_max_pixels")
            if least is not None and most is not None and least > most:
                raise LcoError(
                    f"media.{kind}_min_pixels is {least}, and {kind}_max_pixels only {most}"
                )


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)  # True is an int in Python


@dataclass(frozen=True)
class Medium:
    """A source that was found and is within the caps.

    label: how errors begin, for example "input 3: image cat.png". content: the bytes, or the path of a regular file.
    """

    label: str
    content: bytes | Path

    def open(self) -> BinaryIO:
        """A fresh stream over the content, at its beginning."""
        return (
            io.BytesIO(self.content)
            if isinstance(self.content, bytes)
            else open(self.content, "rb")
        )


def resolve(source: Any, kind: str, where: str, config: MediaConfig, or_else: str = "") -> Medium:
    """Find what a path, file:// or data: URI, http(s) URL or bytes stand for; a Medium is returned as it is.

    kind: "image", "audio" or "video", for errors. or_else: what else a caller takes, for errors. Raises for what is
    neither, if there is nothing to read, and for more than the caps allow.
    URLs are fetched here, into memory; files are only looked at, and never opened if they are not regular ones.
    """
    if isinstance(source, Medium):
        return source
    if not isinstance(source, str | os.PathLike | bytes | bytearray):
        given = (
            "numpy array without its rate"
            if isinstance(source, np.ndarray)
            else type(source).__name__
        )  # of sound
        what = {"image": "an image", "video": "a video"}.get(kind, kind)
        raise LcoError(
            f"{where}: {what} cannot be a {given}; give a path, bytes, a data: URI, a URL{or_else}"
        )
    if isinstance(source, bytes | bytearray):
        return _in_memory(bytes(source), f"{where}: {kind} of {len(source)} bytes", config)
    name = os.fsdecode(source)
    found = re.match("data(?=:)|[a-z][a-z0-9+.-]+(?=://)", name, re.IGNORECASE)
    scheme = found[0].lower() if found else ""
    if scheme == "data":
        return _from_data_uri(name, f"{where}: {kind} in a data: URI", config)
    if scheme in ("http", "https"):
        return _from_url(name, f"{where}: {kind} {_shown(name)}", config)
    if scheme == "file":
        name = name[len("file://") :].removeprefix("localhost")
        name = name if os.path.exists(name) else unquote(name)
    elif scheme:
        raise LcoError(
            f"{where}: {kind} {_shown(name)} cannot be fetched; give a path, or a data:, file:, http: or https: address"
        )
    return _from_path(name, f"{where}: {kind} {_shown(name)}", config)


def _from_path(name: str, label: str, config: MediaConfig) -> Medium:
    try:
        path = Path(name).expanduser()
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            raise LcoError(f"{label} is a folder; give a file")
        if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for someone to write to it
            raise LcoError(f"{label} is a pipe or a device; give a regular file")
        if found.st_size == 0:
            raise LcoError(f"{label} is empty")
        _check_bytes(found.st_size, label, config)
        path.open("rb").close()
    except FileNotFoundError:
        raise LcoError(f"{label} does not exist") from None
    except (
        OSError,
        ValueError,
        RuntimeError,
    ) as error:  # ValueError: a NUL; RuntimeError: nobody's home
        raise LcoError(f"{label} cannot be read: {reason(error)}") from None
    return Medium(label, path)


def _from_data_uri(uri: str, label: str, config: MediaConfig) -> Medium:
    header, comma, payload = uri.partition(",")
    if not comma:
        raise LcoError(f"{label} has no comma, after which its data would follow")
    _check_bytes(len(payload) // 4 * 3, label, config)
    content = unquote_to_bytes(payload)
    if header.lower().endswith(";base64"):
        with explained(f"{label} is not valid base64", binascii.Error):
            content = base64.b64decode(b"".join(content.split()), validate=True)
    return _in_memory(content, label, config)


def _in_memory(content: bytes, label: str, config: MediaConfig) -> Medium:
    if not content:
        raise LcoError(f"{label} is empty")
    _check_bytes(len(content), label, config)
    return Medium(label, content)


def _from_url(url: str, label: str, config: MediaConfig) -> Medium:
    if not config.allow_remote:
        raise LcoError(f"{label} is remote, and nothing is fetched unless you set allow_remote")
    deadline = Deadline(config.decode_seconds, label)
    # no handler for ftp:, file: or data:, which a redirect may ask for
    opener = urllib.request.OpenerDirector()
    for handler in (
        urllib.request.ProxyHandler,
        urllib.request.UnknownHandler,
        urllib.request.HTTPHandler,
        urllib.request.HTTPSHandler,
        urllib.request.HTTPDefaultErrorHandler,
        urllib.request.HTTPRedirectHandler,
        urllib.request.HTTPErrorProcessor,
    ):
        opener.add_handler(handler())
    content = bytearray()
    with explained(f"{label} cannot be fetched", OSError, http.client.HTTPException, ValueError):
        request = urllib.request.Request(url, headers={"User-Agent": "lco-jax"})
        with opener.open(request, timeout=min(SOCKET_SECONDS, config.decode_seconds)) as response:
            promised = int(response.headers.get("Content-Length") or 0)
            _check_bytes(promised, label, config)
            while chunk := response.read1(
                CHUNK
            ):  # what has come, so that a slow server cannot outlast the deadline
                content += chunk
                _check_bytes(len(content), label, config)
                deadline.check()
    if len(content) < promised:
        raise LcoError(
            f"{label} cannot be fetched: the server sent {len(content)} of {promised} bytes"
        )
    return _in_memory(bytes(content), label, config)


def _check_bytes(size: int, label: str, config: MediaConfig) -> None:
    if size > config.max_file_bytes:
        raise LcoError(
            f"{label} has {size} bytes or more, and max_file_bytes is {config.max_file_bytes}"
        )


def _shown(name: str) -> str:
    """A path or URL for errors: on one line, not too long, and without the secrets that URLs carry."""
    if re.match("https?://", name, re.IGNORECASE):
        try:
            parts = urlsplit(name)
            name = f"{parts.scheme}://{parts.hostname or ''}{parts.path}"
        except ValueError:  # no valid URL: it carries nothing, and fetching it says what is wrong
            pass
    name = name if len(name) <= 200 else f"{name[:200]}…"
    return name if name.isprintable() else ascii(name)


class Deadline:
    """The wall clock that one item may take."""

    def __init__(self, seconds: float, label: str):
        self.seconds, self.label, self.end = seconds, label, time.monotonic() + seconds

    def check(self) -> None:
        """Raise if the time is over."""
        if time.monotonic() > self.end:
            raise LcoError(
                f"{self.label} takes more than {self.seconds:g} seconds (decode_seconds)"
            )


def decoding(label: str) -> AbstractContextManager[None]:
    """Around calls of a decoder: whatever it raises becomes an LcoError that begins with `label`."""
    # on torn data decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error, IndexError,
    # ZeroDivisionError, MemoryError, UnicodeDecodeError, av.FFmpegError, …
    return explained(f"{label} cannot be decoded", Exception)


class _TimedStream:
    """A binary stream whose reads raise after the deadline, which ends any search through a file."""

    def __init__(self, stream: BinaryIO, deadline: Deadline):
        self.stream, self.deadline = stream, deadline
        self.seek, self.tell = stream.seek, stream.tell

    def read(self, size: int) -> bytes:
        self.deadline.check()
        return self.stream.read(size)


def _no_other_file(*_: Any) -> None:
    raise PermissionError("it refers to another file")


@contextmanager
def open_container(medium: Medium, deadline: Deadline, max_pixels: int) -> Iterator[InputContainer]:
    """A file opened with PyAV. Frames of more than `max_pixels` are not decoded.

    Playlists and the like name other files and addresses, which an input must not reach. It takes both to hold FFmpeg
    to this one stream: some formats ask `io_open`, others open with a context of their own, which inherits the list.
    """
    with (
        medium.open() as stream,
        av.open(
            _TimedStream(stream, deadline),
            options={"protocol_whitelist": "none"},
            io_open=_no_other_file,
            metadata_errors="replace",
        ) as container,
    ):
        for track in container.streams.video:
            if track.codec_context is not None:
                track.codec_context.options = {"max_pixels": str(max_pixels)}
        yield container


def packets(container: InputContainer, stream: Any, deadline: Deadline) -> Iterator[av.Packet]:
    """The packets of a stream that hold something. A torn end is an end."""
    demuxed = container.demux(stream)
    while True:
        deadline.check()
        try:
            packet = next(demuxed, None)
        except av.FFmpegError:
            deadline.check()
            return
        if packet is None:
            return
        if packet.size:  # a decoder would take an empty one as the end
            yield packet


def decoded(container: InputContainer, stream: Any, deadline: Deadline) -> Iterator[Any]:
    """The frames of a stream, in order. Torn packets are skipped."""
    for packet in itertools.chain(
        packets(container, stream, deadline), [None]
    ):  # None: what the decoder still holds
        try:
            yield from stream.decode(packet)
        except av.FFmpegError:
            deadline.check()
