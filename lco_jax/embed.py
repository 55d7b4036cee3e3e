"""Embed a file of texts and media, or a folder of media.

    python -m lco_jax.embed --model=runs/base/merged --input=texts.txt --output=vectors.npy
    python -m lco_jax.embed --model=Qwen/Qwen2.5-Omni-3B --adapter=my/adapter --dtype=bfloat16 \\
        --input=corpus.jsonl --id-field=doc_id --on-error=skip --output=vectors.parquet

Input, one of:
  .txt      a text a line
  .jsonl    a line each: a string (text), an object with any of text, image, audio and video (media: a path, an
            address, or a list of them; also under image_path and so on), or a list of chat messages
  .parquet  columns of these names; media are paths, encoded bytes, or structs of both (bytes, path)
  a folder  every image, video and audio file in it, by extension
Other keys and columns are metadata and left alone. Relative paths start at the folder of the file that has them.

Output: .npy holds float32 [N, D] in input order; .parquet holds the columns id and embedding (id: the --id-field, else
the line or row number from 0, or the path within the folder); a name without an ending is a folder of such files,
never joined, with _index.json. With --on-error=skip, an input that cannot be read keeps its row, NaN or null, and
<output>.skipped.jsonl says why. <output>.json records what was done: the same command again has nothing to do.

What is done lies in <output>.partial until all is; the same command after a kill goes on from there, and started again
meanwhile, here or on another machine that sees the folder, it shares the work: any of the processes may die.
"""

import argparse
import logging
import os
import signal
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from itertools import chain, tee
from typing import Any

import jax
from tqdm import tqdm

from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.core.errors import PREEMPTED, LcoError, run_main
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.corpus import Contents, Corpus, CorpusItem, scan
from lco_jax.data.media import MediaConfig
from lco_jax.data.parts import INDEX, Unit, VectorParts
from lco_jax.embedder import OmniEmbedder
from lco_jax.flags import (
    MEDIA_A_PART,
    TEXTS_A_PART,
    add_corpus_flags,
    add_path,
    embedding_settings,
    load_embedder,
    media_config,
    new_parser,
    workers,
)

POLL = 1.0  # seconds from one look at the units of others to the next


class Progress(tqdm):
    """A bar, whose steps (after a forward pass, at the latest) are signs of life to the other processes."""

    def __init__(self, parts: VectorParts, **options: Any):
        self.parts = parts
        super().__init__(**options)

    def update(self, n: float = 1) -> bool | None:
        """Advance by n inputs."""
        self.parts.alive()
        return super().update(n)


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = new_parser("embed", __doc__)
    add_path(parser, "--input", ".txt, .jsonl, .parquet or a folder of media")
    add_path(parser, "--output", ".npy or .parquet, or a folder")
    parser.add_argument(
        "--id-field", help="the key of a jsonl object, or column of a parquet, that is its id"
    )
    parser.add_argument(
        "--distributed", action="store_true", help="one of the processes of a TPU slice"
    )
    add_corpus_flags(parser, on_error="raise")
    return parser.parse_args()


def main() -> int:
    """Check every input, then embed and write unit by unit; the output appears when it is whole."""
    args = parse_args()
    if args.output.suffix not in (".npy", ".parquet", ""):
        raise LcoError(
            f"--output={args.output}: the file must end in .npy or .parquet, or in nothing: a folder"
        )
    if args.output.is_dir() == bool(args.output.suffix) and args.output.exists():
        raise LcoError(
            f"--output={args.output} is a {'folder' if args.output.suffix else 'file'}; give another name"
        )
    if args.output.is_dir() and os.listdir(args.output) and not (args.output / INDEX).exists():
        raise LcoError(f"--output={args.output} is a folder of something else; give another name")
    if args.id_field and args.output.suffix == ".npy":
        raise LcoError("--id-field needs a .parquet output; an .npy has no place for ids")
    if args.distributed:
        jax.distributed.initialize()
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(PREEMPTED)
    )  # what waits is written on the way out
    media = media_config(args)
    corpus = Corpus(args.input, args.id_field, args.media_root)
    as_it_was = corpus.fingerprint()
    checkpoint = open_checkpoint(args.model)
    with VectorParts(args.output, _work(args, as_it_was, media, checkpoint)) as parts:
        if record := parts.whole():
            print(
                f"{args.output} is whole: this very command has made its {record['vectors']:,} vectors"
            )
        else:
            record = _embed(args, corpus, as_it_was, media, checkpoint, parts)
            print(f"{record['vectors']:,} vectors of {record['dimension']}: {args.output}")
    if skipped := record["skipped"]:
        print(
            f"{skipped:,} of them are empty: {args.output}.skipped.jsonl says which inputs were skipped, and why"
        )
    return 0


def _embed(
    args: argparse.Namespace,
    corpus: Corpus,
    as_it_was: str,
    media: MediaConfig,
    checkpoint: Checkpoint,
    parts: VectorParts,
) -> dict[str, Any]:
    """Embed what no other process does, until all is there: the record of it."""
    strict = (
        args.on_error == "raise"
    )  # then what is missing is found before hours of work, not after

    def look() -> dict[str, Any]:  # the first process does, for all
        with tqdm(
            corpus.items(strict), desc="checking", unit="input", leave=False, delay=2
        ) as items:
            found = scan(items, media, strict)
        part_rows = args.part_size or (MEDIA_A_PART if found.has_media else TEXTS_A_PART)
        return {
            "total": found.total,
            "kinds": found.kinds,
            "ids": found.ids.__name__,
            "part_rows": part_rows,
        }

    settled = parts.settled(look)
    found = Contents(settled["total"], settled["kinds"], {"int": int, "str": str}[settled["ids"]])
    parts.part_rows = settled[
        "part_rows"
    ]  # one for all: processes that cut otherwise would not share
    modalities = modalities_of(checkpoint, found, media, strict)
    keep_compiled()
    try:
        embedder, read = load_embedder(args, checkpoint, media, modalities), corpus.reader()
        with Progress(
            parts, total=found.total, initial=parts.news(), desc="embedding", unit="input"
        ) as progress:
            while not (record := parts.finish(found.total, embedder.dimension, found.ids)):
                while parts.left:
                    if unit := parts.claim():
                        units = (
                            (one, read(one.first, one.end))
                            for one in chain([unit], iter(parts.claim, None))
                        )
                        embed_items(embedder, units, found, parts, args, progress)
                    else:
                        time.sleep(POLL)  # others have what is left, and may die
                        progress.update(parts.news())
                if corpus.fingerprint() != as_it_was:
                    raise LcoError(
                        f"--input={corpus.path} changed meanwhile; remove {parts.folder} and start anew"
                    )
            progress.update(found.total - progress.n)
            return record
    except (LcoError, KeyboardInterrupt, SystemExit):
        if done := parts.done:
            kept = f"{done:,} of {found.total:,} vectors are kept in {parts.folder}"
            print(f"{kept}; the same command goes on from there", file=sys.stderr)
        raise


def embed_items(
    embedder: OmniEmbedder,
    units: Iterable[tuple[Unit, Iterable[CorpusItem]]],
    found: Contents,
    parts: VectorParts,
    args: argparse.Namespace,
    progress: tqdm,
) -> None:
    """Embed units of `parts`, each with its inputs. They are taken ahead of what is computed. found: of all inputs."""
    sizes = deque[int]()  # of units that are taken
    coming = deque[
        tuple[Unit, int | str]
    ]()  # inputs on their way: no more than a block and what is prepared ahead

    def inputs() -> Iterator[tuple[Any, str]]:
        for unit, items in units:
            sizes.append(len(unit))
            count = 0
            for item in items:
                coming.append((unit, item.id))
                yield item.content, item.where
                count += 1
            if count != len(unit):
                raise LcoError(
                    f"--input={args.input} changed meanwhile; remove {parts.folder} and start anew"
                )

    logging.getLogger("lco_jax.embedder").setLevel(
        logging.ERROR
    )  # what it skips is counted and listed here
    contents, names = tee(inputs())
    skipped = 0
    blocks = embedder.encode_blocks(
        (content for content, _ in contents),
        args.batch_size,
        prompt=args.prompt,
        max_length=args.max_length,
        on_error=args.on_error,
        workers=workers(args, found.has_media),
        block_inputs=parts.part_rows,
        units=iter(sizes.popleft, None),
        progress=progress,
        names=(where for _, where in names),
    )
    for block in blocks:
        unit, reasons = (
            coming[0][0],
            {index - block.first: reason for index, reason in block.skipped.items()},
        )
        unit.add([coming.popleft()[1] for _ in block.vectors], block.vectors, reasons)
        progress.update(parts.news())
        if skipped := skipped + len(reasons):
            progress.set_postfix(skipped=skipped)


def modalities_of(
    checkpoint: Checkpoint, found: Contents, media: MediaConfig, strict: bool
) -> tuple[str, ...]:
    """The modalities whose towers are needed. strict: raise for one that the checkpoint does not take."""
    known = checkpoint.backbone.modalities
    for kind, where in found.kinds.items():
        if strict and kind not in known:
            raise LcoError(
                f"{where} has {kind}, and {checkpoint.folder.name} takes {', '.join(known)}"
            )
    sounds = {"audio"} if media.use_audio_in_video and "video" in found.kinds else set()
    return tuple(kind for kind in known if kind == "text" or kind in found.kinds.keys() | sounds)


def _work(
    args: argparse.Namespace, as_it_was: str, media: MediaConfig, checkpoint: Checkpoint
) -> dict[str, Any]:
    """Flag -> value of all that vectors and their order depend on. Speed is not part of it: that may change."""
    root = None if args.media_root is None else os.path.abspath(args.media_root)
    work = {
        "--input": os.path.abspath(args.input),
        "what --input holds": as_it_was,
        "--media-root": root,
    }
    work |= {"--id-field": args.id_field, "--on-error": args.on_error}
    return {**work, **embedding_settings(args, media, checkpoint)}


if __name__ == "__main__":
    run_main(main)
