"""What `OmniEmbedder` takes, and the shape and order of its vectors."""

import numpy as np
import pytest

from lco_jax import LcoError, OmniEmbedder

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
    raw, unit = embedder.encode(TEXTS, normalize=False), embedder.encode(TEXTS)
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
