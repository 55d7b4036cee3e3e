"""What a run trains: the trainable parameters, their optimiser, and how both lie on the devices."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from lco_jax.checkpoint.hf import Checkpoint, abstract_model
from lco_jax.checkpoint.store import RunStore
from lco_jax.core import lora
from lco_jax.core.sharding import replicated, shardings, with_shardings
from lco_jax.training import tuning
from lco_jax.training.objective import LossConfig
from lco_jax.training.optimizer import Optimizer, OptimizerConfig, make_optimizer

# {"step": int32, "tuned": tree, "optimizer": optax state}; a checkpoint holds all of it
State = dict[str, Any]


def init_state(tuned: dict[str, Any], tx: Optimizer) -> State:
    """Step 0 of a run. Jit it with `out_shardings` from `state_shardings` for a mesh."""
    return {"step": jnp.int32(0), "tuned": tuned, "optimizer": tx.init(tuned)}


def state_shardings(tuned: dict[str, Any], tx: Optimizer, mesh: Mesh) -> State:
    """A sharding for every leaf of the state (`jit` of `tx.init` alone would drop them)."""
    by_rule = shardings(tuned, mesh)
    moments = optax.tree_map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(tx.init, tuned),
        by_rule,
        transform_non_params=lambda _: replicated(mesh),
    )
    return {"step": replicated(mesh), "tuned": by_rule, "optimizer": moments}


def warmup_steps(config: Mapping[str, Any], total_steps: int) -> int:
    """The steps of a run's warm-up: those of its configuration.

    Where the run's length follows from its data, they are at most a fifth of it: the recipes were
    made for a certain number of records.
    """
    steps = config["optimizer"]["warmup_steps"]
    return steps if config["train"]["steps"] else min(steps, total_steps // 5)


def _init_tuned(
    key: jax.Array,
    params: dict[str, Any],
    tune: tuning.TuneConfig,
    config: lora.LoraConfig,
    objective: LossConfig,
) -> dict[str, Any]:
    """The trainable parameters of step 0: the model's, and those of the loss."""
    tuned = tuning.init(key, params, tune, config)
    if objective.learn_temperature:
        tuned[tuning.OF_LOSS] = jnp.log(jnp.array(objective.first_temperatures))
    return tuned


@dataclass(frozen=True)
class Training:
    """What a run trains and how, a function of its configuration and checkpoint alone.

    tuned: the trainable parameters, as shapes. shardings: of the state.
    """

    lora: lora.LoraConfig
    tune: tuning.TuneConfig
    objective: LossConfig
    tx: Optimizer
    tuned: dict[str, Any]
    shardings: State

    @classmethod
    def build(
        cls, config: Mapping[str, Any], checkpoint: Checkpoint, total_steps: int, mesh: Mesh
    ) -> "Training":
        """From the configuration and the checkpoint's shapes; allocates nothing."""
        lora_config = lora.LoraConfig(**config["lora"])
        tune = tuning.TuneConfig(**config["tune"])
        objective = LossConfig.of(config)
        optimizer = {**config["optimizer"], "warmup_steps": warmup_steps(config, total_steps)}
        tx = make_optimizer(OptimizerConfig(**optimizer), total_steps)
        init = partial(_init_tuned, tune=tune, config=lora_config, objective=objective)
        tuned = jax.eval_shape(init, jax.random.key(0), abstract_model(checkpoint))
        return cls(lora_config, tune, objective, tx, tuned, state_shardings(tuned, tx, mesh))

    def fresh(self, params: dict[str, Any], seed: int = 0) -> State:
        """Step 0: new adapters, and a copy of those of `params` that are trained in full."""

        def init(key: jax.Array, params: dict[str, Any]) -> State:
            return init_state(self._init(key, params), self.tx)

        return jax.jit(init, out_shardings=self.shardings)(jax.random.key(seed), params)

    def untrained(self, params: dict[str, Any], seed: int = 0) -> dict[str, Any]:
        """The trainable parameters of step 0, with which the model is still the checkpoint's."""
        compiled = jax.jit(self._init, out_shardings=self.shardings["tuned"])
        return compiled(jax.random.key(seed), params)

    def _init(self, key: jax.Array, params: dict[str, Any]) -> dict[str, Any]:
        return _init_tuned(key, params, self.tune, self.lora, self.objective)

    @property
    def abstract(self) -> State:
        """The state as shapes."""
        return jax.eval_shape(partial(init_state, tx=self.tx), self.tuned)

    @property
    def sharded_abstract(self) -> State:
        """The state as shapes with shardings."""
        return with_shardings(self.abstract, self.shardings)

    def resume(self, store: RunStore) -> tuple[int, State, dict[str, Any]] | None:
        """(step, state, data position) of the newest readable checkpoint; None if there is none."""
        return store.restore_newest(self.abstract, self.shardings)
