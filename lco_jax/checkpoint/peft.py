"""The PEFT adapter format: adapter_config.json and adapter_model.safetensors, read and written.

Dimensions: L layers, O output features, I input features, r rank.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lco_jax.checkpoint.tensors import read_tensors, write_tensors
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve, write_json, written_aside
from lco_jax.core.lora import LoraConfig, Tree

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Any prefix of transformers 4 and 5, full or thinker-only, with or without PEFT's adapter name.
_KEY = re.compile(
    r"base_model\.model\.(?:thinker\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"layers\.(\d+)\.(.+)\.lora_([AB])(?:\.\w+)?\.weight"
)
_LAYERS = "model.language_model.layers"  # the decoder of every backbone in transformers 5
# What a PEFT config may ask for and we do not do.
_UNSUPPORTED = (
    "use_dora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern",
    "alpha_pattern", "layer_replication", "target_parameters", "trainable_token_indices",
    "alora_invocation_tokens", "use_qalora", "use_bdlora",
)  # fmt: skip
_UNSET = (None, False, "none", [], {})  # how a PEFT config says that it does not ask for something


def layer_tensors(adapters: Tree) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """(layer, module, A [r, I], B [O, r]) of every adapted matrix, on the host.

    A module is e.g. "mlp.up_proj".
    """
    leaves = flatten_dict(adapters, sep=".")
    for path in sorted(leaves):
        if not path.endswith(".weight.a"):
            continue
        stem = path.removesuffix(".a")
        module = stem.removeprefix("layers.").removesuffix(".weight")
        a, b = np.asarray(leaves[path]), np.asarray(leaves[f"{stem}.b"])
        for layer in range(a.shape[0]):
            yield layer, module, a[layer], b[layer]


def has_adapters(tuned: Tree) -> bool:
    """Whether a decoder's trainable parameters hold LoRA factors."""
    return any(path.endswith(".weight.a") for path in flatten_dict(tuned, sep="."))


# ---- writing


def write_peft(folder: Path, adapters: Tree, config: LoraConfig, base: str) -> None:
    """Write the adapter's folder aside, read back each file, then rename the folder.

    base: the checkpoint it belongs to, as PEFT's `base_model_name_or_path`.
    """
    tensors: dict[str, np.ndarray] = {}
    modules = set()
    for layer, module, a, b in layer_tensors(adapters):
        modules.add(re.escape(module))
        stem = f"base_model.model.{_LAYERS}.{layer}.{module}"
        tensors[f"{stem}.lora_A.weight"] = a
        tensors[f"{stem}.lora_B.weight"] = b
    content = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        # A pattern of full paths. By names alone PEFT would find gate_proj and up_proj in the
        # vision tower, too. Where a model's paths differ (Omni in transformers 4), PEFT raises.
        "target_modules": rf"{re.escape(_LAYERS)}\.\d+\.(?:{'|'.join(sorted(modules))})",
        "inference_mode": True,
    }  # everything else has PEFT's defaults
    with written_aside(folder) as aside:
        write_tensors(aside / WEIGHTS, tensors)
        write_json(aside / CONFIG, content)
        read_peft(aside)


# ---- reading


def read_peft(path_or_id: str | Path) -> tuple[Tree, LoraConfig]:
    """An adapter tree (numpy, float32) and its configuration, from a PEFT folder or hub id.

    Layers that the adapter leaves out get A = B = 0, which adapts nothing; `match_adapters` does
    the same for those beyond the last one it names. Raises for what it cannot represent.
    """
    folder = resolve(path_or_id, [CONFIG, WEIGHTS])
    content = _read_config(folder / CONFIG)
    file = folder / WEIGHTS
    if not file.exists():
        raise LcoError(
            f"{file} does not exist "
            "(pickled adapters are never loaded; convert them to safetensors)"
        )
    leaves = _stack_layers(file, _read_layers(file, content["r"]))
    modules = {re.escape(path.split(".", 1)[1].removesuffix(".weight.a")) for path in leaves}
    config = LoraConfig(
        rank=content["r"],
        alpha=content["lora_alpha"],
        dropout=content.get("lora_dropout") or 0.0,
        targets=rf"layers\.(?:{'|'.join(sorted(modules))})",
        use_rslora=bool(content.get("use_rslora")),
    )
    return unflatten_dict(leaves, sep="."), config


def _read_config(file: Path) -> dict[str, Any]:
    content = read_json(file)
    kind = content.get("peft_type")
    if kind != "LORA":
        raise LcoError(f"{file}: peft_type is {kind!r}; only LORA adapters are supported")
    for key in ("r", "lora_alpha"):
        if not isinstance(content.get(key), int | float):
            raise LcoError(f"{file}: {key} is {content.get(key)!r}, and must be a number")
    for key in _UNSUPPORTED:
        if content.get(key) not in _UNSET:
            raise LcoError(f"{file}: {key} = {content[key]!r} is not supported")
    return content


def _read_layers(file: Path, rank: int) -> dict[str, dict[int, np.ndarray]]:
    """{path in an adapter tree: {layer: factor}}, float32."""
    found: dict[str, dict[int, np.ndarray]] = defaultdict(dict)
    for key, value in read_tensors(file).items():
        match = _KEY.fullmatch(key)
        if not match:
            raise LcoError(f"{file}: unknown key {key}")
        layer, module, half = int(match[1]), match[2], match[3].lower()
        layers = found[f"layers.{module}.weight.{half}"]
        if layer in layers:
            raise LcoError(f"{file}: {key} is the same parameter as another key")
        stored_rank = value.shape[0 if half == "a" else 1]
        if stored_rank != rank:
            raise LcoError(f"{file}: {key} has rank {stored_rank}, and {CONFIG} says r = {rank}")
        layers[layer] = value.astype(np.float32)
    if not found:
        raise LcoError(f"{file} holds no LoRA weights")
    return found


def _stack_layers(file: Path, found: dict[str, dict[int, np.ndarray]]) -> dict[str, np.ndarray]:
    """{path: factors of all layers [L, …]}, with zeros for the layers that are left out."""
    depth = 1 + max(max(layers) for layers in found.values())
    stacked = {}
    for path, layers in found.items():
        stem, half = path.rsplit(".", 1)
        other_half = "b" if half == "a" else "a"
        others = found.get(f"{stem}.{other_half}", {})
        if layers.keys() != others.keys():
            raise LcoError(f"{file}: {stem} has an A without its B, or a B without its A")
        shapes = sorted({value.shape for value in layers.values()})
        if len(shapes) > 1:
            raise LcoError(f"{file}: {path} has layers of different shapes: {shapes}")
        blank = np.zeros(shapes[0], np.float32)
        stacked[path] = np.stack([layers.get(i, blank) for i in range(depth)])
    return stacked


def match_adapters(adapters: Tree, params: Tree, where: str) -> Tree:
    """The adapters, with as many layers as `params` has.

    Raises unless every factor fits the matrix that it belongs to. where: the adapter's name.
    """
    matrices = flatten_dict(params, sep=".")
    padded = {}
    for path, factor in flatten_dict(adapters, sep=".").items():
        stem, half = path.rsplit(".", 1)
        if stem not in matrices:
            raise LcoError(f"{where} adapts {stem}, which the model does not have")
        shape = matrices[stem].shape
        depth, out_features, in_features = shape
        layers, *factor_shape = factor.shape
        fits = factor_shape[1] == in_features if half == "a" else factor_shape[0] == out_features
        if not fits or layers > depth:
            raise LcoError(f"{where}: {path} has shape {factor.shape}, which does not fit {shape}")
        padded[path] = np.pad(factor, ((0, depth - layers), (0, 0), (0, 0)))
    return unflatten_dict(padded, sep=".")
