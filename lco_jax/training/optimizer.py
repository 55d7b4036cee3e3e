"""AdamW with a warm-up, a decay, and clipping by the global norm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import optax
from jax import Array

from lco_jax.core.errors import LcoError


@dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate: the peak. schedule: cosine, linear or constant, after warmup_steps.

    clip_norm: 0 for no clipping.
    """

    learning_rate: float = 4e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Step -> rate: 0 at step 0, the peak after `warmup_steps`, 0 at `total_steps` if it decays."""
    peak, warmup_steps = config.learning_rate, config.warmup_steps
    if warmup_steps >= total_steps:
        raise LcoError(
            f"optimizer.warmup_steps {warmup_steps} must be less than the {total_steps} steps"
        )
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, total_steps - warmup_steps),
        "linear": optax.linear_schedule(peak, 0.0, total_steps - warmup_steps),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in decays:
        known = ", ".join(decays)
        raise LcoError(f"optimizer.schedule is {config.schedule!r}; it is one of: {known}")
    decay = decays[config.schedule]
    if warmup_steps == 0:
        return decay
    warmup = optax.linear_schedule(0.0, peak, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


class Optimizer(NamedTuple):
    """An optax transformation with its learning rate.

    rate: a state -> the learning rate of the next update.
    """

    init: optax.TransformInitFn
    update: optax.TransformUpdateFn
    rate: Callable[[optax.OptState], Array]


def make_optimizer(config: OptimizerConfig, total_steps: int) -> Optimizer:
    """Clip, then AdamW."""
    schedule = learning_rate(config, total_steps)
    tx = optax.adamw(
        schedule,
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm:
        tx = optax.chain(optax.clip_by_global_norm(config.clip_norm), tx)

    def rate(state: optax.OptState) -> Array:
        return schedule(optax.tree.get(state, "count", filtering=_is_of_schedule))

    return Optimizer(tx.init, tx.update, rate)


def _is_of_schedule(path: tuple, _: Array) -> bool:
    """Whether a leaf of an optimiser's state is the schedule's count and not Adam's."""
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
