"""AdamW with warm-up, a decay, and clipping by global norm."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import optax
from jax import Array

from lco_jax.core.errors import LcoError


@dataclass(frozen=True)
class OptimizerConfig:
    """learning_rate: the peak; schedule: cosine, linear or constant, after warmup_steps; clip_norm 0: no clipping."""

    learning_rate: float = 4e-4
    schedule: str = "cosine"
    warmup_steps: int = 0
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.0
    clip_norm: float = 1.0


def learning_rate(config: OptimizerConfig, total_steps: int) -> optax.Schedule:
    """Step -> rate: 0 at step 0, the peak after `warmup_steps`, 0 at `total_steps` (cosine or linear)."""
    peak, decay_steps = config.learning_rate, max(total_steps - config.warmup_steps, 1)
    if config.warmup_steps >= total_steps:
        raise LcoError(
            f"optimizer.warmup_steps {config.warmup_steps} must be less than the {total_steps} steps"
        )
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in decays:
        raise LcoError(
            f"optimizer.schedule is {config.schedule!r}; it is one of: {', '.join(decays)}"
        )
    if config.warmup_steps == 0:
        return decays[config.schedule]
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decays[config.schedule]], [config.warmup_steps])


class Optimizer(NamedTuple):
    """An optax transformation that tells its rate. rate: the rate of the update that comes next, of
    a state."""

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
        return schedule(optax.tree.get(state, "count", filtering=_of_schedule))

    return Optimizer(tx.init, tx.update, rate)


def _of_schedule(path: tuple, _: Array) -> bool:
    """Whether a leaf of an optimizer's state is the schedule's; Adam counts, too."""
    return getattr(path[-1], "tuple_name", "") == "ScaleByScheduleState"
