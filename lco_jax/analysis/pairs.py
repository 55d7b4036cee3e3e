"""Pairs of two modalities, drawn from records.

A source's record is a pair, anchor and positive; its negatives are left alone.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.prompts import KINDS
from lco_jax.data.records import Record, Side, side_key


@dataclass
class Pairs:
    """a, b: the sides, N each; where: each pair's origin, for errors; kinds: the modality of a's and of b's.

    duplicates: pairs left out because a side of theirs had been there; others: those of other modalities.
    """

    kinds: tuple[str, str]
    a: list[Side] = field(default_factory=list)
    b: list[Side] = field(default_factory=list)
    where: list[str] = field(default_factory=list)
    duplicates: int = 0
    others: int = 0

    @property
    def names(self) -> tuple[str, str]:
        """What to call the sides: their modalities, where these tell them apart."""
        a, b = self.kinds
        return self.kinds if a != b else (f"{a} (anchor)", f"{b} (positive)")


def kind_of(side: Side) -> str:
    """The modality of a side: "text", "image" and so on, or several, joined by "+"."""
    found = {"text"} if isinstance(side, str) else {part["type"] for part in side}
    return "+".join(kind for kind in KINDS if kind in found)


def as_input(side: Side) -> Any:
    """A side as `encode` takes it: text never bare, since a bare string may name a file."""
    return {"text": side} if isinstance(side, str) else side


def draw_pairs(source: Sequence[Record], a: str | None, b: str | None, limit: int, least: int, seed: int) -> Pairs:
    """At most `limit` pairs in an order drawn by `seed`, no side of which occurs twice.

    Nearest neighbours of what occurs twice are arbitrary. a, b: modalities, by default those of the first record's
    anchor and positive; a pair of the two the other way round is turned. least: raise for fewer pairs.
    """
    pairs = Pairs((a or kind_of(source[0].anchor), b or kind_of(source[0].positive)))
    seen: set = set()
    for index in np.random.default_rng(seed).permutation(len(source)):
        record = source[int(index)]
        sides = record.anchor, record.positive
        kinds = tuple(map(kind_of, sides))
        if kinds != pairs.kinds:
            kinds, sides = kinds[::-1], sides[::-1]
        if kinds != pairs.kinds:
            pairs.others += 1
            continue
        keys = {(place, side_key(side)) for place, side in enumerate(sides)}
        if keys & seen:
            pairs.duplicates += 1
            continue
        seen |= keys
        for values, value in zip((pairs.a, pairs.b, pairs.where), (*sides, record.where), strict=True):
            values.append(value)
        if len(pairs.a) == limit:
            break
    if len(pairs.a) < least:
        left_out = f"{pairs.duplicates:,} repeat a side and {pairs.others:,} are of other modalities"
        raise LcoError(
            f"--data has {len(pairs.a):,} pairs of {' and '.join(pairs.kinds)}, and --k={least - 2} takes at least "
            f"{least}; of its {len(source):,} records {left_out}"
        )
    return pairs
