"""Say what a model says: answers to a file or folder of inputs, or to records whose answers are known, and scored.

    python -m lco_jax.generate --model=Qwen/Qwen2.5-VL-3B-Instruct --dtype=bfloat16 --input=photos/ --output=said.jsonl
    python -m lco_jax.generate --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=my/adapter --data=ocr.jsonl --out=ocr

--input: what `lco_jax.embed` takes. A line of the output is {"id": …, "answer": …}; without --output it is printed.
--data: records as for training, .jsonl or .parquet, or a .json that holds one source of a configuration; the anchor is
asked about, and the positive, a text, is the answer. --out then holds answers.jsonl and results.json: exact match, and
character and word error rates (docs/generate.md).

Answers are greedy. A content with a text asks for itself; any other is followed by "Describe the above image." and the
like, or everything by --prompt.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import local_path, write_json, write_text, written_aside
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.corpus import Contents, Corpus, scan
from lco_jax.data.records import answer_of, as_input
from lco_jax.data.sources import open_file
from lco_jax.embed import modalities_of
from lco_jax.evaluation.answers import score
from lco_jax.flags import add_model_flags, load_embedder, media_config, workers
from lco_jax.generator import OmniGenerator


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.generate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--input", type=local_path, help=".txt, .jsonl, .parquet or a folder of media")
    parser.add_argument(
        "--output", type=local_path, help="the .jsonl to write (default: print the answers)"
    )
    parser.add_argument(
        "--id-field", help="the key of a jsonl object, or column of a parquet, that is its id"
    )
    parser.add_argument(
        "--data", type=local_path, help="records: .jsonl, .parquet, or a source in .json"
    )
    parser.add_argument("--out", type=local_path, help="the folder to write for --data")
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="the longest answer (default: 64)"
    )
    add_model_flags(parser)
    return parser.parse_args()


def main() -> int:
    """Read every input, then answer; files appear when they are whole."""
    args = parse_args()
    if (args.input is None) == (args.data is None):
        raise LcoError("give --input, or --data and --out")
    wrong = ("output", "id_field") if args.data else ("out",)
    if given := [name for name in wrong if getattr(args, name) is not None]:
        raise LcoError(
            f"--{given[0].replace('_', '-')} goes with --{'input' if args.data else 'data'}"
        )
    if args.data and args.out is None:
        raise LcoError("--data needs --out, the folder to write")
    if args.output and (args.output.suffix != ".jsonl" or args.output.is_dir()):
        raise LcoError(f"--output={args.output}: the file must end in .jsonl")
    return _scored(args) if args.data else _said(args)


def _said(args: argparse.Namespace) -> int:
    """Answer --input."""
    corpus = Corpus(args.input, args.id_field, args.media_root)
    found = scan(corpus.items(check_media=True), media_config(args), check_media=True)
    items = list(corpus.items())
    answers = _answer(args, [item.content for item in items], [item.where for item in items], found)
    lines = _lines(
        {"id": item.id, "answer": answer} for item, answer in zip(items, answers, strict=True)
    )
    if args.output is None:
        print(lines, end="")
        return 0
    write_text(args.output, lines)
    print(f"{len(items):,} answers: {args.output}")
    return 0


def _scored(args: argparse.Namespace) -> int:
    """Answer --data and score the answers."""
    records = list(open_file(args.data, args.media_root))
    references = [answer_of(one) for one in records]
    names = [one.where for one in records]
    kinds = {kind: one.where for one in records for kind in one.modalities}
    with written_aside(args.out) as folder:
        answers = _answer(
            args,
            [as_input(one.anchor) for one in records],
            names,
            Contents(len(records), kinds, int),
        )
        scores = score(answers, references)
        rows = zip(names, answers, references, strict=True)
        lines = _lines(
            {"where": name, "answer": answer, "reference": wanted} for name, answer, wanted in rows
        )
        write_text(folder / "answers.jsonl", lines)
        facts = {
            name: str(x) if isinstance(x, Path) else x
            for name, x in vars(args).items()
            if x is not None
        }
        write_json(folder / "results.json", {**scores, "flags": facts})
    print("| score | |\n|---|---|")
    for name, value in scores.items():
        print(f"| {name} | {value:,} |" if name == "records" else f"| {name} | {value:.4f} |")
    print(f"{args.out / 'results.json'} holds them, answers.jsonl beside it what was said")
    return 0


def _answer(
    args: argparse.Namespace, contents: Sequence[Any], names: Sequence[str], found: Contents
) -> list[str]:
    """What the model says after each content."""
    media, checkpoint = media_config(args), open_checkpoint(args.model)
    keep_compiled()
    model = load_embedder(
        args, checkpoint, media, modalities_of(checkpoint, found, media, strict=True), OmniGenerator
    )
    options = {"batch_size": args.batch_size, "max_length": args.max_length, "names": names}
    options |= {} if args.prompt is None else {"prompt": args.prompt}
    with tqdm(total=len(contents), desc="answering", unit="input") as progress:
        options |= {"workers": workers(args, found.has_media), "progress": progress}
        return model.generate(contents, args.max_new_tokens, **options)


def _lines(rows: Any) -> str:
    """A line of JSON each."""
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    run_main(main)
