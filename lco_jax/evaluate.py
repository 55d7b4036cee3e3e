"""Measure a model on a benchmark of mteb, on tasks of it, on SeaDoc, or on files of your own.

    python -m lco_jax.evaluate --model=exports/vl7b --benchmark="MIEB(lite)" --out=results/vl7b
    python -m lco_jax.evaluate --model=Qwen/Qwen2.5-Omni-3B --adapter=my/adapter --tasks=STSBenchmark,CIFAR10 --out=DIR
    python -m lco_jax.evaluate --model=exports/vl7b --seadoc=SeaDoc/ --out=DIR
    python -m lco_jax.evaluate --model=exports/vl7b --data=mine.jsonl --kind=retrieval --out=DIR

Writes OUT/results.md and results.png (published numbers beside ours), OUT/results/MODEL/REVISION/… (JSON as mteb has
it, with model_meta.json, whose experiment_kwargs tell every cap) and OUT/embeddings (a vector of every input). The same
command goes on where it was stopped: tasks that are done are not measured again, inputs that are done not embedded.
With --data: OUT/results.json and a picture.
"""

import argparse
import sys
from collections.abc import Iterable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import local_path
from lco_jax.core.shapes import keep_compiled
from lco_jax.embedder import Block, OmniEmbedder
from lco_jax.evaluation import own
from lco_jax.flags import add_corpus_flags, embedding_settings, load_embedder, media_config, workers

PART_INPUTS = 2048  # embedded between two writes: what a kill can cost
MANY = 256  # inputs for which it pays to start processes
MAX_LENGTH = 300  # tokens of a text, as the reference's evaluation cuts


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.evaluate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--benchmark", help='of mteb: "MIEB(lite)", "MAEB", "ViDoRe(v2)", "MTEB(eng, v2)", …'
    )
    what.add_argument("--tasks", help="of mteb, between commas")
    what.add_argument(
        "--seadoc",
        help="a folder with corpus/, query/ and qrels/ in parquet, or a data set of the hub",
    )
    what.add_argument("--data", type=local_path, help="your own records or folder; needs no mteb")
    parser.add_argument(
        "--out", type=local_path, required=True, help="the folder for results and vectors"
    )
    add_corpus_flags(parser, on_error="raise")
    own.add_flags(parser, "--data")
    parser.set_defaults(max_length=MAX_LENGTH, part_size=PART_INPUTS)
    return parser.parse_args()


def main() -> int:
    """Measure; 1 if a task could not be."""
    args = parse_args()
    if (args.data is None) != (args.kind is None):
        raise LcoError(f"--data and --kind go together; --kind is one of: {', '.join(own.KINDS)}")
    media = media_config(args)
    keep_compiled()
    if args.data is not None:  # files of the user's own, without mteb
        embedder = load_embedder(args, open_checkpoint(args.model), media, None)
        encode = partial(
            embedder.encode, prompt=args.prompt, max_length=args.max_length, show_progress=True
        )
        numbers = own.measure(encode, args.kind, args.data, args.out, **own.options_of(args))
        print("\n".join(f"{name:>20} {number:,.4g}" for name, number in numbers.items()))
        print(f"written: {args.out / 'results.json'} and {args.kind}.png")
        return 0
    if find_spec("mteb") is None:
        raise LcoError("benchmarks need mteb, which is not installed: pip install 'lco-jax[eval]'")
    from lco_jax.evaluation.adapter import MTEB_VERSION, Encoder, find_tasks, measure, model_meta
    from lco_jax.evaluation.cache import VectorCache
    from lco_jax.evaluation.report import write_report

    tasks, checkpoint = (
        find_tasks(args.benchmark, args.tasks, args.seadoc),
        open_checkpoint(args.model),
    )
    known, dimension = checkpoint.backbone.modalities, checkpoint.config.hidden_size
    asked = {kind for task in tasks for kind in task.metadata.modalities}
    asked |= {"audio"} if media.use_audio_in_video else set()  # a video's own
    modalities = tuple(kind for kind in known if kind in {"text", *asked})
    settings = embedding_settings(args, media, checkpoint)
    name, revision = _identity(args, settings)
    caps = {
        key.strip("-").replace("-", "_"): settings[key] for key in settings if key.startswith("--")
    }
    caps = {key: value for key, value in caps.items() if value not in (None, "") and key != "model"}
    meta = model_meta(name, revision, caps, modalities=list(known), embed_dim=dimension)

    @cache
    def embedder() -> OmniEmbedder:  # when an input has no vector yet
        return load_embedder(args, checkpoint, media, modalities)

    def encode_blocks(
        contents: Iterable[Any], progress: tqdm, names: Iterable[str]
    ) -> Iterator[Block]:
        many = progress.total >= MANY and modalities != ("text",)
        options = {"prompt": args.prompt, "max_length": args.max_length, "on_error": args.on_error}
        options |= {"workers": workers(args, many), "block_inputs": args.part_size}
        return embedder().encode_blocks(
            contents, args.batch_size, progress=progress, names=names, **options
        )

    found = []
    with VectorCache(
        args.out / "embeddings", {**settings, "--on-error": args.on_error}, dimension
    ) as vectors:
        encoder = Encoder(encode_blocks, meta, vectors, media)
        for task in (progress := tqdm(tasks, desc="tasks", unit="task")):
            progress.set_postfix_str(task.metadata.name)
            found.append(measure(encoder, task, args.out))
            empty = (
                {"skipped, with a vector of zeros": vectors.empty()}
                if args.on_error == "skip"
                else {}
            )
            write_report(
                args.out,
                name,
                args.benchmark or "tasks",
                found,
                {**caps, "mteb": MTEB_VERSION, **empty},
            )
    failed = [one for one in found if one.score is None]
    for one in failed:
        print(f"{one.task}: {one.reason}", file=sys.stderr)
    print(
        f"{encoder.embedded:,} inputs embedded, {encoder.held:,} held already by {vectors.folder}"
    )
    print(f"{len(found) - len(failed)} of {len(found)} tasks measured: {args.out / 'results.md'}")
    return 1 if failed else 0


def _identity(args: argparse.Namespace, settings: dict[str, Any]) -> tuple[str, str]:
    """Name (owner/name) and revision of what is measured: a commit of the hub, or a digest of files."""
    local = Path(args.model).expanduser().is_dir() or "/" not in args.model
    name = f"local/{Path(args.model).absolute().name}" if local else args.model
    held = [
        value.split()[-1].replace("/", "__")
        for key, value in settings.items()
        if key.startswith("what")
    ]
    return (
        name if args.adapter is None else f"{name}+{Path(args.adapter).absolute().name}",
        "-".join(held),
    )


if __name__ == "__main__":
    run_main(main)
