"""In which order the records of several sources come, and that a batch holds none of them twice.

Here a record is a key: (number of its source, index there). Nothing is read. All of it is a
function of the position alone, so a run can resume anywhere, and every process knows whole batches.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import grain
import numpy as np

from lco_jax.data.scan import Source

ENDLESS = 2**40
SPARES = 4  # times a batch: the most records that are looked through for one that is not there yet
FEW = 0.01  # of a source's records may repeat others without a word
BATCHES_REMEMBERED = 64
Key = tuple[int, int]


def weights_of(config: Mapping[str, Any], sources: Mapping[str, Source]) -> dict[str, float]:
    """How often each source is drawn: its weight, or what its size makes of it.

    config: config.data.
    """
    weights = {}
    for name, source in sources.items():
        by_size = len(source) ** (1 / config["sampling_temperature"])
        weights[name] = config["sources"][name].get("weight", by_size)
    return weights


def keys(
    sources: Sequence[Source], shares: Sequence[float], seed: int, run: int
) -> grain.MapDataset:
    """The keys of the endless mixture. run: how many one after another come from one source."""
    parts = [
        grain.MapDataset.range(len(source)).seed(seed + number).shuffle().repeat()
        for number, source in enumerate(sources)
    ]
    parts = [part.map(partial(_key, number)) for number, part in enumerate(parts)]
    if len(parts) == 1:
        return parts[0]
    if run == 1:
        return grain.MapDataset.mix(parts, shares)

    turns_of_each = [
        grain.MapDataset.range(ENDLESS).map(partial(_key, part)) for part in range(len(parts))
    ]
    turns = grain.MapDataset.mix(turns_of_each, shares)

    def key(index: int) -> Key:
        part, turn = turns[index // run]
        return parts[part][turn * run + index % run]

    return grain.MapDataset.range(ENDLESS).map(key)


def _key(number: int, index: int) -> Key:
    return number, index


class Once:
    """Batches in which no record stands twice, where its source has enough of them.

    An epoch ends within a batch, and the next one may begin with the same record; and a source may
    hold a record twice. Two of one record would be each other's negatives. In the place of the
    second comes another record of its source, drawn with a seed of the batch's own. Batches that
    have no such records stay as they are.
    """

    def __init__(
        self, drawn: grain.MapDataset, sources: Sequence[Source], seed: int, batch_size: int
    ):
        self.drawn, self.sources = drawn, sources
        self.seed, self.batch_size = seed, batch_size
        self._batch = lru_cache(BATCHES_REMEMBERED)(self.batch)

    def __call__(self, position: int) -> Key:
        """The key at a position of the stream."""
        batch, place = divmod(position, self.batch_size)
        return self._batch(batch)[place]

    def batch(self, number: int) -> list[Key]:
        """The keys of a batch."""
        start = number * self.batch_size
        chosen = [self.drawn[start + place] for place in range(self.batch_size)]
        seen: set[Hashable] = set()
        repeated = []
        for place, key in enumerate(chosen):
            if self._record(key) in seen:
                repeated.append(place)
            seen.add(self._record(key))
        spares = {chosen[place][0]: self._spares(chosen[place][0], number) for place in repeated}
        for place in repeated:
            spare = self._unseen(spares[chosen[place][0]], seen)
            if spare is not None:
                seen.add(self._record(spare))
                chosen[place] = spare
        return chosen

    def _unseen(self, spares: Iterator[Key], seen: set[Hashable]) -> Key | None:
        """The next spare whose record is not among those seen, if there is one."""
        return next((spare for spare in spares if self._record(spare) not in seen), None)

    def _record(self, key: Key) -> Hashable:
        """The same for equal records."""
        digests = self.sources[key[0]].digests
        return key if digests is None else int(digests[key[1]])

    def _spares(self, source: int, batch: int) -> Iterator[Key]:
        """Records of a source in an order of this batch's own."""
        random = np.random.default_rng([self.seed, batch, source])
        size = len(self.sources[source])
        indices = random.choice(size, min(size, SPARES * self.batch_size), replace=False)
        return ((source, int(index)) for index in indices)


def repeats(
    sources: Mapping[str, Source], weights: Mapping[str, float], batch_size: int, one_source: bool
) -> list[str]:
    """Warnings about records that a source holds twice, or that a batch must hold twice.

    one_source: whether all records of a batch come from one source.
    """
    warnings = []
    for name, source in sources.items():
        records = len(source)
        different = records if source.digests is None else len(np.unique(source.digests))
        share = weights[name] / sum(weights.values())
        wanted = batch_size if one_source else round(batch_size * share)
        if records - different > FEW * records:
            copies = f"{records - different:,} of its {records:,} records repeat an earlier one"
            warnings.append(f"{name}: {copies}; a batch holds each once, where it can")
        if wanted > different:
            too_many = f"{wanted:,} records in a batch, and only {different:,} different ones"
            negatives = f"{wanted - different:,} stand there again, as each other's negatives"
            advice = "lower config.train.batch_size, or set config.train.ignore_duplicates"
            warnings.append(f"{name}: {too_many}: {negatives}; {advice}")
    return warnings
