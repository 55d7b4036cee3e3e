"""Soups: weighted averages of adapters, or of models, of one base.

Wortsman et al. 2022, arXiv 2203.05482.

Dimensions: L layers, O output features, I input features, r rank of an adapter, R the sum of all
ranks.
"""

import logging
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.checkpoint.peft import layer_tensors, match_adapters, read_peft
from lco_jax.checkpoint.peft_config import CONFIG
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.checkpoint.tensors import is_float
from lco_jax.checkpoint.usage import common_usage_of_models
from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve
from lco_jax.core.lora import LoraConfig, Tree
from lco_jax.data.prompts import ChatTokenizer

logger = logging.getLogger(__name__)
Adapter = tuple[Tree, LoraConfig]
# keys of config.json in which models may differ
FREE = ("_name_or_path", "transformers_version", "torch_dtype", "dtype")


def normalized_weights(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1: those given, divided by their sum; equal ones for None.

    Raises for negative ones.
    """
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise LcoError(
            f"--weights has {len(weights)} numbers for {count} to average; give one for each"
        )
    total = sum(weights)
    valid = all(math.isfinite(weight) and weight >= 0 for weight in weights)
    if not valid or not total:
        given = " ".join(map(str, weights))
        raise LcoError(f"--weights is {given}; none may be negative, and not all zero")
    return [weight / total for weight in weights]


# ---- adapters


def read_adapters(names: Sequence[str], checkpoint: Checkpoint) -> list[Adapter]:
    """PEFT adapters of any ranks and targets, each with as many layers as the model.

    Raises for one that does not fit the model.
    """
    params = abstract_params(checkpoint.config)
    adapters, bases = [], set()
    for name in names:
        tree, config = read_peft(name, checkpoint.config.num_layers)
        adapters.append((match_adapters(tree, params, str(name)), config))
        content = read_json(resolve(name, [CONFIG]) / CONFIG)
        bases.add(str(content.get("base_model_name_or_path")))
    if len(bases) > 1:
        listed = ", ".join(sorted(bases))
        logger.warning("the adapters name different models as their base: %s", listed)
    return adapters


def average_adapters(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of all deltas, exactly: one adapter of rank R and scale 1.

    It stacks the adapters' A one below the other and their B side by side, each B times weight and
    scale. Where an adapter leaves a matrix alone, its share of both is zero.
    """
    total_rank = sum(config.rank for _, config in adapters)
    leaves: dict[str, np.ndarray] = {}
    start = 0
    for (tree, config), weight in zip(adapters, weights, strict=True):
        ranks = slice(start, start + config.rank)
        start += config.rank
        for path, factor in flatten_dict(tree, sep=".").items():
            layers, rows, columns = factor.shape
            if path.endswith(".a"):
                shape = (layers, total_rank, columns)
                leaf = leaves.setdefault(path, np.zeros(shape, np.float32))
                leaf[:, ranks] = factor
            else:
                shape = (layers, rows, total_rank)
                leaf = leaves.setdefault(path, np.zeros(shape, np.float32))
                leaf[:, :, ranks] = weight * config.scale * factor
    return unflatten_dict(leaves, sep="."), _of_scale_one(total_rank)


def reduce_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The nearest adapter of a lower rank, and the singular values of every delta.

    The values, before the reduction, have the names LAYER.MODULE. Those that are cut off are the
    Frobenius norm of the error (Eckart and Young 1936).
    """
    tree, config = adapter
    matrices = list(layer_tensors(tree))
    factors: dict[str, list[np.ndarray]] = defaultdict(list)
    spectra = {}
    for layer, module, a, b in progress_bar(matrices, desc="reducing", unit="matrix", delay=2):
        left, values, right = _svd_of_product(config.scale * b, a)
        spectra[f"{layer}.{module}"] = values
        root = np.sqrt(values[:rank])
        new_a = _with_rows(root[:, None] * right[:rank], rank)
        new_b = _with_rows(root[:, None] * left.T[:rank], rank).T
        factors[f"layers.{module}.weight.a"].append(new_a)
        factors[f"layers.{module}.weight.b"].append(new_b)
    leaves = {path: np.stack(layers) for path, layers in factors.items()}
    return (unflatten_dict(leaves, sep="."), _of_scale_one(rank)), spectra


def _with_rows(matrix: np.ndarray, rows: int) -> np.ndarray:
    """A matrix in float32, padded with rows of zeros."""
    padding = ((0, rows - len(matrix)), (0, 0))
    return np.pad(matrix, padding).astype(np.float32)


def _of_scale_one(rank: int) -> LoraConfig:
    return LoraConfig(rank=rank, alpha=float(rank))


def _svd_of_product(b: np.ndarray, a: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The SVD of B A in float64; the O × I product itself is never computed.

    With B = Q_b R_b and Aᵀ = Q_a R_a, it is the SVD of the small R_b R_aᵀ between Q_b and Q_aᵀ.
    """
    q_b, r_b = np.linalg.qr(b.astype(np.float64))
    q_a, r_a = np.linalg.qr(a.T.astype(np.float64))
    left, values, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
    return q_b @ left, values, right @ q_a.T


def rank_errors(spectra: dict[str, np.ndarray], rank: int) -> dict[str, Any]:
    """The relative errors of deltas that are cut to `rank`: overall, the worst, each by name."""
    each = {name: _relative_error([values], rank) for name, values in spectra.items()}
    overall = _relative_error(spectra.values(), rank)
    return {"overall": overall, "max": max(each.values()), "matrices": each}


def _relative_error(spectra: Iterable[np.ndarray], rank: int) -> float:
    """|deltas − their approximations| / |deltas|, in the Frobenius norm."""
    squared_error = squared_norm = 0.0
    for values in spectra:
        squared_error += float(np.sum(values[rank:] ** 2))
        squared_norm += float(np.sum(values**2))
    return math.sqrt(squared_error / (squared_norm or 1.0))


def greedy(
    count: int, score: Callable[[list[int]], float]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The greedy soup: the best ingredient, then each that does not lower the score of the average.

    score: of the equal average of ingredients, given their indices; higher is better. Returns the
    indices it keeps and a report of its steps. Ingredients that score alike stay in their order.
    """
    alone = [score([i]) for i in range(count)]
    first, *others = sorted(range(count), key=lambda i: -alone[i])
    kept, best = [first], alone[first]
    steps = [{"index": first, "alone": best, "together": best, "kept": True}]
    for i in others:
        together = score([*kept, i])
        keep = together >= best
        steps.append({"index": i, "alone": alone[i], "together": together, "kept": keep})
        if keep:
            kept.append(i)
            best = together
    return kept, steps


# ---- models


def average_models(
    names: Sequence[str], weights: Sequence[float]
) -> tuple[Checkpoint, Callable[[str], np.ndarray], Usage]:
    """The first checkpoint, a function that averages the tensors of a key, in float32, and how all
    are used.

    Raises, by key, unless all agree in configuration, tokenizer, tensors' shapes, and in every
    tensor that holds no floating-point numbers; and unless all are used alike.
    """
    checkpoints = [open_checkpoint(name) for name in names]
    first, *others = checkpoints
    for name, other in zip(names[1:], others, strict=True):
        _check_alike(first, other, f"{name} and {names[0]}")
    usage = common_usage_of_models(names, checkpoints)

    def average(key: str) -> np.ndarray:
        value = first.tensors.read(key)
        if is_float(value.dtype):
            total = np.zeros(value.shape, np.float32)
            for checkpoint, weight in zip(checkpoints, weights, strict=True):
                total += weight * checkpoint.tensors.read(key).astype(np.float32)
            return total
        if not all(np.array_equal(value, other.tensors.read(key)) for other in others):
            raise LcoError(
                f"{key} holds {value.dtype}, which cannot be averaged, and differs among the models"
            )
        return value

    return first, average, usage


def _check_alike(one: Checkpoint, other: Checkpoint, names: str) -> None:
    """Raise for the first difference between two models that an average cannot have."""
    described = {"config.json": _geometry, "tensors": _tensors, "tokenizer": _tokens}
    for what, describe in described.items():
        first, second = describe(one), describe(other)
        for key in sorted(first.keys() | second.keys()):
            a, b = first.get(key), second.get(key)
            if a != b:
                raise LcoError(f"{names} differ in {what}: {key} is {b!r:.60} and {a!r:.60}")


def _geometry(checkpoint: Checkpoint) -> dict[str, Any]:
    config = flatten_dict(checkpoint.model_config)
    return {".".join(map(str, path)): config[path] for path in config if path[-1] not in FREE}


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    described = {}
    for key in checkpoint.tensors:
        dtype = checkpoint.tensors.dtype(key)
        kind = "float" if is_float(dtype) else str(dtype)
        described[key] = (checkpoint.tensors.shape(key), kind)
    return described


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer = ChatTokenizer(checkpoint.folder).tokenizer
    return {**tokenizer.get_vocab(), "the chat template": tokenizer.chat_template}
