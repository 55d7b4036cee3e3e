"""Answer a file or folder of inputs, or answer records whose answers are known, and score.

    python -m lco_jax.generate --model=Qwen/Qwen2.5-VL-3B-Instruct --dtype=bfloat16 \\
        --input=photos/ --output=answers.jsonl
    python -m lco_jax.generate --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=my/adapter \\
        --score --input=ocr.jsonl --output=ocr

--input is what `lco_jax.embed` takes. A line of --output is {"id": …, "answer": …}; without
--output, answers are printed.
With --score, --input has records as for training: .jsonl or .parquet, or a .json with one source of
a configuration. The anchor is the question and the positive, a text, is the answer. --output is
then a folder for answers.jsonl and results.json, which has exact match, and character and word
error rates (docs/generate.md).

Answers are greedy. A content with a text is its own question; any other is followed by --prompt, or
by "Describe the above image." and the like.
"""

import argparse
import json
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.console import progress_bar, say, say_all
from lco_jax.core.errors import DONE, LcoError, run_main
from lco_jax.core.files import write_json, write_text, written_aside
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.corpus import Contents, Corpus, scan
from lco_jax.data.folder import rest_in_words
from lco_jax.data.records import Record, answer_of, as_input
from lco_jax.data.skipped import skipped_in_words, write_skipped
from lco_jax.data.sources import open_file
from lco_jax.embed import modalities_of
from lco_jax.evaluation.answers import score
from lco_jax.flags import (
    add_model_flags,
    add_on_error,
    add_path,
    load_embedder,
    media_config,
    new_parser,
    workers,
)
from lco_jax.generator import OmniGenerator

logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("generate", __doc__)
    add_path(parser, "--input", "inputs, or records for --score", required=False)
    parser.add_argument("--data", type=Path, help=argparse.SUPPRESS)
    add_path(
        parser,
        "--output",
        "the .jsonl to write (default: print the answers); the folder to write for --score",
        earlier=["--out"],
        required=False,
    )
    parser.add_argument(
        "--score", action="store_true", help="compare answers with those of --input"
    )
    parser.add_argument(
        "--id-field", help="the key of a jsonl object, or column of a parquet, that is its id"
    )
    parser.add_argument(
        "--max-new-tokens", type=int, default=64, help="the longest answer (default: 64)"
    )
    add_on_error(parser, "raise")
    add_model_flags(parser)
    return parser


def parse_args() -> argparse.Namespace:
    """The flags. The earlier --data means --score --input."""
    args = make_parser().parse_args()
    if args.data is not None:
        if args.input is not None:
            raise LcoError("--data is short for --score --input; give one of them")
        args.input = args.data
        args.score = True
    del args.data
    _check_paths(args)
    return args


def _check_paths(args: argparse.Namespace) -> None:
    if args.input is None:
        raise LcoError("give --input: a file or folder of inputs, or records for --score")
    if not args.score:
        output = args.output
        if output and (output.suffix != ".jsonl" or output.is_dir()):
            raise LcoError(f"--output={output}: the file must end in .jsonl")
    elif args.output is None:
        raise LcoError("--score needs --output, the folder to write")
    elif args.id_field is not None:
        raise LcoError("--id-field does not go with --score; records have no ids")


def main() -> int:
    """Check every input, then answer; files appear when they are complete."""
    args = parse_args()
    if args.score:
        answer_and_score(args)
    else:
        answer(args)
    return DONE


def answer(args: argparse.Namespace) -> None:
    """Answer the inputs; print the answers, or write them."""
    strict = args.on_error == "raise"
    corpus = Corpus(args.input, args.id_field, args.media_root, keeps_bad=not strict)
    found = scan(corpus.items(strict), media_config(args), strict)
    items = list(corpus.items())
    contents = [item.content for item in items]
    answers, skipped = _generate(args, contents, [item.where for item in items], found)
    ids = [item.id for item in items]
    pairs = zip(ids, answers, strict=True)
    lines = _json_lines({"id": name, "answer": answer} for name, answer in pairs)
    if args.output is None:
        print(lines, end="")
        if skipped:  # warnings have said which, and why
            say(f"{len(skipped):,} of {len(items):,} were skipped", aside=True)
    else:
        _write_answers(args.output, lines, _rows(skipped, ids))
        _print_written(args.output, len(items), len(skipped))
    if corpus.listing and corpus.listing.left_out:
        say(rest_in_words(corpus.listing.left_out), aside=args.output is None)


def _print_written(file: Path, inputs: int, skipped: int) -> None:
    """How many answers a file has, and how many inputs have none."""
    say(f"{inputs:,} answers: {file}")
    if skipped:
        say(skipped_in_words(file, skipped))


def _write_answers(file: Path, lines: str, skipped: list[dict[str, Any]]) -> None:
    """The answers, and beside them the list of what was skipped."""
    write_text(file, lines)
    write_skipped(file, skipped)


def _rows(skipped: Mapping[int, str], ids: Sequence[Any]) -> list[dict[str, Any]]:
    """What the list of skipped inputs has of each."""
    return [{"index": i, "id": ids[i], "reason": why} for i, why in sorted(skipped.items())]


def answer_and_score(args: argparse.Namespace) -> None:
    """Answer the records' anchors, compare with their positives, and write and print scores."""
    records, references, malformed = _records(args)
    names = [record.where for record in records]
    contents = [as_input(record.anchor) for record in records]
    kinds = {kind: record.where for record in records for kind in record.modalities}
    with written_aside(args.output) as folder:
        answers, skipped = _generate(args, contents, names, Contents(len(records), kinds, int))
        if len(skipped) == len(records):
            raise LcoError(f"--input={args.input} holds no record that could be answered")
        scores = _score(answers, references)
        if skipped or malformed:
            scores["skipped"] = len(skipped) + malformed
        rows = zip(names, answers, references, strict=True)
        lines = _json_lines(
            {"where": name, "answer": answer, "reference": reference}
            for name, answer, reference in rows
        )
        _write_answers(folder / "answers.jsonl", lines, _rows(skipped, names))
        write_json(folder / "results.json", {**scores, "flags": _flags(args)})
    _print_scores(scores)
    say(f"scores: {args.output / 'results.json'}; answers: answers.jsonl beside it")
    if skipped:
        say(skipped_in_words(args.output / "answers.jsonl", len(skipped)))


def _score(answers: Sequence[str | None], references: Sequence[str]) -> dict[str, float]:
    """The scores of the answers that are there; None is one of a skipped record."""
    pairs = zip(answers, references, strict=True)
    answered = [(answer, reference) for answer, reference in pairs if answer is not None]
    return score(*map(list, zip(*answered, strict=True)))


def _records(args: argparse.Namespace) -> tuple[list[Record], list[str], int]:
    """(the records, the answers that they have, how many malformed ones are skipped).

    Those without an answer are malformed, too.
    """
    strict = args.on_error == "raise"
    source = open_file(args.input, args.media_root, "error" if strict else "skip")
    malformed = source.skipped
    records, references = [], []
    for i in range(len(source)):
        try:
            references.append(answer_of(source[i]))
            records.append(source[i])
        except LcoError as error:
            if strict:
                raise
            logger.warning("skipped: %s", error)
            malformed += 1
    if not records:
        raise LcoError(f"--input={args.input} holds no record that could be answered")
    return records, references, malformed


def _print_scores(scores: Mapping[str, float]) -> None:
    lines = ["| score | |", "|---|---|"]
    for name, value in scores.items():
        shown = f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
        lines.append(f"| {name} | {shown} |")
    say_all(lines, scores)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags that were given, for JSON."""
    return {
        name: str(value) if isinstance(value, Path) else value
        for name, value in vars(args).items()
        if value is not None
    }


def _generate(
    args: argparse.Namespace, contents: Sequence[Any], names: Sequence[str], found: Contents
) -> tuple[list[Any], dict[int, str]]:
    """(the model's answer to each content, None of a skipped one; index -> why it is.)"""
    media = media_config(args)
    checkpoint = open_checkpoint(args.model)
    keep_compiled()
    modalities = modalities_of(checkpoint, found, media, args.on_error == "raise")
    model = load_embedder(args, checkpoint, media, modalities, OmniGenerator)
    prompt = {} if args.prompt is None else {"prompt": args.prompt}
    with progress_bar(total=len(contents), desc="answering", unit="input") as progress:
        answers = model.generate(
            contents,
            args.max_new_tokens,
            batch_size=args.batch_size,
            max_length=args.max_length,
            names=names,
            workers=workers(args, found.has_media),
            progress=progress,
            on_error=args.on_error,
            **prompt,
        )
    return answers, dict(model.skipped)


def _json_lines(rows: Iterable[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


if __name__ == "__main__":
    run_main(main)
