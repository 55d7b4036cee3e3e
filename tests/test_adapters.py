"""Adapters as people save them: ours equal PEFT's own on the same model, or are refused by name."""

import numpy as np
import peft
import pytest
import reference
import torch
from safetensors.numpy import load_file, save_file

from lco_jax import LcoError, OmniEmbedder
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_adapter, read_peft
from lco_jax.core.files import read_json, write_json

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ATTENTION = ["q_proj", "v_proj"]


def load(case):
    model = reference.model_class(case.family).from_pretrained(case.path, dtype=torch.float32)
    return model.eval().requires_grad_(False)


def save_adapter(case, folder, **settings):
    """A random PEFT adapter in `folder`, and PEFT's merged weights by the hub's keys."""
    torch.manual_seed(0)
    tuned = peft.get_peft_model(load(case), peft.LoraConfig(**settings))
    with torch.no_grad():
        for name, value in tuned.named_parameters():
            if "lora_" in name:
                value.copy_(0.1 * torch.randn(value.shape))
            elif "modules_to_save" in name:
                value.add_(0.1 * torch.randn(value.shape))
    tuned.save_pretrained(folder)
    again = peft.PeftModel.from_pretrained(load(case), folder)
    merged = again.merge_and_unload()
    return {
        reference.hub_key(key, case.family): value.numpy()
        for key, value in merged.state_dict().items()
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"r": 4, "rank_pattern": {"q_proj": 6}, "target_modules": ATTENTION},
        {
            "r": 4,
            "alpha_pattern": {r"layers\.1\.self_attn\.q_proj": 3},
            "target_modules": ATTENTION,
        },
        {
            "r": 4,
            "use_rslora": True,
            "rank_pattern": {r"^model.language_model.layers.0.self_attn.q_proj": 2, "v_proj": 7},
            "alpha_pattern": {"proj": 5, ".*q_proj": 9},
            "target_modules": ATTENTION,
        },
        {"r": 4, "target_modules": ["gate_proj", "up_proj", "down_proj", "qkv"]},
        {"r": 4, "target_modules": ["merger.mlp.0", "merger.mlp.2", "q_proj"]},
        {"r": 4, "target_modules": ATTENTION, "modules_to_save": ["lm_head"]},
        {"r": 4, "target_modules": [*ATTENTION, "lm_head"]},
        {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "gaussian"},
        {"r": 4, "target_modules": ATTENTION, "init_lora_weights": "mica"},
        {"r": 4, "target_modules": ATTENTION, "fan_in_fan_out": True},
        {"r": 4, "target_modules": ATTENTION, "layers_to_transform": [1]},
    ],
    ids=lambda settings: "-".join(map(str, settings)),
)
@pytest.mark.filterwarnings("ignore")
def test_a_merged_model_is_that_of_peft(cases, tmp_path, settings):
    case = cases["vl"]
    want = save_adapter(case, tmp_path / "adapter", lora_alpha=8, **settings)
    checkpoint = open_checkpoint(case.path)
    tuned, config = read_adapter(tmp_path / "adapter", checkpoint, head=True)
    export_merged(case.path, tmp_path / "merged", tuned, config, "float32")
    got = load_file(tmp_path / "merged" / "model.safetensors")
    changed = 0
    for key, value in got.items():
        np.testing.assert_allclose(value, want[key], atol=2e-6, err_msg=key)
        changed += not np.array_equal(value, checkpoint.tensors.read(key))
    assert changed


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_embedder_applies_towers_and_patterns_and_needs_no_head(cases, tmp_path):
    """Its vectors of text and pictures are those of the merged model."""
    case = cases["vl"]
    save_adapter(
        case,
        tmp_path / "adapter",
        r=4,
        rank_pattern={"q_proj": 6},
        target_modules=["q_proj", "gate_proj", "down_proj", "merger.mlp.0"],
        modules_to_save=["lm_head"],
    )
    tuned, config = read_adapter(tmp_path / "adapter", open_checkpoint(case.path), head=True)
    export_merged(case.path, tmp_path / "merged", tuned, config, "float32")
    picture = np.random.default_rng(0).integers(0, 255, (56, 84, 3), np.uint8)
    inputs = [*reference.TEXTS[:2], {"image": picture}]
    plain, got, want = (
        OmniEmbedder.from_pretrained(*paths, modalities=["text", "image"]).encode(inputs)
        for paths in (
            [case.path],
            [case.path, tmp_path / "adapter"],
            [tmp_path / "merged"],
        )
    )
    assert np.abs(got - want).max() < 1e-5
    assert np.abs(got - plain).max(axis=1).min() > 1e-3


@pytest.mark.filterwarnings("ignore")
def test_a_soup_refuses_towers(cases, tmp_path):
    case = cases["vl"]
    save_adapter(case, tmp_path / "tower", r=4, target_modules=["gate_proj"])
    with pytest.raises(LcoError, match=r"visual.*no matrix of a decoder layer"):
        read_peft(tmp_path / "tower")


@pytest.fixture
def plain(cases, tmp_path):
    """The folder of a plain adapter, to change."""
    save_adapter(cases["vl"], tmp_path / "plain", r=4, target_modules=ATTENTION)
    return tmp_path / "plain"


def changed(folder, **settings):
    write_json(folder / CONFIG, {**read_json(folder / CONFIG), **settings})
    return folder


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "pissa_niter_16"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "OLoRA"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "corda"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "lora_ga"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, "merge_and_unload"),
        ({"init_lora_weights": "some new one"}, "merge_and_unload"),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config"),
        ({"some_new_switch": True}, "some_new_switch"),
        ({"some_new_config": {"a": 1}}, "some_new_config"),
        ({"modules_to_save": ["embed_tokens"]}, "embed_tokens"),
        ({"modules_to_save": ["lm_head"], "ensure_weight_tying": True}, "lm_head"),
        ({"rank_pattern": {"(": 4}}, "regular expression"),
        ({"rank_pattern": {"q_proj": 0}}, "above 0"),
        ({"rank_pattern": ["q_proj"]}, "must be an object"),
        ({"alpha_pattern": {"q_proj": "8"}}, "must be a number"),
        ({"r": "4"}, "r is '4'"),
        ({"r": True}, "r is True"),
        ({"r": 4.5}, "r is 4.5"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": "x"}, "lora_dropout"),
        ({"peft_type": ["LORA"]}, "peft_type"),
    ],
    ids=str,
)
def test_what_has_no_place_in_a_plain_adapter_is_refused(cases, plain, settings, named):
    with pytest.raises(LcoError) as error:
        read_adapter(changed(plain, **settings), open_checkpoint(cases["vl"].path))
    assert named in str(error.value)
    assert "\n" not in str(error.value)


def test_a_value_that_a_newer_peft_adds_is_passed_over(cases, plain, caplog):
    read_adapter(changed(plain, some_new_size=16), open_checkpoint(cases["vl"].path))
    assert "some_new_size is not known here" in caplog.text


def rewritten(folder, change):
    state = load_file(folder / WEIGHTS)
    save_file(change(state), folder / WEIGHTS)


def test_a_layer_that_the_model_does_not_have_costs_nothing(cases, plain):
    rewritten(
        plain,
        lambda state: {k.replace("layers.2.", "layers.1000000."): state[k] for k in state},
    )
    with pytest.raises(LcoError, match="names layer 1000000 of the decoder, which can have 3"):
        read_adapter(plain, open_checkpoint(cases["vl"].path))
    with pytest.raises(LcoError, match="names layer 1000000"):
        read_peft(plain)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_an_adapter_that_is_not_finite_names_the_tensor(cases, plain, bad):
    def change(state):
        key = min(key for key in state if "layers.1." in key)
        state[key][0, 1] = bad
        return state

    rewritten(plain, change)
    with pytest.raises(LcoError, match=r"adapter_model.safetensors: .*layers\.1\..* NaN or infin"):
        read_adapter(plain, open_checkpoint(cases["vl"].path))


def test_a_model_given_as_an_adapter_and_the_reverse(cases, plain):
    path = cases["vl"].path
    with pytest.raises(LcoError, match="this is a model"):
        OmniEmbedder.from_pretrained(path, adapter=path)
    changed(plain, base_model_name_or_path="some/base")
    with pytest.raises(LcoError, match="is an adapter; give its base, some/base, as the model"):
        OmniEmbedder.from_pretrained(plain)
    run = plain.parent / "run"
    (run / "checkpoints").mkdir(parents=True)
    write_json(run / CONFIG.removeprefix("adapter_"), {"model": {"path": "x"}})
    for given in ([run], [path, run]):
        with pytest.raises(LcoError, match=r"is a training run; python -m lco_jax.convert --input"):
            OmniEmbedder.from_pretrained(*given)
