"""A share of a run's own records that is measured and never trained on."""

from collections.abc import Mapping
from hashlib import blake2b
from typing import NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.data.content import Content
from lco_jax.data.records import Record, content_key
from lco_jax.data.scan import ListSource, Source, fingerprint

LEAST, MOST = 10, 500  # records that are held out
SMALL = 20  # a source with fewer records is trained on as a whole


class Split(NamedTuple):
    """The sources without what is held out, and what is held out of each, by name."""

    training: dict[str, Source]
    held_out: dict[str, ListSource]


def split(sources: Mapping[str, Source], share: float) -> Split:
    """Hold out `share` of the different records of all sources, as `wanted` has it.

    Which ones is a function of the records alone: of no seed and no order, so that it is the same
    in every process and whenever a run resumes. Of equal records one is held out, and none is
    trained on. Records are equal if anchor and positive are, in either order; letters' case and
    spaces do not count. Rows that are read on demand (TFDS with captions) count as different.
    """
    sizes = np.array(list(map(len, sources.values())))
    of_source = np.repeat(np.arange(len(sizes)), sizes)
    if not share or not (sizes >= SMALL).any():
        return Split(dict(sources), {})
    groups, chosen = _chosen(sources, share, np.flatnonzero(sizes[of_source] >= SMALL))
    copies = np.isin(groups, groups[chosen])
    training, held_out = dict(sources), {}
    for number, (name, source) in enumerate(sources.items()):
        own = np.flatnonzero(of_source == number)
        if copies[own].any():
            training[name] = Rest(name, source, np.flatnonzero(~copies[own]))
        out = np.flatnonzero(np.isin(own, chosen))
        if len(out):
            held_out[name] = ListSource([source[int(index)] for index in out])
    return Split(training, held_out)


def trained_on(held_out: Source, sources: Mapping[str, Source]) -> int:
    """How many held-out records are lines or rows of these sources, spelt alike.

    0 where the records of either are read on demand.
    """
    if held_out.digests is None:
        return 0
    found = np.zeros(len(held_out), bool)
    for source in sources.values():
        if source.digests is not None:
            found |= np.isin(held_out.digests, source.digests)
    return int(found.sum())


def _chosen(
    sources: Mapping[str, Source], share: float, candidates: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(a number of each record, the same for equal ones; which records are held out).

    Both are int64 [N] or shorter; records of all sources are counted through. candidates: those
    that may be held out.
    """
    groups, numbers = _groups_and_numbers(sources)
    by_number = candidates[np.argsort(numbers[candidates], kind="stable")]
    firsts = np.sort(np.unique(groups[by_number], return_index=True)[1])  # one of each group
    return groups, by_number[firsts[: wanted(len(firsts), share)]]


def wanted(different: int, share: float) -> int:
    """How many of so many different records are held out.

    The share of them, but at least ten (of fewer than 50, a fifth) and at most 500; none of fewer
    than 20.
    """
    if different < SMALL:
        return 0
    return min(MOST, max(round(share * different), min(LEAST, different // 5)))


class Rest(Source):
    """The records of a source that are trained on. indices: theirs, int [N]."""

    def __init__(self, name: str, whole: Source, indices: np.ndarray):
        if not len(indices):
            raise LcoError(
                f"config.eval.share leaves nothing of config.data.sources.{name}: all of its "
                "records are held out, as copies of others; leave the source out"
            )
        self.whole, self.indices = whole, indices
        self.skipped, self.max_negatives = whole.skipped, whole.max_negatives
        self.modalities, self.has_teacher = whole.modalities, whole.has_teacher
        self.digests = None if whole.digests is None else whole.digests[indices]
        was = fingerprint(whole)
        if was:
            out = len(whole) - len(indices)
            self.version = f"{was}, without {out:,} that are held out"

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Record:
        return self.whole[int(self.indices[index])]


def _groups_and_numbers(sources: Mapping[str, Source]) -> tuple[np.ndarray, np.ndarray]:
    """Of each record of all sources, both int64 [N]: a number that equal records share, and one by
    which they are chosen, as random as a hash is.

    The latter is that of its line or row, which names media as they are spelt: a folder that has
    moved keeps its held-out records.
    """
    groups: list[int] = []
    numbers: list[int] = []
    for name, source in sources.items():
        if source.digests is None:
            rows = [_number(f"{name}\0{index}") for index in range(len(source))]
            groups += rows
            numbers += rows
        else:
            groups += map(_number_of_pair, iter(source))
            numbers += source.digests.tolist()
    return np.array(groups, np.int64), np.array(numbers, np.int64)


def _number_of_pair(record: Record) -> int:
    keys = sorted(repr(content_key(_plain(side))) for side in (record.anchor, record.positive))
    return _number("\0".join(keys))


def _plain(content: Content) -> Content:
    """A content with its texts in small letters and with single spaces."""
    if isinstance(content, str):
        return " ".join(content.casefold().split())
    return tuple(
        {**part, "text": _plain(part["text"])} if part["type"] == "text" else part
        for part in content
    )


def _number(text: str) -> int:
    digest = blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)
