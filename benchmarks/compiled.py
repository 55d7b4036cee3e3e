"""What XLA's TPU and GPU compilers make of our programs: no device is needed, nothing is timed.

    python -m benchmarks compiled --preset=3b --device=v5e-8 --job=train --weights=bf16    one cell
    python -m benchmarks compiled            all cells that benchmarks/results/compiled lacks
    python -m benchmarks compiled --table    the table in docs/performance.md, from what is there

A cell takes minutes to compile, and is written as soon as it is known.
"""

import argparse
import itertools
import subprocess
import time
from pathlib import Path
from typing import Any, NamedTuple

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


class Cell(NamedTuple):
    """A cell's program before it is compiled.

    useful: FLOPs of a device that are worth computing. sizes: what the cell reports of its batch.
    """

    lowered: Any
    useful: float
    sizes: dict[str, Any]


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile each cell that is not there."""
    import jax

    write_table = args.table is True
    args.table = table  # the flag has the name of the function that prints
    if write_table:
        return {"docs": _write_table(args.folder)}
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_enable_compilation_cache", False)  # programs are for no machine here
    cells = []
    for asked in itertools.product(args.preset, args.device, args.job, args.weights):
        preset, device, job, weights = asked
        if job == "vision" and weights != "bf16":
            continue  # towers are never quantised
        name = "-".join([*asked, *_unusual(args, job)])
        file = args.folder / f"{name}.json"
        if args.again or not file.exists():
            print(name, flush=True)
            write_json(file, _cell(args, folder, preset, device, job, weights, file))
        cells.append(read_json(file))
    return {"cells": cells}


def _unusual(args: argparse.Namespace, job: str) -> list[str]:
    """The settings of a cell that are not the usual ones, for its name."""
    settings = [f"fsdp{args.fsdp}"] if args.fsdp else []
    if job == "train" and args.remat != "full":
        settings.append(args.remat)
    if job == "train" and args.tokens:
        settings.append(f"tokens{args.tokens}")
    return settings


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
    from lco_jax.cost_model.profile import profile
    from lco_jax.cost_model.targets import target
    from lco_jax.training.memory import GIB, peak_bytes

    hardware, count = _hardware(device)
    made = target(hardware, count)
    fsdp = args.fsdp or count
    mesh = make_mesh(count // fsdp, fsdp, devices=made.devices)
    lower = {"train": _train, "encode": _encode, "vision": _vision}[job]
    cell = lower(args, folder, preset, weights, mesh)
    start = time.perf_counter()
    compiled = cell.lowered.compile(made.options)
    seconds = time.perf_counter() - start
    text = compiled.as_text()
    if args.text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.with_suffix(".hlo").write_text(text)
    full_blocks = len(VISION["fullatt_block_indexes"]) / VISION["depth"]  # attend to all of a frame
    found = profile(text, hardware, RANK, taken=full_blocks)
    return {
        "preset": preset,
        "device": device,
        "job": job,
        "weights": weights,
        "fsdp": fsdp,
        **cell.sizes,
        "peak_gib": peak_bytes(compiled) / GIB,
        **_numbers(found, cell.useful, hardware),
        "compile_seconds": seconds,
        "jax": jax.__version__,
        "commit": _commit(),
    }


def _hardware(device: str) -> tuple[Any, int]:
    """The hardware and the number of KIND-COUNT."""
    from lco_jax.cost_model import targets
    from lco_jax.cost_model.hardware import DEVICES as KINDS

    kind, _, count = device.rpartition("-")
    if kind not in KINDS or not count.isdecimal():
        raise LcoError(f"--device={device}: it is KIND-COUNT, with a kind of: {', '.join(KINDS)}")
    reason = targets.missing(KINDS[kind].backend)
    if reason:
        raise LcoError(f"--device={device}: {reason}")
    return KINDS[kind], int(count)


def _numbers(found: Any, useful: float, hardware: Any) -> dict[str, Any]:
    """The numbers of a program's profile."""
    modelled = found.seconds.total()
    collectives = {}
    for kind, count in found.count.most_common():
        collectives[kind] = {"count": int(count), "gb": found.sent[kind] / 1e9}
    seconds = found.seconds.most_common()
    return {
        "tflop": found.flops / 1e12,
        "useful_tflop": useful / 1e12,
        "modelled_seconds": modelled,
        "useful_share_of_peak": useful / hardware.flops / modelled,
        "collectives": collectives,
        "launches": found.launches,
        "unestimated": found.unestimated,
        "seconds": {part: s for part, s in seconds if s > modelled / 1000},
    }


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


# ---- the programs


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
        branches = layout.prefix.branches
        workload = Workload((RECORDS, 3), branches, lambda chunk, mesh: layout.floor)
    return Step(cli.parse(["compiled", *flags], "").config, open_geometry(folder), mesh, workload)


def _layout(mesh: Any) -> Any:
    """Streams as training plans them for batches of SNLI's lengths."""
    import numpy as np

    from lco_jax.checkpoint import builtin
    from lco_jax.core.prefixes import Prefixes, common_length
    from lco_jax.data import pipeline
    from lco_jax.data.layouts import floor_of
    from lco_jax.data.positions import line_positions
    from lco_jax.data.processor import Processor
    from lco_jax.data.records import TEXT
    from lco_jax.data.tower_rows import Processed

    triplets = [[np.array(ids, np.int32) for ids in triplet] for triplet in as_long_as_snli()]
    first, second = triplets[0][0], triplets[1][1]
    prefix = Prefixes.of(first[: common_length(first, second)])
    record, side = np.repeat(np.arange(RECORDS), 3), np.tile(np.arange(3), RECORDS)
    kinds = np.full(3 * RECORDS, TEXT, np.int32)
    teacher = np.full(3 * RECORDS, np.nan, np.float32)
    sample = []
    for start in range(0, 8 * RECORDS, RECORDS):
        batch = [triplets[i % len(triplets)] for i in range(start, start + RECORDS)]
        inputs = [Processed(x, line_positions(0, len(x))) for triplet in batch for x in triplet]
        ids = np.arange(3 * RECORDS, dtype=np.int32)
        sample.append(pipeline.LocalBatch(inputs, record, side, ids, kinds, teacher))
    layout = pipeline.Layout(RECORDS, 1, prefix)
    return floor_of(sample, layout, Processor(builtin.build()), mesh)


def _work(shape: Any) -> Work:
    tokens, rows = shape.tokens * shape.chunks, sum(shape.rows.values()) * shape.chunks
    return Work(tokens, rows, dict(shape.rows))


def _sizes(shape: Any) -> dict[str, Any]:
    rows = {str(width): count for width, count in shape.rows.items()}
    return {"tokens": shape.tokens, "rows": rows}


def _train(args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any) -> Cell:
    """A training step."""
    step = _step(args, folder, preset, weights, mesh)
    shape = step.shape(0)
    useful = step_flops(step.checkpoint.config, RANK, _work(shape), "none")
    return Cell(step.lower(args.remat, 0), useful, {"remat": args.remat, **_sizes(shape)})


def _encode(args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any) -> Cell:
    """A forward pass of `encode`: a device has a stream of texts, whose prefix is packed once."""
    import jax

    from lco_jax.core.sharding import ROWS, replicated, row_shards
    from lco_jax.models.pooling import pool
    from lco_jax.training.memory import abstract_tokens

    step = _step(args, folder, preset, weights, mesh)
    shape = _encoded_shape()
    sharding = jax.NamedSharding(mesh, jax.P(ROWS))
    tokens = abstract_tokens(shape, (row_shards(mesh),), None, sharding)
    decoder = step.decoder("none")

    def run(params: Any, tokens: Any) -> Any:
        return pool(decoder, params, tokens)

    with jax.set_mesh(mesh):
        jitted = jax.jit(run, out_shardings=replicated(mesh))
        lowered = jitted.lower(step.params["decoder"], tokens)
    useful = forward_flops(step.checkpoint.config, 0, _work(shape))
    return Cell(lowered, useful, _sizes(shape))


def _encoded_shape() -> Any:
    """A stream of `ENCODED` tokens with as many of SNLI's texts as it holds, in eights."""
    import numpy as np

    from lco_jax.core.packing import TokenSequence, pack_stream
    from lco_jax.core.stream_shapes import Shape, width_of
    from lco_jax.data.positions import line_positions

    ids = [np.array(text, np.int32) for triplet in as_long_as_snli() for text in triplet]
    texts = [TokenSequence(text, line_positions(0, len(text))) for text in ids]
    counts = range(8, len(texts), 8)
    count = max(n for n in counts if pack_stream(texts[:n], None).length <= ENCODED)
    return Shape(ENCODED, {width_of(max(map(len, texts[:count]))): count})


def _vision(args: argparse.Namespace, folder: Path, preset: str, weights: str, mesh: Any) -> Cell:
    """The vision tower over `IMAGES` images of a megapixel a device."""
    import jax
    import jax.numpy as jnp

    from lco_jax.checkpoint.shapes import abstract_params, tower_module
    from lco_jax.core.sharding import ROWS, row_shards, shardings, with_shardings
    from lco_jax.models.model import Model

    step = _step(args, folder, preset, weights, mesh)
    config = step.checkpoint.towers["visual"]
    tower = tower_module(step.checkpoint.backbone, "visual", config, jnp.bfloat16)
    model = Model(step.decoder(), {"visual": tower})
    params = {"visual": abstract_params(tower, jnp.bfloat16)}
    params = with_shardings(params, shardings(params, mesh))["visual"]
    shards, sharding = row_shards(mesh), jax.NamedSharding(mesh, jax.P(ROWS))
    patches = SIDE**2

    def run(params: Any, images: Any) -> Any:
        return model.tower_tokens("visual", params, images, shards)

    images = _images(tower.example(), patches, IMAGES * shards, sharding)
    with jax.set_mesh(mesh):
        lowered = jax.jit(run, out_shardings=sharding).lower(params, images)
    return Cell(lowered, _vision_flops(config, patches), {"images": IMAGES, "patches": patches})


def _images(example: dict[str, Any], patches: int, count: int, sharding: Any) -> dict[str, Any]:
    """What the tower reads of `count` images of so many patches, as shapes."""
    import jax

    arrays = {}
    for name, one in example.items():
        sizes = patches, *one.shape[2:]
        if name == "scale":
            sizes = one.shape[1:]
        elif name == "window_ids":
            sizes = patches // 64, 64
        arrays[name] = jax.ShapeDtypeStruct((count, *sizes), one.dtype, sharding=sharding)
    return arrays


def _vision_flops(c: Any, patches: int) -> float:
    """FLOPs of a device's images: matrices, attention in windows or frames, the merger."""
    patch_values = c.in_channels * c.temporal_patch_size * c.patch_size**2
    matrices = c.depth * (4 * c.hidden_size**2 + 3 * c.hidden_size * c.intermediate_size)
    full = len(c.full_blocks)
    pairs = full * patches + (c.depth - full) * 64
    group = c.spatial_merge_size**2
    wide = group * c.hidden_size
    merger = wide * (wide + c.out_hidden_size) / group
    a_patch = matrices + 2 * pairs * c.hidden_size + patch_values * c.hidden_size + merger
    return 2.0 * IMAGES * patches * a_patch


# ---- tables


def table(result: dict[str, Any]) -> str:
    """A result as lines for people."""
    if "docs" in result:
        return result["docs"]
    lines = ["modelled by the compiler, not timed"]
    for cell in result["cells"]:
        lines += ["", *_lines(cell)]
    return "\n".join(lines)


def _lines(cell: dict[str, Any]) -> list[str]:
    keys = ("preset", "device", "job", "weights", "fsdp", "remat", "tokens", "images")
    total = cell["modelled_seconds"]
    lines = [
        "  ".join(f"{key} {cell[key]}" for key in keys if key in cell),
        f"peak {cell['peak_gib']:.2f} GiB; {cell['tflop']:.1f} TFLOP executed, "
        f"{cell['useful_tflop']:.1f} useful; {total:.3f} s modelled; "
        f"compiled in {cell['compile_seconds']:.0f} s",
    ]
    if cell["unestimated"]:
        lines.append(f"  {cell['unestimated']} operations without an estimate are not in it")
    for part, seconds in cell["seconds"].items():
        lines.append(f"  {part:36}{seconds:9.4f} s {seconds / total:7.1%}")
    for kind, sent in cell["collectives"].items():
        lines.append(f"  {kind:36}{sent['count']:9,} × {sent['gb']:10.3f} GB")
    return lines


HEAD = (
    "model", "on", "program", "weights", "GiB", "TFLOP", "useful", "modelled s", "collectives",
    "most of it",
)  # fmt: skip


def _write_table(folder: Path) -> str:
    """Write the cells as a table between two marks of the docs, and return it."""
    order = {name: i for i, name in enumerate((*PRESET_NAMES, *DEVICES, *JOBS, *WEIGHTS))}

    def position(cell: dict[str, Any]) -> list[int]:
        return [order.get(cell[key], 99) for key in ("job", "preset", "device", "weights")]

    cells = [read_json(file) for file in sorted(folder.glob("*.json"))]
    rows = [list(HEAD), ["---"] * len(HEAD)]
    rows += [_row(cell) for cell in sorted(cells, key=position)]
    lines = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    DOCS.write_text(f"{before}{BEGIN}\n\n{lines}\n\n{END}{after}", encoding="utf-8")
    return lines


def _row(cell: dict[str, Any]) -> list[str]:
    total = cell["modelled_seconds"]
    most = list(cell["seconds"].items())[:3]
    sent = cell["collectives"].items()
    collectives = [f"{x['count']:,} {kind} ({x['gb']:.1f} GB)" for kind, x in sent]
    modelled = f"{total:.3f}"
    if cell["unestimated"]:
        modelled += f" and {cell['unestimated']} operations"
    program = f"{cell['job']}, {cell['remat']}" if "remat" in cell else cell["job"]
    return [
        cell["preset"],
        f"{cell['device']}, fsdp {cell['fsdp']}",
        program,
        cell["weights"],
        f"{cell['peak_gib']:.2f}",
        f"{cell['tflop']:.1f}",
        f"{cell['useful_tflop']:.1f}",
        modelled,
        ", ".join(collectives) or "none",
        ", ".join(f"{part} {seconds / total:.0%}" for part, seconds in most),
    ]
