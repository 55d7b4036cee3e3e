"""What `lco_jax.plan` says, against the run that it plans, loops written out, and what shapes make of it."""

import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from benchmarks.presets import PRESETS
from lco_jax import job, make_mesh
from lco_jax import plan as planning
from lco_jax.checkpoint.hf import open_geometry
from lco_jax.core.errors import run_main
from lco_jax.data import pipeline
from lco_jax.planning import hlo
from lco_jax.planning.hardware import DEVICES
from lco_jax.planning.program import Step, compile_split, even
from lco_jax.training import cli, memory
from lco_jax.training.step import contrastive_loss, make_update

ROOT = Path(__file__).parents[1]
V5E = DEVICES["v5e"]
RECORDS, TOKENS, RANK = 48, 40, 8
FEW = r"--config.lora.targets=layers\.(self_attn\.k|mlp\.down)_proj"  # of adapters, which take their time to compile
GEOMETRY = replace(PRESETS["tiny"], hidden=64, layers=3, mlp=256, vocab=512)


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """flags -> a configuration whose checkpoint is a config.json and nothing else."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRY.config), encoding="utf-8")
    given = ["plan", "--config=configs/base.py", f"--config.model.path={tmp_path}", f"--config.lora.rank={RANK}"]
    given += ["--config.model.dtype=bfloat16", f"--config.train.batch_size={RECORDS}"]
    return lambda *flags: cli.parse([*given, *flags], "").config


@pytest.fixture
def unsplit(monkeypatch):
    """Activations are not told from temporaries, which takes a second."""
    monkeypatch.setattr(memory, "activation_bytes", lambda *_: 1)


def _step(config, *sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    return Step(config, open_geometry(config.model.path), mesh, V5E, even((RECORDS, 3), TOKENS))


def test_memory_is_that_of_the_run(tmp_path, monkeypatch):
    """The plan of a geometry and the data is within a tenth of what XLA says of the step that a run takes."""
    monkeypatch.chdir(ROOT)
    flags = ["--config=configs/base.py", "--config.model.remat=mlp", "--config.eval.path=", FEW]
    flags += ["--config.data.max_length=16"]  # few widths of attention rows to compile
    config = cli.parse(["train", *flags], "").config
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    monkeypatch.setattr(job, "make_mesh", lambda **_: mesh)
    opened = job.open_job(config, tmp_path)
    run = job.begin(opened)
    batch, _ = next(pipeline.batches(run.iterator, run.planned, opened.processor.rows, mesh))
    training = opened.training
    loss = partial(
        contrastive_loss, decoder=opened.model.decoder, config=training.lora, temperature=config.train.temperature
    )
    update = make_update(loss, training.tx, config.seed, mesh, training.shardings)
    with jax.set_mesh(mesh):
        lowered = update.lower(run.state, opened.params, batch, None)
        found = lowered.compile({"xla_backend_optimization_level": "0"}).memory_analysis()
    bytes_ = found.argument_size_in_bytes + found.temp_size_in_bytes
    bytes_ += found.output_size_in_bytes - found.alias_size_in_bytes
    monkeypatch.setattr(planning, "_meshes", lambda *_: [(1, 2, 1)])
    before = len(jax.live_arrays())
    planned = planning.plan(config, V5E, 2, (1, 2, 1))
    assert len(jax.live_arrays()) == before
    assert planned["assumed"] == "shapes as the data are"
    assert planned["memory_total"] == pytest.approx(bytes_, rel=0.1)
    assert planned["memory"]["weights"] == memory.held_bytes(opened.params["decoder"])
    assert planned["memory"]["adapters"] == memory.held_bytes(run.state["tuned"])
    assert planned["memory"]["optimiser"] == memory.held_bytes(run.state["optimizer"])
    assert planned["fits"]
    assert "it fits" in planning.table(planned)


def test_loops_count_as_often_as_they_run():
    """Products of a scan within a scan are those of the same written out, on one device and on several."""

    def loss(w, x, unroll):
        layer = lambda y, m: (jnp.tanh(y @ m), None)  # noqa: E731
        one = lambda total, y: (total + jax.lax.scan(layer, y, w, unroll=unroll)[0].sum(), None)  # noqa: E731
        return jax.lax.scan(one, jnp.float32(0), x, unroll=unroll)[0]

    def counts(unroll, mesh):
        place = partial(jax.NamedSharding, mesh)
        w = jax.ShapeDtypeStruct((3, 64, 64), jnp.bfloat16, sharding=place(jax.P()))
        x = jax.ShapeDtypeStruct((5, 16, 64), jnp.bfloat16, sharding=place(jax.P(None, "data")))
        return compile_split(jax.jit(jax.grad(partial(loss, unroll=unroll), argnums=(0, 1))).lower(w, x), mesh)[0]

    for devices in (1, 4):
        mesh = make_mesh(devices=jax.devices()[:devices])
        looped, flat = counts(1, mesh), counts(True, mesh)
        product = 2 * (16 // devices) * 64 * 64
        assert looped.flops == flat.flops == {"default": 5 * (3 + 3 + 3) * product}
        assert looped.moved == flat.moved


def test_groups_are_read_in_every_spelling():
    """The same groups listed, counted and named; and of axes, those along which they lie."""
    same = ["{{0,2},{4,6},{1,3},{5,7}}", "[4,2]<=[2,2,2]T(0,2,1)", "mesh['x'=2,'y'=2,'z'=2] {'y'}",
            "mesh['x'=4,'y'=2], device_ids=([2,2,2]T(0,2,1)) {'y'}"]  # fmt: skip
    for spelling in same:
        groups = hlo._groups(f"%x), channel_id=1, replica_groups={spelling}, dimensions={{1}}")
        assert {tuple(group) for group in groups} == {(0, 2), (1, 3), (4, 6), (5, 7)}
    text = "ENTRY %main (x: f32[4]) -> f32[4] {\n  ROOT %y = f32[4]{0} all-reduce(%x), replica_groups=GROUPS, a=b\n}"
    for spelling in same:
        counts = hlo.count(text.replace("GROUPS", spelling), {"data": 2, "fsdp": 2, "tensor": 2}, domain=4)
        assert counts.sent == {("all-reduce", "fsdp", False): 16}
    far = hlo.count(text.replace("GROUPS", "{{0,4},{1,5},{2,6},{3,7}}"), {"data": 2, "fsdp": 4}, domain=4)
    assert far.sent == {("all-reduce", "data", True): 16}


def test_copies_compute_and_send_what_shapes_make_of_it(configured, unsplit):
    """FLOPs to the last one, written out here; what is sent is the adapters' gradient and what the loss needs."""
    step = _step(configured("--config.model.remat=none", FEW), 8, 1, 1)
    kinds, counts = step.compile("none", 0)
    c = step.checkpoint.config
    d, f, kv, texts = c.hidden_size, c.intermediate_size, c.num_kv_heads * c.head_dim, RECORDS * 3 // 8
    tokens = 14 + texts * (TOKENS - 14)
    all_tokens, last_tokens = 2 * d * kv, 2 * d * d + 3 * d * f  # weights of k and v; of the rest of a layer
    factors, last_factors = RANK * (d + kv), RANK * (d + f)
    attention = 2 * 48 * d  # of a query: a row is 48 wide, and scores and mixture are a product each
    a_token = 4 * (all_tokens + last_tokens) + 6 * (factors + last_factors)  # no gradient of frozen weights
    flops = (c.num_layers - 1) * (tokens * a_token + 6 * texts * 48 * attention)
    flops += tokens * (4 * all_tokens + 6 * factors) + texts * (4 * last_tokens + 6 * last_factors + 6 * attention)
    candidates = 2 * RECORDS
    assert counts.flops == {"default": flops, "highest": 3 * 2 * (RECORDS // 8) * candidates * d}
    embeddings = 4 * d * (3 * RECORDS + candidates)
    assert counts.sent.keys() == {("all-reduce", "data", False), ("all-gather", "data", False)}
    reduced, gathered = (counts.sent[kind, "data", False] for kind in ("all-reduce", "all-gather"))
    assert reduced == pytest.approx(2 * 7 / 8 * (kinds["adapters"] + embeddings), abs=200)
    assert gathered == pytest.approx(7 / 8 * embeddings, abs=12 * candidates)


def test_what_is_split_is_gathered_in_both_passes(configured, unsplit):
    """…and halves of products are summed: once a sublayer forward, and once a matrix that reads the stream backward."""
    step = _step(configured("--config.model.remat=none", FEW), 2, 2, 2)
    sent = {(kind, axes): n for (kind, axes, _), n in step.compile("none", 0)[1].sent.items()}
    matrices = [x for x in jax.tree.leaves(step.params["decoder"]["layers"]) if x.ndim == 3]
    gathered = 2 * sum(x.size * 2 for x in matrices) / 2 / 2  # two passes, of a half of the matrices the other half
    table = step.params["decoder"]["embed_tokens"]["weight"].size * 2 / 2 / 2
    factors = 2 * sum(x.size * 2 for x in jax.tree.leaves(step.training.tuned))
    assert gathered <= sent["all-gather", "fsdp"] <= gathered + table + factors
    stream = step.shape(0).tokens * step.checkpoint.config.hidden_size * 2
    assert 2 * (2 + 5) * stream <= sent["all-reduce", "tensor"] <= 3 * (2 + 5) * stream
    assert sum(n for (kind, axes), n in sent.items() if kind == "all-reduce" and "data" in axes) > 0


def test_what_does_not_fit_says_so_and_what_would(configured, monkeypatch):
    """A device that has a byte too little for a copy of the model holds it split."""
    monkeypatch.setitem(memory.ORDER, "tpu", ("full",))  # the one policy that is tried
    need = _step(configured("--config.model.remat=full"), 2, 1, 1).choose(0).need
    automatic = configured("--config.model.remat=auto")
    small = replace(V5E, memory=int((need - 1) / (1 - memory.MARGIN)))
    result = planning.plan(automatic, small, 2, (2, 1, 1), tokens=TOKENS)
    assert "memory" not in result
    assert "does not fit: a training step needs about" in planning.table(result)
    found = result["suggested"]
    assert found["mesh"] != (2, 1, 1)
    assert found["need"] <= found["memory"] == int(small.memory * (1 - memory.MARGIN)) < need
    assert f"suggested: --mesh={','.join(map(str, found['mesh']))}" in planning.table(result)
    nothing = planning.plan(automatic, replace(V5E, memory=10**6), 2, tokens=TOKENS)
    assert "take more, or quantize" in planning.table(nothing)


@pytest.mark.parametrize("quantize", ["", "int8", "nf4"])
def test_useful_work_does_not_depend_on_how_weights_are_kept(configured, quantize):
    step = _step(configured(f"--config.model.quantize={quantize}"), 1, 1, 1)
    c, tokens = step.checkpoint.config, step.shape(0).tokens
    kv = c.num_kv_heads * c.head_dim
    matrices = 2 * c.hidden_size * (c.hidden_size + kv) + 3 * c.hidden_size * c.intermediate_size
    assert planning._useful_flops(step, step.shape(0)) == pytest.approx(4 * 2 * matrices * tokens, rel=0.01)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device=v5e", "--mesh=2,2"], "2,2 must be three sizes"),
        (["--device=v5e", "--mesh=a,1,1"], "'a' is no whole number"),
        (["--device=v5e", "--mesh=2,2,2", "--devices=4"], "not allowed with argument"),
        (["--device=v5e", "--devices=0"], "'0' is no whole number"),
        (["--device=v5e"], "one of the arguments --mesh --devices is required"),
        (["--device=v9", "--devices=2"], "invalid choice: 'v9'"),
        (["--device=v5e", "--devices=2", "--config=configs/base.py", "--config.model.path=."], "config.json does not"),
    ],
)
def test_a_mistake_is_one_sentence(flags, says, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(jax.config, "update", lambda *_: None)  # devices are this process's
    monkeypatch.setattr(sys, "argv", ["plan", *flags])
    with pytest.raises(SystemExit) as end:
        run_main(planning.main)
    said = capsys.readouterr().err
    assert end.value.code == 2
    assert says in said
    assert "Traceback" not in said
