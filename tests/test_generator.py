"""What a checkpoint would say: every layer's states and the loss of an answer's tokens, as in transformers."""

import jax
import numpy as np
import pytest
import reference
from reference_media import answer_losses, audio, image, said, user, video

from lco_jax import LcoError, OmniGenerator, make_mesh
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
    model = OmniGenerator.from_pretrained(case.path, mesh=make_mesh(devices=jax.devices()[:1]))
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
    alone = OmniGenerator.from_pretrained(cases["vl"].path, mesh=make_mesh(devices=jax.devices()[:1]))
    split = OmniGenerator.from_pretrained(cases["vl"].path, mesh=make_mesh(2, 2, 2))
    inputs = [*reference.TEXTS, reference.TEXTS[1]]
    answers = [text[::-1] for text in inputs]
    want = np.concatenate([alone.token_losses([x], [y])[0] for x, y in zip(inputs, answers, strict=True)])
    np.testing.assert_allclose(alone.token_losses(inputs, answers)[0], want, rtol=1e-5)
    np.testing.assert_allclose(split.token_losses(inputs, answers, max_tokens=100)[0], want, rtol=1e-5)


QUESTIONS = {
    "vl": [*INPUTS["vl"], [video(1, 6, 56, 84, 1.5), "Why?"]],
    "vl_tied": [*INPUTS["vl_tied"], [image(5, 60, 56), "and?"], [video(2, 4, 56, 56, 2.0)]],
    "omni": [*INPUTS["omni"], [video(3, 4, 56, 84, 2.0), "Why?"]],
    "llava_qwen2": INPUTS["llava_qwen2"],
    "llava_llama": INPUTS["llava_llama"],
    "llava_mistral": [["Only text"], [image(6, 60, 100), "What is this?"]],
}


@pytest.mark.parametrize("family", QUESTIONS)
def test_answers_equal_transformers(cases, family):
    case, conversations = cases[family], [user(*parts) for parts in QUESTIONS[family]]
    one = make_mesh(devices=jax.devices()[:1])
    model = OmniGenerator.from_pretrained(case.path, mesh=one, video_positions="5")
    model.ends = np.array([model.ends[0], 77], np.int32)
    want = [said(case.model, case.path, one, 12, model.ends.tolist()) for one in conversations]
    assert [ids.tolist() for ids in model.generate_ids(conversations, 12)] == want
    print(want)


@pytest.fixture(scope="module")
def tiny(cache):
    return OmniGenerator.from_pretrained("builtin:tiny")


def test_a_tied_head_outlives_the_merge_of_an_adapter(tmp_path, tiny):
    """An adapter of zeros changes no loss; merging gives the base's arrays away."""
    config = lora.LoraConfig(rank=2)
    adapters = lora.init(jax.random.key(0), abstract_params(open_checkpoint("builtin:tiny").config), config)
    write_peft(tmp_path / "adapter", adapters, config, "builtin:tiny")
    tuned = OmniGenerator.from_pretrained("builtin:tiny", tmp_path / "adapter")
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
