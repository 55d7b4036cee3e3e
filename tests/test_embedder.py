"""What `OmniEmbedder` takes, and the shape and order of its vectors."""

import io
import re

import jax.numpy as jnp
import numpy as np
import pandas
import pytest
import torch

from lco_jax import LcoError, MediaConfig, OmniEmbedder
from lco_jax.data.content import as_content
from lco_jax.data.inputs import as_list
from lco_jax.data.video import load_video

TEXTS = [
    "a dog",
    "",
    "a much longer text about two dogs and a cat on the stairs of a house",
    "\nstarts with a newline",
]


@pytest.fixture(scope="module")
def embedder(cache):
    return OmniEmbedder.from_pretrained("builtin:tiny")


def test_strings_mappings_and_conversations_in_one_call_in_input_order(embedder):
    prompt = "\nSummarize the above text in one word:"
    chat = [{"role": "user", "content": [{"type": "text", "text": "a cat" + prompt}]}]
    vectors = embedder.encode(["a dog", {"text": "a cat"}, chat])
    np.testing.assert_allclose(vectors[0], embedder.encode("a dog"), atol=1e-6)
    np.testing.assert_allclose(vectors[1], vectors[2], atol=1e-6)
    assert vectors.shape == (3, embedder.dimension)
    assert np.abs(vectors[0] - vectors[1]).max() > 1e-3


def test_one_input_gives_one_vector_and_none_give_none(embedder):
    assert (
        embedder.encode("a dog").shape
        == embedder.encode({"text": "a dog"}).shape
        == (embedder.dimension,)
    )
    assert embedder.encode([{"role": "user", "content": "a dog"}]).shape == (embedder.dimension,)
    assert embedder.encode([]).shape == (0, embedder.dimension)
    assert embedder.encode(["a dog"]).shape == (1, embedder.dimension)
    assert embedder.encode(text for text in TEXTS).shape == (4, embedder.dimension)


def test_normalize_is_a_choice(embedder):
    raw, unit = embedder.encode(TEXTS, normalize_embeddings=False), embedder.encode(TEXTS)
    lengths = np.linalg.norm(raw, axis=1)
    assert (np.abs(lengths - 1) > 0.1).all()
    np.testing.assert_allclose(raw / lengths[:, None], unit, atol=1e-6)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1, atol=1e-6)
    np.testing.assert_allclose(embedder.similarity(raw, unit), unit @ unit.T, atol=1e-6)
    assert embedder.similarity(unit[0], unit).shape == (1, 4)


def test_prompt_and_cut(embedder):
    assert (
        np.abs(embedder.encode("a dog", prompt="\nIn one word:") - embedder.encode("a dog")).max()
        > 1e-3
    )
    long = "one two three four five six"
    cut = embedder.processor.tokenizer.cut(long, 3)
    assert cut != long
    np.testing.assert_array_equal(embedder.encode(long, max_length=3), embedder.encode(cut))
    np.testing.assert_array_equal(
        embedder.encode({"text": long}, max_length=3), embedder.encode(cut)
    )


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ([1], "input 0 is int"),
        (["a", {"image": "cat.png"}], "input 1: image cat.png does not exist"),
        (["a", {"audio": {"array": np.zeros(16000), "sampling_rate": 16000}}], "input 1 has audio"),
        (["no-such-cat.png"], "input 0: no-such-cat.png looks like a media file"),
        ([{}], "input 0 holds nothing to embed"),
        (
            [[{"role": "user", "content": [{"type": "image", "image": "x"}]}]],
            "input 0: image x does not exist",
        ),
        (
            [[{"role": "user", "content": [{"type": "smell", "smell": "x"}]}]],
            r"input 0\[0\]\.content\[0\] has the unknown type 'smell'",
        ),
        (["x " * 40000], "input 0: .* tokens .* the model takes 32768"),
    ],
)
def test_mistakes_name_the_input(embedder, inputs, message):
    with pytest.raises(LcoError, match=message):
        embedder.encode(inputs)


def test_a_cache_that_several_processes_fill_at_once(tmp_path):
    """The second process keeps the first one's folder, and both go on."""
    from lco_jax.core.files import written_aside

    with written_aside(tmp_path / "cache", first_wins=True) as mine:
        (mine / "who").write_text("mine")
        with written_aside(tmp_path / "cache", first_wins=True) as theirs:
            (theirs / "who").write_text("theirs")
    assert (tmp_path / "cache" / "who").read_text() == "theirs"
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]


def test_batch_size_must_be_positive(embedder):
    with pytest.raises(LcoError, match="inputs is int"):
        embedder.encode(5)
    with pytest.raises(LcoError, match="batch_size is 0"):
        embedder.encode(["a"], batch_size=0)


def test_few_compilations_for_many_lengths(embedder):
    """Static shapes: a thousand texts of every length compile a handful of programs."""
    before = len(embedder.decoder_shapes)
    rng = np.random.default_rng(0)
    embedder.encode(["word " * int(n) for n in rng.integers(1, 150, 400)], batch_size=32)
    assert len(embedder.decoder_shapes) - before <= 8


# ---- what users bring along


@pytest.fixture
def files(tmp_path, monkeypatch):
    """A home folder with files that some strings name."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "my files").mkdir()
    for name in ("a.jfif", "b.JP2", "c.wmv", "d.aiff", "blob", "my files/e f.png"):
        (tmp_path / name).write_bytes(b"x")
    return tmp_path


@pytest.mark.parametrize(
    ("given", "kind"),
    [
        ("{}/a.jfif", "image"),
        ("{}/b.JP2", "image"),
        ("{}/c.wmv", "video"),
        ("{}/d.aiff", "audio"),
        ("{}/my files/e f.png", "image"),
        ("~/a.jfif", "image"),
        ("file://{}/a.jfif", "image"),
        ("FILE://{}/my%20files/e%20f.png", "image"),
        ("data:image;base64,AAAA", "image"),
        ("DATA:Audio/wav;base64," + 9000 * "A", "audio"),
        ("https://a.example/b.png?c=d", "image"),
        ("{}/a.jfif\n", "image"),
        (" data:image/png;base64,AAAA", "image"),
        ("data: image, sound and text", None),
        ("Read the file:// part", None),
        ("https://a.example/page", None),
        ("a text\nthat names b.png", None),
        (300 * "x" + " ends like cat.png", None),
        ("", None),
    ],
)
def test_a_string_is_the_medium_that_it_names(files, given, kind):
    given = given.format(files)
    content = as_content(given, "input 0")
    assert content == given if kind is None else [part["type"] for part in content] == [kind]


@pytest.mark.parametrize(
    "given",
    [
        "{}/blob",
        "file://{}/blob",
        "{}/my files/not there.png",
        "~/not there.heic",
        "file:///not/there",
        "two words.flv",
        "data:;base64,AAAA",
        "data:application/octet-stream;base64,AAAA",
    ],
)
def test_a_string_that_may_be_a_medium_is_no_text(files, given):
    with pytest.raises(LcoError, match="input 0: ") as error:
        as_content(given.format(files), "input 0")
    assert "\n" not in str(error.value)
    assert as_content({"text": given}, "input 0") == given


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("{}/my files", "my files is a folder; give its files"),
        ("{}", "is a folder; give its files"),
        ("file://{}/my files", "is a folder"),
        ("~", "is a folder"),
        ("logo.svg", "logo.svg ends like a medium in a format that is not read here; convert it"),
        ("see the logo.SVG", "in a format that is not read here"),
        ("{}/raw.cr2", "in a format that is not read here"),
        ("https://a.example/logo.svg?size=3", "in a format that is not read here"),
    ],
)
def test_folders_and_media_that_are_not_read_are_no_text(files, given, says):
    """Whether they are there or not; each error says how to give a text."""
    (files / "raw.cr2").touch()
    given = given.format(files)
    with pytest.raises(LcoError, match=r"^input 0: ") as error:
        as_content(given, "input 0")
    assert says in str(error.value)
    assert str(error.value).endswith('text can be given as {"text": …}')
    assert as_content({"text": given}, "input 0") == given


@pytest.mark.parametrize(
    "text",
    [
        "a folder",
        "openai.ai",
        "Is logo.svg a picture?",
        "two lines\nlogo.svg",
        300 * "x" + " ends like a logo.svg",
        "https://a.example/svg",
    ],
)
def test_other_strings_stay_texts(files, text):
    assert as_content(text, "input 0") == text


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (io.StringIO("a\nb\n"), 'or its lines as a list: [line.rstrip("\\n") for line in file]'),
        (io.BytesIO(b"x"), 'a file that is open; give {"image": …}'),
        ([io.StringIO("a")], "input 0 is StringIO, a text file that is open"),
        ([io.BytesIO(b"x")], 'input 0 is BytesIO, a file that is open; give {"image": …}'),
    ],
)
def test_open_files_are_not_their_lines(embedder, inputs, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        embedder.encode(inputs)


def test_arrays_in_bfloat16_are_floats(embedder):
    """Of jax, torch and numpy: exact, as their values in float32."""
    picture = jnp.asarray(np.random.default_rng(0).random((40, 56, 3)), jnp.bfloat16)
    wanted = np.asarray(picture.astype(jnp.float32))
    as_torch = torch.from_numpy(wanted.copy()).to(torch.bfloat16)
    for given in (picture, np.asarray(picture), as_torch):
        for content in ({"image": given}, given, {"type": "image", "image": given}):
            [part] = as_content(content, "x")
            assert part["image"].dtype == np.float32
            np.testing.assert_array_equal(part["image"], wanted)
    [part] = as_content({"array": picture[None], "fps": 2}, "x")
    np.testing.assert_array_equal(part["video"]["array"], wanted[None])
    [part] = as_content({"array": picture[0, :, 0], "sampling_rate": 16000}, "x")
    np.testing.assert_array_equal(part["audio"]["array"], wanted[0, :, 0])
    np.testing.assert_array_equal(embedder.encode(picture), embedder.encode({"image": wanted}))


class Metadata:
    fps = 8.0


@pytest.mark.parametrize("metadata", [{"fps": 8.0}, {"fps": 8, "duration": 1}, Metadata()])
def test_a_videos_rate_may_be_in_its_metadata(metadata):
    frames = np.zeros((8, 28, 28, 3), np.uint8)
    given = {"array": frames, "video_metadata": metadata}
    for content in (given, {"video": given}, {"type": "video", "video": given}):
        [part] = as_content(content, "x")
        assert part["video"].keys() == {"array", "fps"}
        assert load_video(part["video"], "x", MediaConfig()).fps == 4  # of the 4 frames kept
    twice = {"video": {**given, "fps": 3}}
    with pytest.raises(LcoError, match=r"^x: video has two rates|^x\.video has two rates"):
        as_content(twice, "x")
    [part] = as_content({"video": {"array": frames, "video_metadata": None}}, "x")
    assert part["video"].keys() == {"array"}


class AudioDecoder:
    """As torchcodec's and datasets'."""

    def __init__(self, samples):
        self.data, self.sample_rate = torch.from_numpy(samples[None]), 16000

    def get_all_samples(self):
        return self


def test_sound_of_a_decoder_is_an_input():
    """Alone, in a list, as a part."""
    decoder = AudioDecoder(np.zeros(400, np.float32))
    assert as_list(decoder) == ([decoder], True)
    assert as_list([decoder]) == ([decoder], False)
    for given in (decoder, {"audio": decoder}, {"type": "audio", "audio": decoder}):
        assert as_content(given, "x") == ({"type": "audio", "audio": decoder},)


@pytest.mark.parametrize(
    ("inputs", "says"),
    [
        (pandas.DataFrame({"text": ["a", "b"]}), "DataFrame; give a column"),
        ({"text": ["a", "b"]}, "one input has one text"),
        ({"a", "b"}, "which has no order"),
        (frozenset("ab"), "which has no order"),
        (b"\x89PNG", 'give {"image": …}'),
        (np.array("a text"), "without axes"),
        (np.float32(3), "without axes"),
        (3, "give a list of inputs"),
        (None, "give a list of inputs"),
    ],
)
def test_what_is_no_list_of_inputs_says_what_to_give(tiny, inputs, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        tiny.encode(inputs)


def test_lists_of_other_libraries_are_lists(tiny):
    texts = ["a dog", "a cat"]
    want = tiny.encode(texts)
    for inputs in (
        pandas.Series(texts),
        np.array(texts),
        dict.fromkeys(texts).keys(),
        (text for text in texts),
    ):
        np.testing.assert_allclose(tiny.encode(inputs), want, atol=1e-6)


def test_arrays_of_torch_and_jax_are_arrays(tiny):
    picture = np.random.default_rng(0).integers(0, 255, (56, 56, 3), np.uint8)
    want = tiny.encode({"image": picture})
    for array in (torch.from_numpy(picture), jnp.asarray(picture)):
        np.testing.assert_array_equal(tiny.encode({"image": array}), want)
        np.testing.assert_array_equal(tiny.encode([array])[0], want)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"batch_size": "8"}, "batch_size is '8'"),
        ({"batch_size": 2.5}, "batch_size is 2.5"),
        ({"batch_size": True}, "batch_size is True"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"max_tokens": float("nan")}, "max_tokens is nan"),
        ({"max_length": "300"}, "max_length is '300'"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 2.0}, "max_length is 2.0"),
        ({"max_tokens": None}, "max_tokens is None"),
        ({"max_tokens": "9"}, "max_tokens is '9'"),
        ({"workers": "2"}, "workers is '2'"),
        ({"workers": None}, "workers is None"),
        ({"workers": -1}, "workers is -1"),
        ({"on_error": None}, "on_error is None"),
        ({"normalize_embeddings": "no"}, "normalize_embeddings is 'no'"),
        ({"show_progress_bar": "x"}, "show_progress_bar is 'x'"),
        ({"progress": True}, "progress is True"),
        ({"prompt": 5}, "prompt is int 5; give a string"),
        ({"names": ["one"]}, "there are 2 inputs, and 1 names"),
        ({"names": "ab"}, "names is 'ab'"),
        ({"names": 5}, "names is 5"),
    ],
)
def test_options_of_another_type_are_named(tiny, options, says):
    with pytest.raises(LcoError, match=re.escape(says)):
        tiny.encode(["a", "b"], **options)


def test_a_model_whose_vectors_have_no_direction_is_to_blame(tiny):
    norm = {"norm": {"weight": jnp.zeros(tiny.dimension)}}
    params = {**tiny.params, "decoder": {**tiny.params["decoder"], **norm}}
    broken = OmniEmbedder(tiny.model, params, tiny.processor, tiny.mesh)
    for embed in (broken.encode, broken.encode_layers):
        with pytest.raises(LcoError, match="of length 0"):
            embed(["a dog"])


def test_a_video_without_its_rate_counts_as_sampled(tiny):
    frames = np.random.default_rng(0).integers(0, 255, (4, 56, 56, 3), np.uint8)
    got = tiny.encode({"array": frames, "video_metadata": {"total_num_frames": 4}})
    np.testing.assert_array_equal(got, tiny.encode({"video": frames}))


def test_single_messages_of_an_iterator_are_inputs_of_their_own(embedder):
    turns = [{"role": "user", "content": text} for text in ("a dog", "a cat")]
    wanted = embedder.encode([[turn] for turn in turns])
    np.testing.assert_allclose(embedder.encode(iter(turns)), wanted, atol=1e-6)


def test_one_text_is_not_its_letters(embedder):
    assert embedder.encode_layers("a dog").shape[1] == 1
    with pytest.raises(LcoError, match="inputs is a single str; give a list"):
        next(embedder.encode_blocks("a dog"))


@pytest.mark.parametrize(
    ("a", "says"),
    [
        (np.ones((2, 3)), r"shapes \(2, 3\) and \(4, 4\) cannot be compared"),
        (np.ones((1, 2, 4)), r"\(1, 2, 4\) and \(4, 4\) cannot"),
        (3.0, "cannot be compared"),
        (["a"], "give vectors"),
        ([[1, 2], [3]], "give vectors"),
        (None, "give vectors"),
        (np.full(4, np.inf), "embeddings1 holds infinity"),
    ],
)
def test_similarity_of_what_are_no_vectors_of_one_width(a, says):
    with pytest.raises(LcoError, match=says):
        OmniEmbedder.similarity(a, np.eye(4))


def test_similarity_takes_lists_and_whole_numbers():
    cosines = OmniEmbedder.similarity([2, 0], [[1.0, 0], [0, 3], [1, 1]])
    np.testing.assert_allclose(cosines, [[1, 0, 0.5**0.5]], atol=1e-6)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"path_or_id": None}, "path_or_id is None"),
        ({"adapter": 5}, "adapter is 5"),
        ({"mesh": 5}, "mesh is 5"),
        ({"media": {"fps": 1}}, "media is {'fps': 1}; give a MediaConfig"),
        ({"dtype": 5}, "dtype '5' is not supported"),
        ({"modalities": 5}, "modalities has 5"),
        ({"dtype": torch.float32}, "dtype 'torch.float32' is not supported"),
        ({"modalities": "smell"}, "modalities has 'smell'; this checkpoint takes"),
    ],
)
def test_what_from_pretrained_cannot_take_is_named(options, says):
    with pytest.raises(LcoError, match=says):
        OmniEmbedder.from_pretrained(**{"path_or_id": "builtin:tiny", **options})
