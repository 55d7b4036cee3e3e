"""What `lco_jax.plan` says, against the run that it plans, loops written out, and shapes."""

import gc
import json
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from benchmarks.presets import PRESETS
from lco_jax import job, loop, make_mesh
from lco_jax import plan as planning
from lco_jax.checkpoint.hf import open_geometry
from lco_jax.core.errors import LcoError, run_main
from lco_jax.cost_model import targets
from lco_jax.cost_model.hardware import DEVICES
from lco_jax.cost_model.profile import LAUNCH, UNKNOWN, profile
from lco_jax.cost_model.program import Step, even
from lco_jax.cost_model.targets import OPTIONS
from lco_jax.data import pipeline
from lco_jax.training import cli, memory
from lco_jax.training.step import make_train_step

ROOT = Path(__file__).parents[1]
PROGRAMS = Path(__file__).parent / "programs"
V5E = DEVICES["v5e"]
RECORDS, TOKENS, RANK = 48, 40, 8
# few adapters: each takes time to compile
FEW = r"--config.lora.targets=layers\.(self_attn\.k|mlp\.down)_proj"
GEOMETRY = replace(PRESETS["tiny"], hidden=64, layers=3, mlp=256, vocab=512)


@pytest.fixture
def configured(tmp_path, monkeypatch):
    """flags -> a configuration whose checkpoint is a config.json and nothing else."""
    monkeypatch.chdir(ROOT)
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRY.config), encoding="utf-8")
    given = [
        "plan",
        "--config=configs/base.py",
        f"--config.model.path={tmp_path}",
        f"--config.lora.rank={RANK}",
    ]
    given += ["--config.model.dtype=bfloat16", f"--config.train.batch_size={RECORDS}"]
    return lambda *flags: cli.parse([*given, *flags], "").config


@pytest.fixture
def on_cpu(monkeypatch):
    """As where no other compiler is installed."""
    monkeypatch.setattr(
        targets, "missing", lambda backend: f"nothing that compiles for {backend} is installed"
    )


@pytest.fixture
def compiled_once(monkeypatch):
    """The same step is compiled once, however often it is planned."""
    known, lower = {}, Step.lower

    def remembered(step, *candidate):
        key = (*step.mesh.shape.values(), *candidate)
        if key not in known:
            known[key] = lower(step, *candidate).compile(OPTIONS["cpu"])
        return SimpleNamespace(compile=lambda _: known[key])

    monkeypatch.setattr(Step, "lower", remembered)


def _step(config, *sizes):
    mesh = make_mesh(*sizes, devices=jax.devices()[: sizes[0] * sizes[1] * sizes[2]])
    return Step(config, open_geometry(config.model.path), mesh, even((RECORDS, 3), TOKENS))


def _profile(step, remat):
    text = step.lower(remat, 0).compile(OPTIONS["cpu"]).as_text()
    return profile(text, V5E, RANK)


@pytest.mark.slow
def test_memory_is_that_of_the_run(tmp_path, monkeypatch, on_cpu):
    """The plan of a geometry and the data is what XLA says of the step that a run takes."""
    monkeypatch.chdir(ROOT)
    flags = ["--config=configs/base.py", "--config.model.remat=mlp", "--config.eval.path=", FEW]
    flags += ["--config.data.max_length=16"]  # few widths of attention rows to compile
    config = cli.parse(["train", *flags], "").config
    mesh = make_mesh(1, 2, 1, devices=jax.devices()[:2])
    monkeypatch.setattr(job, "make_mesh", lambda **_: mesh)
    opened = job.open_job(config, tmp_path)
    training = opened.training

    def step_of(model):
        given = (
            training.tx,
            training.lora,
            training.objective,
            config.seed,
            mesh,
            training.shardings,
        )
        return make_train_step(model, *given)

    run = loop.begin(opened, step_of)
    batch, _ = next(pipeline.batches(run.iterator, run.planned, opened.processor.rows, mesh))
    with jax.set_mesh(mesh):
        lowered = run.train_step.update.lower(run.state, opened.params, batch, None)
    bytes_ = memory.peak_bytes(lowered.compile(OPTIONS["cpu"]))
    gc.collect()  # what other tests have left is not to vanish in between
    before = len(jax.live_arrays())
    planned = planning.plan(config, V5E, 2, (1, 2, 1))
    assert len(jax.live_arrays()) == before
    assert planned["assumed"] == "shapes as the data are"
    assert planned["compiler"] == "cpu"
    assert planned["memory_total"] == pytest.approx(bytes_, rel=0.01)
    assert planned["memory"]["weights"] == memory.stored_bytes(opened.params["decoder"])
    assert planned["memory"]["adapters"] == memory.stored_bytes(run.state["tuned"])
    assert planned["memory"]["optimiser"] == memory.stored_bytes(run.state["optimizer"])
    said = planning.table(planned)
    assert "it fits" in said
    assert "compiled for CPU, since nothing that compiles for tpu is installed" in said
    assert "modelled, not timed (products at the peak alone)" in said


def test_loops_count_as_often_as_they_run():
    """A scan within a scan has the products of the same loops written out."""

    def loss(w, x, unroll):
        def layer(y, m):
            return jnp.tanh(y @ m), None

        def one(total, y):
            return total + jax.lax.scan(layer, y, w, unroll=unroll)[0].sum(), None

        return jax.lax.scan(one, jnp.float32(0), x, unroll=unroll)[0]

    def profile_of(unroll, mesh):
        place = partial(jax.NamedSharding, mesh)
        w = jax.ShapeDtypeStruct((3, 64, 64), jnp.bfloat16, sharding=place(jax.P()))
        x = jax.ShapeDtypeStruct((5, 16, 64), jnp.bfloat16, sharding=place(jax.P(None, "data")))
        lowered = jax.jit(jax.grad(partial(loss, unroll=unroll), argnums=(0, 1))).lower(w, x)
        return profile(lowered.compile(OPTIONS["cpu"]).as_text(), V5E)

    for devices in (1, 4):
        mesh = make_mesh(devices=jax.devices()[:devices])
        looped, flat = profile_of(1, mesh), profile_of(True, mesh)
        assert looped.flops == flat.flops == 5 * (3 + 3 + 3) * 2 * (16 // devices) * 64 * 64
        assert looped.sent == flat.sent
        assert looped.sent["all-reduce"] == (
            5 * 3 * 64 * 64 * 4 if devices > 1 else 0
        )  # as float32, on CPU


@pytest.mark.parametrize(("name", "kind"), [("tpu_v5e", "v5e"), ("gpu_h100", "H100")])
def test_programs_of_a_tpu_and_a_gpu_are_read_alike(name, kind):
    """The program above for four devices, as libtpu and jax's CUDA plugin compiled it (jax 0.10.2).

    Settings that nothing reads were cut out of the text.
    """
    text = (PROGRAMS / f"scan_{name}_4.hlo").read_text(encoding="utf-8")
    found = profile(text, DEVICES[kind])
    assert found.flops == 5 * (3 + 3 + 3) * 2 * (16 // 4) * 64 * 64
    assert (found.count, found.sent) == ({"all-reduce": 15}, {"all-reduce": 5 * 3 * 64 * 64 * 2})
    assert found.seconds["matrices"] > 0
    twice = replace(DEVICES[kind], clock=2 * DEVICES[kind].clock)
    if kind == "v5e":  # cycles at a clock, but where the compiler does not know
        assert profile(text, twice).seconds.total() == pytest.approx(found.seconds.total() / 2)
        assert found.unestimated == 0
        text = text.replace('"estimated_cycles":"', f'"estimated_cycles":"{UNKNOWN}","was":"')
        unknown = profile(text, DEVICES[kind])
        assert unknown.seconds.total() == 0 < unknown.unestimated
    else:  # small kernels, each of which takes as long as its launch
        assert found.seconds.total() == pytest.approx(found.launches * LAUNCH)


def test_a_batch_in_a_convolution_is_not_counted_as_a_window():
    """TPUs write a batch of products as a convolution.

    Along the batch's axes all but one pair of positions meets padding.
    """
    text = """ENTRY %main (a: bf16[288,2,384,128], b: bf16[288,2,48,128]) -> bf16[288,2,384,48] {
  %a = bf16[288,2,384,128]{3,2,1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[288,2,48,128]{3,2,1,0:T(8,128)(2,1)} parameter(1)
  ROOT %c = bf16[288,2,384,48]{3,2,1,0:T(8,128)(2,1)} convolution(%a, %b), WINDOW, LABELS
}""".replace("LABELS", "dim_labels=01bf_01oi->01bf")
    product = 2 * 288 * 2 * 384 * 48 * 128
    for window in (
        "window={size=288x2 stride=287x1 lhs_dilate=288x2}",
        "window={size=288x2 stride=288x2 pad=287_287x1_1 lhs_dilate=287x1 rhs_reversal=1x1}",
    ):
        assert profile(text.replace("WINDOW", window), V5E).flops == product


def test_a_gpu_kernel_moves_what_it_slices_and_updates():
    """Of a stack of weights a layer's is read, and of a stack of results a layer's is written."""
    text = """%fused (p0: f32[STACK], p1: s32[], p2: f32[STACK]) -> f32[STACK] {
  %p0 = f32[STACK]{2,1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %p2 = f32[STACK]{2,1,0} parameter(2)
  %slice = f32[LAYER]{2,1,0} dynamic-slice(%p0, %p1, %p1, %p1), dynamic_slice_sizes={LAYER}
  ROOT %update = f32[STACK]{2,1,0} dynamic-update-slice(%p2, %slice, %p1, %p1, %p1)
}

ENTRY %main (a: f32[STACK], i: s32[], b: f32[STACK]) -> f32[STACK] {
  %a = f32[STACK]{2,1,0} parameter(0)
  %i = s32[] parameter(1)
  %b = f32[STACK]{2,1,0} parameter(2)
  ROOT %c = f32[STACK]{2,1,0} fusion(%a, %i, %b), kind=kLoop, calls=%fused
}"""
    text = text.replace("STACK", "100,2000,2000").replace("LAYER", "1,2000,2000")
    h100 = DEVICES["H100"]
    found = profile(text, h100)
    assert found.launches == 1
    assert found.seconds.total() == pytest.approx((2 * 16e6 + 4) / h100.bandwidth, rel=1e-3)


def test_copies_compute_and_send_what_shapes_make_of_it(configured):
    """FLOPs, written out here, are equal to the last one.

    What is sent is the adapters' gradient and what the loss needs.
    """
    step = _step(configured("--config.model.remat=none", FEW), 8, 1, 1)
    found = _profile(step, "none")
    c = step.checkpoint.config
    d, f, kv, texts = (
        c.hidden_size,
        c.intermediate_size,
        c.num_kv_heads * c.head_dim,
        RECORDS * 3 // 8,
    )
    tokens = 14 + texts * (TOKENS - 14)
    all_tokens, last_tokens = (
        2 * d * kv,
        2 * d * d + 3 * d * f,
    )  # weights of k and v; of the rest of a layer
    factors, last_factors = RANK * (d + kv), RANK * (d + f)
    attention = (
        2 * 48 * d
    )  # of a query: a row is 48 wide, and scores and mixture are a product each
    a_token = 4 * (all_tokens + last_tokens) + 6 * (
        factors + last_factors
    )  # no gradient of frozen weights
    flops = (c.num_layers - 1) * (tokens * a_token + 6 * texts * 48 * attention)
    flops += tokens * (4 * all_tokens + 6 * factors) + texts * (
        4 * last_tokens + 6 * last_factors + 6 * attention
    )
    candidates = 2 * RECORDS
    flops += 3 * 2 * (RECORDS // 8) * candidates * d  # the loss
    assert found.flops == flops
    embeddings, adapters = (
        4 * d * (3 * RECORDS + candidates),
        memory.stored_bytes(step.training.sharded_abstract["tuned"]),
    )
    assert found.sent.keys() == {"all-reduce", "all-gather"}
    assert found.sent["all-reduce"] == pytest.approx(adapters + embeddings, abs=200)
    assert found.sent["all-gather"] == pytest.approx(embeddings, abs=12 * candidates)


@pytest.mark.slow
def test_what_is_split_is_gathered_in_both_passes(configured):
    """Weights are gathered; halves of products are summed.

    Forward, that is a sum for each sublayer; backward, one for each matrix that reads the stream.
    """
    step = _step(configured("--config.model.remat=none", FEW), 2, 2, 2)
    sent = _profile(step, "none").sent
    matrices = [x for x in jax.tree.leaves(step.params["decoder"]["layers"]) if x.ndim == 3]
    gathered = (
        2 * sum(x.size * 2 for x in matrices) / 2
    )  # two passes, of the half that a device multiplies with
    assert sent["all-gather"] >= gathered
    stream = step.shape(0).tokens * step.checkpoint.config.hidden_size * 2
    assert sent["all-reduce"] >= 2 * (2 + 5) * stream


def test_what_does_not_fit_says_so_and_what_would(configured, monkeypatch, on_cpu, compiled_once):
    """A device that has a byte too little for a copy of the model holds it split."""
    monkeypatch.setitem(memory.ORDER, "tpu", ("full",))  # the one policy that is tried
    automatic = configured("--config.model.remat=auto", FEW)
    copies = planning.plan(automatic, V5E, 2, (2, 1, 1), tokens=TOKENS)
    need = copies["memory_total"]
    assert (copies["remat"], copies["fits"]) == ("full", True)
    small = replace(V5E, memory=int((need - 1) / (1 - memory.MARGIN)))
    result = planning.plan(automatic, small, 2, (2, 1, 1), tokens=TOKENS)
    assert "memory" not in result
    assert "does not fit: a training step needs" in planning.table(result)
    found = planning.plan(automatic, small, 2, tokens=TOKENS)
    assert found["mesh"] != (2, 1, 1)
    assert found["memory_total"] <= found["memory_room"] == small.room < need
    nothing = planning.plan(automatic, replace(V5E, memory=10**6), 2, tokens=TOKENS, quick=True)
    assert "take more, or quantize" in planning.table(nothing)


def test_devices_that_are_not_here(monkeypatch):
    """Without their compiler they are this process's, which says so in one sentence."""
    monkeypatch.setattr(targets.importlib.util, "find_spec", lambda name: None)
    for kind, package in (("v5e", "libtpu is not"), ("H100", "no CUDA plugin of jax is")):
        made = targets.target(DEVICES[kind], 2)
        assert (made.compiler, made.devices) == ("cpu", jax.devices()[:2])
        assert made.note.startswith(f"compiled for CPU, since {package} installed (pip install")
    with pytest.raises(planning.LcoError, match="512 CPU devices are needed"):
        targets.target(V5E, 512)


@pytest.mark.parametrize("quantize", ["", "int8", "nf4"])
def test_useful_work_does_not_depend_on_how_weights_are_kept(configured, quantize):
    step = _step(configured(f"--config.model.quantize={quantize}"), 1, 1, 1)
    c, tokens = step.checkpoint.config, step.shape(0).tokens
    kv = c.num_kv_heads * c.head_dim
    matrices = 2 * c.hidden_size * (c.hidden_size + kv) + 3 * c.hidden_size * c.intermediate_size
    assert planning._useful_flops(step, step.shape(0)) == pytest.approx(
        4 * 2 * matrices * tokens, rel=0.01
    )


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--device=v5e", "--mesh=2,2"], "2,2 must be three sizes"),
        (["--device=v5e", "--mesh=a,1,1"], "'a' is no whole number"),
        (["--device=v5e", "--mesh=2,2,2", "--devices=4"], "not allowed with argument"),
        (["--device=v5e", "--devices=0"], "'0' is no whole number"),
        (["--device=v5e"], "one of the arguments --mesh --devices is required"),
        (["--device=v9", "--devices=2"], "invalid choice: 'v9'"),
        (
            ["--device=v5e", "--devices=2", "--config=configs/base.py", "--config.model.path=."],
            "config.json does not",
        ),
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


@pytest.mark.parametrize("key", ["num_hidden_layers", "hidden_size", "vocab_size"])
def test_sizes_beyond_reason_are_refused_before_anything_compiles(configured, tmp_path, key):
    config = GEOMETRY.config | {key: 10**8}
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    start = time.process_time()
    with pytest.raises(LcoError, match=rf"config\.json: .*{key} is 100000000, and must be at most"):
        planning.plan(configured(), DEVICES["v5e"], 1)
    assert time.process_time() - start < 5
