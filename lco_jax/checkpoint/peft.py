"""The PEFT adapter format: adapter_config.json and adapter_model.safetensors, read and written.

Dimensions: L layers, O output features, I input features, r rank.
"""

import logging
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from os import PathLike
from pathlib import Path

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lco_jax.checkpoint.base import base_of
from lco_jax.checkpoint.card import write_card
from lco_jax.checkpoint.hf import HEAD, Checkpoint, abstract_model
from lco_jax.checkpoint.peft_config import CONFIG, PeftConfig, read_config
from lco_jax.checkpoint.peft_pairs import PREFIX, WEIGHTS, Pair, read_pairs
from lco_jax.checkpoint.sentence_transformers import USAGE_FILES, Usage, write_usage
from lco_jax.checkpoint.tensors import check_finite, write_tensors
from lco_jax.core.errors import LcoError
from lco_jax.core.files import resolve, write_json, written_aside
from lco_jax.core.lora import LoraConfig, Tree

logger = logging.getLogger(__name__)
MAX_LAYERS = 1000  # of an adapter that is read without its model
_NUMBER = r"(0|[1-9][0-9]{0,8})"  # as a model's keys have it: no other spelling is a module's name
# Any prefix of transformers 4 and 5, full or thinker-only.
_DECODER = re.compile(
    rf"(?:thinker\.)?(?:model\.)?(?:language_model\.)?(?:model\.)?layers\.{_NUMBER}\.(.+)"
)
_STACKED = re.compile(rf"(layers|blocks)\.{_NUMBER}\.(.+)")
_LAYERS = "model.language_model.layers"  # the decoder of every backbone in transformers 5


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


def write_peft(
    folder: Path,
    adapters: Tree,
    config: LoraConfig,
    base: str,
    card: str = "",
    usage: Usage | None = None,
) -> None:
    """Write the adapter's folder aside, read back each file, then rename the folder.

    base: the checkpoint it belongs to, as it was given; PEFT gets a hub id with its commit, or an
    absolute path (`base.base_of`). card: the content of README.md; "" for none. usage: how the
    model with the adapter is to be used; None: as its base.
    """
    tensors: dict[str, np.ndarray] = {}
    modules = set()
    for layer, module, a, b in layer_tensors(adapters):
        modules.add(re.escape(module))
        stem = f"{PREFIX}{_LAYERS}.{layer}.{module}"
        tensors[f"{stem}.lora_A.weight"] = a
        tensors[f"{stem}.lora_B.weight"] = b
    for key, value in tensors.items():
        check_finite(value, f"the adapter for {folder}: {key}")
    found = base_of(base)
    content = {
        "peft_type": "LORA",
        "task_type": "FEATURE_EXTRACTION",
        "base_model_name_or_path": found.location,
        "revision": found.revision,
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
        if card:
            write_card(aside, card)
        if usage is not None:
            write_usage(aside, usage)
        read_peft(aside)


# ---- reading


def read_peft(path_or_id: str | Path, depth: int = MAX_LAYERS) -> tuple[Tree, LoraConfig]:
    """A decoder's adapter tree (numpy, float32) and its configuration, of a PEFT folder or hub id.

    Layers that the adapter leaves out get A = B = 0, which adapts nothing; `match_adapters` does
    the same for those beyond the last one it names. depth: the most layers that it may name.
    Raises for what it cannot represent: also for an adapter of more than the decoder's layers.
    """
    folder = adapter_folder(path_or_id)
    config = read_config(folder / CONFIG)
    file = folder / WEIGHTS
    if config.saves_head:
        raise LcoError(f"{folder / CONFIG}: modules_to_save = ['lm_head'] is not supported here")

    def our_name(module: str) -> str:
        name = _decoder_name(module)
        if name is None:
            raise LcoError(f"{file}: unknown key {PREFIX}{module} (no matrix of a decoder layer)")
        return name

    pairs, saved = read_pairs(file, config, our_name)
    if saved:
        raise LcoError(f"{file}: unknown key {min(saved)}")
    trees, lora_config = _trees(file, pairs, config, {"decoder": depth})
    return trees["decoder"], lora_config


def read_adapter(
    path_or_id: str | Path, checkpoint: Checkpoint, head: bool = False
) -> tuple[dict[str, Tree], LoraConfig]:
    """What an adapter makes of a checkpoint: {part: adapter tree}, and the configuration of all.

    The parts are those of `hf.load_model`. Each has as many layers as the checkpoint, and fits it.
    head: whether the vocabulary head is wanted, which changes no embedding; its tree may hold the
    whole matrix. Raises for what cannot be applied exactly.
    """
    folder = adapter_folder(path_or_id)
    config = read_config(folder / CONFIG)
    file = folder / WEIGHTS
    params = abstract_model(checkpoint)
    pairs, saved = read_pairs(file, config, partial(_our_name, checkpoint, file))
    pairs = _of_layers_that_run(pairs, checkpoint, file)
    whole = _saved_head(file, saved, config, checkpoint)
    if not head:
        whole = None
        pairs.pop(HEAD, None)
    if (whole is not None or HEAD in pairs) and "head" not in params:
        raise LcoError(f"{file} adapts lm_head, which {checkpoint.folder} ties to embed_tokens")
    depths = {part: _depth(tree) for part, tree in params.items()}
    trees, lora_config = _trees(file, pairs, config, depths)
    for part, tree in trees.items():
        trees[part] = match_adapters(tree, params[part], str(path_or_id))
    if whole is not None:
        trees["head"] = {"weight": whole}
    return trees, lora_config


def _our_name(checkpoint: Checkpoint, file: Path, module: str) -> str:
    """Our name of a module that an adapter names."""
    name = _decoder_name(module) or _name_in(checkpoint, module)
    if name is None:
        raise LcoError(f"{file}: unknown key {PREFIX}{module}")
    return name


def _of_layers_that_run(
    pairs: dict[str, Pair], checkpoint: Checkpoint, file: Path
) -> dict[str, Pair]:
    """The pairs without those of layers that a checkpoint has, and no model runs."""
    unused = [
        f"{tower}.layers.{layer}."
        for tower, config in checkpoint.towers.items()
        for layer in getattr(config, "unused_layers", ())
    ]
    left = {name: pair for name, pair in pairs.items() if not name.startswith(tuple(unused))}
    if len(left) < len(pairs):
        count = len(pairs) - len(left)
        what = "matrices of layers that the model has and never runs; they are left out"
        logger.warning("%s adapts %d %s", file, count, what)
    return left


def _depth(params: Tree) -> int:
    """How many layers a part's parameters have; 0 where none are stacked."""
    leaves = flatten_dict(params, sep=".")
    return max((leaf.shape[0] for path, leaf in leaves.items() if _is_stacked(path)), default=0)


def adapter_folder(path_or_id: str | PathLike[str]) -> Path:
    """The folder of an adapter. Raises if it is none."""
    folder = resolve(path_or_id, [CONFIG, WEIGHTS, *USAGE_FILES])
    if not (folder / CONFIG).exists():
        _explain_other_folder(folder)
    if (folder / CONFIG).exists() and not (folder / WEIGHTS).exists():
        raise LcoError(
            f"{folder / WEIGHTS} does not exist "
            "(pickled adapters are never loaded; convert them to safetensors)"
        )
    return folder


def _explain_other_folder(folder: Path) -> None:
    """Raise, if a folder without an adapter is a model or a training run, and say so."""
    absent = f"{folder / CONFIG} does not exist"
    if (folder / "checkpoints").is_dir():
        raise LcoError(
            f"{absent}: {folder} is a training run; python -m lco_jax.convert --input={folder} "
            "--output=OUT writes its adapter to OUT-adapter"
        )
    if (folder / "config.json").exists() and any(folder.glob("model*.safetensors")):
        raise LcoError(f"{absent}: this is a model; give it as the model, without an adapter")


def _decoder_name(module: str) -> str | None:
    match = _DECODER.fullmatch(module)
    return f"decoder.layers.{match[1]}.{match[2]}.weight" if match else None


def _name_in(checkpoint: Checkpoint, module: str) -> str | None:
    """Our name of a module's matrix: PART.NAME, or the head's; None for what is unknown."""
    module = module.removeprefix("thinker.")
    for key in (f"{module}.weight", f"model.{module}.weight"):
        with suppress(KeyError):
            name = checkpoint.backbone.name_of(key)
            return name if name is None or _has_layer(name) else None
    return None


def _has_layer(name: str) -> bool:
    """Whether our name has the number of a layer wherever it needs one."""
    _, _, rest = name.partition(".")
    return not _is_stacked(rest) or _STACKED.fullmatch(rest) is not None


def _saved_head(
    file: Path, saved: dict[str, np.ndarray], config: PeftConfig, checkpoint: Checkpoint
) -> np.ndarray | None:
    """The vocabulary head that an adapter saves whole, if it does.

    PEFT also saves embeddings as they are, which changes nothing. Raises for any other tensor.
    """
    head = None
    for key, value in saved.items():
        module = key.removeprefix(PREFIX).removesuffix(".weight").removesuffix(".base_layer")
        name = _name_in(checkpoint, module)
        if name == HEAD and config.saves_head and ".base_layer" not in key:
            head = value
            continue
        part, _, rest = (name or "").partition(".")
        stored = checkpoint.keys.get("head" if name == HEAD else part, {})
        stored_key = stored.get("weight" if name == HEAD else rest)
        if name not in (HEAD, "decoder.embed_tokens.weight") or stored_key is None:
            raise LcoError(f"{file}: unknown key {key}")
        if not np.array_equal(value, checkpoint.tensors.read(stored_key).astype(np.float32)):
            raise LcoError(
                f"{file}: {key} is a whole matrix, which differs from the checkpoint's; merge the "
                "adapter in peft (merge_and_unload), and give the merged model"
            )
    if config.saves_head and head is None:
        raise LcoError(f"{file} has no lm_head.weight, which modules_to_save promises")
    return head


# ---- pairs as trees

_Stacks = dict[str, dict[int | None, np.ndarray]]  # path of a factor -> layer -> the factor


def _trees(
    file: Path, pairs: dict[str, Pair], config: PeftConfig, depths: dict[str, int]
) -> tuple[dict[str, Tree], LoraConfig]:
    """Adapter trees by part, and their one configuration. depths: the most layers of each part.

    Pairs of different ranks or scales get the largest rank, by rows and columns of zeros, and the
    scale 1, by a multiplied B: their products stay what they were.
    """
    pairs, lora_config = _of_one_scale(pairs, config)
    found: dict[str, _Stacks] = defaultdict(lambda: defaultdict(dict))
    for name, pair in pairs.items():
        part, path, layer = _place(name)
        if part not in depths:
            raise LcoError(f"{file} adapts {name}, which the model does not have")
        if layer is not None and layer >= depths[part]:
            raise LcoError(
                f"{file} names layer {layer} of the {part}, which can have {depths[part]}: the "
                "adapter is of another model"
            )
        found[part][f"{path}.a"][layer] = pair.a
        found[part][f"{path}.b"][layer] = pair.b
    trees = {part: unflatten_dict(_stack(file, stacks), sep=".") for part, stacks in found.items()}
    return trees, replace(lora_config, targets=_targets(found["decoder"]))


def _targets(paths: Iterable[str]) -> str:
    """The pattern of a decoder's adapted matrices, from the paths of their factors."""
    factors = (path.removeprefix("layers.") for path in paths if path.endswith(".weight.a"))
    modules = sorted({re.escape(path.removesuffix(".weight.a")) for path in factors})
    return rf"layers\.(?:{'|'.join(modules)})"


def _of_one_scale(pairs: dict[str, Pair], config: PeftConfig) -> tuple[dict[str, Pair], LoraConfig]:
    """The pairs, and the configuration that holds for all of them, without targets."""
    lora_config = LoraConfig(config.rank, config.alpha, config.dropout, "", config.use_rslora)
    ranks = {len(pair.a) for pair in pairs.values()}
    scales = {pair.scale for pair in pairs.values()}
    if ranks <= {config.rank} and scales <= {lora_config.scale}:
        return pairs, lora_config
    rank = max(ranks)
    same = {name: _of_rank(pair, rank) for name, pair in pairs.items()}
    return same, LoraConfig(rank, float(rank), config.dropout)


def _of_rank(pair: Pair, rank: int) -> Pair:
    """The pair with its scale in B, and zeros up to a rank."""
    more = rank - len(pair.a)
    a = np.pad(pair.a, ((0, more), (0, 0)))
    b = np.pad(np.float32(pair.scale) * pair.b, ((0, 0), (0, more)))
    return Pair(a, b, 1.0)


def _place(name: str) -> tuple[str, str, int | None]:
    """(part, path in its tree, layer) of a matrix, by our name."""
    part, _, rest = name.partition(".")
    if name == HEAD:
        return "head", "weight", None
    match = _STACKED.fullmatch(rest)
    if match is None:
        return part, rest, None
    return part, f"{match[1]}.{match[3]}", int(match[2])


def _is_stacked(path: str) -> bool:
    return path.startswith(("layers.", "blocks."))


def _stack(file: Path, found: _Stacks) -> dict[str, np.ndarray]:
    """{path: factors of all layers [L, …]}, with zeros for the layers that are left out."""
    numbers = [layer for layers in found.values() for layer in layers if layer is not None]
    depth = 1 + max(numbers, default=0)
    stacked = {}
    for path, layers in found.items():
        shapes = sorted({value.shape for value in layers.values()})
        if len(shapes) > 1:
            raise LcoError(f"{file}: {path} has layers of different shapes: {shapes}")
        if None in layers:
            stacked[path] = layers[None]
            continue
        stacked[path] = np.zeros((depth, *shapes[0]), np.float32)
        for layer, value in layers.items():
            stacked[path][layer] = value
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
        if len(shape) != factor.ndim or "norm" in stem:
            raise LcoError(f"{where} adapts {stem}, which is no linear layer")
        *stack, out_features, in_features = shape
        *layers, rows, columns = factor.shape
        fits = columns == in_features if half == "a" else rows == out_features
        if not fits or layers > stack:
            raise LcoError(f"{where}: {path} has shape {factor.shape}, which does not fit {shape}")
        missing = [(0, depth - there) for depth, there in zip(stack, layers, strict=True)]
        padded[path] = np.pad(factor, (*missing, (0, 0), (0, 0)))
    return unflatten_dict(padded, sep=".")
