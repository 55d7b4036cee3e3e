"""A worker that is watched: its time, its memory, and whether it lives."""

import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from benchmarks.processes import family
from lco_jax.core.files import cache_folder

ROOT = Path(__file__).parents[2]
EVERY = 0.05  # seconds from one look to the next
IDLE_SECONDS = 15.0  # a worker that does nothing for so long hangs
IDLE_SHARE = 0.01  # of a CPU, which is nothing
CASES = 60  # after which a worker is replaced, since compiled programs stay in its memory


class Bounds(NamedTuple):
    """What a job may take. seconds: of CPU time. mib: above what the worker had before it."""

    seconds: float
    mib: float


START = Bounds(300.0, 8000.0)  # of a worker, until it takes its first job


class Watched:
    """A worker, started when it is needed, and replaced when a job has ended it."""

    def __init__(self, target: str, bounds: Bounds, log: Path):
        self.target = target
        self.bounds = bounds
        self.log = log
        self.process: subprocess.Popen | None = None
        self.jobs = 0

    def run(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The worker's reply, or why it "ended"; with "seconds" of CPU time and "mib"."""
        if self.jobs >= CASES:
            self.close()
        if self.process is None:
            self._start()
        self.jobs += 1
        meter = Meter(self.process.pid)
        with suppress(BrokenPipeError):  # it has ended on its own, as `_wait` will see
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        reply = self._wait(meter, self.bounds)
        if "ended" in reply:
            self.close()
        return {**reply, "seconds": meter.seconds, "mib": meter.mib}

    def close(self) -> None:
        """End the worker and all that it started."""
        if self.process is None:
            return
        for process in reversed(family(self.process.pid)):
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self.process.communicate()
        self.process = None

    def _start(self) -> None:
        environment = {
            **os.environ,
            # another worker then need not compile again
            "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "fuzz-programs"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PLATFORMS": "cpu",
            "JAX_TRACEBACK_FILTERING": "off",  # or a traceback would end with a remark on that
        }
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "benchmarks.fuzz.worker", self.target],
                cwd=ROOT,
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
            )
        self.jobs = 0
        ready = self._wait(Meter(self.process.pid), START)
        if ready != {"ready": True}:
            self.close()
            raise RuntimeError(f"the worker did not start: {ready}")

    def _wait(self, meter: "Meter", bounds: Bounds) -> dict[str, Any]:
        """The next line of the worker, if it comes within the bounds."""
        replies = self.process.stdout
        while True:
            come, _, _ = select.select([replies], [], [], EVERY)
            meter.look()
            if come:
                line = replies.readline()  # a worker writes a line at once
                return json.loads(line) if line.endswith(b"\n") else {"ended": self._how()}
            if meter.mib > bounds.mib:
                return {"ended": f"memory: more than {bounds.mib:,.0f} MiB"}
            if meter.seconds > bounds.seconds:
                return {"ended": f"slow: more than {bounds.seconds:g} s of CPU time"}
            if meter.is_idle():
                return {"ended": f"hang: idle for {IDLE_SECONDS:g} s"}

    def _how(self) -> str:
        """How a worker ended that has no more to say."""
        status = self.process.wait()
        how = signal.Signals(-status).name if status < 0 else f"status {status}"
        said = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"crash: {how}; {said[-1][:200] if said else 'nothing said'}"


class Meter:
    """What a process and its children take from now on. seconds: of CPU time; mib: at most."""

    def __init__(self, process: int):
        self.process = process
        self.seconds = self.mib = 0.0
        for one in family(process):
            with suppress(OSError):  # from now on, the most that was resident is counted anew
                Path(f"/proc/{one.pid}/clear_refs").write_text("5")
        self._used: dict[int, float] = {}
        self._look_at_all()
        self._seconds_before = sum(self._used.values())
        self._mib_before = self._resident
        self._awake = (time.monotonic(), 0.0)

    def look(self) -> None:
        """Look once."""
        self._look_at_all()
        self.seconds = sum(self._used.values()) - self._seconds_before
        self.mib = max(self.mib, self._resident - self._mib_before)

    def is_idle(self) -> bool:
        """Whether nothing was done for a while."""
        since, seconds = self._awake
        if self.seconds - seconds > IDLE_SHARE * IDLE_SECONDS:
            self._awake = (time.monotonic(), self.seconds)
            return False
        return time.monotonic() - since > IDLE_SECONDS

    def _look_at_all(self) -> None:
        self._resident = 0.0
        for one in family(self.process):
            with suppress(OSError, IndexError):  # it is gone; psutil does not know VmHWM
                status = Path(f"/proc/{one.pid}/status").read_text(encoding="utf-8")
                self._resident += int(status.split("VmHWM:")[1].split()[0]) / 1024
            with suppress(psutil.NoSuchProcess):
                times = one.cpu_times()
                self._used[one.pid] = times.user + times.system
