"""Whether work survives: training that is killed at random moments; and memory over many steps."""

import argparse
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from benchmarks.embed_survival import embed_survival, embed_table
from benchmarks.processes import resident
from lco_jax.core.errors import PEER_LOST
from lco_jax.training.metrics import read_metrics

ROOT = Path(__file__).parents[1]
EVERY = 4  # steps from one checkpoint to the next
LIMIT = 3600.0  # seconds that no part may take
SMALL = (
    "--config=configs/base.py",
    "--config.eval.path=",
    "--config.export.merged=False",
    "--config.lora.rank=4",
    "--config.train.batch_size=8",
    f"--config.checkpoint.every={EVERY}",
    "--config.optimizer.warmup_steps=4",
    # at the config's 2e-3, what the order of a sum rounds off grows a hundredfold in as many
    # steps, with no kill at all
    "--config.optimizer.learning_rate=1e-4",
)


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`survival` and `endurance`."""
    parser = kinds.add_parser(
        "survival", parents=[common], help="kill a run at random moments, and resume it"
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=4)
    parser.add_argument("--devices", type=int, default=2, help="of each process")
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument(
        "--then",
        nargs="*",
        default=["1x8", "2x4", "1x1"],
        help="processes x devices to end on, too",
    )
    group = parser.add_argument_group("an embedding on Ray, instead of a training run")
    group.add_argument("--embed", action="store_true", help="kill its actors and its driver")
    group.add_argument("--items", type=int, default=20_000)
    group.add_argument("--images", type=int, default=2000, help="of the items")
    group.add_argument("--actors", type=int, default=4)
    group.add_argument("--part-size", type=int, default=200)
    group.add_argument("--bucket", action="store_true", help="write to a folder on a stand-in")
    parser.set_defaults(measure=survival, table=survival_table)
    parser = kinds.add_parser(
        "endurance", parents=[common], help="resident memory early and late in a long run"
    )
    parser.add_argument("--steps", type=int, default=10_000)
    parser.set_defaults(measure=endurance, table=endurance_table)


class Job:
    """Processes of one run, whose words go to files beside its workdir."""

    def __init__(self, workdir: Path, processes: int, devices: int, *flags: str):
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        given = os.environ.get("XLA_FLAGS", "")  # of two that say the same, XLA takes the last
        flags_of_xla = f"{given} --xla_force_host_platform_device_count={devices}"
        environment = {**os.environ, "XLA_FLAGS": flags_of_xla}
        command = [sys.executable, "-m", "lco_jax.train", *SMALL, f"--output={workdir}", *flags]
        joined = (
            [f"--coordinator=127.0.0.1:{port}", f"--num-processes={processes}"]
            if processes > 1
            else []
        )
        self.workdir, self.metrics, self.processes = (
            workdir,
            workdir / "metrics.jsonl",
            list[subprocess.Popen](),
        )
        self.said = [workdir.with_name(f"{workdir.name}.{i}.txt") for i in range(processes)]
        for i, path in enumerate(self.said):
            one = [*command, *joined, f"--process-id={i}"] if joined else command
            with open(path, "w", encoding="utf-8") as file:
                self.processes.append(
                    subprocess.Popen(
                        one, cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT
                    )
                )

    def until(self, lines: int) -> None:
        """Wait for so many lines of metrics, or the end."""
        self._wait(
            lambda: len(read_metrics(self.metrics)) >= lines or self.processes[0].poll() is not None
        )

    def ended(self) -> list[int]:
        """Wait for all to end: their statuses."""
        self._wait(lambda: all(one.poll() is not None for one in self.processes))
        return [one.returncode for one in self.processes]

    def lost(self) -> bool:
        """Whether they, when ended, are to be started again, as a launcher would; raises for any
        other failure.
        """
        statuses, words = (
            self.ended(),
            "\n".join(path.read_text(encoding="utf-8")[-2000:] for path in self.said),
        )
        if any(status not in (0, PEER_LOST, -signal.SIGABRT) for status in statuses):
            raise RuntimeError(f"ended with {statuses}\n{words}")
        if lost := any(statuses):
            print(f"ended with {statuses}, starting again\n{words}", file=sys.stderr, flush=True)
        return lost

    def _wait(self, come: Callable[[], bool]) -> None:
        end = time.monotonic() + LIMIT
        while not come():
            if time.monotonic() > end:
                for one in self.processes:
                    one.kill()
                raise RuntimeError(f"{self.workdir} stalls")
            time.sleep(0.01)


def survival(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """An uninterrupted run of one process; one that is killed, one process or all; and what both
    say of every step.
    """
    if args.embed:
        return embed_survival(args, folder)
    flags = [f"--config.train.steps={args.steps}", "--config.train.patience=300"]
    shards = args.processes * args.devices
    quiet = _finished(folder / "quiet", 1, shards, *flags)
    chance, killed, moments = random.Random(args.seed), folder / "killed", Counter[str]()
    statuses, waits = Counter[str](), []
    kill = restarts = 0
    while kill < args.kills:
        job, before = (
            Job(killed, args.processes, args.devices, *flags),
            len(read_metrics(killed / "metrics.jsonl")),
        )
        base = before // EVERY * EVERY  # where it resumes, or a little before
        moment = ("step", "save", "start")[kill % 3] if before < args.steps - 4 * EVERY else "start"
        if moment == "start":
            time.sleep(chance.uniform(0.5, 10))
        elif moment == "step":
            job.until(base + chance.randrange(1, 2 * EVERY))
            time.sleep(chance.uniform(0, 0.3))
        else:
            job.until(base + EVERY)
            time.sleep(chance.uniform(0, 0.05))
        victims = job.processes if kill % 2 or moment == "start" else [chance.choice(job.processes)]
        if any(one.poll() is not None for one in victims):  # a starved machine: a barrier timed out
            restarts += job.lost()
            continue
        for one in victims:
            one.send_signal(signal.SIGKILL)
        began = time.monotonic()
        left = [status for status in job.ended() if status != -signal.SIGKILL]
        moments[moment] += 1
        kill += 1
        what = f"kill {kill} ({moment}, {len(victims)} of {len(job.processes)})"
        print(
            f"{what}: {len(read_metrics(killed / 'metrics.jsonl'))} steps; others {left}",
            file=sys.stderr,
            flush=True,
        )
        if left:
            waits.append(time.monotonic() - began)
            statuses.update("76" if status == PEER_LOST else str(status) for status in left)
    want = read_metrics(quiet)
    result = {
        "kills": dict(moments),
        "killed_at": len(read_metrics(killed / "metrics.jsonl")),
        "steps": args.steps,
    }
    result |= {
        "restarts": restarts,
        "others": dict(statuses),
        "others_seconds": sorted(waits),
        "ends": {},
    }
    for layout in (f"{args.processes}x{args.devices}", *args.then):
        workdir = folder / f"on_{layout}"
        shutil.copytree(killed, workdir)
        got = read_metrics(_finished(workdir, *map(int, layout.split("x")), *flags))
        result["ends"][layout] = {
            "loss": max(abs(a["loss"] - b["loss"]) for a, b in zip(got, want, strict=True)),
        }
    return result


def _finished(workdir: Path, processes: int, devices: int, *flags: str) -> Path:
    """The metrics of a run that is started until it has come to its end."""
    while (job := Job(workdir, processes, devices, *flags)).lost():
        pass
    return job.metrics


def survival_table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    if "items" in result:
        return embed_table(result)
    kills, others = (
        ", ".join(f"{n} {what}" for what, n in result[key].items()) for key in ("kills", "others")
    )
    lines = [
        result["command"],
        f"{sum(result['kills'].values())} kills (at: {kills}), the last at step "
        f"{result['killed_at']} of {result['steps']}; statuses of those not killed: {others}",
        "after " + ", ".join(f"{seconds:.1f}" for seconds in result["others_seconds"]) + " s",
        f"{'then ended on':16}{'largest difference of a loss':>30}",
    ]
    for layout, end in result["ends"].items():
        lines.append(f"{layout:16}{end['loss']:30.2e}")
    return "\n".join(lines)


def endurance(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Resident memory of a run after a tenth of its steps, and at its end."""
    flags = [f"--config.train.steps={args.steps}", "--config.checkpoint.every=500"]
    job, mib = Job(folder / "long", 1, 1, *flags), {}
    for step in (args.steps // 10, args.steps // 2, args.steps - 20):
        while len(read_metrics(job.metrics)) < step:
            if job.processes[0].poll() is not None:
                raise RuntimeError(f"ended early with {job.ended()}")
            time.sleep(1)
        mib[step] = resident(psutil.Process(job.processes[0].pid))
    job.lost()
    return {"steps": args.steps, "mib": mib}


def endurance_table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [
        f"after {step:6,} steps {mib:8.1f} MiB resident" for step, mib in result["mib"].items()
    ]
    return "\n".join([result["command"], *lines])
