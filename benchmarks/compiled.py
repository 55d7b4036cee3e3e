"""What XLA's own TPU and GPU compilers make of our programs: no device is needed, and nothing is timed.

    python -m benchmarks compiled --preset=3b --device=v5e-8 --job=train --weights=bf16     one cell
    python -m benchmarks compiled                  all cells that benchmarks/results/compiled does not hold yet
    python -m benchmarks compiled --table          the table in docs/performance.md, from what is there

A cell takes minutes to compile, and is written as soon as it is known.
"""

import argparse
import itertools
import re
import subprocess
import time
from pathlib import Path
from typing import Any

from benchmarks.data import as_long_as_snli
from benchmarks.flops import Work, forward_flops, step_flops
from benchmarks.presets import PRESETS
from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json, write_json

PRESET_NAMES = ("3b", "7b")
DEVICES = ("v5e-8", "v5e-16", "v6e-8", "v5p-8", "H200-1")
JOBS = ("train", "encode", "vision")
WEIGHTS = ("bf16", "int8", "nf4")
RECORDS, RANK = 768, 64  # of the paper's recipe
ENCODED = 16_384  # tokens of a device in one forward pass
IMAGES, SIDE = 8, 72  # of a device; patches on each side of an image of a megapixel
VISION = {  # Qwen2.5-VL's
    "depth": 32, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}  # fmt: skip
DOCS = Path(__file__).parents[1] / "docs" / "performance.md"
BEGIN, END = "<!-- python -m benchmarks compiled -->", "<!-- end -->"


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`compiled`."""
    parser = kinds.add_parser(
        "compiled", parents=[common], help="memory, work and modelled time by XLA's compilers"
    )
    for name, values in (("preset", PRESET_NAMES), ("job", JOBS), ("weights", WEIGHTS)):
        parser.add_argument(f"--{name}", nargs="*", default=values, choices=values)
    parser.add_argument(
        "--device", nargs="*", default=DEVICES, help="kind-count, as v5e-8 or H100-4"
    )
    parser.add_argument(
        "--fsdp", type=int, default=0, help="ways a weight is split; 0: all devices"
    )
    parser.add_argument("--remat", default="full", help="of training")
    parser.add_argument(
        "--tokens", type=int, default=0, help="of a text, all alike; 0: as long as SNLI's"
    )
    parser.add_argument(
        "--folder", type=Path, default=Path("benchmarks/results/compiled"), help="of the cells"
    )
    parser.add_argument("--again", action="store_true", help="compile also what is there")
    parser.add_argument(
        "--text", action="store_true", help="keep the program's text beside the JSON"
    )
    parser.add_argument(
        "--table", action="store_true", help="compile nothing; write the table into the docs"
    )
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile each cell that is not there."""
    import jax

    write_table = args.table is True
    args.table = table  # the flag has the name of what prints
    if write_table:
        return {"docs": _write_table(args.folder)}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # nothing here could run what it would keep
    cells = []
    for preset, device, job, weights in itertools.product(
        args.preset, args.device, args.job, args.weights
    ):
        if job == "vision" and weights != "bf16":
            continue  # towers are never quantised
        name = "-".join([preset, device, job, weights, *_unusual(args, job)])
        file = args.folder / f"{name}.json"
        if args.again or not file.exists():
            print(name, flush=True)
            write_json(file, _cell(args, folder, preset, device, job, weights, file))
        cells.append(read_json(file))
    return {"cells": cells}


def _unusual(args: argparse.Namespace, job: str) -> list[str]:
    """What tells a cell from the usual one of its preset, device, job and weights."""
    said = [f"fsdp{args.fsdp}"] if args.fsdp else []
    if job == "train":
        said += [args.remat] if args.remat != "full" else []
        said += [f"tokens{args.tokens}"] if args.tokens else []
    return said


def _cell(
    args: argparse.Namespace,
    folder: Path,
    preset: str,
    device: str,
    job: str,
    weights: str,
    file: Path,
) -> dict[str, Any]:
    """Compile one program, and read it."""
    import jax

    from lco_jax import make_mesh
    from lco_jax.cost_model import hlo
    from lco_jax.cost_model.hardware import DEVICES as KINDS
    from lco_jax.cost_model.targets import missing, target
    from lco_jax.training.memory import GIB, peak_bytes

    kind, _, count = device.rpartition("-")
    if kind not in KINDS or not count.isdecimal():
        raise LcoError(f"--device={device}: it is KIND-COUNT, with a kind of: {', '.join(KINDS)}")
    hardware, count = KINDS[kind], int(count)
    if why := missing(hardware.backend):
        raise LcoError(f"--device={device}: {why}")
    made = target(hardware, count)
    fsdp = args.fsdp or count
    mesh = make_mesh(count // fsdp, fsdp, devices=made.devices)
    lower = {"train": _train, "encode": _encode, "vision": _vision}[job]
    lowered, useful, said = lower(args, folder, preset, weights, mesh)
    start = time.perf_counter()
    compiled = lowered.compile(made.options)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if args.text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".hlo").write_text(text)
    frames = (
        len(VISION["fullatt_block_indexes"]) / VISION["depth"]
    )  # blocks that attend to all of a picture
    profile = hlo.Program(text, RANK, taken=frames).profile(hardware)
    modelled = profile.seconds.total()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    )
    return {
        "preset": preset, "device": device, "job": job, "weights": weights, "fsdp": fsdp, **said,
        "peak_gib": peak_bytes(compiled) / GIB, "tflop": profile.flops / 1e12, "useful_tflop": useful / 1e12,
        "modelled_seconds": modelled, "useful_share_of_peak": useful / hardware.flops / modelled,
        "collectives": {
            name: {"count": int(n), "gb": profile.sent[name] / 1e9} for name, n in profile.count.most_common()
        },
        "launches": profile.launches, "unestimated": profile.unestimated,
        "seconds": {part: s for part, s in profile.seconds.most_common() if s > modelled / 1000},
        "compile_seconds": seconds, "jax": jax.__version__, "commit": commit.stdout.strip(),
    }  # fmt: skip


def _step(args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any) -> Any:
    """The paper's recipe on Qwen2.5-VL's geometry, as `lco_jax.plan` has it."""
    from lco_jax.checkpoint.hf import open_geometry
    from lco_jax.cost_model.program import Step, Workload, even
    from lco_jax.training import cli

    config = PRESETS[preset].config
    config["vision_config"] |= VISION
    write_json(folder / "config.json", config)
    flags = ["--config=configs/qwen2_5_vl_7b.py", f"--config.model.path={folder}"]
    flags += [f"--config.model.quantize={weights}"] if weights != "bf16" else []
    if args.tokens:
        workload = even((RECORDS, 3), args.tokens)
    else:
        layout = _layout(mesh)
        workload = Workload((RECORDS, 3), len(layout.prefix), lambda chunk, mesh: layout.floor)
    return Step(cli.parse(["compiled", *flags], "").config, open_geometry(folder), mesh, workload)


def _layout(mesh: Any) -> Any:
    """Streams as training plans them for batches of SNLI's lengths."""
    import numpy as np

    from lco_jax.checkpoint import builtin
    from lco_jax.core.packing import common_length
    from lco_jax.data import pipeline
    from lco_jax.data.layouts import floor_of
    from lco_jax.data.positions import line_positions
    from lco_jax.data.processor import Processor
    from lco_jax.data.tower_rows import Processed

    texts = as_long_as_snli()
    head = np.array(texts[0][0], np.int32)[
        : common_length(np.array(texts[0][0]), np.array(texts[1][1]))
    ]
    record, side = np.repeat(np.arange(RECORDS), 3), np.tile(np.arange(3), RECORDS)
    sample = []
    for batch in range(8):
        rows = [texts[(batch * RECORDS + i) % len(texts)] for i in range(RECORDS)]
        ids = [np.array(text, np.int32) for triplet in rows for text in triplet]
        inputs = [Processed(text, line_positions(0, len(text))) for text in ids]
        sample.append(
            pipeline.LocalBatch(inputs, record, side, np.arange(3 * RECORDS, dtype=np.int32))
        )
    return floor_of(sample, pipeline.Layout(RECORDS, 1, head), Processor(builtin.build()), mesh)


def _work(shape: Any) -> Work:
    return Work(
        shape.tokens * shape.chunks, sum(shape.rows.values()) * shape.chunks, dict(shape.rows)
    )


def _train(
    args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any
) -> tuple[Any, float, dict]:
    """A training step: (lowered, useful FLOPs of a device, what to say of it)."""
    step = _step(args, folder, preset, weights, mesh)
    shape = step.shape(0)
    useful = step_flops(step.checkpoint.config, RANK, _work(shape), "none")
    said = {
        "remat": args.remat,
        "tokens": shape.tokens,
        "rows": {str(k): n for k, n in shape.rows.items()},
    }
    return step.lower(args.remat, 0), useful, said


def _encode(
    args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any
) -> tuple[Any, float, dict]:
    """A forward pass of `encode`: a device has a stream of texts, what they share packed once."""
    import jax
    import numpy as np

    from lco_jax.core.packing import Shape, TokenSequence, pack_stream, width_of
    from lco_jax.core.sharding import ROWS, replicated, row_shards
    from lco_jax.data.positions import line_positions
    from lco_jax.models.decoder import pool
    from lco_jax.training.memory import abstract_tokens

    step = _step(args, folder, preset, weights, mesh)
    ids = [np.array(text, np.int32) for triplet in as_long_as_snli() for text in triplet]
    texts = [TokenSequence(text, line_positions(0, len(text))) for text in ids]
    count = max(
        n for n in range(8, len(texts), 8) if pack_stream(texts[:n], None).length <= ENCODED
    )
    shape = Shape(ENCODED, {width_of(max(map(len, texts[:count]))): count})
    place = jax.NamedSharding(mesh, jax.P(ROWS))
    tokens = abstract_tokens(shape, (row_shards(mesh),), None, place)
    decoder, params = step.decoder("none"), step.params["decoder"]
    run = jax.jit(
        lambda params, tokens: pool(decoder, params, tokens), out_shardings=replicated(mesh)
    )
    with jax.set_mesh(mesh):
        lowered = run.lower(params, tokens)
    said = {"tokens": shape.tokens, "rows": {str(k): n for k, n in shape.rows.items()}}
    return lowered, forward_flops(step.checkpoint.config, 0, _work(shape)), said


def _vision(
    args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any
) -> tuple[Any, float, dict]:
    """The vision tower over so many images of a megapixel a device."""
    import jax
    import jax.numpy as jnp

    from lco_jax.checkpoint.hf import abstract_params, tower_module
    from lco_jax.core.sharding import ROWS, row_shards, shardings, with_shardings
    from lco_jax.models.model import Model

    step = _step(args, folder, preset, weights, mesh)
    checkpoint, shards, patches = step.checkpoint, row_shards(mesh), SIDE**2
    tower = tower_module(checkpoint.backbone, "visual", checkpoint.towers["visual"], jnp.bfloat16)
    sizes = {"window_ids": (patches // 64, 64)}
    place = jax.NamedSharding(mesh, jax.P(ROWS))
    arguments = {}
    for name, one in tower.example().items():
        own = one.shape[1:] if name == "scale" else sizes.get(name, (patches, *one.shape[2:]))
        shape = IMAGES * shards, *own
        arguments[name] = jax.ShapeDtypeStruct(shape, one.dtype, sharding=place)
    params = {"visual": abstract_params(tower, jnp.bfloat16)}
    params = with_shardings(params, shardings(params, mesh))["visual"]
    model = Model(step.decoder(), {"visual": tower})
    run = jax.jit(lambda p, x: model.tower_tokens("visual", p, x, shards), out_shardings=place)
    with jax.set_mesh(mesh):
        lowered = run.lower(params, arguments)
    return (
        lowered,
        _vision_flops(checkpoint.towers["visual"], patches),
        {"images": IMAGES, "patches": patches},
    )


def _vision_flops(c: Any, patches: int) -> float:
    """Of a device's images: matrices, attention within windows or frames, the merger."""
    values = c.in_channels * c.temporal_patch_size * c.patch_size**2
    a_patch = 2 * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size) * c.depth
    pairs = len(c.full_blocks) * patches + (c.depth - len(c.full_blocks)) * 64
    wide = c.spatial_merge_size**2 * c.hidden_size
    merger = 2 * wide * (wide + c.out_hidden_size) / c.spatial_merge_size**2
    return (
        IMAGES
        * patches
        * (a_patch + 4 * pairs * c.hidden_size + 2 * values * c.hidden_size + merger)
    )


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    if "docs" in result:
        return result["docs"]
    lines = ["modelled by the compiler, not timed"]
    for cell in result["cells"]:
        lines += ["", "  ".join(f"{key} {cell[key]}" for key in KEYS if key in cell)]
        lines += [
            f"peak {cell['peak_gib']:.2f} GiB; {cell['tflop']:.1f} TFLOP executed, {cell['useful_tflop']:.1f} useful; "
            f"{cell['modelled_seconds']:.3f} s modelled; compiled in {cell['compile_seconds']:.0f} s"
        ]
        if cell["unestimated"]:
            lines += [f"  {cell['unestimated']} operations without an estimate are not in it"]
        lines += [
            f"  {part:36}{s:9.4f} s {s / cell['modelled_seconds']:7.1%}"
            for part, s in cell["seconds"].items()
        ]
        lines += [
            f"  {kind:36}{x['count']:9,} × {x['gb']:10.3f} GB"
            for kind, x in cell["collectives"].items()
        ]
    return "\n".join(lines)


KEYS = ("preset", "device", "job", "weights", "fsdp", "remat", "tokens", "images")


def _write_table(folder: Path) -> str:
    """The cells as a table between two marks of the docs, which it returns."""
    head = [
        "model",
        "on",
        "program",
        "weights",
        "GiB",
        "TFLOP",
        "useful",
        "modelled s",
        "collectives",
        "most of it",
    ]
    rows = [head, ["---"] * len(head)]
    order = {name: i for i, name in enumerate((*PRESET_NAMES, *DEVICES, *JOBS, *WEIGHTS))}
    cells = [read_json(file) for file in sorted(folder.glob("*.json"))]
    for cell in sorted(
        cells,
        key=lambda x: [order.get(x[key], 99) for key in ("job", "preset", "device", "weights")],
    ):
        rows.append(_row(cell))
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    found = DOCS.read_text(encoding="utf-8")
    written = f"{BEGIN}\n\n" + "\n".join(lines) + f"\n\n{END}"
    DOCS.write_text(
        re.sub(f"{BEGIN}.*?{END}", lambda _: written, found, flags=re.DOTALL), encoding="utf-8"
    )
    return "\n".join(lines)


def _row(cell: dict[str, Any]) -> list[str]:
    total = cell["modelled_seconds"]
    parts = ", ".join(f"{part} {s / total:.0%}" for part, s in list(cell["seconds"].items())[:3])
    sent = ", ".join(
        f"{x['count']:,} {kind} ({x['gb']:.1f} GB)" for kind, x in cell["collectives"].items()
    )
    modelled = f"{total:.3f}" + (
        f" and {cell['unestimated']} operations" if cell["unestimated"] else ""
    )
    program = cell["job"] + (f", {cell['remat']}" if "remat" in cell else "")
    return [
        cell["preset"], f"{cell['device']}, fsdp {cell['fsdp']}", program, cell["weights"], f"{cell['peak_gib']:.2f}",
        f"{cell['tflop']:.1f}", f"{cell['useful_tflop']:.1f}", modelled, sent or "none", parts,
    ]  # fmt: skip
