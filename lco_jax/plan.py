"""What a training run would take on machines that are not here: memory, time and money, before any is rented.

    python -m lco_jax.plan --config=configs/qwen2_5_vl_7b.py --device=v5e --mesh=1,16,1 [--config.KEY=VALUE …]

The step of `lco_jax.train` is compiled for as many pretended devices as the mesh has; nothing is loaded and nothing
allocated, and of the checkpoint a config.json suffices. docs/planning.md says what each number is, and what it is not.
"""

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, abstract_params, open_geometry
from lco_jax.core.buckets import on_disk
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import write_json
from lco_jax.core.packing import Shape
from lco_jax.core.sharding import AXES, make_mesh
from lco_jax.data import plan as data_plan
from lco_jax.job import batches_of, open_data, say
from lco_jax.models.config import DecoderConfig
from lco_jax.planning import hlo
from lco_jax.planning.hardware import DEVICES, Hardware
from lco_jax.planning.program import Step, Workload, even
from lco_jax.training import cli
from lco_jax.training.memory import GIB, MARGIN
from lco_jax.training.run import check_config

TOKENS = 64  # of a text, where there are no data to tell
# what a layer's backward pass computes once more, in forward passes (of Qwen2.5-7B)
AGAIN = {"full": 0.71, "attention": 0.64, "gate": 0.35, "mlp": 0.06, "none": 0.0}


def plan(
    config: ConfigDict, device: Hardware, devices: int, sizes: tuple[int, ...] | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """What a step takes on `devices` of a kind, of which jax must have as many to pretend with.

    sizes: of the mesh, by default the suggested. tokens: of a text, by default as the data are. Raises where the
    configuration is wrong; a result without "memory" does not fit in any way that `train` would choose.
    """
    check_config(config)
    checkpoint = open_geometry(config.model.path)
    workload, assumed = _workload(config, checkpoint, tokens)
    result: dict[str, Any] = {"device": device.name, "devices": devices, "mesh": sizes, "assumed": assumed}

    @cache
    def on(sizes: tuple[int, ...]) -> Step:
        return Step(config, checkpoint, make_mesh(*sizes, devices=jax.devices()[:devices]), device, workload)

    chunk_tokens, suggested, why = config.train.chunk_tokens, [], ""
    for chunk in (0, -1) if chunk_tokens < 0 else (chunk_tokens,):  # chunks only where no mesh holds the batch whole
        for candidate in () if suggested else _meshes(devices, checkpoint.config.num_kv_heads):
            try:
                choice = on(candidate).choose(chunk)
                seconds = _cheap_seconds(on(candidate), choice.remat, choice.chunk_tokens)
                suggested.append((seconds, {"mesh": candidate, **choice._asdict()}))
            except LcoError as error:
                why = str(error)
    if suggested:
        result["suggested"] = min(suggested, key=lambda x: x[0])[1]
        result["mesh"] = sizes = sizes or result["suggested"]["mesh"]
    elif sizes is None:
        return result | {"does_not_fit": why}
    step, chosen = on(sizes), (config.model.remat, chunk_tokens)
    try:
        chosen = step.choose(chunk_tokens)[:2]
    except LcoError as error:
        if config.model.remat == "auto" or chunk_tokens < 0:  # `train` would not begin
            return result | {"does_not_fit": str(error)}
    say(f"compiling the step for {devices} devices, remat {chosen[0]}, chunks of {chosen[1] or 'all'} tokens …")
    start = time.perf_counter()
    memory, counts = step.compile(*chosen)
    result |= {"remat": chosen[0], "compile_seconds": time.perf_counter() - start}
    return result | _costs(step, memory, step.shape(chosen[1]), counts)


def _workload(config: ConfigDict, checkpoint: Checkpoint, tokens: int | None) -> tuple[Workload, str]:
    """What a step is given, and where that is from."""
    why = ""
    if tokens is None:
        try:
            sources, processor, layout = open_data(config, checkpoint)
            if any(source.modalities - {"text"} for source in sources.values()):
                raise LcoError("there are media in them, and towers are not planned")
            sample = data_plan.draw(batches_of(config, sources, layout, processor), layout, media=False)
        except LcoError as error:
            tokens, why = TOKENS, f" (not as the data are: {error})"
        else:

            def shape(chunk_tokens: int, mesh: jax.sharding.Mesh) -> Shape:
                laid = replace(layout, chunk_tokens=chunk_tokens)
                return data_plan.plan(sample, laid, processor, mesh, config.data.max_length).floor

            return Workload((layout.batch_size, layout.sides), len(layout.head), shape), "shapes as the data are"
    negatives = config.data.max_negatives
    sides = config.train.batch_size, 2 + (1 if negatives < 0 else negatives)
    return even(sides, tokens), f"{sides[1]} texts a record of {tokens} tokens each{why}"


def _meshes(devices: int, kv_heads: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) of so many devices whose tensor axis splits the heads."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in (n for n in divisors if kv_heads % n == 0):
        for fsdp in divisors:
            if devices % (tensor * fsdp) == 0:
                yield devices // (tensor * fsdp), fsdp, tensor


@cache
def _numbers(config: DecoderConfig) -> int:
    """Weights of a layer."""
    return sum(x.size for x in jax.tree.leaves(abstract_params(config)["layers"])) // config.num_layers


def _useful_flops(step: Step, shape: Shape) -> float:
    """A device's, forward and backward, without the last layer (which few tokens pass), attention and adapters."""
    c, full = step.checkpoint.config, step.config.tune.decoder == "full"
    tokens = shape.tokens * shape.chunks / step.mesh.shape["tensor"]
    return (6 if full else 4) * _numbers(c) * (c.num_layers - 1) * tokens


def _cheap_seconds(step: Step, remat: str, chunk_tokens: int) -> float:
    """A step without compiling it, to tell meshes apart: products, weights gathered along fsdp in every pass of every
    chunk, and activations summed along tensor."""
    mesh, c, shape = step.mesh.shape, step.checkpoint.config, step.shape(chunk_tokens)
    passes = 2 + (shape.chunks > 1)
    flops = _useful_flops(step, shape) * (passes + AGAIN[remat]) / 2
    layers = jax.tree.leaves(step.params["decoder"]["layers"])
    gathered = sum(x.size * x.dtype.itemsize for x in layers) / mesh["tensor"]
    summed = 4 * shape.tokens * shape.chunks * c.hidden_size * c.num_layers * step.decoder().dtype.itemsize
    sent = passes * (shape.chunks * gathered * (1 - 1 / mesh["fsdp"]) + summed * (1 - 1 / mesh["tensor"]))
    device = step.hardware
    return flops / device.flops + sent / (device.links if step.mesh.size <= device.domain else device.network)


def _costs(step: Step, memory: dict[str, int], shape: Shape, counts: hlo.Counts) -> dict[str, Any]:
    """Memory, work, time and money of a compiled step."""
    device, total, room = step.hardware, sum(memory.values()), int(step.hardware.memory * (1 - MARGIN))
    seconds = {
        "products": (counts.flops["default"] + device.float32 * counts.flops["highest"]) / device.flops,
        "memory": counts.moved / device.bandwidth,
        "collectives": sum(n / (device.network if far else device.links) for (*_, far), n in counts.sent.items()),
    }
    sent: Counter[str] = Counter()
    for (kind, axes, _), size in counts.sent.items():
        sent[f"{kind} {axes}"] += size
    times = max(seconds.values()), sum(seconds.values())
    return {
        "memory": memory, "memory_total": total, "memory_room": room, "fits": total <= room,
        "tokens": shape.tokens, "chunks": shape.chunks, "flops": counts.flops.total(), "bytes_moved": counts.moved,
        "bytes_sent": dict(sent.most_common()), "seconds": seconds, "step_seconds": times,
        "usd_per_1000_steps": [x / 3.6 * device.price * step.mesh.size for x in times],
        "records_per_second": step.workload.sides[0] / times[0],
        "mfu_bound": _useful_flops(step, shape) / device.flops / times[0],
    }  # fmt: skip


def table(r: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [f"{r['devices']} × {r['device']}, {r['assumed']}"]
    if "memory" in r:
        mesh = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, r["mesh"], strict=True))
        lines += [f"mesh {mesh}; remat {r['remat']}; chunks of a device: {r['chunks']} of {r['tokens']:,} tokens", ""]
        rows = {**r["memory"], f"memory, of {r['memory_room'] / GIB:.2f} GiB": r["memory_total"]}
        lines += [f"{kind:34}{size / GIB:10.2f} GiB" for kind, size in rows.items()]
        sent, seconds = sum(r["bytes_sent"].values()), r["seconds"]
        lines += ["", f"{'products':34}{r['flops'] / 1e12:10.2f} TFLOP {seconds['products']:9.4f} s"]
        lines += [f"{'bytes that products move':34}{r['bytes_moved'] / 1e9:10.2f} GB {seconds['memory']:12.4f} s"]
        lines += [f"{'bytes sent':34}{sent / 1e9:10.2f} GB {seconds['collectives']:12.4f} s"]
        lines += [f"  {kind:32}{size / 1e9:10.2f} GB" for kind, size in r["bytes_sent"].items() if size > sent / 1000]
        (least, most), (cheap, dear) = r["step_seconds"], r["usd_per_1000_steps"]
        lines += ["", f"a step: {least:.3g} s if all overlaps, {most:.3g} s if nothing does"]
        lines += [f"at best {r['records_per_second']:,.0f} records/s, MFU {r['mfu_bound']:.0%}"]
        lines += [f"1,000 steps: {cheap:.2f} to {dear:.2f} USD", ""]
    lines += ["it fits" if r.get("fits") else f"does not fit: {r.get('does_not_fit', 'it takes more than there is')}"]
    if s := r.get("suggested"):
        chunk = f"chunks of {s['chunk_tokens']:,} tokens" if s["chunk_tokens"] else "the batch in one chunk"
        need = f"about {s['need'] / GIB:.1f} of {s['memory'] / GIB:.1f} GiB"
        mesh = ",".join(map(str, s["mesh"]))
        return "\n".join([*lines, f"suggested: --mesh={mesh}, remat {s['remat']}, {chunk}: {need}, not compiled"])
    return "\n".join([*lines, f"no mesh of {r['devices']} × {r['device']} holds it: take more, or quantize the model"])


def _whole(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(map(_whole, text.split(",")))
    if len(sizes) != len(AXES):
        raise argparse.ArgumentTypeError(f"{text} must be three sizes, DATA,FSDP,TENSOR")
    return sizes


def main() -> int:
    """Parse the command line, pretend to have the devices, plan, print."""
    parser = argparse.ArgumentParser("lco_jax.plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--device", required=True, choices=DEVICES)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mesh", type=_sizes, help="sizes along data, fsdp and tensor, as 1,16,1")
    where.add_argument("--devices", type=_whole, help="plan on the suggested mesh")
    parser.add_argument("--tokens_per_text", type=_whole, help="prompt included; by default as the data are")
    parser.add_argument("--price", type=float, help="USD an hour and device, in the place of the list's")
    parser.add_argument("--json", type=on_disk, help="a file for the numbers")
    args, rest = parser.parse_known_args()
    devices = args.devices or math.prod(args.mesh)
    device = DEVICES[args.device]
    device = device if args.price is None else replace(device, price=args.price)
    config = cli.parse([sys.argv[0], *rest], __doc__).config
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled is for no machine here
    result = plan(config, device, devices, args.mesh, args.tokens_per_text)
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    run_main(main)
