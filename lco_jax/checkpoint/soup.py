"""Soups: weighted averages of adapters, or of models, of one base (Wortsman et al. 2022, arXiv 2203.05482).

Dimensions: L layers, O output features, I input features, r rank of an adapter, R the sum of all ranks.
"""

import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from tqdm import tqdm

from lco_jax.checkpoint.hf import Checkpoint, abstract_params, open_checkpoint
from lco_jax.checkpoint.peft import layer_tensors, match_adapters, read_peft
from lco_jax.checkpoint.tensors import is_float
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, resolve
from lco_jax.core.lora import LoraConfig
from lco_jax.data.prompts import ChatTokenizer

logger = logging.getLogger(__name__)
Adapter = tuple[dict[str, Any], LoraConfig]
FREE = (
    "_name_or_path",
    "transformers_version",
    "torch_dtype",
    "dtype",
)  # in which configurations may differ


def shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Weights that sum to 1: those given, divided by their sum; equal ones for None. Raises for negative ones."""
    weights = [1.0] * count if weights is None else list(weights)
    if len(weights) != count:
        raise LcoError(
            f"--weights has {len(weights)} numbers for {count} to average; give one for each"
        )
    if not all(math.isfinite(weight) and weight >= 0 for weight in weights) or not sum(weights):
        raise LcoError(
            f"--weights is {' '.join(map(str, weights))}; none may be negative, and not all zero"
        )
    return [weight / sum(weights) for weight in weights]


def read_adapters(names: Sequence[str], checkpoint: Checkpoint) -> list[Adapter]:
    """PEFT adapters of any ranks and targets, each with as many layers as the model. Raises for what does not fit."""
    params, found = abstract_params(checkpoint.config), [read_peft(name) for name in names]
    configs = [
        read_json(resolve(name, ["adapter_config.json"]) / "adapter_config.json") for name in names
    ]
    if len(bases := {str(config.get("base_model_name_or_path")) for config in configs}) > 1:
        logger.warning(
            "the adapters name different models as their base: %s", ", ".join(sorted(bases))
        )
    return [
        (match_adapters(tree, params, str(name)), config)
        for name, (tree, config) in zip(names, found, strict=True)
    ]


def average_adapters(adapters: Sequence[Adapter], weights: Sequence[float]) -> Adapter:
    """The weighted sum of all deltas, exactly: one adapter of rank R and scale 1.

    Its A are theirs one below the other, its B theirs side by side, each times weight and scale; where one adapts a
    matrix and another does not, the other has zeros.
    """
    total = sum(config.rank for _, config in adapters)
    leaves: dict[str, np.ndarray] = {}
    at = 0
    for (tree, config), weight in zip(adapters, weights, strict=True):
        for path, value in flatten_dict(tree, sep=".").items():
            layers, rows, columns = value.shape
            if path.endswith(".a"):
                leaf = leaves.setdefault(path, np.zeros((layers, total, columns), np.float32))
                leaf[:, at : at + config.rank] = value
            else:
                leaf = leaves.setdefault(path, np.zeros((layers, rows, total), np.float32))
                leaf[:, :, at : at + config.rank] = weight * config.scale * value
        at += config.rank
    return unflatten_dict(leaves, sep="."), LoraConfig(rank=total, alpha=float(total))


def reduce_rank(adapter: Adapter, rank: int) -> tuple[Adapter, dict[str, np.ndarray]]:
    """The nearest adapter of a lower rank, and {"LAYER.MODULE": singular values of its delta, before}.

    With B = Q_b R_b and Aᵀ = Q_a R_a, the SVD of B A is that of the small R_b R_aᵀ between Q_b and Q_aᵀ: the O × I
    delta never exists. What is cut off is the Frobenius norm of the error (Eckart and Young 1936).
    """
    tree, config = adapter
    cut, spectra = {}, {}
    matrices = list(layer_tensors(tree))
    for layer, module, a, b in tqdm(matrices, desc="reducing", unit="matrix", delay=2):
        (q_b, r_b), (q_a, r_a) = (
            np.linalg.qr(x.astype(np.float64)) for x in (config.scale * b, a.T)
        )
        left, values, right = np.linalg.svd(r_b @ r_a.T, full_matrices=False)
        spectra[f"{layer}.{module}"] = values
        root, n = np.sqrt(values[:rank]), min(rank, len(values))
        stem, depth = f"layers.{module}.weight", matrices[-1][0] + 1
        for side, shape in (("a", (depth, rank, a.shape[1])), ("b", (depth, b.shape[0], rank))):
            cut.setdefault(f"{stem}.{side}", np.zeros(shape, np.float32))
        cut[f"{stem}.a"][layer, :n] = root[:, None] * (right[:rank] @ q_a.T)
        cut[f"{stem}.b"][layer, :, :n] = (q_b @ left[:, :rank]) * root
    return (unflatten_dict(cut, sep="."), LoraConfig(rank=rank, alpha=float(rank))), spectra


def rank_errors(spectra: dict[str, np.ndarray], rank: int) -> dict[str, Any]:
    """|delta − its approximation| / |delta| (Frobenius): of all matrices together, the worst, and each by name."""
    square = lambda values: float((values**2).sum())
    each = {name: math.sqrt(square(s[rank:]) / (square(s) or 1.0)) for name, s in spectra.items()}
    whole = math.sqrt(
        sum(square(s[rank:]) for s in spectra.values())
        / (sum(map(square, spectra.values())) or 1.0)
    )
    return {"overall": whole, "max": max(each.values()), "matrices": each}


def greedy(
    count: int, score: Callable[[list[int]], float]
) -> tuple[list[int], list[dict[str, Any]]]:
    """The greedy soup: the best alone, then each that does not lower the score of the average; and how it went.

    score: of the equal average of ingredients, given their numbers; higher is better. Ties alone keep their order.
    """
    alone = [score([i]) for i in range(count)]
    order = sorted(range(count), key=lambda i: -alone[i])
    kept, best = order[:1], alone[order[0]]
    steps = [{"index": order[0], "alone": best, "together": best, "kept": True}]
    for i in order[1:]:
        together = score([*kept, i])
        steps.append(
            {"index": i, "alone": alone[i], "together": together, "kept": together >= best}
        )
        if together >= best:
            kept, best = [*kept, i], together
    return kept, steps


def average_models(
    names: Sequence[str], weights: Sequence[float]
) -> tuple[Checkpoint, Callable[[str], np.ndarray]]:
    """The first checkpoint, and the function that makes any tensor of the average, in float32, from one of each.

    Raises, by key, unless all agree in configuration, tokenizer, tensors' shapes, and whatever is no floating point.
    """
    checkpoints = [open_checkpoint(name) for name in names]
    first, *others = checkpoints
    for name, other in zip(names[1:], others, strict=True):
        _check_alike(first, other, f"{name} and {names[0]}")

    def tensor(key: str) -> np.ndarray:
        value = first.tensors.read(key)
        if is_float(value.dtype):
            values = (
                weight * x.tensors.read(key).astype(np.float32)
                for x, weight in zip(checkpoints, weights, strict=True)
            )
            return sum(values, np.zeros(value.shape, np.float32))
        if not all(np.array_equal(value, other.tensors.read(key)) for other in others):
            raise LcoError(
                f"{key} holds {value.dtype}, of which there is no average, and differs among the models"
            )
        return value

    return first, tensor


def _check_alike(one: Checkpoint, other: Checkpoint, names: str) -> None:
    """Raise for the first thing in which two models differ that an average needs to be equal."""
    for what, described in (
        ("config.json", _geometry),
        ("tensors", _tensors),
        ("tokenizer", _tokens),
    ):
        ours, theirs = described(one), described(other)
        if differing := sorted(
            key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)
        ):
            key = differing[0]
            raise LcoError(
                f"{names} differ in {what}: {key} is {theirs.get(key)!r:.60} and {ours.get(key)!r:.60}"
            )


def _geometry(checkpoint: Checkpoint) -> dict[str, Any]:
    config = flatten_dict(checkpoint.model_config, sep=".")
    return {key: value for key, value in config.items() if key.rsplit(".", 1)[-1] not in FREE}


def _tensors(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = checkpoint.tensors
    return {
        key: (tensors.shape(key), "float" if is_float(x := tensors.dtype(key)) else str(x))
        for key in tensors
    }


def _tokens(checkpoint: Checkpoint) -> dict[str, Any]:
    tokenizer = ChatTokenizer(checkpoint.folder).tokenizer
    return {**tokenizer.get_vocab(), "the chat template": tokenizer.chat_template}
