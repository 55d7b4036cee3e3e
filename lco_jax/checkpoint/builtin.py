"""`builtin:tiny`: a small random Qwen2.5-VL checkpoint with its own tokenizer, made on first use.

In real Hugging Face layout: config.json as the hub spells it, safetensors with the hub's key names (vision tower
included, so that transformers loads it whole), a byte-level BPE tokenizer trained on the bundled triplets, a chat
template. It makes everything run without a network; it has learned nothing, and says so by its retrieval scores.

All but the weights lies in `assets/tiny`, which `tools/make_tiny.py` makes.
"""

import hashlib
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from lco_jax.core.files import read_json, write_json, written_aside

NAME = "builtin:tiny"
VERSION = 1  # part of the cache's name: raise it when the weights change
ASSETS = Path(__file__).parent.parent / "assets" / "tiny"


def build(folder: Path | None = None) -> Path:
    """The checkpoint's folder; written on the first call, by default under ~/.cache/lco_jax."""
    cached = folder is None
    if folder is None:
        cache = Path(os.environ.get("LCO_JAX_CACHE", Path.home() / ".cache" / "lco_jax"))
        digest = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(ASSETS.iterdir()))).hexdigest()[:8]
        folder = cache / f"tiny-{VERSION}-{digest}"
        if (folder / "config.json").exists():
            return folder
    with written_aside(folder, first_wins=cached) as aside:
        shutil.copytree(ASSETS, aside, dirs_exist_ok=True, copy_function=shutil.copyfile)
        bpe = read_json(aside / "tokenizer.json")["model"]
        write_json(aside / "vocab.json", bpe["vocab"])
        merges = "\n".join(" ".join(pair) for pair in bpe["merges"])
        (aside / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")
        weights = _weights(read_json(aside / "config.json"))
        save_file(weights, aside / "model.safetensors", metadata={"format": "pt"})
    return folder


def _weights(config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Every tensor by its hub name: matrices normal with variance 1 / fan-in, gains 1, biases 0, embeddings normal."""
    hidden, mlp, tower = config["hidden_size"], config["intermediate_size"], config["vision_config"]
    kv = config["num_key_value_heads"] * hidden // config["num_attention_heads"]
    vision, vision_mlp, patch = tower["hidden_size"], tower["intermediate_size"], tower["patch_size"]
    merged = 4 * vision
    attention = {"q": (hidden, hidden), "k": (kv, hidden), "v": (kv, hidden)}
    linears = {"self_attn.o": (hidden, hidden), "mlp.down": (hidden, mlp), "mlp.gate": (mlp, hidden),
               "mlp.up": (mlp, hidden)}  # fmt: skip
    tower_linears = {"attn.qkv": (3 * vision, vision), "attn.proj": (vision, vision),
                     "mlp.gate_proj": (vision_mlp, vision), "mlp.up_proj": (vision_mlp, vision),
                     "mlp.down_proj": (vision, vision_mlp)}  # fmt: skip
    shapes = {"model.embed_tokens.weight": (config["vocab_size"], hidden), "model.norm.weight": (hidden,)}
    with_bias: dict[str, tuple[int, int]] = {}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        shapes |= {f"{layer}.{norm}_layernorm.weight": (hidden,) for norm in ("input", "post_attention")}
        for name, shape in attention.items():
            shapes |= {f"{layer}.self_attn.{name}_proj.weight": shape, f"{layer}.self_attn.{name}_proj.bias": shape[:1]}
        shapes |= {f"{layer}.{name}_proj.weight": shape for name, shape in linears.items()}
    for i in range(tower["depth"]):
        with_bias |= {f"visual.blocks.{i}.{name}": shape for name, shape in tower_linears.items()}
        shapes |= {f"visual.blocks.{i}.norm{j}.weight": (vision,) for j in (1, 2)}
    with_bias |= {"visual.merger.mlp.0": (merged, merged), "visual.merger.mlp.2": (hidden, merged)}
    for name, shape in with_bias.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    shapes |= {"visual.merger.ln_q.weight": (vision,), "visual.patch_embed.proj.weight": (vision, 3, 2, patch, patch)}

    rng = np.random.default_rng(0)
    tensors = {}
    for name, shape in shapes.items():
        if len(shape) == 1:
            value = np.zeros(shape) if name.endswith("bias") else np.ones(shape)
        else:
            fan_in = 1 if "embed_tokens" in name else int(np.prod(shape[1:]))
            value = rng.normal(0.0, fan_in**-0.5, shape)
        tensors[name] = value.astype(np.float32)
    return tensors
