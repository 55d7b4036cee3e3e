"""A folder of media on a bucket, read as `corpus.Corpus` reads one of a disk: each object when its
turn comes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from hashlib import blake2b

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, bucket_system, checksum_of, listing, reaching
from lco_jax.data.content import media_kind
from lco_jax.data.corpus import CorpusItem


@dataclass(frozen=True)
class BucketFolder:
    """The images, videos and sounds below `path`, in the order of their names, which are their
    ids.
    """

    path: AnyPath

    def items(self, check_media: bool = False) -> Iterator[CorpusItem]:
        """Every input, without its bytes. check_media: nothing to check, for all were listed."""
        del check_media
        for name in self._names():
            kind = media_kind(name)
            yield CorpusItem(name, ({"type": kind, kind: f"{self.path}/{name}"},), name)

    def reader(self) -> Callable[[int, int], Iterator[CorpusItem]]:
        """A function from (first, end) to those inputs, which fetches each when it is taken."""
        names, system = self._names(), bucket_system(self.path)

        def read(first: int, end: int) -> Iterator[CorpusItem]:
            for name in names[first:end]:
                kind = media_kind(name)
                with reaching(self.path):
                    content = system.cat_file(f"{self.path}/{name}")
                yield CorpusItem(name, ({"type": kind, kind: content},), f"{self.path}/{name}")

        return read

    def fingerprint(self) -> str:
        """Text that differs when objects have changed: how many, and a digest of them."""
        digest = blake2b(digest_size=8)
        with reaching(self.path):
            there = listing(self.path)
        for name in sorted(there):
            digest.update(f"{name}\0{there[name]['size']}\0{checksum_of(there[name])}\0".encode())
        return f"{len(there)} objects with digest {digest.hexdigest()}"

    def _names(self) -> list[str]:
        with reaching(self.path):
            there = listing(self.path)
        names = [name for name in there if media_kind(name) and not _is_hidden(name)]
        if not names:
            raise LcoError(f"--input={self.path} holds no image, video or audio file")
        return sorted(names)


def _is_hidden(name: str) -> bool:
    return any(part.startswith(".") for part in name.split("/"))
