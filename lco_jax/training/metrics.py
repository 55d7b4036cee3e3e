"""Where the numbers of a run go: a JSONL file always, TensorBoard and Weights & Biases when the config asks."""

import hashlib
import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError
from lco_jax.core.files import write_text


class MetricsLog:
    """One line a step in `workdir/metrics.jsonl`.

    first_step: where this process begins; lines of later steps, left by a run that was killed after its last
    checkpoint, are dropped, so that the file always reads like one uninterrupted run.
    """

    def __init__(self, workdir: Path, first_step: int, config: ConfigDict):
        self.path = workdir / "metrics.jsonl"
        kept = keep_before(self.path, first_step)
        self.skipped = (
            kept[-1]["skipped_steps"] if kept else 0
        )  # steps that were not finite, so far
        self._file = open(self.path, "a", encoding="utf-8", buffering=1)
        self._tensorboard = self._wandb = None
        if config.log.tensorboard:
            writer = _optional(
                "tensorboardX", "config.log.tensorboard", "tensorboard"
            ).SummaryWriter
            self._tensorboard = writer(str(workdir / "tensorboard"), purge_step=first_step)
        if config.log.wandb_project:
            wandb = _optional("wandb", "config.log.wandb_project", "wandb")
            identity = hashlib.sha256(str(workdir.absolute()).encode()).hexdigest()[
                :16
            ]  # one run a workdir
            self._wandb = wandb.init(
                project=config.log.wandb_project,
                name=config.name,
                id=identity,
                resume="allow",
                dir=workdir,
                config=json.loads(config.to_json()),
            )

    def write(self, step: int, values: Mapping[str, float | None]) -> None:
        """Record the numbers of a step (0-based); None is a number that was not finite."""
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        values = {key: value for key, value in values.items() if value is not None}
        if self._tensorboard:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(dict(values), step=step)

    def close(self) -> None:
        self._file.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()


def keep_before(path: Path, step: int) -> list[dict[str, Any]]:
    """Drop the lines of `step` and later ones from a file; what it then holds."""
    kept = [line for line in read_metrics(path) if line["step"] < step]
    write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
    return kept


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The complete lines of a metrics file; a last line torn by a kill is left out."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").split("\n")[
        :-1
    ]  # what follows the last newline is torn
    return [json.loads(line) for line in lines]


def _optional(module: str, key: str, extra: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise LcoError(
            f"{key} needs the package {module}: pip install 'lco-jax[{extra}]'"
        ) from None
