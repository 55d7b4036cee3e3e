"""The benchmarks run, compare like with like, and count right. Nothing here is timed."""

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks import compiled
from benchmarks.__main__ import parser_of
from benchmarks.data import read_triplets, write_triplets
from benchmarks.flops import Work, forward_flops, step_flops
from benchmarks.fuzz import watch
from benchmarks.fuzz.case import Case
from benchmarks.fuzz.command import KINDS, Runs
from benchmarks.presets import PRESETS
from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.packing import PackedTokens
from lco_jax.models.decoder import REMAT_POLICIES, Decoder
from lco_jax.models.pooling import embed

ROOT = Path(__file__).parents[1]


def bench(*args):
    command = [sys.executable, "-m", "benchmarks", *args, "--json"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}  # with torch, for the peer
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
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
    """Small: products, kernels against XLA.

    A part that is there is not run again; a part that has no time is named.
    """
    folder = f"--folder={tmp_path}"
    result = bench("device", "--small", "--budget=600", "--parts=matmul,kernels", folder)
    assert set(result["parts"]) == {"matmul", "kernels"}
    rows = result["parts"]["kernels"]["rows"]
    assert set(rows) == {
        f"{name}: {kind}" for name in ("causal", "segments") for kind in ("xla", "triton", "splash")
    }
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
    [
        name if name == "full" else pytest.param(name, marks=pytest.mark.slow)
        for name in REMAT_POLICIES
    ],
)
def test_flops_are_those_that_xla_counts(policy):
    """XLA counts the body of a scan once: its three layers, with a scan of two, are our two."""
    config, settings = replace(PRESETS["tiny"], layers=3).decoder, lora.LoraConfig(rank=16)
    two = replace(config, num_layers=2)

    def array(*sizes, dtype=jnp.int32):
        return jax.ShapeDtypeStruct((1, *sizes), dtype)

    tokens, rows = 512, (array(24, 32),)
    one = array(tokens)
    keys, prefix = array(tokens, dtype=jnp.uint32), ((0, 0, 4),)
    inputs = PackedTokens(one, array(tokens, 3), keys, one, rows, one, array(24), prefix)
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
        # XLA counts norms and the like, too
        assert 0.95 < want / counted < 1.0, (policy, want, counted)


@pytest.mark.parametrize("job", ["encode", "vision"])
def test_a_compiled_programs_work_is_what_is_written_out(job, tmp_path, monkeypatch):
    """What is read of a forward pass is its useful work, written out by hand."""
    from lco_jax import make_mesh
    from lco_jax.cost_model.hardware import DEVICES
    from lco_jax.cost_model.profile import profile
    from lco_jax.cost_model.targets import OPTIONS

    small = {
        "depth": 4,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 2,
        "fullatt_block_indexes": [1],
    }
    monkeypatch.setattr(compiled, "VISION", small)
    monkeypatch.setattr(compiled, "SIDE", 24)
    monkeypatch.setattr(compiled, "ENCODED", 1024)
    monkeypatch.chdir(ROOT)
    mesh = make_mesh(2, 1, 1, devices=jax.devices()[:2])
    args = parser_of().parse_args(["compiled"])
    lowered, useful, said = getattr(compiled, f"_{job}")(args, tmp_path, "tiny", "bf16", mesh)
    text = lowered.compile(OPTIONS["cpu"]).as_text()
    found = profile(text, DEVICES["v5e"], taken=1 / 4)
    assert found.flops == pytest.approx(useful, rel=1e-9)
    assert said == (
        {"images": 8, "patches": 576} if job == "vision" else {"tokens": 1024, "rows": {"64": 32}}
    )


def test_compiled_cells_are_written_one_by_one_and_not_made_again(tmp_path, monkeypatch):
    made = []
    cell = {
        "preset": "3b", "device": "v5e-8", "job": "train", "fsdp": 8, "remat": "full",
        "peak_gib": 6.0, "tflop": 117.0, "useful_tflop": 88.0, "modelled_seconds": 2.0,
        "seconds": {"matrices": 1.5, "norms": 0.5}, "compile_seconds": 100.0, "unestimated": 0,
        "collectives": {"all-gather": {"count": 837, "gb": 7.4}},
    }  # fmt: skip

    def compile_one(args, folder, preset, device, job, weights, file):
        made.append(file.stem)
        if weights == "nf4":
            raise KeyboardInterrupt
        return {**cell, "weights": weights}

    monkeypatch.setattr(compiled, "_cell", compile_one)
    flags = [
        "compiled",
        "--preset=3b",
        "--device=v5e-8",
        "--job",
        "train",
        "vision",
        f"--folder={tmp_path / 'cells'}",
    ]
    with pytest.raises(KeyboardInterrupt):
        compiled.measure(parser_of().parse_args(flags), tmp_path)
    assert made == [f"3b-v5e-8-train-{weights}" for weights in compiled.WEIGHTS]
    made.clear()
    one = compiled.measure(
        parser_of().parse_args([*flags, "--job=train", "--weights", "bf16", "int8"]), tmp_path
    )
    assert (made, [x["weights"] for x in one["cells"]]) == ([], ["bf16", "int8"])
    assert "2.000 s modelled" in compiled.table(one)
    docs = tmp_path / "docs.md"
    docs.write_text(f"before\n{compiled.BEGIN}\nold\n{compiled.END}\nafter\n")
    monkeypatch.setattr(compiled, "DOCS", docs)
    compiled.measure(parser_of().parse_args([*flags, "--table"]), tmp_path)
    row = "| 3b | v5e-8, fsdp 8 | train, full | int8 | 6.00 | 117.0 | 88.0 | 2.000 |"
    row += " 837 all-gather (7.4 GB) |"
    assert row in docs.read_text()
    assert "matrices 75%, norms 25%" in docs.read_text()
    assert docs.read_text().startswith("before\n")
    assert docs.read_text().endswith("after\n")
    assert "old" not in docs.read_text()


def test_a_compiler_that_is_not_installed_is_named(tmp_path, monkeypatch):
    from lco_jax.cost_model import targets

    monkeypatch.setattr(targets, "missing", lambda backend: "libtpu is not installed")
    with pytest.raises(compiled.LcoError, match="--device=v5e-8: libtpu is not installed"):
        compiled.measure(
            parser_of().parse_args(["compiled", f"--folder={tmp_path}", "--device=v5e-8"]), tmp_path
        )
    with pytest.raises(compiled.LcoError, match="--device=v5e: it is KIND-COUNT"):
        compiled.measure(
            parser_of().parse_args(["compiled", f"--folder={tmp_path}", "--device=v5e"]), tmp_path
        )


@pytest.mark.slow
def test_the_fuzz_names_each_kind_of_fault(tmp_path, monkeypatch):
    """A worker goes on after what it survives, and is replaced after the rest."""
    monkeypatch.setattr(watch, "IDLE_SECONDS", 3.0)
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "tests"), prepend=os.pathsep)
    args = argparse.Namespace(seed=0, keep=None, seconds=4.0, mib=200.0)
    runs = Runs(args, tmp_path, "fuzz_target:Fake")

    def fault(asked, want="either", **more):
        return runs.judge(Case("media", 0, asked, {"input": asked}, want, **more))["fault"]

    right, other = {"input": "right"}, {"input": "other"}
    assert fault("right", "vector", same=right, unlike=other) == ""
    assert fault("sentence") == ""
    assert fault("sentence", "vector") == "refused: input 0: no such thing"
    assert fault("sentences").startswith("not one line")
    assert fault("traceback") == "traceback: KeyError: 'fps'"
    assert fault("nan") == "vector is not finite"
    assert fault("long").startswith("not one unit vector")
    assert fault("right", "error") == "a vector, where an error is right"
    assert fault("right", same=other) == "wrong vector: 1 off"
    assert fault("right", unlike=right).startswith("wrong vector: as if")
    assert fault("crash").startswith("crash: SIGSEGV")
    assert fault("exit").startswith("crash: status 3")
    assert fault("memory").startswith("memory: more than 200 MiB")
    assert fault("slow").startswith("slow: more than 4 s")
    assert fault("hang").startswith("hang: idle")
    assert fault("right") == ""
    runs.watched.close()


def test_the_fuzz_makes_the_same_cases_again(tmp_path):
    base = builtin.build(tmp_path / "base")
    for kind, make in KINDS.items():
        for number in (0, 7, 11):
            cases = []
            for place in (tmp_path / "a", tmp_path / "b"):
                place.mkdir()
                cases.append(make(5, number, place, base))
            one, again = cases
            assert (one.what, one.want, one.address) == (again.what, again.want, f"{kind}:{number}")
            files = [sorted(x for x in (tmp_path / n).rglob("*") if x.is_file()) for n in "ab"]
            assert [x.read_bytes() for x in files[0]] == [x.read_bytes() for x in files[1]]
            for place in (tmp_path / "a", tmp_path / "b"):
                shutil.rmtree(place)


@pytest.mark.slow
def test_the_fuzz_finds_no_fault_in_valid_media(tmp_path):
    """Its own decoding agrees with ours."""
    result = bench("fuzz", "--media=0", "--checkpoints=0", "--only=media:2")
    assert result["kinds"] == {"media": {"vectors": 1}}
    assert result["cases"][0]["what"].startswith("animated WEBP")
