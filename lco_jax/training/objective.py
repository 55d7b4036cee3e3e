"""The contrastive objective: InfoNCE, and what may be added to the paper's recipe.

Each addition is one value of `config.loss`, and its default is the paper's.

Dimensions: B records, M hard negatives a record, D hidden, K modalities.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import combinations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from lco_jax.core.errors import LcoError
from lco_jax.core.packing import MODALITIES
from lco_jax.data.guide import guide_dimension
from lco_jax.training.losses import Negatives, info_nce

OF_TRAIN = ("temperature", "two_way", "ignore_duplicates")  # what config.train has of it
GUIDES = ("", "own", "base", "guide")
TEACHERS = ("", "kl", "margin_mse")

Metrics = dict[str, Array]


@dataclass(frozen=True)
class LossConfig:
    """config.train's temperature, two_way and ignore_duplicates, and all of config.loss.

    temperature: the softmax's. two_way: the mean of InfoNCE and of that of each positive among all
        anchors (CLIP's, Radford et al. 2021, arXiv 2103.00020). ignore_duplicates: a candidate of
        the positive's content is no negative.
    temperatures: of each of `MODALITIES`, in place of `temperature`; () for one. A content of
        several modalities has their mean, a pair the mean of both (e5-omni, arXiv 2601.03666).
    learn_temperature: they are trained, in logarithms.
    matryoshka: lengths of prefixes of the vectors that are embeddings, too: the loss is the mean
        over the whole and each (Kusupati et al. 2022, arXiv 2205.13147). matryoshka_weights: of the
        whole and of each; () for equal ones.
    false_negatives: whose scores tell that a candidate is a second positive: "own", "base" (the
        model before tuning), "guide" (another model), or "" (all others are negatives).
        false_negative_margin: how far below the positive's score that begins. guide: the folder of
        the other model's vectors, which `lco mine` makes.
    hard_weight: how many times a record's own hard negatives count.
    teacher: what is learned of a teacher's scores of a record's own candidates: "kl" (their
        softmax), "margin_mse" (their differences; Hofstätter et al. 2020, arXiv 2010.02666), "".
        teacher_weight: of that term. teacher_temperature: of the teacher's softmax; ours has
        `temperature`.
    coral: the weight of a term that aligns the covariances of modalities (Sun and Saenko 2016,
        arXiv 1607.01719).
    """

    temperature: float = 0.03
    two_way: bool = False
    ignore_duplicates: bool = False
    temperatures: tuple[float, ...] = ()
    learn_temperature: bool = False
    matryoshka: tuple[int, ...] = ()
    matryoshka_weights: tuple[float, ...] = ()
    false_negatives: str = ""
    false_negative_margin: float = 0.0
    guide: str = ""
    hard_weight: float = 1.0
    teacher: str = ""
    teacher_weight: float = 1.0
    teacher_temperature: float = 1.0
    coral: float = 0.0

    def __post_init__(self) -> None:
        if len(self.temperatures) not in (0, len(MODALITIES)):
            raise LcoError(
                f"config.loss.temperatures has {len(self.temperatures)} numbers; give one each for "
                f"{', '.join(MODALITIES)}"
            )
        weights = len(self.matryoshka_weights)
        if weights not in (0, 1 + len(self.matryoshka)):
            raise LcoError(
                f"config.loss.matryoshka_weights has {weights} numbers; give one for the whole "
                f"vector and one for each of the {len(self.matryoshka)} prefixes"
            )

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "LossConfig":
        """From config.train and config.loss."""
        train = {key: config["train"][key] for key in OF_TRAIN}
        loss = config.get("loss", {})  # a run of an earlier version has none
        return cls(**train, **{key: _fixed(value) for key, value in loss.items()})

    @classmethod
    def defaults(cls) -> dict[str, Any]:
        """Key of config.loss -> its value in the paper."""
        return {one.name: one.default for one in fields(cls) if one.name not in OF_TRAIN}

    @property
    def added(self) -> list[str]:
        """The keys of config.loss that are not the paper's."""
        return [key for key, value in self.defaults().items() if getattr(self, key) != value]

    def check_dimension(self, dimension: int) -> None:
        """Raise for a prefix that is no part of vectors of this length."""
        for length in self.matryoshka:
            if length >= dimension:
                raise LcoError(
                    f"config.loss.matryoshka has {length}; the model's vectors have {dimension} "
                    "numbers, and a prefix has fewer"
                )

    @property
    def guide_dimension(self) -> int:
        """The numbers of a vector of the guide; 0 without one."""
        return guide_dimension(self.guide)

    @property
    def first_temperatures(self) -> tuple[float, ...]:
        """The temperature of each modality before training."""
        return self.temperatures or (self.temperature,) * len(MODALITIES)


class Labels(NamedTuple):
    """What is known of each content of each record, [B, 2 + M]: anchor, positive, negatives.

    present: bool. content: equal numbers where contents are equal. kinds: bits of `MODALITIES`.
    teacher: a teacher's scores of anchor and content, NaN where there is none; None without any.
    """

    present: Array
    content: Array
    kinds: Array
    teacher: Array | None = None


def contrastive(
    embeddings: Array,
    labels: Labels,
    config: LossConfig,
    log_temperatures: Array | None = None,
    guide: Array | None = None,
) -> tuple[Array, Metrics]:
    """The objective of a batch's embeddings, float32 [B, 2 + M, D] of unit length.

    log_temperatures: [K], those that are trained. guide: the vectors of another model, or of the
    model before tuning, where `config.false_negatives` is "guide" or "base". Returns the loss, and
    the metrics of `info_nce` for whole vectors. Among them is the loss; where there are several
    terms, each one, too.
    """
    temperature = _temperature(labels.kinds, config, log_temperatures)
    measured = [
        _of_vectors(vectors, labels, config, temperature, guide)
        for vectors in _whole_and_prefixes(embeddings, config)
    ]
    weights = config.matryoshka_weights or (1.0,) * len(measured)
    metrics = dict(measured[0])
    for key in ("loss", "record_losses"):
        metrics[key] = _weighted_mean([one[key] for one in measured], weights)
    for length, one in zip(config.matryoshka, measured[1:], strict=True):
        metrics[f"loss_{length}"] = one["loss"]
    if config.coral:
        metrics["coral"] = coral(embeddings, labels)
        metrics["loss"] += config.coral * metrics["coral"]
    if log_temperatures is not None:
        for name, value in zip(MODALITIES, jnp.exp(log_temperatures), strict=True):
            metrics[f"temperature_{name}"] = value
    return metrics["loss"], metrics


def _fixed(value: Any) -> Any:
    """A configuration's list as a tuple."""
    return tuple(value) if isinstance(value, list | tuple) else value


def _weighted_mean(values: Sequence[Array], weights: Sequence[float]) -> Array:
    if len(values) == 1:
        return values[0]
    return sum(w * x for w, x in zip(weights, values, strict=True)) / sum(weights)


def _temperature(kinds: Array, config: LossConfig, log_temperatures: Array | None) -> float | Array:
    """One for all pairs, or that of each content: the mean over its modalities, [B, 2 + M]."""
    if log_temperatures is None and not config.temperatures:
        return config.temperature
    each = jnp.array(config.first_temperatures)
    if log_temperatures is not None:
        each = jnp.exp(log_temperatures)
    has = _has_modality(kinds).astype(jnp.float32)  # [B, 2 + M, K]
    # an absent content has none, and any temperature
    has = jnp.where(kinds[..., None] == 0, 1.0, has)
    return has @ each / has.sum(axis=-1)


def _has_modality(kinds: Array) -> Array:
    """bool [..., K]."""
    return (kinds[..., None] >> jnp.arange(len(MODALITIES))) & 1 == 1


def _whole_and_prefixes(embeddings: Array, config: LossConfig) -> Iterator[Array]:
    """The vectors, and each prefix of them, of unit length again."""
    yield embeddings
    for length in config.matryoshka:
        prefix = embeddings[..., :length]
        norm = jnp.linalg.norm(prefix, axis=-1, keepdims=True)
        yield prefix / jnp.maximum(norm, 1e-12)


def _of_vectors(
    vectors: Array,
    labels: Labels,
    config: LossConfig,
    temperature: float | Array,
    guide: Array | None,
) -> Metrics:
    """InfoNCE, one way or both, and the teacher's term: the metrics, with the loss of both."""
    margin = config.false_negative_margin if config.false_negatives else None
    negatives = Negatives(margin, guide, config.hard_weight)
    content = labels.content if config.ignore_duplicates else None
    _, metrics = info_nce(vectors, labels.present, temperature, content, negatives=negatives)
    if config.two_way:
        _, others = info_nce(
            _swapped(vectors),
            _swapped(labels.present),
            _swapped(temperature) if jnp.ndim(temperature) == 2 else temperature,
            None if content is None else _swapped(content),
            negatives=Negatives(margin, None if guide is None else _swapped(guide)),
        )
        for key in ("loss", "record_losses"):
            metrics[key] = (metrics[key] + others[key]) / 2
    if config.teacher:
        metrics["teacher_loss"] = teacher_loss(vectors, labels, config)
        metrics["loss"] += config.teacher_weight * metrics["teacher_loss"]
    return metrics


def _swapped(x: Array) -> Array:
    """Positive, anchor."""
    return x[:, 1::-1]


def teacher_loss(vectors: Array, labels: Labels, config: LossConfig) -> Array:
    """How far the cosines of a record's own candidates are from a teacher's scores of them.

    The mean over the records that have two scores or more; 0 without any.
    """
    cosines = jnp.einsum("bd,bsd->bs", vectors[:, 0], vectors[:, 1:], precision="highest")
    scores = labels.teacher[:, 1:]
    scored = labels.present[:, 1:] & jnp.isfinite(scores)
    scores = jnp.where(scored, scores, 0.0)
    if config.teacher == "kl":
        losses, counts = _divergence(cosines / config.temperature, scores, scored, config)
    else:
        losses, counts = _margin_errors(cosines, scores, scored)
    counts &= labels.present[:, 0]
    return jnp.sum(jnp.where(counts, losses, 0.0)) / jnp.maximum(counts.sum(), 1)


def _divergence(
    logits: Array, scores: Array, scored: Array, config: LossConfig
) -> tuple[Array, Array]:
    """(KL of the teacher's softmax from ours over a record's scored candidates [B], whether there
    are two or more).
    """
    lowest = jnp.finfo(logits.dtype).min
    ours = jax.nn.log_softmax(jnp.where(scored, logits, lowest), axis=-1)
    wanted = jnp.where(scored, scores / config.teacher_temperature, lowest)
    theirs = jax.nn.log_softmax(wanted, axis=-1)
    terms = jnp.exp(theirs) * (theirs - ours)
    return jnp.sum(jnp.where(scored, terms, 0.0), axis=-1), scored.sum(axis=-1) > 1


def _margin_errors(cosines: Array, scores: Array, scored: Array) -> tuple[Array, Array]:
    """(the mean squared error of the positive's lead over each scored negative [B], whether there
    is one).
    """
    pairs = scored[:, 1:] & scored[:, :1]
    errors = (cosines[:, :1] - cosines[:, 1:]) - (scores[:, :1] - scores[:, 1:])
    total = jnp.sum(jnp.where(pairs, errors**2, 0.0), axis=-1)
    return total / jnp.maximum(pairs.sum(axis=-1), 1), pairs.any(axis=-1)


def coral(embeddings: Array, labels: Labels) -> Array:
    """How far the covariances of the modalities are apart: the mean over pairs of modalities.

    ‖C_a - C_b‖² / (4 D²) of vectors scaled to a mean square of 1 a number, which is
    ‖C_a - C_b‖² / 4 of unit vectors. A content counts that has one modality alone, and a modality
    that has two contents or more. 0 where there are not two of these.
    """
    flat = embeddings.reshape(-1, embeddings.shape[-1])
    kinds = jnp.where(labels.present, labels.kinds, 0).reshape(-1)
    found = [_covariance(flat, kinds == 1 << bit) for bit in range(len(MODALITIES))]
    total, pairs = jnp.float32(0.0), jnp.float32(0.0)
    for (a, some_of_a), (b, some_of_b) in combinations(found, 2):
        both = (some_of_a & some_of_b).astype(jnp.float32)
        total += both * jnp.sum((a - b) ** 2) / 4
        pairs += both
    return total / jnp.maximum(pairs, 1)


def _covariance(vectors: Array, chosen: Array) -> tuple[Array, Array]:
    """(the covariance [D, D] of the chosen of vectors [N, D], whether they are two or more)."""
    of = chosen.astype(jnp.float32)[:, None]
    count = of.sum()
    centred = (vectors - (of * vectors).sum(axis=0) / jnp.maximum(count, 1)) * of
    product = jnp.einsum("nd,ne->de", centred, centred, precision="highest")
    return product / jnp.maximum(count - 1, 1), count > 1
