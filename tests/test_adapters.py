"""Adapters as people save them: ours equal PEFT's own on the same model, or are refused by name."""

import re
from pathlib import Path

import numpy as np
import peft
import pytest
import reference
import torch
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.numpy import load_file, save_file

from lco_jax import LcoError, OmniEmbedder
from lco_jax.checkpoint import soup
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.peft import read_adapter, read_peft
from lco_jax.checkpoint.peft_targets import Targets
from lco_jax.core.files import read_json, write_json
from lco_jax.data import foreign

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


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        (
            "omni",
            {
                "target_modules": r".*audio_tower\.(layers.*(_proj|fc.)|proj)|.*up_proj",
                "rank_pattern": {"fc1": 2, r"audio_tower\.proj": 7},
                "alpha_pattern": {"up_proj": 3},
            },
        ),
        ("omni", {"target_modules": ["q", "k", "attn.proj", "merger.mlp.0", "v_proj"]}),
        (
            "llava_qwen2",
            {
                "target_modules": ["fc1", "out_proj", "q_proj", "linear_1", "linear_2"],
                "rank_pattern": {r"vision_tower.*q_proj": 3},
                "use_rslora": True,
            },
        ),
        ("llava_mistral", {"target_modules": "all-linear", "exclude_modules": ["fc2"]}),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_towers_of_other_families_are_merged_as_in_peft(cases, tmp_path, family, settings):
    case = cases[family]
    want = save_adapter(case, tmp_path / "adapter", r=4, lora_alpha=8, **settings)
    checkpoint = open_checkpoint(case.path)
    tuned, config = read_adapter(tmp_path / "adapter", checkpoint, head=True)
    assert tuned.keys() > {"decoder"}
    export_merged(case.path, tmp_path / "merged", tuned, config, "float32")
    got = load_file(tmp_path / "merged" / "model.safetensors")
    changed = set()
    for key, value in got.items():
        if not key.startswith("vision_tower.vision_model.encoder.layers.2."):  # it never runs
            np.testing.assert_allclose(value, want[key], atol=3e-6, err_msg=key)
        if not np.array_equal(value, checkpoint.tensors.read(key)):
            changed.add(key.split(".")[0])
    assert len(changed) >= 2


@pytest.mark.filterwarnings("ignore")
def test_a_soup_of_patterns_is_the_average_of_pefts_merged_models(cases, tmp_path):
    """Of ranks and scales that differ within an adapter and between the two."""
    case = cases["vl"]
    given = [
        {"r": 4, "rank_pattern": {"q_proj": 6, r"layers\.1\.mlp\.up_proj": 1}, "lora_alpha": 8},
        {"r": 3, "alpha_pattern": {"v_proj": 9}, "lora_alpha": 2, "use_rslora": True},
    ]
    names = [["q_proj", "v_proj", "mlp.up_proj"], ["v_proj", "o_proj"]]
    targets = [rf".*language_model.*({'|'.join(ends)})".replace(".up", r"\.up") for ends in names]
    merged, folders = [], [tmp_path / "0", tmp_path / "1"]
    for folder, settings, target in zip(folders, given, targets, strict=True):
        merged.append(save_adapter(case, folder, target_modules=target, **settings))
    checkpoint = open_checkpoint(case.path)
    adapters = soup.read_adapters(list(map(str, folders)), checkpoint)
    tree, config = soup.average_adapters(adapters, [0.25, 0.75])
    export_merged(case.path, tmp_path / "soup", {"decoder": tree}, config, "float32")
    got = load_file(tmp_path / "soup" / "model.safetensors")
    for key, value in got.items():
        want = 0.25 * merged[0][key] + 0.75 * merged[1][key]
        np.testing.assert_allclose(value, want, atol=3e-6, err_msg=key)
    changed = {key for key in got if not np.array_equal(got[key], checkpoint.tensors.read(key))}
    assert len(changed) == 3 * 4


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
        ({"use_rslora": "no"}, "use_rslora is 'no'"),
        ({"use_rslora": float("nan")}, "use_rslora is nan"),
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


# ---- names


@pytest.mark.parametrize(
    "layer", ["01", "+1", " 1", "1 ", "1_0", "٣", "-1", "0x1", "", "1e0", "9" * 5000]
)
def test_a_number_of_a_layer_has_one_spelling(cases, plain, layer):
    """PEFT finds no such module, and passes over its factors."""
    rewritten(
        plain, lambda state: {k.replace("layers.1.", f"layers.{layer}."): state[k] for k in state}
    )
    for read in (read_peft, lambda folder: read_adapter(folder, open_checkpoint(cases["vl"].path))):
        with pytest.raises(LcoError) as error:
            read(plain)
        assert WEIGHTS in str(error.value)
        assert f"layers.{layer}.self_attn" in str(error.value)


@pytest.mark.parametrize("block", ["00", "٠", "+0", "1_0"])
@pytest.mark.filterwarnings("ignore")
def test_a_number_of_a_towers_block_has_one_spelling(cases, tmp_path, block):
    save_adapter(cases["vl"], tmp_path / "tower", r=4, target_modules=["qkv"])
    rewritten(
        tmp_path / "tower",
        lambda state: {k.replace("blocks.0.", f"blocks.{block}."): state[k] for k in state},
    )
    with pytest.raises(LcoError, match=rf"unknown key .*blocks\.{re.escape(block)}\."):
        read_adapter(tmp_path / "tower", open_checkpoint(cases["vl"].path))


# ---- what is adapted

MODULES = [
    "model.language_model.layers.0.self_attn.q_proj",
    "model.language_model.layers.1.self_attn.q_proj",
    "model.language_model.layers.10.mlp.up_proj",
    "model.visual.blocks.1.attn.qkv",
    "model.visual.merger.mlp.0",
    "visual.merger",
    "lm_head",
    "layers.1.x.q_proj",
    "a.layers.2.experts.1.q_proj",
]


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["proj", "mlp.0", "lm_head"]},
        {
            "target_modules": ["self_attn.q_proj", "up_proj"],
            "exclude_modules": ["0.self_attn.q_proj"],
        },
        {"target_modules": r".*\.(q|up)_proj"},
        {"target_modules": r".*proj", "exclude_modules": r".*layers\.\d\..*"},
        {"target_modules": r"(?i).*Q_PROJ"},
        {"target_modules": ["q_proj", "qkv", "0"], "layers_to_transform": [1]},
        {"target_modules": ["q_proj", "qkv", "0"], "layers_to_transform": 1},
        {"target_modules": ["q_proj"], "layers_to_transform": [1, 2], "layers_pattern": "layers"},
        {
            "target_modules": ["q_proj", "qkv"],
            "layers_to_transform": [1],
            "layers_pattern": ["blocks"],
        },
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": ["expert.?"]},
        {
            "target_modules": ["q_proj"],
            "layers_to_transform": [1],
            "layers_pattern": ["h", "layers"],
        },
        {"target_modules": []},
    ],
    ids=str,
)
def test_the_modules_that_are_adapted_are_those_of_peft(settings):
    theirs = peft.LoraConfig(**settings)
    if isinstance(theirs.target_modules, set):
        theirs.target_modules = sorted(theirs.target_modules)
    want = [name for name in MODULES if not check_target_module_exists(theirs, name)]
    found = Targets.read(settings, Path(CONFIG)).missing(MODULES)
    assert found == sorted(want)


@pytest.mark.parametrize(
    "settings",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": r".*q_proj"},
        {"target_modules": ATTENTION, "exclude_modules": ["v_proj"]},
        {"target_modules": ATTENTION, "layers_to_transform": [0, 2]},
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore")
def test_factors_that_peft_passes_over_are_refused(cases, plain, settings):
    """They are in the file, and PEFT loads the folder without a word of them."""
    loaded = peft.PeftModel.from_pretrained(load(cases["vl"]), changed(plain, **settings))
    names = {name for name, _ in loaded.named_parameters() if "lora_A" in name}
    assert 0 < len(names) < len(load_file(plain / WEIGHTS)) // 2
    for read in (read_peft, lambda folder: read_adapter(folder, open_checkpoint(cases["vl"].path))):
        with pytest.raises(LcoError, match=r"PEFT would pass over it") as error:
            read(plain)
        missing = str(error.value).split(" adapts ")[1].split(",")[0]
        assert not any(missing in name for name in names)


@pytest.mark.parametrize("bad", [5, {}, [5], True, [None]])
@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_names_of_modules_of_other_types_are_named(plain, key, bad):
    with pytest.raises(LcoError, match=rf"{CONFIG}: {key} is .* a string or a list of strings"):
        read_peft(changed(plain, **{key: bad}))


@pytest.mark.parametrize("more", [{"layers_to_transform": [0]}, {"layers_pattern": "layers"}])
def test_layers_need_a_list_of_modules(plain, more):
    with pytest.raises(ValueError, match="when `target_modules` is a str"):
        peft.LoraConfig(target_modules=".*_proj", **more)
    with pytest.raises(LcoError, match=rf"{CONFIG}: layers_to_transform and layers_pattern need"):
        read_peft(changed(plain, target_modules=".*_proj", **more))


@pytest.mark.parametrize("bad", ["x", [True], [1.5], {"a": 1}, ["1"]])
def test_layers_of_other_types_are_named(plain, bad):
    with pytest.raises(LcoError, match=rf"{CONFIG}: layers_to_transform is "):
        read_peft(changed(plain, layers_to_transform=bad))


SLOW = r"([a-z_.0-9]+)+!"


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {SLOW: 4}},
        {"alpha_pattern": {"q_proj": 4, SLOW: 4}},
        {"target_modules": SLOW},
        {"exclude_modules": SLOW},
        {"layers_to_transform": [1], "layers_pattern": SLOW},
    ],
    ids=str,
)
def test_a_pattern_that_takes_for_ever_is_ended(plain, settings, monkeypatch):
    monkeypatch.setattr(foreign, "SECONDS", 0.3)
    key = list(settings)[-1]
    with pytest.raises(LcoError, match=rf"{CONFIG}: {key} did not end within 0.3 s of CPU time"):
        read_peft(changed(plain, **settings))


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "rank_pattern"])
def test_what_is_no_pattern_is_named(plain, key):
    value = {"(": 4} if key == "rank_pattern" else "("
    with pytest.raises(LcoError, match=rf"{CONFIG}: {key} has .*\(.*not a regular expression"):
        read_peft(changed(plain, **{key: value}))
