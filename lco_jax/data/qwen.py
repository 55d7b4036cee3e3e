"""Qwen2.5-VL's and Qwen2.5-Omni's processor without torch: media -> patches, mels, tokens.

Dimensions: T pictures of a clip, X and Y their height and width, V values of a patch, C mel
channels, N tokens of a medium.
Sources: processing_qwen2_5_vl.py, processing_qwen2_5_omni.py and `get_rope_index` of the two
models. Where transformers 4.57 and 5.x differ (the positions of Qwen2.5-VL's videos), 4.57 is the
default: LCO was trained with it.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from einops import rearrange
from transformers import WhisperFeatureExtractor

from lco_jax.core.errors import LcoError
from lco_jax.data.audio import load_audio
from lco_jax.data.codec import Expansion, MediaCodec, of_medium
from lco_jax.data.decoder import SizeRule
from lco_jax.data.frame_choice import FrameChoice
from lco_jax.data.images import load_pixels
from lco_jax.data.media import MediaConfig
from lco_jax.data.positions import frame_times, grid_positions, interleave, line_positions
from lco_jax.data.processor_files import (
    PICTURE_RULES,
    SOUND_RULES,
    Rule,
    check,
    equal,
    number,
    pixel_limits,
    read_settings,
)
from lco_jax.data.qwen_sizes import size_rule_of
from lco_jax.data.tower_rows import Patches, PatchRows, Segments, chunk_rows, chunks_of
from lco_jax.data.video import load_video

ASSUMED_FPS = 2.0  # what processors assume of a clip; the reference never tells them its rate
# the fewest and most pixels of an image, and of a clip's picture, by default
IMAGE_PIXELS = (3_136, 1_003_520)
VIDEO_PIXELS = (100_352, 602_112)
# Stills have one picture a patch, clips as many as the tower takes together. They have separate
# rows, so that a still travels to the device once, whatever travels with it.
STILLS = "visual"
CLIPS = "visual/clips"
SOUNDS = "audio_tower"
_RATE = number(1e-3, 1e6)  # of positions in a second, and of seconds in a chunk
_AS_MODEL = ", as config.json has it"
VIDEO_POSITIONS = ("4.57", "5")  # the release whose rule Qwen2.5-VL's video positions follow


@dataclass(frozen=True)
class Clip:
    """A video. seconds_per_frame: of one of its frames of patches, which hold several pictures."""

    patches: Patches
    seconds_per_frame: float
    sound: Segments | None


class QwenMedia(MediaCodec):
    """Media of one checkpoint. video_positions: one of `VIDEO_POSITIONS`."""

    SETTINGS = MappingProxyType(
        {"image": "image_pixels", "video": "video_pixels", "audio": "sound_settings"}
    )

    def __init__(
        self,
        folder: Path,
        config: dict[str, Any],
        media: MediaConfig,
        video_positions: str = "4.57",
    ):
        if video_positions not in VIDEO_POSITIONS:
            known = ", ".join(VIDEO_POSITIONS)
            raise LcoError(f"video_positions is {video_positions!r}; it is one of: {known}")
        self.omni = "audio_config" in config
        kinds = ("image", "video", "audio") if self.omni else ("image", "video")
        super().__init__(folder, config, media, kinds)
        # whether a video's positions are those of transformers 4.57, which Omni's never were
        self.older_positions = video_positions == "4.57" and not self.omni
        self._read_vision(config["vision_config"])
        if self.omni:
            self._read_omni(config, config["audio_config"])
        else:
            check(config["vision_config"], self.file, {"tokens_per_second": _RATE})
            self.ids_per_second = config["vision_config"]["tokens_per_second"]

    def _read_vision(self, vision: dict[str, Any]) -> None:
        self.patch = vision["patch_size"]
        self.merge = vision["spatial_merge_size"]
        self.frames_per_patch = vision["temporal_patch_size"]
        window = vision["window_size"] // self.patch
        pixels = self.patch**2
        self.rows[STILLS] = PatchRows(window, self.merge, (3, 1, pixels))
        self.rows[CLIPS] = PatchRows(window, self.merge, (3, self.frames_per_patch, pixels))

    def _read_omni(self, config: dict[str, Any], audio: dict[str, Any]) -> None:
        self.audio_bos = self.token_id("audio_start")
        self.audio_eos = self.token_id("audio_end")
        check(config, self.file, {"position_id_per_seconds": _RATE, "seconds_per_chunk": _RATE})
        self.ids_per_second = config["position_id_per_seconds"]
        self.ids_per_chunk = int(self.ids_per_second * config["seconds_per_chunk"])
        self.n_window = audio["n_window"]
        self.mel_bins = audio["num_mel_bins"]
        self.rows[SOUNDS] = chunk_rows(self.n_window, self.mel_bins)

    def picture_rules(self) -> dict[str, Rule]:
        return {
            **PICTURE_RULES,
            "patch_size": equal(self.patch, _AS_MODEL),
            "merge_size": equal(self.merge, _AS_MODEL),
            "temporal_patch_size": equal(self.frames_per_patch, _AS_MODEL),
        }

    # ---- media

    @cached_property
    def sound_settings(self) -> tuple[dict[str, Any], Path]:
        """(the settings of the checkpoint's feature extractor, checked; their file)."""
        rules = {**SOUND_RULES, "feature_size": equal(self.mel_bins, _AS_MODEL)}
        return read_settings(self.folder, "feature_extractor", rules)

    @cached_property
    def feature_extractor(self) -> WhisperFeatureExtractor:
        """transformers' extractor. Raises if the caps let through longer sound than it takes."""
        settings, file = self.sound_settings
        given = {key: settings[key] for key in SOUND_RULES if key in settings}
        extractor = WhisperFeatureExtractor(
            feature_size=self.mel_bins, return_attention_mask=True, **given
        )
        longest = self.media.max_audio_seconds
        if longest * extractor.sampling_rate > extractor.n_samples:
            most = extractor.n_samples // extractor.sampling_rate
            raise LcoError(f"media.max_audio_seconds is {longest}, and {file} takes {most}")
        return extractor

    @cached_property
    def image_pixels(self) -> tuple[int, int]:
        """The fewest and most pixels of an image: the caller's, or else the checkpoint's."""
        least, most = pixel_limits(*self.image_settings, IMAGE_PIXELS)
        return self.media.image_min_pixels or least, self.media.image_max_pixels or most

    @cached_property
    def video_pixels(self) -> tuple[int, int]:
        """The fewest and most pixels of a clip's picture. Omni's processor reads no file for it."""
        least, most = VIDEO_PIXELS
        if not self.omni:
            settings = read_settings(self.folder, "video_processor", self.picture_rules())
            least, most = pixel_limits(*settings, VIDEO_PIXELS)
        most = min(most, self.media.video_max_pixels or most)
        return min(self.media.video_min_pixels or least, most), most

    def load(self, part: dict[str, Any], where: str) -> Patches | Segments | Clip:
        """The medium of a chat part, which may have `content.OPTIONS` for itself."""
        kind = part["type"]
        if kind == "image":
            return self._image(part, where)
        if kind == "video":
            return self._video(part, where)
        if kind == "audio" and self.omni:
            return self._chunks(load_audio(part["audio"], where, self.media))
        raise LcoError(f"{where} has {kind}, which this checkpoint does not take")

    def _size_rule(self, part: dict[str, Any], limits: tuple[int, int], where: str) -> SizeRule:
        """limits: the fewest and most pixels, for a part that asks for no others."""
        return size_rule_of(part, limits, self.patch * self.merge, where)

    def _image(self, part: dict[str, Any], where: str) -> Patches:
        size_rule = self._size_rule(part, self.image_pixels, where)
        image = load_pixels(part["image"], where, self.media, size_rule)
        return self._patches(image[None], 1)

    def _video(self, part: dict[str, Any], where: str) -> Clip:
        size_rule = self._size_rule(part, self.video_pixels, where)
        choice = FrameChoice.of_part(part, where)
        caps = self._caps_of(part, where)
        video = load_video(part["video"], where, caps, size_rule, choice)
        sound = None
        if video.audio is not None:
            if not self.omni:
                raise LcoError(
                    f"{where} has a video with sound, which this checkpoint does not take"
                )
            sound = self._chunks(video.audio)
        seconds = self.frames_per_patch / (video.fps or ASSUMED_FPS)
        return Clip(self._patches(video.frames, self.frames_per_patch), seconds, sound)

    def _caps_of(self, part: dict[str, Any], where: str) -> MediaConfig:
        """The caps with a video part's fps and max_frames."""
        given = {key: part[key] for key in ("fps", "max_frames") if key in part}
        try:
            return replace(self.media, **given)
        except LcoError as error:
            raise LcoError(f"{where}: {error}") from error

    def _patches(self, frames: np.ndarray, together: int) -> Patches:
        """uint8 [T, X, Y, 3] -> patches of `together` pictures; the last fills up its patch."""
        missing = -len(frames) % together
        frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        patches = rearrange(
            frames,
            "(t u) (y a p) (x b q) c -> t y x a b c u (p q)",
            u=together,
            a=self.merge,
            b=self.merge,
            p=self.patch,
            q=self.patch,
        )
        count, down, across = patches.shape[:3]
        grid = (count, down * self.merge, across * self.merge)
        return Patches(patches.reshape(-1, *patches.shape[5:]), grid, self.scale)

    def _chunks(self, audio: np.ndarray) -> Segments:
        """float32 samples at 16 kHz -> chunks of ceil(samples / hop) mel frames.

        The extractor would pad to 300 s before its transform. Frames only depend on the silence
        within their reach, so a little padding gives the same numbers in a hundredth of the time.
        """
        extractor = self.feature_extractor
        hop = extractor.hop_length
        padded = -(-(len(audio) + extractor.n_fft) // hop) * hop
        features = extractor(
            audio,
            sampling_rate=extractor.sampling_rate,
            max_length=min(padded, extractor.n_samples),
            truncation=True,
            return_tensors="np",
        )
        mel = features["input_features"][0, :, : -(-len(audio) // hop)]
        return chunks_of(mel.T.astype(np.float32), self.n_window)

    # ---- tokens

    def expansion(self, medium: Patches | Segments | Clip, start: int) -> Expansion:
        """What takes the place of a medium, at the positions from `start` on."""
        if isinstance(medium, Segments):
            return self._expand_sound(medium, start)
        if isinstance(medium, Clip):
            return self._expand_clip(medium, start)
        times = np.zeros(medium.grid[0], np.int64)
        positions = self._grid_positions(medium, times, start)
        return of_medium(self.placeholders["image"], positions, STILLS, medium)

    def _expand_sound(self, sound: Segments, start: int) -> Expansion:
        positions = line_positions(start, len(sound.order))
        return of_medium(self.placeholders["audio"], positions, SOUNDS, sound)

    def _grid_positions(self, patches: Patches, times: np.ndarray, start: int) -> np.ndarray:
        _, down, across = patches.grid
        return grid_positions(start, times, down // self.merge, across // self.merge)

    def _expand_clip(self, clip: Clip, start: int) -> Expansion:
        seconds = clip.seconds_per_frame
        if self.older_positions:
            seconds = int(seconds)
        times = frame_times(clip.patches.grid[0], seconds, self.ids_per_second)
        positions = self._grid_positions(clip.patches, times, start)
        pictures = of_medium(self.placeholders["video"], positions, CLIPS, clip.patches)
        if clip.sound is not None:
            return self._interleaved(pictures, self._expand_sound(clip.sound, start), start)
        if self.omni or self.older_positions:
            return pictures
        # release 5 goes on from the largest height or width, whatever the time is
        return pictures._replace(end=int(positions[:, 1:].max()) + 1)

    def _interleaved(self, pictures: Expansion, sound: Expansion, start: int) -> Expansion:
        """Both between audio_bos and audio_eos, at the positions of vision_bos and vision_eos."""
        times = pictures.positions[:, 0] - start
        is_sound = interleave(times, len(sound.ids), self.ids_per_chunk)
        at_sound = np.flatnonzero(is_sound)
        at_pictures = np.flatnonzero(~is_sound)
        ids = np.empty(len(is_sound), np.int32)
        ids[at_sound] = sound.ids
        ids[at_pictures] = pictures.ids
        positions = np.empty((len(is_sound), 3), np.int32)
        positions[at_sound] = sound.positions
        positions[at_pictures] = pictures.positions
        # upstream goes on from the chunk that is last, not from the latest time
        end = int(positions[-1].max()) + 1
        before, after = line_positions(start - 1, 1), line_positions(end, 1)
        media = (
            pictures.media[0]._replace(at=1 + at_pictures),
            sound.media[0]._replace(at=1 + at_sound),
        )
        return Expansion(
            np.concatenate([[self.audio_bos], ids, [self.audio_eos]], dtype=np.int32),
            np.concatenate([before, positions, after]),
            end,
            media,
        )
