"""Training on images, audio and video: gradients of torch + peft, resumed runs, bad media."""

import json
import shutil

import jax
import numpy as np
import peft
import pytest
import reference_media as media
import soundfile
import torch
from PIL import Image

from configs import tiny
from lco_jax import LcoError, make_mesh
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.checkpoint.peft import layer_tensors
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.data import pipeline
from lco_jax.data.inputs import conversation
from lco_jax.data.processor import Processor
from lco_jax.data.record_stream import record_stream
from lco_jax.data.records import Record
from lco_jax.data.scan import ListSource
from lco_jax.data.sources import JsonlSource
from lco_jax.models.model import MediaPrograms
from lco_jax.train import train
from lco_jax.training.losses import info_nce
from lco_jax.training.metrics import read_metrics
from lco_jax.training.objective import LossConfig
from lco_jax.training.step import contrastive_loss

TEMPERATURE = 0.05
CONFIG = lora.LoraConfig(rank=4, alpha=8)
TEXTS = [
    "a red square above a blue one",
    "a rising tone over a slow beat",
    "something slides and fades away",
]
WRONG = ["an empty room", "silence, then a bell", "a face that does not move"]


def sides(kind):
    """Three anchors of a kind, of uneven lengths."""
    if kind == "image":
        return [media.image(1, 84, 112), media.image(2, 101, 61), media.image(3, 56, 140)]
    if kind == "audio":
        return [media.audio(1, 0.9), media.audio(2, 2.3), media.audio(3, 1.4)]
    return [
        media.video(1, 4, 56, 84, 2.0),
        media.video(2, 7, 70, 64, 2.0),
        media.video(3, 2, 84, 56, 2.0),
    ]


def records_of(kind):
    rows = zip(sides(kind), TEXTS, WRONG, strict=True)
    return [
        Record((part,), text, (wrong,), f"mem:{i}") for i, (part, text, wrong) in enumerate(rows)
    ]


def random_adapters(path):
    """Adapters of a checkpoint's decoder. Both factors are drawn, so that both have a gradient."""
    params = abstract_params(open_checkpoint(path).config)
    shapes = jax.eval_shape(lambda key: lora.init(key, params, CONFIG), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: (rng.normal(0, 0.5, x.shape) * x.shape[-1] ** -0.5).astype(np.float32), shapes
    )


def our_gradient(path, records, adapters, mesh, chunk_tokens=400):
    checkpoint = open_checkpoint(path)
    model, params = load_model(checkpoint, mesh, remat="full")
    processor = Processor(checkpoint.folder)
    layout = pipeline.Layout(len(records), 1, processor.tokenizer.prefix, chunk_tokens)
    local = pipeline._prepare(records, layout, processor, None, 1, 0)
    with jax.set_mesh(mesh):
        batch = pipeline.global_batch(local, layout, processor.rows, mesh)
        tokens = MediaPrograms(model, mesh)(params, batch.media)
        loss = jax.value_and_grad(contrastive_loss, has_aux=True)
        run = jax.jit(
            lambda a: loss(
                a, params, batch, tokens, model.decoder, CONFIG, LossConfig(TEMPERATURE), 0
            )
        )
        (value, _), gradient = run({"decoder": adapters})
    return float(value), jax.device_get(gradient["decoder"])


def torch_gradient(case, records, adapters):
    """The reference's loss and gradient, {(layer, module): (of a, of b)}."""
    targets = [
        n
        for n, m in case.model.named_modules()
        if isinstance(m, torch.nn.Linear) and "language_model.l" in n
    ]
    settings = peft.LoraConfig(
        r=CONFIG.rank, lora_alpha=CONFIG.alpha, lora_dropout=0.0, target_modules=targets
    )
    tuned = peft.get_peft_model(case.model, settings)
    found = {}
    for layer, module, a, b in layer_tensors(adapters):
        name = next(n for n in targets if n.endswith(f"language_model.layers.{layer}.{module}"))
        pair = [
            tuned.get_parameter(f"base_model.model.{name}.lora_{x}.default.weight") for x in "AB"
        ]
        for parameter, value in zip(pair, (a, b), strict=True):
            parameter.data.copy_(torch.tensor(value))
        found[layer, module] = pair
    tokenizer, processor = Processor(case.path).tokenizer, media._processor(str(case.path))

    def embed(column):
        turns = [conversation(record.sides[column], "", tokenizer) for record in records]
        inputs = media._inputs(processor, turns, False, None)
        if case.model.config.model_type == "qwen2_5_vl":
            inputs["position_ids"] = media._positions_of_4_57(inputs, case.model.config)
        out = tuned(**inputs, output_hidden_states=True, use_cache=False)
        return torch.nn.functional.normalize(out.hidden_states[-1][:, -1], dim=-1)

    with torch.enable_grad():
        candidates = torch.cat([embed(1), embed(2)])
        logits = embed(0) @ candidates.T / TEMPERATURE
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(records)))
        loss.backward()
    gradients = {key: [p.grad.numpy().copy() for p in pair] for key, pair in found.items()}
    tuned.unload()
    return loss.item(), gradients


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("vl", "image"),
        ("vl", "video"),
        ("omni", "image"),
        ("omni", "audio"),
        ("omni", "video"),
        ("llava_qwen2", "image"),
    ],
)
def test_gradient_through_frozen_towers_equals_torch_and_peft(cases, family, kind):
    case, records = cases[family], records_of(kind)
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    adapters = random_adapters(case.path)
    loss, gradient = our_gradient(case.path, records, adapters, mesh)
    want_loss, want = torch_gradient(case, records, adapters)
    assert abs(loss - want_loss) < 1e-4
    got = {(layer, module): (a, b) for layer, module, a, b in layer_tensors(gradient)}
    assert got.keys() == want.keys()
    for key, pair in want.items():
        for mine, theirs in zip(got[key], pair, strict=True):
            assert np.abs(theirs).max() > 1e-5
            assert np.abs(mine - theirs).max() < 1e-4 * max(np.abs(theirs).max(), 1.0), key


# ---- whole runs


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """any2any records of eight scenes: images, sounds and clips, alone and together."""
    folder = tmp_path_factory.mktemp("mixed")
    lines = []
    for i in range(8):
        Image.fromarray(media.picture(i, 60 + 7 * i, 90)).save(folder / f"{i}.png")
        soundfile.write(folder / f"{i}.wav", media.chirp(i, 0.6 + 0.1 * i), media.RATE)
        frames = []
        for j, frame in enumerate(media.clip(i, 4, 56, 84)):
            Image.fromarray(frame).save(folder / f"{i}-{j}.png")
            frames.append(f"{i}-{j}.png")
        name = f"scene {'abcdefgh'[i]} {i * 37}"
        other = {"text": f"scene {'bcdefgha'[i]}", "image_path": ""}
        lines += [
            {"anchor": {"image_path": f"{i}.png"}, "positive": {"text": name}, "negative": other},
            {"anchor": {"text": name}, "positive": {"audio_path": f"{i}.wav"}},
            {
                "anchor": {"video_path": frames},
                "positive": {"image_path": f"{i}.png", "text": name},
                "negative": [other],
            },
            {
                "anchor": {"text": name},
                "positive": f"this is {name}",
                "negative": {"audio_path": f"{(i + 1) % 8}.wav"},
            },
        ]
    path = folder / "any2any.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def config_of(case, path, **changes):
    config = tiny.get_config()
    config.model.path = str(case.path)
    config.data.sources = {"mixed": {"kind": "jsonl", "path": str(path)}}
    config.data.media.video_max_pixels = 28 * 28 * 12
    config.train.batch_size, config.train.steps, config.train.chunk_tokens = 8, 12, 600
    config.train.temperature = 0.1
    config.lora.dropout, config.optimizer.warmup_steps = 0.05, 2
    config.checkpoint.every, config.export.merged = 5, False
    config.eval.path = ""
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def two_devices(monkeypatch):
    """Runs on two of the eight, which compile faster; losses are the same on any mesh (below)."""
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:2]))


def losses(workdir):
    return [line["loss"] for line in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.slow
def test_a_run_on_every_modality_resumes_and_its_loss_falls(
    cases, mixed, tmp_path, monkeypatch, two_devices
):
    config = config_of(cases["omni"], mixed)
    train(config, tmp_path / "whole")
    want = losses(tmp_path / "whole")
    assert len(want) == 12
    assert np.mean(want[-3:]) < np.mean(want[:3]) - 0.2
    calls = iter([False] * 6 + [True])
    monkeypatch.setattr("lco_jax.training.watch.Preemption.now", lambda *_: next(calls, False))
    assert train(config, tmp_path / "halves") == {}
    assert len(losses(tmp_path / "halves")) == 7
    train(config, tmp_path / "halves")
    assert losses(tmp_path / "halves") == want  # to the last bit
    counts = [line["programs"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl")]
    assert counts == sorted(counts)  # how few they are in a long run, test_tower_rows tells


@pytest.mark.slow
@pytest.mark.parametrize("layout", [((2, 2, 2), 100)])
def test_any_mesh_and_chunk_equals_one_device(cases, mixed, layout):
    """Loss and gradient of a batch with every modality: no medium is mistaken for another."""
    (shape, chunk_tokens), records = layout, list(JsonlSource(mixed))[:12]
    adapters = random_adapters(cases["omni"].path)
    want_loss, want = our_gradient(
        cases["omni"].path, records, adapters, make_mesh(devices=jax.devices()[:1])
    )
    loss, got = our_gradient(cases["omni"].path, records, adapters, make_mesh(*shape), chunk_tokens)
    assert abs(loss - want_loss) < 1e-5
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-4 * np.abs(y).max()), got, want
    )


@pytest.mark.slow
def test_bad_media_stops_a_run_by_name_or_is_left_out(cases, mixed, tmp_path, caplog, two_devices):
    folder = shutil.copytree(mixed.parent, tmp_path / "data")
    (folder / "3.wav").write_bytes((folder / "3.wav").read_bytes()[:30])
    (folder / "5.png").write_bytes(b"no picture")
    path = folder / mixed.name
    with pytest.raises(LcoError, match=r"any2any\.jsonl:\d+.*(3\.wav|5\.png)"):
        train(config_of(cases["omni"], path, **{"train.steps": 4}), tmp_path / "stops")
    train(
        config_of(cases["omni"], path, **{"train.steps": 4, "data.on_bad": "skip"}),
        tmp_path / "skips",
    )
    assert all(np.isfinite(losses(tmp_path / "skips")))
    reasons = [r.getMessage() for r in caplog.records if "skipped" in r.getMessage()]
    named = {
        n
        for n, line in enumerate(path.read_text().splitlines(), 1)
        if "3.wav" in line or "5.png" in line
    }
    told = {int(reason.split("any2any.jsonl:")[1].split(":")[0]) for reason in reasons}
    assert told == named  # four batches of eight: one pass over all


def test_media_that_the_checkpoint_does_not_take_is_refused_before_anything_is_loaded(
    cases, mixed, tmp_path
):
    with pytest.raises(
        LcoError, match="mixed holds audio, and this checkpoint takes text, image, video"
    ):
        train(config_of(cases["vl"], mixed), tmp_path / "run")


def test_homogeneous_batches_and_what_says_the_same(cases, mixed):
    """Batches of one source; equal contents share a number in every process, others do not."""
    shades = np.tile(np.arange(40, dtype=np.uint8)[:, None, None, None], (1, 28, 28, 3))
    text = ListSource([Record(f"a{i}", "same words", (), f"text:{i}") for i in range(40)])
    parts = [{"type": "image", "image": shade} for shade in shades]
    pictures = ListSource(
        [Record((p,), "same words", (), f"pictures:{i}") for i, p in enumerate(parts)]
    )
    sources = {"text": text, "pictures": pictures}
    stream = record_stream(sources, {"text": 1.0, "pictures": 1.0}, 0, run=8)
    kinds = [{stream[i].where.split(":")[0] for i in range(8 * k, 8 * k + 8)} for k in range(12)]
    assert all(len(kind) == 1 for kind in kinds)
    assert {next(iter(kind)) for kind in kinds} == {"text", "pictures"}
    epoch = [stream[i].where for i in range(8 * 12) if stream[i].where.startswith("text")][:40]
    assert sorted(epoch) == sorted(record.where for record in text)  # none twice in an epoch
    processor = Processor(cases["vl"].path)
    layout = pipeline.Layout(8, 256, 0)
    local = pipeline._prepare([*text[:4], *pictures[:4]], layout, processor, None, 1, 0)
    table = np.full((8, 2), 0)
    table[local.record, local.side] = local.content
    assert len(set(table[:, 1])) == 1
    assert len(set(table[:, 0])) == 8


def test_the_loss_ignores_what_says_the_same():
    """Two anchors with one caption: with `content` neither sees the other's positive as wrong."""
    rng = np.random.default_rng(0)
    embeddings = rng.normal(size=(4, 3, 16)).astype(np.float32)
    embeddings /= np.linalg.norm(embeddings, axis=-1, keepdims=True)
    embeddings[1, 1] = embeddings[0, 1]
    content = np.arange(12).reshape(4, 3)
    content[1, 1] = content[0, 1]
    present = np.ones((4, 3), bool)
    present[3] = False  # a record that was left out
    loss, _ = info_nce(embeddings, present, 0.1, content)
    candidates = np.concatenate([embeddings[:3, 1], embeddings[:3, 2]])
    logits = embeddings[:3, 0] @ candidates.T / 0.1
    logits[0, 1] = logits[1, 0] = -np.inf
    want = np.mean([np.log(np.exp(logits[i]).sum()) - logits[i, i] for i in range(3)])
    assert abs(float(loss) - want) < 1e-5
