"""Values of a checkpoint's tokenizer and processor files: right, or named by file and key."""

import json
import shutil

import numpy as np
import pytest
import reference

from lco_jax import LcoError
from lco_jax.core.files import read_json, write_json
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import as_messages
from lco_jax.generator import turn_ends

NAN, INF = float("nan"), float("inf")
PRE, VIDEO = "preprocessor_config.json", "video_preprocessor_config.json"
NESTED, TOKENIZER = "processor_config.json", "tokenizer_config.json"
PICTURE = np.random.default_rng(0).integers(0, 255, (60, 90, 3), np.uint8)
SOUND = np.random.default_rng(0).normal(0, 0.1, 16_000).astype(np.float32)


@pytest.fixture
def copy(cases, tmp_path):
    return lambda family: shutil.copytree(cases[family].path, tmp_path / family)


def edit(file, **values):
    write_json(file, {**(read_json(file) if file.exists() else {}), **values})


def refused(folder, file, key):
    """The sentence with which a checkpoint is refused, before any input comes."""
    with pytest.raises(LcoError) as error:
        Processor(folder)
    message = str(error.value)
    assert message.startswith(f"{folder / file}: {key} is ") or key in ("", "min_pixels")
    assert str(folder / file) in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("image_mean", bad) for bad in ([0.5, 0.5], [0.5, 0.5, NAN], 0.5, "x", [1, 1, "x"])),
        *(
            ("image_std", bad)
            for bad in ([0, 1, 1], [1, 1], [1, 1, -1], [1, INF, 1], {}, [None] * 3)
        ),
        *(("rescale_factor", bad) for bad in (0, -1, NAN, INF, 1e300, 1e-300, "x", True)),
        *(("patch_size", bad) for bad in (0, -14, 7, 14.0, "14", [], True, 10**30)),
        *(("merge_size", bad) for bad in (0, 3)),
        *(("temporal_patch_size", bad) for bad in (0, 1)),
        *(("min_pixels", bad) for bad in (0, -1, 0.5, "8", NAN, 10**30)),
        *(("max_pixels", bad) for bad in (0, -1, [], INF)),
        *(("size", bad) for bad in (5, [], {"shortest_edge": "x"}, {"longest_edge": 0})),
        *(("do_resize", bad) for bad in (False, 0, "no", 1)),
        *(("resample", bad) for bad in (2, "bicubic", 3.0, True)),
    ],
    ids=str,
)
@pytest.mark.parametrize("file", [PRE, VIDEO, NESTED])
def test_a_setting_of_pictures_that_is_none_is_named(copy, file, key, value):
    folder = copy("vl")
    content = read_json(folder / PRE) | {key: value}
    if file == NESTED:
        content = {"image_processor": content}
    write_json(folder / file, content)
    refused(folder, file, key)


def test_limits_of_pixels_in_the_wrong_order_are_named(copy):
    folder = copy("vl")
    edit(folder / PRE, min_pixels=10_000, max_pixels=9_999)
    assert "max_pixels" in refused(folder, PRE, "min_pixels")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("feature_size", bad) for bad in (80, 0, -1, "128", 128.0, 10**6, 2**70, [])),
        *(("sampling_rate", bad) for bad in (0, 8000, 44_100, "16000", NAN)),
        *(("hop_length", bad) for bad in (0, -160, 1, 161, 10**9, 2**70, 0.5)),
        *(("n_fft", bad) for bad in (0, 399, 10**9, "x")),
        *(("chunk_length", bad) for bad in (0, -1, 0.5, 10**9, "x", {})),
        *(("padding_side", bad) for bad in ("left", "x", 5, [])),
        *(("padding_value", bad) for bad in (1, NAN, "x", [])),
        *(("dither", bad) for bad in (0.1, NAN, "x")),
    ],
    ids=str,
)
def test_a_setting_of_sound_that_is_none_is_named(copy, key, value):
    folder = copy("omni")
    edit(folder / PRE, **{key: value})
    refused(folder, PRE, key)


def test_a_setting_that_is_left_out_is_the_models(copy, cases):
    """Whisper's own default of 80 channels would make another sound of it."""
    folder = copy("omni")
    content = read_json(folder / PRE)
    for key in ("feature_size", "hop_length", "padding_side", "image_mean", "rescale_factor"):
        content.pop(key, None)
    write_json(folder / PRE, {**content, "feature_size": None, "n_fft": None})
    chats = [as_messages({"audio": {"array": SOUND, "sampling_rate": 16_000}}, "x")]
    (got,), (want,) = Processor(folder)(chats), Processor(cases["omni"].path)(chats)
    for name, rows in want.media[0].medium.rows.items():
        np.testing.assert_array_equal(got.media[0].medium.rows[name], rows)


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        (PRE, "size", {"shortest_edge": 57}),
        (PRE, "size", {"height": "56"}),
        (PRE, "crop_size", {"height": 0, "width": 56}),
        (PRE, "image_grid_pinpoints", [[56, 112]]),
        (PRE, "image_grid_pinpoints", 3),
        (PRE, "image_std", [0, 0, 0]),
        (NESTED, "patch_size", 0),
        (NESTED, "patch_size", "14"),
        ("config.json", "image_grid_pinpoints", [[56, 0]]),
        ("config.json", "image_grid_pinpoints", [[57, 56]]),
        ("config.json", "image_grid_pinpoints", [[56, 56 * 10**6]]),
        ("config.json", "image_grid_pinpoints", []),
        ("config.json", "image_grid_pinpoints", "x"),
        ("config.json", "image_token_index", 10**9),
    ],
    ids=str,
)
def test_a_setting_of_tiles_that_is_none_is_named(copy, file, key, value):
    folder = copy("llava_qwen2")
    edit(folder / file, **{key: value})
    refused(folder, file, key)


@pytest.mark.parametrize("part", ["image_processor", "video_processor", "feature_extractor"])
@pytest.mark.parametrize("value", [5, "x", [], True])
def test_a_part_that_is_no_object_is_named(copy, part, value):
    folder = copy("omni")
    nested = dict.fromkeys(("image_processor", "feature_extractor"), read_json(folder / PRE))
    write_json(folder / NESTED, {**nested, part: value})
    if part == "video_processor":  # Omni reads none
        assert Processor(folder)
        return
    refused(folder, NESTED, part)


@pytest.mark.parametrize("file", [PRE, VIDEO, NESTED, TOKENIZER, "special_tokens_map.json"])
@pytest.mark.parametrize("content", ["", "[]", "null", "{", "folder"])
def test_a_torn_file_is_named(copy, file, content):
    folder = copy("vl")
    (folder / file).unlink(missing_ok=True)
    if content == "folder":
        (folder / file).mkdir()
    else:
        (folder / file).write_text(content)
    refused(folder, file, "")


@pytest.mark.parametrize(
    ("family", "key", "value"),
    [
        *(("vl", "image_token_id", bad) for bad in ("x", -1, 10**9, NAN, [], 1.0, True)),
        *(("omni", "audio_token_index", bad) for bad in ("x", -1, [])),
        *(("omni", "audio_start_token_id", bad) for bad in ("x", 10**9)),
        *(("omni", "position_id_per_seconds", bad) for bad in (0, -1, NAN, INF, "x", [])),
        *(("omni", "seconds_per_chunk", bad) for bad in (0, NAN, 1e300, {})),
    ],
    ids=str,
)
def test_a_number_of_the_model_that_media_need_is_named(copy, family, key, value):
    folder = copy(family)
    edit(folder / "config.json", **{key: value})
    refused(folder, "config.json", key)


@pytest.mark.parametrize("value", [0, -1, NAN, INF, "x", []])
def test_the_rate_of_positions_is_named(copy, value):
    folder = copy("vl")
    vision = read_json(folder / "config.json")["vision_config"]
    edit(folder / "config.json", vision_config={**vision, "tokens_per_second": value})
    refused(folder, "config.json", "tokens_per_second")


def test_a_token_that_stands_for_media_and_is_null_is_named(copy):
    folder = copy("vl")
    edit(folder / "config.json", image_token_id=None)
    with pytest.raises(LcoError, match=r"config\.json has no image_token_id"):
        Processor(folder)


@pytest.mark.parametrize("bad", ["x", -1, 10**9, NAN, {}, [], [1, "x"], [[1]], True, 1.5])
@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_end_of_a_turn_is_a_token(copy, file, bad):
    folder = copy("vl")
    edit(folder / file, eos_token_id=bad)
    with pytest.raises(LcoError) as error:
        turn_ends(Processor(folder))
    assert str(error.value).startswith(f"{folder / file}: eos_token_id is ")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("split_special_tokens", bad) for bad in (INF, 1, "no", [], None)),
        *(
            ("eos_token", bad)
            for bad in (NAN, 5, [], {"content": 5}, {"content": "x", "special": 2})
        ),
        *(("pad_token", bad) for bad in (True, {})),
        *(("model_max_length", bad) for bad in ("x", [], 0, -1, NAN, True)),
        *(("added_tokens_decoder", bad) for bad in ([], {"x": {"content": "a"}}, {"1": "a"}, None)),
        *(("added_tokens_decoder", {digits: {"content": "a"}}) for digits in ("-1", "٣", "9" * 99)),
        *(("chat_template", bad) for bad in (5, {}, ["x"], [{"name": "default"}], [{"name": 3}])),
        *(("add_prefix_space", bad) for bad in (5, "x")),
        *(("extra_special_tokens", bad) for bad in (5, "x", [5], {"a": []})),
        *(("additional_special_tokens", bad) for bad in ("x", [None])),
        *(("tokenizer_class", bad) for bad in (5, [])),
        *(("padding_side", bad) for bad in (5, "up")),
    ],
    ids=str,
)
def test_a_value_of_the_tokenizer_that_is_none_is_named(copy, key, value):
    folder = copy("vl")
    edit(folder / TOKENIZER, **{key: value})
    refused(folder, TOKENIZER, key)


@pytest.mark.parametrize("value", [5, [], {}, NAN, True])
@pytest.mark.parametrize(
    ("file", "key"),
    [("special_tokens_map.json", "eos_token"), ("chat_template.json", "chat_template")],
)
def test_other_files_of_the_tokenizer(copy, file, key, value):
    folder = copy("vl")
    edit(folder / file, **{key: value})
    refused(folder, file, key)


def test_a_token_that_the_model_does_not_have_is_named(copy):
    """jax would take the last row of the embeddings for it."""
    folder = copy("vl")
    tokenizer = read_json(folder / "tokenizer.json")
    tokenizer["model"]["vocab"]["A"] = 10**6
    write_json(folder / "tokenizer.json", tokenizer)
    processor = Processor(folder)
    good, bad = processor.attempt([as_messages(text, "") for text in ("b", "A")], ["x", "y"])
    assert good.input_ids.max() < 2000
    assert str(bad).startswith("y: the tokenizer of ")
    assert "makes token 1000000 of it, and the model has" in str(bad)


@pytest.mark.parametrize("family", [*reference.FAMILIES, *reference.LLAVA])
def test_every_refusal_here_is_of_one_value(cases, family):
    processor = Processor(cases[family].path)
    assert len(processor([as_messages({"image": PICTURE}, "x")])[0].media) == 1
    assert turn_ends(processor)


def test_a_checkpoint_for_texts_needs_no_processor(copy):
    folder = copy("vl")
    (folder / PRE).unlink()
    assert len(Processor(folder)([as_messages("a", "x")])) == 1
    edit(folder / PRE, image_std=json.loads("[0, 0, 0]"))
    assert len(Processor(folder, modalities=("text",))([as_messages("a", "x")])) == 1
