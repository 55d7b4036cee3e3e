"""Search a folder or file of texts and media across modalities, on a small web page that this
machine serves.

    python -m lco_jax.search --model=Qwen/Qwen2.5-Omni-3B --input=photos/ --output=photos.index
    python -m lco_jax.search --model=exports/vl7b --input=corpus.jsonl --output=corpus.index
    --port=9000

The index, --output, has a vector for each input. Started again, the command embeds what is new or
has changed and forgets what is gone; after a kill it goes on from there. Needs the extra `search`.

--truncate-dim and --precision make the index smaller, and cosines approximate. With binary or
ubinary, the vectors whose signs differ least from the query's are ranked by the cosines of its
numbers with their signs; with --by-signs, the same are ranked by whatever is stored.
"""

import argparse
from collections.abc import Mapping, Sequence, Set
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow
import pyarrow.parquet

from lco_jax.calibration import (
    Flags,
    add_storage_flags,
    calibrated_rows,
    dimension_of,
    first_vectors,
    storage_of,
    storage_settings,
)
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.console import progress_bar
from lco_jax.core.errors import DONE, LcoError, explained, run_main
from lco_jax.core.extras import install_line
from lco_jax.core.files import read_own, write_json
from lco_jax.core.shapes import keep_compiled
from lco_jax.core.small_vectors import LEVELS, SIGNS, Storage
from lco_jax.data.corpus import Contents, Corpus, CorpusItem, scan
from lco_jax.data.folder import rest_in_words
from lco_jax.data.inputs import Preparation
from lco_jax.data.parts import Unit, VectorParts, cut
from lco_jax.data.prompts import Prompt
from lco_jax.data.range_files import beside
from lco_jax.data.skipped import skipped_in_words
from lco_jax.data.vectors import matrix, part_table, same_work, vector_type
from lco_jax.embedder import OmniEmbedder
from lco_jax.flags import (
    MEDIA_A_UNIT,
    add_corpus_flags,
    add_path,
    embedding_settings,
    load_embedder,
    media_config,
    new_parser,
    say_prompts,
    workers,
)
from lco_jax.searching.library import Entry, Library
from lco_jax.searching.listening import add_listening_flags, address_of, listening
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
    add_listening_flags(parser, port=8765)
    parser.add_argument(
        "--max-upload",
        type=int,
        default=100_000_000,
        help="bytes of a query (default: 100,000,000)",
    )
    add_corpus_flags(parser, on_error="skip", part_size=MEDIA_A_UNIT)
    add_index_flags(parser)
    return parser


def add_index_flags(parser: Flags) -> None:
    """The flags that say how an index is stored and searched."""
    parser.add_argument(
        "--ann", action="store_true", help=f"an HNSW graph for fewer than {EXACT:,} vectors, too"
    )
    parser.add_argument(
        "--by-signs",
        action="store_true",
        help="the signs of all vectors propose candidates, which what is stored ranks",
    )
    add_storage_flags(parser)


def check_index_flags(args: argparse.Namespace) -> None:
    """Raise for flags of an index that do not go together."""
    if args.ann and (args.by_signs or args.precision in SIGNS):
        raise LcoError("--ann goes without --by-signs, and not with signs alone")


def main() -> int:
    """Embed what the index lacks, then serve the page until Ctrl-C."""
    args = make_parser().parse_args()
    with explained(f"search needs more packages: {install_line('search')}", ImportError):
        from lco_jax.searching.server import LOOPBACK, Server, http_server
    check_index_flags(args)
    with listening(args) as socket_:  # before hours of work
        started = prepare(args)
        queries, about = _queries(args, started), about_index(args, started)
        server = Server(started.library, queries, about, args.max_upload, media_config(args))
        # what the command is asked for, however much else is said
        print(page_line(started, address_of(args, socket_)), flush=True)
        app = server.app(LOOPBACK if args.host in LOOPBACK else ("*",))
        http_server(app).run(sockets=[socket_])
    return DONE


def _queries(args: argparse.Namespace, started: "Started") -> ModelQueries:
    """What embeds queries, after a first one."""
    embedder = started.embedder
    preparation = Preparation(embedder.processor, query_prompt(args, embedder), args.max_length)
    queries = ModelQueries(preparation, embedder.embed, started.storage.dimension)
    queries.embed(queries.prepare([FIRST_QUERY], "the first query"))
    return queries


def query_prompt(args: argparse.Namespace, embedder: OmniEmbedder) -> Prompt:
    """The prompt of queries: that of inputs, if --prompt gives one, or the model's for queries."""
    name = None if args.prompt is not None else args.prompt_name or embedder.query_prompt
    return embedder.prompt_of(name, args.prompt)


def about_index(args: argparse.Namespace, started: "Started") -> dict[str, Any]:
    """What the page says of the model and of the vectors."""
    embedder = started.embedder
    return {
        "model": Path(args.model).name,
        "modalities": embedder.modalities,
        "stored": _stored(started.storage, embedder.dimension),
    }


def _stored(storage: Storage, full: int) -> str:
    """How vectors are stored, in words; "" if as the model makes them. full: the model's D."""
    exact = storage.precision == "float32"
    if exact and storage.dimension == full:
        return ""
    return f"{storage}" if exact else f"{storage}, cosines are approximate"


class Started(NamedTuple):
    """What a start has made ready. notes: how vectors are stored if not as the model makes them,
    and what cannot be found, in words; "" if there is nothing to say.
    """

    library: Library
    embedder: OmniEmbedder
    storage: Storage
    notes: str


def page_line(started: Started, address: str) -> str:
    """What can be searched at an address, and the notes."""
    counts = ", ".join(f"{count:,} {kind}" for kind, count in started.library.counts.items())
    rest = f" ({started.notes})" if started.notes else ""
    return f"{counts}: {address}{rest}"


def prepare(args: argparse.Namespace, flag: str = "--output") -> Started:
    """Bring the index, which `flag` gave, up to date and load it, and the model for queries."""
    if args.input.suffix == ".parquet":
        raise LcoError(f"--input={args.input}: search takes a folder of media, a .jsonl or a .txt")
    media = media_config(args)
    strict = args.on_error == "raise"
    corpus = Corpus(args.input, None, args.media_root, keeps_bad=not strict)
    items = list(corpus.items(strict))
    found = scan(items, media, strict)
    entries = _entries(corpus, items)
    keep_compiled()
    checkpoint = open_checkpoint(args.model)
    work = embedding_settings(args, media, checkpoint) | storage_settings(args, checkpoint)
    parts = VectorParts(args.output / "vectors.parquet", work, flag)
    dimension = dimension_of(args, checkpoint)
    embedder = load_embedder(args, checkpoint, media, None)
    say_prompts(args, checkpoint, queries=True)
    index, storage = update(parts, entries, found, embedder, args, dimension)
    library, notes = _library(args, entries, index, storage)
    if corpus.listing and corpus.listing.left_out:
        notes.append(rest_in_words(corpus.listing.left_out))
    stored = _stored(storage, embedder.dimension)
    return Started(library, embedder, storage, "; ".join([stored, *notes] if stored else notes))


def _entries(corpus: Corpus, items: Sequence[CorpusItem]) -> dict[str, Entry]:
    """What the page shows of each item, by key."""
    root = corpus.path if corpus.path.is_dir() else corpus.path.parent
    every = [Entry.of(item, root) for item in items]
    return {entry.key: entry for entry in every}


class Index(NamedTuple):
    """The rows of an index: keys, vectors [N, W] as they are stored, and which rows have one, bool
    [N].
    """

    keys: list[str]
    vectors: np.ndarray
    there: np.ndarray


def _library(
    args: argparse.Namespace,
    entries: Mapping[str, Entry],
    index: Index,
    storage: Storage,
) -> tuple[Library, list[str]]:
    """(what can be searched, what was skipped in words)."""
    rows = [row for row, key in enumerate(index.keys) if key in entries and index.there[row]]
    notes = []
    if skipped := len(entries) - len(rows):
        notes.append(skipped_in_words(args.output / "vectors.parquet", skipped, "skipped"))
    if not rows:
        why = "".join(f"; {note}" for note in notes)
        raise LcoError(f"--input={args.input} holds nothing that could be embedded{why}")

    def nearest(vectors: np.ndarray, keys: list[str], kind: str) -> Nearest:
        by_signs = args.by_signs or storage.precision in SIGNS
        if not by_signs and (args.ann or len(keys) > EXACT):
            return with_graph(vectors, keys, args.output, kind, storage)
        return Nearest(vectors, None, storage, by_signs)

    library = Library([entries[index.keys[row]] for row in rows], index.vectors[rows], nearest)
    return library, notes


def update(
    parts: VectorParts,
    entries: Mapping[str, Entry],
    found: Contents,
    embedder: OmniEmbedder,
    args: argparse.Namespace,
    dimension: int,
) -> tuple[Index, Storage]:
    """Embed what the index lacks -> its rows, and how its vectors are stored.

    entries: by key. dimension: of what is stored. The parts that a killed start has left come
    first, then what the index had, then what is new. An input that could not be embedded is tried
    again only when another one is new.
    """
    with parts:
        _check_manifest(parts)
        storage = _storage(parts, entries, embedder, args, dimension)
        known = _read_table(parts, storage)
        parts.description()
        parts.describe()
        parts.left(parts.folder.units())  # removes what is torn
        if not parts.folder.units() and known.keys and entries.keys() == set(known.keys):
            return known, storage
        done = _keys_of_parts(parts)
        done |= _keep_known(parts, known, entries.keys() - done)
        _embed_new(parts, entries, done, found, embedder, storage, args)
        parts.join(parts.folder.units(), storage, str, recorded=False)
    return _read_table(parts, storage), storage


def _storage(
    parts: VectorParts,
    entries: Mapping[str, Entry],
    embedder: OmniEmbedder,
    args: argparse.Namespace,
    dimension: int,
) -> Storage:
    """How the index stores vectors. Ranges are of the inputs that it began with, and stay."""
    place = beside(parts.output)
    has_begun = parts.output.exists() or bool(parts.folder.units())
    if args.precision in LEVELS and has_begun and not place.exists():
        gone = f"{place} is gone, without which no vector of the index can be read"
        raise LcoError(f"{gone}; remove {parts.output.parent}, and the same command begins anew")

    def first() -> np.ndarray:
        count = calibrated_rows(args, len(entries))
        items = [entry.item for entry in islice(entries.values(), count)]
        return first_vectors(embedder, items, args, workers(args, media=False))

    return storage_of(args, dimension, place, first)


def _keep_known(parts: VectorParts, known: Index, lacking: Set[str]) -> set[str]:
    """Write what the index had of the keys that the parts lack; returns those keys."""
    kept = [row for row, key in enumerate(known.keys) if key in lacking and known.there[row]]
    ids = [known.keys[row] for row in kept]
    if kept:
        unit = _next_units(parts, len(kept), len(kept))[0]
        parts.folder.write(unit, part_table(ids, known.vectors[kept], {}))
    return set(ids)


def _check_manifest(parts: VectorParts) -> None:
    """Raise for an index of other flags, or of something else."""
    manifest = parts.output.parent / "manifest.json"
    if manifest.exists():
        advice = f"remove {manifest.parent}, and the same command embeds all again"
        same_work(read_own(manifest, advice), parts.work, manifest.parent, parts.flag)
    elif parts.output.exists():
        raise LcoError(f"{parts.output} is of no index of ours; give another {parts.flag}")
    write_json(manifest, parts.work)


def _read_table(parts: VectorParts, storage: Storage) -> Index:
    """The rows of the index. Raises where its file is damaged, or of another model's dimension."""
    if not parts.output.exists():
        return Index([], np.zeros((0, storage.width), storage.dtype), np.zeros(0, bool))
    damaged = f"{parts.output} is damaged; remove it, and the same command embeds all again"
    with explained(damaged, pyarrow.ArrowException, OSError):
        table = pyarrow.parquet.read_table(parts.output, page_checksum_verification=True)
        table.validate(full=True)
    if not _is_index(table, storage):
        raise LcoError(damaged)
    vectors, there = matrix(table)
    if len(table) and vectors.shape[1] != storage.width:
        width = f"{vectors.shape[1]} dimensions, and the model's {storage.width}"
        raise LcoError(f"{parts.output}: its vectors have {width}; remove it")
    if not np.isfinite(vectors[there]).all():
        blame = "the weights of --model or --adapter are not finite, or too large for --dtype"
        raise LcoError(f"{parts.output} holds vectors that are not finite: {blame}; remove it")
    return Index(table["id"].to_pylist(), vectors, there)


def _is_index(table: pyarrow.Table, storage: Storage) -> bool:
    """Whether a table has what `update` writes: a vector, or null, for each key."""
    if not {"id", "embedding"} <= set(table.column_names):
        return False
    ids, embedding = table["id"], table["embedding"].type
    if not (pyarrow.types.is_string(ids.type) and pyarrow.types.is_fixed_size_list(embedding)):
        return False
    different = len(set(ids.to_pylist())) == len(ids) and not ids.null_count
    return different and embedding.value_type == vector_type(storage).value_type


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
    storage: Storage,
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
        embed_units(embedder, inputs, parts.folder, storage, args, options)


if __name__ == "__main__":
    run_main(main)
