"""`lco convert --push`: which folders are uploaded, and to which repositories."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lco_jax import hub
from lco_jax.checkpoint.base import base_of
from lco_jax.checkpoint.peft_config import CONFIG
from lco_jax.core.errors import LcoError
from lco_jax.core.files import on_bucket


def add_push_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of an upload."""
    group = parser.add_argument_group("the hub (the token is HF_TOKEN's, or hf auth login's)")
    group.add_argument(
        "--push", metavar="OWNER/NAME", help="upload to this repository; it is made if need be"
    )
    group.add_argument(
        "--push-what",
        choices=["merged", "adapter", "both"],
        help="by default what OUTPUT holds; of both, the second is OWNER/NAME-adapter or -merged",
    )
    group.add_argument("--private", action="store_true", help="make the repository private")


def beside(folder: Path, kind: str) -> Path:
    """Where the second of two outputs lies."""
    return folder.with_name(f"{folder.name}-{kind}")


def check_upload_flags(args: argparse.Namespace) -> None:
    """Raise unless the flags upload what is there already."""
    if not args.push:
        raise LcoError("give --output, the folder to write, or --push, to upload what is there")
    if args.input is None or args.model or args.adapter or args.step is not None:
        raise LcoError("without --output, --push goes with --input alone: a run, or an export")
    if args.dtype or args.max_shard_size or args.truncate_dim:
        why = "without it, --push uploads what is there"
        raise LcoError(f"--dtype, --max-shard-size and --truncate-dim go with --output; {why}")
    if on_bucket(args.input):
        raise LcoError(f"{args.input} is on a bucket; give --output, from which --push uploads")


def pushed_folders(
    args: argparse.Namespace, run: Mapping[str, Any] | None = None
) -> dict[str, Path]:
    """{repository: folder} of what is to be uploaded, checked as far as it is there already.

    run: the configuration of the run that is to be exported, if it is one.
    """
    if not args.push:
        if args.private or args.push_what:
            raise LcoError("--private and --push-what go with --push")
        return {}
    there = _outputs(args, run) if args.output is not None else _exports_at(args.input)
    kinds = _kinds_to_push(args.push_what, there)
    for kind in kinds:
        if args.output is None:
            hub.check_export(there[kind])
        elif kind == "adapter":
            base = args.model if run is None else run["model"]["path"]
            hub.check_base(base_of(base), str(there[kind]))
    names = [args.push, *(f"{args.push}-{kind}" for kind in kinds[1:])]
    return {name: there[kind] for name, kind in zip(names, kinds, strict=True)}


def _kinds_to_push(what: str | None, there: Mapping[str, Path]) -> list[str]:
    """The exports that --push-what means, by default the first. there: {kind: folder}."""
    first = next(iter(there))
    if what == "both":
        if len(there) < 2:
            raise LcoError(f"--push-what=both: there is only one export, {there[first]}")
        return list(there)
    if what and what not in there:
        raise LcoError(f"--push-what={what}: there is only {first}, {there[first]}")
    return [what or first]


def _outputs(args: argparse.Namespace, run: Mapping[str, Any] | None) -> dict[str, Path]:
    """What a command will write: kind -> folder. The first is OUTPUT."""
    if args.adapters:
        merged = {"merged": beside(args.output, "merged")} if args.merge else {}
        return {"adapter": args.output, **merged}
    outputs = {"merged": args.output}
    if run is not None and run["tune"]["decoder"] == "lora":
        outputs["adapter"] = beside(args.output, "adapter")
    return outputs


def _exports_at(folder: Path) -> dict[str, Path]:
    """The exports that a run has, or the one that a folder is: kind -> folder."""
    if not (folder / "checkpoints").is_dir():
        return {"adapter" if (folder / CONFIG).is_file() else "merged": folder}
    there = {kind: folder / kind for kind in ("merged", "adapter") if (folder / kind).is_dir()}
    if not there:
        raise LcoError(f"{folder} has neither merged/ nor adapter/ yet; give --output to export it")
    return there
