"""The process that decodes files for another one (`decoder.py`). It imports no jax.

    python -m lco_jax.data.decode_process PARENT

reads requests from its standard input and writes replies to its standard output, until the input
ends or the process PARENT is gone.
"""

import logging
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from lco_jax.core.bounds import OutOfTimeError, bounded
from lco_jax.core.errors import LcoError
from lco_jax.data.audio import decode_audio, decode_sound_of_video, resample
from lco_jax.data.decoder import SizeRule, receive, send
from lco_jax.data.frame_choice import FrameChoice
from lco_jax.data.images import decode_image
from lco_jax.data.lazy import Opened
from lco_jax.data.media import MediaConfig, MediaFile, took_too_long
from lco_jax.data.video import decode_video

PARENT_SECONDS = 1.0  # between looks for the parent
Request = dict[str, Any]


def _decode_samples(file: MediaFile, rate: float) -> np.ndarray:
    assert isinstance(file.content, bytes)
    return resample(np.frombuffer(file.content, np.float32), rate, file.label)


def _decode(request: Request, file: MediaFile, size_rule: SizeRule | None) -> np.ndarray:
    config = MediaConfig(**request["config"])
    with _bounds(file.label, config):
        match request["kind"]:
            case "image":
                opened = Opened(**request["opened"]) if "opened" in request else None
                array = decode_image(file, config, size_rule, opened)
            case "audio":
                array = decode_audio(file, config)
            case "sound":
                array = decode_sound_of_video(file, config)
            case "samples":
                array = _decode_samples(file, request["rate"])
            case _:
                choice = FrameChoice(**request["choice"])
                array = decode_video(file, config, size_rule, choice)
        return np.ascontiguousarray(array)


@contextmanager
def _bounds(label: str, config: MediaConfig) -> Iterator[None]:
    """What exceeds the bounds of a file, and does not end this process, gets a sentence."""
    try:
        with bounded(config.decode_seconds, config.max_decode_bytes):
            yield
    except MemoryError as error:
        raise LcoError(
            f"{label} needs more than {config.max_decode_bytes} bytes of memory to be decoded "
            "(max_decode_bytes)"
        ) from error
    except OutOfTimeError as error:
        raise LcoError(took_too_long(label, config)) from error


class _Warnings(logging.Handler):
    """Keeps what is logged, for the reply."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.messages.append(record.getMessage())


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Answer requests until there are no more."""
    warnings = _Warnings()
    logging.getLogger("lco_jax").addHandler(warnings)
    size_rule = partial(_ask_for_size, requests, replies)
    while True:
        try:
            request = receive(requests)
        except EOFError:
            return
        content = requests.read(request["bytes"])
        file = MediaFile(request["label"], Path(request["path"]) if "path" in request else content)
        reply, array = _answer(request, file, size_rule if request["has_size_rule"] else None)
        send(replies, reply | {"warnings": warnings.messages}, array)
        warnings.messages.clear()
        del content, file, array  # or they would lie in memory until the next file is decoded


def _ask_for_size(
    requests: BinaryIO, replies: BinaryIO, height: int, width: int, *frames: int
) -> tuple[int, int]:
    """The size that the parent wants a picture of this size to have. frames: as of `SizeRule`."""
    send(replies, {"size": [height, width, *frames]})
    asked_height, asked_width = receive(requests)["size"]
    return asked_height, asked_width


def _answer(
    request: Request, file: MediaFile, size_rule: SizeRule | None
) -> tuple[dict[str, Any], memoryview | bytes]:
    """(a reply, the bytes of its array)."""
    try:
        array = _decode(request, file, size_rule)
    except LcoError as error:
        return {"error": str(error)}, b""
    except Exception:  # a bug, which is raised where the request came from
        return {"bug": traceback.format_exc()}, b""
    content = array.data.cast("B") if array.size else b""
    return {"shape": array.shape, "dtype": array.dtype.str}, content


def _end_with(parent: int) -> None:
    """End when the parent does, also in the midst of a file."""
    while os.getppid() == parent:
        time.sleep(PARENT_SECONDS)
    os._exit(0)


def main() -> None:
    """Serve the parent that the command line names."""
    for kind in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # those are the parent's to answer
        signal.signal(kind, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "rb")
    replies = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what a decoder prints must not come between the replies
    with suppress(ImportError):  # an optional plugin of Pillow
        from pillow_heif import register_heif_opener

        register_heif_opener()
    Image.MAX_IMAGE_PIXELS = None  # our own cap holds, and this process has no other pictures
    threading.Thread(target=_end_with, args=(int(sys.argv[1]),), daemon=True).start()
    with suppress(BrokenPipeError):
        serve(requests, replies)


if __name__ == "__main__":
    main()
