"""What a run reports of every step: metrics, a progress bar, the records behind a failed step."""

import json
import logging
import math
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.core.errors import LcoError
from lco_jax.training.metrics import MetricsLog, keep_before

WORST = 8  # records that are named
logger = logging.getLogger(__name__)


class StepReports:
    """Reports steps, each one step late: the next is under way before a step's metrics are fetched.

    Every process calls it alike. Everything that is reported of a step must be among its metrics:
    a computation here would wait behind the step that is under way.
    """

    def __init__(self, config: ConfigDict, workdir: Path, total_steps: int, first_step: int):
        is_writer = jax.process_index() == 0
        self.log = MetricsLog(workdir, first_step, config) if is_writer else None
        suffix = "" if is_writer else f"-{jax.process_index()}"
        self.incidents = workdir / f"incidents{suffix}.jsonl"
        if self.incidents.exists():
            keep_before(self.incidents, first_step)
        self.batch_size = config.train.batch_size
        self.max_nonfinite = config.train.max_nonfinite
        self.pending: tuple[int, dict[str, Any], tuple[str, ...]] | None = None
        self.skipped = self.log.skipped if self.log else 0
        self.skipped_in_a_row = 0
        self.since = time.perf_counter()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not is_writer,
            mininterval=0.5,
        )

    def record(self, step: int, metrics: Mapping[str, Any], where: tuple[str, ...]) -> None:
        """Queue the metrics of `step`, and report the step before.

        where: the file and line of each record in this process's share of the batch: record
        p + i · P of the batch is the i-th of process p among P.
        """
        self.flush()
        self.pending = step, dict(metrics), where

    def flush(self) -> None:
        """Report the queued step. Raises when too many steps in a row were not finite."""
        if self.pending is None:
            return
        step, metrics, where = self.pending
        self.pending = None
        record_losses = metrics.pop("record_losses")
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        if values.pop("finite"):
            self.skipped_in_a_row = 0
        else:
            self.skipped += 1
            self.skipped_in_a_row += 1
            share = slice(jax.process_index(), None, jax.process_count())
            losses = jax.device_get(record_losses)[share]
            report_incident(self.incidents, step, values["loss"], losses, where)
        self._write(step, values)
        if self.skipped_in_a_row >= self.max_nonfinite:
            raise LcoError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a "
                f"row, up to step {step}; lower config.optimizer.learning_rate, or look at the "
                f"records in {self.incidents.name}"
            )

    def _write(self, step: int, values: dict[str, float]) -> None:
        """Write a line and move the bar."""
        since, self.since = self.since, time.perf_counter()
        seconds = self.since - since
        records_per_second = self.batch_size / seconds
        line = {key: _json_number(value) for key, value in values.items()}
        line["tokens_per_s"] = line.pop("tokens") / seconds
        line["records_per_s"] = records_per_second
        line["skipped_steps"] = self.skipped
        if self.log:
            self.log.write(step, line)
        self.bar.set_postfix(
            loss=f"{values['loss']:.4f}", rate=f"{records_per_second:.0f}/s", refresh=False
        )
        self.bar.update()

    def close(self) -> None:
        """End the bar and the log."""
        self.bar.close()
        if self.log:
            self.log.close()


def report_incident(
    path: Path, step: int, loss: float, losses: np.ndarray, where: Sequence[str]
) -> None:
    """Name the records behind a step that was not finite, in a warning and in a line of `path`.

    losses: of this process's records, as of `info_nce`; where: their files and lines.
    """
    by_blame = np.lexsort((-np.nan_to_num(losses), ~np.isnan(losses)))  # NaN, then the highest
    worst = [i for i in by_blame[:WORST] if losses[i] != -np.inf]
    records = [
        {"record": where[i], "loss": _json_number(losses[i]), "finite": not np.isnan(losses[i])}
        for i in worst
    ]
    line = {"step": step, "loss": _json_number(loss), "records": records}
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
    logger.warning(
        "step %d: the loss or its gradient is not finite; the worst records and their losses: %s",
        step,
        ", ".join(f"{where[i]} ({losses[i]:.4g})" for i in worst),
    )


def _json_number(x: float) -> float | None:
    """x, or None if it is not finite, for which JSON has no number."""
    return float(x) if math.isfinite(x) else None
