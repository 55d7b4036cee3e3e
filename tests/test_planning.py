"""What `lco_jax.plan` says, against the run that it plans, against loops unrolled, and against what shapes make of it."""

import json
import math
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.presets import PRESETS
from lco_jax import LcoError, job, make_mesh
from lco_jax import plan as planning
from lco_jax.core.packing import Batch
from lco_jax.data import pipeline
from lco_jax.planning import hardware, hlo, program
from lco_jax.planning.flops import Work, step_flops
from lco_jax.training import cli, memory
from lco_jax.training.step import train_update

ROOT = Path(__file__).parents[1]
V5E = hardware.find("v5e")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """flags -> a configuration whose checkpoint is a config.json and nothing else."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["tiny"].config), encoding="utf-8")

    def make(*flags, path=tmp_path):
        argv = ["plan", "--config=configs/base.py", f"--config.model.path={path}", *flags]
        return cli.parse(argv, "", planning.FLAGS).config

    return make


def step_of(config, sizes, tokens=40, device=V5E):
    workload, _ = planning._workload(config, planning.open_geometry(config.model.path), tokens)
    return program.Step(config, planning.open_geometry(config.model.path), planning._mesh(sizes), device, workload)


def test_memory_is_that_of_the_run(tmp_path, monkeypatch):
    """The plan of a config.json and the data, within a tenth of what XLA says of the step that the run would take."""
    monkeypatch.chdir(ROOT)
    config = cli.parse(["train", "--config=configs/base.py", "--config.mesh.fsdp=2", "--config.mesh.data=1"], "").config
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    monkeypatch.setattr(job, "make_mesh", lambda **_: mesh)
    opened = job.open_job(config, tmp_path)
    run = job.begin(opened)
    batch = next(pipeline.batches(run.iterator, run.planned, opened.processor.rows, mesh))
    training, train = opened.training, config.train
    given = training.tx, training.lora, train.temperature, config.seed, mesh, training.shardings
    with jax.set_mesh(mesh):
        real = train_update(opened.model.decoder, *given).lower(run.state, opened.params, batch, None).compile()
    found = real.memory_analysis()
    real_bytes = found.argument_size_in_bytes + found.temp_size_in_bytes
    real_bytes += found.output_size_in_bytes - found.alias_size_in_bytes
    before = len(jax.live_arrays())
    planned = planning.plan(config, V5E, 2, (1, 2, 1))
    assert len(jax.live_arrays()) == before  # nothing is allocated
    assert planned["assumed"] == "shapes planned from the data"
    assert planned["memory_total"] == pytest.approx(real_bytes, rel=0.1)
    assert planned["memory"]["weights"] == memory.held_bytes(opened.params["decoder"])
    assert planned["memory"]["optimiser"] == memory.held_bytes(run.state["optimizer"])
    assert planned["fits"]


def test_loops_count_as_often_as_they_run():
    """Products and collectives of a scan within a scan are those of the same written out."""
    mesh = make_mesh(2, 4, 1)
    place = partial(jax.NamedSharding, mesh)
    w = jax.ShapeDtypeStruct((3, 64, 64), jnp.bfloat16, sharding=place(jax.P(None, "fsdp", None)))
    x = jax.ShapeDtypeStruct((5, 16, 64), jnp.bfloat16, sharding=place(jax.P(None, "data", None)))

    def loss(w, x, unroll):
        layer = lambda y, m: (jax.lax.with_sharding_constraint(y @ m, place(jax.P("data", None))), None)  # noqa: E731
        one = lambda total, y: (total + jax.lax.scan(layer, y, w, unroll=unroll)[0].sum(), None)  # noqa: E731
        return jax.lax.scan(one, jnp.float32(0), x, unroll=unroll)[0]

    def counts(unroll):
        lowered = jax.jit(jax.grad(partial(loss, unroll=unroll))).lower(w, x)
        return hlo.count(program._compile(lowered, mesh.size)[0], dict(mesh.shape))

    looped, flat = counts(1), counts(True)
    assert looped.flops == flat.flops
    assert looped.flops["default"] >= 3 * 5 * 3 * 2 * (16 // 2) * 64 * 64 / 4
    assert looped.sent["all-gather", "fsdp", False] >= 3 * 5 * 64 * 64 * 2 * 3 / 4
    assert looped.moved == flat.moved
