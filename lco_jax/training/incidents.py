"""Steps that go wrong, traced to their records: a loss that is not finite, or leaps.

Dimensions: B records of the global batch, P processes, W records that are named.
"""

import json
import logging
import math
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lco_jax.training.metrics import keep_before

RECENT, LEAST = 64, 16  # losses that tell what is usual; the fewest that do
WORST = 8  # records that are named
NAME = 512  # bytes of a name that others are told; its end, where file and line stand
FLAT = 0.01  # of the median: the least that counts as a deviation
logger = logging.getLogger(__name__)


class Incidents:
    """Looks at every step, and writes those that go wrong to `workdir/incidents.jsonl`. Every process calls it alike.

    first_step: lines of it and later ones, of a run that was killed, are dropped. spike: `config.train.spike`.
    """

    def __init__(self, workdir: Path, first_step: int, spike: float):
        self.path, self.spike = workdir / "incidents.jsonl", spike
        self.recent: deque[float] = deque(maxlen=RECENT)
        if jax.process_index() == 0 and self.path.exists():
            keep_before(self.path, first_step)

    def look(self, step: int, loss: float, finite: bool, rows: jax.Array, where: Sequence[str]) -> None:
        """finite: of the loss and its gradient; rows: float32 [B], as the step returns them; where: the origins of this
        process's share of the batch's records, number p + i · P being the i-th of process p."""
        usual = float(np.median(self.recent)) if self.recent else math.nan
        leaps = finite and self._leaps(loss, usual)
        if finite:
            self.recent.append(loss)
        if finite and not leaps:
            return
        values = np.asarray(jax.device_get(rows))
        order = np.lexsort((-np.nan_to_num(values, nan=0.0), ~np.isnan(values)))  # NaN, then the highest
        worst = [int(i) for i in order[:WORST] if values[i] != -np.inf]
        names = _names(worst, where)
        if jax.process_index():
            return
        records = [
            {"record": name, "loss": float(x) if math.isfinite(x) else None, "finite": not math.isnan(x)}
            for name, x in zip(names, values[worst], strict=True)
        ]
        line = {"step": step, "loss": loss if math.isfinite(loss) else None, "skipped": not finite}
        line |= {"recent_median": usual if math.isfinite(usual) else None, "records": records}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        what = (
            f"the loss leaps to {loss:.4g} from {usual:.4g}" if leaps else "loss or gradient not finite, step skipped"
        )
        blamed = [one for one in records if not one["finite"]] or records
        shown = ["" if one["loss"] is None else f" ({one['loss']:.4g})" for one in blamed[:3]]
        named = ", ".join(one["record"] + x for one, x in zip(blamed, shown, strict=False))
        kind = "not finite in itself" if blamed and not blamed[0]["finite"] else "highest"
        logger.warning("step %d: %s; %s: %s (more in %s)", step, what, kind, named, self.path)

    def _leaps(self, loss: float, usual: float) -> bool:
        if not self.spike or len(self.recent) < LEAST:
            return False
        deviation = max(float(np.median(np.abs(np.array(self.recent) - usual))), FLAT * abs(usual))
        return loss > usual + self.spike * deviation


def _names(numbers: Sequence[int], where: Sequence[str]) -> list[str]:
    """The origins of some records of the global batch, from the processes that have them."""
    processes, me = jax.process_count(), jax.process_index()
    if processes == 1:
        return [where[i] for i in numbers]
    told = np.zeros((len(numbers), NAME), np.uint8)
    for row, number in zip(told, numbers, strict=True):
        if number % processes == me:
            name = where[number // processes].encode()[-NAME:]
            row[: len(name)] = np.frombuffer(name, np.uint8)
    every = multihost_utils.process_allgather(told).max(axis=0)  # those of other processes are 0
    return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in every]
