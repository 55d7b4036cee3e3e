"""Cases of media: valid ones, damaged ones, and ones that promise more than they have."""

import base64
import struct
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.fuzz import damage, images, sounds, videos
from benchmarks.fuzz.case import Case, Job, rng_of
from benchmarks.fuzz.images import Made

KIND = "media"
MAKERS = {"image": images.MAKERS, "audio": sounds.MAKERS, "video": videos.MAKERS}
SHARES = {"valid": 0.35, "damaged": 0.45, "bomb": 0.1, "spliced": 0.05, "none": 0.05}
# formats that end with their pixels, of which a part must not pass for all
WHOLE = ("PNG", "JPEG", "BMP")


def case(seed: int, number: int, folder: Path, _: Path | None = None) -> Case:
    """The case of this number, whose files are written to the folder."""
    rng = rng_of(seed, KIND, number)
    sort = str(rng.choice(list(SHARES), p=list(SHARES.values())))
    if sort == "valid":
        return _valid(rng, number, folder)
    if sort == "damaged":
        return _damaged(rng, number, folder)
    made = _other(rng, sort)
    path = _write(made, folder)
    return Case(KIND, number, made.what, {"input": {made.kind: str(path)}})


def make(rng: np.random.Generator) -> Made:
    """Any valid medium."""
    kind = str(rng.choice(list(MAKERS), p=[0.6, 0.25, 0.15]))
    makers = MAKERS[kind]
    return makers[rng.integers(len(makers))](rng)


def _valid(rng: np.random.Generator, number: int, folder: Path) -> Case:
    made = make(rng)
    ending = made.ending
    how = str(rng.choice(["path", "path", "bare", "bytes", "file", "data", "renamed"]))
    if how == "renamed":
        ending = str(rng.choice([".png", ".mp4", ".wav", ".jpg", ".bin", ""]))
    path = _write(made, folder, ending)
    given = _given(made, path, how)
    unlike = {"input": given} if how == "bare" else None
    return Case(
        KIND,
        number,
        f"{made.what}, as {how}{ending if how == 'renamed' else ''}",
        {"input": given},
        "vector",
        _right(made, folder),
        unlike and {"input": {"text": given}},
    )


def _given(made: Made, path: Path, how: str) -> Any:
    """The input, in one of the ways to give it."""
    if how == "bare":
        return str(path)
    if how == "bytes":
        return {made.kind: {"load": "bytes", "path": str(path)}}
    if how == "file":
        return {made.kind: f"file://{path}"}
    if how == "data":
        coded = base64.b64encode(made.content).decode()
        return {made.kind: f"data:{made.kind}/x;base64,{coded}"}
    return {made.kind: str(path)}


def _right(made: Made, folder: Path) -> Job | None:
    """The job of what was decoded on its own."""
    if made.right is None:
        return None
    path = folder / "right.npy"
    np.save(path, made.right)
    if made.kind == "video":
        return {"input": {"video": {"load": "frames", "path": str(path)}}}
    array = {"load": "array", "path": str(path)}
    if made.kind == "audio":
        return {"input": {"audio": {"array": array, "sampling_rate": made.rate}}}
    return {"input": {"image": array}}


def _damaged(rng: np.random.Generator, number: int, folder: Path) -> Case:
    made = make(rng)
    harm = damage.ANY[rng.integers(len(damage.ANY))]
    what, content = harm(rng, made.content)
    path = _write(made._replace(content=content), folder)
    torn = harm is damage.cut and made.what.startswith(WHOLE)
    want = "error" if torn else "either"
    return Case(KIND, number, f"{made.what}; {what}", {"input": {made.kind: str(path)}}, want)


def _other(rng: np.random.Generator, sort: str) -> Made:
    if sort == "bomb":
        return damage.BOMBS[rng.integers(len(damage.BOMBS))](rng)
    first, second = make(rng), make(rng)
    if sort == "spliced":
        what, content = damage.spliced(rng, first.content, second.content)
        return first._replace(what=f"{first.what}; {what} ({second.what})", content=content)
    if first.kind == "video" and rng.integers(2):
        return _without_frames(first)
    empty = [b"", b"\0", b"\0" * 100_000, rng.bytes(5000), b"<html></html>"][rng.integers(5)]
    return first._replace(what=f"{len(empty)} bytes {empty[:8]!r}", content=empty)


def _without_frames(made: Made) -> Made:
    """A container that is cut in front of its first frame, and whose index stays."""
    content = made.content
    start = content.find(b"mdat")
    if start < 0:
        return made._replace(what=f"{made.what}; its first 200 bytes", content=content[:200])
    size = struct.unpack(">I", content[start - 4 : start])[0]
    empty = content[: start - 4] + struct.pack(">I", 8) + b"mdat" + content[start - 4 + size :]
    return made._replace(what=f"{made.what}; no frames", content=empty)


def _write(made: Made, folder: Path, ending: str | None = None) -> Path:
    path = folder / f"medium{made.ending if ending is None else ending}"
    path.write_bytes(made.content)
    return path
