"""Measure our work beside the original's, in one run, and print a table.

    python -m benchmarks train --preset=small --dropout=0          training triplets a second
    python -m benchmarks encode                                    texts a second
    python -m benchmarks device                                    one GPU, in 8 minutes
    python -m benchmarks fuzz --seed=0                             hostile inputs; status 1: faults

Each side runs in its own process, and they take turns. With `--json` the last line is JSON; `ratio`
is one of its keys.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import (
    compiled,
    device,
    feed,
    infonce,
    kernels,
    loop,
    media,
    scaling,
    serving,
    survival,
    text,
    vocabulary,
)
from benchmarks.fuzz import command as fuzz
from lco_jax.core.errors import run_main
from lco_jax.core.files import write_json


def parser_of() -> argparse.ArgumentParser:
    """The command line of every benchmark."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__, formatter_class=_Help)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--json", action="store_true", help="end with one line of JSON")
    common.add_argument("--out", type=Path, help="write the JSON to this file, too")
    common.add_argument("--rounds", type=int, default=5, help="turns that each side takes")
    common.add_argument("--profile", default="", help="a folder for a trace of one of our rounds")
    kinds = parser.add_subparsers(dest="kind", required=True)
    modules = (text, media, feed, infonce, vocabulary, scaling, serving, survival)
    for module in (*modules, kernels, loop, compiled, device, fuzz):
        module.add_parsers(kinds, common)
    return parser


def main() -> int:
    """Parse, measure, print, and write where asked to. 1 for a `fuzz` that finds a fault."""
    args = parser_of().parse_args()
    with tempfile.TemporaryDirectory(prefix="benchmarks-") as folder:
        result = {"benchmark": args.kind, **args.measure(args, Path(folder))}
    result |= {"command": "python -m benchmarks " + " ".join(sys.argv[1:]), "machine": _machine()}
    print(args.table(result))
    if args.out:
        write_json(args.out, result)
    if args.json:
        print(json.dumps(result))
    return 1 if result.get("faults") else 0


class _Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def _machine() -> dict[str, Any]:
    import jax

    from lco_jax import __version__

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    device = jax.devices()[0].device_kind
    cpu = next(
        (x.split(":")[1].strip() for x in _cpuinfo() if x.startswith("model name")),
        platform.processor(),
    )
    versions = {"jax": jax.__version__, "python": platform.python_version(), "lco_jax": __version__}
    return {
        "device": device,
        "cpu": cpu,
        "cores": len(_affinity()),
        **versions,
        "commit": commit.stdout.strip(),
    }


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text(encoding="utf-8").splitlines() if path.exists() else []


def _affinity() -> set[int]:
    return (
        os.sched_getaffinity(0)
        if hasattr(os, "sched_getaffinity")
        else set(range(os.cpu_count() or 1))
    )


if __name__ == "__main__":
    run_main(main)
