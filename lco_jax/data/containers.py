"""Files opened with FFmpeg, through PyAV: their packets and frames."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import av
from av.container import InputContainer

from lco_jax.data.media import MediaConfig, MediaFile, decoding

THREADS = 4  # of a decoder: each keeps a few frames in memory


def _no_other_file(*_: Any) -> None:
    raise PermissionError("it refers to another file")


@contextmanager
def open_container(file: MediaFile, config: MediaConfig) -> Iterator[InputContainer]:
    """A file opened with PyAV. It does not decode frames of more than `config.max_image_pixels`.

    Playlists and the like name other files and addresses, which an input must not reach. Two
    options together keep FFmpeg to this one stream: some formats ask `io_open`, others open with a
    new context, which inherits the whitelist.
    """
    with file.open() as stream:
        with decoding(file.label):
            container = av.open(
                stream,
                options={"protocol_whitelist": "none"},
                io_open=_no_other_file,
                metadata_errors="replace",
            )
        with container:
            for track in container.streams.video:
                if track.codec_context is not None:
                    track.codec_context.options = {"max_pixels": str(config.max_image_pixels)}
                    track.codec_context.thread_count = THREADS
            yield container


def packets(container: InputContainer, stream: Any) -> Iterator[av.Packet]:
    """The packets of a stream that have data. A torn file ends where it is torn."""
    demuxed = container.demux(stream)
    while True:
        try:
            packet = next(demuxed, None)
        except av.FFmpegError:
            packet = None
        if packet is None:
            return
        if packet.size:  # a decoder would take an empty one for the end
            yield packet


def decoded(container: InputContainer, stream: Any) -> Iterator[Any]:
    """The frames of a stream, in order. Torn packets are skipped."""
    end = [None]  # asks the decoder for the frames that it still has
    for packet in itertools.chain(packets(container, stream), end):
        with suppress(av.FFmpegError):
            yield from stream.decode(packet)
