"""The benchmarks run, compare like with like, and count what they say they count. Nothing here is timed."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.data import read_triplets, write_triplets
from benchmarks.flops import Work, forward_flops, step_flops
from benchmarks.presets import PRESETS
from lco_jax.checkpoint.hf import abstract_params
from lco_jax.core import lora
from lco_jax.core.packing import PackedTokens
from lco_jax.models.decoder import REMAT_POLICIES, Decoder, embed

ROOT = Path(__file__).parents[1]


def bench(*args):
    command = [sys.executable, "-m", "benchmarks", *args, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # with torch, for the peer
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_duel_in_training_is_between_equals(tmp_path):
    """Same losses, step by step; same embeddings and gradients at the first; a trace on request."""
    trace = tmp_path / "trace"
    small = ("--preset=tiny", "--batch=6", "--micro=4", "--rounds=1", "--dropout=0")
    result = bench("train", *small, f"--profile={trace}", f"--out={tmp_path / 'out.json'}")
    assert result["ratio"] > 0
    assert result["exactness"]["embeddings"] < 1e-5
    assert result["exactness"]["gradient_worst"] < 3e-5
    for ours, peer in zip(result["ours"]["losses"], result["peer"]["losses"], strict=True):
        assert abs(ours - peer) < 1e-3
    assert result["ours"]["programs"] == 1
    assert result["ours"]["tokens"] == result["peer"]["tokens"]
    assert list(trace.rglob("*perfetto_trace.json.gz"))
    assert json.loads((tmp_path / "out.json").read_text())["ratio"] == result["ratio"]


@pytest.mark.slow
def test_a_duel_in_encoding_gives_the_same_vectors():
    result = bench("encode", "--preset=tiny", "--batch=20", "--rounds=1")
    assert result["ratio"] > 0
    assert result["exactness"]["embeddings"] < 1e-5


def test_the_loss_alone():
    result = bench("infonce", "--batch=2048", "--timed=64", "--dim=16", "--rounds=1")
    assert result["ratio"] > 0
    assert max(result["exactness"].values()) < 1e-5


@pytest.mark.slow
def test_one_command_for_a_device_writes_each_part_and_goes_on(tmp_path):
    """In its small form: products, kernels against XLA; what is there is not run again, what has no time is told."""
    folder = f"--folder={tmp_path}"
    result = bench("device", "--small", "--budget=600", "--parts=matmul,kernels", folder)
    assert set(result["parts"]) == {"matmul", "kernels"}
    rows = result["parts"]["kernels"]["rows"]
    assert set(rows) == {f"{name}: {kind}" for name in ("causal", "segments") for kind in ("xla", "triton", "splash")}
    assert max(error for row in rows.values() for error in row["errors"].values()) < 0.05
    (tmp_path / "matmul.json").write_text(json.dumps({"kept": True}))
    result = bench("device", "--small", "--budget=0", "--parts=matmul,encode-3b", folder)
    assert result["parts"] == {"matmul": {"kept": True}}
    assert result["not_there"] == {"encode-3b": "no time was left"}


def test_triplets_are_as_long_as_snlis(tmp_path):
    write_triplets(tmp_path / "t.jsonl", 412, 8192, "", "")
    triplets = read_triplets(tmp_path / "t.jsonl")
    lengths = [len(ids) for triplet in triplets for ids in triplet]
    assert len(triplets) == 412
    assert 39.7 < sum(lengths) / len(lengths) < 39.9
    assert max(max(ids) for triplet in triplets for ids in triplet) < 8192


@pytest.mark.parametrize(
    "policy",
    [name if name in ("full", "none") else pytest.param(name, marks=pytest.mark.slow) for name in REMAT_POLICIES],
)
def test_flops_are_those_that_xla_counts(policy):
    """Three layers: a scan of two, whose body XLA counts once, and the last; what we count for two."""
    config, settings = replace(PRESETS["tiny"], layers=3).decoder, lora.LoraConfig(rank=16)
    two = replace(config, num_layers=2)
    array = lambda *sizes, dtype=jnp.int32: jax.ShapeDtypeStruct((1, *sizes), dtype)  # noqa: E731
    tokens, rows = 512, (array(24, 32),)
    one = array(tokens)
    inputs = PackedTokens(one, array(tokens, 3), array(tokens, dtype=jnp.uint32), one, rows, one, array(24), 4)
    decoder, params = Decoder(config, remat=policy), abstract_params(config)
    adapters = jax.eval_shape(partial(lora.init, params=params, config=settings), jax.random.key(0))

    def loss(adapters, params, tokens):
        return embed(decoder, {"decoder": lora.attach(params, adapters, settings)}, tokens).sum()

    work = Work(tokens, 24, {32: 24})
    for run, want in (
        (loss, forward_flops(two, 16, work)),
        (jax.grad(loss), step_flops(two, 16, work, policy)),
    ):
        counted = jax.jit(run).lower(adapters, params, inputs).compile().cost_analysis()["flops"]
        assert 0.95 < want / counted < 1.0, (policy, want, counted)  # XLA counts norms and the like, too
