"""Cases of checkpoint folders: `builtin:tiny` with hostile values in one of its files."""

import json
import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors.numpy import load_file, save_file

from benchmarks.fuzz.case import Case, rng_of
from benchmarks.fuzz.values import hostile, replace_any, shown, update, write

KIND = "checkpoints"
TEXT = "A cat sleeps on a red chair."
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
JSONS = ("config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json",
         "chat_template.json")  # fmt: skip


class Edited(NamedTuple):
    """what: was done. want: as in `Case`; of "same", the vector must be the unedited one's."""

    what: str
    want: str = "either"


Edit = Callable[[np.random.Generator, Path], Edited]


def case(seed: int, number: int, folder: Path, base: Path) -> Case:
    """The case of this number: a copy of the folder `base`, edited."""
    rng = rng_of(seed, KIND, number)
    copy = folder / "model"
    shutil.copytree(base, copy)
    edit = EDITS[number % len(EDITS)]
    edited = edit(rng, copy)
    job = {"model": str(copy), "modalities": ["text"], "input": TEXT}
    if edit is value_in_json and rng.integers(2):
        job["modalities"] = None
    same = {**job, "model": str(base), "modalities": ["text"]} if edited.want == "same" else None
    want = "vector" if edited.want == "same" else edited.want
    return Case(KIND, number, edited.what, job, want, same)


# ---- JSON


def value_in_json(rng: np.random.Generator, folder: Path) -> Edited:
    """A hostile value anywhere in one of the files."""
    file = folder / JSONS[rng.choice(len(JSONS), p=[0.5, 0.2, 0.1, 0.1, 0.1])]
    value = hostile(rng)
    at = replace_any(rng, file, value)
    return Edited(f"{file.name}: {at} = {shown(value)}")


def torn_json(rng: np.random.Generator, folder: Path) -> Edited:
    """A file of JSON that is torn, empty, of another type or very deep."""
    file = folder / JSONS[rng.integers(3)]
    content = file.read_text(encoding="utf-8")
    forms = {
        "cut": content[: int(rng.integers(1, len(content) - 2))],
        "empty": "",
        "a list": "[1, 2]",
        "null": "null",
        "deep": "[" * 200_000,
        "not UTF-8": "\udcff\udcfe",
    }
    name = str(rng.choice(list(forms)))
    file.write_bytes(forms[name].encode("utf-8", "surrogateescape"))
    return Edited(f"{file.name}: {name}", "error")


def size_in_config(rng: np.random.Generator, folder: Path) -> Edited:
    """A size that the weights do not have."""
    sizes = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads",
             "num_key_value_heads", "vocab_size")  # fmt: skip
    key = str(rng.choice(sizes))
    value = [10**4, 10**6, 10**8, 2**40, -4, 0, 5][rng.integers(7)]
    update(folder / "config.json", **{key: value})
    return Edited(f"config.json: {key} = {value}", "error")


def more_in_config(rng: np.random.Generator, folder: Path) -> Edited:
    """Keys that nothing reads."""
    update(folder / "config.json", **{f"unknown_{i}": hostile(rng) for i in range(3)})
    return Edited("config.json: unknown keys", "same")


# ---- weights


def index_value(rng: np.random.Generator, folder: Path) -> Edited:
    """Shards, and an index of which one value is hostile."""
    weight_map = _shard(folder)
    name = str(rng.choice([key for key in sorted(weight_map) if ".layers." in key]))
    value = [None, 5, "", "../model-1.safetensors", "/dev/zero", "absent.safetensors", [], {},
             "config.json", "model-2.safetensors\0"][rng.integers(10)]  # fmt: skip
    weight_map[name] = value
    write(folder / INDEX, {"weight_map": weight_map})
    return Edited(f"{INDEX}: {name} = {shown(value)}", "error")


def index_whole(rng: np.random.Generator, folder: Path) -> Edited:
    """An index that is of another type, or right."""
    weight_map = _shard(folder)
    forms: list[tuple[Any, str]] = [
        ({"metadata": {}, "weight_map": weight_map}, "same"),
        ({"metadata": {"total_size": hostile(rng)}, "weight_map": weight_map}, "either"),
        ({"weight_map": list(weight_map)}, "error"),
        ({"weight_map": None}, "error"),
        ({"weight_map": {}}, "error"),
        ({}, "error"),
        ([], "error"),
    ]
    content, want = forms[rng.integers(len(forms))]
    write(folder / INDEX, content)
    return Edited(f"{INDEX}: {shown(content)}", want)


def stale_index(_: np.random.Generator, folder: Path) -> Edited:
    """A whole file, beside the shards and index of other weights."""
    tensors = load_file(folder / WEIGHTS)
    save_file({name: 2 * x for name, x in tensors.items()}, folder / "model-1.safetensors")
    write(folder / INDEX, {"weight_map": dict.fromkeys(tensors, "model-1.safetensors")})
    return Edited("a stale index beside a whole file", "same")


def _shard(folder: Path) -> dict[str, Any]:
    """Put the tensors in two files: {tensor: file}."""
    tensors = load_file(folder / WEIGHTS)
    (folder / WEIGHTS).unlink()
    weight_map = {}
    for i in (1, 2):
        name = f"model-{i}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i - 1 :: 2]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    return weight_map


def header_value(rng: np.random.Generator, folder: Path) -> Edited:
    """A tensor's dtype, shape or place in the header is another."""
    file = folder / WEIGHTS
    header, data = read_header(file)
    name = str(rng.choice([key for key in header if ".layers." in key]))
    start, end = header[name]["data_offsets"]
    key, value = [
        ("dtype", "F16"),
        ("dtype", "I64"),
        ("dtype", "F4"),
        ("dtype", hostile(rng)),
        ("shape", [10**9, 10**9]),
        ("shape", [-1]),
        ("shape", []),
        ("shape", hostile(rng)),
        ("data_offsets", [end, start - 1]),
        ("data_offsets", [start + 4, end + 4]),
        ("data_offsets", [0, 2**62]),
        ("data_offsets", hostile(rng)),
    ][rng.integers(12)]
    header[name][key] = value
    write_header(file, header, data)
    return Edited(f"{WEIGHTS}: {name}.{key} = {shown(value)}", "error")


def header_whole(rng: np.random.Generator, folder: Path) -> Edited:
    """The file's beginning or end is not what the format has."""
    file = folder / WEIGHTS
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    forms = {
        "a header of 2^63 bytes": struct.pack("<Q", 2**63) + content[8:],
        "a header of 90 MB": struct.pack("<Q", 90_000_000) + content[8:],
        "a header of no bytes": struct.pack("<Q", 0) + content[8:],
        "a header cut by one": struct.pack("<Q", size - 1) + content[8:],
        "empty": b"",
        "five bytes": content[:5],
        "cut": content[: int(rng.integers(size + 8, len(content)))],
        "more at its end": content + b"\0" * 100,
        "a header that is a list": struct.pack("<Q", 2) + b"[]",
        "Git LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n",
    }
    name = str(rng.choice(list(forms)))
    file.write_bytes(forms[name])
    return Edited(f"{WEIGHTS}: {name}", "error")


def tensors_of(rng: np.random.Generator, folder: Path) -> Edited:
    """One tensor is absent, of another shape, not finite; or there is one too many."""
    file = folder / WEIGHTS
    tensors = load_file(file)
    decoder = [name for name in sorted(tensors) if name.startswith("model.layers")]
    name = str(rng.choice(decoder))
    form = str(rng.choice(["absent", "transposed", "half", "NaN", "NaN", "inf", "huge", "more"]))
    value = tensors[name]
    if form == "absent":
        del tensors[name]
    elif form == "transposed":
        tensors[name] = np.ascontiguousarray(value.reshape(-1, 1))
    elif form == "half":
        tensors[name] = value[: len(value) // 2].copy()
    elif form in ("NaN", "inf", "huge"):
        tensors[name] = value.copy()
        number = {"NaN": np.nan, "inf": np.inf, "huge": 3e38}[form]
        tensors[name].reshape(-1)[rng.integers(value.size)] = number
    else:
        tensors["model.layers.99.more.weight"] = value.copy()
    save_file(tensors, file)
    want = "either" if form in ("inf", "huge", "more") else "error"
    return Edited(f"{WEIGHTS}: {name} is {form}", want)


def stored_as(rng: np.random.Generator, folder: Path) -> Edited:
    """Other whole files beside the weights."""
    names = ("consolidated.safetensors", "model.fp16.safetensors", "optimizer.safetensors",
             "training_args.bin", "pytorch_model.bin")  # fmt: skip
    name = str(rng.choice(names))
    (folder / name).write_bytes(rng.bytes(500))
    return Edited(f"a stray {name}", "same")


def read_header(file: Path) -> tuple[dict[str, Any], bytes]:
    """(the header of a safetensors file, what follows)."""
    content = file.read_bytes()
    size = struct.unpack("<Q", content[:8])[0]
    return json.loads(content[8 : 8 + size]), content[8 + size :]


def write_header(file: Path, header: dict[str, Any], data: bytes) -> None:
    """Write a safetensors file whatever its header says."""
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data)


# ---- templates and files


def template(rng: np.random.Generator, folder: Path) -> Edited:
    """A chat template that loops, fails, or says nothing."""
    forms = {
        "{% for i in range(10**9) %}{{ i }}{% endfor %}": "error",
        "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}": "error",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "error",
        "{{ raise_exception('no') }}": "error",
        "{{ absent.more }}": "error",
        "{% if %}": "error",
        "{{ ''.__class__.__mro__ }}": "error",
        "{{ 'a' * 10**10 }}": "error",
        "{{ 10**(10**8) }}": "error",
        "{{ messages[0]['content'][99]['text'] }}": "either",
        "{{ 1 / 0 }}": "error",
        "": "either",
        "\ud800": "either",
    }
    text = str(rng.choice(list(forms)))
    update(folder / "chat_template.json", chat_template=text)
    return Edited(f"template {text!r}", forms[text])


def not_a_file(rng: np.random.Generator, folder: Path) -> Edited:
    """A file is a pipe, a link, a folder, or not there."""
    name = str(rng.choice([WEIGHTS, "config.json", "tokenizer.json", "chat_template.json"]))
    form = str(rng.choice(["pipe", "pipe", "link", "link to itself", "folder", "device", "gone"]))
    file = folder / name
    file.rename(folder.parent / "aside")
    if form == "pipe":
        os.mkfifo(file)
    elif form == "folder":
        file.mkdir()
    elif form != "gone":
        targets = {"link": folder.parent / "aside", "link to itself": file, "device": "/dev/zero"}
        file.symlink_to(targets[form])
    # the hub's cache is made of links; some files may be absent, and a link that leads nowhere is
    want = {"link": "same", "gone": "either", "link to itself": "either"}.get(form, "error")
    return Edited(f"{name}: {form}", want)


EDITS: tuple[Edit, ...] = (
    value_in_json,
    size_in_config,
    index_value,
    header_value,
    tensors_of,
    template,
    value_in_json,
    not_a_file,
    torn_json,
    index_whole,
    header_whole,
    value_in_json,
    more_in_config,
    stale_index,
    stored_as,
)
