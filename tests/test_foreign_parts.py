"""Parts of chats as OpenAI, vLLM and Qwen write them, in every door."""

import base64
import json
import re

import numpy as np
import pytest

from lco_jax import LcoError
from lco_jax.data.content import as_content
from lco_jax.data.corpus import Corpus
from lco_jax.data.records import parse_record

PIXEL = "data:image/gif;base64,R0lGODlhAQABAIAAAP///wAAACwAAAAAAQABAAACAkQBADs="
SOUND = base64.b64encode(b"RIFF").decode()
PARTS = [
    ({"type": "image_url", "image_url": {"url": PIXEL}}, {"type": "image", "image": PIXEL}),
    (
        {"type": "image_url", "image_url": {"url": PIXEL, "detail": "auto"}, "max_pixels": 9},
        {"type": "image", "image": PIXEL, "max_pixels": 9},
    ),
    ({"type": "image_url", "image_url": PIXEL}, {"type": "image", "image": PIXEL}),
    ({"type": "image", "image_url": PIXEL}, {"type": "image", "image": PIXEL}),
    (
        {"type": "video_url", "video_url": {"url": "https://a.example/b.mp4"}, "nframes": 4},
        {"type": "video", "video": "https://a.example/b.mp4", "nframes": 4},
    ),
    (
        {"type": "audio_url", "audio_url": {"url": "https://a.example/b.mp3"}},
        {"type": "audio", "audio": "https://a.example/b.mp3"},
    ),
    (
        {"type": "input_audio", "input_audio": {"data": SOUND, "format": "wav"}},
        {"type": "audio", "audio": b"RIFF"},
    ),
]


@pytest.mark.parametrize(("given", "ours"), PARTS)
def test_parts_of_other_libraries_are_ours(tmp_path, given, ours):
    text = {"type": "text", "text": "what is it?"}
    chat = [{"role": "user", "content": [given, text]}]
    assert as_content(given, "x") == (ours,)
    assert as_content([given, text], "x") == (ours, text)
    assert as_content(chat, "x") == [{"role": "user", "content": [ours, text]}]
    record = parse_record({"anchor": [given, text], "positive": "a"}, "x")
    assert record.anchor == (ours, text)
    lines = tmp_path / "lines.jsonl"
    lines.write_text(f"{json.dumps([given, text])}\n{json.dumps(chat)}\n", "utf-8")
    as_parts, as_chat = (item.content for item in Corpus(lines).items())
    assert as_parts == (ours, text)
    assert as_chat == [{"role": "user", "content": [ours, text]}]


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"type": "image_url"}, "x is a part of type 'image_url', and has no image_url"),
        ({"type": "image_url", "image_url": {}}, "must hold its medium once"),
        (
            {"type": "image_url", "image_url": {"url": PIXEL, "detail": "low"}},
            "x.image_url.detail is 'low', which has no meaning here; a part's max_pixels",
        ),
        ({"type": "image_url", "image_url": {"href": PIXEL}}, "unknown key 'href'"),
        ({"type": "image", "image_url": PIXEL, "image": PIXEL}, "both image and image_url"),
        ({"type": "input_audio"}, 'x.input_audio must be {"data": base64, "format": "wav"}'),
        ({"type": "input_audio", "input_audio": {"data": "é"}}, "is not valid base64"),
        ({"type": "input_audio", "input_audio": {"data": SOUND, "rate": 8}}, "unknown key 'rate'"),
        ({"type": "input_file", "file": "x"}, "unknown type 'input_file'"),
        ({"type": ["image"], "image": "x"}, "unknown type ['image']"),
    ],
)
def test_what_such_parts_lack_is_named(given, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        as_content(given, "x")


def test_a_picture_in_an_address_embeds_as_itself(tiny):
    picture = {"type": "image_url", "image_url": {"url": PIXEL}}
    chat = [{"role": "user", "content": [picture, {"type": "text", "text": "In one word:"}]}]
    white = np.full((1, 1, 3), 255, np.uint8)
    want = tiny.encode({"image": white})
    np.testing.assert_array_equal(tiny.encode([[picture]])[0], want)
    want = tiny.encode({"image": white}, prompt="In one word:")
    np.testing.assert_allclose(tiny.encode(chat), want, atol=1e-6)


UNDECODED = [
    ({"bytes": b"", "path": "a/cat.JPG"}, "image", "a/cat.JPG"),
    ({"bytes": None, "path": "a/bark.flac"}, "audio", "a/bark.flac"),
    ({"bytes": b"any", "path": "clip.mp4"}, "video", b"any"),
    ({"bytes": b"\x89PNG\r\n", "path": None}, "image", b"\x89PNG\r\n"),
    ({"bytes": b"\xff\xd8\xff\xe0"}, "image", b"\xff\xd8\xff\xe0"),
    ({"bytes": b"RIFF\0\0\0\0WAVEfmt ", "path": ""}, "audio", b"RIFF\0\0\0\0WAVEfmt "),
    ({"bytes": b"RIFF\n\0\0\0WEBP", "path": "no ending"}, "image", b"RIFF\n\0\0\0WEBP"),
    ({"path": "cat.png"}, "image", "cat.png"),
]


@pytest.mark.parametrize(("given", "kind", "medium"), UNDECODED)
def test_media_of_datasets_that_are_not_decoded(given, kind, medium):
    assert as_content(given, "x") == ({"type": kind, kind: medium},)


@pytest.mark.parametrize(
    "given", [{"bytes": b"?", "path": None}, {"bytes": None, "path": None}, {"path": "cat"}]
)
def test_undecoded_media_of_no_kind_say_so(given):
    with pytest.raises(LcoError, match=r"^x is encoded, and neither its path nor its bytes tell"):
        as_content(given, "x")
