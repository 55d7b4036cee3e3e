"""What a run reports of every step: metrics, a progress bar, the records behind a failed step."""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.core.console import progress_bar, say_metrics, ticking
from lco_jax.core.errors import LcoError
from lco_jax.training.metrics import MetricsLog, keep_before

WORST = 8  # records that are named
RECENT = 50  # steps whose pace counts
# in 80 columns; what stands last is cut where numbers are long
BAR = "{desc}: {percentage:3.0f}%|{bar:8}| {n_fmt}/{total_fmt} in {elapsed}{postfix}"
logger = logging.getLogger(__name__)


class Pace:
    """How fast steps are. Time in which a program was compiled does not count.

    clock: seconds, as of `time.perf_counter`.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter):
        self.clock = clock
        self.since = clock()
        self.recent = deque[float](maxlen=RECENT)

    def restart(self) -> None:
        """Call when the first step is under way: it was compiled until now."""
        self.since = self.clock()

    def step_ended(self, compiled: bool) -> float:
        """The seconds since the last step ended. compiled: whether a program was, meanwhile."""
        since, self.since = self.since, self.clock()
        seconds = self.since - since
        if not compiled:
            self.recent.append(seconds)
        return seconds

    @property
    def seconds(self) -> float | None:
        """Of a step, the mean of recent ones; None before there is any."""
        return sum(self.recent) / len(self.recent) if self.recent else None


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
        self.has_begun = False
        self.programs = 0  # that the steps have needed so far
        self.pace = Pace()
        self.total_steps = total_steps
        self.bar = progress_bar(
            total=total_steps,
            initial=first_step,
            desc="compiling" if first_step < total_steps else "training",
            bar_format=BAR,
            disable=not is_writer,
        )
        self.compiling = ExitStack()
        self.compiling.enter_context(ticking(self.bar))

    def record(self, step: int, metrics: Mapping[str, Any], where: tuple[str, ...]) -> None:
        """Queue the metrics of `step`, which has begun, and report the step before.

        where: the file and line of each record in this process's share of the batch: record
        p + i · P of the batch is the i-th of process p among P.
        """
        programs = metrics.get("programs", 0)
        self.flush(compiled=programs > self.programs)
        self.programs = programs
        if not self.has_begun:
            self.has_begun = True
            self.compiling.close()
            self.pace.restart()
            self.bar.set_description_str("training")
        self.pending = step, dict(metrics), where

    def flush(self, compiled: bool = False) -> None:
        """Report the queued step. Raises when too many steps in a row were not finite.

        compiled: whether a program of the next step was compiled meanwhile.
        """
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
        self._write(step, values, compiled)
        if self.skipped_in_a_row >= self.max_nonfinite:
            raise LcoError(
                f"the loss or its gradient was not finite in {self.skipped_in_a_row} steps in a "
                f"row, up to step {step}; lower config.optimizer.learning_rate, or look at the "
                f"records in {self.incidents.name}"
            )

    def _write(self, step: int, values: dict[str, float], compiled: bool) -> None:
        """Write a line and move the bar."""
        seconds = self.pace.step_ended(compiled)
        line = {key: _json_number(value) for key, value in values.items()}
        line["tokens_per_s"] = line.pop("tokens") / seconds
        line["records_per_s"] = self.batch_size / seconds
        line["skipped_steps"] = self.skipped
        if self.log:
            self.log.write(step, line)
            say_metrics(f"step {step}", {"step": step, **line})
        self.bar.set_postfix_str(self._postfix(step, values["loss"]), refresh=False)
        self.bar.update()

    def _postfix(self, step: int, loss: float) -> str:
        """What stands behind the bar: the time that is left, the speed, and the loss."""
        parts = []
        if seconds := self.pace.seconds:
            left = (self.total_steps - step - 1) * seconds
            parts = [
                f"{tqdm.format_interval(left)} left",
                f"{self.batch_size / seconds:,.0f} records/s",
            ]
        return ", ".join([*parts, f"loss {loss:.3f}"])

    def close(self) -> None:
        """End the bar and the log."""
        self.compiling.close()
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
