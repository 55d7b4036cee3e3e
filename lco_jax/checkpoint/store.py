"""The state of a run on disk: orbax checkpoints, asynchronous, atomic, kept by count.

A checkpoint holds the adapters, the optimiser's moments and the step (one tree), and the position in the data. The
dropout key is a function of the seed and the step, so there is no other random state. Orbax writes to a temporary
folder and renames it when everything is there: a kill at any moment leaves the one before.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from lco_jax.core.errors import LcoError


class RunStore:
    """Checkpoints of one run under `folder`, the newest `keep` of them. read_only: the run may be in progress."""

    def __init__(self, folder: Path, keep: int, read_only: bool = False):
        if keep < 1:
            raise LcoError(f"config.checkpoint.keep is {keep}; it must be at least 1")
        if read_only and not folder.is_dir():
            raise LcoError(f"{folder} does not exist; the run has saved nothing yet")
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, enable_async_checkpointing=not read_only, create=not read_only, read_only=read_only
        )
        self._manager = ocp.CheckpointManager(folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest complete checkpoint."""
        return self._manager.latest_step()

    def steps(self) -> list[int]:
        """All complete checkpoints, the newest last."""
        return sorted(self._manager.all_steps())

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Begin to save; returns when the state is copied out, before it is on disk."""
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), data=ocp.args.JsonSave(data_position))
        self._manager.save(step, args=items)

    def restore(self, step: int, state: Any, where: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of a step. state: shapes; where: the sharding of every leaf, on any mesh."""
        target = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, where)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(target), data=ocp.args.JsonRestore())
        restored = self._manager.restore(step, args=items)
        return restored.state, restored.data

    def close(self) -> None:
        """Returns when everything begun is on disk."""
        self._manager.close()
