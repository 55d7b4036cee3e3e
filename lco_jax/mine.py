"""Find hard negatives of training records with a model.

    python -m lco_jax.mine --input=pairs.jsonl --model=runs/first/merged --output=mined.jsonl
    python -m lco_jax.mine --input=hf://datasets/OWNER/NAME/data/train-*.parquet --ray \\
        --model=Qwen/Qwen2.5-Omni-3B --adapter=runs/first/adapter --dtype=bfloat16 \\
        --negatives=7 --output=mined.jsonl
    python -m lco_jax.train --config=qwen2_5_omni_3b --data=mined.jsonl

Every content of the records is embedded once. Candidates are all positives and negatives, each
content once, of any modality; or, with --corpus, what that holds. An anchor's negatives are its
nearest candidates, without itself, without what any record joins with it, and without what the
rules drop:
  --skip-top=S    the S nearest
  --max-ratio=R   what scores R times the positive's score or more (0.95, NV-Retriever's rule,
                  unless --margin is given; "off" for none)
  --margin=M      what scores more than the positive's score less M
A score is the cosine of two vectors. Equal are the same texts, and media whose files hold the same
bytes.

Output: a .jsonl of the same records, in their order, with "negatives", which may be fewer than
asked for; paths below its folder start there, others are absolute. <output>.report.json and .png
say what was found and dropped. The vectors stay in <output>.vectors (or --vectors): the same
records mined again by other rules embed nothing. After a kill the same command goes on.
"""

import argparse
import os
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import filelock
import numpy as np

from lco_jax import embed
from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.checkpoint.usage import usage_of
from lco_jax.core.console import progress_bar, say, say_all
from lco_jax.core.errors import DONE, LcoError, explained, run_main
from lco_jax.core.files import expanded, on_bucket
from lco_jax.core.locks import LOCK, acquire
from lco_jax.core.shapes import keep_compiled
from lco_jax.data.corpus import Corpus
from lco_jax.data.given import in_assets, sources_of
from lco_jax.data.guide_files import CONTENTS, VECTORS
from lco_jax.data.lines import files_of
from lco_jax.data.records import Record
from lco_jax.data.scan import Source
from lco_jax.data.sources import jsonl_files, open_source
from lco_jax.flags import (
    add_corpus_flags,
    add_path,
    add_ray_flags,
    check_least,
    check_prompt_name,
    check_ray,
    embedding_settings,
    flag_of,
    media_config,
    new_parser,
)
from lco_jax.mining.contents import Lines, Numbers, number_contents
from lco_jax.mining.miner import LineForm, Miner
from lco_jax.mining.nearest import ANCHORS
from lco_jax.mining.output import MinedLines, check_ours
from lco_jax.mining.report import Report
from lco_jax.mining.rules import Rules
from lco_jax.sentence_methods import all_prompts, document_name, query_name

MAX_RATIO = 0.95


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("mine", __doc__)
    records = "records, as --data of lco train takes them: files, folders, hf://…, tfds:…"
    parser.add_argument("--input", required=True, help=records)
    add_path(parser, "--output", "the .jsonl of records with negatives")
    corpus = "what may become a negative: a .txt, .jsonl or .parquet, or a folder of media"
    add_path(parser, "--corpus", corpus, required=False)
    vectors = "a folder for vectors, which may be used again (default: <output>.vectors)"
    add_path(parser, "--vectors", vectors, required=False)
    _add_rules(parser)
    add_ray_flags(parser)
    add_corpus_flags(parser, on_error="raise")
    return parser


def _add_rules(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("which candidates become negatives")
    group.add_argument("--negatives", type=int, default=1, help="of a record (default: 1)")
    group.add_argument(
        "--range",
        type=int,
        default=100,
        help="how many of the nearest are looked at (default: 100)",
    )
    group.add_argument("--skip-top", type=int, default=0, help="the nearest to drop (default: 0)")
    group.add_argument("--max-ratio", help="of the positive's score, or off")
    group.add_argument("--margin", type=float, help="below the positive's score")
    group.add_argument(
        "--sample", action="store_true", help="draw among those left; by default the nearest"
    )
    group.add_argument("--seed", type=int, default=0, help="of --sample (default: 0)")
    group.add_argument(
        "--keep-given", action="store_true", help="a record's own negatives stay, before the mined"
    )
    group.add_argument(
        "--scores", action="store_true", help="write the model's scores, as teacher_scores"
    )


def main() -> int:
    """Embed what is not embedded yet, then search and write."""
    args = make_parser().parse_args()
    signal.signal(signal.SIGTERM, embed.leave_in_order)
    check_ray(args)
    rules = _rules(args)
    media = media_config(args)
    _check_output(args)
    checkpoint = open_checkpoint(args.model)
    check_prompt_name(args, checkpoint)
    _check_prompts(args, checkpoint)
    keep_compiled()
    settings = embedding_settings(args, media, checkpoint)
    with _held_vectors(args):
        _mine_all(args, rules, settings)
    return DONE


def _mine_all(args: argparse.Namespace, rules: Rules, settings: Mapping[str, Any]) -> None:
    """Do what is not done yet of the whole work. settings: what the vectors depend on."""
    numbers = _numbers(args)
    with MinedLines(args.output, _work(args, settings, numbers, rules)) as lines:
        if found := lines.finished():
            say(f"{args.output} is complete: this very command has written it")
            say(f"what was found: {lines.record}", found)
            return
        vectors = _vectors(args)
        report = _mine(args, numbers, vectors, rules, lines)
        _finish(args, report, numbers, rules, lines)


def _rules(args: argparse.Namespace) -> Rules:
    """What the flags say of candidates. Raises for what cannot be."""
    check_least(args, {"negatives": 1, "range": 1, "skip_top": 0, "seed": 0})
    ratio = None if args.margin is not None else MAX_RATIO
    if args.max_ratio is not None:
        with explained(f"--max-ratio={args.max_ratio}: give a number, or off", ValueError):
            ratio = None if args.max_ratio == "off" else float(args.max_ratio)
    if ratio is not None and not 0 < ratio <= 1:
        raise LcoError(f"--max-ratio={ratio}: it must be above 0 and at most 1, or off")
    if args.margin is not None and not -2 <= args.margin <= 2:
        raise LcoError(f"--margin={args.margin}: it must be from -2 to 2, as cosines differ")
    if args.range < args.skip_top + args.negatives:
        needs = "it must be at least --skip-top and --negatives together"
        raise LcoError(f"--range={args.range}: {needs}, {args.skip_top + args.negatives}")
    return Rules(
        args.negatives, args.range, args.skip_top, ratio, args.margin, args.sample, args.seed
    )


def _check_output(args: argparse.Namespace) -> None:
    """Raise for an output that cannot be, or that would replace what is not ours."""
    if args.output.suffix != ".jsonl" or args.output.is_dir():
        raise LcoError(f"--output={args.output}: give a file that ends in .jsonl")
    if args.output.exists():
        for flag, file in _files_read(args):
            if file.exists() and os.path.samefile(file, args.output):
                what = f"is a file of {flag}, which is not to be replaced"
                raise LcoError(f"--output={args.output} {what}; give another --output")
    check_ours(args.output)


def _files_read(args: argparse.Namespace) -> Iterator[tuple[str, Path]]:
    """Each file of lines that is read, with the flag that names it."""
    for spec in sources_of(args.input, "--input").values():
        path = spec.get("path")  # whoever opens the source says what is wrong with it
        if spec["kind"] == "jsonl" and isinstance(path, str) and not on_bucket(path):
            for file in jsonl_files(expanded(in_assets(path))):
                yield f"--input={args.input}", file
    if args.corpus is not None and not args.corpus.is_dir():
        for file in files_of(args.corpus):
            yield f"--corpus={args.corpus}", file


def _check_prompts(args: argparse.Namespace, checkpoint: Checkpoint) -> None:
    """Raise for a model that takes queries and documents by different prompts.

    Every content is embedded once, and may be an anchor here and a positive there.
    """
    if args.prompt is not None or args.prompt_name is not None:
        return
    instructions = usage_of(checkpoint, args.adapter).instructions
    prompts = all_prompts(instructions)
    names = query_name(prompts), document_name(prompts)
    query, document = (prompts.get(name or instructions.default or "", "") for name in names)
    if query != document:
        differ = f"has the prompt {query!r} for queries and {document!r} for documents"
        once = "every content is embedded once, as an anchor and as a candidate"
        give = "give --prompt-name=NAME to use one prompt for all"
        raise LcoError(f"--model={args.model} {differ}, and {once}; {give}")


@contextmanager
def _held_vectors(args: argparse.Namespace) -> Iterator[None]:
    """The folder of vectors, which is made, and where no other process works meanwhile."""
    if args.vectors is None:
        args.vectors = args.output.with_name(f"{args.output.name}.vectors")
    lock = filelock.FileLock(args.vectors / LOCK)
    with explained(f"--vectors={args.vectors} cannot be written", OSError):
        args.vectors.mkdir(parents=True, exist_ok=True)
        advice = "wait for it, end it, or give another --vectors"
        acquire(lock, f"another process works in --vectors={args.vectors}; {advice}")
    try:
        yield
    finally:
        lock.release()


# ---- the contents, and their vectors


def _numbers(args: argparse.Namespace) -> Numbers:
    """Read the records and the corpus, and write what is embedded of them."""
    records = _records(args)
    corpus = None
    if args.corpus is not None:
        skips = args.on_error == "skip"
        corpus = Corpus(args.corpus, root=args.media_root, flag="--corpus", keeps_bad=skips)
    items = None if corpus is None else corpus.items(check_media=args.on_error == "raise")
    with progress_bar(records, desc="reading", unit="record", leave=False, delay=2) as bar:
        return number_contents(bar, items, args.vectors / CONTENTS, f"--corpus={args.corpus}")


def _records(args: argparse.Namespace) -> "_Records":
    """All records of --input."""
    specs = sources_of(args.input, "--input")
    if args.media_root is not None:
        root = str(args.media_root)
        specs = {name: {**spec, "media_root": root} for name, spec in specs.items()}
    on_bad = "skip" if args.on_error == "skip" else "error"
    return _Records([open_source(name, spec, on_bad, "--input") for name, spec in specs.items()])


class _Records:
    """The records of several sources, one after another."""

    def __init__(self, sources: Sequence[Source]):
        self.sources = sources

    def __len__(self) -> int:
        return sum(map(len, self.sources))

    def __iter__(self) -> Iterator[Record]:
        for source in self.sources:
            yield from source


def _vectors(args: argparse.Namespace) -> np.ndarray:
    """The vectors of all contents, [T, D], on the disk: what `lco embed` makes of them."""
    path = args.vectors / CONTENTS
    target = args.vectors / VECTORS
    flags = [f"--model={args.model}", f"--input={path}", f"--output={target}"]
    embedded = embed.make_parser().parse_args(flags)
    for name in vars(embedded).keys() & vars(args).keys() - {"input", "output"}:
        setattr(embedded, name, getattr(args, name))
    try:
        embed.embed(embedded, "--vectors")
    except LcoError as error:
        raise LcoError(_with_origin(str(error), args, path)) from error
    return np.load(target, mmap_mode="r")


def _with_origin(message: str, args: argparse.Namespace, path: Path) -> str:
    """An error of embedding; where it names a line of the contents, with the record of that."""
    found = re.search(rf"{re.escape(str(path))}:(\d+)", message)
    if found is None:
        return message
    with closing(Lines(path)) as contents:
        content = contents[int(found[1]) - 1]
    for record in _records(args):
        if content in record.sides:
            return message.replace(found[0], record.where, 1)
    return message


# ---- the search


def _work(
    args: argparse.Namespace, settings: Mapping[str, Any], numbers: Numbers, rules: Rules
) -> dict[str, Any]:
    """Flag -> value of all that the lines depend on. settings: what the vectors depend on."""
    return {
        "--input": args.input,
        "what --input and --corpus hold": numbers.digest,
        "--on-error": args.on_error,
        "--keep-given": args.keep_given,
        "--scores": args.scores,
        **{flag_of(name): value for name, value in vars(rules).items()},
        **settings,
    }


def _mine(
    args: argparse.Namespace, numbers: Numbers, vectors: np.ndarray, rules: Rules, lines: MinedLines
) -> Report:
    """Write the lines that are not written."""
    form = LineForm(str(args.output.absolute().parent), args.keep_given, args.scores)
    contents = Lines(args.vectors / CONTENTS)
    miner = Miner(numbers, vectors, contents, rules, form)
    report, total = Report(lines.found), len(numbers.anchors)
    bar = progress_bar(total=total, initial=lines.done, desc="mining", unit="record")
    with bar, _what_is_kept(lines, total):
        for first in range(lines.done, total, ANCHORS):
            end = min(first + ANCHORS, total)
            some = list(miner.lines(first, end, report))
            lines.add(some, end, report.state)
            bar.update(end - first)
    contents.close()
    return report


@contextmanager
def _what_is_kept(lines: MinedLines, total: int) -> Iterator[None]:
    """Whatever ends the work within, a line says what the same command need not do again."""
    try:
        yield
    except (LcoError, KeyboardInterrupt, SystemExit):
        kept = f"{lines.done:,} of {total:,} records are kept in {lines.folder}"
        say(f"{kept}; the same command goes on from there", aside=True)
        raise


def _finish(
    args: argparse.Namespace, report: Report, numbers: Numbers, rules: Rules, lines: MinedLines
) -> None:
    """Put the output in its place, with its report, and say what was found."""
    model = " + ".join(filter(None, [args.model, args.adapter]))
    report.draw(lines.picture, f"{model}, {args.input}")
    candidates = len(numbers.candidates)
    found = {"contents": numbers.total, "candidates": candidates, **report.as_json()}
    lines.finish(found)
    say_all(report.table(candidates, rules), found)
    say(f"written: {args.output}, {lines.record.name} and {lines.picture.name}")


if __name__ == "__main__":
    run_main(main)
