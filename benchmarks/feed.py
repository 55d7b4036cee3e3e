"""What `encode` feeds to devices: its padding, the bytes of a picture, and the CPU time of the
thread that dispatches. Nothing runs on a device, so that the number of devices is free."""

import argparse
import io
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lco_jax.checkpoint import builtin
from lco_jax.data.inference import (
    BLOCK_INPUTS,
    MAX_TOKENS,
    HostBatch,
    batches_of,
    blocks_of,
    pack,
)
from lco_jax.data.inputs import Preparation, named, prepare_ahead
from lco_jax.data.processor import Processor
from lco_jax.data.tower_rows import Processed

DEVICES = (1, 4, 8)
WORKERS = (0, 2)
SNLI = Path(__file__).with_name("snli_lengths.json")
SIDE = 1000  # of a picture of one megapixel


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`feed`."""
    parser = kinds.add_parser(
        "feed", parents=[common], help="padding, bytes and host time of encode"
    )
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument(
        "--images", type=int, default=200, help="photographs of 100 to 1,000 pixels a side"
    )
    parser.add_argument(
        "--megapixels", type=int, default=32, help="pictures of a megapixel that are timed"
    )
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Counts for each number of devices; then bytes and seconds of pictures of one megapixel."""
    rng = np.random.default_rng(0)
    processor = Processor(builtin.build())
    texts = _sentences(rng, args.texts)
    documents = [_text(rng.integers(0, 8000, n)) for n in rng.integers(100, 3000, args.texts // 50)]
    sizes = rng.integers(100, SIDE, (args.images, 2))
    photographs = _prepared(processor, [_picture(rng, *size) for size in sizes], 0)
    corpora = {
        "sentences": texts,
        "sentences and documents": texts + documents,
        "sentences and photographs": texts + photographs,
    }
    padding = {
        name: {devices: _padding(processor, ready, devices) for devices in DEVICES}
        for name, ready in corpora.items()
    }
    return {
        "padding": padding,
        "image": _image(processor, rng, args),
        "workers": _workers(processor, rng, args),
    }


def _sentences(rng: np.random.Generator, count: int) -> list[Processed]:
    """As long as SNLI's, in its prompt."""
    snli = json.loads(SNLI.read_text(encoding="utf-8"))
    sentences = []
    for length in rng.choice(np.ravel(snli["lengths"]), count):
        words = rng.zipf(1.3, length) % 8000
        sentences.append(_text(np.concatenate([snli["prefix"], words, snli["suffix"]])))
    return sentences


def _text(ids: np.ndarray) -> Processed:
    ids = ids.astype(np.int32)
    return Processed(ids, np.zeros((len(ids), 3), np.int32))


def _picture(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    small = rng.integers(0, 256, (height // 20 + 1, width // 20 + 1, 3), np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def _prepared(processor: Processor, items: Sequence[Any], workers: int) -> list[Any]:
    return list(prepare_ahead(Preparation(processor), named(items, None), workers))


def _packed(processor: Processor, ready: Sequence[Any], devices: int) -> Iterator[HostBatch]:
    for block in blocks_of(iter(ready), BLOCK_INPUTS, raises=True, shards=devices):
        for members in batches_of(block, None, MAX_TOKENS, devices):
            yield pack(block, members, processor.rows)


def _padding(processor: Processor, ready: Sequence[Processed], devices: int) -> dict[str, Any]:
    """All over real ones: tokens of streams, slots of attention rows, patches."""
    tokens, slots, patches = np.zeros(2), np.zeros(2), np.zeros(2)  # [all, real ones]
    programs = set()
    passes = 0
    for packed in _packed(processor, ready, devices):
        passes += 1
        ids, rows = packed.tokens.input_ids, packed.tokens.rows
        tokens += ids.size, sum(stream.length for stream in packed.streams)
        for group in rows:
            slots += group.size, (group >= 0).sum()
        for filled in packed.media().values():
            frame_ids = filled["frame_ids"]
            patches += frame_ids.size, (frame_ids > 0).sum()
        programs.add((ids.shape, *(group.shape for group in rows)))
    result = {
        "passes": passes,
        "programs": len(programs),
        "tokens": tokens[0] / tokens[1],
        "slots": slots[0] / slots[1],
    }
    if patches[1]:
        result["patches"] = patches[0] / patches[1]
    return result


def _image(
    processor: Processor, rng: np.random.Generator, args: argparse.Namespace
) -> dict[str, float]:
    """Of a picture of a megapixel: the bytes that travel, and the dispatching thread's time."""
    (one,) = _prepared(processor, [_picture(rng, SIDE, SIDE)], 0)
    (alone,) = _packed(processor, [one], 1)
    sent = sum(x.nbytes for filled in alone.media().values() for x in filled.values())
    seconds: dict[str, list[float]] = {"fill": [], "all": []}
    for _ in range(args.rounds):
        start = time.thread_time()
        filling = 0.0
        for packed in _packed(processor, [one] * 12, 1):  # as many as one pass holds
            before = time.thread_time()
            packed.media()
            filling += time.thread_time() - before
        seconds["fill"].append(filling / 12)
        seconds["all"].append((time.thread_time() - start) / 12)
    size = SIDE**2 / 1e6
    result = {"bytes": sent}
    for name, times in seconds.items():
        result[f"{name}_ms"] = 1e3 * float(np.median(times)) / size
    return result


def _workers(
    processor: Processor, rng: np.random.Generator, args: argparse.Namespace
) -> dict[int, dict[str, float]]:
    """Workers -> pictures a second from JPEG to what travels, and the dispatching thread's part."""
    buffer = io.BytesIO()
    Image.fromarray(_picture(rng, SIDE, SIDE)).save(buffer, "JPEG", quality=90)
    result = {}
    for workers in WORKERS:
        items: Iterator[Any] = ({"image": buffer.getvalue()} for _ in range(args.megapixels + 8))
        ready = prepare_ahead(Preparation(processor), named(items, None), workers)
        for _ in range(8):  # processes start
            next(ready)
        start = time.perf_counter()
        packing = 0.0
        for block in blocks_of(ready, 8, raises=True):
            before = time.thread_time()
            for packed in _packed(processor, block, 1):
                packed.media()
            packing += time.thread_time() - before
        seconds = time.perf_counter() - start
        result[workers] = {
            "per_second": args.megapixels / seconds,
            "thread_ms": 1e3 * packing / args.megapixels,
        }
    return result


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [
        result["command"],
        "| padded over real | devices | passes | programs | tokens | slots | patches |",
    ]
    for name, by_devices in result["padding"].items():
        for devices, one in by_devices.items():
            cells = [name, str(devices), str(one["passes"]), str(one["programs"])]
            for key in ("tokens", "slots", "patches"):
                cells.append(f"{one[key]:.2f}" if key in one else "")
            lines.append(f"| {' | '.join(cells)} |")
    image = result["image"]
    lines.append(f"a picture of a megapixel: {image['bytes'] / 1e6:.2f} MB to the device")
    fill, total = image["fill_ms"], image["all_ms"]
    lines.append(f"the dispatching thread: {fill:.2f} ms to fill its rows, {total:.2f} in all")
    for workers, one in result["workers"].items():
        speed = f"{one['per_second']:.1f} JPEGs of a megapixel a second"
        thread = f"{one['thread_ms']:.2f} ms of each on the dispatching thread"
        lines.append(f"{workers} workers: {speed}, {thread}")
    return "\n".join(lines)
