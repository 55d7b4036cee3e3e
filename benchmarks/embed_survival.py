"""Whether an embedding on Ray survives: actors and the driver are killed at random moments, and
memory stays flat.
"""

import argparse
import importlib.util
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow.parquet
from PIL import Image

from benchmarks.processes import command_of, family, resident

ROOT = Path(__file__).parents[1]
LIMIT = 3600.0  # seconds that no part may take
PART = re.compile(r"\d{12}-\d{12}\.parquet$")
WORDS = ("red", "a", "seven", "under")


class Drivers:
    """One embedding on Ray, started again and again, and the memory of its processes while it
    runs.
    """

    def __init__(self, command: list[str], environment: dict[str, str], log: Path):
        self.command, self.log = command, log
        self.environment = environment
        self.started: set[psutil.Process] = set()
        self.memory: list[tuple[float, float, float]] = []  # share done, MiB of driver, of an actor
        self.start()

    def start(self) -> None:
        """Start the driver, as a user would who sees that it is gone."""
        with open(self.log, "a", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.environment, stdout=log, stderr=log
            )

    def processes(self) -> list[psutil.Process]:
        """The driver and all that descend from it."""
        found = family(self.process.pid)
        self.started.update(found)
        return found

    def actors(self) -> list[psutil.Process]:
        """The actors that have started."""
        return [
            process
            for process in self.processes()
            if "".join(command_of(process)[:1]).startswith("ray::Worker")
        ]

    def left(self) -> list[psutil.Process]:
        """What is left of all drivers."""
        return [process for process in self.started if command_of(process)]

    def sample(self, share: float) -> None:
        """Note the memory. share: of the rows that are done."""
        actors = [resident(process) for process in self.actors()]
        if actors:
            driver = resident(psutil.Process(self.process.pid))
            self.memory.append((share, driver, max(actors)))


def embed_survival(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """A quiet run of one process, and one on Ray that is killed so many times; what both leave."""
    source, total = folder / "items.jsonl", args.items
    write_items(source, total, args.images, args.seed)
    base = [sys.executable, "-m", "lco_jax.embed", "--model=builtin:tiny", "--workers=0"]
    base += [f"--input={source}", "--id-field=id", f"--part-size={args.part_size}"]
    environment = {**os.environ, "XLA_FLAGS": ""}
    began = time.monotonic()
    quiet = folder / "quiet.parquet"
    subprocess.run(
        [*base, f"--output={quiet}"],
        cwd=ROOT,
        env=environment,
        check=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    quiet_seconds = time.monotonic() - began
    with storage(args.bucket, folder) as place:
        flags = [f"--output={place.output}", "--ray", f"--actors={args.actors}"]
        drivers = Drivers([*base, *flags], {**environment, **place.environment}, folder / "log.txt")
        try:
            kills = kill_at_random(drivers, place.parts, args, -(-total // args.part_size))
            wait_for_end(drivers, place.parts, -(-total // args.part_size))
            table = place.read()
        finally:
            for process in drivers.left():
                with suppress(psutil.NoSuchProcess):
                    process.kill()
    want = pyarrow.parquet.read_table(quiet)
    vectors, expected = (
        np.array(one["embedding"].to_pylist(), np.float32).view(np.uint32) for one in (table, want)
    )
    return {
        "items": total,
        "images": args.images,
        "actors": args.actors,
        "output": str(place.output),
        "kills": kills,
        "ids_once_in_order": table["id"].to_pylist() == [f"item {i}" for i in range(total)],
        "rows_with_equal_bits": int((vectors == expected).all(axis=1).sum()),
        "memory": flatness(drivers.memory),
        "seconds": {"quiet": quiet_seconds, "all": time.monotonic() - began},
    }


def write_items(source: Path, total: int, images: int, seed: int) -> None:
    """A .jsonl of texts, between which the images are spread evenly."""
    chance, draw = random.Random(seed), np.random.default_rng(seed)
    with open(source, "w", encoding="utf-8") as file:
        for i in range(total):
            item = {"id": f"item {i}"}
            if i * images // total != (i - 1) * images // total:
                item["image"] = f"{i}.png"
                pixels = draw.integers(0, 256, (32, 32, 3), np.uint8)
                Image.fromarray(pixels).save(source.parent / item["image"])
            else:
                item["text"] = " ".join(chance.choices(WORDS, k=1 + i % 50))
            file.write(json.dumps(item) + "\n")


class Place:
    """Where an output goes: a file of this machine, or a folder on the stand-in of a bucket."""

    def __init__(self, output: str, environment: dict[str, str], names: Callable[[], list[str]]):
        self.output, self.environment, self._names = output, environment, names
        self.read: Callable[[], Any] = lambda: pyarrow.parquet.read_table(output)

    def parts(self) -> int:
        """How many parts there are."""
        return sum(bool(PART.search(name)) for name in self._names())


@contextmanager
def storage(on_bucket: bool, folder: Path) -> Iterator[Place]:
    """Where the output goes, while it is written and read."""
    if not on_bucket:
        output = folder / "out.parquet"
        partial = folder / "out.parquet.partial"
        yield Place(str(output), {}, lambda: os.listdir(partial) if partial.exists() else [])
        return
    found = importlib.util.spec_from_file_location("bucket", ROOT / "tests" / "bucket.py")
    stand_in = importlib.util.module_from_spec(found)
    found.loader.exec_module(stand_in)
    with stand_in.Bucket() as bucket:
        environment = {
            "STORAGE_EMULATOR_HOST": bucket.url,
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
        }
        place = Place("gs://bucket/out", environment, lambda: list(bucket.objects))

        def read() -> Any:
            names = json.loads(bucket.objects["out/_index.json"])["parts"]
            return pyarrow.concat_tables(
                pyarrow.parquet.read_table(io.BytesIO(bucket.objects[f"out/{name}"]))
                for name in names
            )

        place.read = read
        yield place


def kill_at_random(
    drivers: Drivers, parts: Callable[[], int], args: argparse.Namespace, total: int
) -> list[str]:
    """Kill actors and drivers in turn: some at work, some in their start. What was killed, and at
    how many parts.
    """
    chance = random.Random(args.seed)
    kills: list[str] = []
    last = parts()
    while len(kills) < args.kills:
        is_driver = len(kills) % 2 == 1
        if not is_driver or chance.random() < 0.7:  # at work: after a new part
            while parts() <= last or not drivers.actors():
                check(drivers)
                drivers.sample(parts() / total)
                time.sleep(0.05)
        time.sleep(chance.uniform(0, 1.5))
        last = parts()
        if is_driver:
            drivers.processes()
            drivers.process.kill()
            drivers.process.wait()
            drivers.start()
        else:
            victims = drivers.actors()
            if not victims:
                continue
            with suppress(psutil.NoSuchProcess):
                chance.choice(victims).kill()
        kills.append(f"{'driver' if is_driver else 'actor'} at {last}")
        print(f"kill {len(kills)}: {kills[-1]} of {total} parts", file=sys.stderr, flush=True)
    return kills


def check(drivers: Drivers) -> None:
    """Raise where the driver has ended."""
    if drivers.process.poll() is not None:
        words = drivers.log.read_text(encoding="utf-8")[-3000:]
        raise RuntimeError(f"the driver ended early with {drivers.process.returncode}\n{words}")


def wait_for_end(drivers: Drivers, parts: Callable[[], int], total: int) -> None:
    """Wait for the last driver, and for all processes of those before it."""
    end = time.monotonic() + LIMIT
    while drivers.process.poll() is None:
        drivers.sample(parts() / total)
        time.sleep(0.5)
        if time.monotonic() > end:
            raise RuntimeError("the driver stalls")
    if drivers.process.returncode:
        check(drivers)
    end = time.monotonic() + 60
    while left := drivers.left():
        if time.monotonic() > end:
            raise RuntimeError(f"processes that outlive their driver: {left}")
        time.sleep(0.5)


def flatness(memory: list[tuple[float, float, float]]) -> dict[str, list[float]]:
    """The most MiB of the driver and of an actor: until half of the rows were done, and after."""
    early = [sample for sample in memory if sample[0] < 0.5]
    late = [sample for sample in memory if sample[0] >= 0.5]
    return {
        "driver": [max((x[1] for x in some), default=0.0) for some in (early, late)],
        "actor": [max((x[2] for x in some), default=0.0) for some in (early, late)],
    }


def embed_table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    ids = "each once, in order" if result["ids_once_in_order"] else "NOT each once"
    same = f"{result['rows_with_equal_bits']:,} of {result['items']:,}"
    memory = result["memory"]
    mib = [f"{who} {early:.0f}, then {late:.0f}" for who, (early, late) in memory.items()]
    seconds = result["seconds"]
    items = f"{result['items']:,} items ({result['images']:,} images)"
    return "\n".join([
        result["command"],
        f"{items}, {result['actors']} actors, to {result['output']}",
        f"{len(result['kills'])} kills, at so many parts: {', '.join(result['kills'])}",
        f"ids: {ids}; rows with the bits of a quiet run: {same}",
        f"most MiB resident in the first half, and then: {'; '.join(mib)}",
        f"{seconds['quiet']:.0f} s quiet, {seconds['all']:.0f} s in all",
    ])  # fmt: skip
