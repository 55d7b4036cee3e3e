"""What code for sentence-transformers calls: `OmniEmbedder` takes it, or says what ours is."""

import inspect
import re

import jax
import numpy as np
import pytest
import torch

from lco_jax import LcoError, OmniEmbedder, make_mesh
from lco_jax.sentence_methods import SentenceMethods
from lco_jax.vector_form import VectorForm

TEXTS = ["a dog", "a cat on the stairs", "two birds"]


@pytest.fixture
def fresh(tiny):
    """The tiny model, with prompts of its own."""
    return OmniEmbedder(tiny.model, tiny.params, tiny.processor, tiny.mesh)


@pytest.mark.slow  # to import them takes long
def test_options_stand_in_their_order():
    from sentence_transformers import SentenceTransformer

    def order(method):
        named = inspect.signature(method).parameters.values()
        return [one.name for one in named if one.kind is one.POSITIONAL_OR_KEYWORD]

    theirs = [
        name for name in order(SentenceTransformer.encode) if name not in ("pool", "chunk_size")
    ]
    assert order(OmniEmbedder.encode) == theirs
    for name in ("encode_query", "encode_document"):
        ours = order(getattr(OmniEmbedder, name))
        assert ours == order(getattr(SentenceTransformer, name))[: len(ours)]
    for name in ("similarity", "similarity_pairwise"):
        theirs = order(getattr(SentenceTransformer, name))
        assert order(getattr(OmniEmbedder, name)) == theirs[1:]  # ours are static


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["int8", "uint8", "binary", "ubinary"])
def test_precisions_are_theirs(precision):
    from sentence_transformers.util import quantize_embeddings

    vectors = np.random.default_rng(0).normal(size=(200, 64)).astype(np.float32)
    vectors[:, 3] = 0.5  # a dimension without a range
    got = VectorForm(precision=precision).of(vectors, single=False)
    want = quantize_embeddings(vectors, precision)
    assert got.dtype == want.dtype
    np.testing.assert_array_equal(got, want)


def test_precisions_and_widths(tiny):
    vectors = tiny.encode(TEXTS)
    signs = tiny.encode(TEXTS, precision="ubinary")
    np.testing.assert_array_equal(np.unpackbits(signs, axis=1).astype(bool), vectors > 0)
    levels = tiny.encode(TEXTS, precision="uint8")
    assert (levels.min(axis=0) == 0).all()
    assert (levels.max(axis=0) >= 254).all()
    few = tiny.encode(TEXTS, truncate_dim=16)
    np.testing.assert_allclose(
        few, vectors[:, :16] / np.linalg.norm(vectors[:, :16], axis=1)[:, None]
    )
    raw = tiny.encode(TEXTS, truncate_dim=16, normalize_embeddings=False)
    np.testing.assert_array_equal(raw, tiny.encode(TEXTS, normalize_embeddings=False)[:, :16])


def test_tensors_of_torch(tiny):
    vectors = tiny.encode(TEXTS)
    tensor = tiny.encode(TEXTS, convert_to_tensor=True)
    assert isinstance(tensor, torch.Tensor)
    np.testing.assert_array_equal(tensor.numpy(), vectors)
    assert tiny.encode("a dog", convert_to_tensor=True).shape == (tiny.dimension,)
    listed = tiny.encode(TEXTS, convert_to_numpy=False)
    assert [type(one) for one in listed] == 3 * [torch.Tensor]
    np.testing.assert_allclose(tiny.similarity(tensor, listed), vectors @ vectors.T, atol=1e-6)


def test_queries_and_documents_have_the_prompts_of_their_names(fresh):
    plain = fresh.encode(TEXTS)
    np.testing.assert_array_equal(fresh.encode_query(TEXTS), plain)
    np.testing.assert_array_equal(fresh.encode_document(TEXTS), plain)
    fresh.prompts["query"] = "\nThe answer in one word:"
    fresh.prompts["passage"] = "\nWhat it says in one word:"
    asked = fresh.encode(TEXTS, prompt=fresh.prompts["query"])
    assert np.abs(asked - plain).max() > 1e-3
    np.testing.assert_array_equal(fresh.encode_query(TEXTS), asked)
    np.testing.assert_array_equal(fresh.encode(TEXTS, "query"), asked)
    np.testing.assert_array_equal(fresh.encode_query(TEXTS, "text"), plain)
    said = fresh.encode(TEXTS, None, fresh.prompts["passage"])
    np.testing.assert_array_equal(fresh.encode_document(TEXTS), said)
    np.testing.assert_array_equal(
        fresh.encode_document(TEXTS, prompt=fresh.prompts["query"]), asked
    )


@pytest.mark.parametrize("place", ["nowhere", None, 3, ["before"]])
def test_prompts_stand_at_a_place_that_there_is(fresh, place):
    says = f"prompt_place is {place!r}; it is one of: instead, system, before, after"
    with pytest.raises(LcoError, match=re.escape(says)):
        fresh.prompt_place = place
    assert fresh.prompt_place == "instead"


def test_similarity_of_pairs(tiny):
    a, b = np.eye(3)[[0, 1]], [[2.0, 0, 0], [0, 1, 1]]
    np.testing.assert_allclose(tiny.similarity_pairwise(a, b), [1, 0.5**0.5], atol=1e-6)
    np.testing.assert_allclose(tiny.similarity_pairwise(a[0], b[0]), [1], atol=1e-6)
    with pytest.raises(LcoError, match="2 and 1 vectors are no pairs"):
        tiny.similarity_pairwise(a, b[0])


def test_the_dimension_has_their_names(tiny):
    names = (tiny.get_embedding_dimension(), tiny.get_sentence_embedding_dimension())
    assert names == (tiny.dimension, tiny.dimension)
    assert tiny.similarity_fn_name == "cosine"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"normalize": True}, "encode does not take normalize; it is normalize_embeddings"),
        ({"show_progress": True}, "it is show_progress_bar"),
        ({"pool": {}}, "the model's mesh shares the work"),
        ({"processing_kwargs": {}}, "from_pretrained(media=…)"),
        ({"task": "query"}, "a model here has no tasks; give prompt or prompt_name"),
        ({"nonsense": 1}, "encode does not take nonsense; see help(OmniEmbedder.encode)"),
        ({"output_value": "token_embeddings"}, "encode_layers returns the states"),
        ({"output_value": None}, "output_value is None"),
        ({"device": "cuda:1"}, "device is 'cuda:1', and the model is on cpu:0"),
        ({"device": torch.device("cuda")}, "choose with from_pretrained(mesh=make_mesh(devices"),
        ({"device": ["cpu:0", "cpu:1"]}, "device is ['cpu:0', 'cpu:1']"),
        ({"device": 3}, "device is 3"),
        ({"device": []}, "device is [], and the model is on cpu:0"),
        ({"prompt_name": "query"}, "prompt_name is 'query', and model.prompts has text, image"),
        ({"prompt_name": 3}, "prompt_name is 3"),
        ({"precision": "int4"}, "precision is 'int4'; it is one of: float32, float16, int8"),
        ({"precision": "int8", "on_error": "skip"}, "a skipped input's vector is NaN"),
        ({"truncate_dim": 0}, "truncate_dim is 0"),
        ({"truncate_dim": 129}, "truncate_dim is 129; the model's vectors have 128"),
        ({"convert_to_tensor": "yes"}, "convert_to_tensor is 'yes'"),
        ({"convert_to_numpy": None}, "convert_to_numpy is None"),
    ],
)
def test_what_has_no_meaning_here_says_what_to_give(load, options, says):
    one = load("builtin:tiny", mesh=make_mesh(devices=jax.devices()[:1]))
    with pytest.raises(LcoError, match=re.escape(says)):
        one.encode(["a", "b"], **options)


def test_what_the_methods_need_of_a_model():
    assert SentenceMethods.__abstractmethods__ == {"encode", "dimension", "modalities"}


def test_one_vector_has_no_range(tiny):
    with pytest.raises(LcoError, match="precision is int8, and a single vector has no range"):
        tiny.encode("a dog", precision="int8")


def test_the_models_own_devices_may_be_named(tiny):
    want = tiny.encode("a dog")
    every = [f"cpu:{device.id}" for device in jax.devices()]
    for device in ("cpu", torch.device("cpu"), every, jax.devices()):
        np.testing.assert_array_equal(tiny.encode("a dog", device=device), want)


def test_a_model_says_what_it_is(load):
    one = load("builtin:tiny", mesh=make_mesh(devices=jax.devices()[:2], fsdp=2), quantize="int8")
    assert repr(one).splitlines() == [
        "OmniEmbedder(",
        "  text, image, video -> 128 numbers",
        "  qwen2_5_vl, 577k parameters in the decoder (3 layers of 128)",
        "  from builtin:tiny",
        "  float32, decoder in int8, on 2 cpu (data 1, fsdp 2, tensor 1)",
        ")",
    ]
