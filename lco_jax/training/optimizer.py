"""AdamW with warm-up, a decay, and clipping by global norm."""

from dataclasses import dataclass

import optax

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
        raise LcoError(f"optimizer.warmup_steps {config.warmup_steps} must be less than the {total_steps} steps")
    decays = {
        "cosine": optax.cosine_decay_schedule(peak, decay_steps),
        "linear": optax.linear_schedule(peak, 0.0, decay_steps),
        "constant": optax.constant_schedule(peak),
    }
    if config.schedule not in decays:
        raise LcoError(f"optimizer.schedule is {config.schedule!r}; it is one of: {', '.join(decays)}")
    if config.warmup_steps == 0:
        return decays[config.schedule]
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return optax.join_schedules([warmup, decays[config.schedule]], [config.warmup_steps])


def make_optimizer(config: OptimizerConfig, total_steps: int) -> optax.GradientTransformation:
    """Clip, then AdamW."""
    adamw = optax.adamw(
        learning_rate(config, total_steps),
        b1=config.beta1,
        b2=config.beta2,
        eps=config.eps,
        weight_decay=config.weight_decay,
    )
    return optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw) if config.clip_norm else adamw
