"""What a run leaves is loaded by transformers, peft and sentence-transformers, with our numbers."""

import json
import shutil

import jax
import ml_dtypes
import numpy as np
import peft
import pytest
import reference
import reference_media
import torch
import transformers
from PIL import Image
from safetensors.numpy import load_file
from sentence_transformers import SentenceTransformer

from lco_jax import LcoError, OmniEmbedder
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_peft, write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora

CONFIG = lora.LoraConfig(rank=4, alpha=8)


@pytest.fixture(scope="module")
def adapted(cases, tmp_path_factory):
    """family -> (adapter folder, merged folder, our embeddings with the adapter)."""

    class Adapted(dict):
        def __missing__(self, family):
            path = cases[family].path
            adapters = lora.init(
                jax.random.key(0), abstract_params(open_checkpoint(path).config), CONFIG
            )
            rng = np.random.default_rng(0)
            adapters = jax.tree.map(
                lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), adapters
            )
            out = tmp_path_factory.mktemp("export")
            write_peft(out / "adapter", adapters, CONFIG, str(path))
            export_merged(
                path,
                out / "merged",
                {"decoder": adapters},
                CONFIG,
                "float32",
                max_shard_bytes=200_000,
            )
            ours = OmniEmbedder.from_pretrained(path, adapter=out / "adapter")
            self[family] = (
                out / "adapter",
                out / "merged",
                ours.tokenizer,
                ours.encode(reference.TEXTS),
            )
            return self[family]

    return Adapted()


def tokens_of(tokenizer):
    prompt = "\nSummarize the above text in one word:"
    return tokenizer(
        [
            [{"role": "user", "content": [{"type": "text", "text": t + prompt}]}]
            for t in reference.TEXTS
        ]
    )


def load(family, folder, **options):
    """Load with transformers; nothing may be missing, unexpected or misshapen."""
    model, info = reference.model_class(family).from_pretrained(
        folder, output_loading_info=True, **options
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys")), (
        info
    )
    return model.eval().requires_grad_(False)


@pytest.mark.parametrize("family", [*reference.FAMILIES, *reference.LLAVA])
def test_transformers_loads_the_merged_model(adapted, family):
    _, merged, tokenizer, want = adapted[family]
    got = reference.embed(load(family, merged, dtype=torch.float32), tokens_of(tokenizer))
    assert np.abs(got.numpy() - want).max() < 1e-5
    assert (merged / "model.safetensors.index.json").exists()  # the shard limit was heeded


@pytest.mark.parametrize("family", ["vl", "omni", "llava_mistral"])
def test_peft_loads_the_adapter(adapted, cases, family):
    adapter, _, tokenizer, want = adapted[family]
    tuned = peft.PeftModel.from_pretrained(
        load(family, cases[family].path, dtype=torch.float32), adapter
    )
    adapted_names = {name for name, _ in tuned.named_modules() if name.endswith("lora_A")}
    assert len(adapted_names) == 7 * reference.LAYERS  # and none in the vision tower
    assert (
        np.abs(reference.embed(tuned.eval(), tokens_of(tokenizer)).detach().numpy() - want).max()
        < 1e-5
    )


def test_sentence_transformers_loads_the_merged_model(adapted):
    """Plain strings and whole conversations, with the numbers of `encode`."""
    _, merged, _, want = adapted["vl"]
    model = SentenceTransformer(str(merged), device="cpu", model_kwargs={"dtype": torch.float32})
    got = model.encode(reference.TEXTS, convert_to_numpy=True)
    assert np.abs(got - want).max() < 1e-5
    chat = [[{"role": "user", "content": [{"type": "text", "text": "a fox"}]}]]
    chat[0][0]["content"][0]["text"] += "\nSummarize the above text in one word:"
    assert (
        np.abs(model.encode(chat) - OmniEmbedder.from_pretrained(merged).encode(chat)).max() < 1e-5
    )


@pytest.mark.parametrize(
    "family",
    [
        "llava_mistral",
        *(
            pytest.param(x, marks=pytest.mark.slow)
            for x in ("vl", "omni", "llava_llama", "llava_qwen2")
        ),
    ],
)
def test_sentence_transformers_embeds_texts_pictures_and_both(adapted, family):
    """Pictures of sizes that have to be resized, as `encode` resizes them."""
    _, merged, _, want = adapted[family]
    model = SentenceTransformer(str(merged), device="cpu")
    assert np.abs(model.encode(reference.TEXTS) - want).max() < 1e-5
    wide, tall = (
        Image.fromarray(reference_media.picture(*spec)) for spec in ((1, 60, 131), (2, 250, 90))
    )
    inputs = [wide, tall, {"image": wide, "text": "a fox"}, "a fox"]
    ours = OmniEmbedder.from_pretrained(merged)
    assert np.abs(model.encode(inputs) - ours.encode(inputs)).max() < 1e-5


def test_our_loader_reads_the_merged_model_and_vision_is_untouched(adapted, cases):
    _, merged, _, want = adapted["vl"]
    assert np.abs(OmniEmbedder.from_pretrained(merged).encode(reference.TEXTS) - want).max() < 1e-5
    before, after = open_checkpoint(cases["vl"].path).tensors, open_checkpoint(merged).tensors
    assert set(before) == set(after)
    for key in before:
        same = np.array_equal(before.read(key), after.read(key))
        assert same != (key.startswith("model.layers.") and "_proj.weight" in key), key


def test_bfloat16_export(cases, adapted, tmp_path):
    adapter, merged, tokenizer, want = adapted["vl"]
    adapters, config = read_peft(adapter)
    export_merged(cases["vl"].path, tmp_path / "half", {"decoder": adapters}, config)
    half, full = load_file(tmp_path / "half" / "model.safetensors"), open_checkpoint(merged).tensors
    for key, value in half.items():
        assert value.dtype == ml_dtypes.bfloat16
        np.testing.assert_array_equal(
            value, full.read(key).astype(ml_dtypes.bfloat16)
        )  # rounded once, from float32
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"
    model = load("vl", tmp_path / "half", dtype=torch.float32)
    assert np.abs(reference.embed(model, tokens_of(tokenizer)).numpy() - want).max() < 5e-2


def test_tokenizer_and_processor_files_come_along(adapted, cases):
    _, merged, _, _ = adapted["vl"]
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.json",
        "preprocessor_config.json",
    ):
        assert (merged / name).read_bytes() == (cases["vl"].path / name).read_bytes()
    transformers.AutoProcessor.from_pretrained(merged)


def test_export_leaves_other_folders_alone(cases, tmp_path):
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(LcoError, match="was not written by lco_jax"):
        export_merged(cases["vl"].path, out)
    assert (out / "thesis.txt").read_text() == "years of work"
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_failed_export_leaves_nothing(cases, tmp_path, monkeypatch):
    from lco_jax.checkpoint import export

    def full_disk(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(export, "write_shards", full_disk)
    with pytest.raises(OSError, match="No space"):
        export_merged(cases["vl"].path, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_export_replaces_its_own_earlier_output(cases, tmp_path):
    for _ in range(2):
        export_merged(cases["vl_tied"].path, tmp_path / "out", dtype="float32")
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    shutil.rmtree(tmp_path / "out")


def test_the_prompt_by_modality_in_the_sentence_transformers_template(adapted):
    """What that library renders for text, an image, and both: the reference's prompts."""
    import jinja2

    configured = json.loads((adapted["vl"][1] / "sentence_bert_config.json").read_text())
    settings = configured["processing_kwargs"]["chat_template"]
    template = jinja2.Environment().from_string(settings.pop("chat_template"))
    text, image = {"type": "text", "text": "a fox"}, {"type": "image"}
    for parts, prompt in (
        ([text], "\nSummarize the above text in one word:"),
        ([image], "\nSummarize the above image in one word:"),
        ([image, text], "\nSummarize the above in one word:"),
    ):
        rendered = template.render(messages=[{"role": "user", "content": parts}], **settings)
        assert rendered.endswith(prompt + "<|im_end|>\n<|im_start|>assistant\n")


def test_peft_says_so_where_modules_have_other_names(adapted):
    """Omni in transformers 4 has `model.layers`: PEFT must not silently load nothing."""

    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q_proj = torch.nn.Linear(4, 4)

    old = torch.nn.Module()
    old.model = torch.nn.Module()
    old.model.layers = torch.nn.ModuleList([Layer()])
    with pytest.raises(ValueError, match="not found in the base model"):
        peft.PeftModel.from_pretrained(old, adapted["omni"][0])


def test_an_adapter_of_the_first_layers_alone(cases, tmp_path):
    """PEFT's layers_to_transform: the layers it leaves out stay as they are."""
    path = cases["vl"].path
    rng = np.random.default_rng(0)
    whole = lora.init(jax.random.key(0), abstract_params(open_checkpoint(path).config), CONFIG)
    whole = jax.tree.map(lambda x: (0.1 * rng.normal(size=x.shape)).astype(np.float32), whole)
    write_peft(tmp_path / "first", jax.tree.map(lambda x: x[:1], whole), CONFIG, "base")
    zeroed = jax.tree.map(lambda x: np.concatenate([x[:1], 0 * x[1:]]), whole)
    write_peft(tmp_path / "zeroed", zeroed, CONFIG, "base")
    first, want = (
        OmniEmbedder.from_pretrained(path, tmp_path / name).encode(reference.TEXTS)
        for name in ("first", "zeroed")
    )
    np.testing.assert_array_equal(first, want)
    adapters, config = read_peft(tmp_path / "first")
    export_merged(path, tmp_path / "merged", {"decoder": adapters}, config, "float32")
    assert (
        np.abs(
            OmniEmbedder.from_pretrained(tmp_path / "merged").encode(reference.TEXTS) - want
        ).max()
        < 1e-5
    )
