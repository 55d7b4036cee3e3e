"""The checkpoints that need no network: `builtin:lab` and `builtin:tiny`.

`builtin:lab` is a Qwen2.5-Omni of 1.8 M parameters that has learned to say what pictures, clips and sounds of a made
world show (docs/laboratory.md), and nothing contrastive. It lies in `assets`, made by `tools/make_lab.py`.

`builtin:tiny` is a random Qwen2.5-VL in real Hugging Face layout: config.json as the hub has it, safetensors with the
hub's key names (vision tower included, so that transformers loads it whole), a byte-level BPE tokenizer trained on the
bundled triplets, a chat template. It has learned nothing. All of it but the weights lies in `assets`, where
`tools/make_tiny.py` has made it; they are drawn on first use.
"""

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from lco_jax.core.files import ASSETS, cache_folder, read_json, write_json, written_aside

LAB = ASSETS / "lab" / "model"
VERSION = 1  # part of the cache's name: raise it when the weights change
FILES = ASSETS / "tiny"
SHAPES = ASSETS / "tiny_shapes.json"  # of every tensor, by its hub name


def find(name: str) -> Path | None:
    """The folder of the built-in checkpoint of this name; None where there is none."""
    return {"builtin:lab": lambda: LAB, "builtin:tiny": build}.get(name, lambda: None)()


def build(folder: Path | None = None) -> Path:
    """The folder of `builtin:tiny`; written on the first call, by default under ~/.cache/lco_jax."""
    cached = folder is None
    if folder is None:
        files = [*sorted(FILES.iterdir()), SHAPES]
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
        folder = cache_folder() / f"tiny-{VERSION}-{digest}"
        if (folder / "config.json").exists():
            return folder
    with written_aside(folder, first_wins=cached) as aside:
        shutil.copytree(FILES, aside, dirs_exist_ok=True, copy_function=shutil.copyfile)
        bpe = read_json(aside / "tokenizer.json")["model"]
        write_json(aside / "vocab.json", bpe["vocab"])
        merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
        (aside / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
        save_file(_weights(), aside / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights() -> dict[str, np.ndarray]:
    """Every tensor: matrices normal with variance 1 / fan-in, gains 1, biases 0, embeddings normal."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in read_json(SHAPES).items():
        if len(shape) == 1:
            value = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
        else:
            fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
            value = rng.normal(0.0, fan_in**-0.5, shape)
        tensors[name] = value.astype(np.float32)
    return tensors
