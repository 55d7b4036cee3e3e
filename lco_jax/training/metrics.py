"""Where a run's metrics go: a JSONL file and, on request, TensorBoard and Weights & Biases."""

import hashlib
import importlib
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError
from lco_jax.core.extras import install_line
from lco_jax.core.files import write_text

# package, the key that asks for it, our extra
TENSORBOARD = ("tensorboardX", "config.log.tensorboard", "tensorboard")
WANDB = ("wandb", "config.log.wandb_project", "wandb")
logger = logging.getLogger(__name__)


class MetricsLog:
    """One line a step in `workdir/metrics.jsonl`.

    first_step: where this process begins. Lines of later steps, which a killed run wrote after its
    last checkpoint, are dropped, so that the file always reads like one uninterrupted run.
    skipped: the number of steps so far that were not finite.
    """

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        self.path = workdir / "metrics.jsonl"
        earlier = keep_before(self.path, first_step)
        skipped = earlier[-1].get("skipped_steps") if earlier else 0
        self.skipped = skipped if isinstance(skipped, int) else 0
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
        self._tensorboard = _tensorboard(workdir, first_step) if config.log.tensorboard else None
        self._wandb = _wandb_run(workdir, config) if config.log.wandb_project else None

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the metrics of a step (0-based); None stands for one that was not finite."""
        line = json.dumps({"step": step, **values}, allow_nan=False)
        self._file.write(line + "\n")
        finite = {key: value for key, value in values.items() if value is not None}
        if self._tensorboard:
            for key, value in finite.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(finite, step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def _tensorboard(workdir: Path, first_step: int) -> Any:
    package = _optional(*TENSORBOARD)
    return package.SummaryWriter(str(workdir / "tensorboard"), purge_step=first_step)


def _wandb_run(workdir: Path, config: ConfigDict) -> Any:
    """The one run of this workdir, begun or resumed."""
    wandb = _optional(*WANDB)
    identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()
    return wandb.init(
        project=config.log.wandb_project,
        name=config.name,
        id=identity[:16],
        resume="allow",
        dir=workdir,
        config=json.loads(config.to_json()),
    )


def keep_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of `step` and of later steps from a file; returns what is left."""
    kept = [line for line in read_metrics(path) if line["step"] < step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics file that can be read. The file is for people: what is wrong with it
    stops no run, and a warning says how many lines were left out.

    A last line without an end is one that a kill has torn.
    """
    if not path.exists():
        return []
    *lines, _ = path.read_bytes().split(b"\n")
    read = [_metrics_of(line) for line in lines]
    good = [line for line in read if line is not None]
    if len(good) < len(read):
        bad = len(read) - len(good)
        logger.warning("%s: %d of %d lines cannot be read; left out", path, bad, len(read))
    return good


def _metrics_of(line: bytes) -> dict[str, Any] | None:
    """What a line says of a step; None where it cannot be read."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError):
        return None
    is_step = isinstance(values, dict) and isinstance(values.get("step"), int)
    return values if is_step else None


def check_packages(config: ConfigDict) -> None:
    """Raise where a package is missing that the metrics of the configuration need."""
    if config.log.tensorboard:
        _optional(*TENSORBOARD)
    if config.log.wandb_project:
        _optional(*WANDB)


def _optional(module: str, key: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise LcoError(f"{key} needs the package {module}: {install_line(extra)}") from error
