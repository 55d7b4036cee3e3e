"""A run that is finished: how to know it without opening anything, and what is said of it."""

import json
import os
from collections.abc import Iterator, Mapping
from glob import glob, has_magic
from itertools import islice
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, on_bucket, read_json
from lco_jax.data.guide_files import guide_files
from lco_jax.data.instructions import INSTRUCTIONS

MANY = 10_000  # files of data: to look at more takes too long
# what config.json has beside the configuration
ABOUT_THE_RUN = ("total_steps", "objective", "data_was")
FOLDERS = {"adapter": "adapter", "merged": "merged model"}
FILES = ("results.json", "metrics.jsonl", "loss.png", "similarity.png")
WIDTH = 18  # of a column of numbers


def results_if_finished(home: AnyPath, config: ConfigDict) -> dict[str, Any] | None:
    """The content of results.json, if this very run has ended in the folder and all is as it left
    it; else None.

    A run writes config.json when it begins or goes on, and results.json last. Every file of data or
    weights on this disk that the configuration names must be older. Where this cannot be told, the
    run is opened, which checks more.
    """
    if on_bucket(home):
        return None
    try:
        results, begun = read_json(home / "results.json"), read_json(home / "config.json")
        began, ended = (_changed(home / name) for name in ("config.json", "results.json"))
        files = list(islice(_files(config), MANY + 1))
        is_last = began <= ended and len(files) <= MANY
        is_last &= all(_changed(file) < began for file in files)
    except (LcoError, OSError):  # something is gone, or damaged
        return None
    for key in ABOUT_THE_RUN:
        begun.pop(key, None)
    is_same = begun == json.loads(config.to_json()) and "steps" in results
    return results if is_same and is_last and _has_outputs(home, config) else None


def _changed(file: Path) -> int:
    """When a file was changed or put in its place, in ns."""
    return file.stat().st_ctime_ns


def _has_outputs(home: AnyPath, config: ConfigDict) -> bool:
    wanted = {"adapter": config.tune.decoder == "lora", "merged": config.export.merged}
    return all((home / name).is_dir() for name, is_wanted in wanted.items() if is_wanted)


def _files(config: ConfigDict) -> Iterator[Path]:
    """The files on this disk that the configuration names as data, as a guide or as the model."""
    yield from guide_files(config.loss.guide)
    texts = [config.model.path, config.eval.path, config.eval.sts]
    for source in config.data.sources.to_dict().values():
        files = {key: value for key, value in source.items() if key not in INSTRUCTIONS}
        texts += [value for value in files.values() if isinstance(value, str)]
    for text in texts:
        for name in text.split(","):
            yield from _files_of(os.path.expanduser(name.strip()))


def _files_of(name: str) -> Iterator[Path]:
    """The files that a name may stand for; none if it is that of something else."""
    for path in map(
        Path, glob(name, recursive=True) if has_magic(name) else [name] if name else []
    ):
        if path.is_dir():
            yield from (file for file in path.rglob("*") if file.is_file())
        elif path.is_file():
            yield path


# ---- what is said of it


def report(results: Mapping[str, Any], workdir: Path, home: AnyPath) -> list[str]:
    """The table of what changed, and what the folder holds. workdir: the folder, or its copy here;
    home: what it is called.
    """
    lines = table(results)
    width = max(map(len, FOLDERS.values())) + 2
    for name, title in FOLDERS.items():
        if (workdir / name).is_dir():
            lines.append(f"{title:{width}}{home / name}")
    there = [name for name in FILES if (workdir / name).exists()]
    lines.append(f"{'and':{width}}{', '.join(there)}")
    return lines


def table(results: Mapping[str, Any]) -> list[str]:
    """Scores of what was held out, before and after, and the loss, first and last."""
    before, after = results.get("before", {}), results.get("after", {})
    rows = [
        (_title(name, score), _cell(before[name]), _cell(score)) for name, score in after.items()
    ]
    first, last = results.get("first_loss"), results.get("last_loss")
    if first is not None and last is not None:
        rows.append(("training loss, first and last step", f"{first:.3f}", f"{last:.3f}"))
    width = max((len(title) for title, *_ in rows), default=0) + 2
    lines = [f"{title:{width}}{one:>{WIDTH}}{other:>{WIDTH}}" for title, one, other in rows]
    head = f"{'held out' if after else '':{width}}{'before':>{WIDTH}}{'after':>{WIDTH}}"
    return ["", head, *lines, ""] if rows else []


def _title(name: str, score: Any) -> str:
    """What a row is of: a file and its measures, or the loss of answers."""
    if not isinstance(score, Mapping):
        return "loss of answers, nats a token"
    if "spearman" in score:
        return f"{name}: Spearman"
    candidates = f", {score['candidates']:,} candidates" if "candidates" in score else ""
    return f"{name}{candidates}: recall@1; MRR"


def _cell(score: Any) -> str:
    if not isinstance(score, Mapping):
        return f"{score:.3f}"
    numbers = [value for measure, value in score.items() if measure != "candidates"]
    return "; ".join(f"{value:.3f}" for value in numbers)
