"""Real processes, for what threads cannot show."""

import os
import re
import socket
import subprocess
import sys
import time
from contextlib import suppress

import psutil


def free_port():
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def until(come, seconds=240.0):
    """Wait until something has come; fail after so long."""
    end = time.monotonic() + seconds
    while not come():
        assert time.monotonic() < end, f"it has not come within {seconds:g} s"
        time.sleep(0.01)


def command_of(process):
    """The command line of a psutil.Process; empty where it has ended, also while one looks."""
    with suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


def run_two(code):
    """Run a program of one job as `python -c CODE NUMBER PORT`, twice; (status, stdout, stderr) of
    each.
    """
    port = str(free_port())
    both = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(number), port],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for number in range(2)
    ]
    outputs = [one.communicate(timeout=250) for one in both]
    return [(one.returncode, *output) for one, output in zip(both, outputs, strict=True)]


def with_devices(count):
    """The environment of a process with so many devices, which compiles as fast as tests do."""
    flags = re.sub(r"(?<=device_count=)\d+", str(count), os.environ["XLA_FLAGS"])
    return {**os.environ, "XLA_FLAGS": flags}
