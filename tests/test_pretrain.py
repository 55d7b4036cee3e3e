"""Generative training: transformers' loss and gradient, any mesh and chunks, resumed runs."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest
import reference
import torch
from PIL import Image
from reference_media import answer_losses, audio, image, video
from scipy.special import logsumexp
from sentence_transformers import SentenceTransformer

from configs import pretrain as settings
from lco_jax import LcoError, OmniEmbedder, make_mesh
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.checkpoint.shapes import per_layer
from lco_jax.core import lora
from lco_jax.core.files import read_json
from lco_jax.core.packing import Batch
from lco_jax.core.sharding import shardings
from lco_jax.data import pipeline
from lco_jax.data.inputs import conversation
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import asked
from lco_jax.data.records import Record
from lco_jax.data.sources import JsonlSource
from lco_jax.evaluation.retrieval import retrieval
from lco_jax.models import head
from lco_jax.pretrain import pretrain
from lco_jax.train import train
from lco_jax.training import tuning
from lco_jax.training.metrics import read_metrics
from lco_jax.training.objective import LossConfig
from lco_jax.training.step import contrastive_loss, generative_loss

LORA = lora.LoraConfig(rank=4, alpha=8)
WHOLE = tuning.TuneConfig("full", "all")
RECORDS = {
    "omni": [
        Record(
            (image(1, 60, 84), {"type": "text", "text": "And what is this?"}),
            "A red square.",
            (),
            "mem:0",
        ),
        Record((audio(1, 1.3),), "Several words, and one more: 猫", (), "mem:1"),
        Record("Only text", "x", (), "mem:2"),
    ],
    "vl_tied": [
        Record((video(1, 4, 56, 84, 2.0),), "It slides.", (), "mem:0"),
        Record("Only text", "x y", (), "mem:1"),
    ],
    "llava_qwen2": [
        Record((image(3, 70, 56),), "A cat", (), "mem:0"),
        Record("Only text", "x y", (), "mem:1"),
    ],
}


def ours(path, records, tune=WHOLE, mesh=(1, 1, 1), chunk_tokens=0):
    """(loss, gradient by part) of a batch."""
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    checkpoint = open_checkpoint(path)
    model, params = load_model(checkpoint, mesh, remat="full", head=True)
    decoder = model.decoder.clone(tuned=tune.decoder == "full")
    processor = Processor(checkpoint.folder, video_positions="5")
    layout = pipeline.Layout(
        len(records), 0, processor.tokenizer.prefix, chunk_tokens, generative=True
    )
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

        def loss(tuned):
            return generative_loss(tuned, rest, batch, None, model, LORA, 0)

        (value, metrics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(tuned)
    record = np.asarray(batch.answers.record)
    counts = np.bincount(record[record >= 0], minlength=len(records))
    assert np.average(metrics["record_losses"], weights=counts) == pytest.approx(
        float(value), rel=1e-5
    )
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
            answer_losses(model, case.path, turn, one.positive)[0]
            for turn, one in zip(turns, records, strict=True)
        ]
        loss = torch.cat(losses).mean()
        loss.backward()
    found = {reference.hub_key(name, case.family): p.grad for name, p in parameters.items()}
    for parameter in parameters.values():
        parameter.requires_grad_(False).grad = None
    return loss.item(), {key: None if grad is None else grad.numpy() for key, grad in found.items()}


@pytest.mark.parametrize(
    "family",
    ["vl_tied", *(pytest.param(x, marks=pytest.mark.slow) for x in ("omni", "llava_qwen2"))],
)
def test_loss_and_every_gradient_equal_transformers(cases, family):
    case = cases[family]
    want_loss, want = theirs(case, RECORDS[family])
    loss, gradient, checkpoint = ours(case.path, RECORDS[family])
    assert abs(loss - want_loss) < 1e-5 * want_loss
    compared, noise = (
        0,
        1e-7 * max(np.linalg.norm(grad) for grad in want.values() if grad is not None),
    )
    for part, tree in gradient.items():
        for path, name, leaf, layer in per_layer(tree):
            key = checkpoint.keys[part][name]
            got, grad = leaf if layer is None else leaf[layer], want.pop(key)
            if grad is None:
                assert not got.any(), path
                continue
            assert np.linalg.norm(got - grad) <= 1e-4 * np.linalg.norm(grad) + noise, (
                part,
                path,
                layer,
            )
            compared += bool(grad.any())
    assert compared > 60
    assert not [
        key
        for key, grad in want.items()
        if grad is not None and "lm_head" not in key and grad.any()
    ]


@pytest.mark.slow
@pytest.mark.parametrize("tune", [WHOLE, tuning.TuneConfig("lora", "projectors")])
def test_any_mesh_chunk_and_part_of_the_vocabulary_gives_the_same(cases, tune, monkeypatch):
    records = [
        *RECORDS["omni"],
        *(Record(text, text[::-1], (), "mem") for text in reference.TEXTS[:5]),
    ]
    loss, gradient, _ = ours(cases["omni"].path, records, tune)
    monkeypatch.setattr(head, "LOGITS", 4000)  # a few tokens at a time
    split_loss, split, _ = ours(cases["omni"].path, records, tune, (2, 2, 2), chunk_tokens=60)
    assert abs(loss - split_loss) < 1e-5 * loss
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(a).max() + 1e-9),
        gradient,
        split,
    )


def short(path="builtin:tiny", **keys):
    config = settings.get_config()
    flat = {
        "model.path": str(path),
        "train.steps": 6,
        "train.batch_size": 16,
        "optimizer.warmup_steps": 1,
        "checkpoint.every": 2,
        **keys,
    }
    config.update_from_flattened_dict(flat)
    return config


@pytest.mark.slow
def test_a_run_learns_resumes_and_is_where_training_starts(tmp_path, monkeypatch):
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    whole = pretrain(short(), tmp_path / "a")
    assert whole["after"]["loss"] < whole["before"]["loss"]
    assert len(whole["said"]) == 4
    calls = iter([False, False, True])
    with monkeypatch.context() as patched:
        patched.setattr("lco_jax.training.watch.Preemption.now", lambda *_: next(calls, False))
        assert pretrain(short(), tmp_path / "b") == {}
    assert read_json(tmp_path / "b" / "config.json")["objective"] == "generative"
    pretrain(short(), tmp_path / "b")
    losses = [
        [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")] for name in "ab"
    ]
    assert losses[0] == losses[1]
    merged = tmp_path / "a" / "merged"
    held_out = list(JsonlSource("assets:triplets_heldout.jsonl"))
    texts = [record.anchor for record in held_out[:5]]
    base = OmniEmbedder.from_pretrained(merged).encode(texts)
    for tune in ("full", "projection"):  # what is exported is what was trained
        results = train(short(merged, **{"tune.decoder": tune, "train.steps": 3}), tmp_path / tune)
        tuned = OmniEmbedder.from_pretrained(tmp_path / tune / "merged")
        assert np.abs(tuned.encode(texts) - base).max() > 1e-3
        found = retrieval(
            lambda sides, model=tuned: model.encode([{"text": side} for side in sides]), held_out
        )
        assert abs(found.mrr - results["after"]["triplets_heldout"]["mrr"]) < 1e-6
        assert not (tmp_path / tune / "adapter").exists()
    theirs = SentenceTransformer(str(tmp_path / "projection" / "merged"), device="cpu").encode(
        texts
    )
    assert np.abs(theirs - tuned.encode(texts)).max() < 1e-5
    export_merged(
        tmp_path / "projection" / "merged", tmp_path / "again", dtype="float32"
    )  # and goes along
    _, params = load_model(
        open_checkpoint(tmp_path / "again"), make_mesh(devices=jax.devices()[:1]), towers=()
    )
    assert np.array_equal(params["projection"]["weight"], tuned.params["projection"]["weight"])


@pytest.mark.parametrize(
    ("towers", "trained"),
    [
        ("projectors", {"visual.merger.ln_q", "audio_tower.proj.weight"}),
        ("visual", {"visual.merger.ln_q", "visual.blocks.norm1"}),
        (
            "projectors,visual",
            {"visual.merger.ln_q", "visual.blocks.norm1", "audio_tower.proj.weight"},
        ),
    ],
)
def test_towers_are_trained_by_name(towers, trained):
    paths = {
        "visual.merger.ln_q",
        "visual.blocks.norm1",
        "audio_tower.proj.weight",
        "audio_tower.layers.fc1",
        "decoder.norm.weight",
    }
    tune = tuning.TuneConfig("none", towers)
    assert {path for path in paths if tune.in_full(path)} == trained


def test_what_cannot_be_tuned_says_so(tmp_path):
    for keys, says in (
        ({"tune.decoder": "half"}, "lora, full, projection or none"),
        ({"tune.towers": "some"}, "none, projectors, all, visual, "),
        ({"tune.towers": "projectors,some"}, "several of them between commas"),
        ({"tune.decoder": "none"}, "trains nothing"),
        ({"tune.decoder": "full", "model.quantize": "nf4"}, "quantised"),
    ):
        with pytest.raises(LcoError, match=says):
            pretrain(short(**keys), tmp_path)
    with pytest.raises(LcoError, match="pretrain"):
        train(short(**{"tune.towers": "all"}), tmp_path)
    with pytest.raises(LcoError, match="trains nothing"):
        train(short(**{"tune.decoder": "none"}), tmp_path)
    (tmp_path / "data.jsonl").write_text('{"anchor": "a", "positive": {"image_path": "a.png"}}')
    Image.new("RGB", (30, 30)).save(tmp_path / "a.png")
    config = short(**{"train.batch_size": 1})
    config.data.sources = {"mine": {"kind": "jsonl", "path": str(tmp_path / "data.jsonl")}}
    with pytest.raises(LcoError, match=r"data.jsonl:1: the positive is the answer"):
        pretrain(config, tmp_path / "run")


def test_a_record_without_an_answer_can_be_left_out(cases):
    records = [*RECORDS["omni"][2:], Record("a", (image(1, 60, 84),), (), "mine:2")]
    processor = Processor(cases["omni"].path)
    layout = pipeline.Layout(2, 0, processor.tokenizer.prefix, on_bad="skip", generative=True)
    local = pipeline._prepare(records, layout, processor, None, 1, 0)
    assert local.record.tolist() == [0]
    assert local.skipped == ("mine:2: the positive is the answer, and must be a text",)


def test_two_ways_are_the_mean_of_each(tmp_path):
    """CLIP's loss, beside the two losses by hand."""
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((5, 3, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    logits = vectors[:, 0] @ vectors[:, 1:].transpose(1, 0, 2).reshape(10, 8).T / 0.1
    back = vectors[:, 1] @ vectors[:, 0].T / 0.1
    want = [logsumexp(x, axis=1).mean() - np.diagonal(x).mean() for x in (logits, back)]
    tokens = SimpleNamespace(with_seed=lambda seed: None)
    batch = Batch(tokens, np.arange(15).reshape(5, 3), np.arange(15).reshape(5, 3), {})
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "lco_jax.training.step.embed_chunks", lambda *_: vectors.reshape(1, 1, 15, 8)
        )
        options = {"decoder": None, "config": LORA, "seed": 0}
        for two_way, value in ((False, want[0]), (True, np.mean(want))):
            loss, _ = contrastive_loss(
                {}, {}, batch, None, objective=LossConfig(0.1, two_way), **options
            )
            assert abs(float(loss) - value) < 1e-5
