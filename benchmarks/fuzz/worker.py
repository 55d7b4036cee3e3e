"""The process in which the cases run: jobs come as lines of JSON, and replies go as such.

    python -m benchmarks.fuzz.worker MODULE:CLASS

An instance of the class is called with each job. It returns a vector, or raises.
"""

import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError, reason

MODEL = "builtin:lab"  # of all media; it takes every modality
DECODE_SECONDS = 10.0


class Embedders:
    """Runs a job with `OmniEmbedder`.

    A job has "input", and perhaps "model" (by default the one that stays loaded), "adapter" and
    "modalities". Where JSON cannot hold a part of the input, {"load": KIND, …} stands for it.
    """

    def __init__(self):
        self.loaded = _load(MODEL, None, None)
        self.loaded.encode("the first input, at which jax starts its threads")

    def __call__(self, job: dict[str, Any]) -> np.ndarray:
        if "model" in job:
            embedder = _load(job["model"], job.get("adapter"), job.get("modalities"))
        else:
            embedder = self.loaded
        return embedder.encode(_filled(job["input"]))


def _load(model: str, adapter: str | None, modalities: list[str] | None) -> Any:
    from lco_jax import MediaConfig, OmniEmbedder

    media = MediaConfig(  # small inputs of the model, so that it has few shapes to compile
        decode_seconds=DECODE_SECONDS,
        image_max_pixels=112 * 112,
        video_max_pixels=56 * 56,
        max_frames=8,
        max_audio_seconds=8.0,
    )
    return OmniEmbedder.from_pretrained(model, adapter, modalities=modalities, media=media)


def _filled(value: Any) -> Any:
    """An input with the parts that JSON cannot hold."""
    if not isinstance(value, dict):
        return value
    if "load" not in value:
        return {key: _filled(one) for key, one in value.items()}
    path = Path(value["path"])
    if value["load"] == "bytes":
        return path.read_bytes()
    if value["load"] == "frames":
        return list(np.load(path))
    return np.load(path)


def answer(target: Any, job: dict[str, Any]) -> dict[str, Any]:
    """A reply: a "vector", or the words of an `LcoError` that "refused" the job, or the kind and
    reason of what else was "raised", of which "said" has the traceback.
    """
    try:
        return {"vector": np.asarray(target(job)).tolist()}
    except LcoError as error:
        return {"refused": str(error)}
    except BaseException as error:  # also SystemExit and the like: all are what is looked for
        return {
            "raised": type(error).__name__ + ": " + reason(error),
            "said": traceback.format_exc(),
        }


def main() -> None:
    """Answer until there are no more jobs. What libraries print goes to stderr."""
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as replies:
        os.dup2(2, 1)
        module, name = sys.argv[1].split(":")
        target = getattr(importlib.import_module(module), name)()
        print(json.dumps({"ready": True}), file=replies, flush=True)
        for line in sys.stdin:
            print(json.dumps(answer(target, json.loads(line))), file=replies, flush=True)


if __name__ == "__main__":
    main()
