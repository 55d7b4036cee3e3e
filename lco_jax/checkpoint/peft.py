"""The PEFT adapter format: adapter_config.json + adapter_model.safetensors, read and written.

Dimensions: L layers, O output features, I input features, r rank.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import read_json, resolve, write_json, written_aside
from lco_jax.core.lora import LoraConfig

# whatever stands before it, transformers 4.x and 5.x, full or thinker-only, with or without PEFT's adapter name
_KEY = re.compile(
    r"base_model\.model\.(?:thinker\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?"
    r"layers\.(\d+)\.(.+)\.lora_([AB])(?:\.\w+)?\.weight"
)
_MODULES = (
    "model.language_model.layers"  # where transformers 5.x has the decoder of every backbone here
)
# what a PEFT config may ask for that is not done here; "none" is how it says that it asks for no bias
_UNSUPPORTED = (
    "use_dora", "bias", "lora_bias", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern",
    "layer_replication", "target_parameters", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
    "use_bdlora",
)  # fmt: skip


def layer_tensors(adapters: dict[str, Any]) -> Iterator[tuple[int, str, np.ndarray, np.ndarray]]:
    """(layer, module, A [r, I], B [O, r]) of every adapted matrix, e.g. (3, "mlp.up_proj", …), on the host."""
    pairs = flatten_dict(adapters, sep=".")
    for path in sorted(path for path in pairs if path.endswith(".weight.a")):
        stem = path.removesuffix(".a")
        a, b = np.asarray(pairs[path]), np.asarray(pairs[f"{stem}.b"])
        module = stem.removeprefix("layers.").removesuffix(".weight")
        for layer in range(a.shape[0]):
            yield layer, module, a[layer], b[layer]


def has_adapters(tuned: dict[str, Any]) -> bool:
    """Whether a decoder's tuned tree holds LoRA factors."""
    return any(path.endswith(".weight.a") for path in flatten_dict(tuned, sep="."))


def write_peft(folder: Path, adapters: dict[str, Any], config: LoraConfig, base: str) -> None:
    """Write the adapter folder aside, read it back, compare, and only then move it into place.

    base: the checkpoint it belongs to, as PEFT's `base_model_name_or_path`.
    """
    tensors, modules = {}, set()
    for layer, module, a, b in layer_tensors(adapters):
        modules.add(module)
        stem = f"base_model.model.{_MODULES}.{layer}.{module}"
        tensors |= {
            f"{stem}.lora_A.weight": np.ascontiguousarray(a),
            f"{stem}.lora_B.weight": np.ascontiguousarray(b),
        }
    alternatives = "|".join(re.escape(module) for module in sorted(modules))
    content = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": base,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": config.dropout,
        "use_rslora": config.use_rslora,
        # a pattern, not names: PEFT would find gate_proj and up_proj in the vision tower as well. And of whole paths:
        # where a model names its modules otherwise (Omni in transformers 4.x), PEFT raises instead of loading nothing
        "target_modules": rf"{re.escape(_MODULES)}\.\d+\.(?:{alternatives})",
        "inference_mode": True,
    }  # what else there is has PEFT's defaults
    with written_aside(folder) as aside:
        save_file(tensors, aside / "adapter_model.safetensors", metadata={"format": "pt"})
        write_json(aside / "adapter_config.json", content)
        back, _ = read_peft(aside)
        for (layer, module, *want), (_, _, *got) in zip(
            layer_tensors(adapters), layer_tensors(back), strict=True
        ):
            if not all(np.array_equal(x, y) for x, y in zip(want, got, strict=True)):
                raise LcoError(
                    f"{folder}: layer {layer} {module} did not survive writing; is the disk full?"
                )


def read_peft(path_or_id: str | Path) -> tuple[dict[str, Any], LoraConfig]:
    """An adapter tree (numpy, float32) and its configuration, from a PEFT folder or hub id.

    Layers that the adapter leaves out get A = B = 0, which adapts nothing; `fit` does the same for those beyond the
    last one it names. Raises for what it cannot represent.
    """
    folder = resolve(path_or_id, ["adapter_config.json", "adapter_model.safetensors"])
    where = folder / "adapter_config.json"
    content = read_json(where)
    if content.get("peft_type") != "LORA":
        raise LcoError(
            f"{where}: peft_type is {content.get('peft_type')!r}; only LORA adapters are supported"
        )
    for key in ("r", "lora_alpha"):
        if not isinstance(content.get(key), int | float):
            raise LcoError(f"{where}: {key} is {content.get(key)!r}, and must be a number")
    for key in _UNSUPPORTED:
        if content.get(key) not in (None, False, "none", [], {}):
            raise LcoError(f"{where}: {key} = {content[key]!r} is not supported")
    file = folder / "adapter_model.safetensors"
    if not file.exists():
        raise LcoError(
            f"{file} does not exist (pickled adapters are never loaded; convert them to safetensors)"
        )
    with explained(
        f"{file} is torn or not a safetensors file", SafetensorError, OSError, ValueError
    ):
        tensors = load_file(file)
    found: dict[str, dict[int, np.ndarray]] = {}
    for key, value in tensors.items():
        match = _KEY.fullmatch(key)
        if not match:
            raise LcoError(f"{file}: unknown key {key}")
        layers = found.setdefault(f"layers.{match[2]}.weight.{match[3].lower()}", {})
        if int(match[1]) in layers:
            raise LcoError(f"{file}: {key} is the same parameter as another key")
        rank = value.shape[0 if match[3] == "A" else 1]
        if rank != content["r"]:
            raise LcoError(
                f"{file}: {key} has rank {rank}, and adapter_config.json says r = {content['r']}"
            )
        layers[int(match[1])] = value.astype(np.float32)
    depth = max((max(layers) for layers in found.values()), default=-1) + 1
    stacked = {}
    for path, layers in found.items():
        other = found.get(path[:-1] + ("b" if path.endswith("a") else "a"), {})
        if layers.keys() != other.keys():
            raise LcoError(f"{file}: {path[:-2]} has an A without its B, or a B without its A")
        if len(shapes := sorted({value.shape for value in layers.values()})) > 1:
            raise LcoError(f"{file}: {path} has layers of different shapes: {shapes}")
        blank = np.zeros_like(next(iter(layers.values())))
        stacked[path] = np.stack([layers.get(i, blank) for i in range(depth)])
    if not stacked:
        raise LcoError(f"{file} holds no LoRA weights")
    modules = "|".join(
        sorted({re.escape(path[len("layers.") : -len(".weight.a")]) for path in stacked})
    )
    return unflatten_dict(stacked, sep="."), LoraConfig(
        rank=content["r"],
        alpha=content["lora_alpha"],
        dropout=content.get("lora_dropout") or 0.0,
        targets=rf"layers\.(?:{modules})",
        use_rslora=bool(content.get("use_rslora")),
    )


def match_adapters(adapters: dict[str, Any], params: dict[str, Any], where: str) -> dict[str, Any]:
    """The adapters, with as many layers as `params` has. Raises unless every leaf matches the matrix it belongs to."""
    leaves, fitted = flatten_dict(params, sep="."), {}
    for path, value in flatten_dict(adapters, sep=".").items():
        stem, side = path.rsplit(".", 1)
        if stem not in leaves:
            raise LcoError(f"{where} adapts {stem}, which the model does not have")
        *stack, out_features, in_features = leaves[stem].shape
        want = (
            (stack[0], value.shape[1], in_features)
            if side == "a"
            else (stack[0], out_features, value.shape[2])
        )
        if value.shape[1:] != want[1:] or value.shape[0] > want[0]:
            raise LcoError(
                f"{where}: {stem}.{side} has shape {value.shape}, which does not fit {leaves[stem].shape}"
            )
        fitted[path] = np.pad(value, ((0, want[0] - value.shape[0]), (0, 0), (0, 0)))
    return unflatten_dict(fitted, sep=".")
