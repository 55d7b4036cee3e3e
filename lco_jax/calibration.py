"""How an output stores its vectors. The ranges of int8 and uint8 are found once, and kept with it.

Dimensions: M vectors of a calibration, D numbers of each.
"""

import argparse
import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from lco_jax.checkpoint.hf import Checkpoint
from lco_jax.checkpoint.usage import usage_of
from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, fingerprint, local_path
from lco_jax.core.small_vectors import (
    LEVELS,
    PRECISIONS,
    Storage,
    ranges_of,
    shortened,
    warn_of_few,
)
from lco_jax.data.corpus import CorpusItem
from lco_jax.data.range_files import read_calibration, read_ranges, write_ranges
from lco_jax.embedder import OmniEmbedder

FIRST = 1000  # inputs of a calibration, where no other is given


class Flags(Protocol):
    """What flags are added to: a parser, or a group of one."""

    def add_argument(self, *names: str, **options: Any) -> Any: ...


def add_storage_flags(parser: Flags) -> None:
    """The flags that say how vectors are stored."""
    add_size_flags(parser, "float32")
    parser.add_argument(
        "--calibration",
        type=_calibration,
        metavar="N|FILE",
        help="what the ranges of int8 and uint8 are of: so many of the first inputs, which are "
        f"embedded once more (default: {FIRST:,}), or the vectors of a .npy or .parquet",
    )


def add_size_flags(parser: Flags, precision: str | None = None) -> None:
    """--truncate-dim and --precision. precision: the default."""
    parser.add_argument(
        "--truncate-dim",
        type=int,
        help="keep so many of the first numbers of a vector, at length 1 again (default: as the "
        "model's config_sentence_transformers.json says, or all)",
    )
    parser.add_argument(
        "--precision",
        choices=PRECISIONS,
        default=precision,
        help="of a number: int8 and uint8 are one of 256 levels of its dimension's range, binary "
        "and ubinary its sign, eight in a byte (default: float32)",
    )


def _calibration(text: str) -> int | Path:
    return int(text) if text.isdecimal() else local_path(text)


def dimension_of(args: argparse.Namespace, checkpoint: Checkpoint) -> int:
    """D of what is stored. Raises for what cannot be."""
    size = checkpoint.config.hidden_size
    width = args.truncate_dim or usage_of(checkpoint, args.adapter).truncate_dim
    if width is not None and width > size:
        raise LcoError(f"--truncate-dim={width}: the model's vectors have {size} numbers")
    return width or size


def storage_settings(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, Any]:
    """Flag -> value of those that are given, of all that stored vectors depend on. Raises for what
    cannot be, or does not go together.
    """
    dimension = dimension_of(args, checkpoint)
    found: dict[str, Any] = {}
    if args.truncate_dim is not None:
        found["--truncate-dim"] = args.truncate_dim
    if args.precision != "float32":
        found["--precision"] = args.precision
    if args.calibration is None:
        return found
    if args.precision not in LEVELS:
        raise LcoError(f"--calibration goes with --precision={' or '.join(LEVELS)}")
    if isinstance(args.calibration, int):
        if args.calibration < 2:
            raise LcoError(f"--calibration={args.calibration}: ranges are of two or more vectors")
        return {**found, "--calibration": args.calibration}
    if not args.calibration.is_file():
        raise LcoError(f"--calibration={args.calibration} is no file")
    read_calibration(args.calibration, dimension)  # raises, before a model is loaded
    holds = fingerprint([(args.calibration.name, args.calibration.stat())])
    return {
        **found,
        "--calibration": str(args.calibration.absolute()),
        "what --calibration holds": holds,
    }


def calibrated_rows(args: argparse.Namespace, total: int) -> int:
    """How many of the first inputs are to be embedded for ranges. Raises where they are too few.

    total: how many inputs there are.
    """
    if args.precision not in LEVELS or isinstance(args.calibration, Path):
        return 0
    if total < 2:
        few = f"--input holds {total}, and ranges are of two or more"
        raise LcoError(f"--precision={args.precision}: {few}; give --calibration=FILE")
    return min(total, args.calibration or FIRST)


def storage_of(
    args: argparse.Namespace,
    dimension: int,
    place: AnyPath,
    first: Callable[[], np.ndarray],
) -> Storage:
    """The storage of an output. place: the file of its ranges; if it is not there, they are found
    now, and written. first: embeds the first inputs, as `first_vectors` does.
    """
    if args.precision not in LEVELS:
        return Storage(dimension, args.precision)
    ranges = read_ranges(place, dimension)
    if ranges is not None:
        return Storage(dimension, args.precision, ranges)
    given = isinstance(args.calibration, Path)
    vectors = read_calibration(args.calibration, dimension) if given else first()
    vectors = shortened(vectors[np.isfinite(vectors).all(axis=1)], dimension)
    if len(vectors) < 2:
        few = "of the first inputs fewer than two can be embedded, and ranges are of two or more"
        raise LcoError(f"--precision={args.precision}: {few}; give --calibration=FILE")
    if not given:
        warn_of_few(len(vectors), args.precision)
    ranges = ranges_of(vectors, args.precision)
    write_ranges(place, ranges)
    return Storage(dimension, args.precision, ranges)


def first_vectors(
    embedder: OmniEmbedder, items: Iterable[CorpusItem], args: argparse.Namespace, workers: int
) -> np.ndarray:
    """The vectors of a calibration's inputs, float32 [M, D], NaN where one could not be embedded.

    They depend on the inputs alone, and not on how these are cut into units.
    """
    items = list(items)
    # they are embedded again, and then it is said which of them are skipped
    logging.getLogger("lco_jax.embedder").setLevel(logging.ERROR)
    with progress_bar(total=len(items), desc="calibrating", unit="input") as progress:
        blocks = embedder.encode_blocks(
            [item.content for item in items],
            args.batch_size,
            prompt=args.prompt,
            prompt_name=args.prompt_name,
            max_length=args.max_length,
            on_error=args.on_error,
            workers=workers,
            progress=progress,
            names=[item.where for item in items],
        )
        return np.concatenate([block.vectors for block in blocks])
