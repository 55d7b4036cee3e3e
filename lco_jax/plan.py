"""What a training run would take on machines that are not here: memory, time and money, before any is rented.

    python -m lco_jax.plan --config=configs/qwen2_5_vl_7b.py --device=v5e --mesh=1,16,1 [--config.KEY=VALUE …]

The step of `lco_jax.train` is compiled by those machines' own compiler, where it is installed; nothing is loaded and
nothing allocated, and of the checkpoint a config.json suffices. docs/planning.md says what each number is, and what it
is not.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, abstract_params, open_geometry
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import local_path, write_json
from lco_jax.core.packing import Shape
from lco_jax.core.sharding import AXES, make_mesh
from lco_jax.cost_model import hlo
from lco_jax.cost_model.hardware import DEVICES, Hardware
from lco_jax.cost_model.program import Step, Workload, even
from lco_jax.cost_model.targets import Target, target
from lco_jax.data import layouts
from lco_jax.job import batches_of, open_data, say
from lco_jax.models.config import DecoderConfig
from lco_jax.training import cli, memory
from lco_jax.training.memory import GIB, Candidate
from lco_jax.training.run import check_config

TOKENS = 64  # of a text, where there are no data to tell
MESHES = 2  # that are compiled, where none is given
# what a layer's backward pass computes once more, in forward passes (of Qwen2.5-7B)
AGAIN = {"full": 0.71, "attention": 0.64, "gate": 0.35, "mlp": 0.06, "none": 0.0}
MODELLED = {
    "tpu": "cycles that its compiler expects",
    "gpu": "roofline of its compiler's kernels",
    "cpu": "products at the peak alone",
}


def plan(
    config: ConfigDict,
    device: Hardware,
    devices: int,
    sizes: tuple[int, ...] | None = None,
    tokens: int | None = None,
    quick: bool = False,
) -> dict[str, Any]:
    """What a step takes on `devices` of a kind.

    sizes: of the mesh, by default the suggested. tokens: of a text, by default as the data are. quick: compile one
    program, the likeliest. Raises where the configuration is wrong; a result without "memory" does not fit in any way
    that `train` would choose.
    """
    check_config(config)
    checkpoint = open_geometry(config.model.path)
    workload, assumed = _workload(config, checkpoint, tokens)
    made = target(device, devices)
    result: dict[str, Any] = {"device": device.name, "devices": devices, "assumed": assumed}
    result |= {"compiler": made.compiler, "note": made.note, "mesh": sizes}
    meshes = [sizes] if sizes else list(_meshes(devices, checkpoint.config.num_kv_heads))
    steps = [
        Step(config, checkpoint, make_mesh(*mesh, devices=made.devices), workload)
        for mesh in meshes
    ]
    why = ""
    for step in sorted(steps, key=lambda step: _likely_seconds(step, device))[
        : 1 if quick else MESHES
    ]:
        try:
            return result | _compiled(step, device, made, quick)
        except LcoError as error:
            why = why or str(error)
    return result | {"does_not_fit": why}


def _compiled(step: Step, device: Hardware, made: Target, quick: bool) -> dict[str, Any]:
    """A step under the policy that `train` would choose. Raises where nothing fits."""
    compiled: dict[Candidate, Any] = {}
    seconds = 0.0

    def need(one: Candidate) -> int:
        nonlocal seconds
        say(f"compiling the step on {_named(step)} with {one} …")
        start = time.perf_counter()
        try:
            compiled[one] = step.lower(*one).compile(made.options)
        except jax.errors.JaxRuntimeError as error:
            return memory.refused_bytes(error)
        seconds += time.perf_counter() - start
        return memory.peak_bytes(compiled[one])

    options = step.candidates(step.config.train.chunk_tokens, device.backend)
    if quick:
        options = [_likeliest(step, device)]
    chosen = memory.choose(device.room, options, step.rough, need)
    one = Candidate(*chosen[:2])
    found = {
        "mesh": tuple(step.mesh.shape.values()),
        "remat": one.remat,
        "chunk_tokens": one.chunk_tokens,
    }
    profile = hlo.Program(compiled[one].as_text(), step.training.lora.rank).profile(device)
    return found | {"compile_seconds": seconds} | _costs(step, device, made, chosen, profile)


def _named(step: Step) -> str:
    return "mesh " + ", ".join(f"{axis} {size}" for axis, size in step.mesh.shape.items())


def _likeliest(step: Step, device: Hardware) -> Candidate:
    """The first that fits by the rough estimate; else that with the least memory."""
    options = step.candidates(step.config.train.chunk_tokens, device.backend)
    return next((one for one in options if step.rough(one) <= device.room), options[-1])


def _workload(
    config: ConfigDict, checkpoint: Checkpoint, tokens: int | None
) -> tuple[Workload, str]:
    """What a step is given, and where that is from."""
    why = ""
    if tokens is None:
        try:
            sources, processor, layout = open_data(config, checkpoint)
            if any(source.modalities - {"text"} for source in sources.values()):
                raise LcoError("there are media in them, and towers are not planned")
            sample = layouts.draw(
                batches_of(config, sources, layout, processor), layout, media=False
            )
        except LcoError as error:
            tokens, why = TOKENS, f" (not as the data are: {error})"
        else:

            def shape(chunk_tokens: int, mesh: jax.sharding.Mesh) -> Shape:
                packed = replace(layout, chunk_tokens=chunk_tokens)
                return layouts.choose_layout(
                    sample, packed, processor, mesh, config.data.max_length
                ).floor

            return Workload(
                (layout.batch_size, layout.sides), len(layout.prefix), shape
            ), "shapes as the data are"
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
    return (
        sum(x.size for x in jax.tree.leaves(abstract_params(config)["layers"])) // config.num_layers
    )


def _useful_flops(step: Step, shape: Shape) -> float:
    """A device's, forward and backward, without the last layer (which few tokens pass), attention and adapters."""
    c, full = step.checkpoint.config, step.config.tune.decoder == "full"
    tokens = shape.tokens * shape.chunks / step.mesh.shape["tensor"]
    return (6 if full else 4) * _numbers(c) * (c.num_layers - 1) * tokens


def _likely_seconds(step: Step, device: Hardware) -> tuple[bool, float]:
    """(whether it likely does not fit, a step's seconds), without compiling it, to tell meshes apart: products, weights
    gathered along fsdp in every pass of every chunk, and activations summed along tensor."""
    one = _likeliest(step, device)
    mesh, c, shape = step.mesh.shape, step.checkpoint.config, step.shape(one.chunk_tokens)
    passes = 2 + (shape.chunks > 1)
    flops = _useful_flops(step, shape) * (passes + AGAIN[one.remat]) / 2
    layers = jax.tree.leaves(step.params["decoder"]["layers"])
    gathered = sum(x.size * x.dtype.itemsize for x in layers) / mesh["tensor"]
    summed = (
        4
        * shape.tokens
        * shape.chunks
        * c.hidden_size
        * c.num_layers
        * step.decoder().dtype.itemsize
    )
    sent = passes * (
        shape.chunks * gathered * (1 - 1 / mesh["fsdp"]) + summed * (1 - 1 / mesh["tensor"])
    )
    links = device.links if step.mesh.size <= device.domain else device.network
    return step.rough(one) > device.room, flops / device.flops + sent / links


def _costs(
    step: Step, device: Hardware, made: Target, chosen: memory.Choice, profile: hlo.Profile
) -> dict[str, Any]:
    """Memory, work, time and money of a compiled step."""
    shape, state = step.shape(chosen.chunk_tokens), step.training.sharded_abstract
    held = {
        "weights": memory.held_bytes(step.frozen),
        "adapters": memory.held_bytes(state["tuned"]),
        "optimiser": memory.held_bytes(state["optimizer"]),
        "batch": memory.held_bytes(step.batch(chosen.chunk_tokens)),
    }
    held["the step itself"] = chosen.need - sum(held.values())
    seconds = profile.flops / device.flops if made.compiler == "cpu" else profile.seconds.total()
    return {
        "memory": held, "memory_total": chosen.need, "memory_room": chosen.memory, "fits": True,
        "tokens": shape.tokens, "chunks": shape.chunks, "flops": profile.flops, "step_seconds": seconds,
        "seconds": dict(profile.seconds.most_common()) if made.compiler != "cpu" else {},
        "collectives": {kind: [n, profile.sent[kind]] for kind, n in profile.count.most_common()},
        "usd_per_1000_steps": seconds / 3.6 * device.price * step.mesh.size,
        "records_per_second": step.workload.sides[0] / seconds,
        "mfu": _useful_flops(step, shape) / device.flops / seconds,
    }  # fmt: skip


def table(r: dict[str, Any]) -> str:
    """What a reader looks at."""
    lines = [f"{r['devices']} × {r['device']}, {r['assumed']}"] + [r["note"]] * bool(r["note"])
    if "memory" not in r:
        lines += [f"does not fit: {r['does_not_fit']}"]
        more = f"no mesh of {r['devices']} × {r['device']} that was tried holds it: take more, or quantize the model"
        return "\n".join(lines + [more] * (r["mesh"] is None))
    mesh = ", ".join(f"{axis} {size}" for axis, size in zip(AXES, r["mesh"], strict=True))
    lines += [
        f"mesh {mesh}; remat {r['remat']}; chunks of a device: {r['chunks']} of {r['tokens']:,} tokens",
        "",
    ]
    rows = {**r["memory"], f"memory, of {r['memory_room'] / GIB:.2f} GiB": r["memory_total"]}
    lines += [f"{kind:34}{size / GIB:10.2f} GiB" for kind, size in rows.items()]
    lines += ["", f"{'products':34}{r['flops'] / 1e12:10.2f} TFLOP"]
    lines += [
        f"{kind:34}{size / 1e9:10.2f} GB in {count:,.0f}"
        for kind, (count, size) in r["collectives"].items()
    ]
    total = r["step_seconds"]
    lines += [f"{part:34}{s:10.4f} s" for part, s in r["seconds"].items() if s > total / 100]
    lines += ["", f"a step: {total:.3g} s modelled, not timed ({MODELLED[r['compiler']]})"]
    lines += [f"{r['records_per_second']:,.0f} records/s, MFU {r['mfu']:.0%}"]
    return "\n".join([*lines, f"1,000 steps: {r['usd_per_1000_steps']:.2f} USD", "", "it fits"])


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
    """Parse the command line, plan, print."""
    parser = argparse.ArgumentParser(
        "lco_jax.plan", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", required=True, choices=DEVICES)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mesh", type=_sizes, help="sizes along data, fsdp and tensor, as 1,16,1")
    where.add_argument("--devices", type=_whole, help="plan on the mesh that is likely the fastest")
    parser.add_argument(
        "--tokens_per_text", type=_whole, help="prompt included; by default as the data are"
    )
    parser.add_argument("--quick", action="store_true", help="compile one program, the likeliest")
    parser.add_argument(
        "--price", type=float, help="USD an hour and device, in the place of the list's"
    )
    parser.add_argument("--json", type=local_path, help="a file for the numbers")
    args, rest = parser.parse_known_args()
    devices = args.devices or math.prod(args.mesh)
    device = DEVICES[args.device]
    device = device if args.price is None else replace(device, price=args.price)
    config = cli.parse([sys.argv[0], *rest], __doc__).config
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)  # where their compiler is not installed
    jax.config.update(
        "jax_enable_compilation_cache", False
    )  # what is compiled is for no machine here
    result = plan(config, device, devices, args.mesh, args.tokens_per_text, args.quick)
    print(table(result))
    if args.json:
        write_json(args.json, result)
    return 0


if __name__ == "__main__":
    run_main(main)
