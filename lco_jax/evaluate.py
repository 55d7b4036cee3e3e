"""Evaluate a model on a benchmark of mteb, on its tasks, on SeaDoc, or on your own files.

    python -m lco_jax.evaluate --model=exports/vl7b --benchmark="MIEB(lite)" --output=results/vl7b
    python -m lco_jax.evaluate --model=Qwen/Qwen2.5-Omni-3B --adapter=my/adapter \\
        --tasks=STSBenchmark,CIFAR10 --output=DIR
    python -m lco_jax.evaluate --model=exports/vl7b --seadoc=SeaDoc/ --output=DIR
    python -m lco_jax.evaluate --model=exports/vl7b --input=mine.jsonl --kind=retrieval --output=DIR
    python -m lco_jax.evaluate --model=builtin:smollm2 --input=builtin:stsb-test --kind=sts \\
        --output=DIR

Writes OUTPUT/results.md and results.png (published numbers beside ours), OUTPUT/results/MODEL/
REVISION/… (mteb's own JSON, with model_meta.json, whose experiment_kwargs name every cap) and
OUTPUT/embeddings (a vector of every input). After a kill the same command goes on: it repeats no
task and embeds no input a second time. With --input it writes OUTPUT/results.json and a picture;
with --small-vectors, too, a table of the scores of shorter vectors in fewer bits.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from hashlib import blake2b
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lco_jax.calibration import add_size_flags, dimension_of
from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.checkpoint.usage import usage_of
from lco_jax.core.console import progress_bar, say, say_all
from lco_jax.core.errors import DONE, FAILED, LcoError, run_main
from lco_jax.core.extras import install_line
from lco_jax.core.files import read_json
from lco_jax.core.shapes import keep_compiled
from lco_jax.core.small_vectors import shortened
from lco_jax.data.inference import EmbeddedBlock
from lco_jax.data.instructions import IN_WORDS
from lco_jax.data.media import MediaConfig
from lco_jax.data.prompts import Prompt, summed_up
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.left_out import LeftOut
from lco_jax.evaluation.local_tasks import KINDS, add_flags, evaluate_and_write, options_of
from lco_jax.evaluation.vector_sizes import KINDS as SMALL_KINDS
from lco_jax.evaluation.vector_sizes import as_json, compare_and_write, table
from lco_jax.files_encoder import FilesEncoder
from lco_jax.flags import (
    add_corpus_flags,
    add_path,
    embedding_settings,
    load_embedder,
    media_config,
    new_parser,
    say_prompts,
    workers,
)

PART_INPUTS = 2048  # inputs that are embedded between two writes: what a kill can cost
MANY = 256  # from so many inputs on, it pays to start processes that prepare media
MAX_LENGTH = 300  # tokens of a text, as in the reference's evaluation
logger = logging.getLogger(__name__)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("evaluate", __doc__)
    parser.add_argument(
        "--benchmark",
        help='of mteb: "MIEB(lite)", "MAEB", "ViDoRe(v2)", "MTEB(eng, v2)", …',
    )
    parser.add_argument("--tasks", help="of mteb, between commas")
    parser.add_argument(
        "--seadoc",
        help="a folder with corpus/, query/ and qrels/ in parquet, or a hub data set",
    )
    files = "your own records or folder, or builtin:stsb-dev or -test; needs no mteb"
    add_path(parser, "--input", files, earlier=["--data"], required=False)
    add_path(parser, "--output", "the folder for results and vectors", earlier=["--out"])
    add_corpus_flags(parser, on_error="raise", part_size=PART_INPUTS, max_length=MAX_LENGTH)
    prompts = "a .json of prompts for mteb's tasks: {TASK or TYPE or TASK-query or document: text}"
    add_path(parser, "--prompts", prompts, required=False)
    add_flags(parser, "--input")
    add_size_flags(parser)
    parser.add_argument(
        "--small-vectors",
        action="store_true",
        help="of retrieval and sts: scores at all, 1/2 … 1/16 of the numbers, in float32, float16, "
        "int8 and binary, with and without re-ranking, as one table",
    )
    return parser


def main() -> int:
    """Evaluate; `FAILED` if a task could not be measured."""
    args = make_parser().parse_args()
    given = [args.benchmark, args.tasks, args.seadoc, args.input]
    if given.count(None) != len(given) - 1:
        raise LcoError("give one of --benchmark, --tasks, --seadoc and --input")
    if (args.input is None) != (args.kind is None):
        raise LcoError(f"--input and --kind go together; --kind is one of: {', '.join(KINDS)}")
    _check_sizes(args)
    if args.prompts is not None and args.input is not None:
        raise LcoError("--prompts goes with --benchmark, --tasks and --seadoc")
    media = media_config(args)
    keep_compiled()
    if args.input is None:
        return evaluate_tasks(args, media)
    evaluate_files(args, media)
    return DONE


def _check_sizes(args: argparse.Namespace) -> None:
    """Raise for flags of the size of vectors that do not go together."""
    if args.input is None and (args.precision or args.small_vectors):
        raise LcoError("--precision and --small-vectors go with --input")
    if args.small_vectors and (args.precision or args.truncate_dim):
        raise LcoError("--small-vectors has every size; leave out --precision and --truncate-dim")
    if args.small_vectors and args.kind not in SMALL_KINDS:
        raise LcoError(f"--small-vectors goes with --kind={' or '.join(SMALL_KINDS)}")


def evaluate_files(args: argparse.Namespace, media: MediaConfig) -> None:
    """The user's own files, without mteb."""
    options = options_of(args)
    left_out = LeftOut(skips=args.on_error == "skip")
    encoder = FilesEncoder(args, media, left_out)
    if args.kind == "retrieval":
        options["encode_sides"] = encoder.encode_sides
    model = " + ".join(filter(None, [args.model, args.adapter]))
    what = (encoder.encode, args.kind, args.input, args.output, left_out, model)
    if args.small_vectors:
        rows = compare_and_write(*what, **options)
        say_all(table(args.kind, rows), {"rows": [as_json(row) for row in rows]})
        results, others = args.output / "small_vectors.json", "small_vectors.md and .png"
    else:
        about = {"truncate_dim": args.truncate_dim, "precision": args.precision}
        numbers = evaluate_and_write(*what, _given(about), **options)
        say_all([f"{name:>20} {number:,.4g}" for name, number in numbers.items()], numbers)
        results, others = args.output / "results.json", f"{args.kind}.png"
    say(f"written: {results} and {others}")
    for line in left_out.in_words(results):
        say(line)


def _given(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those that have a value."""
    return {name: value for name, value in flags.items() if value is not None}


def evaluate_tasks(args: argparse.Namespace, media: MediaConfig) -> int:
    """mteb's tasks, and SeaDoc; `FAILED` if one could not be measured."""
    if find_spec("mteb") is None:
        needs = "benchmarks need mteb, which is not installed"
        raise LcoError(f"{needs}: {install_line('eval')}")
    from lco_jax.evaluation.adapter import Encoder, find_tasks, model_meta
    from lco_jax.evaluation.stored_vectors import StoredVectors

    tasks = find_tasks(args.benchmark, args.tasks, args.seadoc)
    checkpoint = open_checkpoint(args.model)
    settings = _settings(args, checkpoint, media)
    caps = _caps(settings)
    sizes = {
        "modalities": list(checkpoint.backbone.modalities),
        "embed_dim": dimension_of(args, checkpoint),
    }
    meta = model_meta(_name(args), _revision(settings), caps, **sizes)
    prompts = _prompts(args, checkpoint)
    modalities = _modalities(tasks, checkpoint, media)
    encode_blocks = _lazy_encoder(args, checkpoint, media, modalities)
    what_made_them = {**settings, "--on-error": args.on_error}
    stored = StoredVectors(args.output / "embeddings", what_made_them)
    encoder = Encoder(encode_blocks, meta, stored, media, prompts)
    failed = _run_tasks(tasks, encoder, args, caps)
    say(
        f"{encoder.embedded:,} inputs embedded, {encoder.found:,} found in {stored.folder}\n"
        f"{len(tasks) - failed} of {len(tasks)} tasks measured: {args.output / 'results.md'}"
    )
    stored.close()
    return FAILED if failed else DONE


def _settings(
    args: argparse.Namespace, checkpoint: Checkpoint, media: MediaConfig
) -> dict[str, Any]:
    """Flag -> value of all that the vectors of mteb's tasks depend on."""
    settings = embedding_settings(args, media, checkpoint) | _given_prompts(args)
    return settings | _given({"--truncate-dim": args.truncate_dim})


def _run_tasks(
    tasks: list[Any],
    encoder: Any,
    args: argparse.Namespace,
    caps: Mapping[str, Any],
) -> int:
    """Run each task, and write the report after each -> how many failed."""
    from lco_jax.evaluation.adapter import MTEB_VERSION, run_task
    from lco_jax.evaluation.report import write_report

    benchmark = args.benchmark or "tasks"
    notes = {**caps, "mteb": MTEB_VERSION}
    found = []
    progress = progress_bar(tasks, desc="tasks", unit="task")
    for task in progress:
        progress.set_postfix_str(task.metadata.name)
        found.append(run_task(encoder, task, args.output))
        if args.on_error == "skip":
            notes["skipped, with a vector of zeros"] = encoder.stored.zeros()
        write_report(args.output, _name(args), benchmark, found, notes)
    failed = [one for one in found if one.score is None]
    for one in failed:
        logger.error("%s: %s", one.task, one.reason)
    return len(failed)


def _lazy_encoder(
    args: argparse.Namespace,
    checkpoint: Checkpoint,
    media: MediaConfig,
    modalities: tuple[str, ...],
) -> Callable[..., Iterator[EmbeddedBlock]]:
    """`OmniEmbedder.encode_blocks` with the flags' options; the first call loads the model."""
    dimension = dimension_of(args, checkpoint)

    @cache
    def embedder() -> OmniEmbedder:
        return load_embedder(args, checkpoint, media, modalities)

    def encode_blocks(
        contents: Iterable[Any],
        progress: tqdm,
        names: Iterable[str],
        prompt: str | None = None,
    ) -> Iterator[EmbeddedBlock]:
        many_media = progress.total >= MANY and modalities != ("text",)
        blocks = embedder().encode_blocks(
            contents,
            args.batch_size,
            prompt=_prompt_of(args, prompt),
            prompt_name=args.prompt_name,
            max_length=args.max_length,
            on_error=args.on_error,
            workers=workers(args, many_media),
            block_inputs=args.part_size,
            progress=progress,
            names=names,
        )
        for block in blocks:
            block.vectors = shortened(block.vectors, dimension)
            yield block

    return encode_blocks


def _prompts(args: argparse.Namespace, checkpoint: Checkpoint) -> dict[str, str]:
    """Name -> text of the prompts by task and by query and document; {} where a flag gives one for
    all.
    """
    if args.prompt is not None or args.prompt_name is not None:
        say_prompts(args, checkpoint, queries=False)
        return {}
    instructions = usage_of(checkpoint, args.adapter).instructions
    prompts = {**instructions.prompts, **_read_prompts(args.prompts)}
    place = IN_WORDS[args.prompt_place or instructions.place]
    for name, text in prompts.items():
        if text:
            say(f"{name}: the instruction of inputs is {text!r} ({place})", aside=True)
    return prompts


def _read_prompts(file: Path | None) -> dict[str, str]:
    """The content of --prompts."""
    prompts = {} if file is None else read_json(file)
    for name, text in prompts.items():
        if not isinstance(text, str):
            raise LcoError(f"--prompts={file}: {name} is {text!r:.60}, and must be a text")
    return prompts


def _given_prompts(args: argparse.Namespace) -> dict[str, Any]:
    """Flag -> what --prompts holds, for what vectors depend on."""
    if args.prompts is None:
        return {}
    prompts = sorted(_read_prompts(args.prompts).items())
    return {"--prompts": blake2b(repr(prompts).encode(), digest_size=8).hexdigest()}


def _prompt_of(args: argparse.Namespace, prompt: str | None) -> Prompt | None:
    """The prompt of an input, of which mteb's name says this: "" is the reference's alone."""
    if args.prompt is not None:
        return args.prompt
    return summed_up if prompt == "" else prompt


def _modalities(tasks: list[Any], checkpoint: Checkpoint, media: MediaConfig) -> tuple[str, ...]:
    """What the tasks hold and the checkpoint takes."""
    asked = {"text"}
    for task in tasks:
        asked |= set(task.metadata.modalities)
    if media.use_audio_in_video:
        asked.add("audio")
    return tuple(kind for kind in checkpoint.backbone.modalities if kind in asked)


def _name(args: argparse.Namespace) -> str:
    """The model's name in results: owner/name, and the adapter's name."""
    local = Path(args.model).expanduser().is_dir() or "/" not in args.model
    name = f"local/{Path(args.model).absolute().name}" if local else args.model
    return name if args.adapter is None else f"{name}+{Path(args.adapter).absolute().name}"


def _revision(settings: Mapping[str, Any]) -> str:
    """The commits of the hub, or the digests of the files, of the model and its adapter."""
    # of the keys "what --model holds" and "what --adapter holds"
    files = [value for key, value in settings.items() if key.startswith("what")]
    return "-".join(value.split()[-1].replace("/", "__") for value in files)


def _caps(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The flags that were set, but for the model, named as mteb names options."""
    caps = {}
    for flag, value in settings.items():
        if flag.startswith("--") and flag != "--model" and value not in (None, ""):
            caps[flag.strip("-").replace("-", "_")] = value
    return caps


if __name__ == "__main__":
    run_main(main)
