"""Pairs of two modalities, drawn from records: anchor and positive."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lco_jax.data.prompts import KINDS
from lco_jax.data.records import Content, Record, as_input, content_key

PROMPT = "\nDescribe the above {} in one sentence:"  # shaped like the reference's for embeddings
Captions = tuple[
    list[Any], list[str], str
]  # inputs, what the generator is to say of each, and the prompt


@dataclass
class Pairs:
    """a, b: N inputs each, as `encode` takes them; kinds: the modality of a's and of b's, or several joined by "+".

    duplicates, others: records passed over because a side had been there, or was of another modality.
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
        """What its sides hold."""
        return {kind for side in self.kinds for kind in side.split("+")}

    def captions(self) -> Captions | None:
        """What the generator is to say: b of a, or a of b where a alone is text; None where neither is."""
        if "text" not in self.kinds:
            return None
        turned = self.kinds[1] != "text"
        shown, said = (self.b, self.a) if turned else (self.a, self.b)
        return (
            shown,
            [one["text"] for one in said],
            PROMPT.format(self.kinds[turned].replace("+", " and ")),
        )


def draw_pairs(
    source: Sequence[Record], a: str, b: str, limit: int, seed: int, distinct: bool = True
) -> Pairs:
    """At most `limit` pairs, in an order drawn by `seed`.

    a, b: the sides' modalities, "": as in the first record; a record that has them the other way round is turned.
    distinct: no side occurs twice, since of two that are the same neither is the nearer neighbour.
    """
    pairs, seen = Pairs((a or _kind(source[0].anchor), b or _kind(source[0].positive))), set()
    for index in np.random.default_rng(seed).permutation(len(source)).tolist():
        record = source[index]
        pair = record.anchor, record.positive
        if (_kind(pair[0]), _kind(pair[1])) != pairs.kinds:
            pair = pair[::-1]
        if (_kind(pair[0]), _kind(pair[1])) != pairs.kinds:
            pairs.others += 1
            continue
        keys = {(place, content_key(side)) for place, side in enumerate(pair)}
        if distinct and keys & seen:
            pairs.duplicates += 1
            continue
        seen |= keys
        for side, inputs in zip(pair, (pairs.a, pairs.b), strict=True):
            inputs.append(as_input(side))
        if len(pairs.a) == limit:
            break
    return pairs


def _kind(side: Content) -> str:
    found = {"text"} if isinstance(side, str) else {part["type"] for part in side}
    return "+".join(kind for kind in KINDS if kind in found)
