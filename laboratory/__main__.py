"""The laboratory, in one command.

    python -m laboratory --config=configs/lab.py [--output=runs/lab] [--config.KEY=VALUE …]
    python -m laboratory --config=configs/lab.py:short        # three minutes; decides nothing
    python -m laboratory --config=configs/lab.py:real --config.data_dir=DIR
                                                              # photos, written and spoken digits
    python -m laboratory --config=configs/lab.py:smollm2 --config.data_dir=DIR
                                                              # a real language model; hours
    python -m laboratory --config=configs/lab.py:options --config.generators=DIR
                                                              # additions to the recipe; hours
    python -m laboratory --config=configs/lab.py:sentences    # STS-B by us and by torch; hours

It writes report.md, its pictures and results.json into the output folder. The same command resumes
it.
"""

import os

# before torch is imported, whose threads would compete with XLA's
os.environ.setdefault("OMP_NUM_THREADS", "1")

import shlex
import sys

from laboratory import assembled, options, run, sentences
from lco_jax.core.errors import run_main
from lco_jax.training import cli


def main() -> int:
    """Parse the command line, run."""
    config, output = cli.start(__doc__)
    command = shlex.join(["python", "-m", "laboratory", *sys.argv[1:]])
    experiments = {"assembled": assembled, "options": options, "sentences": sentences}
    experiments.get(config.world, run).experiment(config, output, command)
    return 0


if __name__ == "__main__":
    run_main(main)
