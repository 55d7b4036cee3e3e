"""Damaged checkpoints and adapters are refused by name.

Spellings of the same model load alike, and nothing is read that is not needed.
"""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

from lco_jax import LcoError, make_mesh
from lco_jax.checkpoint.hf import load_decoder, open_checkpoint
from lco_jax.checkpoint.peft import match_adapters, read_peft, write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.checkpoint.tensors import TensorFolder
from lco_jax.core import lora
from lco_jax.core.files import read_json, write_json
from lco_jax.core.sharding import shardings
from lco_jax.data.prompts import ChatTokenizer

UP = "layers.1.mlp.up_proj.weight"
INDEX = "model.safetensors.index.json"
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")


@pytest.fixture
def folder(cases, tmp_path):
    """A copy of the untied `vl` checkpoint (two shards and an index, flat config) to damage."""
    return shutil.copytree(cases["vl"].path, tmp_path / "model")


def copy(case, to):
    return shutil.copytree(case.path, to)


def tensors(folder):
    """Every tensor by key."""
    return {
        key: value
        for file in folder.glob("*.safetensors")
        for key, value in load_file(file).items()
    }


def rewrite(folder, state):
    """Replace the weights by one file that holds `state`."""
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink(missing_ok=True)
    save_file(
        {key: np.ascontiguousarray(value) for key, value in state.items()},
        folder / "model.safetensors",
    )


def configure(folder, **changes):
    """Change config.json; None takes a key out."""
    config = {**read_json(folder / "config.json"), **changes}
    write_json(
        folder / "config.json", {key: value for key, value in config.items() if value is not None}
    )


def refusal(folder, opened=open_checkpoint):
    """The message of the LcoError that opening raises: one sentence."""
    with pytest.raises(LcoError) as error:
        opened(folder)
    assert "\n" not in str(error.value)
    return str(error.value)


def one_device():
    return make_mesh(devices=jax.devices()[:1])


def leaves(checkpoint, dtype="float32", mesh=None):
    """The decoder's parameters on the host, by path."""
    return {
        path: np.asarray(value)
        for path, value in flatten_dict(
            load_decoder(checkpoint, mesh or one_device(), dtype)[1], sep="."
        ).items()
    }


def same(a, b):
    return a.keys() == b.keys() and all(
        a[path].dtype == b[path].dtype and np.array_equal(a[path], b[path]) for path in a
    )


# ---- keys


@pytest.mark.parametrize(
    "key",
    [
        "score.weight",
        "norm.weight",
        "lm_head.bias",
        "visuals.blocks.0.weight",
        "audio_tower.layers.0.fc1.weight",  # Omni has one, VL has none
        "model.layers.3.mlp.up_proj.weight",  # the model has three layers
        "model.layers.0.mlp.up_proj.bias",
        "model.layers.0.self_attn.q_norm.weight",
        "model.language_model.layers.0.mlp.gate_up_proj.weight",
        "thinker.model.norm.weight",
    ],
)
def test_an_unknown_key_is_named(folder, key):
    rewrite(folder, {**tensors(folder), key: np.zeros((88, 96), np.float32)})
    message = refusal(folder)
    assert f"unknown key {key}" in message
    assert str(folder) in message


@pytest.mark.parametrize(
    "key", ["model.norm.weight", f"model.{UP}", "model.layers.2.self_attn.k_proj.bias"]
)
def test_a_missing_key_is_named(folder, key):
    state = tensors(folder)
    del state[key]
    rewrite(folder, state)
    message = refusal(folder)
    assert message == f"{folder}: missing key {key.removeprefix('model.')}"


def test_many_missing_keys_are_counted(folder):
    rewrite(
        folder, {key: value for key, value in tensors(folder).items() if ".layers.1." not in key}
    )
    assert refusal(folder).endswith("and 11 more")  # 7 matrices, 3 biases and 2 norms a layer


def test_a_head_is_needed_unless_it_is_tied(folder, cases):
    state = tensors(folder)
    del state["lm_head.weight"]
    rewrite(folder, state)
    assert "missing key lm_head.weight" in refusal(folder)
    configure(folder, tie_word_embeddings=True)
    open_checkpoint(folder)
    assert "lm_head.weight" not in tensors(cases["vl_tied"].path)
    open_checkpoint(cases["vl_tied"].path)


def test_a_key_in_two_shards_is_named(folder):
    first, second = (load_file(folder / shard) for shard in SHARDS)
    key = next(key for key in first if "up_proj" in key)
    save_file({**second, key: first[key]}, folder / SHARDS[1])
    for index_is_there in (True, False):
        if not index_is_there:
            (folder / INDEX).unlink()
        message = refusal(folder)
        assert all(part in message for part in (key, *SHARDS))


@pytest.mark.parametrize(
    ("key", "shape"),
    [
        (f"model.{UP}", (96, 88)),
        (f"model.{UP}", (88, 95)),
        (f"model.{UP}", (88 * 96,)),
        ("model.norm.weight", (1,)),
        ("lm_head.weight", (7, 96)),
    ],
)
def test_a_misshapen_tensor_is_named(folder, key, shape):
    rewrite(folder, {**tensors(folder), key: np.zeros(shape, np.float32)})
    message = refusal(folder)
    assert key in message
    assert str(shape) in message


def test_a_config_of_another_size_names_the_tensor(folder):
    configure(folder, vocab_size=read_json(folder / "config.json")["vocab_size"] + 1)
    assert "model.embed_tokens.weight" in refusal(folder) or "lm_head.weight" in refusal(folder)


def test_one_parameter_in_both_spellings_is_refused(folder):
    state = tensors(folder)
    twin = f"model.language_model.{UP}"
    rewrite(folder, {**state, twin: state[f"model.{UP}"]})
    message = refusal(folder)
    assert f"model.{UP}" in message
    assert twin in message


def test_a_full_omni_key_needs_its_prefix(cases, tmp_path):
    folder = copy(cases["omni_full"], tmp_path / "model")
    state = tensors(folder)
    rewrite(folder, {**state, "model.norm.weight": state["thinker.model.norm.weight"]})
    assert "unknown key model.norm.weight" in refusal(folder)


# ---- files


@pytest.mark.parametrize("shard", SHARDS)
def test_an_absent_shard_is_named(folder, shard):
    (folder / shard).unlink()
    message = refusal(folder)
    assert str(folder / shard) in message
    assert INDEX in message


def test_an_index_that_points_to_the_wrong_file_is_refused(folder):
    index = read_json(folder / INDEX)
    key = next(key for key, file in index["weight_map"].items() if file == SHARDS[0])
    index["weight_map"][key] = SHARDS[1]
    write_json(folder / INDEX, index)
    message = refusal(folder)
    assert all(part in message for part in (str(folder / INDEX), key, SHARDS[1]))


def test_an_index_that_names_a_key_too_many_is_refused(folder):
    index = read_json(folder / INDEX)
    index["weight_map"]["model.layers.9.mlp.up_proj.weight"] = SHARDS[1]
    write_json(folder / INDEX, index)
    assert "model.layers.9.mlp.up_proj.weight" in refusal(folder)


@pytest.mark.parametrize(
    "content", ["", '{"weight_map": {"model.norm.weight": ', "[]", "{}", '{"weight_map": []}']
)
def test_a_torn_index_is_named(folder, content):
    (folder / INDEX).write_text(content)
    assert INDEX in refusal(folder)


@pytest.mark.parametrize("keep", [0, 5, 200, 0.5, -1])
def test_a_truncated_file_is_named(folder, keep):
    """Cut within the length, the header and the data; -1: one byte short."""
    content = (folder / SHARDS[0]).read_bytes()
    (folder / SHARDS[0]).write_bytes(
        content[: int(len(content) * keep) if isinstance(keep, float) else keep]
    )
    message = refusal(folder)
    assert str(folder / SHARDS[0]) in message
    assert "torn" in message


def test_a_file_that_is_no_safetensors_is_named(folder):
    (folder / SHARDS[0]).write_bytes(
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 135\n"
    )
    assert str(folder / SHARDS[0]) in refusal(folder)


def test_pickled_weights_are_not_loaded(folder):
    for file in (*folder.glob("*.safetensors"), folder / INDEX):
        file.unlink()
    (folder / "pytorch_model.bin").write_bytes(b"PK\x03\x04")
    message = refusal(folder)
    assert str(folder) in message
    assert "safetensors" in message
    assert "pickled" in message


@pytest.mark.parametrize(
    "name", ["nowhere", "/no/such/folder", "./here", "a/b/c", "~/no-such-model", "owner/no-model"]
)
def test_a_path_that_is_neither_folder_nor_hub_id_is_named(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert name in refusal(name)


def test_a_file_in_the_place_of_a_folder_is_named(folder):
    assert str(folder / SHARDS[0]) in refusal(folder / SHARDS[0])


def test_the_single_file_comes_before_a_stale_index(folder):
    """As in transformers, which looks for model.safetensors first. Shards stay beside it."""
    state = {key: value + 1 for key, value in tensors(folder).items()}
    save_file(state, folder / "model.safetensors")
    got = TensorFolder(folder)
    key = "model.norm.weight"
    assert np.array_equal(got.read(key), state[key])
    (folder / INDEX).write_text("{}")  # it is not even read
    assert set(TensorFolder(folder)) == set(state)
    (folder / "model.safetensors").rename(folder / "elsewhere.safetensors")
    for shard in SHARDS:
        (folder / shard).unlink()
    (folder / INDEX).unlink()
    assert np.array_equal(TensorFolder(folder).read(key), state[key])


@pytest.mark.parametrize(
    "stray", ["consolidated.safetensors", "model.fp16.safetensors", "optimizer.safetensors"]
)
@pytest.mark.parametrize("layout", ["index", "shards", "single"])
def test_stray_files_are_passed_over(folder, stray, layout):
    want = leaves(open_checkpoint(folder))
    if layout == "single":
        rewrite(folder, tensors(folder))
    elif layout == "shards":
        (folder / INDEX).unlink()
    save_file({"model.norm.weight": np.zeros(96, np.float32)}, folder / stray)
    assert same(leaves(open_checkpoint(folder)), want)


@pytest.mark.parametrize("file", [3, None, [], "", "/etc/passwd", "../other/model.safetensors"])
def test_a_weight_map_that_names_no_file_of_the_folder_is_refused(folder, file):
    index = read_json(folder / INDEX)
    index["weight_map"]["model.norm.weight"] = file
    write_json(folder / INDEX, index)
    assert str(folder / INDEX) in refusal(folder)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", INDEX, *SHARDS])
@pytest.mark.parametrize("kind", ["pipe", "device", "folder"])
def test_what_is_no_file_is_refused_and_not_waited_for(folder, name, kind):
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "device":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    message = refusal(folder)
    assert str(folder / name) in message
    assert "must be a file" in message


def test_links_into_the_blobs_of_a_hub_cache_are_read(folder, tmp_path):
    want = leaves(open_checkpoint(folder))
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    folder.rename(blobs)
    snapshot.mkdir(parents=True)
    for file in blobs.iterdir():
        (snapshot / file.name).symlink_to(f"../../blobs/{file.name}")
    assert same(leaves(open_checkpoint(snapshot)), want)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_a_tensor_that_is_not_finite_is_named_with_its_file(folder, dtype, bad):
    state = {key: value.astype(np.dtype(dtype)) for key, value in tensors(folder).items()}
    state[f"model.{UP}"][87, 95] = bad
    rewrite(folder, state)
    checkpoint = open_checkpoint(folder)
    with pytest.raises(LcoError) as error:
        load_decoder(checkpoint, one_device())
    assert f"{folder / 'model.safetensors'}: model.{UP} holds NaN or infinity" in str(error.value)
    state[f"model.{UP}"][87, 95] = np.finfo(np.dtype(dtype)).max if dtype == "float16" else 1e30
    rewrite(folder, state)
    load_decoder(open_checkpoint(folder), one_device())


# ---- config.json


@pytest.mark.parametrize(
    "content",
    [None, "", '{"model_type": "qwen2_5_vl",', "[1]", "{}", b"\xff\xfe", '{"a":' * 100_000],
)
def test_a_torn_config_is_named(folder, content):
    path = folder / "config.json"
    path.unlink()
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert str(path) in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"model_type": "qwen9_vl"}, "'qwen9_vl'"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}}, "'yarn'"),
        (
            {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "mrope_section": [2, 3, 3]}},
            "'yarn'",
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e6}}, "'yarn'"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 4]}}, "mrope_section"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"hidden_act": "gelu"}, "'gelu'"),
        ({"hidden_size": None}, "'hidden_size'"),
        ({"num_hidden_layers": None}, "'num_hidden_layers'"),
        ({"rope_theta": None}, "'rope_theta'"),
        ({"hidden_size": "96"}, "hidden_size"),
        ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"text_config": 3}, "text_config"),
        ({"num_hidden_layers": 10**8}, "num_hidden_layers is 100000000"),
        ({"num_hidden_layers": 9999}, "num_layers 9999"),
        ({"vocab_size": 10**7}, "vocab_size 10000000"),
        ({"vocab_size": 10**9}, "vocab_size is 1000000000"),
        ({"max_position_embeddings": 2**40}, "max_position_embeddings"),
        ({"intermediate_size": 10**30}, "intermediate_size"),
        ({"num_hidden_layers": 0.5}, "num_hidden_layers"),
        ({"num_key_value_heads": 4}, "num_key_value_heads"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps"),
        ({"rope_scaling": True}, "rope_scaling"),
        ({"rope_scaling": {"type": "mrope", "mrope_section": "x"}}, "mrope_section"),
        ({"model_type": ["qwen2_5_vl"]}, "model_type"),
        ({"vision_config": "x"}, "vision_config"),
    ],
)
def test_an_unsupported_config_names_the_key(folder, changes, named):
    configure(folder, **changes)
    message = refusal(folder)
    assert str(folder / "config.json") in message
    assert named in message


@pytest.mark.parametrize("family", ["vl_tied", "omni_full"])
def test_an_unsupported_nested_config_names_the_key(cases, tmp_path, family):
    folder = copy(cases[family], tmp_path / "model")
    config = read_json(folder / "config.json")
    (config if family == "vl_tied" else config["thinker_config"])["text_config"][
        "use_sliding_window"
    ] = True
    write_json(folder / "config.json", config)
    assert "use_sliding_window" in refusal(folder)
    if family == "omni_full":
        configure(folder, thinker_config=None)
        assert "'thinker_config'" in refusal(folder)


# ---- tokenizer and template


def test_a_missing_chat_template_is_named(folder):
    (folder / "chat_template.json").unlink()
    message = refusal(folder, ChatTokenizer)
    assert str(folder) in message
    assert "chat template" in message


@pytest.mark.parametrize("content", ["", "{}", '{"chat_template": 3}', '{"chat_template": "{%'])
def test_a_torn_chat_template_is_named(folder, content):
    (folder / "chat_template.json").write_text(content)
    assert str(folder / "chat_template.json") in refusal(folder, ChatTokenizer)


@pytest.mark.parametrize(
    "content", ["[]", "{}", '{"a":' * 100_000, '{"model": 3}', '{"model": {"vocab": {"a": "x"}}}']
)
@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_a_tokenizer_of_other_types_is_one_sentence(folder, name, content):
    (folder / name).write_text(content)
    if name == "tokenizer_config.json" and content not in ("[]", '{"a":' * 100_000):
        return  # all of it has defaults
    message = refusal(folder, ChatTokenizer)
    assert str(folder) in message


@pytest.mark.parametrize("damage", ["gone", "torn tokenizer.json", "torn tokenizer_config.json"])
def test_a_tokenizer_that_does_not_load_is_named(folder, damage):
    for name in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        if damage == "gone":
            (folder / name).unlink()
        elif damage.endswith(name):
            (folder / name).write_text((folder / name).read_text()[:100])
    assert str(folder) in refusal(folder, ChatTokenizer)


# ---- what loads


def test_the_spelling_of_transformers_5_loads_the_same_parameters(folder):
    want = leaves(open_checkpoint(folder))
    renamed = {
        key.replace("model.", "model.language_model.", 1)
        if key.startswith("model.")
        else key.replace("visual.", "model.visual.", 1): value
        for key, value in tensors(folder).items()
    }
    assert any(key.startswith("model.visual.") for key in renamed)
    rewrite(folder, renamed)
    assert same(leaves(open_checkpoint(folder)), want)


def test_shards_load_without_their_index(folder):
    want = leaves(open_checkpoint(folder))
    (folder / INDEX).unlink()
    assert same(leaves(open_checkpoint(folder)), want)


def test_stored_rotary_frequencies_are_passed_over(folder):
    want = leaves(open_checkpoint(folder))
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    rewrite(folder, {**tensors(folder), buffer: np.zeros(8, np.float32)})
    assert same(leaves(open_checkpoint(folder)), want)


@pytest.mark.parametrize(
    ("stored", "loaded", "devices"),
    [
        ("float32", "bfloat16", 1),
        ("float32", "bfloat16", 8),
        ("bfloat16", "float32", 1),
        ("bfloat16", "float32", 8),
        ("float16", "float32", 1),
    ],
)
def test_any_stored_dtype_loads_into_any(folder, stored, loaded, devices):
    state = {key: value.astype(np.dtype(stored)) for key, value in tensors(folder).items()}
    rewrite(folder, state)
    mesh = make_mesh(1, devices, 1, devices=jax.devices()[:devices])
    got = leaves(open_checkpoint(folder), loaded, mesh)
    want = {
        "norm.weight": state["model.norm.weight"],
        "embed_tokens.weight": state["model.embed_tokens.weight"],
    }
    name = "layers.mlp.up_proj.weight"
    want[name] = np.stack([state[f"model.layers.{i}.mlp.up_proj.weight"] for i in range(3)])
    for path, value in want.items():
        assert got[path].dtype == np.dtype(loaded)
        assert np.array_equal(got[path], value.astype(np.dtype(loaded)))
    assert all(value.dtype == np.dtype(loaded) for value in got.values())
    if loaded == "bfloat16":
        assert not np.array_equal(got[name].astype(np.float32), want[name].astype(np.float32))


def test_an_unknown_dtype_is_named(folder):
    checkpoint = open_checkpoint(folder)
    with pytest.raises(
        LcoError, match="dtype 'float16' is not supported; these are: float32, bfloat16"
    ):
        load_decoder(checkpoint, one_device(), "float16")


# ---- how it reads


@pytest.fixture
def reads(monkeypatch):
    """(key, shape) of every read from a checkpoint's files."""
    made, read = [], TensorFolder.read

    def spy(self, key, index=()):
        value = read(self, key, index)
        made.append((key, value.shape))
        return value

    monkeypatch.setattr(TensorFolder, "read", spy)
    return made


def test_loading_reads_tensor_by_tensor(folder, reads):
    checkpoint = open_checkpoint(folder)
    assert not reads  # opening reads headers alone
    load_decoder(checkpoint, one_device())
    keys = checkpoint.keys["decoder"].values()
    assert sorted(key for key, _ in reads) == sorted(keys)  # each once, no tower, no head
    assert all(shape == checkpoint.tensors.shape(key) for key, shape in reads)
    largest = max(np.prod(checkpoint.tensors.shape(key)) for key in keys)
    assert max(np.prod(shape) for _, shape in reads) <= largest


def test_loading_onto_shards_reads_only_their_slices(folder, reads):
    checkpoint = open_checkpoint(folder)
    _, params = load_decoder(checkpoint, make_mesh(1, 8, 1))
    size = {key: np.prod(checkpoint.tensors.shape(key)) for key in checkpoint.tensors}
    keys = checkpoint.keys["decoder"]
    matrices = [
        key for name, key in keys.items() if name.startswith("layers.") and "proj.w" in name
    ]
    assert len(matrices) == 3 * 7
    for key in [*matrices, keys["embed_tokens.weight"]]:
        parts = [np.prod(shape) for read, shape in reads if read == key]
        assert max(parts) <= size[key] / 8
        assert sum(parts) == size[key]  # and no slice twice
    up = params["layers"]["mlp"]["up_proj"]["weight"]
    assert {shard.data.shape for shard in up.addressable_shards} == {(3, 88, 12)}
    assert same(leaves(checkpoint, mesh=make_mesh(1, 8, 1)), leaves(checkpoint))


def test_a_parameter_that_no_rule_names_is_an_error():
    tree = {
        "norm": {"weight": np.zeros(4)},
        "layers": {"mlp": {"router": {"weight": np.zeros((2, 4, 4))}}},
    }
    with pytest.raises(
        LcoError, match=r"no sharding rule names the parameter layers\.mlp\.router\.weight"
    ):
        shardings(tree, one_device())


# ---- adapters


@pytest.fixture(scope="module")
def good_adapter(cases, tmp_path_factory):
    """(folder of a good adapter of rank 4, its tree, the abstract parameters it belongs to)."""
    folder = tmp_path_factory.mktemp("good") / "adapter"
    params = abstract_params(open_checkpoint(cases["vl"].path).config)
    config = lora.LoraConfig(rank=4, alpha=8.0)
    fresh = lora.init(jax.random.key(0), params, config)
    rng = np.random.default_rng(0)
    adapters = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), fresh)
    write_peft(folder, adapters, config, "base")
    return folder, adapters, params


@pytest.fixture
def adapted(good_adapter, tmp_path):
    """A copy of the good adapter to damage."""
    folder, adapters, params = good_adapter
    return shutil.copytree(folder, tmp_path / "adapter"), adapters, params


WEIGHTS = "adapter_model.safetensors"
QUERY = "base_model.model.model.language_model.layers.0.self_attn.q_proj"


def edit(folder, change):
    """Rewrite the adapter's tensors after `change` of their dictionary."""
    state = load_file(folder / WEIGHTS)
    change(state)
    save_file(state, folder / WEIGHTS)


def set_config(folder, **changes):
    write_json(
        folder / "adapter_config.json", {**read_json(folder / "adapter_config.json"), **changes}
    )


def test_a_good_adapter_reads_back(adapted):
    folder, adapters, params = adapted
    back, config = read_peft(folder)
    assert same(flatten_dict(back, sep="."), flatten_dict(adapters, sep="."))
    assert (config.rank, config.alpha, config.use_rslora) == (4, 8.0, False)
    match_adapters(back, params, "it")


def test_an_adapter_in_bfloat16_is_read_as_float32(adapted):
    folder, adapters, _ = adapted
    edit(
        folder,
        lambda state: state.update({k: v.astype(ml_dtypes.bfloat16) for k, v in state.items()}),
    )
    want = {
        k: v.astype(ml_dtypes.bfloat16).astype(np.float32)
        for k, v in flatten_dict(adapters, sep=".").items()
    }
    assert same(flatten_dict(read_peft(folder)[0], sep="."), want)


@pytest.mark.parametrize(
    "option",
    [
        {"use_dora": True},
        {"bias": "all"},
        {"bias": "lora_only"},
        {"lora_bias": True},
        {"modules_to_save": ["lm_head"]},
        {"layer_replication": [[0, 2], [1, 3]]},
        {"target_parameters": ["mlp.experts.gate_up_proj"]},
        {"trainable_token_indices": [1, 2]},
        {"peft_type": "LOHA"},
        {"alora_invocation_tokens": [5, 6]},  # adapts only what follows these tokens
        {"use_qalora": True},  # pools the input
        {"use_bdlora": {"target_modules_bd_a": ["q_proj"], "nblocks": 2}},  # block-diagonal A or B
    ],
    ids=lambda option: next(iter(option)),
)
def test_an_unsupported_adapter_option_is_named(adapted, option):
    folder, _, _ = adapted
    set_config(folder, **option)
    message = refusal(folder, read_peft)
    assert str(folder / "adapter_config.json") in message
    assert next(iter(option)) in message


@pytest.mark.parametrize("missing", ["r", "lora_alpha", "peft_type"])
def test_an_adapter_config_without_a_needed_key_is_named(adapted, missing):
    folder, _, _ = adapted
    config = read_json(folder / "adapter_config.json")
    del config[missing]
    write_json(folder / "adapter_config.json", config)
    message = refusal(folder, read_peft)
    assert "adapter_config.json" in message
    assert missing in message


@pytest.mark.parametrize("half", ["A", "B"])
def test_half_of_a_pair_is_named(adapted, half):
    folder, _, _ = adapted
    edit(folder, lambda state: state.pop(f"{QUERY}.lora_{half}.weight"))
    message = refusal(folder, read_peft)
    assert WEIGHTS in message
    assert "self_attn.q_proj" in message


def test_a_whole_half_missing_is_named(adapted):
    folder, _, _ = adapted
    edit(folder, lambda state: [state.pop(key) for key in list(state) if "q_proj.lora_B" in key])
    assert "self_attn.q_proj" in refusal(folder, read_peft)


@pytest.mark.parametrize("half", ["A", "B"])
def test_a_wrong_rank_is_named(adapted, half):
    folder, _, _ = adapted
    key = f"{QUERY}.lora_{half}.weight"
    edit(
        folder,
        lambda state: state.update(
            {key: np.zeros((3, 96) if half == "A" else (96, 3), np.float32)}
        ),
    )
    message = refusal(folder, read_peft)
    assert key in message
    assert "rank 3" in message
    assert "r = 4" in message


def test_the_rank_in_the_config_must_be_that_of_the_weights(adapted):
    folder, _, _ = adapted
    set_config(folder, r=8)
    assert "rank 4" in refusal(folder, read_peft)


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight",
        # not the decoder's layers.0
        "base_model.model.audio_tower.layers.0.self_attn.q_proj.lora_A.weight",
        "base_model.model.thinker.audio_tower.layers.7.fc1.lora_A.weight",
        "base_model.model.talker.model.layers.0.mlp.up_proj.lora_A.weight",
        "base_model.model.model.embed_tokens.lora_embedding_A",
        "base_model.model.lm_head.lora_A.weight",
        f"{QUERY}.lora_magnitude_vector",
    ],
)
def test_an_adapter_of_what_is_no_decoder_layer_is_named(adapted, key):
    folder, _, _ = adapted

    def change(state):
        if "layers" in key:  # both halves, and none of the decoder's: nothing else can give it away
            state.clear()
            state[key.replace("lora_A", "lora_B")] = np.zeros((96, 4), np.float32)
        state[key] = np.zeros((4, 96), np.float32)

    edit(folder, change)
    message = refusal(folder, read_peft)
    assert WEIGHTS in message
    assert key.split(".lora_")[0] in message


@pytest.mark.parametrize(
    "key",
    [
        "base_model.model.model.layers.0.self_attn.q_proj",
        "base_model.model.thinker.model.layers.0.self_attn.q_proj",
        "base_model.model.layers.0.self_attn.q_proj",
        "base_model.model.language_model.layers.0.self_attn.q_proj",
    ],
)
def test_other_spellings_of_an_adapter_key(adapted, key):
    """They are read. Beside the spelling of transformers 5 they are the same parameter twice."""
    folder, adapters, _ = adapted
    names = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    set_config(folder, target_modules=list(names))  # ours name whole paths
    halves = {half: np.full((4, 96) if half == "A" else (96, 4), 0.5, np.float32) for half in "AB"}

    def replace(state):
        for half, value in halves.items():
            del state[f"{QUERY}.lora_{half}.weight"]
            state[f"{key}.lora_{half}.default.weight"] = value

    edit(folder, replace)
    back, _ = read_peft(folder)
    query = back["layers"]["self_attn"]["q_proj"]["weight"]
    assert (query["a"][0] == 0.5).all()
    assert np.array_equal(
        query["b"][1:], adapters["layers"]["self_attn"]["q_proj"]["weight"]["b"][1:]
    )
    edit(
        folder,
        lambda state: state.update(
            {f"{QUERY}.lora_{half}.weight": value for half, value in halves.items()}
        ),
    )
    assert "the same parameter" in refusal(folder, read_peft)


def test_layers_that_an_adapter_leaves_out_stay_as_they_are(adapted):
    folder, adapters, _ = adapted
    edit(folder, lambda state: [state.pop(f"{QUERY}.lora_{half}.weight") for half in "AB"])
    query = read_peft(folder)[0]["layers"]["self_attn"]["q_proj"]["weight"]
    assert not query["a"][0].any()
    assert not query["b"][0].any()
    assert np.array_equal(
        query["a"][1:], adapters["layers"]["self_attn"]["q_proj"]["weight"]["a"][1:]
    )


def test_layers_of_different_widths_are_refused(adapted):
    folder, _, _ = adapted
    edit(
        folder,
        lambda state: state.update({f"{QUERY}.lora_A.weight": np.zeros((4, 80), np.float32)}),
    )
    assert "self_attn.q_proj" in refusal(folder, read_peft)


@pytest.mark.parametrize(
    "damage", ["weights torn", "weights gone", "weights pickled", "empty", "config torn", "gone"]
)
def test_a_torn_adapter_is_named(adapted, damage):
    folder, _, _ = adapted
    named = folder / ("adapter_config.json" if damage in ("config torn", "gone") else WEIGHTS)
    if damage.endswith("torn"):
        named.write_bytes(named.read_bytes()[:-10])
    elif damage == "empty":
        save_file({}, named)
    else:
        named.unlink()
    if damage == "weights pickled":
        (folder / "adapter_model.bin").write_bytes(b"PK")
    assert str(named) in refusal(folder, read_peft)


def test_an_adapter_of_another_model_does_not_fit(adapted, cases):
    folder, adapters, params = adapted
    other = abstract_params(
        open_checkpoint(cases["omni"].path).config
    )  # hidden size 80, this one has 96
    with pytest.raises(LcoError) as error:
        match_adapters(adapters, other, str(folder))
    assert str(folder) in str(error.value)
    assert "proj.weight." in str(error.value)
    deep = jax.tree.map(lambda x: np.concatenate([x, x]), adapters)
    with pytest.raises(LcoError, match="does not fit"):
        match_adapters(deep, params, str(folder))
    pair = adapters["layers"]["self_attn"]["q_proj"]["weight"]
    with pytest.raises(
        LcoError, match=r"adapts layers\.mlp\.router\.weight, which the model does not have"
    ):
        match_adapters({"layers": {"mlp": {"router": {"weight": pair}}}}, params, str(folder))


def test_every_refusal_here_is_of_damage(cases):
    """The fixtures themselves open, or the tests above would prove nothing."""
    for family in ("vl", "vl_tied", "omni", "omni_full"):
        assert json.loads((cases[family].path / "config.json").read_text())
        open_checkpoint(cases[family].path)
        ChatTokenizer(cases[family].path)
