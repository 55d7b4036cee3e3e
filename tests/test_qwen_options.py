"""What a part sets for its own picture or video, with the meaning of qwen_vl_utils."""

import io
import math
import re
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from PIL import Image

from lco_jax import LcoError, MediaConfig
from lco_jax.data.content import as_content
from lco_jax.data.frame_choice import FrameChoice
from lco_jax.data.frames import FrameReader
from lco_jax.data.inputs import as_list
from lco_jax.data.media import MediaFile
from lco_jax.data.qwen_sizes import size_rule_of
from lco_jax.data.video import decode_video, load_video

CONFIG = MediaConfig()
LIMITS = (100_352, 602_112)  # of a frame's pixels, theirs
RNG = np.random.default_rng(0)


def shown(frames):
    """The numbers of frames, which are in their brightness."""
    return np.rint(frames.mean((1, 2, 3)) / 8).astype(int).tolist()


def film(count=30, rate=10):
    """A video file whose frame i has brightness 8 i."""
    stream = io.BytesIO()
    with av.open(stream, "w", format="matroska") as file:
        track = file.add_stream("ffv1", rate=rate)
        track.width, track.height, track.pix_fmt = 48, 32, "bgr0"
        for i in range(count):
            picture = np.full((32, 48, 3), 8 * i, np.uint8)
            file.mux(track.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(track.encode())
    return stream.getvalue()


FILM = film()
FRAMES = np.stack([np.full((32, 48, 3), 8 * i, np.uint8) for i in range(30)])


class VideoDecoder:
    """As torchcodec's, which datasets' Video gives: a sequence of frames, channels first."""

    def __init__(self, frames, rate=10.0):
        self.frames = torch.from_numpy(frames).permute(0, 3, 1, 2)
        self.metadata = SimpleNamespace(num_frames=len(frames), average_fps=rate)

    def __len__(self):
        return len(self.frames)

    def __getitem__(self, number):
        return self.frames[number]

    def get_frames_at(self, indices):
        return SimpleNamespace(data=self.frames[indices])


def theirs(options, total, rate):
    """The frames that qwen_vl_utils 0.0.14 takes (`_read_video_torchcodec`)."""
    first, last = 0, total - 1
    if "video_start" in options:
        first = math.ceil(max(0.0, min(options["video_start"], total / rate)) * rate)
    if "video_end" in options:
        last = math.floor(max(0.0, min(options["video_end"], total / rate)) * rate)
        last = min(last, total - 1)
    count = last - first + 1
    if "nframes" in options:
        kept = round(options["nframes"] / 2) * 2
    else:
        kept = min(min(max(count / rate * options.get("fps", 2.0), 4), 64), count) // 2 * 2
    return torch.linspace(first, last, int(kept)).round().long().tolist()


OPTIONS = [
    {},
    {"nframes": 8},
    {"nframes": 5},  # 4, the nearest even number
    {"nframes": 30},
    {"video_start": 1.0},
    {"video_end": 1.0},
    {"video_start": 0.55, "video_end": 2.31},
    {"video_start": -1, "video_end": 99},
    {"video_start": 1, "video_end": 2.5, "nframes": 6},
    {"video_start": 1, "fps": 5.0},
    {"nframes": np.int64(4), "video_start": np.float32(1)},  # as a table of options may have it
]


@pytest.mark.parametrize("options", OPTIONS)
def test_frames_are_theirs(options):
    """Of a file, of its decoder and, where the rate is below 2 or given, of an array."""
    choice = FrameChoice.of_part(options, "x")
    config = MediaConfig(fps=options.get("fps", 2.0))
    want = theirs(options, 30, 10.0)
    of_file = load_video(FILM, "x", config, choice=choice)
    assert (shown(of_file.frames), of_file.fps) == (want, None)
    of_decoder = load_video(VideoDecoder(FRAMES), "x", config, choice=choice)
    assert (shown(of_decoder.frames), of_decoder.fps) == (want, None)
    of_array = load_video({"array": FRAMES, "fps": 10}, "x", config, choice=choice)
    assert shown(of_array.frames) == want
    assert of_array.fps == 10 * len(want) / (want[-1] - want[0] + 1)


def test_the_package_itself_takes_these_frames():
    """Where it is installed; it needs torchvision."""
    theirs_of = pytest.importorskip("qwen_vl_utils.vision_process")
    for options in OPTIONS:
        first, last, count = theirs_of.calculate_video_frame_range(options, 30, 10.0)
        kept = theirs_of.smart_nframes({"max_frames": 64, **options}, count, 10.0)
        assert torch.linspace(first, last, kept).round().long().tolist() == theirs(
            options, 30, 10.0
        )
    for height, width in ((280, 420), (1000, 30), (300, 299), (9000, 8000), (28, 28)):
        part = {"resized_height": height, "resized_width": width}
        picture = theirs_of.fetch_image({"image": Image.new("RGB", (64, 48)), **part}, 14)
        assert size_rule_of(part, (1, 2), 28, "x")(48, 64) == picture.size[::-1]


def test_a_list_of_frames_may_be_thinned():
    choice = FrameChoice(nframes=4)
    assert shown(load_video(list(FRAMES), "x", CONFIG, choice=choice).frames) == [0, 10, 19, 29]
    with pytest.raises(LcoError, match=r"x: video of 30 images: video_start and video_end need"):
        load_video(list(FRAMES), "x", CONFIG, choice=FrameChoice(video_start=1))


def test_a_header_that_promises_no_frames_is_no_reason_to_refuse(monkeypatch):
    """What is asked for is compared with the frames that there are."""
    monkeypatch.setattr(FrameReader, "header", lambda _: (0, 10.0))
    for options in ({"nframes": 8}, {"video_start": 1.0, "video_end": 2.5}):
        choice = FrameChoice.of_part(options, "x")
        frames = decode_video(MediaFile("x", FILM), CONFIG, None, choice)
        assert shown(frames) == theirs(options, 30, 10.0)


def test_frames_of_a_torn_file_are_counted():
    torn = FILM[: len(FILM) * 2 // 3]
    there = len(shown(load_video(torn, "x", CONFIG, choice=FrameChoice(nframes=2)).frames))
    assert there == 2
    with pytest.raises(LcoError, match="nframes is 30, and there are"):
        load_video(torn, "x", CONFIG, choice=FrameChoice(nframes=30))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"nframes": 1}, "x: nframes is 1; it must be a whole number above 1"),
        ({"nframes": 2.0}, "x: nframes is 2.0"),
        ({"nframes": True}, "x: nframes is True"),
        ({"nframes": 4, "fps": 1.0}, "x has both fps and nframes; keep one"),
        ({"video_start": "1"}, "x: video_start is '1'; give seconds"),
        ({"video_end": math.nan}, "x: video_end is nan; give seconds"),
        ({"nframes": 32}, "nframes is 32, and there are 30 frames"),
        ({"video_start": 3.0}, "lasts 3.00 seconds, without two frames between video_start 3.0"),
        (
            {"video_start": 2, "video_end": 1},
            "without two frames between video_start 2 and video_en",
        ),
    ],
)
def test_frames_that_a_video_does_not_have(given, says):
    for source in (FILM, VideoDecoder(FRAMES), {"array": FRAMES, "fps": 10}):
        with pytest.raises(LcoError, match=re.escape(says)) as error:
            load_video(source, "x", CONFIG, choice=FrameChoice.of_part(given, "x"))
        assert str(error.value).startswith("x")


def test_sound_is_not_cut_with_its_video():
    config = MediaConfig(use_audio_in_video=True)
    sound = {"array": np.zeros(48_000, np.float32), "sampling_rate": 16_000}
    with_sound = {"array": FRAMES, "fps": 10, "audio": sound}
    for source in (FILM, with_sound):
        with pytest.raises(LcoError, match=r"^x: .*do not cut its sound; cut both before, or"):
            load_video(source, "x", config, choice=FrameChoice(video_end=1))
    whole = load_video(with_sound, "x", config, choice=FrameChoice(nframes=4))
    assert (len(whole.frames), len(whole.audio)) == (4, 48_000)


@pytest.mark.parametrize(
    ("choice", "rate", "why"),
    [
        (FrameChoice(), None, None),
        (FrameChoice(nframes=31), 10.0, "nframes is 31, and there are 30 frames"),
        (FrameChoice(nframes=30), None, None),
        (FrameChoice(video_start=1), None, "video_start and video_end need its rate; give its fps"),
        (FrameChoice(video_start=2.9), 10.0, "it lasts 3.00 seconds, without two frames between"),
        (FrameChoice(video_start=2.8), 10.0, None),
        (FrameChoice(nframes=4, video_end=0.2), 10.0, "nframes is 4, and there are 3 frames"),
    ],
)
def test_why_a_video_has_no_such_frames(choice, rate, why):
    found = choice.why_not(30, rate)
    assert found == why if why is None else found.startswith(why)


def test_seconds_of_an_array_are_cut_as_those_of_a_file():
    """A float32 of 0.3 is a little later than the frame there."""
    choice = FrameChoice(video_start=np.float32(0.3))
    of_array = load_video({"array": FRAMES, "fps": 10}, "x", CONFIG, choice=choice)
    of_file = load_video(FILM, "x", CONFIG, choice=choice)
    assert shown(of_array.frames)[0] == shown(of_file.frames)[0] == 4


def test_decoders_of_video_are_inputs():
    decoder = VideoDecoder(FRAMES)
    assert as_list(decoder) == ([decoder], True)
    assert as_list([decoder]) == ([decoder], False)
    for given in (decoder, {"video": decoder}, {"type": "video", "video": decoder}):
        assert as_content(given, "x") == ({"type": "video", "video": decoder},)
    torn = VideoDecoder(FRAMES)
    torn.metadata = None
    with pytest.raises(LcoError, match=r"^x: VideoDecoder cannot be decoded"):
        load_video(torn, "x", CONFIG)


def test_a_decoder_embeds_as_its_file(tiny):
    want = tiny.encode({"video": FILM})
    np.testing.assert_allclose(tiny.encode(VideoDecoder(FRAMES)), want, atol=1e-6)
    part = {"type": "video", "nframes": 4, "video_start": 1, "total_pixels": 200_704}
    of_file, of_decoder = tiny.encode(
        [[{**part, "video": FILM}], [{**part, "video": VideoDecoder(FRAMES)}]]
    )
    np.testing.assert_allclose(of_file, of_decoder, atol=1e-6)
    assert np.abs(of_file - want).max() > 1e-4


@pytest.mark.parametrize(
    ("part", "frames"),
    [
        ({}, 8),
        ({"min_pixels": 28**2, "max_pixels": 100 * 28**2}, 8),
        ({"total_pixels": 64 * 200 * 28**2}, 64),
        ({"total_pixels": 64 * 200 * 28**2}, 16),
        ({"total_pixels": 28**2}, 64),  # no less than min_pixels and a twentieth
        ({"total_pixels": 64 * 200 * 28**2, "max_pixels": 200 * 28**2}, 64),
        ({"total_pixels": 64 * 100 * 28**2, "max_pixels": 10**6}, 64),
        ({"resized_height": 300, "resized_width": 299}, 8),
        ({"resized_height": 9000, "resized_width": 8000}, 8),
        ({"resized_height": 28, "resized_width": 5600}, 8),
    ],
)
def test_sizes_are_theirs(part, frames):
    rule = size_rule_of(part, LIMITS, 28, "x")
    for height, width in ((900, 1200), (1200, 900), (60, 2000), (100, 100)):
        assert rule(height, width, frames) == formula(part, frames, height, width)


def formula(part, frames, height, width, factor=28):
    """qwen_vl_utils 0.0.14, `fetch_video`."""

    def smart_resize(height, width, least, most):
        tall, wide = (max(factor, round(side / factor) * factor) for side in (height, width))
        if tall * wide > most:
            beta = math.sqrt(height * width / most)
            return tuple(math.floor(side / beta / factor) * factor for side in (height, width))
        if tall * wide < least:
            beta = math.sqrt(least / (height * width))
            return tuple(math.ceil(side * beta / factor) * factor for side in (height, width))
        return tall, wide

    if "resized_height" in part:
        sides = part["resized_height"], part["resized_width"]
        return smart_resize(*sides, 4 * factor**2, 16384 * factor**2)
    least = part.get("min_pixels", LIMITS[0])
    total = part.get("total_pixels", 128_000 * factor**2 * 0.9)
    most = max(min(LIMITS[1], total / frames * 2), int(least * 1.05))
    return smart_resize(height, width, least, min(part.get("max_pixels", most), most))


@pytest.mark.parametrize(
    ("part", "says"),
    [
        (
            {"resized_height": 280},
            "x has resized_height alone; give resized_height and resized_width",
        ),
        (
            {"resized_height": 280, "resized_width": 27},
            "resized_width is 27; it must be a whole numb",
        ),
        ({"resized_height": 280.0, "resized_width": 28}, "x: resized_height is 280.0"),
        (
            {"resized_height": 28 * 201, "resized_width": 28},
            "x: 5628 x 28 is longer than 200 times",
        ),
        (
            {"resized_height": 28, "resized_width": 28, "max_pixels": 9},
            "x has both resized_height and max_pixels; keep one",
        ),
        ({"total_pixels": 0}, "x: total_pixels is 0; it must be a whole number above 0"),
        ({"total_pixels": "9"}, "x: total_pixels is '9'"),
        ({"min_pixels": 9, "max_pixels": 3}, "x: min_pixels 9 and max_pixels 3 must be whole"),
    ],
)
def test_sizes_that_cannot_be(part, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        size_rule_of(part, LIMITS, 28, "x")


def test_a_pictures_size_may_be_given(tiny):
    """Its vector is that of the picture in this size."""
    picture = Image.fromarray(RNG.integers(0, 256, (60, 90, 3), np.uint8))
    part = {"type": "image", "image": picture, "resized_height": 60, "resized_width": 110}
    small = picture.resize((112, 56), Image.Resampling.BICUBIC)
    got, want = tiny.encode([[part], {"image": small}])
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_options_are_read_in_every_door():
    options = {"nframes": 4, "total_pixels": 9, "video_start": 1, "video_end": 2.5}
    part = {"type": "video", "video": "a.mp4", **options, "resized_height": 28, "resized_width": 28}
    assert as_content(part, "x") == (part,)
    with pytest.raises(LcoError, match="unknown key 'nframes'"):
        as_content({"type": "image", "image": "a.png", "nframes": 4}, "x")
