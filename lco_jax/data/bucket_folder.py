"""A folder of media on a bucket, read as `corpus.Corpus` reads one of a disk: each object when its
turn comes.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, bucket_system, checksum_of, listing, reaching
from lco_jax.data.corpus import CorpusItem
from lco_jax.data.folder import Listing, file_kind, left_out_as, printable


@dataclass(frozen=True)
class BucketFolder:
    """The images, videos and sounds below `path`, in the order of their names, which are their
    ids.

    kept: as `Corpus` has it.
    """

    path: AnyPath
    kept: Listing | None = None

    @cached_property
    def listing(self) -> Listing:
        """What the folder holds."""
        return self.kept or self.listed_now()

    def listed_now(self) -> Listing:
        """What the folder holds now."""
        with reaching(self.path):
            there = listing(self.path)
        files: dict[str, str] = {}
        left_out = Counter[str]()
        for name in sorted(there.keys() - {"."}):
            what = left_out_as(name)
            if what:
                left_out[what] += 1
            else:
                files[name] = f"{there[name]['size']} {checksum_of(there[name])}"
        return Listing(files, dict(left_out))

    def items(self, check_media: bool = False) -> Iterator[CorpusItem]:
        """Every input, without its bytes. check_media: nothing to check, for all were listed."""
        del check_media
        for name in self._names():
            kind = file_kind(name)
            content = ({"type": kind, kind: f"{self.path}/{name}"},)
            yield CorpusItem(name, content, printable(name))

    def reader(self) -> Callable[[int, int], Iterator[CorpusItem]]:
        """A function from (first, end) to those inputs, which fetches each when it is taken.

        The content of an object that is gone is the error that says so.
        """
        names, system = self._names(), bucket_system(self.path)

        def fetched(name: str, where: str) -> bytes | LcoError:
            with reaching(self.path):
                try:
                    return system.cat_file(f"{self.path}/{name}")
                except FileNotFoundError:
                    return LcoError(f"{where} does not exist any more")

        def read(first: int, end: int) -> Iterator[CorpusItem]:
            for name in names[first:end]:
                where = f"{self.path}/{printable(name)}"
                found, kind = fetched(name, where), file_kind(name)
                content = ({"type": kind, kind: found},) if isinstance(found, bytes) else found
                yield CorpusItem(name, content, where)

        return read

    def fingerprint(self) -> str:
        """Text that differs when objects have changed: how many, and a digest of them."""
        return self.listed_now().fingerprint()

    def _names(self) -> list[str]:
        self.listing.check(f"--input={self.path}")
        return list(self.listing.files)
