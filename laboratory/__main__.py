"""The laboratory, in one command.

    python -m laboratory --config=configs/lab.py [--workdir=runs/lab] [--config.KEY=VALUE …]
    python -m laboratory --config=configs/lab.py:short        # three minutes; decides nothing
    python -m laboratory --config=configs/lab.py:real --config.data_dir=DIR
                                                              # photos, written and spoken digits

It leaves report.md, its pictures and results.json in the workdir. Started again, it goes on.
"""

import os

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # before torch, if it is there, whose threads would fight with XLA's

import shlex
import sys

from laboratory.run import experiment
from lco_jax.core.errors import run_main
from lco_jax.training import cli


def main() -> int:
    """Parse the command line, run."""
    experiment(*cli.start(__doc__), shlex.join(["python", "-m", "laboratory", *sys.argv[1:]]))
    return 0


if __name__ == "__main__":
    run_main(main)
