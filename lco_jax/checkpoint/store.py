"""The state of a run on disk: orbax checkpoints, asynchronous, atomic, the newest of them kept.

A checkpoint has the adapters, the optimiser's moments and the step (one tree), and the position in
the data. The dropout key is a function of the seed and the step, so there is no other random state.
Orbax writes to a temporary folder and renames it when everything is there (on a bucket: to the
folder itself, where an object then says so): a kill at any moment leaves the checkpoint before.
Before that, checksums of its files are written beside them. One process compares them with the
files and tells the others, before all begin to read together.
"""

import errno
import hashlib
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils

from lco_jax.core.errors import DISK_FULL, LcoError, peer_is_gone, reason
from lco_jax.core.files import (
    AnyPath,
    checksum_of,
    listing,
    on_bucket,
    read_json,
    try_to_write,
    write_json,
)

CHECKSUMS = "sums.json"
COMMITTED = "commit_success.txt"  # orbax's, in a bucket's complete checkpoints
OS_ERROR_CODE = r"os_error_code='(\d+)'"  # in tensorstore's messages
ADVICE = {  # number of an error of the system -> what to do about it
    **dict.fromkeys(DISK_FULL, "make room"),
    **dict.fromkeys((errno.EACCES, errno.EPERM), "let this user write there"),
    errno.EROFS: "mount the disk so that it can be written",
    errno.EFBIG: "raise the limit on the size of a file (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
}
READ_ERRORS = (OSError, ValueError, KeyError)  # what orbax raises for files it cannot read
logger = logging.getLogger(__name__)


class Damaged(LcoError):
    """A checkpoint whose files are not as they were written."""


class RunStore:
    """Checkpoints of one run under `folder`, the newest `keep` of them. read_only: the run may be
    in progress.
    """

    def __init__(self, folder: AnyPath, keep: int, read_only: bool = False):
        if keep < 1:
            raise LcoError(f"config.checkpoint.keep is {keep}; it must be at least 1")
        if read_only and not folder.is_dir():
            raise LcoError(f"{folder} does not exist; the run has saved nothing yet")
        self.folder = epath.Path(folder if on_bucket(folder) else Path(folder).absolute())
        written = ocp.AsyncOptions(post_finalization_callback=self._write_checksums)
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep,
            enable_async_checkpointing=not read_only,
            create=not read_only,
            read_only=read_only,
            async_options=None if read_only else written,
            cleanup_tmp_directories=not read_only,
            # a process that sees an old listing (NFS) would read another step
            single_host_load_and_broadcast=True,
        )
        self._manager = ocp.CheckpointManager(self.folder, options=options)

    def steps(self) -> list[int]:
        """All complete checkpoints, the newest last."""
        return sorted(int(step) for step in self._manager.all_steps())

    def save(self, step: int, state: Any, data_position: dict[str, Any]) -> None:
        """Begin to save; returns when the state is copied out, before it is on disk.

        Raises where the folder cannot be written, or is no longer there: orbax would make another
        one, and nothing in it would tell whose run it is.
        """
        state_item = ocp.args.StandardSave(state)
        data_item = ocp.args.JsonSave(data_position)
        with self._explained():
            if not on_bucket(self.folder) and jax.process_index() == 0:
                try_to_write(self.folder)  # where orbax cannot begin, it waits for minutes
            self._manager.save(step, args=ocp.args.Composite(state=state_item, data=data_item))

    def restore(self, step: int, state: Any, where: Any) -> tuple[Any, dict[str, Any]]:
        """(state, data position) of a step. state: shapes; where: the sharding of every leaf, on
        any mesh.

        Raises where its files are not as they were written; every process does.
        """
        folder = self.folder / str(step)
        damage = _damage(folder) if jax.process_index() == 0 else ""
        if multihost_utils.broadcast_one_to_all(np.bool_(damage)):
            raise Damaged(f"{folder} is damaged: {damage or 'process 0 says how'}")

        def sharded(shape: Any, sharding: Any) -> jax.ShapeDtypeStruct:
            return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

        state_item = ocp.args.StandardRestore(jax.tree.map(sharded, state, where))
        items = ocp.args.Composite(state=state_item, data=ocp.args.JsonRestore())
        try:
            restored = self._manager.restore(step, args=items)
        except READ_ERRORS as error:  # if its files are as they were, it is another run's
            kind = LcoError if (folder / CHECKSUMS).exists() else Damaged
            raise kind(f"{folder} cannot be read: {reason(error)}") from error
        return restored.state, restored.data

    def read(self, step: int, part: Any) -> Any:
        """The part of a step's state that `part` names, a tree of shapes: on the host, and nothing
        else is read.

        For one process alone, as the first of several may be. Raises where files are not as they
        were written.
        """
        folder = self.folder / str(step)
        if damage := _damage(folder):
            raise Damaged(f"{folder} is damaged: {damage}")
        alone = ocp.options.MultiprocessingOptions(
            primary_host=jax.process_index(),
            active_processes={jax.process_index()},
            barrier_sync_key_prefix="read",
        )
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), part)
        handler = ocp.PyTreeCheckpointHandler(multiprocessing_options=alone)
        args = ocp.args.PyTreeRestore(part, restore_args=on_host, partial_restore=True)
        with ocp.Checkpointer(handler, multiprocessing_options=alone) as reader:
            try:
                found = reader.restore(folder / "state", args=args)
            except READ_ERRORS as error:
                raise LcoError(f"{folder} cannot be read: {reason(error)}") from error
        if not _has_all(found, part):
            raise LcoError(f"{folder} cannot be read: it holds another model, or other adapters")
        return found

    def restore_newest(self, state: Any, where: Any) -> tuple[int, Any, dict[str, Any]] | None:
        """(step, state, data position) of the newest checkpoint that can be read; None where none
        was ever saved.

        A damaged checkpoint is logged and put aside, as STEP.damaged. Raises where there are only
        such.
        """
        steps = self.steps()
        for step in reversed(steps):
            try:
                return step, *self.restore(step, state, where)
            except Damaged as error:
                self._put_aside(step, error)
        if steps or next(self.folder.glob("*.damaged"), None):
            advice = "give another --output to begin anew"
            raise LcoError(f"{self.folder} holds no checkpoint that can be read; {advice}")
        return None

    def _put_aside(self, step: int, error: Damaged) -> None:
        aside = self.folder / f"{step}.damaged"
        logger.warning("%s; it is put aside as %s, and the one before is used", error, aside.name)
        if jax.process_index() == 0:
            aside.rmtree(missing_ok=True)  # an earlier one of this step
            (self.folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("put aside")
        self._manager.reload()

    def reached_preemption(self, step: int) -> bool:
        """Whether `step` is the one at which all processes are to save, because one of them is to
        end.

        Each of several processes asks at every step. Costs no collective; always False for one
        alone.
        """
        return self._manager.reached_preemption(step)

    def close(self) -> None:
        """Returns when everything begun is on disk."""
        with self._explained():
            self._manager.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """What keeps a disk from being written becomes one sentence. What may pass, at a barrier or
        a bucket, does not.
        """
        try:
            yield
        except (OSError, ValueError) as error:
            if isinstance(error, TimeoutError) or peer_is_gone(error) or on_bucket(self.folder):
                raise
            if _is_gone(self.folder) or _number_of(error) == errno.ENOENT:
                advice = "put it back to resume; without it, the same command begins anew"
                gone = f"{self.folder}, or a file in it, was removed while the run worked"
                raise LcoError(f"{gone}; {advice}") from error
            place = f"{self.folder}, where those before it are whole"
            what = f"a checkpoint could not be written to {place}: {_explanation(error)}"
            raise LcoError(f"{what}, and the same command resumes") from error

    def _write_checksums(self) -> None:
        """Write the checksums of a checkpoint's files beside them, before it gets its name."""
        with suppress(OSError):  # a checkpoint without them is believed
            # there is one: the next save awaits this one, and torn ones were removed
            for folder in self.folder.glob("*"):
                if not _is_complete(folder):
                    write_json(folder / CHECKSUMS, _checksums(folder))


def _is_gone(folder: epath.Path) -> bool:
    """Whether a folder was removed. One that may not be looked at is there."""
    try:
        os.stat(folder)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return not folder.is_dir()


def _explanation(error: Exception) -> str:
    """What failed, and what to do about it."""
    number = _number_of(error)
    why = os.strerror(number) if number else reason(error)
    return f"{why}; {ADVICE.get(number, 'mend that')}"


def _number_of(error: Exception) -> int:
    """The number of the system's error, which tensorstore has in a long text; 0: it has none."""
    if isinstance(error, OSError):
        return error.errno or 0
    if str(error).startswith("NOT_FOUND"):
        return errno.ENOENT
    found = re.search(OS_ERROR_CODE, str(error))
    return int(found[1]) if found else 0


def _is_complete(folder: epath.Path) -> bool:
    """Whether a checkpoint has its name."""
    return (folder / COMMITTED).exists() if on_bucket(folder) else "tmp" not in folder.name


def _has_all(found: Any, shapes: Any) -> bool:
    """Whether what was read has all shapes; where there is no such leaf, orbax hands back the
    shape.
    """
    pairs = zip(jax.tree.leaves(found), jax.tree.leaves(shapes), strict=True)
    return all(isinstance(x, np.ndarray) and x.shape == shape.shape for x, shape in pairs)


def _checksums(folder: epath.Path) -> dict[str, str]:
    """A checksum of every file of a checkpoint's items; of an object, the bucket's own.

    Orbax writes the files beside the items once more when all else is done.
    """
    if on_bucket(folder):
        objects = listing(folder).items()
        return {name: str(checksum_of(about)) for name, about in objects if "/" in name}
    sums = {}
    for path in sorted(Path(folder).glob("*/**/*")):
        if path.is_file():
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256")
            sums[path.relative_to(folder).as_posix()] = digest.hexdigest()
    return sums


def _damage(folder: epath.Path) -> str:
    """What is wrong with a checkpoint's files; "" where nothing is, or nobody knows."""
    if not (folder / CHECKSUMS).exists():
        return ""
    try:
        written, found = read_json(folder / CHECKSUMS), _checksums(folder)
    except (LcoError, OSError) as error:
        return reason(error)
    wrong = [name for name in written if written[name] != found.get(name)]
    return f"{wrong[0]} is not as it was written" if wrong else ""
