"""A run's configuration and folder: what `train` begins or resumes and `convert` exports."""

import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.checkpoint.store import RunStore
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, reaching, read_json, write_json
from lco_jax.core.sharding import make_mesh
from lco_jax.data.guide_files import KEY as GUIDE
from lco_jax.training.objective import LossConfig
from lco_jax.training.state import Training
from lco_jax.training.values import ADDED, REMOVED, check_values

# Keys that may differ when a run is resumed: they change no loss, or only how long the run is.
FREE = (
    *("mesh", "checkpoint", "export", "log", "name", "data.threads", "train.patience"),
    *("eval.path", "eval.sts", "eval.batch_size"),  # the share is not trained on
)
DATA = "data_was"  # in config.json: source -> fingerprint of its records
# what every run's config.json has, and a model's does not
OF_A_RUN = {"model", "data", "train", "tune", "lora", "optimizer", "checkpoint", "total_steps"}


class Tuned(NamedTuple):
    """What a run has trained.

    source: its base, as the run names it. checkpoint: the base, opened. parameters: on the host.
    lora: the adapters' configuration. step: of the run's checkpoint.
    """

    source: str
    checkpoint: Checkpoint
    parameters: dict[str, Any]
    lora: lora.LoraConfig
    step: int


def check_config(config: ConfigDict) -> None:
    """Raise, by key, for a value that no run can have, unless another part checks it."""
    check_values(flatten_dict(config.to_dict(), keep_empty_nodes=True, sep="."))
    LossConfig.of(config)


def check_dimensions(config: ConfigDict, checkpoint: Checkpoint) -> None:
    """Raise, by key, for a part of a vector that is no part of the model's."""
    LossConfig.of(config).check_dimension(checkpoint.config.hidden_size)
    size, width = checkpoint.config.hidden_size, config.export.truncate_dim
    if width is not None and width > size:
        raise LcoError(f"config.export.truncate_dim is {width}; the model's vectors have {size}")


def check_same_run(
    workdir: AnyPath,
    config: ConfigDict,
    total_steps: int,
    fingerprints: Mapping[str, str] | None = None,
) -> None:
    """Raise, by the first key that differs, if the folder's run has another configuration, or other
    data. fingerprints: of the sources by name, and of the guide by its key.
    """
    path = workdir / "config.json"
    if not path.exists():
        return
    now = _flat(config) | {"total_steps": total_steps}
    earlier = read_json(path)
    data = earlier.pop(DATA, {})
    earlier.pop("objective", None)  # a run of an earlier version has none
    added = json.loads(json.dumps(ADDED))  # as JSON has them
    earlier = added | flatten_dict(earlier, keep_empty_nodes=True, sep=".")
    for key in sorted((earlier.keys() | now.keys()) - REMOVED.keys()):
        is_free = key in FREE or key.partition(".")[0] in FREE
        if earlier.get(key) != now.get(key) and not is_free:
            raise LcoError(
                f"{workdir} holds a run with config.{key} = {earlier.get(key)!r}, and this one "
                f"has {now.get(key)!r}; give another --output, or the same configuration to "
                "resume"
            )
    for name, found in (fingerprints or {}).items():
        began_with = data.get(name)
        if began_with and found and began_with != found:
            key = name if name == GUIDE else f"config.data.sources.{name}"
            raise LcoError(
                f"{key} has changed since the run in {workdir} began: it had "
                f"{began_with}, and has {found}; give another --output, or the data of before to "
                "resume"
            )


def claim_workdir(
    workdir: AnyPath,
    config: ConfigDict,
    total_steps: int,
    fingerprints: Mapping[str, str] | None = None,
    objective: str = "",
) -> None:
    """Write `workdir/config.json`, with which `check_same_run` compares a run that resumes.

    objective: "contrastive" or "generative", for the cards.
    """
    if jax.process_index() == 0:
        run = {"total_steps": total_steps, "objective": objective, DATA: dict(fingerprints or {})}
        write_json(workdir / "config.json", json.loads(config.to_json()) | run)


def has_begun(workdir: AnyPath) -> bool:
    """Whether a run has saved something in a folder."""
    folder = workdir / "checkpoints"
    return folder.is_dir() and any(path.name.split(".")[0].isdecimal() for path in folder.iterdir())


def run_config(workdir: AnyPath) -> dict[str, Any]:
    """The content of a run's config.json. Raises where the folder is none of a run."""
    with reaching(workdir):
        config = read_json(workdir / "config.json")
    if not config.keys() >= OF_A_RUN:
        raise LcoError(f"{workdir} is no training run; give a model as --model")
    return config


def tuned_of_run(
    workdir: AnyPath, step: int | None = None, config: Mapping[str, Any] | None = None
) -> Tuned:
    """What a run has trained, as one of its checkpoints has it.

    step: which of its checkpoints, by default the newest. config: the content of the run's
    config.json, where it has been read. Raises where there is no such checkpoint.
    """
    config = run_config(workdir) if config is None else config
    with reaching(workdir):
        store = RunStore(workdir / "checkpoints", config["checkpoint"]["keep"], read_only=True)
    steps = store.steps()
    if not steps:
        raise LcoError(f"{workdir} has no checkpoint yet")
    step = steps[-1] if step is None else step
    if step not in steps:
        there = ", ".join(map(str, steps))
        raise LcoError(f"{workdir} has no checkpoint of step {step}; there are: {there}")
    source = config["model"]["path"]
    checkpoint = open_checkpoint(source)
    mesh = make_mesh(devices=jax.local_devices()[:1])
    training = Training.build(config, checkpoint, config["total_steps"], mesh)
    found = store.read(step, {"tuned": training.tuned})  # without the optimiser's moments
    store.close()
    return Tuned(source, checkpoint, found["tuned"], training.lora, step)


def _flat(config: ConfigDict) -> dict[str, Any]:
    """Dotted key -> value, as JSON has them."""
    return flatten_dict(json.loads(config.to_json()), keep_empty_nodes=True, sep=".")
