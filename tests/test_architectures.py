"""The full-size architectures, compared by shapes alone.

Ours are made by `eval_shape`, those of transformers on the meta device.
"""

import copy
import math

import jax.numpy as jnp
import pytest
import reference
import torch
import transformers
from flax.traverse_util import flatten_dict

from lco_jax.checkpoint.shapes import abstract_params, per_layer, tower_module
from lco_jax.core.sharding import make_mesh, shardings
from lco_jax.models.config import DecoderConfig
from lco_jax.models.registry import find_backbone

SIZES = {  # as in the hub's config.json files
    "3b": {
        "hidden_size": 2048,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 16,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
    },
    "7b": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
}
COMMON = {
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "hidden_act": "silu",
    "use_sliding_window": False,
}
ROPE = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
LLAVA_TEXT = {  # as on the hub: the rest is left to the classes' defaults
    "mistral_7b": {
        "architectures": ["MistralForCausalLM"],
        "intermediate_size": 14336,
        "max_position_embeddings": 32768,
        "model_type": "mistral",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0,
        "sliding_window": None,
        "torch_dtype": "bfloat16",
        "vocab_size": 32064,
    },
    "vicuna_7b": {
        "architectures": ["LlamaForCausalLM"],
        "max_position_embeddings": 4096,
        "model_type": "llama",
        "pad_token_id": 0,
        "rms_norm_eps": 1e-05,
        "torch_dtype": "float16",
        "vocab_size": 32064,
    },
    "llama3_8b": {
        "architectures": ["LlamaForCausalLM"],
        "bos_token_id": 128000,
        "eos_token_id": 128009,
        "intermediate_size": 14336,
        "max_position_embeddings": 8192,
        "model_type": "llama",
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-05,
        "rope_theta": 500000.0,
        "torch_dtype": "bfloat16",
        "vocab_size": 128320,
    },
}


def vision(size, **extra):
    return {
        "depth": 32,
        "hidden_act": "silu",
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": SIZES[size]["hidden_size"],
        "patch_size": 14,
        "spatial_merge_size": 2,
        "spatial_patch_size": 14,
        "window_size": 112,
        "fullatt_block_indexes": [7, 15, 23, 31],
        "temporal_patch_size": 2,
        **extra,
    }


def vl(size):
    rope = {"type": "mrope", "mrope_section": [16, 24, 24]}
    text = {**SIZES[size], **COMMON, "rope_scaling": rope, "tie_word_embeddings": size == "3b"}
    return {
        **text,
        "model_type": "qwen2_5_vl",
        "vision_config": vision(size, in_chans=3, tokens_per_second=2),
    }


def omni(size):
    audio = {
        "activation_function": "gelu",
        "d_model": 1280,
        "encoder_attention_heads": 20,
        "encoder_ffn_dim": 5120,
        "encoder_layers": 32,
        "max_source_positions": 1500,
        "model_type": "qwen2_5_omni_audio_encoder",
        "n_window": 100,
        "num_hidden_layers": 32,
        "num_mel_bins": 128,
        "output_dim": SIZES[size]["hidden_size"],
        "scale_embedding": False,
    }
    return {
        "model_type": "qwen2_5_omni_thinker",
        "tie_word_embeddings": False,
        "audio_config": audio,
        "text_config": {
            **SIZES[size],
            **COMMON,
            "rope_scaling": ROPE,
            "model_type": "qwen2_5_omni_text",
        },
        "vision_config": vision(
            size, in_channels=3, model_type="qwen2_5_omni_vision_encoder", tokens_per_second=25
        ),
        "vision_start_token_id": 1,
        "vision_end_token_id": 2,
        "audio_start_token_id": 3,
        "audio_end_token_id": 4,
    }


def llava(text):
    return {
        "ignore_index": -100,
        "image_token_index": 32000,
        "model_type": "llava_next",
        "projector_hidden_act": "gelu",
        "image_grid_pinpoints": [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]],
        "text_config": LLAVA_TEXT[text],
        "tie_word_embeddings": False,
        "use_image_newline_parameter": True,
        "vision_config": {
            "hidden_size": 1024,
            "image_size": 336,
            "intermediate_size": 4096,
            "model_type": "clip_vision_model",
            "num_attention_heads": 16,
            "num_hidden_layers": 24,
            "patch_size": 14,
            "projection_dim": 768,
            "vocab_size": 32000,
        },
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
    }


CHECKPOINTS = {
    **{f"vl_{size}": vl(size) for size in SIZES},
    **{f"omni_{size}": omni(size) for size in SIZES},
    **{f"llava_{text}": llava(text) for text in LLAVA_TEXT},
}
PARAMETERS = {  # as published: of Qwen's decoders without their heads, and of VL's whole towers
    "vl_3b": {"decoder": 3_085_938_688, "visual": 668_684_288},
    "vl_7b": {"decoder": 7_070_619_136, "visual": 676_550_144},
    "omni_3b": {"decoder": 3_085_938_688},
    "omni_7b": {"decoder": 7_070_619_136},
}


def ours(name, config):
    """The backbone, the decoder's sizes, {part: parameters}, and the prefixes of unused layers."""
    backbone, model_config = find_backbone(config, name)
    decoder = DecoderConfig.from_hf(model_config, name)
    trees, unused = {"decoder": abstract_params(decoder, jnp.bfloat16)}, []
    for tower, (_, read) in backbone.towers.items():
        sizes = read(model_config, name, decoder)
        module = tower_module(backbone, tower, sizes, jnp.bfloat16)
        trees[tower] = abstract_params(module, jnp.bfloat16)
        unused += [f"{tower}.layers.{i}." for i in getattr(sizes, "unused_layers", ())]
    return backbone, decoder, trees, tuple(unused)


def our_parameters(trees):
    """{name in a checkpoint: (shape, dtype)}."""
    found = {}
    for part, tree in trees.items():
        for _, key, leaf, layer in per_layer(tree):
            shape = leaf.shape if layer is None else leaf.shape[1:]
            found[f"{part}.{key}"] = shape, str(leaf.dtype)
    return found


def their_parameters(model, name, backbone, unused):
    """The same of a model of transformers. Both spellings of its keys have one name of ours."""
    found = {}
    for key, parameter in model.named_parameters():
        ours = backbone.name_of(reference.hub_key(key, name))
        assert backbone.name_of(key) == ours
        if ours in (None, "lm_head.weight") or ours.startswith(unused or "-"):
            continue
        found[ours] = tuple(parameter.shape), str(parameter.dtype).removeprefix("torch.")
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_names_shapes_and_dtypes(name):
    """Of the decoder and of every tower."""
    config = CHECKPOINTS[name]
    theirs = transformers.CONFIG_MAPPING[config["model_type"]].from_dict(copy.deepcopy(config))
    with torch.device("meta"):
        model = reference.model_class(name)._from_config(theirs, dtype=torch.bfloat16)
    backbone, decoder, trees, unused = ours(name, config)
    got = our_parameters(trees)
    assert got == their_parameters(model, name, backbone, unused)
    for part, published in PARAMETERS.get(name, {}).items():
        shapes = [shape for key, (shape, _) in got.items() if key.startswith(f"{part}.")]
        assert sum(map(math.prod, shapes)) == published
    assert decoder.tie_word_embeddings == (name == "vl_3b")
    text = theirs.get_text_config()
    assert decoder.rope_theta == text.rope_parameters["rope_theta"]
    assert decoder.rms_norm_eps == text.rms_norm_eps
    assert decoder.head_dim == model.model.language_model.layers[0].self_attn.head_dim
    assert decoder.max_position_embeddings == text.max_position_embeddings


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_every_large_matrix_is_split_over_fsdp_and_tensor(mesh):
    mesh = make_mesh(*mesh)
    parts = mesh.shape["fsdp"] * mesh.shape["tensor"]
    config = DecoderConfig.from_hf({**SIZES["7b"], **COMMON, "rope_scaling": ROPE}, "config.json")
    params = abstract_params(config, jnp.bfloat16)
    leaves = flatten_dict(params, sep=".")
    for path, sharding in flatten_dict(shardings(params, mesh), sep=".").items():
        leaf = leaves[path]
        if leaf.size > 10**6:
            assert leaf.size == parts * math.prod(sharding.shard_shape(leaf.shape)), path


@pytest.mark.parametrize("fsdp", [2, 8])
@pytest.mark.parametrize("name", ["omni_7b", "llava_mistral_7b"])
def test_every_large_matrix_of_a_towers_layers_is_split_over_fsdp(name, fsdp):
    trees = ours(name, CHECKPOINTS[name])[2]
    del trees["decoder"]
    found = shardings(trees, make_mesh(-1, fsdp, 1))
    leaves = flatten_dict(trees, sep=".")
    for path, sharding in flatten_dict(found, sep=".").items():
        leaf = leaves[path]
        if leaf.size > 10**6 and path.split(".")[1] in ("blocks", "layers"):
            assert leaf.size == fsdp * math.prod(sharding.shard_shape(leaf.shape)), path
