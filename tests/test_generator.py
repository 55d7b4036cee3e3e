"""What a checkpoint would say: every layer's states and the loss of an answer's tokens, as in transformers."""

import jax
import numpy as np
import pytest
import reference
from reference_media import answer_losses, audio, image, user

from lco_jax import LcoError, OmniEmbedder, make_mesh
from lco_jax.checkpoint.hf import abstract_params, open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.core import lora
from lco_jax.data.prompts import as_messages, asked

ANSWERS = ["A cat.", "Several words, and one more: 猫", "x"]
INPUTS = {
    "vl": ([image(1, 60, 84), "and?"], ["Only text"], ["Only text"]),
    "vl_tied": (["One"], ["Two, three"], ["Two, three"]),
    "omni": ([image(2, 56, 84), audio(1, 1.3)], [audio(2, 0.7)], ["Only text"]),
    "llava_qwen2": (["Only text"], [image(4, 60, 56)], ["x"]),
    "llava_llama": ([image(3, 70, 56)], ["Only text"], ["x"]),
}


@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=[] if x == "llava_llama" else pytest.mark.slow) for x in INPUTS]
)
def test_layers_and_answers_equal_transformers(cases, family):
    case, conversations = cases[family], [user(*parts) for parts in INPUTS[family]]
    model = OmniEmbedder.from_pretrained(case.path, head=True, mesh=make_mesh(devices=jax.devices()[:1]))
    want = [answer_losses(case.model, case.path, *one) for one in zip(conversations, ANSWERS, strict=True)]
    losses, counts = model.token_losses(conversations, ANSWERS)
    assert counts.tolist() == [len(each) for each, _ in want]
    np.testing.assert_allclose(losses, [each.sum() for each, _ in want], rtol=1e-5)
    layers = model.encode_layers(conversations)
    assert layers.shape == (reference.LAYERS + 1, 3, model.dimension)
    for i, (_, states) in enumerate(want):
        error = np.linalg.norm(layers[:, i] - states.numpy(), axis=-1) / np.linalg.norm(states.numpy(), axis=-1)
        assert error.max() < 1e-5
    assert np.abs(layers[-1] - model.encode(conversations, normalize=False)).max() < 1e-6 * np.abs(layers[-1]).max()


@pytest.mark.slow
def test_a_loss_depends_on_no_neighbour_and_on_no_mesh(cases):
    alone = OmniEmbedder.from_pretrained(cases["vl"].path, head=True, mesh=make_mesh(devices=jax.devices()[:1]))
    split = OmniEmbedder.from_pretrained(cases["vl"].path, head=True, mesh=make_mesh(2, 2, 2))
    inputs = [*reference.TEXTS, reference.TEXTS[1]]
    answers = [text[::-1] for text in inputs]
    want = np.concatenate([alone.token_losses([x], [y])[0] for x, y in zip(inputs, answers, strict=True)])
    np.testing.assert_allclose(alone.token_losses(inputs, answers)[0], want, rtol=1e-5)
    np.testing.assert_allclose(split.token_losses(inputs, answers, max_tokens=100)[0], want, rtol=1e-5)


def test_without_a_head_it_says_so(cases):
    model = OmniEmbedder.from_pretrained(cases["vl"].path)
    with pytest.raises(LcoError, match="head=True"):
        model.token_losses(["a"], ["b"])


def test_a_tied_head_outlives_the_merge_of_an_adapter(tmp_path, tiny):
    """An adapter of zeros changes no loss; merging gives the base's arrays away."""
    config = lora.LoraConfig(rank=2)
    adapters = lora.init(jax.random.key(0), abstract_params(open_checkpoint("builtin:tiny").config), config)
    write_peft(tmp_path / "adapter", adapters, config, "builtin:tiny")
    tuned = OmniEmbedder.from_pretrained("builtin:tiny", tmp_path / "adapter", head=True)
    want = tiny.token_losses(["a", "b c"], ["d", "e f g"])[0]
    np.testing.assert_allclose(tuned.token_losses(["a", "b c"], ["d", "e f g"])[0], want, rtol=1e-6)


def test_a_content_without_a_text_is_asked_about():
    picture, sound = np.zeros((2, 2, 3), np.uint8), {"array": np.zeros(9), "sampling_rate": 16_000}
    question = lambda item: as_messages(item, "", asked)[0]["content"][-1]["text"]  # noqa: E731
    assert question({"image": picture, "text": ""}) == "\nDescribe the above image."
    assert question({"video": picture[None]}) == "\nDescribe the above video."
    assert question({"audio": sound}) == "\nDescribe the above audio."
    assert question({"image": picture, "audio": sound}) == "\nDescribe the above."
    assert question({"image": picture, "text": "Why?"}) == question("Why?") == "Why?"
    assert question("") == ""


def test_no_answers_and_one_that_is_too_long(tiny):
    assert [x.shape for x in tiny.token_losses([], [])] == [(0,), (0,)]
    with pytest.raises(LcoError, match="input 1 and its answer exceed the model's 32768 tokens"):
        tiny.token_losses(["a", "b"], ["c", "word " * 40_000])
