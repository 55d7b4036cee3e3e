"""What fits: the estimate against XLA's own, the choice as memory shrinks, and a run that chooses."""

from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lco_jax import LcoError, make_mesh
from lco_jax.checkpoint.hf import abstract_params
from lco_jax.core import lora
from lco_jax.core.packing import Batch, PackedTokens, Shape
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import Decoder
from lco_jax.train import train
from lco_jax.training import cli, memory
from lco_jax.training.metrics import read_metrics
from lco_jax.training.step import contrastive_loss

ROOT = Path(__file__).parent.parent
GEOMETRY = DecoderConfig(1024, 256, 768, 4, 4, 2, 64, 1e-6, 1e4, (32,), 4096, True, True)


def xla_bytes(config, policy, shape, dtype, rank, dropout, chunks=1):
    """What XLA says that loss and gradient take, beyond arguments and results."""
    array = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct((chunks, 1, *sizes), dtype)  # noqa: E731
    one, count = array(shape.tokens), sum(shape.rows.values())
    groups = tuple(array(n, width) for width, n in shape.rows.items())
    keys = array(shape.tokens, dtype=jnp.uint32)
    tokens = PackedTokens(one, array(shape.tokens, 3), keys, one, groups, one, array(count), 16)
    sides = jax.ShapeDtypeStruct((count * chunks // 2, 2), jnp.int32)
    params, settings = abstract_params(config, dtype), lora.LoraConfig(rank=rank, dropout=dropout)
    adapters = jax.eval_shape(partial(lora.init, params=params, config=settings), jax.random.key(0))
    decoder = Decoder(config, dtype, dtype, policy)
    loss = partial(contrastive_loss, media=None, decoder=decoder, config=settings, temperature=0.03, seed=0)
    step = jax.jit(jax.value_and_grad(loss, has_aux=True))
    lowered = step.lower({"decoder": adapters}, {"decoder": params}, Batch(tokens, sides, sides, {}))
    fast = {"xla_backend_optimization_level": "0"}  # buffers are laid out before machine code is made
    return lowered.compile(fast).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize(
    ("policy", "shape", "dtype", "rank", "dropout", "chunks"),
    [
        ("full", Shape(2048, {64: 40}), jnp.float32, 16, 0.05, 1),
        pytest.param("none", Shape(2048, {64: 24, 128: 8}), jnp.float32, 16, 0.05, 1, marks=pytest.mark.slow),
        pytest.param("gate", Shape(2048, {32: 80}), jnp.float32, 64, 0.0, 1, marks=pytest.mark.slow),
        pytest.param("full", Shape(3072, {1024: 4}), jnp.bfloat16, 8, 0.05, 1, marks=pytest.mark.slow),
        pytest.param("none", Shape(2048, {512: 5}), jnp.float32, 16, 0.0, 1, marks=pytest.mark.slow),
        pytest.param("attention", Shape(1024, {64: 20}), jnp.float32, 8, 0.05, 3, marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_an_upper_bound_and_close(policy, shape, dtype, rank, dropout, chunks):
    estimate = memory.activation_bytes(GEOMETRY, policy, shape, dtype, rank, dropout)
    real = xla_bytes(GEOMETRY, policy, shape, dtype, rank, dropout, chunks)
    assert real <= estimate < 1.5 * real


@pytest.mark.parametrize("policy", ["full", "none"])
def test_no_frozen_weight_is_kept(policy):
    """A layer more costs its activations, and not its weights once more."""
    deep, shallow = (
        memory._kept(memory.replace(GEOMETRY, num_layers=n), policy, "float32", 4, 0.0, (8, ((8, 1),))) for n in (4, 3)
    )
    weights = memory.held_bytes(abstract_params(GEOMETRY)["layers"]) / GEOMETRY.num_layers
    assert 8 * GEOMETRY.hidden_size * 4 <= deep - shallow < weights / 4


def test_the_choice_as_memory_shrinks(monkeypatch):
    """none → … → full → chunks → an error, each at the memory it needs and not a byte below."""
    monkeypatch.setattr(memory, "ORDER", {})
    shape_of = lambda chunk: Shape(chunk or 1000, {})  # noqa: E731
    cost = {"full": 1, "attention": 2, "gate": 3, "mlp": 4, "none": 9}
    need = lambda policy, shape: 500 + cost[policy] * shape.tokens  # noqa: E731
    choose = lambda there, remat="auto", chunk=-1: memory.choose(there, remat, chunk, shape_of, need)[:2]  # noqa: E731
    for policy, factor in cost.items():
        assert choose(500 + 1000 * factor) == (policy, 0)
    assert choose(500 + 9000 - 1) == ("mlp", 0)
    assert choose(500 + 999) == ("full", 896)
    assert choose(500 + 400) == ("full", 384)
    assert choose(500 + 128) == ("full", 128)
    assert choose(5000, "none") == ("none", 384)  # only the chunk is to be chosen
    assert choose(500 + 4 * 256, chunk=256) == ("mlp", 256)  # only the policy
    with pytest.raises(LcoError, match=r"needs about .* chunks of 128 tokens"):
        choose(500 + 127)
    with pytest.raises(LcoError, match=r"config.train.chunk_tokens to -1"):
        choose(1000, chunk=0)


@pytest.mark.slow
def test_a_run_with_little_memory_chunks_and_learns_the_same(tmp_path, monkeypatch, capfd):
    """Chunks are chosen, the losses are those of a run without, and the folder goes on where memory is another."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    real, auto = memory.choose, ["--config.model.remat=auto", "--config.train.chunk_tokens=-1"]
    small = [
        "--config=configs/tiny.py", "--config.train.steps=2", "--config.train.batch_size=8", "--config.eval.path=",
        "--config.optimizer.warmup_steps=1", "--config.export.merged=False", "--config.lora.rank=4",
    ]  # fmt: skip

    def run(name, *flags):
        train(cli.parse(["train", *small, *flags], "").config, tmp_path / name)
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    def little(there, remat, chunk, shape_of, need, backend):
        between = (need("full", shape_of(memory.STEP)) + need("full", shape_of(0))) // 2
        return real(between, remat, chunk, shape_of, need, backend)

    fixed = run("fixed", "--config.model.remat=full")
    monkeypatch.setattr(memory, "choose", little)
    chosen = run("auto", *auto)
    assert "remat full, chunks of" in capfd.readouterr().out
    assert np.abs(np.subtract(fixed, chosen)).max() < 1e-5
    monkeypatch.setattr(memory, "choose", real)
    assert run("auto", *auto) == chosen  # resumed
    assert "the batch in one chunk" in capfd.readouterr().out
