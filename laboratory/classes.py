"""What an assembled model can do with media of known classes.

Every kind of media (photo, written, spoken) has N items of C classes, and of each class a caption.
All numbers come from one pass that stores the states of every layer.

Dimensions: N media, C classes, L layers, D hidden.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from laboratory.probes import rows_of
from lco_jax.analysis.measures import RESOLUTION, Side, anisotropy, unbiased_cka
from lco_jax.data.records import as_input

TESTS = {"photo": "image", "written": "digit", "spoken": "audio"}  # kind -> name of its test file
LAYERS = ("anisotropy", "anisotropy_of_text", "cka", "accuracy")


@dataclass(frozen=True)
class Kind:
    """media [N], their labels [N] as numbers of a class, and the captions [C] of the classes."""

    media: list[Any]
    labels: np.ndarray
    captions: list[str]


def read_kinds(world: Path) -> dict[str, Kind]:
    """{photo, written, spoken: its test media}, of a world that `laboratory.real` wrote."""
    kinds = {}
    for name, test in TESTS.items():
        rows = [*rows_of(world / "tests" / f"zeroshot_{test}.jsonl", "media", "label")]
        captions = sorted({row["label"] for row, _ in rows})
        media = [as_input(reader.side(row["media"], "media")) for row, reader in rows]
        labels = np.array([captions.index(row["label"]) for row, _ in rows])
        kinds[name] = Kind(media, labels, captions)
    return kinds


def measure(
    encode_layers: Callable[[list[Any]], np.ndarray],
    project: Callable[[np.ndarray], np.ndarray],
    kinds: dict[str, Kind],
) -> dict[str, Any]:
    """Every number of one model.

    encode_layers: inputs -> float32 [L + 1, inputs, D]. project: last states -> what is compared.

    representation: of each kind `KIND_to_text` (the nearest caption is the right one),
    `text_to_KIND` (mean average precision of the class's media among all), and `written_to_spoken`
    and back (the nearest item is of the same digit). layers: {one of `LAYERS`: {kind: a number
    before the first layer and after each}}; cka is of media with their captions, accuracy is
    `KIND_to_text`.
    """
    media = {name: encode_layers(kind.media) for name, kind in kinds.items()}
    texts = {name: encode_layers(list(kind.captions)) for name, kind in kinds.items()}
    found: dict[str, float] = {}
    ends = {name: _unit(project(states[-1])) for name, states in media.items()}
    for name, kind in kinds.items():
        similarity = ends[name] @ _unit(project(texts[name][-1])).T  # [N, C]
        found[f"{name}_to_text"] = _accuracy(similarity, kind.labels)
        found[f"text_to_{name}"] = _mean_precision(similarity.T, kind.labels)
    for one, other in (("written", "spoken"), ("spoken", "written")):
        labels = _digits_of(kinds[other], kinds[one])
        nearest = (ends[one] @ ends[other].T).argmax(axis=1)
        found[f"{one}_to_{other}"] = float((labels[nearest] == kinds[one].labels).mean())
    by_kind = {name: _by_layer(media[name], texts[name], kind) for name, kind in kinds.items()}
    layers = {of: {name: values[of] for name, values in by_kind.items()} for of in LAYERS}
    return {"representation": found, "layers": layers}


def chance(kinds: dict[str, Kind]) -> dict[str, float]:
    """What guessing gives, of every number of `measure`'s representation."""
    found = {}
    for name, kind in kinds.items():
        found[f"{name}_to_text"] = 1 / len(kind.captions)
        found[f"text_to_{name}"] = _chance_of_precision(kind)
    for name in ("written_to_spoken", "spoken_to_written"):
        found[name] = 1 / len(kinds["spoken"].captions)
    return found


def _digits_of(documents: Kind, queries: Kind) -> np.ndarray:
    """The labels of the documents as numbers of the queries' classes: both are the ten digits."""
    digits = [caption.rpartition(" ")[2] for caption in queries.captions]
    numbers = [digits.index(caption.rpartition(" ")[2]) for caption in documents.captions]
    return np.array(numbers)[documents.labels]


def _unit(vectors: np.ndarray) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _accuracy(similarity: np.ndarray, labels: np.ndarray) -> float:
    """The share of rows whose own column is above all others; a tie is wrong. [N, C]."""
    own = similarity[np.arange(len(labels)), labels]
    others = similarity.copy()
    others[np.arange(len(labels)), labels] = -np.inf
    return float((own > others.max(axis=1)).mean())


def _mean_precision(similarity: np.ndarray, labels: np.ndarray) -> float:
    """Mean over classes of the average precision of its items. similarity [C, N]."""
    precisions = []
    for number, row in enumerate(similarity):
        relevant = labels[np.argsort(-row, kind="stable")] == number
        hits = np.cumsum(relevant) / np.arange(1, len(relevant) + 1)
        precisions.append(hits[relevant].mean())
    return float(np.mean(precisions))


def _chance_of_precision(kind: Kind, draws: int = 200) -> float:
    """The expected average precision of a random order, by simulation."""
    rng = np.random.default_rng(0)
    orders = rng.random((draws, len(kind.captions), len(kind.labels)))
    return float(np.mean([_mean_precision(order, kind.labels) for order in orders]))


def _by_layer(media: np.ndarray, texts: np.ndarray, kind: Kind) -> dict[str, list[float | None]]:
    """media [L + 1, N, D], texts [L + 1, C, D]. None where a measure is not defined.

    Before the first layer there is nothing to measure: the last token is the same for all.
    """
    found: dict[str, list[float | None]] = {name: [None] for name in LAYERS}
    for state, text in zip(media[1:], texts[1:], strict=True):
        side, other = Side(state, "media", 2), Side(text[kind.labels], "text", 2)
        found["anisotropy"].append(anisotropy(side))
        found["anisotropy_of_text"].append(anisotropy(Side(text, "text", 2)))
        found["cka"].append(_cka(side, other))
        found["accuracy"].append(_accuracy(_unit(state) @ _unit(text).T, kind.labels))
    return found


def _cka(media: Side, text: Side) -> float | None:
    """Unbiased CKA; None where all states of a side are the same."""
    for side in (media, text):
        if np.ptp(side.unit, axis=0).max() <= RESOLUTION:
            return None
    return unbiased_cka(media, text)
