"""What is told of every step, while a run goes on: metrics to the log, a progress bar, incidents."""

import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.core.errors import LcoError
from lco_jax.training.incidents import Incidents
from lco_jax.training.metrics import MetricsLog
from lco_jax.training.optimizer import OptimizerConfig, learning_rate


class Progress:
    """Metrics to the log and the progress bar, one step late: the next step is under way before these are fetched."""

    def __init__(self, config: ConfigDict, workdir: Path, total_steps: int, first_step: int):
        self.log = MetricsLog(workdir, first_step, config) if jax.process_index() == 0 else None
        self.incidents = Incidents(workdir, first_step, config.train.spike)
        self.batch_size, self.limit = config.train.batch_size, config.train.max_nonfinite
        self.rate = learning_rate(OptimizerConfig(**config.optimizer), total_steps)
        self.pending: tuple[int, dict[str, Any], tuple[str, ...]] | None = None
        self.skipped, self.in_a_row = self.log.skipped if self.log else 0, 0
        self.since = time.perf_counter()
        self.bar = tqdm(
            total=total_steps, initial=first_step, desc="training", unit="step", disable=not self.log, mininterval=0.5
        )

    def record(self, step: int, metrics: Mapping[str, Any], where: tuple[str, ...]) -> None:
        """Queue the metrics of `step`, and write those of the step before. where: of this process's records."""
        self.flush()
        self.pending = step, dict(metrics), where

    def flush(self) -> None:
        """Write what is queued. Raises when too many steps in a row were not finite."""
        if self.pending is None:
            return
        step, metrics, where = self.pending
        self.pending = None
        rows = metrics.pop("rows")
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        now, since = time.perf_counter(), self.since
        self.since = now
        finite = bool(values.pop("finite"))
        self.incidents.look(step, values["loss"], finite, rows, where)
        self.in_a_row = 0 if finite else self.in_a_row + 1
        values = {key: value if math.isfinite(value) else None for key, value in values.items()}  # JSON has no NaN
        values |= {
            "learning_rate": float(self.rate(step - self.skipped)),  # a skipped step does not advance the schedule
            "tokens_per_s": values.pop("tokens") / (now - since),
            "records_per_s": self.batch_size / (now - since),
            "skipped_steps": self.skipped + (not finite),
        }
        self.skipped = values["skipped_steps"]
        if self.log:
            self.log.write(step, values)
        self.bar.set_postfix(
            loss="-" if values["loss"] is None else f"{values['loss']:.4f}",
            rate=f"{values['records_per_s']:.0f}/s",
            refresh=False,
        )
        self.bar.update()
        if self.in_a_row >= self.limit:
            raise LcoError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; lower "
                "config.optimizer.learning_rate, or look at the records of these steps"
            )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()
        if self.log:
            self.log.close()
