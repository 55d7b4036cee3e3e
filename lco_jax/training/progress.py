"""What is told of every step: metrics, a progress bar, and the records behind a loss that is not finite, or leaps.

Dimensions: B records of the global batch, P processes.
"""

import json
import logging
import math
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.core.errors import LcoError
from lco_jax.training.metrics import MetricsLog, keep_before

RECENT, LEAST = 64, 16  # losses that tell what is usual; the fewest that do
WORST, NAME = (
    8,
    512,
)  # records that are named; bytes of a name that others are told, its end, where file and line stand
logger = logging.getLogger(__name__)


class Incidents:
    """Looks at every step, and writes what goes wrong to `workdir/incidents.jsonl`. Every process calls it alike.

    first_step: lines of it and later ones, of a run that was killed, are dropped. spike: `config.train.spike`.
    """

    def __init__(self, workdir: Path, first_step: int, spike: float):
        self.path, self.spike = workdir / "incidents.jsonl", spike
        self.recent: deque[float] = deque(maxlen=RECENT)
        if jax.process_index() == 0 and self.path.exists():
            keep_before(self.path, first_step)

    def look(
        self, step: int, loss: float, finite: bool, rows: jax.Array, where: Sequence[str]
    ) -> None:
        """finite: of the loss and its gradient; rows: float32 [B], as the step returns them; where: the origins of this
        process's share of the batch's records, number p + i · P being the i-th of process p."""
        usual = float(np.median(self.recent)) if len(self.recent) >= LEAST else None
        deviation = (
            0
            if usual is None
            else max(np.median(np.abs(np.array(self.recent) - usual)), abs(usual) / 100)
        )
        if finite:
            self.recent.append(loss)
            if usual is None or not self.spike or loss <= usual + self.spike * deviation:
                return
        values = np.asarray(jax.device_get(rows))
        order = np.lexsort((-np.nan_to_num(values), ~np.isnan(values)))  # NaN, then the highest
        worst = [int(i) for i in order[:WORST] if values[i] != -np.inf]
        names, values = _names(worst, where), values[worst]
        if jax.process_index():
            return
        records = [
            {
                "record": name,
                "loss": float(x) if math.isfinite(x) else None,
                "finite": not math.isnan(x),
            }
            for name, x in zip(names, values, strict=True)
        ]
        line = {"step": step, "loss": loss if math.isfinite(loss) else None, "skipped": not finite}
        line = json.dumps(
            {**line, "recent_median": usual, "records": records},
            ensure_ascii=False,
            allow_nan=False,
        )
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
        what = (
            f"the loss leaps from {usual:.4g} to {loss:.4g}"
            if finite
            else "the loss or its gradient is not finite"
        )
        named = ", ".join(f"{name} ({x:.4g})" for name, x in zip(names[:3], values, strict=False))
        logger.warning(
            "step %d: %s; the worst records and their losses: %s, … (%s)",
            step,
            what,
            named,
            self.path,
        )


def _names(numbers: Sequence[int], where: Sequence[str]) -> list[str]:
    """The origins of some records of the global batch, from the processes that have them."""
    processes, me = jax.process_count(), jax.process_index()
    told = np.zeros((len(numbers), NAME), np.uint8)
    for row, number in zip(told, numbers, strict=True):
        if number % processes == me:
            name = where[number // processes].encode()[-NAME:]
            row[: len(name)] = np.frombuffer(name, np.uint8)
    every = multihost_utils.process_allgather(told[None], tiled=True).max(
        axis=0
    )  # those of other processes are 0
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]


class Progress:
    """Metrics to the log and the progress bar, one step late: the next step is under way before
    these are fetched.

    Whatever is told of a step is among its metrics: anything computed here would wait behind the
    step under way.
    """

    def __init__(self, config: ConfigDict, workdir: Path, total_steps: int, first_step: int):
        self.log = MetricsLog(workdir, first_step, config) if jax.process_index() == 0 else None
        self.incidents = Incidents(workdir, first_step, config.train.spike)
        self.batch_size, self.limit = config.train.batch_size, config.train.max_nonfinite
        self.pending: tuple[int, dict[str, Any], tuple[str, ...]] | None = None
        self.skipped, self.in_a_row = self.log.skipped if self.log else 0, 0
        self.since = time.perf_counter()
        self.bar = tqdm(
            total=total_steps,
            initial=first_step,
            desc="training",
            unit="step",
            disable=not self.log,
            mininterval=0.5,
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
        values = {
            key: value if math.isfinite(value) else None for key, value in values.items()
        }  # JSON has no NaN
        values |= {
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
                "config.optimizer.learning_rate, or look at the records in incidents.jsonl"
            )

    def close(self) -> None:
        """End the bar and the log."""
        self.bar.close()
        if self.log:
            self.log.close()
