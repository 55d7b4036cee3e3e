"""`python -m benchmarks fuzz`: fresh hostile inputs, and what comes of each."""

import argparse
import json
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from benchmarks.fuzz import adapters, checkpoints, media
from benchmarks.fuzz.case import Case, Job, fault_of
from benchmarks.fuzz.watch import Bounds, Watched
from lco_jax.checkpoint import builtin
from lco_jax.core.errors import LcoError

KINDS = {module.KIND: module.case for module in (media, checkpoints, adapters)}
TARGET = "benchmarks.fuzz.worker:Embedders"
OUTCOMES = ("vectors", "errors", "faults")


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`fuzz`."""
    parser = kinds.add_parser(
        "fuzz", parents=[common], help="hostile media, checkpoints and adapters; 1 if one does harm"
    )
    parser.add_argument("--media", type=int, default=1000, help="cases")
    parser.add_argument("--checkpoints", type=int, default=200, help="cases")
    parser.add_argument("--adapters", type=int, default=200, help="cases")
    parser.add_argument("--first", type=int, default=0, help="the number of each kind's first case")
    parser.add_argument("--only", default="", help="one case, for example media:123")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--seconds", type=float, default=60.0, help="of CPU time for a case")
    parser.add_argument("--mib", type=float, default=1536.0, help="above the memory before a case")
    parser.add_argument("--keep", type=Path, help="a folder for the files of faults")
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run the cases, one after the other."""
    runs = Runs(args, folder)
    numbers = _numbers(args)
    rows: dict[str, Counter[str]] = {kind: Counter() for kind, _ in numbers}
    found, faults = [], []
    try:
        for kind, number in tqdm(numbers, desc="fuzz", disable=len(numbers) == 1):
            one = runs.run(kind, number)
            found.append(one)
            rows[kind][one["outcome"]] += 1
            if one["fault"]:
                faults.append(one)
                tqdm.write(_line(one), file=sys.stderr)
    finally:
        runs.watched.close()
    return {
        "seed": args.seed,
        "bounds": {"seconds": args.seconds, "mib": args.mib},
        "kinds": {kind: dict(row) for kind, row in rows.items()},
        "slowest": max(found, key=lambda one: one["seconds"], default=None),
        "largest": max(found, key=lambda one: one["mib"], default=None),
        "faults": faults,
        "cases": found if args.only else [],
    }


def _numbers(args: argparse.Namespace) -> list[tuple[str, int]]:
    """(kind, number) of every case that is asked for."""
    if args.only:
        kind, _, number = args.only.partition(":")
        if kind not in KINDS or not number.isdecimal():
            raise LcoError(
                f"--only={args.only}: it is KIND:NUMBER, and a kind is one of {', '.join(KINDS)}"
            )
        return [(kind, int(number))]
    return [
        (kind, number)
        for kind in KINDS
        for number in range(args.first, args.first + getattr(args, kind))
    ]


class NoVectorError(Exception):
    """A job that is known to be right has no vector."""


class Runs:
    """Makes cases, runs them in a worker, and judges."""

    def __init__(self, args: argparse.Namespace, folder: Path, target: str = TARGET):
        self.seed, self.keep, self.folder = args.seed, args.keep, folder
        self.base = builtin.build(folder / "base")
        bounds = Bounds(args.seconds, args.mib)
        self.watched = Watched(target, bounds, folder / "worker.txt")
        self._vectors: dict[str, Any] = {}

    def run(self, kind: str, number: int) -> dict[str, Any]:
        """What came of one case. Its files are removed."""
        place = self.folder / f"{kind}-{number}"
        place.mkdir()
        case = KINDS[kind](self.seed, number, place, self.base)
        result = self.judge(case)
        if result["fault"] and self.keep is not None:
            kept = self.keep / place.name
            shutil.rmtree(kept, ignore_errors=True)
            self.keep.mkdir(parents=True, exist_ok=True)
            shutil.move(place, kept)
        shutil.rmtree(place, ignore_errors=True)
        return result

    def judge(self, case: Case) -> dict[str, Any]:
        """Run a case, and what its vector is compared with."""
        reply = self.watched.run(case.job)
        has_vector = "vector" in reply
        try:
            same = self._vector(case.same) if has_vector and case.same else None
            unlike = self._vector(case.unlike) if has_vector and case.unlike else None
            fault = fault_of(case, reply, same, unlike)
        except NoVectorError as error:
            fault = f"what it is compared with has no vector: {error}"
        outcome = "vectors" if has_vector else "errors"
        return {
            "case": case.address,
            "what": case.what,
            "outcome": "faults" if fault else outcome,
            "fault": fault,
            "said": reply.get("refused") or reply.get("said") or "",
            "seconds": reply["seconds"],
            "mib": reply["mib"],
        }

    def _vector(self, job: Job) -> np.ndarray:
        """The vector of a job that is known to be right. That of `base` is computed once."""
        key = json.dumps(job, sort_keys=True)
        if key in self._vectors:
            return self._vectors[key]
        reply = self.watched.run(job)
        if "vector" not in reply:
            raise NoVectorError(reply.get("ended") or reply.get("refused") or reply["raised"])
        vector = np.array(reply["vector"])
        if job.get("model") == str(self.base) and "adapter" not in job:
            self._vectors[key] = vector
        return vector


def _line(one: dict[str, Any]) -> str:
    return f"{one['case']:16}{one['fault']}\n{'':16}{one['what']}"


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [result["command"], "".join(f"{name:>13}" for name in ("", "cases", *OUTCOMES))]
    for kind, row in result["kinds"].items():
        counts = [sum(row.values()), *(row.get(name, 0) for name in OUTCOMES)]
        lines.append(f"{kind:>13}" + "".join(f"{count:13,}" for count in counts))
    for name in ("slowest", "largest"):
        one = result[name]
        if one:
            cost = f"{one['seconds']:.1f} s of CPU time, {one['mib']:,.0f} MiB"
            lines.append(f"{name}: {one['case']}, {cost} ({one['what']})")
    lines += [f"{one['case']}: {one['outcome']}\n{one['said']}" for one in result["cases"]]
    if result["faults"]:
        lines.append(f"faults (--seed={result['seed']} --only=CASE runs one alone):")
        lines += [_line(one) for one in result["faults"]]
    return "\n".join(lines)
