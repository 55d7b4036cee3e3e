"""Make `builtin:lab` and its data in `lco_jax/assets/lab` from one seed of a laboratory run.

It has a generator of the made world before contrastive tuning, in bfloat16; the world's triplets to
tune it on; and held-out texts, pictures and sounds with their captions. `configs/base.py` starts
from it.

Usage, from the project's root (the seed is the best of the run in docs/lab, by retrieval after
tuning):

    python -m laboratory --config=configs/lab.py --output=runs/lab
    python -m tools.make_lab runs/lab/seed-11
"""

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import soundfile

from lco_jax.checkpoint.export import export_merged
from lco_jax.core.files import ASSETS, write_text, written_aside

OUT = ASSETS / "lab"
SOUNDS = "flac"  # a third of a wav's bytes, and the same samples


def write(seed: Path, out: Path) -> None:
    """Copy a seed's longest-trained generator, and its records with their media."""
    generator = max(seed.glob("generator-*"), key=lambda folder: int(folder.name.split("-")[1]))
    with written_aside(out) as aside:
        export_merged(generator, aside / "model", dtype="bfloat16")
        # a checkpoint as on the hub, without the files of an embedder
        for path in (aside / "model").iterdir():
            if not (seed / "generator-0" / path.name).exists():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        (aside / "media").mkdir()
        for name, file in (("train", "contrast/text"), ("text", "tests/text")):
            shutil.copyfile(seed / f"world/{file}.jsonl", aside / f"{name}.jsonl")
        for kind in ("image", "audio"):
            lines = (
                (seed / f"world/tests/retrieval_{kind}.jsonl")
                .read_text(encoding="utf-8")
                .splitlines()
            )
            records = [_captioned(json.loads(line), seed / "world/tests", aside) for line in lines]
            write_text(
                aside / f"{kind}.jsonl", "".join(json.dumps(record) + "\n" for record in records)
            )


def _captioned(record: dict[str, Any], tests: Path, out: Path) -> dict[str, Any]:
    """A test's record as one of retrieval, its medium copied."""
    ((key, path),) = record["media"].items()
    source = tests / path
    name = f"media/{source.name}"
    if key == "audio_path":
        name = f"media/{source.stem}.{SOUNDS}"
        soundfile.write(out / name, *soundfile.read(source, dtype="int16"), format=SOUNDS)
    else:
        shutil.copyfile(source, out / name)
    return {"anchor": {key: name}, "positive": record["text"]}


if __name__ == "__main__":
    write(Path(sys.argv[1]), OUT)
