"""What real folders leave out or add, and what real inputs get wrong.

Each was once read wrongly, or stopped a run.
"""

import io
import shutil

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import transformers
from PIL import Image
from reference_media import audio, clip, image, picture, user, video

from lco_jax import LcoError, OmniEmbedder, make_mesh
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core import hf_config
from lco_jax.core.files import read_json, write_json
from lco_jax.data import pipeline
from lco_jax.data.inputs import Preparation
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import MEDIA
from lco_jax.data.records import Record
from lco_jax.data.tower_rows import arrange_frame, fill
from lco_jax.models.config import DecoderConfig
from lco_jax.models.layers import normalised
from lco_jax.models.qwen_vision import VisionConfig
from lco_jax.training.losses import info_nce

LONG = (
    "An old man is reading a newspaper on a bench, and two dogs are waiting for him by the river."
)
WIDE = {
    "shortest_edge": 3136,
    "longest_edge": 12845056,
}  # what transformers 4.57 writes of Omni's clips


@pytest.fixture
def copy(cases, tmp_path):
    """A copy of a family's checkpoint to change."""
    return lambda family: shutil.copytree(cases[family].path, tmp_path / family)


@pytest.fixture(scope="module")
def embedders(cases):
    """family -> OmniEmbedder on one device, loaded when first asked for."""

    class Embedders(dict):
        def __missing__(self, family):
            one = make_mesh(devices=jax.devices()[:1])
            modalities = ("video",) if family == "omni" else None
            self[family] = OmniEmbedder.from_pretrained(
                cases[family].path, mesh=one, modalities=modalities
            )
            return self[family]

    return Embedders()


def conversations(family):
    """Every medium that a family takes, each size by another rule of resizing."""
    found = [user(image(1, 84, 140), "one"), user(image(2, 97, 61), image(3, 25, 19), "two")]
    if not family.startswith("llava"):
        found += [
            user(video(1, 5, 56, 84, fps=2.0), "clip"),
            user(video(2, 4, 150, 240, fps=1.0), "clip"),
        ]
    if family.startswith("omni"):
        found += [
            user(audio(1, 1.3), "sound"),
            user(video(3, 4, 56, 84, fps=2.0, sound=2.1), "film"),
        ]
    return found


def assert_same(got, want):
    """Tokens, positions and media are equal to the last bit."""
    assert len(got) == len(want)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_array_equal(a.input_ids, b.input_ids)
        np.testing.assert_array_equal(a.position_ids, b.position_ids)
        assert len(a.media) == len(b.media)
        for x, y in zip(a.media, b.media, strict=True):
            assert x.tower == y.tower
            np.testing.assert_array_equal(x.at, y.at)
            np.testing.assert_equal(vars(x.medium), vars(y.medium))


def grid(processed):
    """(pairs of frames, patches down, patches across) of the first medium."""
    return processed.media[0].medium.grid


def same_decoder_and_towers(a, b):
    a, b = open_checkpoint(a), open_checkpoint(b)
    return a.config == b.config and a.towers == b.towers


# ---- processors' files


def test_a_video_file_changes_vls_clips_and_not_omnis(cases, copy):
    small = [user(video(1, 4, 56, 84, fps=2.0), "clip")]
    for family in ("vl", "omni"):
        folder = copy(family)
        (plain,) = Processor(folder)(small)
        config = {**read_json(folder / "preprocessor_config.json"), "size": WIDE}
        config = {key: value for key, value in config.items() if not key.endswith("_pixels")}
        write_json(folder / "video_preprocessor_config.json", config)
        (wide,) = Processor(folder)(small)
        config["size"] = {"shortest_edge": 20_000, "longest_edge": 12845056}
        write_json(folder / "video_preprocessor_config.json", config)
        (least,) = Processor(folder)(small)
        assert_same([wide], [plain])
        _, down, across = grid(plain)
        if family == "omni":
            assert_same([least], [plain])
            assert 100_352 <= down * across * 14**2 <= 602_112
        else:
            assert (down, across) == (4, 6)
            assert grid(least)[1] * grid(least)[2] * 14**2 >= 20_000


@pytest.fixture
def resaved(cases, tmp_path):
    """A family's folder as transformers 5 saves its processor: one file with all parts."""

    def save(family):
        folder = tmp_path / "resaved"
        transformers.AutoProcessor.from_pretrained(cases[family].path).save_pretrained(folder)
        shutil.copy(cases[family].path / "config.json", folder)
        assert not list(folder.glob("*preprocessor_config.json"))
        return folder

    return save


@pytest.mark.parametrize("family", ["vl", "omni", "llava_mistral"])
def test_a_processor_that_transformers_5_saved(cases, resaved, family):
    batch = conversations(family)
    assert_same(Processor(resaved(family))(batch), Processor(cases[family].path)(batch))


@pytest.mark.parametrize("family", ["vl", "omni", "llava_mistral"])
def test_flat_files_nested_by_hand(cases, copy, family):
    folder = copy(family)
    flat = read_json(folder / "preprocessor_config.json")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(LcoError, match=r"preprocessor_config\.json"):  # now nothing says how
        Processor(folder)([user(image(1, 56, 56), "x")])
    parts = dict.fromkeys(("image_processor", "video_processor", "feature_extractor"), flat)
    write_json(folder / "processor_config.json", {"processor_class": "AProcessor", **parts})
    batch = conversations(family)
    assert_same(Processor(folder)(batch), Processor(cases[family].path)(batch))


@pytest.mark.parametrize("family", ["vl", "omni"])
def test_each_nested_part_is_read_for_its_own_medium(resaved, family):
    folder = resaved(family)
    batch = [user(video(1, 4, 56, 84, fps=2.0), "clip"), user(image(1, 56, 84), "one")]
    clip_before, image_before = map(grid, Processor(folder)(batch))
    config = read_json(folder / "processor_config.json")
    size = {"shortest_edge": 20_000, "longest_edge": 30_000}
    for part, moves in (("video_processor", family == "vl"), ("image_processor", False)):
        changed = {**config, part: {**config[part], "size": size}}
        write_json(folder / "processor_config.json", changed)
        clip_after, image_after = map(grid, Processor(folder)(batch))
        assert (clip_after != clip_before) == moves
        assert (image_after != image_before) == (part == "image_processor")
        for t, down, across in (clip_after,) * moves + (image_after,) * (part == "image_processor"):
            assert t in (1, 2)
            assert 20_000 <= down * across * 14**2 <= 30_000


def test_a_processor_file_without_parts_leaves_clips_to_the_flat_file(cases, copy):
    """As transformers 4 writes it, beside a flat file."""
    folder = copy("vl")
    write_json(folder / "processor_config.json", {"processor_class": "Qwen2_5_VLProcessor"})
    batch = conversations("vl")
    assert_same(Processor(folder)(batch), Processor(cases["vl"].path)(batch))


@pytest.mark.parametrize("nested", [False, True])
def test_longer_sound_than_the_extractor_hears_is_refused_by_both_names(cases, resaved, nested):
    folder = resaved("omni") if nested else cases["omni"].path
    long = Processor(folder, media=MediaConfig(max_audio_seconds=600))
    assert len(long([user("a text"), user(image(1, 56, 56))])) == 2
    with pytest.raises(LcoError) as error:
        long([user(audio(1, 0.5))])
    assert "max_audio_seconds is 600" in str(error.value)
    name = "processor_config.json" if nested else "preprocessor_config.json"
    assert f"{folder / name} takes 300" in str(error.value)
    Processor(folder, media=MediaConfig(max_audio_seconds=300))([user(audio(1, 0.5))])


# ---- config.json


def section_class(model_type, key):
    """transformers' class of a part of a config.json."""
    if model_type == "llava_next":
        return transformers.CLIPVisionConfig
    return transformers.CONFIG_MAPPING[model_type].sub_configs[key]


@pytest.mark.parametrize("family", ["vl", "vl_tied", "omni", "omni_full"])
def test_a_config_without_what_equals_the_defaults(cases, copy, family):
    folder = copy(family)
    config = read_json(folder / "config.json")
    whole = config.get("thinker_config", config)
    for key in ("vision_config", "audio_config", "text_config"):
        if isinstance(whole.get(key), dict):
            defaults = section_class(whole["model_type"], key)().to_dict()
            differs = {
                k: v
                for k, v in whole[key].items()
                if k == "model_type" or defaults.get(k, "?") != v
            }
            assert whole[key].keys() - differs.keys(), key
            whole[key] = differs
    for key in ("position_id_per_seconds", "seconds_per_chunk"):
        assert (whole.pop(key, None) is not None) == family.startswith("omni")
    assert not whole["vision_config"].keys() & {
        "patch_size",
        "spatial_merge_size",
        "temporal_patch_size",
    }
    write_json(folder / "config.json", config)
    assert same_decoder_and_towers(folder, cases[family].path)
    batch = conversations(family)
    assert_same(Processor(folder)(batch), Processor(cases[family].path)(batch))


def test_the_vision_config_of_the_hubs_32b():
    """It says no depth, no heads, no patch, no window and no full blocks."""
    said = {"hidden_size": 1280, "in_chans": 3, "out_hidden_size": 5120, "intermediate_size": 3456}
    said |= {"model_type": "qwen2_5_vl", "spatial_patch_size": 14, "tokens_per_second": 2}
    config = hf_config.complete({"model_type": "qwen2_5_vl", "vision_config": said})
    assert config["vision_config"]["tokens_per_second"] == 2
    assert VisionConfig.from_hf(config, "config.json", fused=True) == VisionConfig(
        depth=32, hidden_size=1280, intermediate_size=3456, num_heads=16, in_channels=3,
        patch_size=14,
        temporal_patch_size=2, spatial_merge_size=2, window_size=112, full_blocks=(7, 15, 23, 31),
        out_hidden_size=5120, fused=True,
    )  # fmt: skip
    assert "vision_config" not in hf_config.complete(
        {"model_type": "qwen2_5_vl"}
    )  # nothing is no class's default


@pytest.mark.parametrize(("kind", "bias"), [("qwen2", True), ("llama", False), ("mistral", False)])
def test_a_text_config_that_says_next_to_nothing(kind, bias):
    said = {"model_type": kind, "sliding_window": None, "hidden_size": 3072}
    got = DecoderConfig.from_hf({"model_type": "llava_next", "text_config": said}, "config.json")
    want = transformers.CONFIG_MAPPING[kind](**said)
    assert got.qkv_bias == bias
    assert got.max_position_embeddings == want.max_position_embeddings
    assert (got.hidden_size, got.intermediate_size, got.num_layers) == (
        3072,
        want.intermediate_size,
        32,
    )
    assert (got.num_heads, got.num_kv_heads) == (want.num_attention_heads, want.num_key_value_heads)
    assert (got.rms_norm_eps, got.rope_theta) == (
        want.rms_norm_eps,
        want.rope_parameters["rope_theta"],
    )
    assert got.vocab_size == want.vocab_size


def test_a_vl_config_without_its_rope_sections_is_refused(copy):
    folder = copy("vl")
    config = read_json(folder / "config.json")
    del config["rope_scaling"]["mrope_section"]
    write_json(folder / "config.json", config)
    with pytest.raises(LcoError) as error:
        open_checkpoint(folder)
    assert str(folder / "config.json") in str(error.value)
    assert "mrope_section" in str(error.value)
    assert "\n" not in str(error.value)


# ---- texts that are cut


@pytest.mark.parametrize("family", ["llava_mistral", "llava_llama", "vl"])
def test_a_cut_text_holds_no_special_token(cases, family):
    """The first two tokenizers begin every text with a token of their own."""
    chat = Processor(cases[family].path).tokenizer

    def tokens(text):
        return chat.tokenizer(text, add_special_tokens=False).input_ids

    begin = chat.tokenizer.bos_token_id
    assert (chat.tokenizer("x").input_ids[0] == begin) == (family != "vl")
    for text in (LONG, "one two three four five six"):
        count = len(tokens(text))
        (whole,) = chat([user(text)])
        for length in range(2, count):  # the first token may be a space, which decoding takes away
            cut = chat.cut(text, length)
            assert text.startswith(cut)
            assert not any(token in cut for token in chat.tokenizer.all_special_tokens)
            assert tokens(cut) == tokens(text)[:length]
            (ids,) = chat([user(cut)])
            assert list(ids).count(begin) == list(whole).count(begin)
        assert chat.cut(text, count) == text


@pytest.mark.parametrize("family", ["vl", "llava_mistral"])
def test_max_length_cuts_texts_of_parts_as_those_of_mappings(cases, family):
    processor = Processor(cases[family].path)
    pixels = picture(1, 56, 56)
    mapping = {"image": pixels, "text": LONG}
    parts = [{"type": "image", "image": pixels}, {"type": "text", "text": LONG}]
    chat = user(*parts[:1], LONG)

    def prepared(item, length):
        return Preparation(processor, max_length=length)([(item, "input 0")])

    for length in (1, 5, 9):
        cut = prepared(mapping, length)
        assert len(cut[0]) < len(prepared(mapping, None)[0])
        assert_same(prepared(parts, length), cut)
        assert_same(prepared(tuple(parts), length), cut)
        assert_same(prepared(parts[1:], length), prepared(LONG, length))
        assert_same(prepared({"text": LONG}, length), prepared(LONG, length))
        assert_same(prepared(chat, length), prepared(chat, None))


# ---- inputs that cannot be embedded


def torn_picture():
    """A PIL image that is only read when it is needed, and then ends too soon."""
    stream = io.BytesIO()
    Image.fromarray(picture(1, 90, 90)).save(stream, "PNG")
    return Image.open(io.BytesIO(stream.getvalue()[: len(stream.getvalue()) // 2]))


def limited(**limits):
    return [{"type": "image", "image": picture(1, 56, 56), **limits}]


BAD = {  # family -> [(input, what is said of it)]
    "vl": [
        ([{"role": 7, "content": "hi"}], "role is 7"),
        (limited(min_pixels="abc"), "min_pixels 'abc'"),
        (limited(min_pixels=9000, max_pixels=5000), "min_pixels 9000 and max_pixels 5000"),
        (limited(resized_height=56), "has resized_height alone; give resized_height and resized_w"),
        (limited(shortest_edge=56), "unknown key 'shortest_edge'"),
        (user(image(1, 56, 56, shortest_edge=56), "x"), "unknown key 'shortest_edge'"),
        ({"image": lambda: 0}, "image cannot be a function"),
        ({"image": []}, "its image is an empty list"),
        ({"video": [], "text": "hi"}, "its video is an empty list"),
        ([{"type": "video", "video": clip(1, 4, 56, 56), "fps": "fast"}], "fps is 'fast'"),
        ([{"type": "video", "video": clip(1, 4, 56, 56), "max_frames": 1}], "max_frames is 1"),
    ],
    "llava_mistral": [
        (
            [*user(image(1, 56, 56)), {"role": "assistant", "content": [image(2, 56, 56)]}],
            "chat template",
        ),
        ({"audio": []}, "its audio is an empty list"),
    ],
    "omni": [
        ({"video": video(1, 4, 56, 56, fps=2.0, sound=1.5)["video"]}, "video with sound"),
        (user(video(1, 4, 56, 56, fps=2.0, sound=1.5), "x"), "video with sound"),
        (audio(1, 0.5)["audio"], "has audio"),
    ],
}
ALL_BAD = [(family, i) for family, inputs in BAD.items() for i in range(len(inputs))]


def bad_inputs(family):
    return BAD[family] + [(torn_picture(), "cannot be decoded")] * (family == "vl")


@pytest.mark.parametrize(("family", "i"), [*ALL_BAD, ("vl", len(BAD["vl"]))])
def test_a_bad_input_is_refused_by_its_name(cases, embedders, family, i):
    bad, says = bad_inputs(family)[i]
    with pytest.raises(LcoError) as error:
        embedders[family].encode(["good", bad], names=["first", "the bad one"])
    assert str(error.value).startswith("the bad one")
    assert says in str(error.value)
    assert "\n" not in str(error.value)


def assert_only_the_bad_are_skipped(ours, family, workers):
    good = ["a dog", {"image": picture(9, 56, 84)} if family == "vl" else "a cat", "two of them"]
    bad = bad_inputs(family)
    inputs = [good[0], *(item for item, _ in bad), good[1], good[2]]
    got = ours.encode(inputs, on_error="skip", workers=workers)
    assert sorted(ours.skipped) == list(range(1, 1 + len(bad)))
    for i, (_, says) in enumerate(bad, start=1):
        assert ours.skipped[i].startswith(f"input {i}")
        assert says in ours.skipped[i]
        assert np.isnan(got[i]).all()
    alone = np.stack([ours.encode(item) for item in good])
    assert ours.skipped == {}
    np.testing.assert_allclose(got[[0, -2, -1]], alone, atol=1e-6)


@pytest.mark.parametrize("family", BAD)
def test_bad_inputs_are_skipped_and_the_others_embedded(embedders, family):
    assert_only_the_bad_are_skipped(embedders[family], family, workers=0)


@pytest.mark.slow
def test_bad_inputs_are_skipped_in_processes(embedders):
    """Some cannot even be sent to one."""
    assert_only_the_bad_are_skipped(embedders["vl"], "vl", workers=1)


# ---- what a part says of its own medium


@pytest.fixture(scope="module")
def film(tmp_path_factory):
    """Six seconds of a video file, ten frames a second; and its frames."""
    path, frames = tmp_path_factory.mktemp("film") / "film.mkv", clip(3, 60, 56, 84)
    with av.open(path, "w") as file:
        stream = file.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 84, 56, "yuv420p"
        for frame in frames:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        file.mux(stream.encode(None))
    return path, frames


@pytest.mark.parametrize("given", ["file", "array"])
def test_a_part_says_how_its_video_is_sampled(cases, film, given):
    medium = film[0] if given == "file" else {"array": film[1], "fps": 10.0}
    part = {"type": "video", "video": medium}
    folder = cases["vl"].path
    plain = Processor(folder)
    assert grid(plain([user(part)])[0]) == (6, 4, 6)  # two frames a second, two a step
    for options, steps in (
        ({"fps": 1.0}, 3),
        ({"max_frames": 4}, 2),
        ({"fps": 5, "max_frames": 20}, 10),
    ):
        got = plain([user({**part, **options})])
        assert grid(got[0]) == (steps, 4, 6)
        assert_same(got, Processor(folder, media=MediaConfig(**options))([user(part)]))
    nothing = dict.fromkeys(("fps", "max_frames", "min_pixels"))
    prepare = Preparation(plain)
    assert_same(prepare([(user({**part, **nothing}), "input 0")]), plain([user(part)]))


@pytest.mark.parametrize("kind", MEDIA)
def test_a_part_says_nothing_else(cases, kind):
    """The key is named before the medium is looked at."""
    (error,) = Preparation(Processor(cases["omni"].path))(
        [([{"type": kind, kind: 0, "shortest_edge": 1}], "this one")]
    )
    assert isinstance(error, LcoError)
    assert str(error).startswith("this one[0] has the unknown key 'shortest_edge'")


# ---- pixels


SIZES = [(84, 140), (97, 181), (25, 19), (3, 5), (113, 112), (30, 290)]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", ["vl", "llava_mistral"])
def test_pixels_stay_bytes_and_normalise_as_transformers(cases, family, size):
    """To the last bit, as the tower reads them on the device."""
    folder, pixels = cases[family].path, picture(1, *size)
    processor = Processor(folder)
    (placed,) = processor([user({"type": "image", "image": pixels}, "x")])[0].media
    medium = placed.medium
    rows = processor.rows[placed.tower]
    width = rows.width([medium])
    packed = rows.assign([medium], width)
    filled = fill(rows, [([medium], packed)], packed.num_rows, width)
    theirs = transformers.AutoImageProcessor.from_pretrained(folder, backend="pil")
    want = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"]
    if family == "vl":
        assert filled["patches"].dtype == np.uint8
        # of which a still has one picture
        values = filled["patches"].reshape(packed.num_rows, width, 3, 1, -1)
        got = np.asarray(jax.jit(normalised)(values, filled["scale"]))
        got = np.repeat(got, 2, axis=3).reshape(-1, want.shape[-1])[packed.inputs[0]]
    else:
        assert filled["pixels"].dtype == np.uint8
        got = np.asarray(jax.jit(normalised)(filled["pixels"][:, None], filled["scale"]))[:, 0]
        want = want[0]
    assert got.dtype == want.dtype == np.float32
    np.testing.assert_array_equal(got, want)


def test_layouts_of_frames_are_remembered_in_bounds():
    assert 0 < arrange_frame.cache_info().maxsize <= 256


# ---- training


def test_a_batch_of_no_record_has_no_finite_loss(cases):
    """So its step changes nothing (`make_train_step` keeps what it had)."""
    processor, mesh = (
        Processor(cases["vl"].path, max_tokens=40),
        make_mesh(devices=jax.devices()[:1]),
    )
    layout = pipeline.Layout(2, 0, processor.tokenizer.prefix, on_bad="skip")
    records = [Record(LONG, "a dog", (), f"record {i}") for i in (0, 1)]  # too long for the model
    local = pipeline._prepare(records, layout, processor, None, 1, 0)
    assert (len(local.inputs), len(local.skipped)) == (0, 2)
    with jax.set_mesh(mesh):
        batch = pipeline.global_batch(local, layout, processor.rows, mesh)
    present = np.asarray(batch.sequences) >= 0
    assert present.shape == (2, 2)
    assert not present.any()
    embeddings = jnp.asarray(np.random.default_rng(0).normal(size=(2, 2, 8)), jnp.float32)
    loss = jax.jit(lambda present: info_nce(embeddings, present, 0.03)[0])
    assert np.isnan(float(loss(present)))
    present[0] = True
    assert np.isfinite(float(loss(present)))
