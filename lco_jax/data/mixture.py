"""In which order the records of several sources come, and that a batch holds none of them twice.

Here a record is a key: (number of its source, index there). Nothing is read. All of it is a
function of the position alone, so a run can resume anywhere, and every process knows whole batches.
"""

from collections.abc import Hashable, Iterator, Mapping, Sequence
from functools import lru_cache, partial
from types import MappingProxyType
from typing import Any

import grain
import numpy as np

from lco_jax.core.console import progress_bar
from lco_jax.data.records import content_number
from lco_jax.data.scan import Source

ENDLESS = 2**40
APART = ("", "positives", "contents")  # what `content_numbers` numbers
SPARES = 4  # times a batch: the most records that are looked through for one that is not there yet
FEW = 0.01  # of a source's records may repeat others without a word
BATCHES_REMEMBERED = 64
Key = tuple[int, int]
NumbersBySource = Mapping[str, np.ndarray]  # of `content_numbers`


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


def content_numbers(sources: Mapping[str, Source], apart: str) -> dict[str, np.ndarray]:
    """Of each source, the numbers of its records' contents, int32 [N, n]; equal ones have one.

    apart, of `APART`: whether of positives, or of anchors and positives; of "" there are none. It
    reads all records.
    """
    if not apart:
        return {}
    found = {}
    for name, source in sources.items():
        records = progress_bar(source, desc=f"contents of {name}", unit="record", delay=2)
        rows = [
            [content_number(side) for side in record.sides[apart == "positives" : 2]]
            for record in records
        ]
        found[name] = np.array(rows, np.int32)
    return found


class Once:
    """Batches in which no record stands twice, where its source has enough of them.

    An epoch ends within a batch, and the next one may begin with the same record; and a source may
    hold a record twice. Two of one record would be each other's negatives. In the place of the
    second comes another record of its source, drawn with a seed of the batch's own. Batches that
    have no such records stay as they are.

    numbers: `content_numbers` of each source, in its order; a content that has a number does not
    stand twice either, where the records that are looked through allow that. (): contents may.
    """

    def __init__(
        self,
        drawn: grain.MapDataset,
        sources: Sequence[Source],
        seed: int,
        batch_size: int,
        numbers: Sequence[np.ndarray] = (),
    ):
        self.drawn, self.sources, self.numbers = drawn, sources, numbers
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
        records: set[Hashable] = set()
        contents: set[int] = set()
        repeated = self._repeated(chosen, records, contents)
        sources = {chosen[place][0] for place, _ in repeated}
        apart = {source: self._spares(source, number) for source in sources}
        other = {source: self._spares(source, number) for source in sources}
        for place, is_again in repeated:
            source = chosen[place][0]
            spare = self._unseen(apart[source], records, contents)
            if spare is None and is_again:  # then another record at least
                spare = self._unseen(other[source], records, set())
            if spare is not None:
                records.add(self._record(spare))
                chosen[place] = spare
            contents |= self._contents(chosen[place])
        return chosen

    def _repeated(
        self, chosen: Sequence[Key], records: set[Hashable], contents: set[int]
    ) -> list[tuple[int, bool]]:
        """(place, whether it is the record itself) of each key whose record, or one of whose
        contents, stands at an earlier place. Adds the others to `records` and `contents`.
        """
        repeated = []
        for place, key in enumerate(chosen):
            is_again = self._record(key) in records
            if is_again or not contents.isdisjoint(self._contents(key)):
                repeated.append((place, is_again))
            else:
                contents |= self._contents(key)
            records.add(self._record(key))
        return repeated

    def _unseen(
        self, spares: Iterator[Key], records: set[Hashable], contents: set[int]
    ) -> Key | None:
        """The next spare whose record and contents are not among these, if there is one."""
        for spare in spares:
            if self._record(spare) not in records and contents.isdisjoint(self._contents(spare)):
                return spare
        return None

    def _contents(self, key: Key) -> set[int]:
        """The numbers of what must not stand twice."""
        return set(self.numbers[key[0]][key[1]].tolist()) if self.numbers else set()

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
    sources: Mapping[str, Source],
    weights: Mapping[str, float],
    batch_size: int,
    one_source: bool,
    numbers: NumbersBySource = MappingProxyType({}),
    ignores_duplicates: bool = False,
) -> list[str]:
    """Warnings about records that a source holds twice, or that a batch must hold twice.

    one_source: whether all records of a batch come from one source. numbers: of contents that are
    to be kept apart. ignores_duplicates: whether the loss has no equal positives as negatives; then
    these need no warning.
    """
    warnings = []
    for name, source in sources.items():
        share = weights[name] / sum(weights.values())
        wanted = batch_size if one_source else round(batch_size * share)
        found = [] if ignores_duplicates else list(_repeats_of(source, wanted))
        if name in numbers and wanted <= _different(source):
            found += _crowded(wanted, numbers[name], ignores_duplicates)
        warnings += [f"{name}: {warning}" for warning in found]
    return warnings


def _repeats_of(source: Source, wanted: int) -> Iterator[str]:
    """The warnings about a source, of which a batch has `wanted` records."""
    records = len(source)
    different = _different(source)
    if records - different > FEW * records:
        copies = f"{records - different:,} of its {records:,} records repeat an earlier one"
        yield f"{copies}; a batch holds each once, where it can"
    if wanted > different:
        too_many = f"{wanted:,} records in a batch, and only {different:,} different ones"
        negatives = f"{wanted - different:,} stand there again, as each other's negatives"
        advice = "lower config.train.batch_size, or set config.train.ignore_duplicates"
        yield f"{too_many}: {negatives}; {advice}"


def _different(source: Source) -> int:
    """How many of a source's records differ, as far as is known."""
    return len(source) if source.digests is None else len(np.unique(source.digests))


def _crowded(wanted: int, numbers: np.ndarray, ignores_duplicates: bool) -> Iterator[str]:
    """The warnings about contents of which there are too few to keep `wanted` records apart.

    numbers: of `content_numbers`, [N, n]; the last column is that of the positives.
    """
    names = ("anchors", "positives")[-numbers.shape[1] :]
    for name, column in zip(names, numbers.T, strict=True):
        different = len(np.unique(column))
        if wanted <= different or (ignores_duplicates and name == "positives"):
            continue
        advice = "lower config.train.batch_size"
        if name == "positives":  # the loss knows no equal anchors
            advice += ", or set config.train.ignore_duplicates"
        too_few = f"{wanted:,} records in a batch, and only {different:,} different {name}"
        yield f"{too_few}: a batch holds some twice; {advice}"
