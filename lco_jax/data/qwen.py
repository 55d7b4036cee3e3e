"""Qwen2.5-VL's and Qwen2.5-Omni's processor without torch: media -> patches and mels, placeholders -> tokens.

Dimensions: T pictures of a clip, X and Y their height and width, V values of a patch, C mel channels.
Sources: processing_qwen2_5_vl.py, processing_qwen2_5_omni.py and `get_rope_index` of the two models. Where transformers
4.57 and 5.x differ (the positions of Qwen2.5-VL's videos), 4.57 is the default: LCO was trained with it.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np
from transformers import WhisperFeatureExtractor

from lco_jax.core.errors import LcoError
from lco_jax.data.audio import load_audio
from lco_jax.data.images import load_image
from lco_jax.data.media import MediaConfig
from lco_jax.data.pixels import processor_config, read_scale, resize
from lco_jax.data.positions import frame_times, grid_positions, interleave, line_positions
from lco_jax.data.tower_rows import (
    ChunkRows,
    MediaTokens,
    Mel,
    Patches,
    PatchRows,
    Processed,
    TowerInput,
    TowerRows,
    mel_tokens,
)
from lco_jax.data.video import load_video

ASSUMED_FPS = (
    2.0  # what the processors assume of a clip, and the reference never tells them otherwise
)
IMAGE_PIXELS = (3_136, 1_003_520)  # the least and most of an image, and
VIDEO_PIXELS = (100_352, 602_112)  # of a clip's picture, where a checkpoint does not say
# of a medium: (tokens, positions, [(tower, item, index of its tokens in the block)], the next text's position)
Block = tuple[np.ndarray, np.ndarray, list[tuple[str, TowerInput, np.ndarray]], int]
# The tower's rows: of stills, which have one picture a patch, and of clips, which have as many as the tower takes
# together. So a still travels to the device once, whatever travels with it.
STILLS, CLIPS = "visual", "visual/clips"
VIDEO_POSITIONS = ("4.57", "5")  # whose rule of Qwen2.5-VL's video positions


@dataclass(frozen=True)
class Clip:
    """A video. patches: its pictures; seconds_per_frame: of a pair of pictures; sound: what is heard meanwhile."""

    patches: Patches
    seconds_per_frame: float
    sound: Mel | None


class QwenMedia:
    """Media of one checkpoint. video_positions: "4.57" (what LCO was trained with) or "5", for Qwen2.5-VL's videos."""

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        media: MediaConfig,
        video_positions: str = "4.57",
    ):
        if video_positions not in VIDEO_POSITIONS:
            raise LcoError(
                f"video_positions is {video_positions!r}; it is one of: {', '.join(VIDEO_POSITIONS)}"
            )
        self.folder, self.media, self.video_positions = folder, media, video_positions
        self.omni = "audio_config" in config
        vision = config["vision_config"]
        self.merge, self.patch = vision["spatial_merge_size"], vision["patch_size"]
        self.frames_per_patch = vision["temporal_patch_size"]
        window = vision["window_size"] // self.patch
        stills, clips = (
            PatchRows(window, self.merge, (3, pictures, self.patch**2))
            for pictures in (1, self.frames_per_patch)
        )
        self.rows: dict[str, TowerRows] = {STILLS: stills, CLIPS: clips}
        if self.omni:
            audio = config["audio_config"]
            self.rows["audio_tower"] = ChunkRows(audio["n_window"], audio["num_mel_bins"])
        self.ids_per_second = (
            config["position_id_per_seconds"] if self.omni else vision["tokens_per_second"]
        )
        self.ids_per_chunk = int(self.ids_per_second * config.get("seconds_per_chunk", 0))

        def token(name: str) -> int | None:
            return next(
                (
                    config[key]
                    for key in (f"{name}_token_id", f"{name}_token_index")
                    if key in config
                ),
                None,
            )

        self.placeholders = {
            kind: token(kind) for kind in ("image", "video", "audio") if token(kind) is not None
        }
        self.audio_bos, self.audio_eos = token("audio_start"), token("audio_end")

    # ---- media

    @cached_property
    def scale(self) -> np.ndarray:
        """How pictures are normalised: float32 [3, 3], as of `read_scale`."""
        return read_scale(self.folder)

    @cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        """transformers' own. Raises if it hears less than the caps let through."""
        config, where = processor_config(self.folder, "feature_extractor")
        extractor = WhisperFeatureExtractor.from_dict(config)
        if self.media.max_audio_seconds * extractor.sampling_rate > extractor.n_samples:
            most = extractor.n_samples // extractor.sampling_rate
            raise LcoError(
                f"media.max_audio_seconds is {self.media.max_audio_seconds}, and {where} takes {most}"
            )
        return extractor

    @cached_property
    def image_pixels(self) -> tuple[int, int]:
        """The least and most pixels of an image: the caller's, or else the checkpoint's."""
        low, high = _limits(processor_config(self.folder, "image_processor")[0], IMAGE_PIXELS)
        return self.media.image_min_pixels or low, self.media.image_max_pixels or high

    @cached_property
    def video_pixels(self) -> tuple[int, int]:
        """The least and most pixels of a clip's picture. Omni's processor has limits of its own, whatever files say."""
        config = {} if self.omni else processor_config(self.folder, "video_processor")[0]
        low, high = _limits(config, VIDEO_PIXELS)
        high = min(high, self.media.video_max_pixels or high)
        return min(self.media.video_min_pixels or low, high), high

    def load(self, part: dict[str, Any], where: str) -> Patches | Mel | Clip:
        """The medium of a chat part. A part may carry its own min_pixels and max_pixels."""
        kind = part["type"]
        if kind == "image":
            return self._image(part, where)
        if kind == "audio" and self.omni:
            return self._mel(load_audio(part["audio"], where, self.media))
        if kind == "video":
            return self._video(part, where)
        raise LcoError(f"{where} has {kind}, which this checkpoint does not take")

    def _image(self, part: dict[str, Any], where: str) -> Patches:
        low, high = _pixels(part, self.image_pixels, where)
        image = np.asarray(load_image(part["image"], where, self.media))
        size = smart_resize(*image.shape[:2], self.patch * self.merge, low, high)
        return self._patches(resize(image, *size)[None], 1)

    def _video(self, part: dict[str, Any], where: str) -> Clip:
        low, high = _pixels(part, self.video_pixels, where)

        def fit(frames: int, height: int, width: int) -> tuple[int, int]:
            return smart_resize(height, width, self.patch * self.merge, low, high)

        try:
            media = replace(
                self.media, **{key: part[key] for key in ("fps", "max_frames") if key in part}
            )
        except LcoError as error:
            raise LcoError(f"{where}: {error}") from None
        video = load_video(part["video"], where, media, fit)
        if video.audio is not None and not self.omni:
            raise LcoError(f"{where} has a video with sound, which this checkpoint does not take")
        sound = None if video.audio is None else self._mel(video.audio)
        seconds = self.frames_per_patch / (video.fps or ASSUMED_FPS)
        return Clip(self._patches(video.frames, self.frames_per_patch), seconds, sound)

    def _patches(self, frames: np.ndarray, together: int) -> Patches:
        """uint8 [T, X, Y, 3] -> patches of `together` pictures; the last stands in for those that are missing."""
        p, m, t = self.patch, self.merge, together
        frames = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % t, axis=0)])
        grid = len(frames) // t, frames.shape[1] // p, frames.shape[2] // p
        values = frames.reshape(grid[0], t, grid[1] // m, m, p, grid[2] // m, m, p, 3)
        values = values.transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)
        return Patches(values.reshape(math.prod(grid), 3, t, p * p), grid, self.scale)

    def _mel(self, audio: np.ndarray) -> Mel:
        """float32 samples at 16 kHz -> [ceil(samples / hop), C].

        The extractor pads to 300 s before its transform. Frames past the sound's end only need the silence that they
        look at, so a little of it gives the same numbers in a hundredth of the time.
        """
        extractor = self.feature_extractor
        hop = extractor.hop_length
        room = min(-(-(len(audio) + extractor.n_fft) // hop) * hop, extractor.n_samples)
        mel = extractor(
            audio,
            sampling_rate=extractor.sampling_rate,
            max_length=room,
            truncation=True,
            return_tensors="np",
        )["input_features"][0]
        return Mel(np.ascontiguousarray(mel[:, : -(-len(audio) // hop)].T, np.float32))

    # ---- tokens

    def expand(self, ids: np.ndarray, media: list[tuple[str, Any]], where: str) -> Processed:
        """Token ids with one placeholder a medium -> the tokens and positions of the whole.

        media: (kind, what `load` made of it), in the order of their placeholders.
        """
        kinds = {token: kind for kind, token in self.placeholders.items()}
        found = np.flatnonzero(np.isin(ids, list(kinds)))
        if [kinds[int(ids[i])] for i in found] != [kind for kind, _ in media]:
            raise LcoError(
                f"{where}: its {len(media)} media are not its placeholders; is a special token in its text?"
            )
        tokens, positions, placed = [], [], []
        begin, position, length = 0, 0, 0
        for at, (kind, medium) in zip(found, media, strict=True):
            tokens.append(ids[begin:at])
            positions.append(line_positions(position, at - begin))
            length, position = length + at - begin, position + at - begin
            block, where_to, parts, position = self._block(kind, medium, int(position))
            placed += [MediaTokens(tower, item, length + index) for tower, item, index in parts]
            tokens.append(block)
            positions.append(where_to)
            length, begin = length + len(block), at + 1
        tokens.append(ids[begin:])
        positions.append(line_positions(position, len(ids) - begin))
        return Processed(np.concatenate(tokens), np.concatenate(positions), tuple(placed))

    def _block(self, kind: str, medium: Any, start: int) -> Block:
        if kind == "audio":
            length = mel_tokens(len(medium.values))
            block = np.full(length, self.placeholders["audio"], np.int32)
            return (
                block,
                line_positions(start, length),
                [("audio_tower", medium, np.arange(length))],
                start + length,
            )
        patches = medium.patches if kind == "video" else medium
        frames, height, width = (
            patches.grid[0],
            patches.grid[1] // self.merge,
            patches.grid[2] // self.merge,
        )
        times = self._times(medium, frames) if kind == "video" else np.zeros(frames, np.int64)
        positions = grid_positions(start, times, height, width)
        block = np.full(len(positions), self.placeholders[kind], np.int32)
        if kind == "video" and medium.sound is not None:
            return self._with_sound(medium, block, positions, start)
        after = int(positions.max()) + 1
        if kind == "video" and not self.omni and self.video_positions == "5":
            after = start + max(height, width)
        tower = CLIPS if kind == "video" else STILLS
        return block, positions, [(tower, patches, np.arange(len(block)))], after

    def _times(self, clip: Clip, frames: int) -> np.ndarray:
        if self.omni or self.video_positions == "5":
            return frame_times(frames, clip.seconds_per_frame, self.ids_per_second)
        return frame_times(frames, int(clip.seconds_per_frame), self.ids_per_second)

    def _with_sound(
        self, clip: Clip, block: np.ndarray, positions: np.ndarray, start: int
    ) -> Block:
        """Both streams between audio_bos and audio_eos, which share the positions of vision_bos and vision_eos."""
        assert clip.sound is not None
        length = mel_tokens(len(clip.sound.values))
        is_sound = interleave(positions[:, 0] - start, length, self.ids_per_chunk)
        tokens = np.where(is_sound, self.placeholders["audio"], block[0])
        where_to = np.empty((len(tokens), 3), np.int32)
        where_to[is_sound], where_to[~is_sound] = line_positions(start, length), positions
        after = (
            int(where_to[-1].max()) + 1
        )  # upstream goes on from the chunk that is last, not from the latest time
        tokens = np.concatenate([[self.audio_bos], tokens, [self.audio_eos]]).astype(np.int32)
        where_to = np.concatenate(
            [line_positions(start - 1, 1), where_to, line_positions(after, 1)]
        )
        parts = [(CLIPS, clip.patches, 1 + np.flatnonzero(~is_sound))]
        parts.append(("audio_tower", clip.sound, 1 + np.flatnonzero(is_sound)))
        return tokens, where_to, parts, after


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The multiples of `factor` nearest to a size, scaled into the limits where they leave them (as upstream)."""
    rounded = tuple(
        round(side / factor) * factor for side in (height, width)
    )  # Python's round: half to even
    if math.prod(rounded) > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        return tuple(
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    if math.prod(rounded) < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        return tuple(math.ceil(side * grow / factor) * factor for side in (height, width))
    return rounded


def _limits(config: dict[str, Any], default: tuple[int, int]) -> tuple[int, int]:
    """The least and most pixels that a processor's configuration says, in either spelling."""
    size = config.get("size") or {}
    low = config.get("min_pixels") or size.get("shortest_edge") or default[0]
    return low, config.get("max_pixels") or size.get("longest_edge") or default[1]


def _pixels(part: dict[str, Any], limits: tuple[int, int], where: str) -> tuple[int, int]:
    """`limits`, or what a part says of its own."""
    low, high = (
        part.get(key, limit)
        for key, limit in zip(("min_pixels", "max_pixels"), limits, strict=True)
    )
    whole = all(isinstance(x, Integral) and not isinstance(x, bool) for x in (low, high))
    if not whole or not 0 < low <= high:
        raise LcoError(
            f"{where}: min_pixels {low!r:.40} and max_pixels {high!r:.40} are no limits of a size"
        )
    return low, high
