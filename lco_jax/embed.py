"""Embed a file of texts.

    python -m lco_jax.embed --model=runs/base/merged --input=texts.txt --output=vectors.npy
    python -m lco_jax.embed --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=my/adapter --dtype=bfloat16 \\
        --input=corpus.jsonl --id-field=doc_id --output=vectors.parquet

Input: a .txt file of one text a line, or a .jsonl file of strings, {"text": …} objects or chat-message lists. Output:
.npy holds float32 [N, D] in input order; .parquet holds the columns id and embedding (id: the --id-field of a jsonl
object, else the line number, from 0).
"""

import argparse
import json
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from tqdm import tqdm

from lco_jax.core.errors import LcoError, run_main
from lco_jax.data.prompts import as_messages
from lco_jax.embedder import OmniEmbedder

CHUNK = 8192  # inputs sorted by length and embedded together; what is in memory at once


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.embed", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="a checkpoint folder or hub id")
    parser.add_argument("--adapter", help="a PEFT adapter folder or hub id")
    parser.add_argument("--input", type=Path, required=True, help=".txt or .jsonl")
    parser.add_argument("--output", type=Path, required=True, help=".npy or .parquet")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--max-length", type=int, help="cut texts to so many tokens")
    parser.add_argument("--prompt", help="instead of the reference's, placed after the text")
    parser.add_argument("--id-field", help="the field of a jsonl object that is its id")
    return parser.parse_args()


def read_items(path: Path, id_field: str | None) -> Iterator[tuple[Any, Any, str]]:
    """(id, input, file and line) of every line. Raises naming the file and line of a bad one."""
    kind: type | None = None
    with open(path, encoding="utf-8") as file:
        for number, line in enumerate(file):
            where = f"{path}:{number + 1}"
            if path.suffix == ".txt":
                yield number, line.rstrip("\n"), where
                continue
            if not line.strip():
                continue
            try:
                item = json.loads(line)
            except json.JSONDecodeError as error:
                raise LcoError(f"{where}: not valid JSON: {error}") from None
            as_messages(item, where)
            if id_field and (not isinstance(item, dict) or id_field not in item):
                raise LcoError(f"{where}: the input has no field {id_field!r}")
            if id_field:
                kind = kind or type(item[id_field])
                if type(item[id_field]) is not kind or kind not in (int, str):
                    raise LcoError(f"{where}: {id_field!r} must be a number or a string, the same in every line")
            yield item[id_field] if id_field else number, item, where


def main() -> int:
    """Read, embed and write chunk by chunk; the output appears when it is whole."""
    args = parse_args()
    if args.input.suffix not in (".txt", ".jsonl"):
        raise LcoError(f"--input={args.input}: the file must end in .txt or .jsonl")
    if args.output.suffix not in (".npy", ".parquet"):
        raise LcoError(f"--output={args.output}: the file must end in .npy or .parquet")
    if args.id_field and args.output.suffix == ".npy":
        raise LcoError("--id-field needs a .parquet output; an .npy has no place for ids")
    try:
        total = sum(1 for _ in read_items(args.input, args.id_field))  # every line is checked before any is embedded
    except (OSError, UnicodeDecodeError) as error:
        raise LcoError(f"--input={args.input} cannot be read: {error}") from None
    if args.output.is_dir():
        raise LcoError(f"--output={args.output} is a folder")
    if args.max_length is not None and args.max_length < 1:
        raise LcoError(f"--max-length={args.max_length}: max_length must be at least 1")
    embedder = OmniEmbedder.from_pretrained(args.model, args.adapter, args.dtype)
    try:
        args.output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LcoError(f"--output={args.output} cannot be written: {error.strerror}") from None
    aside = args.output.with_name(f".{args.output.name}.{os.getpid()}.tmp")
    items = read_items(args.input, args.id_field)
    write = _write_npy if args.output.suffix == ".npy" else _write_parquet
    try:
        with tqdm(total=total, desc="embedding", unit="input") as progress:
            write(aside, _embedded(embedder, items, args, progress), total, embedder.dimension)
        aside.replace(args.output)
    finally:
        aside.unlink(missing_ok=True)
    print(f"{total:,} vectors of {embedder.dimension}: {args.output}")
    return 0


def _embedded(
    embedder: OmniEmbedder, items: Iterator[tuple[Any, Any, str]], args: argparse.Namespace, progress: tqdm
) -> Iterator[tuple[list[Any], np.ndarray]]:
    while chunk := list(islice(items, CHUNK)):
        ids, inputs, names = zip(*chunk, strict=True)
        options = {"prompt": args.prompt, "max_length": args.max_length, "names": names}
        yield list(ids), embedder.encode(list(inputs), args.batch_size, progress=progress, **options)


def _write_npy(path: Path, chunks: Iterator[tuple[list[Any], np.ndarray]], total: int, dimension: int) -> None:
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (total, dimension)}
        np.lib.format.write_array_header_1_0(file, header)
        for _, vectors in chunks:
            file.write(vectors.astype("<f4", copy=False).tobytes())


def _write_parquet(path: Path, chunks: Iterator[tuple[list[Any], np.ndarray]], total: int, dimension: int) -> None:
    writer = None
    for ids, vectors in chunks:
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.reshape(-1)), dimension)
        table = pa.table({"id": pa.array(ids), "embedding": column})
        writer = writer or pyarrow.parquet.ParquetWriter(path, table.schema)
        writer.write_table(table)
    if writer is None:
        writer = pyarrow.parquet.ParquetWriter(
            path, pa.schema([("id", pa.int64()), ("embedding", pa.list_(pa.float32(), dimension))])
        )
    writer.close()


if __name__ == "__main__":
    run_main(main)
