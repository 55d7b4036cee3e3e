"""Data as people name them in one flag: files, folders and datasets -> sources with names.

    my.jsonl   shards/*.jsonl.gz   pairs.parquet   folder/   mixture.json
    hf://datasets/OWNER/NAME/data/train-*.parquet   tfds:snli   gs://BUCKET/my.jsonl

Several stand between commas. A name is made of letters, digits and underscores, so that
--config.data.sources.NAME.weight needs no quotes in a shell.
"""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError
from lco_jax.core.files import ASSETS, expanded, local_copy, on_bucket, read_json
from lco_jax.core.hub_ids import is_hub_id
from lco_jax.data.lines import ending_of, records_in
from lco_jax.data.names import media_kind

Spec = dict[str, Any]  # an entry of config.data.sources
Given = str | os.PathLike[str] | Sequence[str | os.PathLike[str]]

HUB, TFDS, BUNDLED = "hf://datasets/", "tfds:", "assets:"
KINDS = {".jsonl": "jsonl", ".parquet": "parquet"}  # of an ending
# in the name of a file or folder: what most people do not train on
TEST_SPLIT = re.compile(
    r"(?<![^\W_])(test|dev|val|valid|validation|eval|held_?out)(?![^\W_])", re.IGNORECASE
)
TAKEN = (
    "a .jsonl or .parquet file of records, a pattern or a folder of such files, a .json file that "
    f"describes a source, {HUB}OWNER/NAME/FILES.parquet, or {TFDS}NAME"
)


def sources_of(given: Given, flag: str) -> dict[str, Spec]:
    """Name -> source, in the order given. Nothing is opened but a .json file.

    given: names between commas; of a list each item is a name as it stands. flag: what errors call
    it. Raises for what is none of the forms above, and where two have one name.
    """
    items = _items(given, flag)
    if not items:
        raise LcoError(f"{flag} is empty; give {TAKEN}")
    specs = [_spec(item, flag) for item in items]
    names = list(map(_name, items))
    longer = [_name(item, with_folder=True) for item in items]
    is_several = {name: names.count(name) > 1 for name in names}
    chosen = [long if is_several[name] else name for name, long in zip(names, longer, strict=True)]
    sources = dict(zip(chosen, specs, strict=True))
    if len(sources) < len(specs):
        several = ",".join(items)
        raise LcoError(f"{flag}={several} holds two files of one name; what is said goes by names")
    return sources


def file_source(path: Path) -> Spec | None:
    """The source that a file of records is, or that a .json file describes; None for others."""
    if path.suffix == ".json":
        return _described(path)
    kind = KINDS.get(ending_of(path))
    return None if kind is None else {"kind": kind, "path": str(path)}


def is_bundled(spec: Mapping[str, Any]) -> bool:
    """Whether a source ships with the package."""
    return str(spec.get("path")).startswith(BUNDLED)


def in_assets(path: str) -> Path:
    """A path; `assets:NAME` is a file that ships with the package."""
    name = path.removeprefix(BUNDLED)
    return Path(path) if name == path else ASSETS / name


def _items(given: Given, flag: str) -> list[str]:
    """The single names. A file whose name has a comma is one."""
    if isinstance(given, list | tuple) and all(isinstance(one, str | os.PathLike) for one in given):
        return list(map(os.fspath, given))
    if not isinstance(given, str | os.PathLike):
        kind = type(given).__name__
        raise LcoError(f"{flag} is a {kind}; name files: records go into a .jsonl, one a line")
    text = os.fspath(given)
    if text and os.path.exists(expanded(text)):
        return [text]
    return [item.strip() for item in text.split(",") if item.strip()]


def _spec(item: str, flag: str) -> Spec:
    if item.startswith(HUB):
        return _of_hub(item, flag)
    if item.startswith(TFDS):
        return {"kind": "tfds", "name": item.removeprefix(TFDS)}
    path = Path(item) if on_bucket(item) or item.startswith(BUNDLED) else expanded(item)
    if path.is_dir():
        return _of_folder(path, item, flag)
    if path.suffix == ".json":
        return _of_json(item, flag)
    kind = KINDS.get(ending_of(path))
    if kind is None:
        raise LcoError(f"{flag}={item}: {_why_not(path, item)}")
    return {"kind": kind, "path": item}


def _of_json(item: str, flag: str) -> Spec:
    """The source that a .json file describes: of a disk, of a bucket or of the package."""
    try:
        return _described(in_assets(item) if item.startswith(BUNDLED) else local_copy(item))
    except LcoError as error:
        raise LcoError(f"{flag}={item}: {error}") from error


def _of_hub(item: str, flag: str) -> Spec:
    """The parquet files of a hub dataset, spelt as pandas and polars do."""
    owner, _, rest = item.removeprefix(HUB).partition("/")
    name, _, files = rest.partition("/")
    if not owner or not name or ending_of(files) != ".parquet":
        example = f"{HUB}OWNER/NAME/data/train-*.parquet"
        raise LcoError(f"{flag}={item}: name the parquet files, too, as in {example}")
    return {"kind": "parquet", "path": f"{owner}/{name}", "files": files}


def _of_folder(path: Path, item: str, flag: str) -> Spec:
    """All files of records in a folder, which must be of one kind. Media alone have no texts."""
    files = records_in(path, KINDS)
    kinds = {KINDS[ending_of(file)] for file in files}
    if not kinds:
        raise LcoError(
            f"{flag}={item}: the folder holds no .jsonl or .parquet file{_of_media(path)}"
        )
    if len(kinds) > 1:
        advice = f"name one kind, as in {os.path.join(item, '*.jsonl')}"
        raise LcoError(f"{flag}={item}: the folder holds .jsonl and .parquet files; {advice}")
    tests = [file for file in files if TEST_SPLIT.search(str(file.relative_to(path)))]
    if tests and len(tests) < len(files):
        both = f"{tests[0].relative_to(path)} beside files to train on"
        raise LcoError(f"{flag}={item}: the folder holds {both}; name the files that are meant")
    return {"kind": kinds.pop(), "path": item}


def _of_media(path: Path) -> str:
    """What to do with a folder of media; "" for any other."""
    if not any(media_kind(name) for name in path.rglob("*")):
        return ""
    files = "a .json file of a source of kind files makes texts of their names"
    return f"; media need texts: name both in a .jsonl, or {files} (docs/training.md)"


def _why_not(path: Path, item: str) -> str:
    if media_kind(item):
        return f"a medium alone is no record; give {TAKEN}"
    if path.exists() or path.suffix or on_bucket(item):
        return f"it is none of these: {TAKEN}"
    if is_hub_id(item):
        hub = f"a hub dataset is {HUB}{item}/FILES.parquet"
        return f"there is no such file or folder; {hub}"
    return f"there is no such file or folder; give {TAKEN}"


def _described(path: Path) -> Spec:
    spec = read_json(path)
    if "kind" not in spec:
        lacks = "it describes no source, which has a kind and its arguments"
        raise LcoError(f"{path}: {lacks}; records go into a .jsonl, one a line")
    return spec


def _name(item: str, with_folder: bool = False) -> str:
    """A name for a source: of its file or dataset, perhaps with that of the folder."""
    if item.startswith(HUB):
        parts = item.removeprefix(HUB).split("/")[:2]
    elif item.startswith(TFDS):
        parts = item.split(":")[:2]  # a version or configuration may follow
    else:
        parts = re.split(r"[/:]", item.rstrip("/"))[-2:]
        parts[-1] = re.sub(r"(\.jsonl|\.parquet|\.json)?(\.gz)?$", "", parts[-1])
    words = [re.sub(r"\W+", "_", part).strip("_") for part in parts]
    words = [word for word in words if word] or ["data"]
    return "_".join(words) if with_folder else words[-1]
