"""Weak scaling on paper: what a device sends as devices grow with the batch.

The step is compiled for as many CPU devices; nothing runs on them.
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
        "--devices", type=int, nargs="*", default=[8, 64], help="multiples of --fsdp"
    )
    parser.add_argument("--fsdp", type=int, default=8)
    parser.add_argument("--records", type=int, default=48, help="of a device")
    parser.set_defaults(measure=measure, table=table)


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Compile the step for each number of devices."""
    import jax

    from lco_jax import make_mesh
    from lco_jax.checkpoint.hf import open_geometry
    from lco_jax.cost_model.program import Step, even
    from lco_jax.training import cli

    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", max(args.devices))
    write_json(folder / "config.json", PRESETS[args.preset].config)
    flags = ["--config=configs/qwen2_5_vl_7b.py", f"--config.model.path={folder}"]
    config = cli.parse(["scaling", *flags], "").config
    checkpoint = open_geometry(folder)
    steps = {}
    for devices in args.devices:
        mesh = make_mesh(devices // args.fsdp, args.fsdp, devices=jax.devices()[:devices])
        step = Step(config, checkpoint, mesh, even((args.records * devices, 3), 40))
        steps[devices] = _count(step.lower("full", 0))
        print(devices, steps[devices], flush=True)
    return {"steps": steps}


def _count(lowered: Any) -> dict[str, Any]:
    """Of one device: GiB at the peak, TFLOP, and GB of collectives' results by kind."""
    from lco_jax.cost_model.hardware import DEVICES
    from lco_jax.cost_model.profile import profile
    from lco_jax.cost_model.targets import OPTIONS
    from lco_jax.training.memory import GIB, peak_bytes

    compiled = lowered.compile(OPTIONS["cpu"])
    found = profile(compiled.as_text(), DEVICES["v5p"])
    return {
        "peak_gib": peak_bytes(compiled) / GIB,
        "tflop": found.flops / 1e12,
        "sent_gb": {kind: size / 1e9 for kind, size in found.sent.most_common()},
    }


def table(result: dict[str, Any]) -> str:
    """A result as lines for people."""
    steps = list(result["steps"].values())
    rows: dict[str, list[float]] = {}
    for step in steps:
        for kind in step["sent_gb"]:
            rows[kind] = [other["sent_gb"].get(kind, 0) for other in steps]
    rows["GiB at the peak"] = [step["peak_gib"] for step in steps]
    rows["TFLOP"] = [step["tflop"] for step in steps]
    counts = "".join(f"{devices:>12}" for devices in result["steps"])
    lines = [f"{'GB of results of collectives':32}{counts}"]
    for name, numbers in rows.items():
        if max(numbers) > 1e-3:
            lines.append(f"{name:32}" + "".join(f"{x:12.3f}" for x in numbers))
    return "\n".join(lines)
