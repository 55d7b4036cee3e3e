"""Units of a corpus -> their parts, in whichever process this runs."""

import argparse
import logging
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from glob import has_magic
from itertools import tee
from pathlib import Path
from typing import Any

import pyarrow as pa
from tqdm import tqdm

from lco_jax.calibration import dimension_of, first_vectors, storage_of
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, local_copy, on_bucket
from lco_jax.core.shapes import keep_compiled
from lco_jax.core.small_vectors import Storage
from lco_jax.data.bucket_folder import BucketFolder
from lco_jax.data.corpus import FORMATS, Corpus, CorpusItem
from lco_jax.data.folder import Listing
from lco_jax.data.lines import ending_of
from lco_jax.data.media import MediaConfig
from lco_jax.data.parts import PartsFolder, Unit
from lco_jax.data.range_files import RANGES
from lco_jax.data.vectors import part_table
from lco_jax.embedder import OmniEmbedder
from lco_jax.flags import load_embedder, workers


class UnitEmbedder:
    """The model, and the input that args.input names: a function from units to their parts in
    `folder`.

    cpus: how many may prepare inputs. args: the flags of the embed command. modalities: those whose
    towers are needed. unit_rows: the most inputs of a unit. calibrated: how many of the first
    inputs the ranges of levels are of.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        media: MediaConfig,
        modalities: tuple[str, ...],
        has_media: bool,
        unit_rows: int,
        cpus: int,
        folder: PartsFolder,
        calibrated: int = 0,
    ):
        keep_compiled()
        self.args, self.folder, self.unit_rows = args, folder, unit_rows
        self.workers = workers(args, has_media, cpus)
        checkpoint = open_checkpoint(args.model)
        self.embedder = load_embedder(args, checkpoint, media, modalities)
        self.read = open_corpus(args, folder.kept()).reader()
        self.storage = storage_of(
            args,
            dimension_of(args, checkpoint),
            folder.path / RANGES,
            lambda: first_vectors(self.embedder, self.read(0, calibrated), args, self.workers),
        )

    def __call__(self, units: Sequence[Unit], progress: tqdm | None = None) -> None:
        """Embed those of the units that have no part. progress: a bar, advanced by every input."""
        there = set(self.folder.units())
        left = [unit for unit in units if unit not in there]
        inputs = ((unit, self.read(unit.first, unit.end)) for unit in left)
        options = {"workers": self.workers, "block_inputs": self.unit_rows, "progress": progress}
        embed_units(self.embedder, inputs, self.folder, self.storage, self.args, options)


def open_corpus(args: argparse.Namespace, kept: Listing | None = None) -> Corpus | BucketFolder:
    """The input of --input. Files on a bucket are fetched to the cache of this machine, a folder is
    not. kept: what the folder held when the work began.
    """
    if on_bucket(args.input) and ending_of(args.input) not in FORMATS:
        return BucketFolder(args.input, kept)
    root = None if args.media_root is None else local_copy(args.media_root)
    keeps_bad = args.on_error == "skip"
    return Corpus(_local(args.input), args.id_field, root, keeps_bad=keeps_bad, kept=kept)


def _local(path: AnyPath) -> Path:
    """An input's file, or the pattern of several, on this machine."""
    if not on_bucket(path) or not has_magic(path.name):
        return local_copy(path)
    return local_copy(path.parent, [path.name]) / path.name


class _Inputs:
    """The inputs of units as one stream. taken: the units whose inputs were taken; ids: of those
    inputs.
    """

    def __init__(self, units: Iterable[tuple[Unit, Iterable[CorpusItem]]], path: Any):
        self._units, self._path = units, path
        self.sizes, self.taken = deque[int](), deque[Unit]()
        self.ids = deque[int | str | None]()  # no more than a block and what is prepared ahead

    def __iter__(self) -> Iterator[tuple[Any, str]]:
        for unit, items in self._units:
            self.sizes.append(unit.rows)
            self.taken.append(unit)
            count = 0
            for item in items:
                self.ids.append(item.id)
                count += 1
                yield item.content, item.where
            if count != unit.rows:
                anew = "start anew with another output"
                raise LcoError(f"--input={self._path} changed meanwhile; {anew}")


def embed_units(
    embedder: OmniEmbedder,
    units: Iterable[tuple[Unit, Iterable[CorpusItem]]],
    folder: PartsFolder,
    storage: Storage,
    args: argparse.Namespace,
    options: Mapping[str, Any],
) -> None:
    """Embed units, each given with its inputs, and write their parts. Inputs are taken ahead of
    what is computed.

    options: of `OmniEmbedder.encode_blocks`, beside those that `args` has.
    """
    stream = _Inputs(units, args.input)
    contents, names = tee(stream)
    # what the embedder skips is listed in the parts
    logging.getLogger("lco_jax.embedder").setLevel(logging.ERROR)
    blocks = embedder.encode_blocks(
        (content for content, _ in contents),
        args.batch_size,
        prompt=args.prompt,
        prompt_name=args.prompt_name,
        max_length=args.max_length,
        on_error=args.on_error,
        units=iter(stream.sizes.popleft, None),
        names=(where for _, where in names),
        **options,
    )
    waiting: list[pa.Table] = []  # of the unit that is not complete
    for block in blocks:
        ids = [stream.ids.popleft() for _ in block.vectors]
        reasons = {index - block.first: reason for index, reason in block.skipped.items()}
        waiting.append(part_table(ids, storage.store(block.vectors), reasons))
        if sum(map(len, waiting)) == stream.taken[0].rows:
            # a block whose ids cannot be read has ids of no type
            unit_table = pa.concat_tables(waiting, promote_options="default")
            folder.write(stream.taken.popleft(), unit_table)
            waiting = []
