"""Answers, their losses and every layer's states, as in transformers; and `generate`."""

import json
from functools import cache
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import reference
from PIL import Image
from reference_media import answer_losses, audio, generated, image, picture, user, video

from lco_jax import LcoError, OmniGenerator, generate, make_mesh
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.files import read_json, write_json
from lco_jax.data.prompts import as_messages, asked
from lco_jax.evaluation.answers import score
from lco_jax.generator import turn_ends

ANSWERS = ["A cat.", "Several words, and one more: 猫", "x"]
INPUTS = {
    "vl": ([image(1, 60, 84), "and?"], ["Only text"], ["Only text"]),
    "vl_tied": (["One"], ["Two, three"], ["Two, three"]),
    "omni": ([image(2, 56, 84), audio(1, 1.3)], [audio(2, 0.7)], ["Only text"]),
    "llava_qwen2": (["Only text"], [image(4, 60, 56)], ["x"]),
    "llava_llama": ([image(3, 70, 56)], ["Only text"], ["x"]),
}


@cache
def load_generator(path):
    """On one device, with the positions of video that transformers has now."""
    return OmniGenerator.from_pretrained(
        path, mesh=make_mesh(devices=jax.devices()[:1]), video_positions="5"
    )


@pytest.mark.parametrize(
    "family",
    [pytest.param(x, marks=[] if x == "llava_llama" else pytest.mark.slow) for x in INPUTS],
)
def test_layers_and_answers_equal_transformers(cases, family):
    case, conversations = cases[family], [user(*parts) for parts in INPUTS[family]]
    model = load_generator(case.path)
    want = [
        answer_losses(case.model, case.path, *one)
        for one in zip(conversations, ANSWERS, strict=True)
    ]
    losses, counts = model.token_losses(conversations, ANSWERS)
    assert counts.tolist() == [len(each) for each, _ in want]
    np.testing.assert_allclose(losses, [each.sum() for each, _ in want], rtol=1e-5)
    layers = model.encode_layers(conversations)
    assert layers.shape == (reference.LAYERS + 1, 3, model.dimension)
    for i, (_, states) in enumerate(want):
        error = np.linalg.norm(layers[:, i] - states.numpy(), axis=-1) / np.linalg.norm(
            states.numpy(), axis=-1
        )
        assert error.max() < 1e-5
    assert (
        np.abs(layers[-1] - model.encode(conversations, normalize_embeddings=False)).max()
        < 1e-6 * np.abs(layers[-1]).max()
    )


@pytest.mark.slow
def test_losses_and_answers_depend_on_no_neighbour_and_on_no_mesh(cases):
    alone = load_generator(cases["vl"].path)
    split = OmniGenerator.from_pretrained(cases["vl"].path, mesh=make_mesh(2, 2, 2))
    inputs = [*reference.TEXTS, reference.TEXTS[1]]
    answers = [text[::-1] for text in inputs]
    want = np.concatenate(
        [alone.token_losses([x], [y])[0] for x, y in zip(inputs, answers, strict=True)]
    )
    np.testing.assert_allclose(alone.token_losses(inputs, answers)[0], want, rtol=1e-5)
    np.testing.assert_allclose(
        split.token_losses(inputs, answers, max_tokens=100)[0], want, rtol=1e-5
    )
    inputs = [*inputs[:3], {"image": picture(1, 56, 84)}]
    want = [ids.tolist() for ids in alone.generate_ids(inputs, 8)]
    assert [ids.tolist() for ids in split.generate_ids(inputs, 8)] == want


QUESTIONS = {
    "vl": [*INPUTS["vl"], [video(1, 6, 56, 84, 1.5), "Why?"]],
    "vl_tied": [
        *INPUTS["vl_tied"],
        [image(5, 60, 56), "and?"],
        [video(2, 8, 56, 56, 0.4)],
    ],  # its times exceed what follows
    "omni": [*INPUTS["omni"], [video(3, 4, 56, 84, 2.0), "Why?"]],
    "llava_mistral": [["Only text"], [image(6, 60, 100), "What is this?"]],
}


@pytest.mark.parametrize(
    "family", [pytest.param(x, marks=[] if x == "vl_tied" else pytest.mark.slow) for x in QUESTIONS]
)
def test_answers_equal_transformers(cases, family, monkeypatch):
    """Also where it ends: one of two tokens that end a turn is the sixth of the last answer."""
    case, conversations = cases[family], [user(*parts) for parts in QUESTIONS[family]]
    model = load_generator(case.path)
    [end] = model.ends
    monkeypatch.setattr(model, "ends", np.array([end, end], np.int32))
    want = [generated(case.model, case.path, one, 12, model.ends.tolist()) for one in conversations]
    found = model.generate_ids(conversations, 12)
    assert [ids.tolist() for ids in found] == want
    assert len({*want[-1]}) > 3
    monkeypatch.setattr(model, "ends", np.array([want[-1][5], end], np.int32))
    cut = [ids[: ids.index(want[-1][5]) + 1] if want[-1][5] in ids else ids for ids in want]
    assert [ids.tolist() for ids in model.generate_ids(conversations, 12)] == cut
    assert want[-1][5] not in model.tokenizer.ids(model.generate(conversations, 12))[-1]


def test_a_cache_changes_no_token_of_a_tuned_and_quantized_model(cases, tmp_path, monkeypatch):
    """The sixth token is the first after the prompt and the five tokens before it, read anew."""
    config = lora.LoraConfig(rank=2)
    drawn = np.random.default_rng(0)
    adapters = lora.init(
        jax.random.key(0), abstract_params(open_checkpoint(cases["vl_tied"].path).config), config
    )
    adapters = jax.tree.map(lambda x: jnp.asarray(drawn.normal(0, 0.1, x.shape), x.dtype), adapters)
    write_peft(tmp_path / "adapter", adapters, config, "x")
    one = make_mesh(devices=jax.devices()[:1])
    model = OmniGenerator.from_pretrained(
        cases["vl_tied"].path, tmp_path / "adapter", mesh=one, quantize="int8"
    )
    found = model.generate_ids(reference.TEXTS, 6)
    attempt, before = model.processor.attempt, iter([ids[:5] for ids in found])

    def after(*given):
        return [one.followed_by(next(before)) for one in attempt(*given)]

    monkeypatch.setattr(model.processor, "attempt", after)
    assert [ids.tolist() for ids in model.generate_ids(reference.TEXTS, 1)] == [
        [ids[5]] for ids in found
    ]


def test_the_tokens_that_end_a_turn(tmp_path):
    tokenizer = SimpleNamespace(tokenizer=SimpleNamespace(eos_token_id=1))
    codec = SimpleNamespace(vocab_size=6)
    processor = SimpleNamespace(folder=tmp_path, tokenizer=tokenizer, codec=codec)
    for name, content, want in [
        ("config.json", {"text_config": {"eos_token_id": None}}, [1]),
        ("config.json", {"text_config": {"eos_token_id": 2}}, [2]),
        ("config.json", {"eos_token_id": 3, "text_config": {"eos_token_id": 2}}, [3]),
        ("generation_config.json", {"max_length": 20}, [3]),
        ("generation_config.json", {"eos_token_id": [4, 5]}, [4, 5]),
    ]:
        write_json(tmp_path / name, content)
        assert turn_ends(processor) == want


def test_scores_equal_a_computation_by_hand():
    """kitten, sitting: two substitutions and an insertion (Levenshtein)."""
    scores = score(["kitten", " a big dog\n", "No", "a  b"], ["sitting", "a dog", "no", "a b"])
    want = {
        "records": 4,
        "exact_match": 0,
        "cer": (3 / 7 + 4 / 5 + 1 / 2 + 1 / 3) / 4,
        "corpus_cer": 9 / 17,
        "wer": (1 + 1 / 2 + 1 + 0) / 4,
        "corpus_wer": 3 / 6,
    }
    assert scores == pytest.approx(want)
    assert score([" a\n"], ["a"])["exact_match"] == 1
    with pytest.raises(LcoError, match="reference 1 is white space alone"):
        score(["a", "b"], ["a", " \n"])


def test_generate_answers_and_scores_files(tmp_path, run_command, monkeypatch, tiny):
    monkeypatch.setattr(OmniGenerator, "from_pretrained", lambda *_, **__: tiny)
    Image.fromarray(picture(1, 56, 56)).save(tmp_path / "a.png")
    records = [
        {"anchor": {"image_path": "a.png"}, "positive": "a cat"},
        {"anchor": "Why?", "positive": "So"},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(x) + "\n" for x in records))
    (tmp_path / "in.jsonl").write_text(
        json.dumps({"image": "a.png"}) + "\n" + json.dumps("Why?") + "\n"
    )
    want = tiny.generate([{"image": tmp_path / "a.png"}, {"text": "Why?"}], 4)
    status, out, _ = run_command(generate, f"--input={tmp_path}/in.jsonl", "--max-new-tokens=4")
    assert not status
    assert [json.loads(line)["answer"] for line in out.splitlines()] == want
    for flags in (
        ["--score", f"--input={tmp_path}/data.jsonl", f"--output={tmp_path}/out"],
        [f"--data={tmp_path}/data.jsonl", f"--out={tmp_path}/out"],  # the earlier names
    ):
        status, out, _ = run_command(generate, *flags, "--max-new-tokens=4")
        assert not status
        assert "| corpus_cer |" in out
        text = (tmp_path / "out/answers.jsonl").read_text()
        lines = [json.loads(line) for line in text.splitlines()]
        pairs = [(x["answer"], x["reference"]) for x in lines]
        assert pairs == [*zip(want, ["a cat", "So"], strict=True)]
        results = read_json(tmp_path / "out/results.json")
        assert score(want, ["a cat", "So"]).items() <= results.items()


def test_generate_names_flags_that_do_not_go_together(tmp_path, run_command, monkeypatch, tiny):
    monkeypatch.setattr(OmniGenerator, "from_pretrained", lambda *_, **__: tiny)
    (tmp_path / "in.jsonl").write_text('"Why?"\n')
    bad = {"anchor": "Why?", "positive": {"image_path": "a.png"}}
    (tmp_path / "bad.jsonl").write_text(json.dumps(bad) + "\n")
    (tmp_path / "a.png").touch()
    for flags, message in [
        ([], "give --input"),
        (["--score", "--input=x.jsonl"], "--score needs --output"),
        (["--data=x.jsonl"], "--score needs --output"),
        (["--data=x.jsonl", "--input=y.jsonl"], "give one of them"),
        (["--score", "--input=x", "--output=y", "--id-field=z"], "--id-field does not go with"),
        (["--input=x.jsonl", "--output=z.npy"], "--output=z.npy: the file must end in .jsonl"),
        (
            [f"--input={tmp_path}/in.jsonl", "--max-new-tokens=0"],
            "--max-new-tokens=0: it must be at least 1",
        ),
        (
            ["--score", f"--input={tmp_path}/bad.jsonl", f"--output={tmp_path}/y"],
            "bad.jsonl:1: the positive is the answer, and must be a text",
        ),
    ]:
        status, _, err = run_command(generate, *flags)
        assert (status, message in err) == (2, True), err


@pytest.fixture(scope="module")
def tiny():
    return OmniGenerator.from_pretrained("builtin:tiny", mesh=make_mesh(devices=jax.devices()[:1]))


def test_a_tied_head_outlives_the_merge_of_an_adapter(tmp_path, tiny):
    """An adapter of zeros changes no loss; merging gives the base's arrays away."""
    config = lora.LoraConfig(rank=2)
    adapters = lora.init(
        jax.random.key(0), abstract_params(open_checkpoint("builtin:tiny").config), config
    )
    write_peft(tmp_path / "adapter", adapters, config, "builtin:tiny")
    tuned = OmniGenerator.from_pretrained("builtin:tiny", tmp_path / "adapter")
    want = tiny.token_losses(["a", "b c"], ["d", "e f g"])[0]
    np.testing.assert_allclose(tuned.token_losses(["a", "b c"], ["d", "e f g"])[0], want, rtol=1e-6)


def test_an_answers_loss_is_asked_for_as_answers_are(cases):
    model = OmniGenerator.from_pretrained(
        cases["vl"].path, mesh=make_mesh(devices=jax.devices()[:1])
    )
    picture = image(1, 60, 84)["image"]
    inputs = [{"image": picture}, {"image": picture, "text": "\nDescribe the above image."}]
    asked_for, asking = model.token_losses(inputs, ["A cat."] * 2)[0]
    assert asked_for == asking != model.token_losses([inputs[0]], ["A cat."], prompt="\nWhy?")[0]


def test_a_content_without_a_text_is_asked_about():
    picture, sound = np.zeros((2, 2, 3), np.uint8), {"array": np.zeros(9), "sampling_rate": 16_000}

    def question(item):
        return as_messages(item, "", asked)[0]["content"][-1]["text"]

    assert question({"image": picture, "text": ""}) == "\nDescribe the above image."
    assert question({"video": picture[None]}) == "\nDescribe the above video."
    assert question({"audio": sound}) == "\nDescribe the above audio."
    assert question({"image": picture, "audio": sound}) == "\nDescribe the above."
    assert question({"image": picture, "text": "Why?"}) == question("Why?") == "Why?"
    assert question("") == ""


def test_no_answers_and_one_that_is_too_long(tiny):
    assert tiny.generate([]) == []
    with pytest.raises(LcoError, match="max_new_tokens is 0"):
        tiny.generate(["a"], 0)
    with pytest.raises(
        LcoError, match="input 1 and max_new_tokens=32700 exceed the model's 32768 tokens"
    ):
        tiny.generate(["a", "b" * 1000], 32_700)
    assert [x.shape for x in tiny.token_losses([], [])] == [(0,), (0,)]
    with pytest.raises(LcoError, match="input 1 and its answer exceed the model's 32768 tokens"):
        tiny.token_losses(["a", "b"], ["c", "word " * 40_000])


def test_generate_skips_bad_inputs(tmp_path, run_command, monkeypatch, tiny):
    """Of a folder, and of a table with a null; as `embed` does."""
    monkeypatch.setattr(OmniGenerator, "from_pretrained", lambda *_, **__: tiny)
    folder, output = tmp_path / "media", tmp_path / "answers.jsonl"
    folder.mkdir()
    Image.fromarray(picture(1, 56, 56)).save(folder / "a.png")
    (folder / "b.png").write_bytes(b"torn")
    (folder / "c.txt").touch()
    command = [f"--input={folder}", f"--output={output}", "--max-new-tokens=4", "--workers=0"]
    assert run_command(generate, *command)[0] == 2
    status, out, err = run_command(generate, *command, "--on-error=skip")
    assert status == 0, err
    assert "2 answers: " in out
    assert "1 of them are empty: " in out
    assert out.endswith("left out: .txt 1\n")
    (want,) = tiny.generate([{"image": folder / "a.png"}], 4)
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers == [{"id": "a.png", "answer": want}, {"id": "b.png", "answer": None}]
    (line,) = (tmp_path / "answers.jsonl.skipped.jsonl").read_text().splitlines()
    assert json.loads(line)["id"] == "b.png"
    pq.write_table(pa.table({"text": ["Why?", None]}), tmp_path / "t.parquet")
    status, out, _ = run_command(
        generate, f"--input={tmp_path / 't.parquet'}", "--max-new-tokens=4", "--on-error=skip"
    )
    assert status == 0
    (want,) = tiny.generate([{"text": "Why?"}], 4)
    assert [json.loads(line)["answer"] for line in out.splitlines()] == [want, None]


def test_scores_count_only_answered_records(tmp_path, run_command, monkeypatch, tiny):
    """What is skipped is counted, printed and recorded."""
    monkeypatch.setattr(OmniGenerator, "from_pretrained", lambda *_, **__: tiny)
    Image.fromarray(picture(1, 56, 56)).save(tmp_path / "a.png")
    (tmp_path / "torn.png").write_bytes(b"torn")
    lines = [
        json.dumps({"anchor": {"image": "a.png"}, "positive": "a cat"}),
        json.dumps({"anchor": {"image": "torn.png"}, "positive": "never"}),
        '{"anchor": ',
        json.dumps({"anchor": "Why?", "positive": {"image": "a.png"}}),  # no answer
        json.dumps({"anchor": {"image": "gone.png"}, "positive": "never"}),
        json.dumps({"anchor": "Why?", "positive": "So"}),
    ]
    data, output = tmp_path / "data.jsonl", tmp_path / "out"
    data.write_text("\n".join(lines))
    command = ["--score", f"--input={data}", f"--output={output}", "--max-new-tokens=4"]
    command.append("--workers=0")
    status, _, err = run_command(generate, *command)
    assert status == 2
    assert "data.jsonl:3: not valid JSON" in err
    status, out, err = run_command(generate, *command, "--on-error=skip")
    assert status == 0, err
    answers = tiny.generate([{"image": tmp_path / "a.png"}, {"text": "Why?"}], 4)
    want = score(answers, ["a cat", "So"])
    results = read_json(output / "results.json")
    assert {name: results[name] for name in want} == want
    assert (results["records"], results["skipped"]) == (2, 4)
    assert "| records | 2 |" in out
    assert "| skipped | 4 |" in out
    written = (output / "answers.jsonl").read_text().splitlines()
    assert [json.loads(line)["answer"] for line in written] == [answers[0], None, answers[1]]
    listed = output / "answers.jsonl.skipped.jsonl"
    assert out.endswith(f"1 of them are empty: {listed} says which inputs were skipped, and why\n")
    [skipped] = map(json.loads, listed.read_text().splitlines())
    assert skipped["id"] == f"{data}:2"
    assert "torn.png" in skipped["reason"]

    data.write_text("\n".join(lines[1:5]))
    status, _, err = run_command(generate, *command, "--on-error=skip")
    assert status == 2
    assert err.splitlines()[-1].endswith("holds no record that could be answered")
    assert read_json(output / "results.json") == results  # of before


def test_printed_answers_are_followed_by_what_was_left_out(
    tmp_path, run_command, monkeypatch, tiny
):
    monkeypatch.setattr(OmniGenerator, "from_pretrained", lambda *_, **__: tiny)
    Image.fromarray(picture(1, 56, 56)).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"torn")
    (tmp_path / "c.txt").touch()
    flags = ["--max-new-tokens=4", "--workers=0", "--on-error=skip"]
    status, out, err = run_command(generate, f"--input={tmp_path}", *flags)
    assert status == 0
    assert [json.loads(line)["id"] for line in out.splitlines()] == ["a.png", "b.png"]
    assert err.endswith("1 of 2 were skipped\nleft out: .txt 1\n")
