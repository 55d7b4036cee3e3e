"""Does memory stay flat over a long embedding job? Embeds small images and watches the process.

    python tools/memory.py --images=20000

Prints one line of JSON: resident MB (of the process and its children) after the first 1,000 inputs,
the most from then on, and at the end; inputs per second. Exit status 1 if it grew by more than
--limit-mb.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import psutil
from PIL import Image

FIRST = 1000  # inputs after which everything is loaded, compiled and warm
PART = 500


def draw(folder: Path, images: int) -> None:
    """Noise of 32 × 32 pixels, a thousand files to a folder."""
    rng = np.random.default_rng(0)
    for i in range(images):
        if i % 1000 == 0:
            (folder / f"{i // 1000:04d}").mkdir()
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(
            folder / f"{i // 1000:04d}" / f"{i}.png"
        )


def resident(process: int) -> float:
    """MB of a process and all that descend from it, of which those that end meanwhile count 0."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        for one in (first, *first.children(recursive=True)):
            with suppress(psutil.NoSuchProcess):
                total += one.memory_info().rss / 2**20
    return total


def watch(command: list[str], parts: Path) -> dict[str, float]:
    """Run an embedding; what its memory was. parts: the folder where it says how far it is."""
    job = subprocess.Popen(command)
    seen: list[tuple[float, int, float]] = []  # (seconds, inputs done, MB)
    while job.poll() is None:
        done = max((int(x.stem.split("-")[1]) for x in parts.glob("*-*.parquet")), default=0)
        seen.append((time.monotonic(), done, resident(job.pid)))
        time.sleep(0.2)
    if job.returncode:
        raise SystemExit(f"the job ended with status {job.returncode}")
    later = [x for x in seen if x[1] >= FIRST and x[2]]
    first, last = later[0], max(later, key=lambda x: x[1])
    return {
        "mb_first": round(first[2]),
        "mb_most": round(max(x[2] for x in later)),
        "mb_end": round(last[2]),
        "per_second": round((last[1] - first[1]) / max(last[0] - first[0], 1e-9), 1),
    }


def main() -> int:
    """Draw, embed, compare."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--workers", type=int, help="as in lco_jax.embed")
    parser.add_argument("--limit-mb", type=float, default=200)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images, output = Path(folder) / "images", Path(folder) / "vectors.npy"
        images.mkdir()
        draw(images, args.images)
        command = [
            sys.executable,
            "-m",
            "lco_jax.embed",
            "--model=builtin:tiny",
            f"--input={images}",
        ]
        command += [f"--output={output}", f"--part-size={PART}"]
        command += [] if args.workers is None else [f"--workers={args.workers}"]
        memory = watch(command, Path(f"{output}.partial"))
        vectors = np.load(output, mmap_mode="r")
        assert len(vectors) == args.images
        assert np.abs((vectors**2).sum(axis=1) - 1).max() < 1e-5
    print(json.dumps({"images": args.images, **memory}))
    return int(memory["mb_most"] - memory["mb_first"] > args.limit_mb)


if __name__ == "__main__":
    sys.exit(main())
