"""What the experiments of the laboratory share: a seed's folder, and how a run goes on."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError
from lco_jax.core.files import on_bucket, read_json, write_json


@dataclass
class SeedFolder:
    """One seed's folder, and what is in it."""

    config: ConfigDict
    folder: Path
    seed: int

    @property
    def world(self) -> Path:
        return self.folder / "world"


def claim(workdir: Path, config: ConfigDict) -> dict[str, Any]:
    """Write an experiment's configuration into its folder; returns it as JSON has it.

    Raises for a bucket, and for a folder that holds an experiment of another configuration.
    """
    if on_bucket(workdir):
        raise LcoError(
            f"--output={workdir}: the laboratory works in a folder; copy it to a bucket at the end"
        )
    content, file = json.loads(config.to_json()), workdir / "config.json"
    if file.exists() and read_json(file) != content:
        raise LcoError(
            f"{workdir} holds an experiment of another configuration; give another --output"
        )
    write_json(file, content)
    return content


def check_stages(config: ConfigDict) -> None:
    """Raise for stages of generative training that are none, or that have no checkpoint."""
    stages, every = list(config.stages), config.pretrain.checkpoint.every
    if not stages or stages != sorted(set(stages)) or stages[0] < 0 or stages[-1] == 0:
        raise LcoError(
            f"config.stages is {stages}; name steps of generative training, in ascending order"
        )
    if uneven := [steps for steps in stages if steps % every]:
        raise LcoError(
            f"config.stages has {uneven[0]}, which is no multiple of "
            f"config.pretrain.checkpoint.every={every}: there is no checkpoint of it"
        )


def once(file: Path, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `file` holds, made if it does not exist."""
    if not file.exists():
        write_json(file, make())
    return read_json(file)


def finished(results: dict[str, Any]) -> dict[str, Any]:
    """The results of a training. Ends the program where SIGTERM ended the training."""
    if not results:
        raise SystemExit("stopped; the same command goes on")
    return results
