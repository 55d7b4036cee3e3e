"""Two processes that take turns, so that other load on the machine slows both alike.

Each side reads one word per line (`round`, `check PATH`, `profile PATH`, `finish`) and answers with
one line of JSON. The first answer comes after the first round, and says how many seconds have
passed since the process started.
"""

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lco_jax.core.errors import LcoError


def serve(sides: dict[str, Callable[[dict[str, Any]], Any]], path: str) -> None:
    """Run one side: build what the spec in `path` describes, and answer until `finish`."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    spec = json.loads(Path(path).read_text(encoding="utf-8"))
    side = sides[spec["kind"]](spec)
    if spec["role"] == "check":
        side.check(spec["dump"])
        print(json.dumps({}), file=answers)
        return
    first = side.round()
    print(json.dumps({**first, "first_s": time.time() - spec["started"]}), file=answers)
    for line in sys.stdin:
        word, _, argument = line.strip().partition(" ")
        if word == "profile":
            import jax

            with jax.profiler.trace(argument, create_perfetto_trace=True):
                answer = side.round()
        else:
            answer = getattr(side, word)()
        print(json.dumps(answer, default=float), file=answers)
        if word == "finish":
            return


def peak_memory() -> dict[str, float]:
    """The most memory this process has held, of the host and of its accelerator."""
    peak = {"peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}
    if "jax" in sys.modules:
        stats = sys.modules["jax"].local_devices()[0].memory_stats()
        if stats and "peak_bytes_in_use" in stats:
            peak["peak_device_gb"] = stats["peak_bytes_in_use"] / 2**30
    elif "torch" in sys.modules and sys.modules["torch"].cuda.is_available():
        peak["peak_device_gb"] = sys.modules["torch"].cuda.max_memory_allocated() / 2**30
    return peak


class Side:
    """A running side. module: `benchmarks.ours` or `benchmarks.peer`; spec: what it is to build."""

    def __init__(self, module: str, spec: dict[str, Any], folder: Path, role: str = "duel"):
        self.name = module.rsplit(".", 1)[-1]
        self.rounds: list[dict[str, Any]] = []
        path = folder / f"{self.name}-{role}.json"
        path.write_text(
            json.dumps({**spec, "role": role, "started": time.time()}), encoding="utf-8"
        )
        environment = {
            "JAX_COMPILATION_CACHE_DIR": str(folder / "compiled"),
            **os.environ,
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",  # both sides share a card
        }
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCHMARKS_VERBOSE") else subprocess.DEVNULL,
            text=True,
            env=environment,
        )
        self.first = self._answer()

    def ask(self, word: str) -> dict[str, Any]:
        """Send a word, wait for the answer."""
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        line = self.process.stdout.readline()
        if not line:
            raise LcoError(
                f"benchmarks.{self.name} ended without an answer; "
                "BENCHMARKS_VERBOSE=1 shows its output"
            )
        return json.loads(line)

    def round(self) -> None:
        """Take a turn."""
        self.rounds.append(self.ask("round"))

    def result(self) -> dict[str, Any]:
        """Medians, and the answer to `finish`."""
        seconds = [x["seconds"] for x in self.rounds]
        end = self.ask("finish")
        self.process.wait(timeout=60)
        losses = [x["loss"] for x in [self.first, *self.rounds] if "loss" in x]
        extra = {"losses": losses} if losses else {}
        extra |= (
            {"programs": int(self.rounds[-1]["programs"])} if "programs" in self.rounds[-1] else {}
        )
        return {
            "seconds": statistics.median(seconds),
            "all_seconds": seconds,
            "tokens": self.rounds[-1]["tokens"],
            "first_s": self.first["first_s"],
            **extra,
            **end,
        }


def duel(
    spec: dict[str, Any], folder: Path, rounds: int, peer: bool, profile: str
) -> dict[str, dict[str, Any]]:
    """Start the sides, let them take `rounds` turns each, and return what they measured."""
    sides = [Side("benchmarks.ours", spec, folder)]
    sides += [Side("benchmarks.peer", spec, folder)] if peer else []
    for i in tqdm(range(rounds), desc=spec["kind"], unit="round", file=sys.stderr):
        for side in sides if i % 2 == 0 else sides[::-1]:
            side.round()
    if profile:
        sides[0].ask(f"profile {profile}")
    return {side.name: side.result() for side in sides}
