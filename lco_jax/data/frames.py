"""The frames of a video file, by their number: found by seeking where that is shorter."""

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import groupby
from typing import NamedTuple

import av
import numpy as np
from av.container import InputContainer
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from lco_jax.core.errors import LcoError
from lco_jax.data.containers import decoded, open_container, packets
from lco_jax.data.images import check_size
from lco_jax.data.media import MediaConfig, MediaFile, decoding

# Decoders that give one frame a packet, and the same ones from a key frame on. What a file of
# theirs really does is compared with its packets while it is read.
SEEKABLE = (
    *("h264", "hevc", "av1", "vp8", "vp9", "mpeg4", "mpeg1video", "mpeg2video"),
    *("mjpeg", "prores", "dnxhd"),
)
MOST_SOUGHT = 0.5  # of the frames; to decode them all is simpler


class NotSought(Exception):
    """A file's frames are not those that its packets promise: all have to be decoded."""


class _Key(NamedTuple):
    """A key frame, from which a decoder can begin. shown, sent: its times in the stream's unit."""

    shown: int
    sent: int


class _Sent(NamedTuple):
    """What is kept of a packet, whose data would fill the memory."""

    pts: int | None
    dts: int | None
    is_key: bool


class _Index(NamedTuple):
    """What the packets of a stream promise.

    total: how many there are. shown: the times of their frames, in order; none where packets do not
    tell. keys: those of them that are key frames.
    """

    total: int
    shown: Sequence[int] = ()
    keys: Sequence[_Key] = ()

    def key_of(self, number: int) -> _Key | None:
        """The last key frame that is not after a frame."""
        place = bisect_right(self.keys, self.shown[number], key=_shown)
        return self.keys[place - 1] if place else None


def _shown(key: _Key) -> int:
    return key.shown


class FrameReader:
    """Reads a video file from its beginning, as often as needed.

    found: how many frames `all_decoded` has met.
    """

    def __init__(self, file: MediaFile, config: MediaConfig):
        self.file = file
        self.config = config
        self.found = 0

    def header(self) -> tuple[int, float]:
        """(the number of frames, frames a second). They may be wrong."""
        with open_container(self.file, self.config) as container:
            stream = _pictures(container, self.file.label)
            width, height = stream.width, stream.height
            if width and height:  # each kept frame is checked again
                check_size(width, height, self.file.label, self.config)
            rate = stream.average_rate or stream.guessed_rate or self.config.fps
        return self.index.total, float(rate)

    @cached_property
    def index(self) -> _Index:
        """What the packets promise. They are read, and not decoded."""
        with open_container(self.file, self.config) as container:
            stream = _pictures(container, self.file.label)
            sent = [
                _Sent(one.pts, one.dts, one.is_keyframe)
                for one in packets(container, stream)
                if not one.is_discard
            ]
            known = stream.codec_context.name in SEEKABLE
            return _index(sent) if known else _Index(len(sent))

    def count(self) -> int:
        """How many frames there are. Every frame is decoded."""
        for _ in self.all_decoded(()):
            pass
        return self.found

    def all_decoded(self, wanted: Iterable[int]) -> Iterator[np.ndarray]:
        """The frames of these numbers, as uint8 [X, Y, 3]. Every frame is decoded."""
        self.found = 0
        numbers = set(wanted)
        with open_container(self.file, self.config) as container:
            stream = _pictures(container, self.file.label)
            for frame in decoded(container, stream):
                if self.found in numbers:
                    yield self._pixels(frame)
                self.found += 1

    def sought(self, wanted: Sequence[int]) -> Iterator[np.ndarray]:
        """The same, and only what stands between them and the key frames before them is decoded.

        Gives nothing where that is no gain. Raises `NotSought`.
        """
        groups = self._groups(wanted)
        if not groups:
            return
        with open_container(self.file, self.config) as container:
            stream = _pictures(container, self.file.label)
            for key, numbers in groups:
                yield from self._from_key(container, stream, key, numbers)

    def _groups(self, wanted: Sequence[int]) -> list[tuple[_Key, list[int]]]:
        """The key frames to seek and the frames to read from each; none where that is no gain."""
        index = self.index
        if not index.keys or wanted[-1] >= len(index.shown) or index.key_of(wanted[0]) is None:
            return []
        groups = [(key, list(numbers)) for key, numbers in groupby(wanted, index.key_of)]
        decoded_count = 0
        for key, numbers in groups:
            assert key is not None
            decoded_count += numbers[-1] + 1 - bisect_left(index.shown, key.shown)
        if decoded_count > MOST_SOUGHT * index.total:
            return []
        return groups  # type: ignore[return-value]

    def _from_key(
        self, container: InputContainer, stream: VideoStream, key: _Key, numbers: list[int]
    ) -> Iterator[np.ndarray]:
        """The frames of these numbers, which follow a key frame. Raises `NotSought`."""
        number = bisect_left(self.index.shown, key.shown)
        for frame in _frames_from(container, stream, key):
            if frame.pts is not None and frame.pts < key.shown:
                continue  # it belongs before the key frame, and lacks what it is made from
            if frame.is_corrupt or frame.pts != self.index.shown[number]:
                raise NotSought
            if number in numbers:
                yield self._pixels(frame)
            number += 1
            if number > numbers[-1]:
                return
        raise NotSought

    def _pixels(self, frame: VideoFrame) -> np.ndarray:
        check_size(frame.width, frame.height, self.file.label, self.config)
        with decoding(self.file.label):
            pixels = frame.to_ndarray(format="rgb24")
            return _upright(pixels, frame) if self.config.upright else pixels


def _index(sent: Sequence[_Sent]) -> _Index:
    """Of packets in the order of decoding."""
    unknown = _Index(len(sent))
    shown = sorted(packet.pts for packet in sent if packet.pts is not None)
    if len(set(shown)) < len(sent):
        return unknown
    keys = [
        _Key(packet.pts, packet.pts if packet.dts is None else packet.dts)
        for packet in sent
        if packet.pts is not None and packet.is_key
    ]
    return _Index(len(sent), shown, sorted(keys))


def _frames_from(container: InputContainer, stream: VideoStream, key: _Key) -> Iterator[VideoFrame]:
    """The frames from a key frame on. Raises `NotSought` for a torn packet."""
    try:
        container.seek(key.sent, stream=stream)
        begun = False
        for packet in packets(container, stream):
            begun = begun or packet.pts == key.shown
            if begun:
                yield from stream.decode(packet)
        yield from stream.decode(None)
    except av.FFmpegError as error:
        raise NotSought from error


def _pictures(container: InputContainer, label: str) -> VideoStream:
    """The first video stream that is no cover picture and has a decoder."""
    for stream in container.streams.video:
        if stream.codec_context is not None and not stream.disposition & Disposition.attached_pic:
            stream.thread_type = "AUTO"
            return stream
    raise LcoError(f"{label} has no video stream that can be decoded")


def _upright(pixels: np.ndarray, frame: VideoFrame) -> np.ndarray:
    """A frame turned by its display matrix, to the nearest quarter.

    The matrix moves a pixel from (x, y) to (a x + c y, b x + d y).
    """
    side = frame.side_data.get(SideData.DISPLAYMATRIX)
    if side is None:
        return pixels
    a, b, _, c, d = np.frombuffer(bytes(side), np.int32)[:5].astype(np.int64).tolist()
    across, down = a, d
    if abs(b) > abs(a):
        pixels = pixels.transpose(1, 0, 2)
        across, down = c, b
    if across < 0:
        pixels = pixels[:, ::-1]
    if down < 0:
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)
