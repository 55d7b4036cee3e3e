"""All that one accelerator is asked for, in one command that ends in time.

Each part is another of these benchmarks, in a process that is ended when its time is up. Its JSON
is written as soon as it is known, and a part whose JSON is there is not run again: so the command
may be killed and given again.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError
from lco_jax.core.files import cache_folder

ROOT = Path(__file__).parents[1]
OUT = ROOT / "benchmarks" / "results" / "device"


@dataclass(frozen=True)
class Part:
    """command: a benchmark and its flags. share: of the budget, beside the other parts' shares.

    duel: whether the peer takes turns, where torch is installed.
    """

    command: str
    share: float
    duel: bool = False


_TRAIN = "train --dtype=bfloat16 --batch=768 --micro=33 --dropout=0.05"
PARTS = {
    "matmul": Part("matmul", 0.06),
    "kernels": Part("kernels --rounds=10", 0.12),
    "train-7b": Part(f"{_TRAIN} --preset=7b --remat=attention --rounds=2", 0.27, duel=True),
    "train-3b": Part(f"{_TRAIN} --preset=3b --remat=gate --rounds=2", 0.21, duel=True),
    "nf4-7b": Part(
        f"{_TRAIN} --preset=7b --remat=attention --rounds=2 --quantize=nf4 --no-peer", 0.13
    ),
    "int8-7b": Part(
        f"{_TRAIN} --preset=7b --remat=attention --rounds=2 --quantize=int8 --no-peer", 0.11
    ),
    "encode-3b": Part(
        "encode --preset=3b --dtype=bfloat16 --batch=4096 --rounds=3 --no-peer", 0.10
    ),
}
_SMALL = "train --preset=tiny --batch=6 --micro=4 --rounds=1 --no-check"
SMALL = {
    "matmul": Part("matmul --small --rounds=1", 0.1),
    "kernels": Part("kernels --small --rounds=1", 0.2),
    "train-7b": Part(_SMALL, 0.3, duel=True),
    "nf4-7b": Part(
        f"{_SMALL} --quantize=int8 --no-peer", 0.2
    ),  # tiny rows are no whole blocks of NF4
    "encode-3b": Part("encode --preset=tiny --batch=20 --rounds=1 --no-peer --no-check", 0.2),
}


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`device`."""
    parser = kinds.add_parser(
        "device", parents=[common], help="all of these on one accelerator, in a time budget"
    )
    parser.add_argument("--budget", type=float, default=480, help="seconds for all parts together")
    parser.add_argument("--parts", default="", help=f"some of: {', '.join(PARTS)}; without it, all")
    parser.add_argument(
        "--folder", type=Path, default=OUT, help="where each part's JSON is written"
    )
    parser.add_argument(
        "--small", action="store_true", help="sizes for a CPU: to see that it works"
    )
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, _: Path) -> dict[str, Any]:
    """Run the parts that have no JSON yet, in order, while there is time."""
    parts = SMALL if args.small else PARTS
    asked = args.parts.split(",") if args.parts else list(parts)
    for name in asked:
        if name not in parts:
            known = ", ".join(parts)
            raise LcoError(f"--parts={args.parts}: there is no {name}; there are: {known}")
    args.folder.mkdir(parents=True, exist_ok=True)
    files = {name: args.folder / f"{name}.json" for name in asked}
    missing = {name: parts[name] for name in asked if not files[name].exists()}
    outcomes = _run_all(missing, files, args.budget)
    found = {}
    for name, file in files.items():
        if file.exists():
            found[name] = json.loads(file.read_text(encoding="utf-8"))
    absent = {name: outcome for name, outcome in outcomes.items() if name not in found}
    return {"parts": found, "not_there": absent}


def _run_all(parts: dict[str, Part], files: dict[str, Path], budget: float) -> dict[str, str]:
    """Run parts in `budget` seconds. The time that a part leaves goes to those after it."""
    end = time.monotonic() + budget
    shares = sum(part.share for part in parts.values())
    outcomes = {}
    for name, part in parts.items():
        seconds = (end - time.monotonic()) * part.share / shares
        shares -= part.share
        outcomes[name] = run(part, files[name], seconds)
        print(f"{name}: {outcomes[name]}", file=sys.stderr, flush=True)
    return outcomes


def run(part: Part, file: Path, seconds: float) -> str:
    """Run a part, and end it after `seconds` with every process it started. Returns how it went."""
    if seconds < 1:
        return "no time was left"
    without_peer = part.duel and importlib.util.find_spec("torch") is None
    command = [sys.executable, "-m", "benchmarks", *part.command.split(), f"--out={file}"]
    if without_peer:
        command.append("--no-peer")
    compiled = str(cache_folder() / "compiled")  # for when it is ended and given again
    environment = {"JAX_COMPILATION_CACHE_DIR": compiled, **os.environ, "BENCHMARKS_VERBOSE": "1"}
    log = file.with_suffix(".log")
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as output:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # so that the processes it starts end with it
        )
        try:
            code = process.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            return f"ended after {seconds:.0f} s; see {log}"
        finally:
            _end(process)
    if code:
        return f"failed; see {log}"
    note = ", without the peer: torch is not installed" if without_peer else ""
    return f"done in {time.monotonic() - start:.0f} s{note}"


def _end(process: subprocess.Popen) -> None:
    try:
        os.killpg(process.pid, signal.SIGKILL)
    except ProcessLookupError:
        return
    process.wait()


def table(result: dict[str, Any]) -> str:
    """A line for each part."""
    lines = [result["command"]]
    for name, part in result["parts"].items():
        numbers = _chosen(part, "ratio", "tflops", "ceiling_tflops", "mfu")
        numbers |= _chosen(part.get("ours", {}), "seconds", "per_second", "peak_device_gb")
        shown = "  ".join(f"{key} {value:.4g}" for key, value in numbers.items())
        lines.append(f"{name:<12}{shown or 'see its JSON'}")
    lines += [f"{name:<12}{reason}" for name, reason in result["not_there"].items()]
    return "\n".join(lines)


def _chosen(numbers: dict[str, Any], *keys: str) -> dict[str, Any]:
    return {key: numbers[key] for key in keys if key in numbers}
