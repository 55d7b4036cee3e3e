"""Two real processes of one jax job, for what threads cannot show."""

import socket
import subprocess
import sys


def run_two(code):
    """Run a program as `python -c CODE NUMBER PORT`, twice; (status, stdout, stderr) of each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
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
