"""What fits: the choice as memory shrinks, what it costs, and runs that choose."""

import json
import logging
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lco_jax import LcoError, make_mesh
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core import lora
from lco_jax.core.stream_shapes import Shape
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import Decoder
from lco_jax.models.pooling import embed
from lco_jax.train import train
from lco_jax.training import cli, memory
from lco_jax.training.memory import GIB, Candidate
from lco_jax.training.metrics import read_metrics

ROOT = Path(__file__).parent.parent
GEOMETRY = DecoderConfig(1024, 256, 768, 4, 4, 2, 64, 1e-6, 1e4, (32,), 4096, True, True)
COST = {"full": 1, "attention": 2, "gate": 3, "mlp": 4, "none": 9}


def chosen(available, remat="auto", chunk=-1, real=None, tokens=4000):
    """(choice, what was compiled) if a step needs 500 and the cost of its tokens."""
    asked = []

    def rough(one):
        return 500 + COST[one.remat] * (one.chunk_tokens or tokens)

    def need(one):
        asked.append(one)
        return (real or rough)(one)

    options = memory.candidates(remat, chunk, tokens, backend="tpu")
    return memory.choose(available, options, rough, need)[:2], asked


def test_the_choice_as_memory_shrinks():
    """none → … → full → chunks → an error, each down to the byte, with one compilation."""
    for policy, factor in COST.items():
        assert chosen(500 + 4000 * factor) == ((policy, 0), [(policy, 0)])
    assert chosen(500 + 36_000 - 1)[0] == ("mlp", 0)
    assert chosen(500 + 3999)[0] == ("full", 2048)
    assert chosen(500 + 1000)[0] == ("full", 768)
    assert chosen(500 + 128)[0] == ("full", 128)
    assert chosen(500 + 18_432, "none")[0] == ("none", 2048)  # only the chunk is to be chosen
    assert chosen(500 + 4 * 256, chunk=256)[0] == ("mlp", 256)  # only the policy
    with pytest.raises(
        LcoError, match=r"needs 0.0 GiB a device with remat full, chunks of 128 tokens"
    ):
        chosen(500 + 127)
    with pytest.raises(LcoError, match=r"config.train.chunk_tokens to -1"):
        chosen(1000, chunk=0)


def test_a_wrong_guess_is_put_right_by_the_compiler():
    """Estimates that are far off cost at most three programs, and what is chosen fits."""
    real = {"none": 30_000, "mlp": 20_000, "gate": 15_000, "attention": 11_000, "full": 7000}

    def more(one):
        return real[one.remat] if not one.chunk_tokens else 2000 + one.chunk_tokens

    for there in range(3000, 40_000, 500):
        choice, asked = chosen(there, real=more)
        assert len(asked) <= memory.MOST
        assert more(Candidate(*choice)) <= there
    assert chosen(11_500, real=more)[0] == ("attention", 0)
    choice, asked = chosen(9000, real=lambda one: {"attention": 9100, "full": 5000}[one.remat])
    assert choice == ("full", 0)
    assert asked == [("attention", 0), ("full", 0)]


def test_a_tpus_refusal_says_how_much_it_takes():
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, "
    message += "the total (18.25G) exceeds available HBM (15.75G)."
    assert memory.refused_bytes(jax.errors.JaxRuntimeError(message)) == int(18.25 * GIB)
    message = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. "
    message += "Used 512.00M of 15.75M hbm. Exceeded hbm capacity"
    assert memory.refused_bytes(jax.errors.JaxRuntimeError(message)) == GIB // 2
    message = "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
    message += "temporaries (349.50T) exceeds available HBM (15.75G)."
    assert memory.refused_bytes(jax.errors.JaxRuntimeError(message)) == int(349.5 * 1024 * GIB)
    for other in ("INTERNAL: Used 1.00G of 2.00G", "RESOURCE_EXHAUSTED: no disk"):
        with pytest.raises(jax.errors.JaxRuntimeError):
            memory.refused_bytes(jax.errors.JaxRuntimeError(other))


def test_free_memory_is_the_least_that_machine_and_cgroups_leave(tmp_path):
    def write(name, text):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    write("proc/meminfo", "MemTotal: 64 kB\nMemAvailable:   48 kB\n")
    assert memory.free_memory(tmp_path) == 48 * 1024
    write("proc/self/cgroup", "0::/job/step\n")
    for name, limit, used, cached in (("job/step", "max", 5000, 0), ("job", "20000", 9000, 1000)):
        write(f"sys/fs/cgroup/{name}/memory.max", f"{limit}\n")
        write(f"sys/fs/cgroup/{name}/memory.current", f"{used}\n")
        write(
            f"sys/fs/cgroup/{name}/memory.stat", f"anon {used - cached}\ninactive_file {cached}\n"
        )
    assert memory.free_memory(tmp_path) == 20000 - 9000 + 1000
    write("proc/meminfo", "MemAvailable:   8 kB\n")
    assert memory.free_memory(tmp_path) == 8 * 1024


@pytest.mark.parametrize("policy", ["full", "none"])
def test_no_frozen_weight_is_kept(policy):
    """A layer more costs its activations, and not its weights once more."""

    def kept(layers):
        config, settings = replace(GEOMETRY, num_layers=layers), lora.LoraConfig(rank=4)
        params = abstract_params(config)
        adapters = jax.eval_shape(lambda key: lora.init(key, params, settings), jax.random.key(0))
        decoder = Decoder(config, jnp.float32, policy)

        def residuals(adapters, params, tokens):
            def run(a):
                return embed(decoder, {"decoder": lora.attach(params, a, settings)}, tokens)

            _, backward = jax.vjp(run, adapters)
            inputs = {id(x) for x in jax.tree.leaves((adapters, params, tokens))}
            return [x for x in jax.tree.leaves(backward) if id(x) not in inputs]

        tokens = memory.abstract_tokens(Shape(8, {8: 1}), (1,), ())
        return memory.stored_bytes(jax.eval_shape(residuals, adapters, params, tokens))

    weights = memory.stored_bytes(abstract_params(GEOMETRY)["layers"]) / GEOMETRY.num_layers
    assert 8 * GEOMETRY.hidden_size * 4 <= kept(4) - kept(3) < weights / 4


class Compilations:
    """Counts what jax compiles, and does not find on disk."""

    def __init__(self):
        self.names = []
        jax.monitoring.register_event_duration_secs_listener(self.heard)

    def heard(self, event, seconds, **more):
        if event == "/jax/core/compile/backend_compile_duration":
            self.names.append(more.get("fun_name"))

    def close(self):
        jax.monitoring.unregister_event_duration_listener(self.heard)


@pytest.fixture
def run(tmp_path, monkeypatch, cache):
    """(name, flags) -> losses of two steps. run.told: the compilations of the step."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("lco_jax.job.make_mesh", lambda **_: make_mesh(devices=jax.devices()[:1]))
    # few adapters: each takes time to compile
    few = r"--config.lora.targets=layers\.(self_attn\.k|mlp\.down)_proj"
    small = [
        "--config=configs/tiny.py", "--config.train.steps=2", "--config.train.batch_size=8",
        "--config.eval.path=", "--config.optimizer.warmup_steps=1",
        "--config.export.merged=False", "--config.lora.rank=4", few,
    ]  # fmt: skip
    monkeypatch.setattr(memory, "cache_folder", lambda: tmp_path / "kept")
    heard = Compilations()

    def run(name, *flags):
        heard.names.clear()
        train(cli.parse(["train", *small, *flags], "").config, tmp_path / name)
        run.told = [name for name in heard.names if name == "jit(update)"]
        return [line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl")]

    yield run
    heard.close()


@pytest.mark.slow
def test_the_program_that_was_compiled_for_the_choice_is_the_runs(run, tmp_path, caplog):
    """A run asks, compiles its step only once, and knows the answer at the second start."""
    caplog.set_level(logging.DEBUG, "lco_jax.loop")
    first = run("first")
    assert len(run.told) == 1
    assert "remat mlp, the batch in one chunk: 0." in caplog.text
    (known,) = (tmp_path / "kept" / "memory").iterdir()
    assert json.loads(known.read_text())["bytes"] > 2**20
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(memory, "peak_bytes", lambda _: pytest.fail("it was compiled again"))
        assert run("second") == first
    assert len(run.told) == 1
    known.write_text("torn")
    assert memory._read(known) is None  # it is made again, as at the first start


@pytest.mark.slow
def test_a_run_with_little_memory_chunks_and_learns_the_same(run, monkeypatch, caplog):
    """Chunks change no loss, and a run resumes on a device with another memory."""
    caplog.set_level(logging.DEBUG, "lco_jax.loop")
    auto = "--config.train.chunk_tokens=-1"
    fixed = run("fixed", "--config.model.remat=full")
    real = memory.choose

    def little(there, options, rough, need):
        between = (need(options[-1]) + need(Candidate("full", 0))) // 2
        return real(between, options, rough, need)

    monkeypatch.setattr(memory, "choose", little)
    chunked = run("auto", auto)
    assert "remat full, chunks of" in caplog.text
    caplog.clear()
    assert np.abs(np.subtract(fixed, chunked)).max() < 1e-5
    monkeypatch.setattr(memory, "choose", real)
    assert run("auto", auto) == chunked  # resumed
    assert "the batch in one chunk" in caplog.text
