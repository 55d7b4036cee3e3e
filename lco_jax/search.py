"""Search a folder or file of texts and media across modalities, on a small web page that this
machine serves.

    python -m lco_jax.search --model=Qwen/Qwen2.5-Omni-3B --input=photos/ --output=photos.index
    python -m lco_jax.search --model=exports/vl7b --input=corpus.jsonl --output=corpus.index
    --port=9000

The index, --output, has a vector for each input. Started again, the command embeds what is new or
has changed and forgets what is gone; after a kill it goes on from there. Needs the extra `search`.
"""

import argparse
import socket
from collections.abc import Mapping, Sequence, Set
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.console import progress_bar
from lco_jax.core.errors import DONE, LcoError, explained, run_main
from lco_jax.core.extras import install_line
from lco_jax.core.files import read_own, write_json
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.corpus import Contents, Corpus, scan
from lco_jax.data.folder import rest_in_words
from lco_jax.data.inputs import Preparation
from lco_jax.data.parts import Unit, VectorParts, cut
from lco_jax.data.skipped import skipped_in_words
from lco_jax.data.vectors import part_table, read_vectors, same_work
from lco_jax.embedder import OmniEmbedder
from lco_jax.flags import (
    MEDIA_A_UNIT,
    add_corpus_flags,
    add_path,
    embedding_settings,
    load_embedder,
    media_config,
    new_parser,
    workers,
)
from lco_jax.searching.library import Entry, Library
from lco_jax.searching.nearest import EXACT, Nearest, with_graph
from lco_jax.searching.queries import ModelQueries
from lco_jax.unit_embedder import embed_units

FIRST_QUERY = {
    "type": "text",
    "text": "a first query, so that the next one finds its programs compiled",
}


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("search", __doc__)
    add_path(parser, "--input", "a folder of media, a .jsonl or a .txt, as of embed")
    add_path(parser, "--output", "the folder of the index", earlier=["--index"])
    parser.add_argument(
        "--port", type=int, default=8765, help="0: any that is free (default: 8765)"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="the address to listen on (default: 127.0.0.1)"
    )
    parser.add_argument(
        "--max-upload",
        type=int,
        default=100_000_000,
        help="bytes of a query (default: 100,000,000)",
    )
    parser.add_argument(
        "--ann", action="store_true", help=f"an HNSW graph for fewer than {EXACT:,} vectors, too"
    )
    add_corpus_flags(parser, on_error="skip", part_size=MEDIA_A_UNIT)
    return parser


def main() -> int:
    """Embed what the index lacks, then serve the page until Ctrl-C."""
    args = make_parser().parse_args()
    with explained(f"search needs more packages: {install_line('search')}", ImportError):
        from lco_jax.searching.server import LOOPBACK, Server, http_server
    if args.input.suffix == ".parquet":
        raise LcoError(f"--input={args.input}: search takes a folder of media, a .jsonl or a .txt")
    with listening(args) as socket_:  # before hours of work
        library, embedder, notes = prepare(args)
        preparation = Preparation(embedder.processor, args.prompt, args.max_length)
        queries = ModelQueries(preparation, embedder.embed)
        queries.embed(queries.prepare([FIRST_QUERY], "the first query"))
        about = {"model": Path(args.model).name, "modalities": embedder.modalities}
        server = Server(library, queries, about, args.max_upload, media_config(args))
        host = f"[{args.host}]" if ":" in args.host else args.host
        counts = ", ".join(f"{count:,} {kind}" for kind, count in library.counts.items())
        rest = f" ({notes})" if notes else ""
        # what the command is asked for, however much else is said
        print(f"{counts}: http://{host}:{socket_.getsockname()[1]}{rest}", flush=True)
        app = server.app(LOOPBACK if args.host in LOOPBACK else ("*",))
        http_server(app).run(sockets=[socket_])
    return DONE


def listening(args: argparse.Namespace) -> socket.socket:
    """The socket of --host and --port."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    cannot = f"--host={args.host} --port={args.port} cannot be listened on"
    with explained(cannot, OSError, OverflowError):
        return socket.create_server((args.host, args.port), family=family)


class Started(NamedTuple):
    """What a start has made ready. notes: what cannot be found, in words; "" if all can."""

    library: Library
    embedder: OmniEmbedder
    notes: str


def prepare(args: argparse.Namespace) -> Started:
    """Bring the index up to date and load it, and the model that embeds queries."""
    media = media_config(args)
    strict = args.on_error == "raise"
    corpus = Corpus(args.input, None, args.media_root, keeps_bad=not strict)
    items = list(corpus.items(strict))
    found = scan(items, media, strict)
    root = corpus.path if corpus.path.is_dir() else corpus.path.parent
    every = [Entry.of(item, root) for item in items]
    entries = {entry.key: entry for entry in every}
    keep_compiled()
    checkpoint = open_checkpoint(args.model)
    embedder = load_embedder(args, checkpoint, media, None)
    work = embedding_settings(args, media, checkpoint)
    parts = VectorParts(args.output / "vectors.parquet", work)
    keys, vectors = update(parts, entries, found, embedder, args)
    library, notes = _library(args, entries, keys, vectors)
    if corpus.listing and corpus.listing.left_out:
        notes.append(rest_in_words(corpus.listing.left_out))
    return Started(library, embedder, "; ".join(notes))


def _library(
    args: argparse.Namespace,
    entries: Mapping[str, Entry],
    keys: Sequence[str],
    vectors: np.ndarray,
) -> tuple[Library, list[str]]:
    """(what can be searched, what was skipped in words). keys, vectors: the rows of the index."""
    finite = np.isfinite(vectors).all(axis=1)
    rows = [row for row, key in enumerate(keys) if key in entries and finite[row]]
    notes = []
    if skipped := len(entries) - len(rows):
        notes.append(skipped_in_words(args.output / "vectors.parquet", skipped, "skipped"))
    if not rows:
        why = "".join(f"; {note}" for note in notes)
        raise LcoError(f"--input={args.input} holds nothing that could be embedded{why}")

    def index(vectors: np.ndarray, keys: Sequence[str], kind: str) -> Nearest:
        if args.ann or len(keys) > EXACT:
            return with_graph(vectors, keys, args.output, kind)
        return Nearest(vectors)

    library = Library([entries[keys[row]] for row in rows], vectors[rows], index)
    return library, notes


def update(
    parts: VectorParts,
    entries: Mapping[str, Entry],
    found: Contents,
    embedder: OmniEmbedder,
    args: argparse.Namespace,
) -> tuple[list[str], np.ndarray]:
    """Embed what the index lacks -> the keys of its rows, and float32 [N, D], NaN where an input
    could not be embedded.

    entries: by key. The parts that a killed start has left come first, then what the index had,
    then what is new. An input that could not be embedded is tried again only when another one is
    new.
    """
    with parts:
        known, vectors = _read_index(parts, embedder.dimension)
        parts.description()
        parts.describe()
        parts.left(parts.folder.units())  # removes what is torn
        if not parts.folder.units() and known and entries.keys() == set(known):
            return known, vectors
        done = _keys_of_parts(parts)
        done |= _keep_known(parts, known, vectors, entries.keys() - done)
        _embed_new(parts, entries, done, found, embedder, args)
        parts.join(parts.folder.units(), embedder.dimension, str, recorded=False)
    return _read_table(parts)


def _keep_known(
    parts: VectorParts, known: Sequence[str], vectors: np.ndarray, lacking: Set[str]
) -> set[str]:
    """Write what the index had of the keys that the parts lack; returns those keys."""
    finite = np.isfinite(vectors).all(axis=1)
    kept = [row for row, key in enumerate(known) if key in lacking and finite[row]]
    ids = [known[row] for row in kept]
    if kept:
        unit = _next_units(parts, len(kept), len(kept))[0]
        parts.folder.write(unit, part_table(ids, vectors[kept], {}))
    return set(ids)


def _read_index(parts: VectorParts, dimension: int) -> tuple[list[str], np.ndarray]:
    """What the index has, as `update` returns it. Raises for an index of other flags, of another
    model's dimension, or of something else.
    """
    manifest = parts.output.parent / "manifest.json"
    if manifest.exists():
        advice = f"remove {manifest.parent}, and the same command embeds all again"
        same_work(read_own(manifest, advice), parts.work, manifest.parent, parts.flag)
    elif parts.output.exists():
        raise LcoError(f"{parts.output} is of no index of ours; give another {parts.flag}")
    write_json(manifest, parts.work)
    known, vectors = _read_table(parts)
    if known and vectors.shape[1] != dimension:
        width = f"{vectors.shape[1]} dimensions, and the model's {dimension}"
        raise LcoError(f"{parts.output}: its vectors have {width}; remove it")
    return known, vectors


def _read_table(parts: VectorParts) -> tuple[list[str], np.ndarray]:
    """The rows of the index, as `update` returns them. Raises where its file is damaged."""
    if not parts.output.exists():
        return [], np.zeros((0, 0), np.float32)
    damaged = f"{parts.output} is damaged; remove it, and the same command embeds all again"
    with explained(damaged, pyarrow.ArrowException, OSError):
        table = pyarrow.parquet.read_table(parts.output, page_checksum_verification=True)
        table.validate(full=True)
    if not _is_index(table):
        raise LcoError(damaged)
    embeddings = table["embedding"].combine_chunks()
    if not np.isfinite(embeddings.flatten().to_numpy()).all():
        blame = "the weights of --model or --adapter are not finite, or too large for --dtype"
        raise LcoError(f"{parts.output} holds vectors that are not finite: {blame}; remove it")
    return read_vectors([table])  # type: ignore[return-value]


def _is_index(table: pyarrow.Table) -> bool:
    """Whether a table has what `update` writes: a vector of float32, or null, for each key."""
    if not {"id", "embedding"} <= set(table.column_names):
        return False
    ids, embedding = table["id"], table["embedding"].type
    if not (pyarrow.types.is_string(ids.type) and pyarrow.types.is_fixed_size_list(embedding)):
        return False
    different = len(set(ids.to_pylist())) == len(ids) and not ids.null_count
    return different and embedding.value_type == pyarrow.float32()


def _keys_of_parts(parts: VectorParts) -> set[str]:
    tables = parts.folder.tables(parts.folder.units(), ["id"])
    return {key for table in tables for key in table["id"].to_pylist()}


def _next_units(parts: VectorParts, rows: int, unit_rows: int) -> list[Unit]:
    """Units for so many rows, after those of the parts that are there."""
    first = max((unit.end for unit in parts.folder.units()), default=0)
    return cut(first, first + rows, unit_rows)


def _embed_new(
    parts: VectorParts,
    entries: Mapping[str, Entry],
    done: set[str],
    found: Contents,
    embedder: OmniEmbedder,
    args: argparse.Namespace,
) -> None:
    """Make parts of the entries that are not done."""
    new = [entry.item._replace(id=key) for key, entry in entries.items() if key not in done]
    if not new:
        return
    units = _next_units(parts, len(new), args.part_size)
    taken = iter(new)
    inputs = [(unit, [next(taken) for _ in range(unit.rows)]) for unit in units]
    total = len(done) + len(new)
    with progress_bar(total=total, initial=len(done), desc="embedding", unit="input") as progress:
        options = {"workers": workers(args, found.has_media), "progress": progress}
        options["block_inputs"] = args.part_size
        embed_units(embedder, inputs, parts.folder, args, options)


if __name__ == "__main__":
    run_main(main)
