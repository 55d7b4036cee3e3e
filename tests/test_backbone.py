"""The laboratory's untrained checkpoint.

It opens here and in transformers, and its loss begins where it should.
"""

import json
import math

import jax
import numpy as np
import pytest
import torch
import transformers
from reference import model_class

from laboratory import backbone
from laboratory.worlds import Sizes, texts, world
from lco_jax import OmniEmbedder, make_mesh
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.files import read_json
from lco_jax.data.prompts import as_messages
from lco_jax.data.records import as_input, parse_record


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A small world, and a checkpoint for it."""
    made = tmp_path_factory.mktemp("laboratory")
    world.write(made / "world", 0, Sizes(6, 6, 6, 6, 400, 1, 1, 1, 1, 1, 1))
    backbone.write(made / "model", texts(made / "world"), 0)
    return made


def media(folders):
    """One side of each kind of media, as a training record has it."""
    found = []
    for kind in ("image", "video", "audio", "page"):
        file = folders / "world" / "generative" / f"{kind}.jsonl"
        line = file.read_text(encoding="utf-8").splitlines()[0]
        found.append(as_input(parse_record(json.loads(line), file.name, str(file.parent)).anchor))
    return found


def test_it_embeds_what_a_world_holds(folders):
    mesh = make_mesh(devices=jax.devices()[:1])
    model = OmniEmbedder.from_pretrained(folders / "model", mesh=mesh, media=backbone.MEDIA)
    inputs = [*media(folders), {"text": "two small red bells"}]
    vectors = model.encode(inputs)
    assert vectors.shape == (5, backbone.Geometry().hidden)
    np.testing.assert_allclose((vectors**2).sum(1), 1, atol=1e-5)
    assert (vectors @ vectors.T - np.eye(5)).max() < 0.999
    processed = model.processor([as_messages(one, "input") for one in inputs])
    counts = [sum(len(placed.at) for placed in one.media) for one in processed]
    frames = np.ceil(processed[2].media[0].medium.rows["frames"].sum() / 2) // 2
    assert counts[:3] == [16, 32, frames]  # 56 x 56 pixels, twice that, 25 a second
    assert counts[3] in (32, 48)
    assert counts[4] == 0


@pytest.mark.parametrize("hidden", [192, 96])
def test_transformers_loads_all_of_it_and_the_loss_begins_at_log_of_the_vocabulary(
    folders, tmp_path, hidden
):
    folder = folders / "model"
    if hidden != 192:
        folder = tmp_path / "model"
        backbone.write(
            folder,
            texts(folders / "world"),
            1,
            backbone.Geometry(hidden=hidden, heads=3, kv_heads=1),
        )
    model, report = model_class("omni").from_pretrained(folder, output_loading_info=True)
    assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.lm_head.weight.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert open_checkpoint(folder).config.tie_word_embeddings
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(
        [tokenizer("two small red bells, a high bell and a page that says more").input_ids]
    )
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, :-1]
    loss = torch.nn.functional.cross_entropy(logits, ids[0, 1:])
    assert logits.std() < 1
    assert abs(float(loss) - math.log(model.config.text_config.vocab_size)) < 0.6
    ends = read_json(folder / "generation_config.json")["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(ends) == tokenizer.eos_token == "<|im_end|>"


def test_a_seed_makes_the_same_bytes(folders, tmp_path):
    written = []
    for name, seed in (("again", 0), ("other", 1)):
        backbone.write(tmp_path / name, texts(folders / "world"), seed)
        written.append((tmp_path / name / "model.safetensors").read_bytes())
    for file in (folders / "model").iterdir():
        assert file.read_bytes() == (tmp_path / "again" / file.name).read_bytes(), file.name
    assert written[0] != written[1]
