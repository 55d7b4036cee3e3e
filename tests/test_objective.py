"""What may be added to the paper's loss, beside a plain computation in torch and float64.

Dimensions: B records, M hard negatives, D hidden.
"""

import itertools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from lco_jax import make_mesh
from lco_jax.core.errors import LcoError
from lco_jax.core.packing import MODALITIES
from lco_jax.training.losses import TILE_SCORES, Negatives, info_nce
from lco_jax.training.objective import Labels, LossConfig, contrastive

RECORDS, NEGATIVES, HIDDEN = 11, 2, 16
TEXT, IMAGE, VIDEO, AUDIO = (1 << i for i in range(4))
TEMPERATURES = (0.05, 0.07, 0.04, 0.09)
OPTIONS = {
    "paper": {},
    "two_way": {"two_way": True},
    "duplicates": {"ignore_duplicates": True},
    "temperatures": {"temperatures": TEMPERATURES},
    "matryoshka": {"matryoshka": (8, 4)},
    "matryoshka_weights": {"matryoshka": (8, 3), "matryoshka_weights": (1.0, 0.5, 0.25)},
    "false_negatives": {"false_negatives": "own", "false_negative_margin": 0.05},
    "guide": {"false_negatives": "base"},
    "hard_weight": {"hard_weight": 3.0},
    "kl": {"teacher": "kl", "teacher_weight": 0.5, "teacher_temperature": 0.7},
    "margin_mse": {"teacher": "margin_mse", "teacher_weight": 2.0},
    "coral": {"coral": 0.05},
}


def a_batch(seed: int = 0):
    """(embeddings [B, 2 + M, D], labels, guide), with what real batches have: absent negatives, a
    record that was left out, repeated contents, all modalities, a record without a teacher.
    """
    rng = np.random.default_rng(seed)
    shape = (RECORDS, 2 + NEGATIVES)

    def unit(noise):
        x = rng.normal(size=(RECORDS, 1, HIDDEN)) + noise * rng.normal(size=(*shape, HIDDEN))
        return x / np.linalg.norm(x, axis=-1, keepdims=True)

    present = rng.random(shape) < 0.8
    present[:, :2] = True
    present[3] = False
    kinds = rng.choice([TEXT, TEXT, IMAGE, VIDEO, AUDIO, TEXT | IMAGE, TEXT | AUDIO], shape)
    teacher = rng.normal(size=shape).astype(np.float32)
    teacher[:, 0], teacher[5] = np.nan, np.nan
    labels = Labels(
        present,
        rng.integers(0, RECORDS, shape).astype(np.int32),
        np.where(present, kinds, 0).astype(np.int32),
        np.where(present, teacher, np.nan).astype(np.float32),
    )
    return unit(1.0), labels, unit(0.7)


def as_torch(embeddings, labels, config, guide, temperatures=None):
    """The objective in torch, record by record, as its description reads."""
    of_kind = torch.tensor(config.first_temperatures, dtype=torch.float64)
    if temperatures is not None:
        of_kind = temperatures

    def temperature(content):
        if temperatures is None and not config.temperatures:
            return torch.tensor(config.temperature, dtype=torch.float64)
        kinds = [k for k in range(len(MODALITIES)) if labels.kinds[content] >> k & 1]
        return of_kind[kinds].mean()

    def one_way(vectors, anchor, sides, hard_weight):
        losses = []
        for i in np.flatnonzero(labels.present[:, 0]):
            a, positive = (i, anchor), (i, sides[0])
            scores = vectors if config.false_negatives != "base" else torch.tensor(guide)
            limit = (scores[a] @ scores[positive]).detach() - config.false_negative_margin
            terms = []
            for other in itertools.product(range(RECORDS), sides):
                is_positive = other == positive
                same = labels.content[other] == labels.content[positive]
                if not labels.present[other] or (
                    config.ignore_duplicates and same and not is_positive
                ):
                    continue
                near = bool(config.false_negatives) and scores[a] @ scores[other] > limit
                if near and not is_positive:
                    continue
                scale = (temperature(a) + temperature(other)) / 2
                logit = vectors[a] @ vectors[other] / scale
                if is_positive:
                    wanted = logit
                own = other[0] == i and not is_positive
                terms.append(logit + np.log(hard_weight) * own)
            losses.append(torch.logsumexp(torch.stack(terms), 0) - wanted)
        return torch.stack(losses).mean()

    def taught(vectors):
        losses = []
        for i in np.flatnonzero(labels.present[:, 0]):
            some = [
                s
                for s in range(1, 2 + NEGATIVES)
                if labels.present[i, s] and np.isfinite(labels.teacher[i, s])
            ]
            if len(some) < 2 or some[0] != 1:
                continue
            cosines = vectors[i, some] @ vectors[i, 0]
            scores = torch.tensor(labels.teacher[i, some].astype(np.float64))
            if config.teacher == "kl":
                wanted = torch.softmax(scores / config.teacher_temperature, 0)
                ours = torch.log_softmax(cosines / config.temperature, 0)
                losses.append((wanted * (wanted.log() - ours)).sum())
            else:
                gaps = (cosines[0] - cosines[1:]) - (scores[0] - scores[1:])
                losses.append((gaps**2).mean())
        return torch.stack(losses).mean()

    def of(vectors):
        loss = one_way(vectors, 0, range(1, 2 + NEGATIVES), config.hard_weight)
        if config.two_way:
            loss = (loss + one_way(vectors, 1, (0,), 1.0)) / 2
        return loss + config.teacher_weight * taught(vectors) if config.teacher else loss

    lengths = (HIDDEN, *config.matryoshka)
    weights = config.matryoshka_weights or (1.0,) * len(lengths)
    total = 0.0
    for weight, length in zip(weights, lengths, strict=True):
        vectors = embeddings[..., :length]
        if length < HIDDEN:
            vectors = vectors / vectors.norm(dim=-1, keepdim=True)
        total += weight / sum(weights) * of(vectors)
    if config.coral:
        flat = embeddings.reshape(-1, HIDDEN)
        covariances = []
        for bit in range(4):
            chosen = (labels.present & (labels.kinds == 1 << bit)).reshape(-1)
            if chosen.sum() > 1:
                covariances.append(torch.cov(flat[torch.tensor(chosen)].T))
        gaps = [((a - b) ** 2).sum() / 4 for a, b in itertools.combinations(covariances, 2)]
        total += config.coral * torch.stack(gaps).mean()
    return total


def combined(*names):
    return {key: value for name in names for key, value in OPTIONS[name].items()}


COMBINATIONS = {
    **OPTIONS,
    "e5_omni": combined("temperatures", "two_way", "coral", "false_negatives"),
    "all": combined(
        "two_way", "duplicates", "temperatures", "matryoshka", "guide", "hard_weight", "kl", "coral"
    ),
}


@pytest.mark.parametrize("name", COMBINATIONS)
def test_loss_and_gradient_equal_torch(name):
    """In float64."""
    config = LossConfig(temperature=0.06, **COMBINATIONS[name])
    embeddings, labels, guide = a_batch()
    with jax.enable_x64(True):
        guides = jnp.array(guide) if config.false_negatives == "base" else None
        run = jax.value_and_grad(
            lambda e: contrastive(e, labels, config, guide=guides), has_aux=True
        )
        (loss, metrics), gradient = jax.jit(run)(jnp.array(embeddings))
    given = torch.tensor(embeddings, requires_grad=True)
    want = as_torch(given, labels, config, guide)
    want.backward()
    np.testing.assert_allclose(float(loss), float(want.detach()), atol=1e-6)
    np.testing.assert_allclose(gradient, given.grad.numpy(), atol=1e-6)
    assert float(metrics["loss"]) == float(loss)


@pytest.mark.parametrize("added", ["temperature", "own", "guide", "hard_weight"])
def test_tiles_change_nothing(added):
    embeddings, labels, guide = (jax.tree.map(jnp.asarray, one) for one in a_batch(3))
    temperature = jnp.linspace(0.04, 0.09, labels.present.size).reshape(labels.present.shape)
    negatives = {
        "own": Negatives(margin=0.05),
        "guide": Negatives(margin=0.0, guide=guide),
        "hard_weight": Negatives(hard_weight=3.0),
    }.get(added, Negatives())

    def run(vectors, tile_scores):
        scale = temperature if added == "temperature" else 0.06
        return info_nce(vectors, labels.present, scale, labels.content, tile_scores, negatives)

    step = jax.jit(jax.value_and_grad(run, has_aux=True), static_argnums=1)
    want, got = step(embeddings, TILE_SCORES), step(embeddings, 40)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


@pytest.mark.parametrize("mesh", [(8, 1, 1), (2, 2, 2)])
def test_every_addition_is_the_same_on_a_mesh(mesh):
    config = LossConfig(temperature=0.06, **COMBINATIONS["all"])
    embeddings, labels, guide = a_batch(1)
    given = [jnp.asarray(x, jnp.float32) for x in (embeddings, guide)]

    def run(e, guide):
        return contrastive(e, labels, config, guide=guide)

    step = jax.jit(jax.value_and_grad(run, has_aux=True))
    want = step(*given)
    with jax.set_mesh(make_mesh(*mesh)):
        got = step(*given)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_the_gradient_of_learned_temperatures_equals_torch():
    config = LossConfig(temperatures=TEMPERATURES, learn_temperature=True, two_way=True)
    embeddings, labels, _ = a_batch(2)
    start = np.log(TEMPERATURES)
    with jax.enable_x64(True):
        gradient = jax.grad(lambda log: contrastive(jnp.array(embeddings), labels, config, log)[0])(
            jnp.array(start)
        )
    log = torch.tensor(start, requires_grad=True)
    as_torch(torch.tensor(embeddings), labels, config, None, log.exp()).backward()
    np.testing.assert_allclose(gradient, log.grad.numpy(), atol=1e-6)


def test_what_cannot_be_says_so():
    with pytest.raises(LcoError, match="temperatures has 2 numbers; give one each for text, image"):
        LossConfig(temperatures=(0.1, 0.2))
    with pytest.raises(LcoError, match="matryoshka_weights has 2 numbers; give one for the whole"):
        LossConfig(matryoshka=(8, 4), matryoshka_weights=(1.0, 1.0))
    config = LossConfig(matryoshka=(8,))
    with pytest.raises(LcoError, match="matryoshka has 8; the model's vectors have 8 numbers"):
        config.check_dimension(8)
    assert config.added == ["matryoshka"]
    assert not replace(config, matryoshka=()).added
