"""Whether a device waits for its host, when a batch takes as long to make as a step to compute.

The loop, its data and its hosts' exchange are the real ones. The step is a stand-in: some seconds
of matrix products that depend on every process's tokens. Reading a batch is made to take as many
seconds. A device idles from the end of a step to the dispatch of the next.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

ROOT = Path(__file__).parents[1]
BATCH = 8  # records
SIDE = 64  # of the products' matrices
WARM = 3  # first steps, which are not measured
LIMIT = 600  # seconds that a run may take


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`loop`."""
    about = "how long devices idle between steps, and hosts' exchanges"
    parser = kinds.add_parser("loop", parents=[common], help=about)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a step, and of a batch")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--processes", type=int, nargs="*", default=[1, 2])
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Each number of processes, in processes of their own with a CPU device each."""
    runs = {}
    for count in args.processes:
        runs[str(count)] = _measure_one(args, folder, count)
    return {"seconds": args.seconds, "steps": args.steps, "runs": runs}


def _measure_one(args: argparse.Namespace, folder: Path, count: int) -> dict[str, float]:
    """The largest of each number over `count` processes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {
        "seconds": args.seconds,
        "steps": args.steps,
        "processes": count,
        "port": port,
        "workdir": str(folder / f"run{count}"),
    }
    flags = "--xla_force_host_platform_device_count=1"
    environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    outputs = [folder / f"{count}.{i}.json" for i in range(count)]
    started = []
    for i, output in enumerate(outputs):
        spec = json.dumps({**shared, "process": i, "out": str(output)})
        command = [sys.executable, "-m", "benchmarks.loop", spec]
        started.append(subprocess.Popen(command, cwd=ROOT, env=environment))
    for process in started:
        if process.wait(LIMIT):
            raise RuntimeError(f"{process.args} ended with {process.returncode}")
    found = [json.loads(output.read_text()) for output in outputs]
    return {key: max(one[key] for one in found) for key in found[0]}


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    head = f"{'processes':12}{'step s':>8}{'idle':>8}"
    head += f"{'exchanges a step':>18}{'collectives a step':>20}"
    lines = [f"a step and a batch of {result['seconds']} s each, {result['steps']} steps", head]
    for count, one in result["runs"].items():
        line = f"{count:12}{one['step_seconds']:8.3f}{one['idle']:8.2%}"
        lines.append(line + f"{one['exchanges']:18.2f}{one['collectives']:20.2f}")
    return "\n".join(lines)


@dataclass
class Times:
    """When each step was dispatched, and when it had ended, in seconds."""

    dispatched: list[float] = field(default_factory=list)
    ended: list[float] = field(default_factory=list)

    def gaps(self) -> list[float]:
        """Of each step but the first, the seconds that the device waited for it."""
        pairs = zip(self.dispatched[1:], self.ended, strict=False)
        return [max(0.0, dispatched - ended) for dispatched, ended in pairs]


class SlowReader:
    """A data iterator whose every batch takes some seconds more."""

    def __init__(self, iterator: Any, seconds: float):
        self.iterator, self.seconds = iterator, seconds

    def __iter__(self) -> "SlowReader":
        return self

    def __next__(self) -> Any:
        time.sleep(self.seconds)
        return next(self.iterator)

    def get_state(self) -> dict[str, Any]:
        return self.iterator.get_state()


def stand_in(workdir: Path, seconds: float, steps: int) -> Any:
    """A `Loop` with real data and no model, whose batches take some seconds."""
    import jax

    from lco_jax import loop, make_mesh
    from lco_jax.checkpoint import builtin
    from lco_jax.checkpoint.store import RunStore
    from lco_jax.configs import base
    from lco_jax.core.sharding import replicated
    from lco_jax.data import pipeline
    from lco_jax.data.layouts import choose_layout, draw
    from lco_jax.data.processor import Processor
    from lco_jax.data.record_stream import record_stream

    config = base.get_config()
    config.train.batch_size = BATCH
    config.checkpoint.every = 10**6
    mesh, processor = make_mesh(), Processor(builtin.build())
    layout = pipeline.Layout(BATCH, 0, processor.tokenizer.prefix)
    stream = record_stream({"a": _source()}, {"a": 1.0}, 0)
    batches = pipeline.local_batches(stream, layout, processor, config.data.max_length)
    sample = draw(batches, layout, media=False)
    layout = choose_layout(sample, layout, processor, mesh, config.data.max_length)
    workdir.mkdir(parents=True, exist_ok=True)
    job = SimpleNamespace(
        config=config,
        workdir=workdir,
        mesh=mesh,
        processor=processor,
        params={},
        total_steps=steps,
        upload=contextlib.nullcontext,
    )
    start = np.float32(np.eye(SIDE))
    state = {"x": jax.make_array_from_callback(start.shape, replicated(mesh), start.__getitem__)}
    iterator = SlowReader(pipeline.ahead(batches, 1), seconds)
    store = RunStore(workdir / "checkpoints", 1)
    return loop.Loop(job, store, state, 0, iterator, layout, train_step=None)


def _source() -> Any:
    """Records of texts of many lengths."""
    from lco_jax.data.records import Record
    from lco_jax.data.scan import ListSource

    texts = [(f"dog {i} runs", "dog " * (1 + i % 20)) for i in range(997)]
    return ListSource([Record(*pair, (), f"mem:{i}") for i, pair in enumerate(texts)])


def slow_step(mesh: Any, rounds: int) -> Any:
    """A step of so many products, one after another, which depend on every process's tokens."""
    import jax
    import jax.numpy as jnp

    from lco_jax.core.sharding import replicated

    def step(state: Any, params: Any, batch: Any) -> Any:
        batch = batch.gathered(jax.process_count())
        tokens = jnp.sum(batch.tokens.input_ids)  # split over processes: a collective
        x = state["x"] + 0.0 * tokens
        x = jax.lax.fori_loop(0, rounds, lambda _, x: jnp.tanh(x @ x), x)
        record_losses = jnp.zeros(len(batch.sequences)) + 0.0 * x[0, 0]
        one = jnp.float32(1)
        metrics = {
            "loss": one + x[0, 0],
            "record_losses": record_losses,
            "finite": jnp.isfinite(x[0, 0]),
            "tokens": tokens,
        }
        return {"x": x}, {**metrics, "learning_rate": one}

    return jax.jit(step, donate_argnums=0, out_shardings=replicated(mesh))


def rounds_of(seconds: float) -> int:
    """How many products take so long here."""
    import jax
    import jax.numpy as jnp

    x, rounds = jnp.eye(SIDE), 20_000
    burn = jax.jit(lambda x, n: jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ x), x))
    burn(x, rounds).block_until_ready()
    since = time.monotonic()
    burn(x, rounds).block_until_ready()
    return max(int(rounds * seconds / (time.monotonic() - since)), 1)


@contextlib.contextmanager
def timed(step: Any) -> Iterator[tuple[Any, Times]]:
    """(the step, when its calls returned and their results were there)."""
    times, results, more = Times(), [], threading.Semaphore(0)

    def watch() -> None:
        while True:
            more.acquire()
            if not results:
                return
            results.pop(0).block_until_ready()
            times.ended.append(time.monotonic())

    def call(*arguments: Any) -> Any:
        state, metrics = step(*arguments)
        times.dispatched.append(time.monotonic())
        results.append(metrics["loss"])
        more.release()
        return state, metrics

    watcher = threading.Thread(target=watch)
    watcher.start()
    yield call, times
    more.release()
    watcher.join()


def work(spec: dict[str, Any]) -> dict[str, float]:
    """One process's part."""
    import jax

    from lco_jax import loop

    if spec["processes"] > 1:
        address = f"127.0.0.1:{spec['port']}"
        jax.distributed.initialize(address, spec["processes"], spec["process"])
    started = stand_in(Path(spec["workdir"]), spec["seconds"], spec["steps"])
    step = slow_step(started.job.mesh, rounds_of(spec["seconds"]))
    with counted() as (exchanges, collectives), timed(step) as (call, times):
        started.train_step = call
        loop.run(started)
    steady = slice(WARM, spec["steps"] - 1)
    spent = times.ended[-1] - times.ended[WARM]
    return {
        "step_seconds": float(np.mean(np.diff(times.ended)[steady])),
        "idle": sum(times.gaps()[steady]) / spent,
        "exchanges": exchanges[0].count / spec["steps"],
        "collectives": sum(at < times.dispatched[-1] for at in collectives) / spec["steps"],
    }


@contextlib.contextmanager
def counted() -> Iterator[tuple[list[Any], list[float]]]:
    """Within: the `Exchange`s that the loop opens, and when each collective of hosts was called."""
    from jax.experimental import multihost_utils

    from lco_jax import loop

    exchanges, collectives = [], []
    opened, gather = loop.Exchange, multihost_utils.process_allgather

    def open_exchange() -> Any:
        exchanges.append(opened())
        return exchanges[-1]

    def timed_gather(*arguments: Any, **options: Any) -> Any:
        collectives.append(time.monotonic())
        return gather(*arguments, **options)

    loop.Exchange, multihost_utils.process_allgather = open_exchange, timed_gather
    yield exchanges, collectives
    loop.Exchange, multihost_utils.process_allgather = opened, gather


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    Path(given["out"]).write_text(json.dumps(work(given)))
