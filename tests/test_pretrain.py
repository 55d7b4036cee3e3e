"""Generative training: transformers' loss and gradient, the same on any mesh and chunking, runs that resume."""

import jax
import numpy as np
import pytest
import reference
import torch
from reference_media import answer_losses, audio, image, video

from configs import pretrain as settings
from lco_jax import OmniEmbedder, make_mesh
from lco_jax.checkpoint.hf import load_model, open_checkpoint, per_layer
from lco_jax.core import lora
from lco_jax.core.sharding import shardings
from lco_jax.data import pipeline
from lco_jax.data.inputs import conversation
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import asked
from lco_jax.data.records import Record
from lco_jax.models import head
from lco_jax.pretrain import pretrain
from lco_jax.train import train
from lco_jax.training import tuning
from lco_jax.training.metrics import read_metrics
from lco_jax.training.step import generative_loss

LORA = lora.LoraConfig(rank=4, alpha=8)
WHOLE = tuning.TuneConfig("full", "all")
RECORDS = {
    "omni": [
        Record((image(1, 60, 84), {"type": "text", "text": "And what is this?"}), "A red square.", (), "mem:0"),
        Record((audio(1, 1.3),), "Several words, and one more: 猫", (), "mem:1"),
        Record("Only text", "x", (), "mem:2"),
    ],
    "vl_tied": [
        Record((video(1, 4, 56, 84, 2.0),), "It slides.", (), "mem:0"),
        Record("Only text", "x y", (), "mem:1"),
    ],
    "llava_qwen2": [Record((image(3, 70, 56),), "A cat", (), "mem:0"), Record("Only text", "x y", (), "mem:1")],
}


def ours(path, records, tune=WHOLE, mesh=(1, 1, 1), chunk_tokens=0):
    """(loss, gradient by part) of a batch."""
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    checkpoint = open_checkpoint(path)
    model, params = load_model(checkpoint, mesh, remat="full", head=True)
    decoder = model.decoder.clone(tuned=tune.decoder == "full")
    processor = Processor(checkpoint.folder, video_positions="5")
    layout = pipeline.Layout(len(records), 0, processor.tokenizer.head, chunk_tokens, generative=True)
    local = pipeline._prepare(records, layout, processor, None, 1, 0)
    with jax.set_mesh(mesh):
        batch = pipeline.global_batch(local, layout, processor.rows, mesh)
        assert batch.tokens.input_ids.shape[0] > 1 or not chunk_tokens
        tuned = tuning.init(jax.random.key(0), params, tune, LORA)
        if tune.decoder == "lora":  # both factors drawn, so that both have a gradient
            tuned["decoder"] = jax.tree.map(
                lambda x: jax.random.normal(jax.random.key(x.size), x.shape) * 0.1, tuned["decoder"]
            )
        tuned = jax.device_put(tuned, shardings(tuned, mesh))
        rest = tuning.frozen(params, tune)
        model = type(model)(decoder, model.towers)
        loss = lambda tuned: generative_loss(tuned, rest, batch, None, model, LORA, 0)  # noqa: E731
        (value, _), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tuned)
    return float(value), jax.device_get(gradient), checkpoint


def theirs(case, records):
    """transformers' loss over all answer tokens, and {key in the files: gradient}."""
    model, tokenizer = case.model, Processor(case.path).tokenizer
    turns = [conversation(one.anchor, "", tokenizer, asked) for one in records]
    parameters = dict(model.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    with torch.enable_grad():
        losses = [
            answer_losses(model, case.path, turn, one.positive)[0] for turn, one in zip(turns, records, strict=True)
        ]
        loss = torch.cat(losses).mean()
        loss.backward()
    found = {reference.hub_key(name, case.family): p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False).grad = None
    return loss.item(), {key: None if grad is None else grad.numpy() for key, grad in found.items()}


@pytest.mark.parametrize(
    "family", ["omni", *(pytest.param(x, marks=pytest.mark.slow) for x in ("vl_tied", "llava_qwen2"))]
)
def test_loss_and_every_gradient_equal_transformers(cases, family):
    case = cases[family]
    want_loss, want = theirs(case, RECORDS[family])
    loss, gradient, checkpoint = ours(case.path, RECORDS[family])
    assert abs(loss - want_loss) < 1e-5 * want_loss
    compared, noise = 0, 1e-7 * max(np.linalg.norm(grad) for grad in want.values() if grad is not None)
    for part, tree in gradient.items():
        for path, name, leaf, layer in per_layer(tree):
            key = checkpoint.keys[part][name]
            got, grad = leaf if layer is None else leaf[layer], want.pop(key)
            if grad is None:
                assert not got.any(), path
                continue
            assert np.linalg.norm(got - grad) <= 1e-4 * np.linalg.norm(grad) + noise, (part, path, layer)
            compared += bool(grad.any())
    assert compared > 60
    assert not [key for key, grad in want.items() if grad is not None and "lm_head" not in key and grad.any()]


@pytest.mark.slow
@pytest.mark.parametrize("tune", [WHOLE, tuning.TuneConfig("lora", "projectors")])
def test_any_mesh_chunk_and_part_of_the_vocabulary_gives_the_same(cases, tune, monkeypatch):
    records = [*RECORDS["omni"], *(Record(text, text[::-1], (), "mem") for text in reference.TEXTS[:5])]
    loss, gradient, _ = ours(cases["omni"].path, records, tune)
    monkeypatch.setattr(head, "LOGITS", 4000)  # a few tokens at a time
    split_loss, split, _ = ours(cases["omni"].path, records, tune, (2, 2, 2), chunk_tokens=60)
    assert abs(loss - split_loss) < 1e-5 * loss
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max() + 1e-9), gradient, split)


def short(path="builtin:tiny", **keys):
    config = settings.get_config()
    flat = {"model.path": str(path), "train.steps": 6, "train.batch_size": 16, "optimizer.warmup_steps": 1,
            "checkpoint.every": 2, **keys}  # fmt: skip
    config.update_from_flattened_dict(flat)
    return config


def test_a_run_learns_resumes_and_is_where_training_starts(tmp_path, monkeypatch):
    whole = pretrain(short(), tmp_path / "a")
    assert whole["after"]["loss"] < whole["before"]["loss"]
    assert len(whole["said"]) == 4
    calls = iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr("lco_jax.job._on_sigterm", lambda: lambda: next(calls, False))
        assert pretrain(short(), tmp_path / "b") == {}
    pretrain(short(), tmp_path / "b")
    losses = [[line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab"]
    assert losses[0] == losses[1]
    merged = tmp_path / "a" / "merged"
    for tune in ("full", "projection"):
        config = short(merged, **{"tune.decoder": tune, "eval.path": "", "train.steps": 3})
        train(config, tmp_path / tune)
        base, tuned = (OmniEmbedder.from_pretrained(x) for x in (merged, tmp_path / tune / "merged"))
        assert np.abs(base.encode(["a"]) - tuned.encode(["a"])).max() > 1e-3
