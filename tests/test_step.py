"""The training step: the reference's loss and gradient, the same on any mesh and in any chunks."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import peft
import pytest
import reference
import torch
from safetensors.numpy import load_file

from lco_jax import make_mesh
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.prefixes import Prefixes
from lco_jax.data import pipeline
from lco_jax.data.instructions import Instruction
from lco_jax.data.layouts import floor_of
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer
from lco_jax.data.records import Record
from lco_jax.data.sources import JsonlSource
from lco_jax.training.losses import info_nce
from lco_jax.training.objective import LossConfig
from lco_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from lco_jax.training.state import init_state, state_shardings
from lco_jax.training.step import make_train_step, make_update

PROMPT = "\nSummarize the above text in one word:"
STEPS, BATCH, TEMPERATURE = 20, 6, 0.03


@pytest.fixture(scope="module")
def records():
    return list(JsonlSource("assets:triplets_heldout.jsonl"))[:18]


def begin(adapters, tx, mesh):
    """Step 0 on the mesh, and where its leaves lie."""
    tuned = {"decoder": adapters}
    places = state_shardings(tuned, tx, mesh)
    return jax.jit(lambda tuned: init_state(tuned, tx), out_shardings=places)(tuned), places


PAPER = LossConfig(TEMPERATURE)


def prefixes_of(records, processor):
    found = [one for record in records for one in (record.query, record.document)]
    return processor.tokenizer.prefixes(list(dict.fromkeys(found)))


def run(
    path, records, adapters=None, *, mesh=(1, 1, 1), chunk_tokens=0, steps=STEPS, batch=BATCH,
    dropout=0.0, negatives=1, objective=PAPER, pooling="last", shares=True,
):  # fmt: skip
    """Train from `path`; returns (losses, adapters, metrics of the last step).

    shares: whether sequences share what they begin with.
    """
    mesh = make_mesh(*mesh, devices=jax.devices()[: int(np.prod(mesh))])
    checkpoint = open_checkpoint(path)
    model, params = load_model(checkpoint, mesh, towers=(), pooling=pooling)
    config = lora.LoraConfig(rank=8, alpha=16, dropout=dropout)
    if adapters is None:
        adapters = lora.init(jax.random.key(0), params["decoder"], config)
    tx = make_optimizer(OptimizerConfig(learning_rate=4e-4, warmup_steps=5), STEPS)
    processor = Processor(checkpoint.folder)
    layout = pipeline.Layout(
        batch,
        negatives,
        prefixes_of(records, processor) if shares else Prefixes.of(),
        chunk_tokens,
        teacher=bool(objective.teacher),
    )
    chosen = [[records[(i * batch + j) % len(records)] for j in range(batch)] for i in range(steps)]
    batches = [pipeline._prepare(some, layout, processor, None, 1, 0) for some in chosen]
    layout = floor_of(batches, layout, processor, mesh)
    losses, metrics = [], {}
    with jax.set_mesh(mesh):
        state, places = begin(adapters, tx, mesh)
        step = make_train_step(model, tx, config, objective, 0, mesh, places)
        for local in batches:
            state, metrics = step(
                state, params, pipeline.global_batch(local, layout, processor.rows, mesh)
            )
            losses.append(float(metrics["loss"]))
        assert metrics["programs"] == 1
    return np.array(losses), jax.device_get(state["tuned"]["decoder"]), jax.device_get(metrics)


def torch_run(model, tokenizer, records, init):
    """The reference's recipe on torch + peft, from the same adapter, over the same batches."""
    targets = [
        n
        for n, m in model.named_modules()
        if isinstance(m, torch.nn.Linear) and "language_model.layers" in n
    ]
    settings = peft.LoraConfig(r=8, lora_alpha=16, lora_dropout=0.0, target_modules=targets)
    tuned = peft.get_peft_model(model, settings)
    parameters = {name: p for name, p in tuned.named_parameters() if p.requires_grad}
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(torch.tensor(init[name.replace(".default", "")]))
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.0, weight_decay=0.0)
    rate = learning_rate(OptimizerConfig(learning_rate=4e-4, warmup_steps=5), STEPS)

    def embed(texts):
        turns = [
            [{"role": "user", "content": [{"type": "text", "text": text + PROMPT}]}]
            for text in texts
        ]
        return reference.embed(tuned, tokenizer(turns))

    losses = []
    with torch.enable_grad():
        for i in range(STEPS):
            chosen = [records[(i * BATCH + j) % len(records)] for j in range(BATCH)]
            anchors, positives = (
                embed([r.anchor for r in chosen]),
                embed([r.positive for r in chosen]),
            )
            candidates = torch.cat([positives, embed([r.negatives[0] for r in chosen])])
            loss = torch.nn.functional.cross_entropy(
                anchors @ candidates.T / TEMPERATURE, torch.arange(BATCH)
            )
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
            optimizer.param_groups[0]["lr"] = float(rate(i))
            optimizer.step()
            losses.append(loss.item())
    final = {name.replace(".default", ""): p.detach().numpy() for name, p in parameters.items()}
    tuned.unload()
    return np.array(losses), final


@pytest.mark.slow
def test_trajectory_equals_torch_and_peft(cases, records, tmp_path):
    """20 steps from one adapter: every loss within 1e-4, the final adapter within 1e-3 relative."""
    case = cases["vl"]
    config = lora.LoraConfig(rank=8, alpha=16)
    init = lora.init(jax.random.key(3), abstract_params(open_checkpoint(case.path).config), config)
    write_peft(tmp_path / "init", init, config, str(case.path))
    losses, final, _ = run(case.path, records, init)
    flat = load_file(tmp_path / "init" / "adapter_model.safetensors")
    want_losses, want = torch_run(case.model, ChatTokenizer(case.path), records, flat)
    assert want_losses[18] < want_losses[0] - 0.2  # the same batch again: it is a real trajectory
    assert np.abs(losses - want_losses).max() < 1e-4
    write_peft(tmp_path / "final", final, config, str(case.path))
    got = load_file(tmp_path / "final" / "adapter_model.safetensors")
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert np.linalg.norm(got[key] - value) < 1e-3 * np.linalg.norm(value), key


@pytest.fixture(scope="module")
def one_device(records):
    """20 steps with dropout on one device: what every other layout has to repeat."""
    return run("builtin:tiny", records, dropout=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("mesh", [(2, 2, 2), (8, 1, 1), (1, 8, 1)])
def test_eight_devices_equal_one(records, one_device, mesh):
    losses, _, _ = run("builtin:tiny", records, dropout=0.1, mesh=mesh)
    assert np.abs(losses - one_device[0]).max() < 1e-5


@pytest.mark.slow
def test_gradcache_chunks_change_nothing(records, one_device):
    losses, adapters, _ = run("builtin:tiny", records, dropout=0.1, chunk_tokens=100)
    assert np.abs(losses - one_device[0]).max() < 1e-5
    for got, want in zip(jax.tree.leaves(adapters), jax.tree.leaves(one_device[1]), strict=True):
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)


def test_chunked_and_sharded_step_in_short(records):
    """Three steps of the above, for the quick lane."""
    plain, _, metrics = run("builtin:tiny", records, steps=3, dropout=0.1)
    layout = {"mesh": (2, 2, 2), "chunk_tokens": 40}
    other, _, others = run("builtin:tiny", records, steps=3, dropout=0.1, **layout)
    assert np.abs(plain - other).max() < 1e-5
    assert abs(metrics["grad_norm"] - others["grad_norm"]) < 1e-5 * metrics["grad_norm"]


@pytest.mark.slow
def test_what_is_added_to_the_loss_is_the_same_in_chunks_and_on_a_mesh(records):
    added = {"matryoshka": (64, 16), "false_negatives": "base", "hard_weight": 2.0, "teacher": "kl"}
    objective = LossConfig(TEMPERATURE, two_way=True, **added)
    taught = [replace(r, teacher_scores=(0.9, 0.1 * (i % 7))) for i, r in enumerate(records)]
    options = {"steps": 3, "dropout": 0.1, "objective": objective}
    plain, adapters, metrics = run("builtin:tiny", taught, **options)
    other, others, _ = run("builtin:tiny", taught, mesh=(2, 2, 2), chunk_tokens=40, **options)
    assert metrics["teacher_loss"] > 0
    assert metrics["false_negatives"] > 0
    assert np.abs(plain - other).max() < 1e-5
    for got, want in zip(jax.tree.leaves(others), jax.tree.leaves(adapters), strict=True):
        assert np.linalg.norm(got - want) < 1e-3 * np.linalg.norm(want)


def instructed(records, place="before"):
    """The records as of three sources: two with instructions of their own, one without."""
    asked = Instruction("Find a sentence that follows from this one: ", place)
    other = Instruction("Find a picture of this: ", place)
    found = Instruction("A sentence.\n", place)
    sides = [(asked, found), (other, None), (None, None)]
    return [
        replace(record, query=sides[i % 3][0], document=sides[i % 3][1])
        for i, record in enumerate(records)
    ]


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_a_step_is_the_same_whether_beginnings_are_shared(records, pooling):
    """Loss, norm of the gradient and updated adapters, with three beginnings in a stream."""
    records = instructed(records)
    shared, adapters, metrics = run("builtin:tiny", records, steps=1, pooling=pooling)
    apart, others, one = run("builtin:tiny", records, steps=1, pooling=pooling, shares=False)
    assert metrics["tokens"] == one["tokens"]
    assert np.abs(shared - apart).max() < 1e-5
    assert abs(metrics["grad_norm"] - one["grad_norm"]) < 1e-5 * one["grad_norm"]
    for got, want in zip(jax.tree.leaves(adapters), jax.tree.leaves(others), strict=True):
        assert np.abs(got - want).max() < 1e-5


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_instructions_and_pooling_are_the_same_in_chunks_and_on_a_mesh(records, pooling):
    options = {"steps": 3, "dropout": 0.1, "pooling": pooling}
    records = instructed(records)
    plain, _, metrics = run("builtin:tiny", records, **options)
    layout = {"mesh": (2, 2, 2), "chunk_tokens": 60}
    other, _, others = run("builtin:tiny", records, **options, **layout)
    assert np.abs(plain - other).max() < 1e-5
    assert abs(metrics["grad_norm"] - others["grad_norm"]) < 1e-5 * metrics["grad_norm"]


@pytest.mark.slow
def test_dropout_moves_the_loss(records, one_device):
    """Or the tests above would show nothing."""
    without, _, _ = run("builtin:tiny", records, steps=12, dropout=0.0)
    assert np.abs(without - one_device[0][:12]).max() > 1e-2


@pytest.mark.slow
def test_any_number_of_negatives(records):
    """A record without negatives adds no candidates; one with three adds three."""
    mixed = [
        Record(r.anchor, r.positive, tuple(s.negatives[0] for s in records[j : j + n]), r.where)
        for j, (r, n) in enumerate(zip(records, (0, 3, 1, 2, 0, 1), strict=False))
    ]
    losses, _, metrics = run("builtin:tiny", mixed, steps=1, negatives=3)
    cut, _, _ = run("builtin:tiny", mixed, steps=1, negatives=1)
    assert losses[0] > cut[0]  # more candidates, more to tell apart
    none, _, _ = run(
        "builtin:tiny", [Record(r.anchor, r.positive, (), "") for r in mixed], steps=1, negatives=0
    )
    assert none[0] < cut[0]
    assert int(metrics["tokens"]) > 0


def test_info_nce_equals_torch():
    rng = np.random.default_rng(0)
    e = rng.normal(size=(5, 4, 16)).astype(np.float32)
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    present = np.ones((5, 4), bool)
    present[[1, 3, 3], [2, 2, 3]] = False
    loss, metrics = info_nce(jnp.array(e), jnp.array(present), 0.03)
    candidates = np.concatenate([e[:, 1], e[:, 2:][present[:, 2:]]])
    logits = torch.tensor(e[:, 0] @ candidates.T / 0.03)
    want = torch.nn.functional.cross_entropy(logits, torch.arange(5))
    assert abs(float(loss) - float(want)) < 1e-5
    assert float(metrics["accuracy"]) == float((logits.argmax(1) == torch.arange(5)).float().mean())
    wrong = (e[:, 0] @ candidates.T)[np.arange(5)[:, None] != np.arange(len(candidates))]
    assert abs(float(metrics["negative_similarity"]) - wrong.mean()) < 1e-6
    scaled = (
        jnp.array(e) * jnp.where(jnp.array(present), 1.0, jnp.nan)[..., None]
    )  # what is absent cannot matter
    assert np.isfinite(
        float(info_nce(jnp.where(present[..., None], scaled, 7.0), jnp.array(present), 0.03)[0])
    )


def test_a_step_that_is_not_finite_changes_nothing(cases, records):
    mesh = make_mesh(devices=jax.devices()[:1])
    model, params = load_model(open_checkpoint(cases["vl"].path), mesh, towers=())
    processor = Processor(cases["vl"].path)
    config = lora.LoraConfig(rank=4, alpha=8)
    adapters = lora.init(jax.random.key(0), params["decoder"], config)
    tx = make_optimizer(OptimizerConfig(schedule="constant"), 10)
    layout = pipeline.Layout(4, 1, processor.tokenizer.prefix)
    local = pipeline._prepare(records[:4], layout, processor, None, 1, 0)
    broken = jax.tree.map(lambda x: x, params)
    broken["decoder"]["norm"]["weight"] = params["decoder"]["norm"]["weight"].at[0].set(jnp.nan)
    with jax.set_mesh(mesh):
        batch = pipeline.global_batch(local, layout, processor.rows, mesh)
        state, places = begin(adapters, tx, mesh)
        step = make_train_step(model, tx, config, LossConfig(), 0, mesh, places)
        before = jax.device_get(state)
        after, metrics = step(state, broken, batch)
        assert not bool(metrics["finite"])
        assert int(after["step"]) == 1
        for key in ("tuned", "optimizer"):
            jax.tree.map(np.testing.assert_array_equal, jax.device_get(after[key]), before[key])
        good, metrics = step(begin(adapters, tx, mesh)[0], params, batch)
        assert bool(metrics["finite"])
        moved = jax.tree.map(
            lambda x, y: bool((x != y).any()), jax.device_get(good["tuned"]), before["tuned"]
        )
        assert any(jax.tree.leaves(moved))


def test_a_step_reports_its_rate_and_one_that_is_not_finite_does_not_advance_the_schedule(records):
    """The loss of a step is not finite where the frozen parameters are not."""
    config = OptimizerConfig(learning_rate=2.0, schedule="linear", warmup_steps=4)
    tx, mesh = make_optimizer(config, 10), make_mesh(devices=jax.devices()[:1])
    rate = learning_rate(config, 10)
    processor = Processor(open_checkpoint("builtin:tiny").folder)
    layout = pipeline.Layout(2, 1, processor.tokenizer.prefix)
    local = pipeline._prepare(records[:2], layout, processor, None, 1, 0)
    batch = pipeline.global_batch(local, layout, processor.rows, mesh)

    def loss(tuned, params, batch, media, seed):
        value = jnp.sum(tuned["decoder"]["norm"]["weight"] * params)
        return value, {"loss": value}

    state, places = begin({"norm": {"weight": jnp.ones(3)}}, tx, mesh)
    update = make_update(loss, tx, 0, mesh, places)
    rates = []
    for scale in (1.0, 1.0, jnp.nan, jnp.nan, 1.0):
        state, metrics = update(state, jnp.float32(scale), batch, None)
        rates.append(float(metrics["learning_rate"]))
    assert rates == pytest.approx([float(rate(i)) for i in (0, 1, 2, 2, 2)])


def test_schedules():
    for schedule, half in (("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)):
        rate = learning_rate(
            OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=10), 110
        )
        assert float(rate(0)) == 0.0
        assert float(rate(5)) == pytest.approx(1.0)
        assert float(rate(10)) == pytest.approx(2.0)
        assert float(rate(60)) == pytest.approx(2.0 * half, abs=1e-6)
        assert float(rate(110)) == pytest.approx(0.0 if schedule != "constant" else 2.0, abs=1e-6)


def test_weight_decay_and_clipping_reach_the_update():
    params = {"w": jnp.ones(4)}
    grads = {"w": jnp.full(4, 1e6)}
    updates = []
    for decay in (0.0, 0.1):
        tx = make_optimizer(
            OptimizerConfig(learning_rate=1.0, schedule="constant", weight_decay=decay), 10
        )
        updates.append(tx.update(grads, tx.init(params), params)[0]["w"])
    np.testing.assert_allclose(updates[0] - updates[1], 0.1, atol=1e-6)
    tx = make_optimizer(OptimizerConfig(schedule="constant", clip_norm=1.0), 10)
    state = tx.update(grads, tx.init(params), params)[1]
    assert float(optax.tree.norm(optax.tree_utils.tree_get(state, "mu"))) == pytest.approx(
        0.1, rel=1e-4
    )


@pytest.mark.parametrize("shape", [None, (2, 2, 2)])
def test_tiles_change_no_loss_metric_or_gradient(shape):
    """The B × N matrix in tiles, on one device and on a mesh.

    With absent negatives, absent records and repeated content.
    """
    rng = np.random.default_rng(0)
    e = rng.normal(size=(24, 4, 16)).astype(np.float32)
    e /= np.linalg.norm(e, axis=-1, keepdims=True)
    present = rng.random((24, 4)) < 0.8
    present[:, :2] = True
    present[[3, 17]] = False
    content = rng.integers(0, 30, (24, 4))

    def run(e, tile_scores):
        def loss(e):
            return info_nce(e, jnp.array(present), 0.05, jnp.array(content), tile_scores)

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(e)

    want = run(e, 2**25)
    if shape is None:
        results = [run(e, scores) for scores in (1, 100, 500)]
    else:
        with jax.set_mesh(make_mesh(*shape)):
            results = [run(e, scores) for scores in (1, 100)]
    for got in results:
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_the_loss_of_a_very_large_batch_fits():
    """65,536 anchors, 131,072 candidates, D 256: under 2 GB; the dense matrix alone has 32 GiB."""
    shapes = (
        jax.ShapeDtypeStruct((65536, 3, 256), jnp.float32),
        jax.ShapeDtypeStruct((65536, 3), bool),
    )
    gradient = jax.grad(lambda e, present: info_nce(e, present, 0.03)[0])
    memory = jax.jit(gradient).lower(*shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 2e9, memory.temp_size_in_bytes
