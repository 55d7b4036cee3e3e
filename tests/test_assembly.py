"""A model made of parts has what its parts have, in transformers and here."""

import dataclasses
import hashlib
import json
import os
import shutil
import sys
import types

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import reference_parts as parts
import torch
import transformers
from reference_media import answer_losses, audio, image, user
from safetensors.numpy import load_file, save_file
from tokenizers import processors

from lco_jax import OmniEmbedder, OmniGenerator, make_mesh
from lco_jax import assemble as command
from lco_jax.checkpoint.assembly import Fresh, assemble
from lco_jax.checkpoint.chat_template import extended
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.checkpoint.language import read_language
from lco_jax.checkpoint.omni import MARKERS, TOKENS
from lco_jax.checkpoint.whisper import sinusoids
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import read_json
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer
from lco_jax.generator import turn_ends
from lco_jax.models.qwen_audio import QwenAudio

TOLERANCE = 1e-5  # tells right from almost right: never loosen it
TEXTS = [
    *reference.TEXTS,
    "don't  stop\t at 3.14159 or １２３, naïve café ﬁ",
    "<|im_start|>user\nhi<|im_end|>\n👩‍👩‍👧",
]
QUESTION = [{"role": "user", "content": "What is the capital of France?"}]


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """kind -> (folder, model)."""
    folder = tmp_path_factory.mktemp("languages")
    return {
        kind: (folder / kind, parts.build_language(kind, folder / kind)) for kind in parts.KINDS
    }


@pytest.fixture(scope="module")
def whisper(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts") / "whisper"
    return folder, parts.build_whisper(folder)


@pytest.fixture(scope="module")
def window():
    """Of the tiny Whisper."""
    return Fresh(audio=dataclasses.replace(Fresh().audio, window=120))


@pytest.fixture(scope="module")
def assembled(languages, whisper, cases, window, tmp_path_factory):
    """kind of the language model -> folder. Of the towers, some are given and some are fresh."""
    made = tmp_path_factory.mktemp("assembled")
    given = {
        "llama_tied": {"audio": whisper[0], "fresh": window},
        "llama": {},
        "qwen2": {"audio": whisper[0], "vision": cases["vl"].path, "fresh": window},
    }
    for kind, more in given.items():
        assemble(made / kind, languages[kind][0], **more)
    return {kind: made / kind for kind in given}


def load_thinker(folder):
    """In transformers. Every key must be known, and none may lack."""
    model, report = reference.model_class("omni").from_pretrained(
        folder, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.eval().requires_grad_(False)


def tensors(folder):
    return load_file(folder / "model.safetensors")


def asked(folder):
    """The ids of a question."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
    return tokenizer.apply_chat_template(QUESTION, **options)["input_ids"]


def answer(model, ids):
    """The greedy answer's ids."""
    return model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("kind", parts.KINDS)
def test_it_says_what_the_language_model_says(kind, languages, assembled):
    folder, language = languages[kind]
    thinker = load_thinker(assembled[kind])
    ids = asked(folder)
    assert torch.equal(ids, asked(assembled[kind]))
    logits = language(ids).logits
    found = thinker(ids).logits
    assert (found[..., : logits.shape[-1]] - logits).abs().max() < TOLERANCE
    assert answer(thinker, ids) == answer(language, ids)


SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("llama_tied", "llama")]


@pytest.mark.slow
@pytest.mark.parametrize("kind", parts.KINDS)
def test_its_greedy_answer_is_the_language_models(kind, languages, assembled):
    folder, language = languages[kind]
    generator = OmniGenerator.from_pretrained(assembled[kind])
    (spoken,) = generator.generate_ids([QUESTION[0]["content"]], 12, prompt="")
    assert spoken.tolist() == answer(language, asked(folder))


@pytest.mark.parametrize("kind", ["qwen2", *SLOW])
def test_it_is_here_what_it_is_in_transformers(kind, assembled):
    thinker = load_thinker(assembled[kind])
    mesh = make_mesh(devices=jax.devices()[:1])
    embedder = OmniEmbedder.from_pretrained(assembled[kind], mesh=mesh)
    chats = [
        user("A man plays a guitar."),
        user(audio(1, 1.9), "what is it?"),
        user(image(1, 70, 112), "what is it?"),
    ]
    states = embedder.encode_layers(chats)
    for i, chat in enumerate(chats):
        _, want = answer_losses(thinker, assembled[kind], chat, "x")
        scale = want.abs().amax(dim=1, keepdim=True).numpy()
        assert np.abs((states[:, i] - want.numpy()) / scale).max() < TOLERANCE, i


def test_the_audio_tower_is_whispers_encoder(assembled, whisper):
    _, model = whisper
    rng = np.random.default_rng(0)
    mel = rng.normal(size=(1, 120, 80)).astype(np.float32)
    seen = {}
    encoder = model.model.encoder
    encoder.layer_norm.register_forward_pre_hook(lambda _, args: seen.update(states=args[0]))
    encoder(torch.tensor(mel).transpose(1, 2))
    pairs = seen["states"].reshape(1, 30, 2, 40).mean(dim=2)
    want = encoder.layer_norm(pairs).numpy()
    checkpoint = open_checkpoint(assembled["llama_tied"])
    mesh = make_mesh(devices=jax.devices()[:1])
    _, params = load_model(checkpoint, mesh, towers=["audio_tower"])
    tower = dataclasses.replace(checkpoint.towers["audio_tower"], out_hidden_size=40)
    unprojected = {"weight": jnp.eye(40), "bias": jnp.zeros(40)}
    found = QwenAudio(tower).apply(
        {"params": {**params["audio_tower"], "proj": unprojected}}, mel, np.array([120])
    )
    assert np.abs(found - want).max() < TOLERANCE
    assert np.abs(want).max() > 1


@pytest.mark.parametrize("family", ["vl", "omni"])
def test_the_vision_tower_sees_what_it_saw(family, cases, languages, tmp_path):
    assemble(tmp_path / "made", languages["llama"][0], vision=cases[family].path)
    thinker = load_thinker(tmp_path / "made")
    towers = [model.model.visual for model in (thinker, cases[family].model)]
    pixels = torch.randn(48, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(0))
    seen = []
    for tower in towers:
        hook = tower.merger.mlp[2].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        tower(pixels, torch.tensor([[1, 6, 8]]))
        hook.remove()
    assert seen[1].abs().max() > 0.1
    assert (seen[0] - seen[1]).abs().max() < TOLERANCE


def test_pictures_are_prepared_as_for_the_tower_that_is_taken(cases, languages, tmp_path):
    folder = tmp_path / "vision"
    reference.build("vl", folder)
    parts.change(folder / "preprocessor_config.json", image_mean=[0.1, 0.2, 0.3], min_pixels=6272)
    assemble(tmp_path / "made", languages["llama"][0], vision=folder)
    made = read_json(tmp_path / "made" / "preprocessor_config.json")
    assert (made["image_mean"], made["min_pixels"]) == ([0.1, 0.2, 0.3], 6272)
    assert made["processor_class"] == "Qwen2_5OmniProcessor"


# ---- layouts


QUANTISED = ("F32", "F16", "BF16", "Q8_0", "Q4_1")


@pytest.mark.parametrize("kind", parts.KINDS)
def test_a_gguf_gives_what_the_folder_gives(kind, languages, assembled, tmp_path):
    folder, model = languages[kind]
    parts.write_gguf(tmp_path / "model.gguf", model, parts.tokenizer())
    assemble(tmp_path / "of_gguf", tmp_path / "model.gguf")
    assemble(tmp_path / "of_folder", folder)
    for file in sorted((tmp_path / "of_folder").iterdir()):
        # parts.json and README.md name the part
        if file.name not in ("parts.json", "README.md", "tokenizer.json"):
            assert file.read_bytes() == (tmp_path / "of_gguf" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("stored", QUANTISED)
def test_a_quantised_gguf_gives_what_gguf_dequantises(stored, languages, tmp_path):
    folder, model = languages["llama"]
    kind = gguf.GGMLQuantizationType[stored]
    parts.write_gguf(tmp_path / "model.gguf", model, parts.tokenizer(), matrices=kind)
    found, exact = read_language(tmp_path / "model.gguf"), read_language(folder)
    for key in model.state_dict():
        want = exact.read(key)
        if want.ndim == 2:
            want = gguf.quants.dequantize(gguf.quants.quantize(want, kind), kind)
        np.testing.assert_array_equal(found.read(key), want, key)


@pytest.mark.parametrize("split", parts.SPLITS)
def test_a_gguf_has_the_folders_token_ids(split, tmp_path):
    model = parts.build_language("llama_tied", tmp_path / "model", split)
    parts.write_gguf(tmp_path / "model.gguf", model, parts.tokenizer(split), split)
    of_gguf, of_folder = (read_language(tmp_path / name) for name in ("model.gguf", "model"))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    for text in TEXTS:
        want = theirs(text).input_ids
        assert of_folder.tokenizer.encode(text).ids == want
        assert of_gguf.tokenizer.encode(text).ids == want
        assert of_gguf.tokenizer.decode(want) == of_folder.tokenizer.decode(want)


def test_the_ways_to_split_text_differ(tmp_path):
    ids = {
        split: parts.tokenizer(split).encode("at 12345, e\u0301\n\n x").ids
        for split in parts.SPLITS
    }
    assert len(set(map(tuple, ids.values()))) == 3


def test_a_whisper_of_ctranslate2_gives_what_the_hubs_gives(
    languages, whisper, assembled, window, tmp_path
):
    folder = tmp_path / "faster"
    folder.mkdir()
    parts.write_ctranslate2(folder / "model.bin", whisper[1])
    assemble(tmp_path / "made", languages["llama_tied"][0], folder, fresh=window)
    made = (tmp_path / "made" / "model.safetensors").read_bytes()
    assert made == (assembled["llama_tied"] / "model.safetensors").read_bytes()


def test_a_whisper_in_float16_and_with_128_mel_bins(languages, window, tmp_path):
    model = parts.build_whisper(tmp_path / "large", mel_bins=128)
    (tmp_path / "faster").mkdir()
    parts.write_ctranslate2(tmp_path / "faster" / "model.bin", model, np.float16)
    assemble(tmp_path / "made", languages["llama"][0], tmp_path / "faster", fresh=window)
    assert read_json(tmp_path / "made" / "preprocessor_config.json")["feature_size"] == 128
    found = tensors(tmp_path / "made")["audio_tower.conv1.weight"]
    want = model.model.encoder.conv1.weight.numpy()
    np.testing.assert_array_equal(found, want.astype(np.float16).astype(np.float32))


def test_shards_and_bfloat16(languages, tmp_path):
    _, model = languages["qwen2"]
    whole = transformers.Qwen2ForCausalLM(model.config)
    whole.load_state_dict(model.state_dict())
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    parts.write_words(tmp_path / "shards", parts.tokenizer())
    assemble(tmp_path / "made", tmp_path / "shards")
    found = tensors(tmp_path / "made")
    for key, value in whole.state_dict().items():
        np.testing.assert_array_equal(found[key][: len(value)], value.float().numpy())


def test_a_bias_of_llama_in_a_gguf_is_kept(languages, tmp_path):
    """llama.cpp adds it, and orders it as the rows of its matrix."""
    _, model = languages["qwen2"]
    model.config.model_type = "llama"
    try:
        parts.write_gguf(tmp_path / "model.gguf", model, parts.tokenizer())
    finally:
        model.config.model_type = "qwen2"
    found = read_language(tmp_path / "model.gguf")
    key = "model.layers.1.self_attn.k_proj.bias"
    np.testing.assert_array_equal(found.read(key), model.state_dict()[key].numpy())


# ---- tokens


def test_tokens_of_media_take_spare_rows_and_then_the_mean(languages, assembled):
    _, model = languages["llama"]
    table = model.get_input_embeddings().weight.numpy()
    words = parts.tokenizer()
    assert len(table) == words.get_vocab_size() + parts.PADDING
    found = tensors(assembled["llama"])
    for key, given in (
        ("model.embed_tokens.weight", table),
        ("lm_head.weight", model.lm_head.weight.numpy()),
    ):
        assert len(found[key]) % 64 == 0
        np.testing.assert_array_equal(found[key][: len(given)], given)
        np.testing.assert_allclose(
            found[key][len(given) :],
            np.tile(given.mean(0), (len(found[key]) - len(given), 1)),
            atol=1e-6,
        )
    config = read_json(assembled["llama"] / "config.json")
    first = words.get_vocab_size()
    assert config["image_token_index"] == first
    assert config["audio_end_token_id"] == first + 6


def test_tokens_of_media_that_it_has_keep_their_numbers(tmp_path):
    parts.build_language("llama", tmp_path / "model")
    words = parts.tokenizer()
    words.add_special_tokens(["<|vision_bos|>", "<|AUDIO|>"])
    parts.write_words(tmp_path / "model", words)
    assemble(tmp_path / "made", tmp_path / "model")
    made = transformers.AutoTokenizer.from_pretrained(tmp_path / "made")
    for token in ("<|vision_bos|>", "<|AUDIO|>"):
        assert made.convert_tokens_to_ids(token) == words.token_to_id(token)
    numbers = made.convert_tokens_to_ids(list(TOKENS.values()))
    assert len(set(numbers)) == len(TOKENS)
    assert max(numbers) == words.get_vocab_size() + len(TOKENS) - 3


def test_the_chat_template_alone_says_how_a_text_begins(tmp_path):
    parts.build_language("llama", tmp_path / "model")
    words = parts.tokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A",
        pair=None,
        special_tokens=[("<|endoftext|>", words.token_to_id("<|endoftext|>"))],
    )
    assert words.encode("hi").ids[0] == words.token_to_id("<|endoftext|>")
    words.enable_truncation(4)
    words.enable_padding(length=50)
    parts.write_words(tmp_path / "model", words, "{{ bos_token }}" + parts.TEMPLATE)
    assemble(tmp_path / "made", tmp_path / "model")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    theirs.bos_token = "<|im_start|>"  # as config.json has it
    want = theirs.apply_chat_template(QUESTION, add_generation_prompt=True)["input_ids"]
    (ids,) = ChatTokenizer(tmp_path / "made")([QUESTION])
    assert ids.tolist() == want
    assert want[0] == words.token_to_id("<|im_start|>")


@pytest.mark.parametrize(
    "said",
    [
        "",
        "Ça va ? 👩‍👧",
        "\"quoted\" and 'so'",
        "a \\n back\\slash {{ x }} {% y %} }}",
        "two\nlines\t.",
    ],
)
def test_what_a_template_begins_with_may_be_any_text(said):
    quoted = json.dumps(said, ensure_ascii=False)
    template = (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        f"{{{{ '<|im_start|>system\\n' + {quoted} + '<|im_end|>\\n' }}}}{{% endif %}}"
        "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    ours = extended(template, {}, MARKERS, "it")
    chat = transformers.utils.chat_template_utils.render_jinja_template(
        [[{"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}]],
        chat_template=ours,
    )[0][0]
    assert chat == (
        f"<|im_start|>system\n{said}<|im_end|>\n<|im_start|>user\nhi{MARKERS['image']}<|im_end|>\n"
    )


def test_every_token_that_ends_a_turn_is_kept(tmp_path):
    parts.build_language("llama", tmp_path / "model")
    words = parts.tokenizer()
    ends = [words.token_to_id("<|im_end|>"), words.token_to_id("<|endoftext|>")]
    parts.change(
        tmp_path / "model" / "generation_config.json", eos_token_id=ends, pad_token_id=None
    )
    parts.change(tmp_path / "model" / "config.json", pad_token_id=None)
    assemble(tmp_path / "made", tmp_path / "model")
    assert turn_ends(Processor(tmp_path / "made")) == ends
    assert read_json(tmp_path / "made" / "generation_config.json")["pad_token_id"] == ends[0]
    assert load_thinker(tmp_path / "made").generation_config.eos_token_id == ends


# ---- seeds, notes


def test_the_same_arguments_make_the_same_bytes_and_a_seed_what_is_fresh(
    languages, whisper, window, tmp_path
):
    folder = languages["llama"][0]
    for name, seed in (("one", 3), ("two", 3), ("other", 4)):
        assemble(tmp_path / name / "made", folder, whisper[0], fresh=window, seed=seed)
    for file in (tmp_path / "one" / "made").iterdir():
        assert file.read_bytes() == (tmp_path / "two" / "made" / file.name).read_bytes(), file.name
    one, other = tensors(tmp_path / "one" / "made"), tensors(tmp_path / "other" / "made")
    changed = {key for key in one if not np.array_equal(one[key], other[key])}
    fresh = ("visual.", "audio_tower.proj.weight", "audio_tower.audio_bos_eos_token.weight")
    drawn = {key for key in one if key.startswith(fresh) and one[key].ndim > 1}
    assert changed == drawn


def test_the_note_names_parts_licences_and_checksums(languages, whisper, window, tmp_path):
    _, model = languages["llama"]
    file = tmp_path / "words.gguf"
    licence = {"general.license": "apache-2.0"}
    parts.write_gguf(file, model, parts.tokenizer(), **licence)
    (whisper[0] / "README.md").write_text("---\nlanguage: en\nlicense: mit\n---\nlicense: none\n")
    note = assemble(tmp_path / "made", file, whisper[0], fresh=window)
    assert note == read_json(tmp_path / "made" / "parts.json")
    card = (tmp_path / "made" / "README.md").read_text()
    assert "# made, assembled" in card
    assert "| audio tower | whisper | mit |" in card
    assert str(tmp_path) not in card + (tmp_path / "made" / "parts.json").read_text()
    language, audio = note["language model"], note["audio tower"]
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    assert language["sha256"] == {"words.gguf": digest}
    assert (language["name"], language["licence"]) == ("words.gguf", "apache-2.0")
    assert (audio["name"], audio["licence"]) == ("whisper", "mit")
    assert {"config.json", "model.safetensors", "README.md"} <= audio["sha256"].keys()
    assert note["vision tower"]["name"] == note["projectors"]["name"] == "fresh"
    found = tensors(tmp_path / "made")
    counted = sum(one["parameters"] for one in note.values() if isinstance(one, dict))
    assert counted == sum(value.size for value in found.values())


def test_an_output_folder_of_ours_is_replaced_and_no_other(languages, tmp_path):
    folder = languages["llama"][0]
    assemble(tmp_path / "made", folder)
    before = (tmp_path / "made" / "model.safetensors").read_bytes()
    assemble(tmp_path / "made", folder, seed=1)
    assert before != (tmp_path / "made" / "model.safetensors").read_bytes()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("x")
    with pytest.raises(LcoError, match="was not written by lco_jax"):
        assemble(tmp_path / "other", tmp_path / "there is no such part")
    assert [file.name for file in (tmp_path / "other").iterdir()] == ["mine.txt"]


# ---- the command


@pytest.fixture
def run(monkeypatch, capsys):
    """Runs the command: (exit status, stdout, stderr)."""

    def run(*args):
        monkeypatch.setattr(sys, "argv", ["assemble", *map(str, args)])
        with pytest.raises(SystemExit) as done:
            run_main(command.main)
        out, err = capsys.readouterr()
        return done.value.code or 0, out, err

    return run


def test_the_command_says_what_it_made(run, languages, whisper, tmp_path):
    status, out, _ = run(
        f"--language={languages['llama'][0]}", f"--audio={whisper[0]}", "--audio-window=120",
        "--vision-hidden=32", "--vision-layers=1", "--vision-heads=2", "--vision-mlp=40",
        "--vision-patch=7", f"--output={tmp_path / 'made'}",
    )  # fmt: skip
    assert status == 0
    vision = read_json(tmp_path / "made" / "config.json")["vision_config"]
    sizes = [vision[key] for key in ("hidden_size", "depth", "num_heads", "intermediate_size")]
    assert sizes == [32, 1, 2, 40]
    assert vision["patch_size"] == 7
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:4]] == [
        "language model", "audio tower", "vision tower", "projectors",
    ]  # fmt: skip
    assert lines[2].endswith("fresh")
    assert "lco_jax.pretrain" in out
    assert "--config.tune.decoder=none --config.tune.towers=projectors,visual " in out


FLAGS = {
    "--seed=-1": "--seed=-1: it must be at least 0",
    "--vision-hidden=0": "--vision-hidden=0: it must be 1 to",
    "--vision-heads=-2": "--vision-heads=-2: it must be 1 to",
    "--vision-hidden=100": "must be a multiple of four times --vision-heads, 16",
    "--vision-patch=57": "--vision-patch=57: it must be at most 56 pixels",
    "--audio-window=202": "--audio-window=202: it must be a multiple of 4",
    "--audio-window=4000": "at most 3000",
    "--audio=nothing": "nothing is no folder here, and no hub id",
    "--language=nothing.gguf": "nothing.gguf does not exist",
}


@pytest.mark.parametrize("flag", FLAGS)
def test_a_bad_flag_is_one_sentence(run, flag, languages, tmp_path):
    status, _, error = run(
        f"--language={languages['llama'][0]}", flag, f"--output={tmp_path / 'made'}"
    )
    assert status == 2
    assert FLAGS[flag] in error
    assert error.count("\n") == 1
    assert not (tmp_path / "made").exists()


def test_sizes_of_a_vision_tower_that_is_given_are_refused(run, languages, cases, tmp_path):
    status, _, error = run(
        f"--language={languages['llama'][0]}", f"--vision={cases['vl'].path}",
        "--vision-layers=2", f"--output={tmp_path / 'made'}",
    )  # fmt: skip
    assert status == 2
    assert "--vision-layers is of a fresh tower, and --vision gives one" in error


# ---- mistakes


def _config(**values):
    return lambda folder: parts.change(folder / "config.json", **values)


def _without(name):
    return lambda folder: (folder / name).unlink()


def _template(text):
    return lambda folder: parts.change(folder / "tokenizer_config.json", chat_template=text)


def _pipe(name):
    def make(folder):
        (folder / name).unlink(missing_ok=True)
        os.mkfifo(folder / name)

    return make


def _tensors(**changed):
    """Changes to model.safetensors: a key -> what its tensor becomes; None removes it."""

    def make(folder):
        found = load_file(folder / "model.safetensors")
        for key, value in changed.items():
            found.pop(key, None)
            if value is not None:
                found[key] = value
        save_file(found, folder / "model.safetensors")

    return make


def _long_tokenizer(folder):
    words = parts.tokenizer()
    words.add_tokens([f"<{i}>" for i in range(parts.PADDING + 1)])
    words.save(str(folder / "tokenizer.json"))


ZEROS = np.zeros((2, 3), np.float32)
NORM = "model.norm.weight"
LANGUAGE = {
    "architecture": (_config(model_type="gpt2"), "'gpt2' is not supported; llama and qwen2 are"),
    "no architecture": (_config(model_type=None), "the architecture None is not supported"),
    "architecture of a list": (_config(model_type=["llama"]), "is not supported"),
    "no size": (_config(hidden_size=None), "has no 'hidden_size'"),
    "size of text": (_config(num_attention_heads="4"), "num_attention_heads is '4'"),
    "size of zero": (_config(num_attention_heads=0), "num_attention_heads is 0"),
    "size of half": (_config(num_hidden_layers=1.5), "num_hidden_layers is 1.5"),
    "many layers": (_config(num_hidden_layers=10**9), "is 1000000000, and must be at most 10000"),
    "width of heads": (_config(head_dim=20), "a head has 20 numbers"),
    "heads": (_config(num_attention_heads=8, head_dim=16), "and must have (64, 128)"),
    "rope": (_config(rope_parameters={"rope_type": "llama3", "factor": 8.0}), "'llama3'"),
    "old rope": (_config(rope_parameters=None, rope_scaling={"type": "linear"}), "'linear'"),
    "rope of text": (_config(rope_parameters="default"), "must be an object"),
    "theta": (_config(rope_parameters={"rope_theta": "big"}), "rope_theta is 'big'"),
    "activation": (_config(hidden_act="gelu"), "hidden_act 'gelu'"),
    "biases": (
        _tensors(**{"model.layers.0.self_attn.o_proj.bias": ZEROS[0]}),
        "model.layers.0.self_attn.o_proj.bias has no place",
    ),
    "norms": (_tensors(**{"model.layers.0.self_attn.q_norm.weight": ZEROS[0]}), "has no place"),
    "no tensor": (_tensors(**{NORM: None}), f"has no {NORM}"),
    "shape": (_tensors(**{NORM: ZEROS}), "has shape (2, 3), and must have (64,)"),
    "no head": (
        _tensors(**{"lm_head.weight": None}),
        "has no lm_head.weight, which its configuration does not tie",
    ),
    "NaN": (
        _tensors(**{"model.embed_tokens.weight": np.full((1048, 64), np.nan, np.float32)}),
        "holds NaN",
    ),
    "no weights": (_without("model.safetensors"), "holds no *.safetensors"),
    "torn weights": (
        lambda folder: os.truncate(folder / "model.safetensors", 5000),
        "is torn or not a safetensors file",
    ),
    "no config": (_without("config.json"), "config.json does not exist"),
    "pipe": (_pipe("config.json"), "must be a file"),
    "pipe of weights": (_pipe("model.safetensors"), "must be a file"),
    "pipe of words": (_pipe("tokenizer.json"), "must be a file"),
    "pipe of a template": (_pipe("chat_template.jinja"), "must be a file"),
    "no tokenizer": (_without("tokenizer.json"), "tokenizer.json does not exist"),
    "torn tokenizer": (
        lambda folder: (folder / "tokenizer.json").write_text("{}"),
        "tokenizer.json does not load",
    ),
    "many tokens": (_long_tokenizer, "has the number 1048, and the embeddings are of 1048 tokens"),
    "no template": (_template(None), "has no chat template"),
    "another template": (_template("{{ messages[0]['content'] }}"), "is not ChatML"),
    "template that stops": (_template("{{ messages.no.thing }}"), "has no attribute 'no'"),
    "torn template": (_template("{% for"), "unexpected 'end of template'"),
    "template of one role": (
        _template(parts.TEMPLATE.replace("message['role'] +", "'user' +")),
        "is not ChatML",
    ),
    "end": (
        lambda folder: parts.change(folder / "generation_config.json", eos_token_id="<|im_end|>"),
        "eos_token_id is '<|im_end|>', and must be a token's number",
    ),
    "ends": (
        lambda folder: parts.change(folder / "generation_config.json", eos_token_id=[]),
        "eos_token_id is []",
    ),
    "pad": (
        lambda folder: parts.change(folder / "generation_config.json", pad_token_id=99_999),
        "pad_token_id is 99999",
    ),
}


@pytest.mark.parametrize("name", LANGUAGE)
def test_a_bad_language_model_is_one_sentence(name, languages, tmp_path):
    change, problem = LANGUAGE[name]
    shutil.copytree(languages["llama"][0], tmp_path / "part")
    change(tmp_path / "part")
    with pytest.raises(LcoError) as raised:
        assemble(tmp_path / "made", tmp_path / "part")
    assert problem in str(raised.value)
    assert str(tmp_path / "part") in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["part"]


WHISPER = {
    "kind": (_config(model_type="bert"), "model_type is 'bert', and not whisper"),
    "heads": (_config(encoder_attention_heads="2"), "encoder_attention_heads is '2'"),
    "heads that do not divide": (_config(encoder_attention_heads=3), "3 heads do not divide 40"),
    "activation": (_config(activation_function="relu"), "activation_function"),
    "positions": (
        _tensors(**{"model.encoder.embed_positions.weight": np.ones((60, 40), np.float32)}),
        "are not Whisper's sinusoids",
    ),
    "one axis": (
        _tensors(**{"model.encoder.embed_positions.weight": np.ones(60, np.float32)}),
        "positions have shape (60,)",
    ),
    "no positions": (
        _tensors(**{"model.encoder.embed_positions.weight": None}),
        "has no embed_positions.weight",
    ),
    "positions that are no numbers": (
        _tensors(**{"model.encoder.embed_positions.weight": np.full((60, 40), np.nan, "f4")}),
        "holds NaN",
    ),
    "short": (
        _tensors(**{"model.encoder.embed_positions.weight": sinusoids(20, 40)}),
        "sees 40 mel frames at once; a window of 120 is wider",
    ),
    "no layer": (_tensors(**{"model.encoder.layers.0.fc1.weight": None}), "layers.0.fc1.weight"),
    "no norm": (
        _tensors(**{"model.encoder.layers.1.final_layer_norm.bias": None}),
        "layers.1.final_layer_norm.bias, which its configuration asks for",
    ),
    "more": (
        _tensors(**{"model.encoder.layers.1.other.weight": ZEROS}),
        "layers.1.other.weight has no place in Qwen2.5-Omni",
    ),
    "shape": (
        _tensors(**{"model.encoder.layers.1.fc2.weight": ZEROS}),
        "has shape (2, 3), and must have (40, 67)",
    ),
    "pipe": (_pipe("config.json"), "must be a file"),
    "pipe of CTranslate2": (_pipe("model.bin"), "must be a file"),
}


@pytest.mark.parametrize("name", WHISPER)
def test_a_bad_whisper_is_one_sentence(name, languages, whisper, window, tmp_path):
    change, problem = WHISPER[name]
    shutil.copytree(whisper[0], tmp_path / "part")
    change(tmp_path / "part")
    with pytest.raises(LcoError) as raised:
        assemble(tmp_path / "made", languages["llama"][0], tmp_path / "part", fresh=window)
    assert problem in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["part"]


@pytest.mark.parametrize("size", [0, 3, 30, 200, 5000, -1])
def test_a_torn_model_of_ctranslate2_is_one_sentence(size, whisper, languages, tmp_path):
    file = tmp_path / "model.bin"
    parts.write_ctranslate2(file, whisper[1])
    os.truncate(file, size if size >= 0 else file.stat().st_size - 200)
    with pytest.raises(LcoError, match="is torn, or no model of CTranslate2"):
        assemble(tmp_path / "made", languages["llama"][0], tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["model.bin"]


def test_a_quantised_model_of_ctranslate2_is_one_sentence(whisper, languages, tmp_path):
    parts.write_ctranslate2(tmp_path / "model.bin", whisper[1], np.int8)
    with pytest.raises(LcoError, match="is quantised, and only float weights"):
        assemble(tmp_path / "made", languages["llama"][0], tmp_path)


GGUFS = {
    "architecture": ({"general.architecture": "gemma"}, "the architecture 'gemma' is not"),
    "kind of tokenizer": ({"tokenizer.ggml.pre": "llama-bpe"}, "'llama-bpe' is not supported"),
    "no kind of tokenizer": ({"tokenizer.ggml.pre": None}, "None is not supported"),
    "no template": ({"tokenizer.chat_template": None}, "has no chat template"),
    "rope": ({"llama.rope.scaling.type": "linear"}, "a rope that is scaled is not supported"),
    "width": ({"llama.rope.dimension_count": "8"}, "rope.dimension_count must be"),
}


@pytest.mark.parametrize("name", GGUFS)
def test_a_bad_gguf_is_one_sentence(name, languages, tmp_path):
    fields, problem = GGUFS[name]
    file = tmp_path / "model.gguf"
    parts.write_gguf(file, languages["llama"][1], parts.tokenizer(), **fields)
    with pytest.raises(LcoError) as raised:
        assemble(tmp_path / "made", file)
    assert problem in str(raised.value)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]


@pytest.mark.parametrize("size", [0, 3, 24, 3000, 60_000, -100])
def test_a_torn_gguf_is_one_sentence(size, languages, tmp_path):
    file = tmp_path / "model.gguf"
    parts.write_gguf(file, languages["llama"][1], parts.tokenizer())
    os.truncate(file, size if size >= 0 else file.stat().st_size + size)
    with pytest.raises(LcoError, match="is no GGUF file that can be read"):
        assemble(tmp_path / "made", file)
    assert [one.name for one in tmp_path.iterdir()] == ["model.gguf"]


def test_a_gguf_with_experts_is_one_sentence(languages, tmp_path):
    _, model = languages["llama"]
    experts = {"model.layers.0.mlp.gate_proj.weight_of_experts": torch.zeros(2, 3)}
    state = {**model.state_dict(), **experts}
    other = types.SimpleNamespace(config=model.config, state_dict=lambda: state)
    parts.write_gguf(tmp_path / "model.gguf", other, parts.tokenizer())
    with pytest.raises(LcoError, match=r"weight_of_experts has no place in Qwen2\.5's decoder"):
        assemble(tmp_path / "made", tmp_path / "model.gguf")


VISION = {
    "kind": (_config(model_type="llava_next"), "the vision tower of a llava_next"),
    "unknown kind": (_config(model_type="gemma"), "model_type 'gemma' is not supported"),
    "no tower": (_config(vision_config=None), "has no vision_config"),
}


@pytest.mark.parametrize("name", VISION)
def test_a_bad_vision_tower_is_one_sentence(name, languages, cases, tmp_path):
    change, problem = VISION[name]
    shutil.copytree(cases["vl_tied"].path, tmp_path / "part")
    change(tmp_path / "part")
    with pytest.raises(LcoError) as raised:
        assemble(tmp_path / "made", languages["llama"][0], vision=tmp_path / "part")
    assert problem in str(raised.value)
    assert [file.name for file in tmp_path.iterdir()] == ["part"]
