"""Weak scaling on paper: what a device sends as devices grow with the batch, and the loss of a very large batch.

All is compiled for as many CPU devices, none of which is used.
"""

import argparse
from pathlib import Path
from typing import Any

from benchmarks.presets import PRESETS
from lco_jax.core.files import write_json


def add_parsers(kinds: Any, common: argparse.ArgumentParser) -> None:
    """`scaling`."""
    parser = kinds.add_parser(
        "scaling", parents=[common], help="collectives of a device at a fixed share of the batch"
    )
    parser.add_argument("--preset", default="7b", choices=PRESETS)
    parser.add_argument(
        "--devices", type=int, nargs="*", default=[8, 64, 512], help="multiples of --fsdp"
    )
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--records", type=int, default=48, help="of a device")
    parser.add_argument(
        "--loss", type=int, default=2**20, help="anchors of the loss alone, on the most devices"
    )
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile each."""
    import jax

    from lco_jax import make_mesh
    from lco_jax.checkpoint.hf import open_geometry
    from lco_jax.cost_model.program import Step, even
    from lco_jax.training import cli

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    write_json(folder / "config.json", PRESETS[args.preset].config)
    flags = ["--config=configs/qwen2_5_vl_7b.py", f"--config.model.path={folder}"]
    config, checkpoint = cli.parse(["scaling", *flags], "").config, open_geometry(folder)
    steps = {}
    for devices in args.devices:
        mesh = make_mesh(devices // args.fsdp, args.fsdp, devices=jax.devices()[:devices])
        step = Step(config, checkpoint, mesh, even((args.records * devices, 3), 40))
        steps[devices] = _counted(step.lower("full", 0))
        print(devices, steps[devices], flush=True)
    return {"steps": steps, "loss": _loss(args, checkpoint.config.hidden_size) if args.loss else {}}


def _counted(lowered: Any) -> dict[str, Any]:
    """Of one device: GiB at the peak, TFLOP, and GB of collectives' results by kind, of the CPU's program."""
    from lco_jax.cost_model import hlo
    from lco_jax.cost_model.hardware import DEVICES
    from lco_jax.cost_model.targets import OPTIONS
    from lco_jax.training.memory import GIB, peak_bytes

    compiled = lowered.compile(OPTIONS["cpu"])
    found = hlo.Program(compiled.as_text()).profile(DEVICES["v5p"])
    sent = {kind: size / 1e9 for kind, size in found.sent.most_common()}
    temporaries = compiled.memory_analysis().temp_size_in_bytes / GIB
    peak = peak_bytes(compiled) / GIB
    return {
        "peak_gib": peak,
        "temporaries_gib": temporaries,
        "tflop": found.flops / 1e12,
        "sent_gb": sent,
    }


def _loss(args: argparse.Namespace, hidden: int) -> dict[str, Any]:
    """The loss and its gradient."""
    import jax
    import jax.numpy as jnp

    from lco_jax import make_mesh
    from lco_jax.core.sharding import ROWS
    from lco_jax.training.losses import info_nce

    def gradient(embeddings: Any, present: Any) -> Any:
        return jax.value_and_grad(lambda e: info_nce(e, present, 0.03)[0])(embeddings)

    devices = max(args.devices)
    mesh = make_mesh(devices // args.fsdp, args.fsdp)
    place = jax.NamedSharding(mesh, jax.P(ROWS))

    def shape(dtype: Any, *sizes: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((args.loss, 3, *sizes), dtype, sharding=place)

    with jax.set_mesh(mesh):
        lowered = jax.jit(gradient).lower(shape(jnp.float32, hidden), shape(jnp.bool))
    return {"anchors": args.loss, "devices": devices, "hidden": hidden, **_counted(lowered)}


def table(result: dict[str, Any]) -> str:
    """What a reader looks at."""
    steps = result["steps"].values()
    kinds = list(dict.fromkeys(kind for step in steps for kind in step["sent_gb"]))
    rows = {kind: [step["sent_gb"].get(kind, 0) for step in steps] for kind in kinds}
    rows |= {
        "GiB at the peak": [step["peak_gib"] for step in steps],
        "TFLOP": [step["tflop"] for step in steps],
    }
    lines = [f"{'GB of results of collectives':32}" + "".join(f"{n:>12}" for n in result["steps"])]
    lines += [
        f"{name:32}" + "".join(f"{x:12.3f}" for x in row)
        for name, row in rows.items()
        if max(row) > 1e-3
    ]
    if loss := result["loss"]:
        lines += [
            f"loss of {loss['anchors']:,} anchors, D {loss['hidden']}, on {loss['devices']} devices, each: "
            f"{loss['temporaries_gib']:.2f} GiB of temporaries of {loss['peak_gib']:.2f}, {loss['tflop']:.0f} TFLOP, "
            f"{sum(loss['sent_gb'].values()):.1f} GB of results of collectives"
        ]
    return "\n".join(lines)
