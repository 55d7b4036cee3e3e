"""A run's configuration and folder: what `train` begins or resumes and `convert` exports."""

import json
from typing import Any

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.store import RunStore
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, reaching, read_json, write_json
from lco_jax.core.sharding import make_mesh
from lco_jax.training.state import Training

# Keys that may differ when a run is resumed: they change no loss, or only how long the run is.
FREE = ("mesh", "checkpoint", "eval", "export", "log", "name", "data.threads", "train.patience")
# Keys of earlier versions, and the value under which a configuration that still sets them runs.
REMOVED = {"train.candidates": "auto", "train.spike": 20.0}
POSITIVE = (
    "data.threads",
    "train.batch_size",
    "train.temperature",
    "train.max_nonfinite",
    "checkpoint.every",
    "eval.batch_size",
)
NOT_NEGATIVE = (
    "seed",
    "train.steps",
    "train.patience",
    "optimizer.clip_norm",
    "optimizer.warmup_steps",
)


def check_config(config: ConfigDict) -> None:
    """Raise, by key, for a value that no run can have, unless another part checks it."""
    flat = _flat(config)
    for key in POSITIVE:
        _check(flat, key, flat[key] > 0, "above 0")
    for key in NOT_NEGATIVE:
        _check(flat, key, flat[key] >= 0, "0 or more")
    _check(flat, "train.chunk_tokens", flat["train.chunk_tokens"] >= -1, "-1 (auto), 0 or more")
    batches = ("mixed", "homogeneous")
    _check(flat, "data.batches", flat["data.batches"] in batches, " or ".join(batches))
    if not flat["train.steps"]:
        epochs_fit = flat["train.epochs"] > 0
        _check(flat, "train.epochs", epochs_fit, "above 0 where train.steps is 0")
    for key, default in REMOVED.items():
        if flat.get(key, default) != default:
            raise LcoError(f"config.{key} does not exist any more; leave it out")


def _check(flat: dict[str, Any], key: str, fine: bool, expected: str) -> None:
    if not fine:
        raise LcoError(f"config.{key} is {flat[key]!r}; it must be {expected}")


def claim_workdir(workdir: AnyPath, config: ConfigDict, total_steps: int, begun: bool) -> None:
    """Write `workdir/config.json`. A run that has `begun` there must have the same configuration.

    Raises by the first key that differs.
    """
    path = workdir / "config.json"
    now = _flat(config) | {"total_steps": total_steps}
    if begun and path.exists():
        earlier = flatten_dict(read_json(path), keep_empty_nodes=True, sep=".")
        for key in sorted((earlier.keys() | now.keys()) - REMOVED.keys()):
            is_free = key in FREE or key.partition(".")[0] in FREE
            if earlier.get(key) != now.get(key) and not is_free:
                raise LcoError(
                    f"{workdir} holds a run with config.{key} = {earlier.get(key)!r}, and this one "
                    f"has {now.get(key)!r}; give another --output, or the same configuration to "
                    "resume"
                )
    if jax.process_index() == 0:
        write_json(path, json.loads(config.to_json()) | {"total_steps": total_steps})


def tuned_of_run(
    workdir: AnyPath, step: int | None = None
) -> tuple[str, dict[str, Any], lora.LoraConfig, int]:
    """A run's (checkpoint path, trained parameters, configuration of adapters, step).

    step: which of its checkpoints, by default the newest. The parameters are on the host. Raises
    where there is none.
    """
    with reaching(workdir):
        config = read_json(workdir / "config.json")
        store = RunStore(workdir / "checkpoints", config["checkpoint"]["keep"], read_only=True)
    steps = store.steps()
    if not steps:
        raise LcoError(f"{workdir} has no checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise LcoError(f"{workdir} has no checkpoint of step {step}; there are: {there}")
    path = config["model"]["path"]
    mesh = make_mesh(devices=jax.local_devices()[:1])
    training = Training.build(config, open_checkpoint(path), config["total_steps"], mesh)
    found = store.read(step, {"tuned": training.tuned})  # without the optimiser's moments
    store.close()
    return path, found["tuned"], training.lora, step


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, as JSON has them."""
    return flatten_dict(json.loads(config.to_json()), keep_empty_nodes=True, sep=".")
