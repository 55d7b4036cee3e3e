"""Pairs of two modalities, drawn from records: anchor and positive."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lco_jax.data.prompts import KINDS
from lco_jax.data.records import Content, Record, as_input, content_key

# shaped like the reference's prompt for embeddings
PROMPT = "\nDescribe the above {} in one sentence:"
# inputs, the answer that the generator is to give for each, and the prompt
Captions = tuple[list[Any], list[str], str]


@dataclass
class Pairs:
    """a, b: N inputs each, as `encode` takes them.

    kinds: the modality of a's inputs and of b's, several joined by "+". duplicates: records left
    out because one of their sides had occurred. others: records left out for other modalities.
    """

    kinds: tuple[str, str]
    a: list[Any] = field(default_factory=list)
    b: list[Any] = field(default_factory=list)
    duplicates: int = 0
    others: int = 0

    @property
    def names(self) -> tuple[str, str]:
        """What to call the sides: their modalities, where these tell them apart."""
        a, b = self.kinds
        return self.kinds if a != b else (f"{a} (anchor)", f"{b} (positive)")

    @property
    def modalities(self) -> set[str]:
        """What the sides hold."""
        return set("+".join(self.kinds).split("+"))

    def captions(self) -> Captions | None:
        """b as answers to a; a as answers to b where a alone is text; None where neither is."""
        if self.kinds[1] == "text":
            kind, inputs, answers = (self.kinds[0], self.a, self.b)
        elif self.kinds[0] == "text":
            kind, inputs, answers = (self.kinds[1], self.b, self.a)
        else:
            return None
        texts = [answer["text"] for answer in answers]
        return (
            inputs,
            texts,
            PROMPT.format(kind.replace("+", " and ")),
        )


def draw_pairs(
    source: Sequence[Record],
    a: str,
    b: str,
    limit: int,
    seed: int,
    distinct: bool = True,
) -> Pairs:
    """At most `limit` pairs, in an order drawn by `seed`.

    a, b: the sides' modalities; "" means those of the first record. A record that has them the
    other way round is turned. distinct: no content occurs twice on a side, since neither of two
    equal ones is the nearer neighbour.
    """
    first = source[0]
    pairs = Pairs((a or _kind(first.anchor), b or _kind(first.positive)))
    seen: set[Any] = set()
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        one, other = (source[index].anchor, source[index].positive)
        if (_kind(other), _kind(one)) == pairs.kinds != (_kind(one), _kind(other)):
            one, other = other, one
        if (_kind(one), _kind(other)) != pairs.kinds:
            pairs.others += 1
            continue
        keys = {("a", content_key(one)), ("b", content_key(other))}
        if distinct and keys & seen:
            pairs.duplicates += 1
            continue
        seen |= keys
        pairs.a.append(as_input(one))
        pairs.b.append(as_input(other))
        if len(pairs.a) == limit:
            break
    return pairs


def _kind(content: Content) -> str:
    found = {"text"} if isinstance(content, str) else {part["type"] for part in content}
    return "+".join(kind for kind in KINDS if kind in found)
