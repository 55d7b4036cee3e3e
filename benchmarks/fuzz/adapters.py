"""Cases of PEFT adapters on `builtin:tiny`: valid ones, and ones with hostile values.

Dimensions: O output features, I input features, r rank.
"""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.fuzz.case import Case, rng_of
from benchmarks.fuzz.checkpoints import TEXT, WEIGHTS, header_value, header_whole
from benchmarks.fuzz.values import hostile, shown, write

KIND = "adapters"
CONFIG, FACTORS = "adapter_config.json", "adapter_model.safetensors"
RANK, ALPHA = 4, 24
MODULES = ("self_attn.q_proj", "self_attn.o_proj", "mlp.down_proj")
PREFIXES = ("base_model.model.model.layers", "base_model.model.model.language_model.layers")
# ways to start an adapter that change the base: its factors alone are then not the model
CHANGES_BASE = ("pissa", "pissa_niter_4", "olora", "corda", "lora_ga", "loftq")


class Adapter(NamedTuple):
    """An adapter that is to be written. scales: of each module's product; None: not known.

    want: as in `Case`. unlike: it must not be read as the plain adapter of its factors.
    """

    what: str
    config: dict[str, Any]
    factors: dict[str, np.ndarray]
    scales: dict[str, float] | None = None
    want: str = "either"
    unlike: bool = False


def case(seed: int, number: int, folder: Path, base: Path) -> Case:
    """The case of this number, on the checkpoint in the folder `base`."""
    rng = rng_of(seed, KIND, number)
    plain = _plain(rng, load_file(base / WEIGHTS))
    adapter = EDITS[number % len(EDITS)](rng, plain)
    place = folder / "adapter"
    _write(adapter, place)
    what, want = adapter.what, adapter.want
    if adapter is plain:  # nothing was done to its values: its files are next
        what, want = _edit_files(rng, place)
    job = {"model": str(base), "adapter": str(place), "modalities": ["text"], "input": TEXT}
    merged = _merged(base, adapter, folder) if adapter.scales else None
    right = {"model": str(merged), "modalities": ["text"], "input": TEXT} if merged else None
    if adapter is plain and want != "vector":
        right = None
    if adapter.unlike:
        return Case(KIND, number, what, job, want, None, right)
    return Case(KIND, number, what, job, want, right)


def _plain(rng: np.random.Generator, tensors: dict[str, np.ndarray]) -> Adapter:
    """One that PEFT would write."""
    prefix = PREFIXES[rng.integers(len(PREFIXES))]
    factors = {}
    for layer in range(sum(name.endswith("q_proj.weight") for name in tensors)):
        for module in MODULES:
            out, inner = tensors[f"model.layers.{layer}.{module}.weight"].shape
            stem = f"{prefix}.{layer}.{module}"
            noise = rng.normal(0, 0.1, (RANK, inner)), rng.normal(0, 0.1, (out, RANK))
            factors[f"{stem}.lora_A.weight"] = noise[0].astype(np.float32)
            factors[f"{stem}.lora_B.weight"] = noise[1].astype(np.float32)
    config = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": "x/y",
        "r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(module.split(".")[1] for module in MODULES),
        "init_lora_weights": True,
        "inference_mode": True,
    }
    scales = dict.fromkeys(MODULES, ALPHA / RANK)
    return Adapter("a plain adapter", config, factors, scales, "vector")


def _write(adapter: Adapter, folder: Path) -> None:
    folder.mkdir()
    write(folder / CONFIG, adapter.config)
    save_file(adapter.factors, folder / FACTORS)


def _merged(base: Path, adapter: Adapter, folder: Path) -> Path:
    """A copy of the checkpoint with each product added to its matrix."""
    copy = folder / "merged"
    shutil.copytree(base, copy)
    tensors = load_file(copy / WEIGHTS)
    for name, a in adapter.factors.items():
        if not name.endswith("lora_A.weight"):
            continue
        module = next(module for module in MODULES if module in name)
        layer = name.split(".layers.")[1].split(".")[0]
        b = adapter.factors[name.replace("lora_A", "lora_B")]
        tensors[f"model.layers.{layer}.{module}.weight"] += adapter.scales[module] * (b @ a)
    save_file(tensors, copy / WEIGHTS)
    return copy


# ---- values of the configuration


def start(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """How the factors were started: plain ways, ways that change the base, and nonsense."""
    value = [True, False, "gaussian", "eva", "orthogonal", *CHANGES_BASE, "x", 5, [], None][
        rng.integers(15)
    ]
    changed = plain._replace(
        what=f"init_lora_weights = {shown(value)}",
        config={**plain.config, "init_lora_weights": value},
    )
    if value in CHANGES_BASE:
        return changed._replace(want="either", unlike=True)
    is_plain = value in (True, False, "gaussian", "eva", "orthogonal")
    return changed._replace(want="vector" if is_plain else "either")


def pattern(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """A rank or an alpha of its own for one module."""
    module = MODULES[rng.integers(len(MODULES))]
    name = module.split(".")[1]
    if rng.integers(2):
        alpha = float(rng.choice([2, 12, 64]))
        scales = {**plain.scales, module: alpha / RANK}
        config = {**plain.config, "alpha_pattern": {name: alpha}}
        return plain._replace(
            what=f"alpha_pattern {name} = {alpha}", config=config, scales=scales, want="either"
        )
    rank = int(rng.choice([1, 2, 3]))
    factors = {
        key: (value[:rank] if "lora_A" in key else value[:, :rank]).copy()
        if module in key
        else value
        for key, value in plain.factors.items()
    }
    scales = {**plain.scales, module: ALPHA / rank}
    config = {**plain.config, "rank_pattern": {name: rank}}
    return Adapter(f"rank_pattern {name} = {rank}", config, factors, scales, "either")


def scale(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """rsLoRA, or an alpha that is a float."""
    alpha = float(rng.choice([0.5, 3, 100]))
    config = {**plain.config, "lora_alpha": alpha, "use_rslora": bool(rng.integers(2))}
    divisor = RANK**0.5 if config["use_rslora"] else RANK
    scales = dict.fromkeys(MODULES, alpha / divisor)
    what = f"lora_alpha = {alpha}, use_rslora = {config['use_rslora']}"
    return Adapter(what, config, plain.factors, scales, "vector")


def wrong_rank(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """An r that the factors do not have, or an alpha that is no number."""
    if rng.integers(2):
        value = [0, -4, 5, 10**9, "4", None, [], {}, float("nan"), 2**70][rng.integers(10)]
        return _hostile(plain, "r", value, "error")
    value = [float("nan"), float("inf"), "24", None, [], {}, [24]][rng.integers(7)]
    return _hostile(plain, "lora_alpha", value, "error")


def any_field(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """A hostile value of any field."""
    more = ("rank_pattern", "alpha_pattern", "modules_to_save", "target_modules", "use_dora",
            "layers_to_transform", "layer_replication", "exclude_modules", "peft_type",
            "megatron_config", "use_rslora", "fan_in_fan_out", "loftq_config")  # fmt: skip
    key = str(rng.choice([*more, *plain.config]))
    return _hostile(plain, key, hostile(rng), "either")


def _hostile(plain: Adapter, key: str, value: Any, want: str) -> Adapter:
    config = {**plain.config, key: value}
    return Adapter(f"{CONFIG}: {key} = {shown(value)}", config, plain.factors, None, want)


# ---- factors


def wrong_factor(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """One factor is absent, misnamed, of another shape, or not finite."""
    factors = dict(plain.factors)
    name = str(rng.choice(sorted(factors)))
    value = factors.pop(name)
    layer = name.split(".layers.")[1].split(".")[0]
    forms = {
        "absent": {},
        "transposed": {name: value.T.copy()},
        "wide": {name: np.concatenate([value, value], axis=0)},
        "flat": {name: value.reshape(-1)},
        "NaN": {name: np.full_like(value, np.nan)},
        "one NaN": {name: np.where(np.arange(value.size).reshape(value.shape), value, np.nan)},
        "int8": {name: value.astype(np.int8)},
        "misnamed": {name.replace("_proj", "_prof"): value},
        "in another tree": {name.replace("layers", "blocks"): value},
    }
    form = str(rng.choice(list(forms)))
    want = "either" if form == "int8" else "error"
    what = f"{FACTORS}: {name.rsplit('.layers.')[1]} is {form} (layer {layer})"
    return Adapter(what, plain.config, factors | forms[form], None, want)


def far_layer(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """A layer that the model does not have."""
    layer = str(rng.choice(["99", "1000000", "1000000000000", "-1", "01"]))
    factors = {
        key.replace(".layers.0.", f".layers.{layer}."): x for key, x in plain.factors.items()
    }
    return Adapter(f"{FACTORS}: layer {layer}", plain.config, factors, None, "error")


def saved_modules(rng: np.random.Generator, plain: Adapter) -> Adapter:
    """Whole modules beside the factors. A head changes no embedding."""
    name = str(rng.choice(["lm_head", "embed_tokens", "absent"]))
    config = {**plain.config, "modules_to_save": [name]}
    key = f"base_model.model.{name}.weight"
    factors = {**plain.factors, key: rng.normal(size=(8, 8)).astype(np.float32)}
    return Adapter(f"modules_to_save {name}", config, factors, None, "either")


def files(_: np.random.Generator, plain: Adapter) -> Adapter:
    """Nothing: the files are edited instead."""
    return plain


def _edit_files(rng: np.random.Generator, folder: Path) -> tuple[str, str]:
    """Edit the adapter's files as those of a checkpoint: (what was done, what is wanted)."""
    choice = int(rng.integers(4))
    if choice == 0:
        return "a plain adapter", "vector"
    if choice == 1:
        (folder / CONFIG).write_text(["", "[]", "{", "null", "[" * 200_000][rng.integers(5)])
        return f"{CONFIG} is torn", "error"
    (folder / FACTORS).rename(folder / WEIGHTS)  # as those functions call it
    edited = header_whole(rng, folder) if choice == 2 else header_value(rng, folder)
    (folder / WEIGHTS).rename(folder / FACTORS)
    return edited.what, edited.want


EDITS: tuple[Callable[[np.random.Generator, Adapter], Adapter], ...] = (
    start,
    pattern,
    any_field,
    wrong_factor,
    wrong_rank,
    files,
    scale,
    far_layer,
    saved_modules,
    any_field,
)
