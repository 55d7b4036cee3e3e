"""What fits: the remat policy and the GradCache chunk for the memory of the devices, by asking their compiler.

The real training step is compiled for the planned shapes under the policy that is likeliest to be the best that fits,
and its compiler says what it takes. At most three are compiled, what was learned is kept on disk, and the run goes on
with the program that was compiled for the choice.
"""

import json
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError
from lco_jax.core.files import cache_folder, write_text
from lco_jax.core.packing import Answers, Batch, PackedTokens, Shape
from lco_jax.core.sharding import ROWS, replicated, row_shards
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import REMAT_POLICIES

MARGIN = 0.05  # of a device's memory, left to the runtime, to fragmentation and to batches larger than planned
MOST = 3  # programs that are compiled for a choice
PARTS = (
    2,
    3,
    4,
    6,
    8,
    12,
    16,
    24,
    32,
    48,
    64,
    96,
    128,
    192,
    256,
)  # chunks that a batch is tried in
LEAST = 128  # tokens of a chunk
# Policies by speed, where least recomputation is not it: on CPU "none" was slower than "mlp" in every round, and
# takes twice the memory.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("mlp", "gate", "attention", "full")}
MIB, GIB = 2**20, 2**30

logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """remat: a key of `REMAT_POLICIES`. chunk_tokens: as `Layout` has it."""

    remat: str
    chunk_tokens: int

    def __str__(self) -> str:
        chunk = (
            f"chunks of {self.chunk_tokens:,} tokens"
            if self.chunk_tokens
            else "the batch in one chunk"
        )
        return f"remat {self.remat}, {chunk}"


class Choice(NamedTuple):
    """What was chosen. need, memory: bytes that the compiler says a device needs, and that there are."""

    remat: str
    chunk_tokens: int
    need: int
    memory: int

    def __str__(self) -> str:
        of = f"{self.need / GIB:.2f} of {self.memory / GIB:.2f} GiB a device"
        return f"{Candidate(self.remat, self.chunk_tokens)}: {of}, says the compiler"


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """What a device holds while the program runs, its compiler says: arguments, temporaries, results and code."""
    found = compiled.memory_analysis()
    held = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def refused_bytes(error: jax.errors.JaxRuntimeError) -> int:
    """What a program would take that a TPU's compiler refuses, since memory does not hold it. Raises other errors."""
    used = re.search(r"(?:Used |\()([\d.]+)([MG])\)? (?:of|exceeds) ", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
        raise error
    return int(float(used[1]) * (GIB if used[2] == "G" else MIB))


def abstract_tokens(
    shape: Shape, leading: tuple[int, ...], prefix: int | None, place: NamedSharding | None = None
) -> PackedTokens:
    """Streams of `shape` as shapes. leading: their number, and what stands before it. prefix: as of `PackedTokens`."""

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *sizes), dtype, sharding=place)

    one, keys, positions = (
        array(shape.tokens),
        array(shape.tokens, dtype=jnp.uint32),
        array(shape.tokens, 3),
    )
    groups = tuple(array(count, width) for width, count in sorted(shape.rows.items()))
    return PackedTokens(
        one, positions, keys, one, groups, one, array(sum(shape.rows.values())), prefix
    )


def abstract_batch(
    shape: Shape,
    sides: tuple[int, int],
    prefix: int,
    mesh: Mesh,
    media: Mapping[str, Any] | None = None,
) -> Batch:
    """A batch as shapes on the mesh. sides: [B, 2 + M]; prefix: tokens that all texts share; media: as `Batch` has it."""
    place = NamedSharding(mesh, PartitionSpec(None, ROWS))
    leading = shape.chunks, row_shards(mesh)
    answers = None
    if shape.answers:
        one = jax.ShapeDtypeStruct((*leading, shape.answers), jnp.int32, sharding=place)
        answers = Answers(one, one, one)
    table = jax.ShapeDtypeStruct(sides, jnp.int32, sharding=replicated(mesh))
    if (processes := jax.process_count()) > 1:  # as processes that share a batch make them
        split = sides[0] // processes, row_shards(mesh), sides[1]
        table = jax.ShapeDtypeStruct(split, jnp.int32, sharding=place)
    return Batch(
        abstract_tokens(shape, leading, prefix, place), table, table, dict(media or {}), answers
    )


def abstract_media(
    layouts: Mapping[str, Any], floor: Mapping[str, tuple[int, int]], mesh: Mesh
) -> dict[str, Any]:
    """What towers read of a batch as planned, as shapes. layouts: `Processor.rows`. floor: a `Layout`'s media_floor."""
    place, shards = NamedSharding(mesh, PartitionSpec(ROWS)), row_shards(mesh)

    def global_shape(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(x) * shards, *x.shape[1:]), x.dtype, sharding=place)

    found = {}
    for tower, (width, count) in floor.items():
        found[tower] = jax.tree.map(global_shape, layouts[tower].empty(count, width))
    return found


def held_bytes(tree: Any) -> int:
    """Of the arrays or shapes of a tree, those that one device holds."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


def rough_bytes(
    config: DecoderConfig,
    state: Any,
    params: Any,
    remat: str,
    tokens: int,
    itemsize: int,
    tensor: int = 1,
) -> int:
    """About what a step takes, to begin with the likeliest policy; how far off it is matters little.

    state, params: placed, of which what is tuned has a gradient and an update beside it. tokens: of a device's chunk;
    itemsize: bytes of an activation. tensor: the ways a product is split.
    """
    heads, mlp = (
        config.head_dim * (config.num_heads + config.num_kv_heads) / tensor,
        config.intermediate_size / tensor,
    )
    kept = {"full": 0, "attention": 2 * heads, "gate": 2 * heads + mlp, "mlp": 2 * heads + 2 * mlp}
    kept["none"] = 3 * kept["mlp"]
    at_work = 4 * mlp + 8 * config.hidden_size  # of one layer
    activations = (
        tokens * itemsize * (config.num_layers * (config.hidden_size + kept[remat]) + at_work)
    )
    return held_bytes((params, state)) + 2 * held_bytes(state["tuned"]) + int(activations)


def device_bytes(held: int) -> int:
    """Memory of a device that a run may fill, the least in any process. held: by what the run holds already."""
    device = jax.local_devices()[0]
    total = (device.memory_stats() or {}).get("bytes_limit")  # of a GPU what jax preallocates
    if total is None:  # a CPU: its devices share what is free
        total = held + free_memory() // jax.local_device_count()
    return -_most_of_all(-int(total * (1 - MARGIN)))


def _most_of_all(size: int) -> int:
    """The largest of every process's, in whole MiB, for jax's integers have 32 bits."""
    if jax.process_count() == 1:
        return size
    return int(multihost_utils.process_allgather(np.int32(-(-size // MIB))).max()) * MIB


def free_memory(root: Path = Path("/")) -> int:
    """Bytes that this process may still take: of the machine, and of its cgroup (a container's, a job's)."""
    try:
        lines = (root / "proc/meminfo").read_text(encoding="utf-8").splitlines()
        free = next(
            int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")
        )
    except (OSError, StopIteration):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for folder in _cgroups(root):
        try:
            limit = (folder / "memory.max").read_text(encoding="utf-8").strip()
            used = int((folder / "memory.current").read_text(encoding="utf-8"))
            stat = dict(
                line.split()
                for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines()
            )
        except (OSError, ValueError):  # no limit is set there, or it is not ours to read
            continue
        if limit.isdecimal():
            free = min(free, int(limit) - used + int(stat.get("inactive_file", 0)))
    return max(free, 0)


def _cgroups(root: Path) -> list[Path]:
    """This process's cgroup (version 2) and those above it, each of which may set a limit."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    name = next((line[3:] for line in lines if line.startswith("0::")), None)
    if name is None:
        return []
    top = root / "sys/fs/cgroup"
    mine = top / name.strip("/")
    return [folder for folder in (mine, *mine.parents) if folder == top or top in folder.parents]


def candidates(
    remat: str, chunk_tokens: int, tokens: int, backend: str | None = None
) -> list[Candidate]:
    """What may be chosen, from the fastest to that with the least memory.

    remat, chunk_tokens: the configuration's; "auto" and -1 are chosen. tokens: of a stream that holds a whole batch.
    Chunks cost a second forward pass, so they come last, under the last policy.
    """
    fastest = ORDER.get(backend or jax.default_backend(), tuple(reversed(REMAT_POLICIES)))
    policies = fastest if remat == "auto" else (remat,)
    found = [Candidate(policy, max(chunk_tokens, 0)) for policy in policies]
    if chunk_tokens < 0:
        sizes = [-(-tokens // parts) for parts in PARTS]
        sizes = [-(-size // LEAST) * LEAST for size in sizes]
        found += [Candidate(policies[-1], size) for size in dict.fromkeys(sizes) if size < tokens]
    return found


def choose(
    memory: int,
    options: Sequence[Candidate],
    rough: Callable[[Candidate], int],
    need: Callable[[Candidate], int],
) -> Choice:
    """The first of the options that fits `memory` bytes a device, with `need` asked at most `MOST` times.

    rough: about what each takes: differences are trusted more than numbers. need: what the compiler says. Raises where
    nothing was found that fits.
    """
    known: dict[int, int] = {}
    guesses = [rough(one) for one in options]
    off = 0  # by how much the last guess was wrong

    def likeliest(room: float) -> int:
        fitting = (i for i, guess in enumerate(guesses) if known.get(i, guess + off) <= room)
        return next(fitting, len(options) - 1)

    at = likeliest(memory)
    while at not in known and len(known) < MOST:
        known[at] = need(options[at])
        off = known[at] - guesses[at]
        last = len(known) == MOST - 1 and min(known.values()) > memory
        at = likeliest(memory * 0.9 if last else memory)
    fits = [i for i, size in known.items() if size <= memory]
    if not fits:
        i = min(known, key=known.__getitem__)
        advice = "raise config.mesh.fsdp, or quantize the model"
        if all(one.chunk_tokens == options[0].chunk_tokens for one in options):
            advice = f"set config.train.chunk_tokens to -1 (auto), {advice}"
        raise LcoError(
            f"a training step needs {known[i] / GIB:.1f} GiB a device with {options[i]}, and there are "
            f"{memory / GIB:.1f}; {advice}"
        )
    best = min(fits)
    return Choice(*options[best], known[best], memory)


def choose_for(
    config: Mapping[str, Any],
    decoder: DecoderConfig,
    params: Mapping[str, Any],
    besides: Any,
    state: Any,
    mesh: Mesh,
    shape_of: Callable[[int], Shape],
    lower: Callable[[Candidate], jax.stages.Lowered],
) -> Choice:
    """`choose` for a run on these devices.

    config: the run's. params: the parts of the model that the step is given, and besides: others that are there, too
    (frozen towers). state: the run's, as shapes. shape_of: chunk_tokens -> the planned shape of a stream. lower: makes
    the step.
    """
    itemsize = 4 if jax.default_backend() == "cpu" else jnp.dtype(config["model"]["dtype"]).itemsize
    asked = config["model"]["remat"], config["train"]["chunk_tokens"]

    def rough(one: Candidate) -> int:
        tokens = shape_of(one.chunk_tokens).tokens
        return rough_bytes(
            decoder, state, params, one.remat, tokens, itemsize, mesh.shape["tensor"]
        )

    def need(one: Candidate) -> int:
        return remembered_bytes(lower(one), str(one))

    memory = device_bytes(held_bytes((params, besides))) - held_bytes(besides)
    return choose(memory, candidates(*asked, shape_of(0).tokens), rough, need)


def remembered_bytes(lowered: jax.stages.Lowered, what: str) -> int:
    """What a program takes, by its compiler or, once it was compiled, from the disk. what: is said before compiling.

    The key is the program itself, and what compiles it; processes that share a run look up or compile together.
    """
    device = jax.local_devices()[0]
    made_by = jax.__version__, device.platform, device.device_kind, device.client.platform_version
    key = repr((made_by, jax.device_count(), os.environ.get("XLA_FLAGS", ""), lowered.as_text()))
    file = cache_folder() / "memory" / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    known = _read(file)
    if _most_of_all(MIB * (known is None)):
        logger.info("compiling the training step with %s", what)
        try:
            known = peak_bytes(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            known = refused_bytes(error)
        known = _most_of_all(known)
        write_text(file, json.dumps({"bytes": known, "what": what}))
    return known


def _read(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # not there, or torn: it is made again
        return None
