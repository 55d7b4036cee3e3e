"""Weak scaling on paper: what a device sends as devices grow with the batch, and the loss of a very large batch.

All is compiled for devices that are not there.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.presets import PRESETS
from lco_jax.core.files import write_json


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`scaling`."""
    parser = kinds.add_parser("scaling", parents=[common], help="collectives of a device at a fixed share of the batch")
    parser.add_argument("--preset", default="7b", choices=PRESETS)
    parser.add_argument("--devices", type=int, nargs="*", default=[8, 64, 512], help="multiples of --fsdp")
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--records", type=int, default=48, help="of a device")
    parser.add_argument("--loss", type=int, default=2**20, help="anchors of the loss alone, on the most devices")
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile each."""
    import jax

    from lco_jax import make_mesh
    from lco_jax.checkpoint.hf import open_geometry
    from lco_jax.planning.hardware import DEVICES
    from lco_jax.planning.program import Step, even
    from lco_jax.training import cli

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    write_json(folder / "config.json", PRESETS[args.preset].config)
    flags = ["--config=configs/qwen2_5_vl_7b.py", f"--config.model.path={folder}"]
    config, checkpoint = cli.parse(["scaling", *flags], "").config, open_geometry(folder)
    steps = {}
    for devices in args.devices:
        mesh = make_mesh(devices // args.fsdp, args.fsdp, devices=jax.devices()[:devices])
        step = Step(config, checkpoint, mesh, DEVICES["v5p"], even((args.records * devices, 3), 40))
        memory, counts = step.compile("full", 0)
        sent = {f"{kind} {axes}": size for (kind, axes, _), size in counts.sent.most_common()}
        steps[devices] = {"memory": memory, "tflops": counts.flops.total() / 1e12, "sent": sent}
        print(devices, steps[devices], flush=True)
    return {"steps": steps, "loss": _loss(args, checkpoint.config.hidden_size) if args.loss else {}}


def _loss(args: argparse.Namespace, hidden: int) -> dict[str, Any]:
    """The loss and its gradient, candidates left split (a ring)."""
    import jax
    import jax.numpy as jnp

    from lco_jax import make_mesh
    from lco_jax.core.sharding import ROWS
    from lco_jax.planning.program import compile_split
    from lco_jax.training.losses import info_nce

    def gradient(embeddings: Any, present: Any) -> Any:
        return jax.value_and_grad(lambda e: info_nce(e, present, 0.03, ring=True)[0])(embeddings)

    devices = max(args.devices)
    mesh = make_mesh(devices // args.fsdp, args.fsdp)
    place = jax.NamedSharding(mesh, jax.P(ROWS))
    shape = lambda dtype, *sizes: jax.ShapeDtypeStruct((args.loss, 3, *sizes), dtype, sharding=place)  # noqa: E731
    with jax.set_mesh(mesh):
        counts, compiled = compile_split(jax.jit(gradient).lower(shape(jnp.float32, hidden), shape(jnp.bool)), mesh)
    memory = compiled.memory_analysis()
    return {
        "anchors": args.loss, "devices": devices, "hidden": hidden,
        "arguments_gib": memory.argument_size_in_bytes / 2**30, "results_gib": memory.output_size_in_bytes / 2**30,
        "temporaries_gib": memory.temp_size_in_bytes / 2**30, "tflops": counts.flops.total() / 1e12,
        "sent": {f"{kind} {axes}": size for (kind, axes, _), size in counts.sent.most_common()},
    }  # fmt: skip


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    kinds = list(dict.fromkeys(kind for step in result["steps"].values() for kind in step["sent"]))
    lines = [f"{'GB that a device sends in a step':32}" + "".join(f"{n:>12}" for n in result["steps"])]
    for kind in kinds:
        sizes = [step["sent"].get(kind, 0) / 1e9 for step in result["steps"].values()]
        lines += [f"{kind:32}" + "".join(f"{x:12.3f}" for x in sizes)] if max(sizes) > 1e-3 else []
    if loss := result["loss"]:
        lines += [
            f"loss of {loss['anchors']:,} anchors, D {loss['hidden']}, on {loss['devices']} devices, each: "
            f"{loss['arguments_gib']:.2f} GiB of embeddings, {loss['results_gib']:.2f} of gradient, "
            f"{loss['temporaries_gib']:.2f} of temporaries, {loss['tflops']:.0f} TFLOP, "
            f"{sum(loss['sent'].values()) / 1e9:.1f} GB sent"
        ]
    return "\n".join(lines)
