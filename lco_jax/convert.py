"""Training runs and adapters → merged models; several adapters or models → their average.

    python -m lco_jax.convert --input=runs/base --output=exports/base
    python -m lco_jax.convert --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=A --output=merged
    python -m lco_jax.convert soup --model=BASE --adapters A B C --weights 2 1 1 --output=soup
    python -m lco_jax.convert soup --model=BASE --adapters A B C --rank=64 --merge --output=soup
    python -m lco_jax.convert soup --model=BASE --adapters A B C --greedy --validate=dev.csv \\
        --kind=sts --output=soup
    python -m lco_jax.convert soup --models M1 M2 --output=averaged
    python -m lco_jax.convert --input=runs/vl7b --push=owner/name --private

Writes a merged model in the hub's layout to OUTPUT and, of a run, its PEFT adapter to
OUTPUT-adapter. A soup of adapters is an adapter with a soup.json (and OUTPUT-merged); a soup of
models is a model. Each file is read back and compared when it is written.

--push uploads to the Hugging Face hub what OUTPUT holds. Without --output it uploads what is there:
a run's merged/ and adapter/, or the exported folder that --input names.
"""

import argparse
from collections.abc import Mapping
from typing import Any

from lco_jax import hub, soups
from lco_jax.checkpoint.card import About, adapter_card
from lco_jax.checkpoint.hf import DTYPES, open_checkpoint
from lco_jax.checkpoint.peft import has_adapters, read_adapter, write_peft
from lco_jax.checkpoint.tensors import SHARD_BYTES
from lco_jax.checkpoint.usage import usage_beside, usage_of, with_dimension
from lco_jax.core.console import say
from lco_jax.core.errors import DONE, LcoError, run_main
from lco_jax.core.files import AnyPath, as_path, reaching, read_json
from lco_jax.flags import add_path, new_parser
from lco_jax.merging import DTYPE, shown, write_merged
from lco_jax.training.card import about_run
from lco_jax.training.instructions import usage_of_run
from lco_jax.training.run import run_config, tuned_of_run
from lco_jax.uploads import add_push_flags, beside, check_upload_flags, pushed_folders


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = new_parser("convert", __doc__)
    parser.add_argument(
        "command", nargs="?", choices=["soup"], help="average instead of converting one"
    )
    add_path(
        parser,
        "--input",
        "a training run, one of whose checkpoints is exported",
        earlier=["--workdir"],
        required=False,
        kind=as_path,
    )
    parser.add_argument(
        "--step", type=int, help="which of the run's checkpoints (default: the newest)"
    )
    parser.add_argument("--model", help="a checkpoint folder or hub id; a run knows its own")
    parser.add_argument(
        "--adapter", help="a PEFT adapter folder or hub id (default: the model as it is)"
    )
    output = "the folder to write (without it, --push uploads what is there)"
    add_path(parser, "--output", output, earlier=["--out"], required=False)
    # no defaults, so that it is known whether they are given
    parser.add_argument("--dtype", choices=list(DTYPES), help=f"of models (default: {DTYPE})")
    size = f"of one file (default: {SHARD_BYTES / 1e9:g})"
    parser.add_argument("--max-shard-size", type=float, metavar="GB", help=size)
    shorter = (
        "how many of the first numbers vectors have (default: as the run, adapter or model says)"
    )
    parser.add_argument("--truncate-dim", type=int, help=shorter)
    add_push_flags(parser)
    soups.add_flags(parser)
    return parser


def main() -> int:
    """Export or average, and print where."""
    args = make_parser().parse_args()
    if args.max_shard_size is not None and args.max_shard_size <= 0:
        raise LcoError(f"--max-shard-size is {args.max_shard_size}; it must be positive")
    if args.command == "soup":
        soups.check_flags(args)
    else:
        soups.refuse_flags(args)
        if args.output is None:
            check_upload_flags(args)
        else:
            _check_export_flags(args)
    is_run = args.output is not None and args.input is not None
    run = run_config(args.input) if is_run else None
    pushed = pushed_folders(args, run)
    api = hub.open_repositories(list(pushed), args.private or None) if pushed else None
    if args.command == "soup":
        soups.average(args)
    elif run is not None:
        _export_run(args, run)
    elif args.output is not None:
        _export_model(args)
    for repo_id, folder in pushed.items():
        say(f"uploaded {folder}: {hub.upload(api, folder, repo_id)}")
    return DONE


# ---- exports


def _export_run(args: argparse.Namespace, run: Mapping[str, Any]) -> None:
    """Write the merged model and the adapter of a run. run: its configuration."""
    found = tuned_of_run(args.input, args.step, run)
    say(f"{args.input}: step {found.step}, trained from {found.source}")
    usage = usage_of_run(run, found.checkpoint, args.truncate_dim)
    as_trained = usage == usage_of_run(run, found.checkpoint)
    # scores are of vectors as long as the run's
    about = about_run(run, _results(args.input) if as_trained else {}, found.step)
    base = found.source, found.checkpoint
    write_merged(args, args.output, base, found.parameters, found.lora, about, usage)
    if has_adapters(found.parameters.get("decoder", {})):
        folder = beside(args.output, "adapter")
        card = adapter_card(found.checkpoint, found.source, about, found.lora, usage)
        beside_it = usage_beside(usage, found.checkpoint)
        adapters = found.parameters["decoder"]
        write_peft(folder, adapters, found.lora, found.source, card, beside_it)
        say(f"adapter: {folder}")


def _results(workdir: AnyPath) -> dict[str, Any]:
    """The content of a run's results.json; empty if it has none yet."""
    with reaching(workdir):
        file = workdir / "results.json"
        return read_json(file) if file.exists() else {}


def _export_model(args: argparse.Namespace) -> None:
    """Write a model, perhaps with an adapter."""
    checkpoint = open_checkpoint(args.model)
    tuned, config, about = {}, None, None
    if args.adapter:
        tuned, config = read_adapter(args.adapter, checkpoint, head=True)
        made = f"{{base}} with the adapter {shown(args.adapter)} added to its weights."
        about = About(made, "with an adapter")
    base = args.model, checkpoint
    usage = with_dimension(usage_of(checkpoint, args.adapter), args.truncate_dim, checkpoint)
    write_merged(args, args.output, base, tuned, config, about, usage)


def _check_export_flags(args: argparse.Namespace) -> None:
    if args.step is not None and args.input is None:
        raise LcoError("--step goes with --input")
    if (args.input is None) == (args.model is None):
        raise LcoError(
            "give either --input (a training run) or --model (a checkpoint), and not both"
        )
    if args.input is not None and args.adapter:
        raise LcoError("--adapter goes with --model; a run has its own")


if __name__ == "__main__":
    run_main(main)
