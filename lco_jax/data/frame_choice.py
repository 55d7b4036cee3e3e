"""Which frames of a video are taken, by their numbers."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, Self

import numpy as np

from lco_jax.core.errors import LcoError, is_number
from lco_jax.data.media import MediaConfig

MIN_FRAMES = 4  # of a file; this and the factor are the reference's
FACTOR = 2  # frames that the model takes together


@dataclass(frozen=True)
class FrameChoice:
    """What a video's part asks for, in Qwen's words and with the meaning of their qwen_vl_utils.

    nframes: how many frames are taken, to the nearest even number; None: as many as the rate and
    the caps of `MediaConfig` say. video_start, video_end: in seconds; frames come from between.
    """

    nframes: int | None = None
    video_start: float | None = None
    video_end: float | None = None

    @classmethod
    def of_part(cls, part: Mapping[str, Any], where: str) -> Self:
        """The choice of a video's part. Raises for values of another type. where: for errors."""
        choice = cls(**{one.name: part[one.name] for one in fields(cls) if one.name in part})
        if choice.nframes is not None and "fps" in part:
            raise LcoError(f"{where} has both fps and nframes; keep one")
        count = choice.nframes
        if count is not None and (not is_number(count, Integral) or count < FACTOR):
            raise LcoError(f"{where}: nframes is {count!r:.40}; it must be a whole number above 1")
        for name in ("video_start", "video_end"):
            seconds = getattr(choice, name)
            if seconds is not None and not (is_number(seconds, Real) and math.isfinite(seconds)):
                raise LcoError(f"{where}: {name} is {seconds!r:.40}; give seconds")
        return choice

    @property
    def is_part(self) -> bool:
        """Whether frames come from a part of the video."""
        return self.video_start is not None or self.video_end is not None

    def why_not(self, total: int, rate: float | None) -> str | None:
        """Why a video of `total` frames, `rate` a second, has no such frames; None if it has them.

        rate: None if it is not known.
        """
        if self.is_part and rate is None:
            return "video_start and video_end need its rate; give its fps, too"
        first, last = self._stretch(total, rate)
        if self.is_part and first >= last:
            asked = f"video_start {self.video_start} and video_end {self.video_end}"
            return f"it lasts {total / rate:.2f} seconds, without two frames between {asked}"
        count = last - first + 1
        if self.nframes is not None and self._even > count:
            return f"nframes is {self.nframes}, and there are {count} frames"
        return None

    def frames(
        self, total: int, rate: float | None, keep: Callable[[int], int], label: str
    ) -> list[int]:
        """The numbers of the frames to take, in order.

        total: how many there are. rate: in frames a second, if it is known. keep: how many are
        taken of so many, unless `nframes` says it. label: how errors begin. Raises where the video
        has no such frames.
        """
        if why_not := self.why_not(total, rate):
            raise LcoError(f"{label}: {why_not}")
        first, last = self._stretch(total, rate)
        count = last - first + 1
        kept = keep(count) if self.nframes is None else self._even
        return sampled_indices(count, kept, first).tolist()

    @property
    def _even(self) -> int:
        """The even number of frames that is nearest to `nframes`."""
        return round(self.nframes / FACTOR) * FACTOR

    def _stretch(self, total: int, rate: float | None) -> tuple[int, int]:
        """The first and the last frame between the seconds that are asked for."""
        first, last = 0, total - 1
        if rate is None or not self.is_part:
            return first, last
        seconds = total / rate
        if self.video_start is not None:
            first = math.ceil(min(max(float(self.video_start), 0.0), seconds) * rate)
        if self.video_end is not None:
            last = min(math.floor(min(max(float(self.video_end), 0.0), seconds) * rate), last)
        return first, last


def sampled_indices(total: int, kept: int, first: int = 0) -> np.ndarray:
    """int64 [kept]: which of `total` frames from `first` on are kept; both ends are among them.

    In float32 and from both ends, as torch.linspace does it: the reference rounds its values, and
    halves are common.
    """
    if kept == 1:
        return np.full(1, first, np.int64)
    index = np.arange(kept, dtype=np.float32)
    start, last = np.float32(first), np.float32(first + total - 1)
    step = (last - start) / np.float32(kept - 1)
    from_start = start + step * index
    from_end = last - step * index[::-1]
    values = np.where(index < kept // 2, from_start, from_end)
    return np.rint(values).astype(np.int64)


def frames_to_keep(total: int, rate: float, config: MediaConfig) -> int:
    """The reference's rule: an even number, as many as `config.fps` takes, 4 to `max_frames`."""
    most = min(config.max_frames // FACTOR * FACTOR, total)
    wanted = min(max(total / rate * config.fps, MIN_FRAMES), most)
    return max(int(wanted) // FACTOR * FACTOR, 1)
