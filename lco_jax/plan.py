"""What a training run would take on machines that are not here: memory, time and money.

    python -m lco_jax.plan --config=configs/qwen2_5_vl_7b.py --device=v5e --mesh=1,16,1
    python -m lco_jax.plan --config=configs/qwen2_5_vl_7b.py --device=H100 --devices=8

Any --config.KEY=VALUE works as it does in `lco_jax.train`. The step is compiled by those machines'
compiler, if it is installed. Nothing is loaded or allocated; of the checkpoint, a config.json is
enough. docs/planning.md says what each number is, and what it is not.
"""

import argparse
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import jax
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, open_geometry
from lco_jax.checkpoint.shapes import abstract_params
from lco_jax.core.errors import DONE, LcoError, run_main
from lco_jax.core.files import write_json
from lco_jax.core.sharding import AXES, make_mesh
from lco_jax.core.stream_shapes import Shape
from lco_jax.cost_model.hardware import DEVICES, Hardware
from lco_jax.cost_model.profile import Profile, profile
from lco_jax.cost_model.program import Step, Workload, even
from lco_jax.cost_model.targets import Target, target
from lco_jax.data import layouts
from lco_jax.flags import add_path, new_parser
from lco_jax.job import batches_of, open_data, say
from lco_jax.models.config import DecoderConfig
from lco_jax.training import cli, memory
from lco_jax.training.memory import GIB, Candidate
from lco_jax.training.run import check_config

TOKENS = 64  # of a text, if the data cannot be read
MESHES = 2  # that are compiled, if none is given
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

    sizes: of the mesh, by default that of the mesh that is likely the fastest. tokens: of a text,
    by default as the data are. quick: compile one program, the likeliest. A result without "memory"
    does not fit in any way that `train` would choose. Raises for a wrong configuration.
    """
    check_config(config)
    checkpoint = open_geometry(config.model.path)
    workload, assumed = _workload(config, checkpoint, tokens)
    made = target(device, devices)
    result = {
        "device": device.name,
        "devices": devices,
        "assumed": assumed,
        "compiler": made.compiler,
        "note": made.note,
        "mesh": sizes,
    }
    meshes = [sizes] if sizes else _meshes(devices, checkpoint.config.num_kv_heads)
    steps = []
    for mesh in meshes:
        steps.append(Step(config, checkpoint, make_mesh(*mesh, devices=made.devices), workload))
    steps.sort(key=lambda step: _rank(step, device))
    reasons = []
    for step in steps[: 1 if quick else MESHES]:
        try:
            return result | _plan_step(step, device, made, quick)
        except LcoError as error:
            reasons.append(str(error))
    return result | {"does_not_fit": reasons[0]}


def _workload(
    config: ConfigDict, checkpoint: Checkpoint, tokens: int | None
) -> tuple[Workload, str]:
    """What a step is given, and where that comes from."""
    reason = ""
    if tokens is None:
        try:
            return _workload_of_data(config, checkpoint), "shapes as the data are"
        except LcoError as error:
            tokens = TOKENS
            reason = f" (not as the data are: {error})"
    negatives = config.data.max_negatives
    sides = config.train.batch_size, 2 + (1 if negatives < 0 else negatives)
    return even(sides, tokens), f"{sides[1]} texts a record of {tokens} tokens each{reason}"


def _workload_of_data(config: ConfigDict, checkpoint: Checkpoint) -> Workload:
    """The shapes that `train` would plan. Raises if the data cannot be read, or hold media."""
    sources, processor, layout = open_data(config, checkpoint)
    if any(source.modalities - {"text"} for source in sources.values()):
        raise LcoError("there are media in them, and towers are not planned")
    batches = batches_of(config, sources, layout, processor)
    sample = layouts.draw(batches, layout, media=False)

    def shape(chunk_tokens: int, mesh: jax.sharding.Mesh) -> Shape:
        chunked = replace(layout, chunk_tokens=chunk_tokens)
        max_length = config.data.max_length
        return layouts.choose_layout(sample, chunked, processor, mesh, max_length).floor

    return Workload((layout.batch_size, layout.sides), layout.prefix.branches, shape)


def _meshes(devices: int, kv_heads: int) -> Iterator[tuple[int, int, int]]:
    """Every (data, fsdp, tensor) of so many devices whose tensor axis splits the heads."""
    divisors = [n for n in range(1, devices + 1) if devices % n == 0]
    for tensor in divisors:
        if kv_heads % tensor:
            continue
        for fsdp in divisors:
            if devices % (tensor * fsdp) == 0:
                yield devices // (tensor * fsdp), fsdp, tensor


# ---- estimates, without compiling


def _rank(step: Step, device: Hardware) -> tuple[bool, float]:
    """A mesh's sort key: whether it likely does not fit, and about the seconds of a step."""
    candidate = _likeliest(step, device)
    return step.rough(candidate) > device.room, _rough_seconds(step, device, candidate)


def _likeliest(step: Step, device: Hardware) -> Candidate:
    """The first candidate that fits by the rough estimate; else the one with the least memory."""
    options = step.candidates(device.backend)
    return next((one for one in options if step.rough(one) <= device.room), options[-1])


def _rough_seconds(step: Step, device: Hardware, candidate: Candidate) -> float:
    """The time of products and of what is sent, without overlap."""
    shape = step.shape(candidate.chunk_tokens)
    passes = 3 if shape.chunks > 1 else 2
    flops = _useful_flops(step, shape) * (passes + AGAIN[candidate.remat]) / 2
    links = device.links if step.mesh.size <= device.domain else device.network
    return flops / device.flops + passes * _sent_bytes(step, shape) / links


def _sent_bytes(step: Step, shape: Shape) -> float:
    """What a pass sends: weights, gathered along fsdp for every chunk, and sums along tensor."""
    fsdp, tensor = step.mesh.shape["fsdp"], step.mesh.shape["tensor"]
    layers = jax.tree.leaves(step.params["decoder"]["layers"])
    weights = sum(x.size * x.dtype.itemsize for x in layers) / tensor
    config = step.checkpoint.config
    token_bytes = config.hidden_size * step.decoder().dtype.itemsize
    summed = 4 * config.num_layers * shape.tokens * shape.chunks * token_bytes
    return shape.chunks * weights * (1 - 1 / fsdp) + summed * (1 - 1 / tensor)


def _useful_flops(step: Step, shape: Shape) -> float:
    """A device's FLOPs in a step, forward and backward, computed once.

    Without the last layer (few tokens pass it), attention and adapters.
    """
    config = step.checkpoint.config
    a_weight = 6 if step.config.tune.decoder == "full" else 4
    tokens = shape.tokens * shape.chunks / step.mesh.shape["tensor"]
    return a_weight * _layer_weights(config) * (config.num_layers - 1) * tokens


@cache
def _layer_weights(config: DecoderConfig) -> int:
    layers = jax.tree.leaves(abstract_params(config)["layers"])
    return sum(x.size for x in layers) // config.num_layers


# ---- compiling


def _plan_step(step: Step, device: Hardware, made: Target, quick: bool) -> dict[str, Any]:
    """A step under the policy that `train` would choose. Raises if nothing fits."""
    compiled: dict[Candidate, jax.stages.Compiled] = {}
    start = time.perf_counter()

    def need(candidate: Candidate) -> int:
        say(f"compiling the step on mesh {_named(step.mesh.shape.values())} with {candidate} …")
        try:
            compiled[candidate] = step.lower(*candidate).compile(made.options)
        except jax.errors.JaxRuntimeError as error:
            return memory.refused_bytes(error)
        return memory.peak_bytes(compiled[candidate])

    options = [_likeliest(step, device)] if quick else step.candidates(device.backend)
    choice = memory.choose(device.room, options, step.rough, need)
    seconds = time.perf_counter() - start
    text = compiled[Candidate(choice.remat, choice.chunk_tokens)].as_text()
    result = {
        "mesh": tuple(step.mesh.shape.values()),
        "remat": choice.remat,
        "chunk_tokens": choice.chunk_tokens,
        "compile_seconds": seconds,
    }
    found = profile(text, device, step.training.lora.rank)
    return result | _memory(step, choice) | _work(step, device, made, choice, found)


def _memory(step: Step, choice: memory.Choice) -> dict[str, Any]:
    """The bytes of a device, in all and by what they are for."""
    state = step.training.sharded_abstract
    sizes = {
        "weights": memory.stored_bytes(step.frozen),
        "adapters": memory.stored_bytes(state["tuned"]),
        "optimiser": memory.stored_bytes(state["optimizer"]),
        "batch": memory.stored_bytes(step.batch(choice.chunk_tokens)),
    }
    sizes["the step itself"] = choice.need - sum(sizes.values())
    return {
        "memory": sizes,
        "memory_total": choice.need,
        "memory_room": choice.memory,
        "fits": True,
    }


def _work(
    step: Step, device: Hardware, made: Target, choice: memory.Choice, found: Profile
) -> dict[str, Any]:
    """Work, time and money of a compiled step."""
    shape = step.shape(choice.chunk_tokens)
    on_cpu = made.compiler == "cpu"
    seconds = found.flops / device.flops if on_cpu else found.seconds.total()
    counts = found.count.most_common()
    return {
        "tokens": shape.tokens,
        "chunks": shape.chunks,
        "flops": found.flops,
        "step_seconds": seconds,
        "seconds": {} if on_cpu else dict(found.seconds.most_common()),
        "collectives": {kind: [count, found.sent[kind]] for kind, count in counts},
        "usd_per_1000_steps": seconds / 3.6 * device.price * step.mesh.size,
        "records_per_second": step.workload.sides[0] / seconds,
        "mfu": _useful_flops(step, shape) / device.flops / seconds,
    }


# ---- the command


def table(result: dict[str, Any]) -> str:
    """A result as lines for people."""
    lines = [f"{result['devices']} × {result['device']}, {result['assumed']}"]
    if result["note"]:
        lines.append(result["note"])
    if "memory" not in result:
        lines.append(f"does not fit: {result['does_not_fit']}")
        if result["mesh"] is None:
            tried = f"no mesh of {result['devices']} × {result['device']} that was tried holds it"
            lines.append(f"{tried}: take more, or quantize the model")
        return "\n".join(lines)
    chunks = f"chunks of a device: {result['chunks']} of {result['tokens']:,} tokens"
    lines += [f"mesh {_named(result['mesh'])}; remat {result['remat']}; {chunks}", ""]
    lines += [*_memory_lines(result), "", *_work_lines(result), "", *_time_lines(result)]
    return "\n".join([*lines, "", "it fits"])


def _named(sizes: Iterable[int]) -> str:
    return ", ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True))


def _memory_lines(result: dict[str, Any]) -> list[str]:
    total = f"memory, of {result['memory_room'] / GIB:.2f} GiB"
    sizes = {**result["memory"], total: result["memory_total"]}
    return [f"{kind:34}{size / GIB:10.2f} GiB" for kind, size in sizes.items()]


def _work_lines(result: dict[str, Any]) -> list[str]:
    """Products, collectives, and the parts that take more than 1 % of the time."""
    lines = [f"{'products':34}{result['flops'] / 1e12:10.2f} TFLOP"]
    for kind, (count, size) in result["collectives"].items():
        lines.append(f"{kind:34}{size / 1e9:10.2f} GB in {count:,.0f}")
    for part, seconds in result["seconds"].items():
        if seconds > result["step_seconds"] / 100:
            lines.append(f"{part:34}{seconds:10.4f} s")
    return lines


def _time_lines(result: dict[str, Any]) -> list[str]:
    how = MODELLED[result["compiler"]]
    return [
        f"a step: {result['step_seconds']:.3g} s modelled, not timed ({how})",
        f"{result['records_per_second']:,.0f} records/s, MFU {result['mfu']:.0%}",
        f"1,000 steps: {result['usd_per_1000_steps']:.2f} USD",
    ]


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _sizes(text: str) -> tuple[int, ...]:
    sizes = tuple(_positive(size) for size in text.split(","))
    if len(sizes) != len(AXES):
        raise argparse.ArgumentTypeError(f"{text} must be three sizes, DATA,FSDP,TENSOR")
    return sizes


def make_parser() -> argparse.ArgumentParser:
    """The command line, without the keys of the configuration."""
    parser = new_parser("plan", __doc__)
    parser.add_argument("--device", required=True, choices=DEVICES)
    where = parser.add_mutually_exclusive_group(required=True)
    where.add_argument("--mesh", type=_sizes, help="sizes along data, fsdp and tensor: 1,16,1")
    where.add_argument(
        "--devices", type=_positive, help="plan on the mesh that is likely the fastest"
    )
    parser.add_argument(
        "--tokens-per-text", type=_positive, help="prompt included (default: as the data are)"
    )
    parser.add_argument(
        "--tokens_per_text", dest="tokens_per_text", type=_positive, help=argparse.SUPPRESS
    )
    parser.add_argument("--quick", action="store_true", help="compile one program, the likeliest")
    parser.add_argument(
        "--price", type=float, help="USD an hour and device (default: an approximate list price)"
    )
    add_path(parser, "--output", "a JSON file for the numbers", ["--json"], required=False)
    return parser


def main() -> int:
    """Parse the command line, plan, print."""
    args, rest = make_parser().parse_known_args()
    devices = args.devices or math.prod(args.mesh)
    device = DEVICES[args.device]
    if args.price is not None:
        device = replace(device, price=args.price)
    config = cli.parse([sys.argv[0], *rest], __doc__).config
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)  # in the place of absent compilers' devices
    jax.config.update("jax_enable_compilation_cache", False)  # programs are for no machine here
    result = plan(config, device, devices, args.mesh, args.tokens_per_text, args.quick)
    print(table(result))
    if args.output:
        write_json(args.output, result)
    return DONE


if __name__ == "__main__":
    run_main(main)
