"""What a training run would take on machines that are not here: memory, time and money, before any is rented.

    python -m lco_jax.plan --config=configs/qwen2_5_vl_7b.py --device=v5e --mesh=1,16,1 [--config.KEY=VALUE …]

The step of `lco_jax.train` is compiled for as many pretended devices as the mesh has; nothing is loaded and nothing
allocated, and of the checkpoint a config.json suffices. docs/planning.md says what each number is, and what it is not.
"""

import math
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, open_geometry
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import write_json
from lco_jax.core.packing import Shape
from lco_jax.core.sharding import AXES, make_mesh
from lco_jax.data import plan as data_plan
from lco_jax.job import batches_of, open_data, say
from lco_jax.planning import hardware, program
from lco_jax.planning.flops import Work, forward_flops, step_flops
from lco_jax.planning.hardware import Hardware
from lco_jax.training import cli
from lco_jax.training.memory import GIB, MARGIN, Choice
from lco_jax.training.run import check_config

TOKENS = 64  # of a text, where there are no data to tell
FLAGS = {
    "device": f"what to run on: {', '.join(hardware.DEVICES)}",
    "mesh": "devices along data, fsdp and tensor, as 1,16,1; without it, --devices and the mesh that is suggested",
    "devices": "how many, where there is no --mesh",
    "tokens_per_text": f"of a text, prompt included; by default as the data are, or {TOKENS} where they cannot be read",
    "price": "USD an hour and device, in the place of the list's",
    "json": "a file for the numbers",
}


def plan(
    config: ConfigDict, device: Hardware, devices: int, sizes: tuple[int, ...] | None = None, tokens: int | None = None
) -> dict[str, Any]:
    """What a step takes on `devices` of a kind. sizes: of the mesh, by default the suggested; tokens: of a text.

    jax must have as many devices. Raises where the configuration is wrong or no mesh holds it.
    """
    check_config(config)
    checkpoint = open_geometry(config.model.path)
    workload, assumed = _workload(config, checkpoint, tokens)
    step = lambda sizes: program.Step(config, checkpoint, _mesh(sizes), device, workload)  # noqa: E731
    found: list[tuple[float, tuple[int, ...], Choice]] = []
    for candidate in _meshes(devices, checkpoint.config.num_kv_heads):
        try:
            choice = step(candidate).choose()
        except LcoError:
            continue
        found.append((_cheap_seconds(step(candidate), choice), candidate, choice))
    best = min(found, default=None)
    result: dict[str, Any] = {"device": device.name, "devices": devices, "assumed": assumed}
    if best is not None:
        seconds, mesh, choice = best
        result["suggested"] = {"mesh": mesh, **choice._asdict(), "seconds": seconds}
    sizes = sizes or (best and best[1])
    if sizes is None:
        raise LcoError(
            f"no mesh of {devices} × {device.name} holds this step, not even in chunks; take more devices, or quantize "
            "the model (config.model.quantize)"
        )
    result["mesh"] = sizes
    try:
        choice = step(sizes).choose()
        remat, chunk_tokens = choice.remat, choice.chunk_tokens
    except LcoError as error:
        result["does_not_fit"] = str(error)
        automatic = config.model.remat == "auto" or config.train.chunk_tokens < 0
        if automatic:  # there is nothing that `train` would choose
            return result
        remat, chunk_tokens = config.model.remat, config.train.chunk_tokens
    say(f"compiling the step for {devices} devices, remat {remat}, chunks of {chunk_tokens or 'all'} tokens …")
    start = time.perf_counter()
    compiled = step(sizes).compile(remat, chunk_tokens)
    result |= {"remat": remat, "chunk_tokens": chunk_tokens, "compile_seconds": time.perf_counter() - start}
    return result | _costs(step(sizes), compiled)


def _workload(config: ConfigDict, checkpoint: Checkpoint, tokens: int | None) -> tuple[program.Workload, str]:
    """What a step is given, and a sentence of where that is from."""
    batch_size, negatives = config.train.batch_size, config.data.max_negatives
    if tokens is None:
        try:
            sources, processor, layout = open_data(config, checkpoint)
            if media := sorted({kind for source in sources.values() for kind in source.modalities} - {"text"}):
                raise LcoError(f"they hold {media[0]}, and towers are not planned")
            sample = data_plan.draw(batches_of(config, sources, layout, processor), layout, media=False)
        except LcoError as error:
            tokens, why = TOKENS, f" (the data cannot be read: {error})"
        else:

            def shape(chunk_tokens: int, mesh: jax.sharding.Mesh) -> Shape:
                laid = replace(layout, chunk_tokens=chunk_tokens)
                return data_plan.plan(sample, laid, processor, mesh, config.data.max_length).floor

            sides = batch_size, layout.sides
            return program.Workload(sides, len(layout.head), shape), "shapes planned from the data"
    else:
        why = ""
    sides = batch_size, 2 + (1 if negatives < 0 else negatives)
    return program.even(sides, tokens), f"{sides[1]} texts a record, {tokens} tokens each{why}"


def _mesh(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    return make_mesh(*sizes, devices=jax.devices()[: math.prod(sizes)])


def _meshes(devices: int, kv_heads: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) of so many devices whose tensor axis splits the heads."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in divisors:
        for fsdp in divisors if kv_heads % tensor == 0 else ():
            if devices % (tensor * fsdp) == 0:
                yield devices // (tensor * fsdp), fsdp, tensor


def _work(shape: Shape) -> Work:
    """A device's work in a step."""
    rows = {width: count * shape.chunks for width, count in shape.rows.items()}
    return Work(shape.tokens * shape.chunks, sum(rows.values()), rows)


def _cheap_seconds(step: program.Step, choice: Choice) -> float:
    """A step without compiling it, to tell meshes apart: products, weights gathered along fsdp in every pass of every
    chunk, activations summed along tensor."""
    c, mesh, rank = step.checkpoint.config, step.mesh.shape, step.training.lora.rank
    shape = step.workload.shape(choice.chunk_tokens, step.mesh)
    work, again = _work(shape), shape.chunks > 1
    flops = step_flops(c, rank, work, choice.remat) + again * forward_flops(c, rank, work)
    gathered = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(step.params["decoder"]["layers"]))
    sent = (2 + again) * shape.chunks * gathered / mesh["tensor"] * (1 - 1 / mesh["fsdp"])
    summed = work.tokens * c.hidden_size * c.num_layers * step.decoder().dtype.itemsize
    sent += (4 + 2 * again) * 2 * summed * (1 - 1 / mesh["tensor"])
    link = step.hardware.links if step.mesh.size <= step.hardware.domain else step.hardware.network
    return flops / mesh["tensor"] / step.hardware.flops + sent / link


def _costs(step: program.Step, compiled: dict[str, Any]) -> dict[str, Any]:
    """Memory, work and time of the compiled step; times are bounds, each as if nothing else took any."""
    device, counts, c = step.hardware, compiled["counts"], step.checkpoint.config
    total, room = sum(compiled["memory"].values()), int(device.memory * (1 - MARGIN))
    seconds = {
        "products": (counts.flops["default"] + device.float32 * counts.flops["highest"]) / device.flops,
        "memory": counts.moved / device.bandwidth,
        "collectives": sum(n / (device.network if far else device.links) for (*_, far), n in counts.sent.items()),
    }
    kinds: Counter[str] = Counter()
    for (kind, axes, _), sent in counts.sent.items():
        kinds[f"{kind} {axes}"] += sent
    tuned = step.config["tune"]["decoder"] == "full"
    useful = step_flops(c, step.training.lora.rank, _work(compiled["shape"]), "none") / step.mesh.shape["tensor"]
    useful *= 1.5 if tuned else 1  # every weight has a gradient, too
    least = max(seconds.values())
    return {
        "memory": compiled["memory"], "memory_total": total, "memory_room": room, "fits": total <= room,
        "memory_cpu": compiled["memory_cpu"], "estimate_cpu": compiled["estimate_cpu"],
        "shape": {"tokens": compiled["shape"].tokens, "chunks": compiled["shape"].chunks},
        "flops": sum(counts.flops.values()), "bytes_moved": counts.moved, "bytes_sent": dict(kinds.most_common()),
        "seconds": seconds, "step_seconds": [least, sum(seconds.values())],
        "usd_per_1000_steps": [x * 1000 / 3600 * device.price * step.mesh.size for x in (least, sum(seconds.values()))],
        "mfu_bound": useful / device.flops / least,
        "records_per_second": step.workload.sides[0] / least,
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    gib = lambda x: f"{x / GIB:10.2f} GiB"  # noqa: E731
    mesh = lambda sizes: ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))  # noqa: E731
    lines = [f"{result['devices']} × {result['device']}, mesh {mesh(result['mesh'])}; {result['assumed']}"]
    if "memory" in result:
        r = result
        low, high = r["step_seconds"]
        lines += [f"remat {r['remat']}, {r['shape']['chunks']} chunk(s) of {r['shape']['tokens']:,} tokens a device"]
        lines += ["", "memory of a device"]
        lines += [f"  {kind:34}{gib(size)}" for kind, size in r["memory"].items()]
        lines += [f"  {'all':34}{gib(r['memory_total'])} of {r['memory_room'] / GIB:.2f}"]
        lines += [f"  {'XLA, as compiled for CPU':34}{gib(r['memory_cpu'])}"]
        lines += ["", "a step, of a device"]
        lines += [f"  {'products':34}{r['flops'] / 1e12:10.2f} TFLOP {r['seconds']['products']:10.4f} s"]
        lines += [
            f"  {'bytes that products move':34}{r['bytes_moved'] / 1e9:10.2f} GB    {r['seconds']['memory']:10.4f} s"
        ]
        sent = sum(r["bytes_sent"].values())
        lines += [f"  {'bytes sent':34}{sent / 1e9:10.2f} GB    {r['seconds']['collectives']:10.4f} s"]
        lines += [f"    {kind:32}{size / 1e9:10.3f} GB" for kind, size in r["bytes_sent"].items() if size > 1e-4 * sent]
        lines += ["", f"at best {low:.3f} s a step (all at once), {high:.3f} s (one after the other)"]
        lines += [f"at best {r['records_per_second']:.0f} records/s, MFU {r['mfu_bound']:.0%}"]
        cost = r["usd_per_1000_steps"]
        lines += [f"1,000 steps: {cost[0]:.2f} to {cost[1]:.2f} USD", ""]
    reason = result.get("does_not_fit", "it takes more than there is")
    lines += ["it fits" if result.get("fits") else f"does not fit: {reason}"]
    if "suggested" in result:
        s = result["suggested"]
        chunk = f"chunks of {s['chunk_tokens']:,} tokens" if s["chunk_tokens"] else "the batch in one chunk"
        lines += [f"suggested: --mesh={','.join(map(str, s['mesh']))}, remat {s['remat']}, {chunk}: about "
                  f"{s['need'] / GIB:.1f} of {s['memory'] / GIB:.1f} GiB (not compiled)"]  # fmt: skip
    else:
        lines += ["no mesh of so many holds it; take more devices, or quantize the model"]
    return "\n".join(lines)


def _number(name: str, text: str | None, kind: type, least: float) -> Any:
    if text is None:
        return None
    try:
        value = kind(text)
    except ValueError:
        value = least - 1
    if value < least:
        raise LcoError(f"--{name}={text}: it must be a number, at least {least}")
    return value


def main() -> int:
    """Parse the command line, pretend to have the devices, plan, print."""
    args = cli.parse(sys.argv, __doc__, FLAGS)
    device = hardware.find(args.device)
    price = _number("price", args.price, float, 0)
    device = device if price is None else replace(device, price=price)
    devices, sizes = _number("devices", args.devices, int, 1), None
    if args.mesh:
        sizes = tuple(_number("mesh", x, int, 1) for x in args.mesh.split(","))
        if len(sizes) != len(AXES) or devices not in (None, math.prod(sizes)):
            raise LcoError(f"--mesh={args.mesh} must be three sizes, data,fsdp,tensor, whose product is --devices")
        devices = math.prod(sizes)
    if devices is None:
        raise LcoError("give --mesh=DATA,FSDP,TENSOR or --devices=N")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    jax.config.update("jax_enable_compilation_cache", False)  # what is compiled cannot run
    result = plan(args.config, device, devices, sizes, _number("tokens_per_text", args.tokens_per_text, int, 1))
    print(table(result))
    if args.json:
        write_json(Path(args.json), result)
    return 0


if __name__ == "__main__":
    run_main(main)
