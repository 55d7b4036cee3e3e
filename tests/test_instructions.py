"""Instructions: where they stand, by source in training, and in exports that others load."""

import json
import re
import shutil

import jax
import numpy as np
import pytest
import reference
import reference_media

from configs import pretrain as pretrain_config
from configs import tiny as tiny_config
from lco_jax import LcoError, OmniEmbedder, OmniGenerator, evaluate, job
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.checkpoint.usage import usage_of
from lco_jax.configs.base import get_config
from lco_jax.core import lora
from lco_jax.data.instructions import PLACES, Instruction, Instructions
from lco_jax.data.prompts import PROMPTS, as_messages
from lco_jax.data.sources import open_source
from lco_jax.evaluation.retrieval import retrieval
from lco_jax.pretrain import pretrain
from lco_jax.train import train
from lco_jax.training.instructions import (
    instructions_by_source,
    instructions_of_held_out,
    instructions_of_run,
    refuse_embedding_keys,
)
from lco_jax.training.run import check_config

QUERY, DOCUMENT = "Find what this says: ", "A document.\n"


def turns(messages):
    return [
        (one["role"], [part.get("text", part["type"]) for part in one["content"]])
        for one in messages
    ]


@pytest.mark.parametrize(
    ("place", "text", "mixed"),
    [
        ("instead", [("user", ["a dogSAY"])], [("user", ["image", "a dogSAY"])]),
        (
            "before",
            [("user", ["SAYa dog" + PROMPTS["text"]])],
            [("user", ["SAY", "image", "a dog" + PROMPTS["mixed"]])],
        ),
        (
            "after",
            [("user", ["a dogSAY" + PROMPTS["text"]])],
            [("user", ["image", "a dogSAY" + PROMPTS["mixed"]])],
        ),
        (
            "system",
            [("system", ["SAY"]), ("user", ["a dog" + PROMPTS["text"]])],
            [("system", ["SAY"]), ("user", ["image", "a dog" + PROMPTS["mixed"]])],
        ),
    ],
)
def test_where_an_instruction_stands(place, text, mixed):
    instruction = Instruction("SAY", place)
    assert turns(as_messages("a dog", "", instruction)) == text
    both = {"image": np.zeros((28, 28, 3), np.uint8), "text": "a dog"}
    assert turns(as_messages(both, "", instruction)) == mixed
    chat = [{"role": "user", "content": [{"type": "text", "text": "as it is"}]}]
    assert as_messages(chat, "", instruction) == chat


def test_a_template_without_a_system_turn(tiny):
    tokenizer = tiny.tokenizer
    was = tokenizer.tokenizer.chat_template
    tokenizer.tokenizer.chat_template = (
        "{%- for message in messages if message['role'] == 'user' -%}"
        "{%- for part in message['content'] -%}{{- part['text'] -}}{%- endfor -%}{%- endfor -%}"
    )
    try:
        for place in ("instead", "before", "after"):
            tokenizer.check_place(place)
        with pytest.raises(LcoError, match="place is 'system'; choose another place: instead"):
            tokenizer.check_place("system")
    finally:
        tokenizer.tokenizer.chat_template = was


# ---- exports


def exported(path, folder, usage):
    export_merged(path, folder, dtype="float32", usage=usage)
    return folder


def used(folder):
    return usage_of(open_checkpoint(folder), None)


@pytest.mark.slow  # to import sentence-transformers takes long
@pytest.mark.parametrize("place", PLACES)
def test_sentence_transformers_embeds_queries_and_documents_as_we_do(cases, tmp_path, place):
    import torch
    from PIL import Image
    from sentence_transformers import SentenceTransformer

    pooling = "mean" if place in ("before", "system") else "last"
    prompts = {"query": QUERY, "document": DOCUMENT, "nli-query": "Other: "}
    usage = Usage(pooling, Instructions(prompts, place, "document"))
    folder = exported(cases["vl"].path, tmp_path / "merged", usage)
    ours = OmniEmbedder.from_pretrained(folder)
    assert used(folder) == usage
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    pictures = [Image.fromarray(reference_media.picture(i, 56, 84)) for i in range(2)]
    plain = ours.encode(reference.TEXTS, "query")
    for given in (reference.TEXTS, pictures):
        vectors = {}
        for method in ("encode", "encode_query", "encode_document"):
            vectors[method] = getattr(ours, method)(given)
            want = getattr(theirs, method)(given, convert_to_numpy=True)
            assert np.abs(vectors[method] - want).max() < 1e-5, method
        named = theirs.encode(given, prompt_name="nli-query")
        assert np.abs(ours.encode(given, "nli-query") - named).max() < 1e-5
        assert np.abs(vectors["encode_query"] - vectors["encode_document"]).max() > 1e-3
        np.testing.assert_array_equal(vectors["encode"], vectors["encode_document"])
    np.testing.assert_array_equal(ours.encode_query(reference.TEXTS), plain)


@pytest.mark.slow
def test_an_export_without_instructions_embeds_a_prompt_as_we_do(cases, tmp_path):
    import torch
    from sentence_transformers import SentenceTransformer

    folder = exported(cases["vl"].path, tmp_path / "merged", Usage())
    theirs = SentenceTransformer(str(folder), device="cpu", model_kwargs={"dtype": torch.float32})
    ours = OmniEmbedder.from_pretrained(folder)
    for prompt in (None, "\nThe answer in one word:"):
        got = ours.encode(reference.TEXTS, prompt=prompt)
        assert np.abs(got - theirs.encode(reference.TEXTS, prompt=prompt)).max() < 1e-5


def test_exports_say_how_they_are_to_be_used(cases, tmp_path):
    """A merged model, one that sentence-transformers does not load, an adapter, and copies."""
    usage = Usage("mean", Instructions({"query": QUERY, "document": ""}, "before"))
    merged = exported(cases["vl"].path, tmp_path / "merged", usage)
    full = exported(cases["omni_full"].path, tmp_path / "full", usage)
    again = exported(merged, tmp_path / "again", None)
    assert [used(folder) for folder in (merged, full, again)] == [usage] * 3
    assert not (full / "modules.json").exists()
    back = exported(merged, tmp_path / "back", Usage())
    assert used(back) == Usage()
    config = lora.LoraConfig(rank=2, alpha=4)
    params = abstract_params(open_checkpoint(cases["vl"].path).config)
    adapters = jax.device_get(lora.init(jax.random.key(0), params, config))
    write_peft(tmp_path / "adapter", adapters, config, str(cases["vl"].path), usage=usage)
    one = OmniEmbedder.from_pretrained(
        cases["vl"].path, adapter=tmp_path / "adapter", modalities=("text",)
    )
    other = OmniEmbedder.from_pretrained(merged, modalities=("text",))
    for model in (one, other):
        assert model.model.decoder.pooling == "mean"
        assert model.prompts == {"query": QUERY, "document": ""}
        assert "prompts query, document, before each input" in repr(model)
    texts = ["a dog", "two birds on a wire"]
    assert np.abs(one.encode_query(texts) - other.encode_query(texts)).max() < 1e-6
    assert np.abs(one.encode_query(texts) - one.encode(texts)).max() > 1e-3
    np.testing.assert_array_equal(one.encode(texts), one.encode_document(texts))


def test_old_exports_and_those_of_others_are_read(cases, tmp_path):
    folder = exported(cases["vl"].path, tmp_path / "merged", Usage())
    general = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert general == {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    file = folder / "1_Pooling" / "config.json"
    for content, pooling in (
        ({"pooling_mode_mean_tokens": True, "pooling_mode_lasttoken": False}, "mean"),
        ({"pooling_mode": ["lasttoken"]}, "last"),
    ):
        file.write_text(json.dumps(content))
        assert used(folder).pooling == pooling
    file.write_text(json.dumps({"pooling_mode": "cls"}))
    with pytest.raises(LcoError, match="pooling_mode is 'cls', and must be one of: lasttoken"):
        used(folder)


# ---- a run's configuration


def config_of(**values):
    config = get_config()
    config.data.sources = {
        "nli": {"kind": "jsonl", "path": "a.jsonl", "query_instruction": QUERY},
        "web": {"kind": "jsonl", "path": "b.jsonl", "document_instruction": ""},
    }
    config.update_from_flattened_dict(values)
    return config


def test_a_source_has_its_own_instructions_or_the_default():
    config = config_of(**{"instructions.document": DOCUMENT, "instructions.place": "system"})
    document = Instruction(DOCUMENT, "system")
    assert instructions_by_source(config) == {
        "nli": (Instruction(QUERY, "system"), document),
        "web": (None, None),
    }
    found = instructions_of_run(config)
    assert found.prompts == {
        "query": "",
        "nli-query": QUERY,
        "document": DOCUMENT,
        "web-document": "",
    }
    assert (found.place, found.default) == ("system", "document")
    assert instructions_of_held_out(config, "nli") == (Instruction(QUERY, "system"), document)
    assert instructions_of_held_out(config, "held") == (None, document)
    assert instructions_by_source(get_config()) == {}
    assert instructions_of_run(get_config()) == Instructions()


def test_what_all_sources_are_told_is_that_of_queries():
    config = config_of(**{"instructions.place": "after"})
    config.data.sources.web.query_instruction = QUERY
    assert instructions_of_run(config) == Instructions({"query": QUERY, "document": ""}, "after")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("model.pooling", "max", "config.model.pooling is 'max'; it must be last or mean"),
        ("instructions.place", "behind", "config.instructions.place is 'behind'; it must be"),
        ("instructions.query", 3, "config.instructions.query is 3; it must be a text"),
        ("instructions.passage", "x", "sets config.instructions.passage, which is no key"),
    ],
)
def test_values_that_no_run_can_have(key, value, says):
    config = get_config()
    section, _, name = key.partition(".")
    with config[section].unlocked(), config[section].ignore_type():
        config[section][name] = value
    with pytest.raises(LcoError, match=re.escape(says)):
        check_config(config)


@pytest.mark.parametrize(
    ("section", "key", "value"),
    [
        ("model", "pooling", "mean"),
        ("data", "keep_apart", "positives"),
        ("instructions", "query", QUERY),
    ],
)
def test_pretrain_refuses_what_it_has_no_use_for(section, key, value):
    config = get_config()
    refuse_embedding_keys(config)
    config[section][key] = value
    with pytest.raises(LcoError, match=rf"^config\.{section}.* go(es)? with lco_jax\.train"):
        refuse_embedding_keys(config)


# ---- a run


def short_run():
    """Two sources, one with instructions of its own, and mean pooling."""
    config = tiny_config.get_config()
    path = "assets:triplets_train.jsonl"
    config.data.sources = {
        "asked": {"kind": "jsonl", "path": path, "weight": 1.0},
        "plain": {
            "kind": "jsonl",
            "path": "assets:snli_triplets.jsonl",
            "weight": 1.0,
            "query_instruction": "Another: ",
            "document_instruction": "",
        },
    }
    config.instructions.query = QUERY
    config.instructions.document = DOCUMENT
    config.model.pooling = "mean"
    config.train.steps, config.train.batch_size = 6, 12
    config.optimizer.warmup_steps, config.checkpoint.every = 2, 3
    config.eval.share, config.export.dtype = 0.02, "float32"
    return config


@pytest.mark.slow
def test_a_run_stores_what_it_was_told_and_resumes(tmp_path):
    results = train(short_run(), tmp_path / "whole")
    begun = tmp_path / "begun"
    shutil.copytree(tmp_path / "whole", begun)
    shutil.rmtree(begun / "checkpoints" / "6")
    for name in ("results.json", "metrics.jsonl"):
        (begun / name).unlink()
    shutil.rmtree(begun / "adapter")
    shutil.rmtree(begun / "merged")
    train(short_run(), begun)
    files = [one / "adapter" / "adapter_model.safetensors" for one in (tmp_path / "whole", begun)]
    assert files[0].read_bytes() == files[1].read_bytes()

    merged = OmniEmbedder.from_pretrained(tmp_path / "whole" / "merged")
    adapted = OmniEmbedder.from_pretrained("builtin:tiny", tmp_path / "whole" / "adapter")
    texts = ["a dog runs", "two birds"]
    for model in (merged, adapted):
        assert model.model.decoder.pooling == "mean"
        assert model.prompts == {
            "query": QUERY,
            "plain-query": "Another: ",
            "document": DOCUMENT,
            "plain-document": "",
        }
    for method in ("encode_query", "encode_document", "encode"):
        got, want = getattr(merged, method)(texts), getattr(adapted, method)(texts)
        assert np.abs(got - want).max() < 1e-5
    card = (tmp_path / "whole" / "merged" / "README.md").read_text()
    assert "| plain-query | `Another: ` |" in card
    assert "the mean of the last states" in card
    assert ".mean(dim=1)" in card
    # held-out records of the run's own sources were measured with what these were found
    held_out = results["after"]["asked"]
    config = short_run()
    records = job.open_sources(config).held_out["asked"]
    found = retrieval(
        lambda contents: merged.encode_document([{"text": one} for one in contents]),
        list(records),
        lambda contents: merged.encode_query([{"text": one} for one in contents]),
    )
    assert abs(found.mrr - held_out["mrr"]) < 1e-6


def test_generative_training_takes_no_instructions(tmp_path):
    config = pretrain_config.get_config()
    config.instructions.query = QUERY
    with pytest.raises(LcoError, match=r"go with lco_jax\.train"):
        pretrain(config, tmp_path)


# ---- commands


def test_embed_says_and_uses_the_prompts_of_the_model(cases, tmp_path, run_embed, load):
    prompts = {"query": QUERY, "document": DOCUMENT}
    usage = Usage("last", Instructions(prompts, "before", "document"))
    folder = exported(cases["vl"].path, tmp_path / "merged", usage)
    (tmp_path / "in.txt").write_text("a dog\ntwo birds\n")

    def embed(*flags):
        output = tmp_path / f"{len(list(tmp_path.iterdir()))}.npy"
        given = f"--input={tmp_path / 'in.txt'}", f"--output={output}", f"--model={folder}"
        code, out, err = run_embed(*given, *flags)
        return code, out + err, np.load(output) if output.exists() else None

    model = OmniEmbedder.from_pretrained(folder)
    texts = ["a dog", "two birds"]
    code, said, vectors = embed()
    assert code == 0
    assert f"the instruction of inputs is {DOCUMENT!r} (before each input)" in said
    assert np.abs(vectors - model.encode_document(texts)).max() < 1e-6
    code, said, vectors = embed("--prompt-name=query")
    assert f"the instruction of inputs is {QUERY!r}" in said
    assert np.abs(vectors - model.encode_query(texts)).max() < 1e-6
    code, said, _ = embed("--prompt-name=web")
    assert (code, "the model has the prompts query, document" in said) == (2, True)
    code, said, _ = embed("--prompt-name=query", "--prompt=x")
    assert (code, "--prompt and --prompt-name exclude each other" in said) == (2, True)
    code, said, vectors = embed("--prompt=Say: ", "--prompt-place=after")
    assert "the instruction of inputs is 'Say: ' (after each input, before the prompt)" in said
    model.prompt_place = "after"
    assert np.abs(vectors - model.encode(texts, prompt="Say: ")).max() < 1e-6


def test_evaluate_asks_queries_with_their_prompt(cases, tmp_path, run_command, monkeypatch):
    prompts = {"query": QUERY, "document": ""}
    usage = Usage("last", Instructions(prompts, "before"))
    folder = exported(cases["vl"].path, tmp_path / "merged", usage)
    lines = [{"query": f"word {i}", "document": f"a document {i}"} for i in range(4)]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    seen = {}
    encode = OmniEmbedder.encode

    def spied(self, inputs, prompt_name=None, *args, **options):
        seen[prompt_name] = len(inputs)
        return encode(self, inputs, prompt_name, *args, **options)

    monkeypatch.setattr(OmniEmbedder, "encode", spied)
    code, out, err = run_command(
        evaluate,
        f"--input={tmp_path / 'in.jsonl'}",
        "--kind=retrieval",
        f"--output={tmp_path / 'out'}",
        f"--model={folder}",
    )
    assert code == 0, err
    assert seen == {"query": 4, "document": 4}
    assert f"the instruction of queries is {QUERY!r} (before each input)" in out + err


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"query_instruction": 3}, "config.data.sources.nli.query_instruction is 3; it must be"),
        ({"query_instructions": "x"}, "it takes path, media_root, check_media, weight, query_in"),
    ],
)
def test_a_source_with_an_instruction_that_cannot_be(keys, says):
    spec = {"kind": "jsonl", "path": "assets:triplets_train.jsonl", **keys}
    with pytest.raises(LcoError, match=re.escape(says)):
        open_source("nli", spec)


@pytest.mark.parametrize("place", ["before", "after"])
def test_what_a_generator_is_asked_is_no_instruction(cases, tmp_path, place):
    """An instructed model answers as its base does."""
    usage = Usage("last", Instructions({"query": QUERY, "document": DOCUMENT}, place, "document"))
    folder = exported(cases["vl"].path, tmp_path / "merged", usage)
    given = [reference_media.picture(0, 56, 84)], ["a red bird"]
    losses = [
        OmniGenerator.from_pretrained(one).token_losses(*given, prompt="\nWhat is it?")[0]
        for one in (folder, cases["vl"].path)
    ]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_a_pooling_that_is_given_is_in_the_place_of_the_folders(cases, tmp_path):
    folder = exported(cases["vl"].path, tmp_path / "merged", Usage())
    (folder / "1_Pooling" / "config.json").write_text(json.dumps({"pooling_mode": "cls"}))
    model = OmniEmbedder.from_pretrained(folder, pooling="mean", modalities=("text",))
    assert model.model.decoder.pooling == "mean"
