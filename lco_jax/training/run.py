"""A run's configuration and folder: what `train` begins or resumes and `convert` exports."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from lco_jax.checkpoint.hf import Checkpoint, abstract_model, open_checkpoint
from lco_jax.checkpoint.store import RunStore
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, reaching, read_json, write_json
from lco_jax.core.sharding import make_mesh, with_shardings
from lco_jax.training import tuning
from lco_jax.training.losses import CANDIDATES
from lco_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer
from lco_jax.training.step import State, init_state, state_shardings

# what may change between the parts of a resumed run: it moves no number, or says where and how long
FREE = (
    "mesh",
    "checkpoint",
    "eval",
    "export",
    "log",
    "name",
    "data.threads",
    "train.patience",
    "train.spike",
)


@dataclass(frozen=True)
class Training:
    """The parts of a run that depend on its configuration and checkpoint alone. tuned: shapes of what is tuned."""

    lora: lora.LoraConfig
    tune: tuning.TuneConfig
    tx: Optimizer
    tuned: dict[str, Any]
    shardings: State

    @classmethod
    def build(
        cls, config: Mapping[str, Any], checkpoint: Checkpoint, total_steps: int, mesh: Mesh
    ) -> "Training":
        """From config.lora, tune and optimizer, and the checkpoint's geometry; nothing is allocated."""
        lora_config, tune = lora.LoraConfig(**config["lora"]), tuning.TuneConfig(**config["tune"])
        if config["model"]["quantize"] and tune.decoder == "full":
            raise LcoError(
                "config.model.quantize goes with config.tune.decoder = lora or projection: the whole of a "
                "quantised decoder cannot be tuned"
            )
        tx = make_optimizer(OptimizerConfig(**config["optimizer"]), total_steps)
        start = partial(tuning.init, tune=tune, config=lora_config)
        tuned = jax.eval_shape(start, jax.random.key(0), abstract_model(checkpoint))
        return cls(lora_config, tune, tx, tuned, state_shardings(tuned, tx, mesh))

    def fresh(self, params: dict[str, Any], seed: int = 0) -> State:
        """Step 0: new adapters, and a copy of those of `params` that are tuned whole."""

        def make(key: jax.Array, params: dict[str, Any]) -> State:
            return init_state(tuning.init(key, params, self.tune, self.lora), self.tx)

        return jax.jit(make, out_shardings=self.shardings)(jax.random.key(seed), params)

    def untrained(self, params: dict[str, Any], seed: int = 0) -> dict[str, Any]:
        """What is tuned as it is at step 0, without an optimizer: as it stands, it changes no
        output of the model."""
        make = partial(tuning.init, tune=self.tune, config=self.lora)
        return jax.jit(make, out_shardings=self.shardings["tuned"])(jax.random.key(seed), params)

    @property
    def abstract(self) -> State:
        """The state as shapes."""
        return jax.eval_shape(partial(init_state, tx=self.tx), self.tuned)

    @property
    def sharded_abstract(self) -> State:
        """The state as shapes that know where they lie."""
        return with_shardings(self.abstract, self.shardings)

    def resume(self, store: RunStore) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, data position) of the newest checkpoint that can be read; None where none was saved."""
        return store.restore_newest(self.abstract, self.shardings)


def check_config(config: ConfigDict) -> None:
    """Raise, by key, for a value that no run can have. What other parts check themselves is not repeated here."""
    positive = (
        "data.threads", "train.batch_size", "train.temperature", "train.max_nonfinite", "checkpoint.every",
        "eval.batch_size",
    )  # fmt: skip
    not_negative = (
        "seed", "train.steps", "train.patience", "train.spike", "optimizer.clip_norm", "optimizer.warmup_steps",
    )  # fmt: skip
    flat = _flat(json.loads(config.to_json()))
    for keys, fine, says in (
        (positive, lambda x: x > 0, "above 0"),
        (not_negative, lambda x: x >= 0, "0 or more"),
        (("train.chunk_tokens",), lambda x: x >= -1, "-1 (auto), 0 or more"),
    ):
        for key in keys:
            if not fine(flat[key]):
                raise LcoError(f"config.{key} is {flat[key]}; it must be {says}")
    for key, values in (
        ("data.batches", ("mixed", "homogeneous")),
        ("train.candidates", CANDIDATES),
    ):
        if flat[key] not in values:
            raise LcoError(f"config.{key} is {flat[key]!r}; it is one of: {', '.join(values)}")
    if not config.train.steps and not config.train.epochs > 0:
        raise LcoError(
            f"config.train.epochs is {config.train.epochs}; it must be above 0 where train.steps is 0"
        )


def claim_workdir(workdir: AnyPath, config: ConfigDict, total_steps: int, begun: bool) -> None:
    """Write `workdir/config.json`; where a run has `begun`, raise by the key in which the one there differs."""
    content = json.loads(config.to_json()) | {"total_steps": total_steps}
    path = workdir / "config.json"
    if begun and path.exists():
        was, now = _flat(read_json(path)), _flat(content)
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key) and key not in FREE and key.split(".")[0] not in FREE:
                raise LcoError(
                    f"{workdir} holds a run with config.{key} = {was.get(key)!r}, and this one has {now.get(key)!r}; "
                    "give another --workdir, or the same configuration to resume"
                )
    if jax.process_index() == 0:
        write_json(path, content)


def tuned_of_run(
    workdir: AnyPath, step: int | None = None
) -> tuple[str, dict[str, Any], lora.LoraConfig, int]:
    """(checkpoint path, what was tuned, on the host, configuration of adapters, step) of a run's checkpoint.

    step: which, by default the newest. Raises where there is none.
    """
    with reaching(workdir):
        config = read_json(workdir / "config.json")
        store = RunStore(workdir / "checkpoints", config["checkpoint"]["keep"], read_only=True)
    there = store.steps()
    if not there:
        raise LcoError(f"{workdir} has no checkpoint yet")
    step = there[-1] if step is None else step
    if step not in there:
        raise LcoError(
            f"{workdir} has no checkpoint of step {step}; there are: {', '.join(map(str, there))}"
        )
    mesh = make_mesh(devices=jax.local_devices()[:1])
    training = Training.build(
        config, open_checkpoint(config["model"]["path"]), config["total_steps"], mesh
    )
    tuned = store.read(step, {"tuned": training.tuned})["tuned"]  # and not the optimizer's moments
    store.close()
    return config["model"]["path"], tuned, training.lora, step


def _flat(tree: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        k: v
        for key, node in tree.items()
        for k, v in _flat(node, f"{prefix}.{key}" if prefix else key).items()
    }
