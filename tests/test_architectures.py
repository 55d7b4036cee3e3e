"""The full-size architectures, held by shapes alone: ours under `eval_shape`, transformers' on the meta device."""

import jax.numpy as jnp
import pytest
import reference  # noqa: F401, makes torchvision importable
import torch
import transformers
from flax.traverse_util import flatten_dict

from lco_jax.checkpoint.hf import _per_layer, abstract_params
from lco_jax.core.sharding import make_mesh, shardings
from lco_jax.models.config import DecoderConfig

SIZES = {  # as in the hub's config.json files
    "3b": {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 36, "num_attention_heads": 16,
           "num_key_value_heads": 2, "vocab_size": 151936},
    "7b": {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28,
           "num_key_value_heads": 4, "vocab_size": 152064},
}  # fmt: skip
COMMON = {
    "max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "rope_theta": 1000000.0, "hidden_act": "silu",
    "use_sliding_window": False,
}  # fmt: skip
ROPE = {"mrope_section": [16, 24, 24], "rope_type": "default", "type": "default"}
PARAMETERS = {"3b": 3_085_938_688, "7b": 7_070_619_136}  # of the decoder without its head, as published


@pytest.mark.parametrize("size", ["3b", "7b"])
@pytest.mark.parametrize("family", ["Qwen2_5_VL", "Qwen2_5OmniThinker"])
def test_names_shapes_and_dtypes(family, size):
    text = {**SIZES[size], **COMMON, "rope_scaling": ROPE}
    if family == "Qwen2_5_VL":
        tied = size == "3b"
        config = {**text, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "tie_word_embeddings": tied}
        theirs = transformers.Qwen2_5_VLConfig.from_dict({**config, "model_type": "qwen2_5_vl"})
    else:
        tied = False
        config = {"tie_word_embeddings": False, "text_config": {**text, "model_type": "qwen2_5_omni_text"}}
        ids = {"vision_start_token_id": 1, "vision_end_token_id": 2, "audio_start_token_id": 3, "audio_end_token_id": 4}
        theirs = transformers.Qwen2_5OmniThinkerConfig.from_dict({**config, **ids})
    with torch.device("meta"):
        model = getattr(transformers, f"{family}ForConditionalGeneration")._from_config(theirs, dtype=torch.bfloat16)
    want = {
        name.removeprefix("model.language_model."): (tuple(p.shape), str(p.dtype).removeprefix("torch."))
        for name, p in model.named_parameters()
        if name.startswith("model.language_model.")
    }
    ours = DecoderConfig.from_hf(config, "config.json")
    params = abstract_params(ours, jnp.bfloat16)
    got = {name: (shape, str(flatten_dict(params, sep=".")[path].dtype)) for path, name, shape in _per_layer(params)}
    assert got == want
    assert ours.tie_word_embeddings == tied
    assert sum(int(leaf.size) for leaf in flatten_dict(params).values()) == PARAMETERS[size]


@pytest.mark.parametrize("mesh", [(1, 8, 1), (1, 2, 4), (2, 2, 2)])
def test_every_large_matrix_is_split_over_fsdp_and_tensor(mesh):
    mesh = make_mesh(*mesh)
    ways = mesh.shape["fsdp"] * mesh.shape["tensor"]
    config = DecoderConfig.from_hf({**SIZES["7b"], **COMMON, "rope_scaling": ROPE}, "config.json")
    params = abstract_params(config, jnp.bfloat16)
    for path, sharding in flatten_dict(shardings(params, mesh), sep=".").items():
        leaf = flatten_dict(params, sep=".")[path]
        shard = sharding.shard_shape(leaf.shape)
        if leaf.size > 10**6:
            assert leaf.size == ways * torch.Size(shard).numel(), path
