"""What a model of the laboratory can do, measured on one world's held-out files.

Dimensions: N inputs or pairs, L layers, D hidden.
"""

from collections.abc import Callable, Hashable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from laboratory.probes import files, read_tests, rows_of
from lco_jax.analysis.measures import Side, anisotropy, measure_layers
from lco_jax.data.records import answer_of, as_input, content_key
from lco_jax.data.sources import JsonlSource
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.answers import score

Encode = Callable[
    [list[Any]], np.ndarray
]  # inputs as `OmniEmbedder.encode` takes them -> unit vectors [N, D]
TEMPLATES = ("{}",)  # of the text that stands for a class: the label as it is
NEIGHBOURS = 10  # of the kernel alignment, as in the paper


def represent(
    encode: Encode, world: Path, templates: Sequence[str] = TEMPLATES
) -> dict[str, float]:
    """Every number that the world's tests/ give, in [0, 1]; a file that is absent gives none.

    `text_to_image`, `image_to_text` and so on (retrieval_*.jsonl): recall@1; of pages nDCG@10, too.
    `image_to_audio`, `audio_to_image` (cross.jsonl): the first found is of the same concept; with
    `_mrr`, and `.held_out` and `.seen`: of queries whose concept is, or is not, held out.
    `text_to_text` (text.jsonl): a text finds its paraphrase among all paraphrases and foils.
    `minimal`, and `minimal.colour` and so on: the right text is nearer than the wrong.
    `zeroshot_*`: accuracy.

    templates: of the texts whose mean vector stands for a zero-shot class; {} is its label.
    `encode` is called once, with distinct inputs.
    """
    inputs, tests = read_tests(world, templates)
    vectors = encode(inputs.sides)
    return {name: value for test in tests for name, value in test.score(vectors).items()}


def chance(world: Path) -> dict[str, float]:
    """What guessing gives, of every number of `represent`."""
    return {
        name: value
        for test in read_tests(world, TEMPLATES)[1]
        for name, value in test.chance().items()
    }


def once(encode: Encode) -> Encode:
    """`encode`, which is asked for each distinct input once, however often it is wanted."""
    known: dict[Hashable, np.ndarray] = {}

    def encoded(sides: list[Any]) -> np.ndarray:
        keys = [content_key(side) for side in sides]
        if new := {key: side for key, side in zip(keys, sides, strict=True) if key not in known}:
            known.update(zip(new, encode(list(new.values())), strict=True))
        return np.stack([known[key] for key in keys])

    return encoded


def pairs(world: Path) -> dict[str, tuple[list[Any], list[Any]]]:
    """{kind: (media, their captions)} of every tests/retrieval_KIND.jsonl, row i of one with row i
    of the other.
    """
    found = {}
    for file, kind in files(world, "retrieval"):
        rows = [
            (reader.side(row["media"], "media"), row["text"])
            for row, reader in rows_of(file, "media", "text")
        ]
        found[kind] = tuple([as_input(side) for side in sides] for sides in zip(*rows, strict=True))
    return found


def by_layer(embedder: OmniEmbedder, world: Path, k: int = NEIGHBOURS) -> dict[str, dict[str, Any]]:
    """{"anisotropy", "mutual_knn", "cka" (unbiased): {kind: a number a layer, before the first and
    after each}}.

    The last is the embedding's; None where a measure is not defined. The alignment is that of media
    with their captions (retrieval_*.jsonl); anisotropy is also of "text", all captions together. k:
    neighbours of mutual kNN, and no more than a quarter of the pairs. "chance": {kind: what mutual
    kNN is of sides that have nothing in common}.
    """
    found: dict[str, dict[str, Any]] = {"anisotropy": {}, "mutual_knn": {}, "cka": {}, "chance": {}}
    texts: list[np.ndarray] = []
    for kind, (media, captions) in pairs(world).items():
        states = [embedder.encode_layers(side) for side in (media, captions)]  # [L + 1, N, D] each
        near = max(min(k, len(media) // 4), 2)
        measured = measure_layers(*states, (kind, "text"), near)
        found["anisotropy"][kind] = measured["anisotropy"][kind]
        found["mutual_knn"][kind], found["cka"][kind] = (
            measured["mutual_knn"],
            measured["unbiased_cka"],
        )
        found["chance"][kind] = near / (len(media) - 1)
        texts.append(states[1])
    if texts:
        layers = np.concatenate(texts, axis=1)
        found["anisotropy"]["text"] = [anisotropy(Side(layer, "text", 2)) for layer in layers]
    return found


def generate_quality(
    generator: Any, world: Path, limit: int = 64, max_new_tokens: int = 32
) -> dict[str, dict[str, float]]:
    """{kind: {"loss": nats a token, "exact": share of answers met, "cer": of all characters}} of
    heldout/*.jsonl.

    generator: a `lco_jax.generator.OmniGenerator`. limit: records of each file, evenly spaced (a
    file may be in order of classes). The loss is of the answer's tokens, the end of its turn
    included. max_new_tokens: where generation stops at the latest; make it longer than any answer.
    """
    found = {}
    for file in sorted((world / "heldout").glob("*.jsonl")):
        records = JsonlSource(file)
        spread = np.unique(np.linspace(0, len(records) - 1, limit).round().astype(int))
        chosen = [records[i] for i in spread]
        inputs, answers = (
            [as_input(record.anchor) for record in chosen],
            [answer_of(record) for record in chosen],
        )
        sums, counts = generator.token_losses(inputs, answers)
        scores = score(generator.generate(inputs, max_new_tokens), answers)
        loss = float(sums.sum() / counts.sum())
        found[file.stem] = {
            "loss": loss,
            "exact": scores["exact_match"],
            "cer": scores["corpus_cer"],
        }
    return found
