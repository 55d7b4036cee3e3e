"""LangChain and BERTopic on `OmniEmbedder`, by the recipes of docs/embedding.md, word for word."""

import re
from pathlib import Path

import numpy as np
import pytest

TEXTS = ["the dog sleeps on the stairs", "a cat drinks milk", "photo.jpg"]
DOCS = (Path(__file__).parent.parent / "docs" / "embedding.md").read_text(encoding="utf-8")


def recipe(word, **names):
    """What a block of the page defines that has this word. names: what it finds there."""
    blocks = re.findall(r"```python\n(.*?)```", DOCS, re.DOTALL)
    (block,) = [block for block in blocks if word in block]
    exec(block, names)
    return names


def test_langchain_searches(tiny):
    pytest.importorskip("langchain_core")
    from langchain_core.vectorstores import InMemoryVectorStore

    embeddings = recipe("langchain_core", model=tiny)["embeddings"]
    vectors = tiny.encode([{"text": text} for text in TEXTS])
    np.testing.assert_array_equal(embeddings.embed_documents(TEXTS), vectors)
    np.testing.assert_allclose(embeddings.embed_query(TEXTS[2]), vectors[2], atol=1e-6)
    store = InMemoryVectorStore.from_texts(TEXTS, embeddings)
    for text in TEXTS:
        [(found, score)] = store.similarity_search_with_score(text, k=1)
        assert (found.page_content, score) == (text, pytest.approx(1))


def test_langchains_own_wrapper_calls_it_as_sentence_transformers(tiny):
    """It loads models by name; all that it calls of one is here."""
    pytest.importorskip("langchain_huggingface")
    from langchain_huggingface import HuggingFaceEmbeddings

    options = {"normalize_embeddings": True, "batch_size": 2, "device": "cpu"}
    wrapper = HuggingFaceEmbeddings.model_construct(encode_kwargs=options)
    wrapper._client = tiny
    vectors = tiny.encode(TEXTS[:2])
    np.testing.assert_allclose(wrapper.embed_documents(TEXTS[:2]), vectors, atol=1e-6)
    np.testing.assert_allclose(wrapper.embed_query(TEXTS[0]), vectors[0], atol=1e-6)


@pytest.mark.slow
def test_bertopic_finds_topics(tiny):
    pytest.importorskip("bertopic")
    subjects = ("the dog barks", "stocks fall in Asia", "boil the rice")
    documents = [f"{subject}, number {i}" for subject in subjects for i in range(20)]
    found = recipe("bertopic", model=tiny, documents=documents)
    topic_model, topics = found["topic_model"], found["topics"]
    assert len(topics) == len(documents)
    assert set(topic_model.get_topic_info().Topic) == set(topics)
    embedded = topic_model.embedding_model.embed(documents[:2])
    np.testing.assert_allclose(embedded, tiny.encode(documents[:2]), atol=1e-6)
    assert topic_model.find_topics("a dog", top_n=1)[0][0] in topics
