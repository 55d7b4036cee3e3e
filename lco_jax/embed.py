"""Embed a file of texts and media, or a folder of media.

    python -m lco_jax.embed --model=runs/base/merged --input=texts.txt --output=vectors.npy
    python -m lco_jax.embed --model=Qwen/Qwen2.5-Omni-3B --adapter=my/adapter --dtype=bfloat16 \\
        --input=corpus.jsonl --id-field=doc_id --on-error=skip --output=vectors.parquet
    python -m lco_jax.embed --ray --model=exports/vl7b --input=photos/ --output=gs://bucket/vectors

Input, one of:
  .txt      a text a line
  .jsonl    a line each: a string (text), an object with any of text, image, audio and video
            (media: a path, an address, or a list of them; also under image_path and so on), or a
            list of chat messages
  .parquet  columns of these names; media are paths, encoded bytes, or structs of both (bytes, path)
  a folder  every image, video and audio file in it, by extension
Other keys and columns are metadata and left alone. Relative paths start at the folder of the file
that has them.

Output: .npy has [N, D] in input order; .parquet has the columns id and embedding (id: the
--id-field, else the line or row number from 0, or the path within the folder); a name without an
ending is a folder of such files, which are not joined, with _index.json. With --on-error=skip, an
input that cannot be read keeps its row, NaN or null, and <output>.skipped.jsonl says why.
<output>.json records what was done: the same command again has nothing to do.
Vectors are of float32, or as --truncate-dim and --precision say. The ranges of int8 and uint8 are
those of the first inputs (--calibration), or of a file; beyond them a number gets the first or last
level. <output>.ranges.npy has them, and may be the file of another output.
Input and output may be on a bucket: gs://… or s3://….

Rows are embedded in units. What is done lies in <output>.partial until all is, and the same command
after a kill goes on from there. With --ray, actors of a Ray cluster share the units: of a local
one, or of that at --ray=ADDRESS.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from types import FrameType
from typing import Any

import jax
from tqdm import tqdm

from lco_jax.calibration import (
    add_storage_flags,
    calibrated_rows,
    dimension_of,
    storage_settings,
)
from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.core.console import progress_bar, say
from lco_jax.core.errors import DONE, PREEMPTED, LcoError, run_main
from lco_jax.core.files import AnyPath, as_path, on_bucket, reaching
from lco_jax.core.small_vectors import LEVELS, SIGNS, Storage
from lco_jax.data.bucket_folder import BucketFolder
from lco_jax.data.corpus import Contents, Corpus, scan
from lco_jax.data.folder import Listing, as_id, changes_in_words, rest_in_words
from lco_jax.data.guide import INPUT_STATE
from lco_jax.data.media import MediaConfig
from lco_jax.data.parts import DESCRIPTION, Unit, VectorParts, cut
from lco_jax.data.range_files import RANGES, read_ranges
from lco_jax.data.skipped import skipped_in_words
from lco_jax.flags import (
    MEDIA_A_UNIT,
    TEXTS_A_UNIT,
    add_corpus_flags,
    add_path,
    add_ray_flags,
    check_ray,
    embedding_settings,
    media_config,
    new_parser,
    say_prompts,
)
from lco_jax.unit_embedder import UnitEmbedder, open_corpus

ROUNDS = 3  # over units without a good part, before the disk is not trusted any more
Load = partial[UnitEmbedder]


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("embed", __doc__)
    add_path(parser, "--input", ".txt, .jsonl, .parquet or a folder of media", kind=as_path)
    add_path(parser, "--output", ".npy or .parquet, or a folder", kind=as_path)
    parser.add_argument(
        "--id-field", help="the key of a jsonl object, or column of a parquet, that is its id"
    )
    add_ray_flags(parser)
    add_corpus_flags(parser, on_error="raise", media_root=as_path)
    add_storage_flags(parser)
    return parser


def main() -> int:
    """Check every input, then embed unit by unit; the output appears when it is complete."""
    args = make_parser().parse_args()
    check_ray(args)
    with reaching(args.output):
        _check_flags(args)
    signal.signal(signal.SIGTERM, leave_in_order)
    embed(args)
    return DONE


def embed(args: argparse.Namespace, flag: str = "--output") -> dict[str, Any]:
    """Embed what the flags name, or find that this is done: the record of it. flag: the one that
    gave the output, for errors.
    """
    if args.ray:  # the accelerators are for the actors
        jax.config.update("jax_platforms", "cpu")
    media = media_config(args)
    corpus = open_corpus(args)
    listing = corpus.listing
    fingerprint = corpus.fingerprint() if listing is None else listing.fingerprint()
    checkpoint = open_checkpoint(args.model)
    work = _work(args, fingerprint, media, checkpoint)
    say_prompts(args, checkpoint, queries=False)
    with VectorParts(args.output, work, flag) as parts:
        record = parts.finished()
        if record:
            done = f"this very command has made its {record['vectors']:,} vectors"
            say(f"{args.output} is complete: {done}")
        else:
            record = _embed(args, corpus, media, checkpoint, parts)
            kind = "" if args.precision == "float32" else f" in {args.precision}"
            say(f"{record['vectors']:,} vectors of {record['dimension']}{kind}: {args.output}")
    _say_what_is_missing(args, record)
    return record


def _say_what_is_missing(args: argparse.Namespace, record: dict[str, Any]) -> None:
    """Which inputs have no vector, and which files changed or were left out."""
    lines = (
        skipped_in_words(args.output, record["skipped"]),
        changes_in_words(record.get("since listed", {})),
        rest_in_words(record.get("left out", {})),
    )
    for line in filter(None, lines):
        say(line)


def leave_in_order(signal_number: int, frame: FrameType | None) -> None:
    """End in good order after SIGTERM."""
    sys.exit(PREEMPTED)


def _check_flags(args: argparse.Namespace) -> None:
    """Raise for an output that cannot be, and for flags that do not go together."""
    output: AnyPath = args.output
    if output.suffix not in (".npy", ".parquet", ""):
        endings = "the file must end in .npy or .parquet, or in nothing: a folder"
        raise LcoError(f"--output={output}: {endings}")
    is_folder = output.is_dir()
    if is_folder and output.suffix:
        raise LcoError(f"--output={output} is a folder; give another name")
    if output.exists() and not is_folder and not output.suffix:
        raise LcoError(f"--output={output} is a file; give another name")
    if is_folder and any(output.iterdir()) and not (output / DESCRIPTION).exists():
        raise LcoError(f"--output={output} is a folder of something else; give another name")
    if output.suffix == ".npy" and args.on_error == "skip" and args.precision in LEVELS + SIGNS:
        no_place = "an .npy has no place for what was skipped; give a .parquet, or a folder"
        raise LcoError(f"--on-error=skip --precision={args.precision}: {no_place}")
    if args.id_field and output.suffix == ".npy":
        raise LcoError("--id-field needs a .parquet output; an .npy has no place for ids")


def _embed(
    args: argparse.Namespace,
    corpus: Corpus | BucketFolder,
    media: MediaConfig,
    checkpoint: Checkpoint,
    parts: VectorParts,
) -> dict[str, Any]:
    """Make the parts that are not there and join all: the record of it."""
    if begun := parts.begun_with(INPUT_STATE):
        corpus = replace(corpus, kept=begun)
    found, unit_rows = _look(args, corpus, media, parts)
    modalities = modalities_of(checkpoint, found, media, args.on_error == "raise")
    units = cut(0, found.total, unit_rows)
    dimension = dimension_of(args, checkpoint)
    load = partial(
        UnitEmbedder,
        args,
        media,
        modalities,
        found.has_media,
        unit_rows,
        folder=parts.folder,
        calibrated=calibrated_rows(args, found.total),
    )
    with _what_is_kept(corpus, parts, found.total):
        _make_parts(args, load, parts, units)
    if _has_moved(corpus, parts):
        advice = f"remove {parts.folder.path} and start anew"
        raise LcoError(f"--input={args.input} changed meanwhile; {advice}")
    about = {} if corpus.listing is None else _about(corpus, corpus.listing)
    storage = Storage(dimension, args.precision, read_ranges(parts.folder.path / RANGES, dimension))
    return parts.join(units, storage, found.ids, **about)


def _has_moved(corpus: Corpus | BucketFolder, parts: VectorParts) -> bool:
    """Whether rows may not be where they were: a file of inputs changed, of which there is no list
    as of a folder.
    """
    return corpus.listing is None and corpus.fingerprint() != parts.work[INPUT_STATE]


def _about(corpus: Corpus | BucketFolder, listing: Listing) -> dict[str, Any]:
    """What the record says about a folder: what was left out, and what changed since."""
    about: dict[str, Any] = {"left out": dict(listing.left_out)}
    changes = listing.changes(corpus.listed_now())
    if any(changes.values()):
        about["since listed"] = {how: list(map(as_id, names)) for how, names in changes.items()}
    return about


@contextmanager
def _what_is_kept(corpus: Corpus | BucketFolder, parts: VectorParts, total: int) -> Iterator[None]:
    """Whatever ends the work within, a line says what the same command need not do again."""
    try:
        yield
    except (LcoError, KeyboardInterrupt, SystemExit):
        done = parts.rows_done()
        if done and not _has_moved(corpus, parts):
            kept = f"{done:,} of {total:,} vectors are kept in {parts.folder.path}"
            say(f"{kept}; the same command goes on from there", aside=True)
        raise


def _make_parts(
    args: argparse.Namespace, load: Load, parts: VectorParts, units: Sequence[Unit]
) -> None:
    """Make the parts of units that are not there, in this process or in actors."""
    run = _on_ray if args.ray else _here
    left = parts.left(units)
    total = sum(unit.rows for unit in units)
    done = total - sum(unit.rows for unit in left)
    with progress_bar(total=total, initial=done, desc="embedding", unit="input") as progress:
        for _ in range(ROUNDS):
            if left:
                run(args, load, left, progress)
                left = parts.left(units)
    if left:
        raise LcoError(f"{parts.folder.path} loses the parts that are written to it")


def _here(args: argparse.Namespace, load: Load, units: Sequence[Unit], progress: tqdm) -> None:
    """Make the parts of units in this process."""
    load(os.cpu_count() or 1)(units, progress)


def _on_ray(args: argparse.Namespace, load: Load, units: Sequence[Unit], progress: tqdm) -> None:
    """Make the parts of units in actors."""
    from lco_jax.data.ray_actors import Cluster, run_on_ray  # of the extra

    cluster = Cluster(args.ray, args.actors, args.actor_resources)
    folder = load.keywords["folder"]
    needs_ranges = args.precision in LEVELS and RANGES not in folder.names()
    run_on_ray(cluster, load, folder, units, progress, 1 if needs_ranges else 0)


def _look(
    args: argparse.Namespace,
    corpus: Corpus | BucketFolder,
    media: MediaConfig,
    parts: VectorParts,
) -> tuple[Contents, int]:
    """What the input has, and how many rows a unit: as whoever began this work found and chose."""
    known = parts.description()
    if known is None:
        strict = args.on_error == "raise"  # then what is missing is found before hours of work
        items = progress_bar(
            corpus.items(strict), desc="checking", unit="input", leave=False, delay=2
        )
        with items:
            found = scan(items, media, strict)
        if corpus.listing is not None:
            parts.folder.keep(corpus.listing)
        unit_rows = args.part_size or (MEDIA_A_UNIT if found.has_media else TEXTS_A_UNIT)
        known = {
            "total": found.total,
            "kinds": found.kinds,
            "ids": found.ids.__name__,
            "part_rows": unit_rows,
        }
    known.pop("work", None)
    parts.describe(**known)  # again where --on-error has changed
    ids = {"int": int, "str": str}[known["ids"]]
    return Contents(known["total"], known["kinds"], ids), known["part_rows"]


def modalities_of(
    checkpoint: Checkpoint, found: Contents, media: MediaConfig, strict: bool
) -> tuple[str, ...]:
    """The modalities whose towers are needed. strict: raise for one that the checkpoint does not
    take.
    """
    known = checkpoint.backbone.modalities
    for kind, where in found.kinds.items():
        if strict and kind not in known:
            takes = f"{checkpoint.folder.name} takes {', '.join(known)}"
            raise LcoError(f"{where} has {kind}, and {takes}")
    needed = {"text", *found.kinds}
    if media.use_audio_in_video and "video" in found.kinds:
        needed.add("audio")
    return tuple(kind for kind in known if kind in needed)


def _work(
    args: argparse.Namespace, fingerprint: str, media: MediaConfig, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Flag -> value of all that vectors and their order depend on; speed is not part of it, and may
    change.
    """
    return {
        "--input": _absolute(args.input),
        INPUT_STATE: fingerprint,
        "--media-root": None if args.media_root is None else _absolute(args.media_root),
        "--id-field": args.id_field,
        "--on-error": args.on_error,
        **embedding_settings(args, media, checkpoint),
        **storage_settings(args, checkpoint),
    }


def _absolute(path: AnyPath) -> str:
    return os.fspath(path) if on_bucket(path) else os.path.abspath(path)


if __name__ == "__main__":
    run_main(main)
