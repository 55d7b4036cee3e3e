"""Search a folder or file of texts and media across modalities, on a small web page of this machine's own.

    python -m lco_jax.search --model=Qwen/Qwen2.5-Omni-3B --input=photos/ --index=photos.index
    python -m lco_jax.search --model=exports/vl7b --input=corpus.jsonl --index=corpus.index --port=9000

The index keeps a vector an input. Started again, it embeds what is new or has changed and forgets what is gone; after a
kill it goes on from there. Needs the extra: pip install 'lco-jax[search]'.
"""

import argparse
import socket
from collections.abc import Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet
from tqdm import tqdm

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.buckets import on_disk
from lco_jax.core.errors import LcoError, explained, run_main
from lco_jax.core.files import read_json, write_json
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.corpus import Contents, Corpus, scan
from lco_jax.data.parts import Unit, VectorParts
from lco_jax.data.vectors import read_vectors, same_work
from lco_jax.embed import embed_items
from lco_jax.embedder import OmniEmbedder
from lco_jax.flags import (
    MEDIA_A_PART,
    add_corpus_flags,
    embedding_settings,
    load_embedder,
    media_config,
)
from lco_jax.searching.library import Entry, Library
from lco_jax.searching.nearest import EXACT, Nearest, with_graph


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.search",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        type=on_disk,
        required=True,
        help="a folder of media, a .jsonl or a .txt, as of embed",
    )
    parser.add_argument(
        "--index", type=on_disk, required=True, help="the folder that keeps the vectors"
    )
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
    add_corpus_flags(parser, on_error="skip")
    return parser.parse_args()


def main() -> int:
    """Embed what the index lacks, then serve the page until Ctrl-C."""
    args = parse_args()
    with explained("search needs more packages: pip install 'lco-jax[search]'", ImportError):
        import uvicorn

        from lco_jax.searching.server import HEADERS, LOOPBACK, Server
    if args.input.suffix == ".parquet":
        raise LcoError(f"--input={args.input}: search takes a folder of media, a .jsonl or a .txt")
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with explained(
        f"--host={args.host} --port={args.port} cannot be listened on", OSError, OverflowError
    ):
        listening = socket.create_server(
            (args.host, args.port), family=family
        )  # before hours of work
    with listening:
        library, embedder = prepare(args)

        def encode(content: Any, name: str) -> np.ndarray:
            return embedder.encode(
                [content], prompt=args.prompt, max_length=args.max_length, names=[name]
            )[0]

        encode({"text": "a first query, so that the next one finds its programs compiled"}, "")
        about = {"model": Path(args.model).name, "modalities": embedder.modalities}
        server = Server(library, encode, about, args.max_upload)
        host = f"[{args.host}]" if ":" in args.host else args.host
        counts = ", ".join(f"{count:,} {kind}" for kind, count in library.counts.items())
        print(f"{counts}: http://{host}:{listening.getsockname()[1]}", flush=True)
        app = server.app(LOOPBACK if args.host in LOOPBACK else ("*",))
        config = uvicorn.Config(app, log_level="warning", server_header=False, headers=HEADERS)
        uvicorn.Server(config).run(sockets=[listening])
    return 0


def prepare(args: argparse.Namespace) -> tuple[Library, OmniEmbedder]:
    """Bring the index up to date and load it, and the model that embeds queries."""
    media, strict = media_config(args), args.on_error == "raise"
    corpus = Corpus(args.input, None, args.media_root)
    items = list(corpus.items(strict))
    found = scan(items, media, strict)
    root = corpus.path if corpus.path.is_dir() else corpus.path.parent
    entries = {entry.key: entry for entry in (Entry.of(item, root) for item in items)}
    keep_compiled()
    checkpoint = open_checkpoint(args.model)
    embedder = load_embedder(args, checkpoint, media, None)
    work = embedding_settings(args, media, checkpoint)
    parts = VectorParts(
        args.index / "vectors.parquet", work, args.part_size or MEDIA_A_PART, "--index"
    )
    keys, vectors = update(parts, entries, found, embedder, args)
    rows = [row for row, key in enumerate(keys) if key in entries and np.isfinite(vectors[row, 0])]
    if len(rows) < len(entries):
        print(
            f"{len(entries) - len(rows):,} inputs are left out: {parts.output}.skipped.jsonl says which, and why"
        )
    if not rows:
        raise LcoError(f"--input={args.input} holds nothing that could be embedded")

    def index(vectors: np.ndarray, keys: Sequence[str], kind: str) -> Nearest:
        return (
            with_graph(vectors, keys, args.index, kind)
            if args.ann or len(keys) > EXACT
            else Nearest(vectors)
        )

    return Library([entries[keys[row]] for row in rows], vectors[rows], index), embedder


def update(
    parts: VectorParts,
    entries: Mapping[str, Entry],
    found: Contents,
    embedder: OmniEmbedder,
    args: argparse.Namespace,
) -> tuple[list[str], np.ndarray]:
    """Embed what the index lacks -> the keys of its rows, and float32 [N, D], NaN where an input could not be embedded.

    entries: by key. What a killed start has embedded lies in `parts`; what the index had is laid down after it, then
    what is new. An input that could not be embedded is tried again only when another one is new.
    """
    table, manifest = (
        partial(pyarrow.parquet.read_table, parts.output),
        parts.output.parent / "manifest.json",
    )
    with parts, parts.alone(wait=False):
        if manifest.exists():
            same_work(read_json(manifest), parts.work, manifest.parent, parts.flag)
        elif parts.output.exists():
            raise LcoError(f"{parts.output} is of no index of ours; give another --index")
        write_json(manifest, parts.work)
        known, vectors = read_vectors([table()] if parts.output.exists() else [])
        if not parts.done and known and entries.keys() == set(known):
            return known, vectors
        done = set(read_vectors(parts.tables())[0])
        lacking = entries.keys() - done
        rows = [
            row for row, key in enumerate(known) if key in lacking and np.isfinite(vectors[row, 0])
        ]
        if rows:
            Unit(parts, row := parts.next_row, row + len(rows)).add(
                [known[row] for row in rows], vectors[rows], {}
            )
        there = done | {known[row] for row in rows}
        new = [entry.item._replace(id=key) for key, entry in entries.items() if key not in there]
        if new:
            rest = closing(
                Unit(parts, row := parts.next_row, row + len(new))
            )  # while nobody else may come in
            bar = tqdm(
                total=len(there) + len(new), initial=len(there), desc="embedding", unit="input"
            )
            with rest as unit, bar as progress:
                embed_items(embedder, [(unit, new)], found, parts, args, progress)
        parts.join(len(there) + len(new), embedder.dimension, str, recorded=False)
    return read_vectors([table()])


if __name__ == "__main__":
    run_main(main)
