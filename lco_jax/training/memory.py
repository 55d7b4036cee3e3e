"""What fits: the remat policy and the GradCache chunk for the memory of the devices.

We ask the compiler. The real training step is compiled for the planned shapes under the policy that
is likely the fastest that fits, and its compiler says how much memory it takes. At most three
candidates are compiled. The answers are stored on disk, and the run uses the program that was
compiled for the choice.
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

from lco_jax.core.console import waiting
from lco_jax.core.errors import LcoError
from lco_jax.core.files import cache_folder, write_text
from lco_jax.core.packing import Answers, Batch, PackedTokens
from lco_jax.core.prefixes import Branches
from lco_jax.core.sharding import ROWS, replicated, row_shards
from lco_jax.core.stream_shapes import Shape
from lco_jax.models.config import DecoderConfig
from lco_jax.models.decoder import REMAT_POLICIES

MARGIN = 0.05  # of a device's memory: for the runtime, fragmentation, batches larger than planned
MOST = 3  # programs that are compiled for a choice
PARTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)  # chunks of a batch to try
LEAST = 128  # tokens of a chunk
# Policies from the fastest, by backend, unless that is the one with the least recomputation. On CPU
# "none" was slower than "mlp" in every round, and takes twice the memory.
ORDER: dict[str, tuple[str, ...]] = {"cpu": ("mlp", "gate", "attention", "full")}
MIB, GIB = 2**20, 2**30

logger = logging.getLogger(__name__)


class Candidate(NamedTuple):
    """remat: a key of `REMAT_POLICIES`. chunk_tokens: as `Layout` has it."""

    remat: str
    chunk_tokens: int

    def __str__(self) -> str:
        if self.chunk_tokens:
            return f"remat {self.remat}, chunks of {self.chunk_tokens:,} tokens"
        return f"remat {self.remat}, the batch in one chunk"


class Choice(NamedTuple):
    """The chosen candidate. need, memory: the bytes that a device needs for it, and has."""

    remat: str
    chunk_tokens: int
    need: int
    memory: int

    def __str__(self) -> str:
        sizes = f"{self.need / GIB:.2f} of {self.memory / GIB:.2f} GiB a device"
        return f"{Candidate(self.remat, self.chunk_tokens)}: {sizes}, says the compiler"


# ---- a choice


def candidates(
    remat: str, chunk_tokens: int, tokens: int, backend: str | None = None
) -> list[Candidate]:
    """What may be chosen, from the fastest to the one with the least memory.

    remat, chunk_tokens: the configuration's; "auto" and -1 are chosen. tokens: of a stream that
    holds all of a batch. Chunks cost a second forward pass, so they come last, under the last
    policy.
    """
    fastest = ORDER.get(backend or jax.default_backend(), tuple(reversed(REMAT_POLICIES)))
    policies = fastest if remat == "auto" else (remat,)
    found = [Candidate(policy, max(chunk_tokens, 0)) for policy in policies]
    if chunk_tokens < 0:
        for parts in PARTS:
            size = math.ceil(math.ceil(tokens / parts) / LEAST) * LEAST
            candidate = Candidate(policies[-1], size)
            if size < tokens and candidate not in found:
                found.append(candidate)
    return found


def choose(
    memory: int,
    options: Sequence[Candidate],
    rough: Callable[[Candidate], int],
    need: Callable[[Candidate], int],
) -> Choice:
    """The first of the options that fits `memory` bytes a device.

    rough: estimates what an option takes; only differences of estimates are trusted. need: what the
    compiler says; it is asked `MOST` times at most. Raises if it finds none that fits.
    """
    estimates = [rough(option) for option in options]
    expected = list(estimates)
    known: dict[int, int] = {}
    tried = _first_that_fits(expected, memory)
    while tried not in known and len(known) < MOST:
        known[tried] = need(options[tried])
        error = known[tried] - estimates[tried]
        expected = [known.get(i, estimate + error) for i, estimate in enumerate(estimates)]
        is_last = len(known) == MOST - 1 and min(known.values()) > memory
        tried = _first_that_fits(expected, memory * 0.9 if is_last else memory)
    fits = [i for i, size in known.items() if size <= memory]
    if not fits:
        raise _nothing_fits(memory, options, known)
    best = min(fits)
    return Choice(*options[best], known[best], memory)


def _nothing_fits(memory: int, options: Sequence[Candidate], known: Mapping[int, int]) -> LcoError:
    least = min(known, key=known.__getitem__)
    advice = "raise config.mesh.fsdp, or quantize the model"
    if len({option.chunk_tokens for option in options}) == 1:
        advice = f"set config.train.chunk_tokens to -1 (auto), {advice}"
    return LcoError(
        f"a training step needs {known[least] / GIB:.1f} GiB a device with {options[least]}, "
        f"and there are {memory / GIB:.1f}; {advice}"
    )


def _first_that_fits(sizes: Sequence[int], memory: float) -> int:
    """The index of the first size that fits; the last index if none does."""
    return next((i for i, size in enumerate(sizes) if size <= memory), len(sizes) - 1)


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

    config: the run's. params: the parts of the model that the step takes. besides: other arrays on
    the devices (frozen towers). state: the run's, as shapes. shape_of: chunk_tokens -> the planned
    shape of a stream. lower: traces the step.
    """
    itemsize = 4 if jax.default_backend() == "cpu" else jnp.dtype(config["model"]["dtype"]).itemsize
    tensor = mesh.shape["tensor"]

    def rough(candidate: Candidate) -> int:
        tokens = shape_of(candidate.chunk_tokens).tokens
        return rough_bytes(decoder, state, params, candidate.remat, tokens, itemsize, tensor)

    def need(candidate: Candidate) -> int:
        return remembered_bytes(lower(candidate), str(candidate))

    tokens = shape_of(0).tokens
    options = candidates(config["model"]["remat"], config["train"]["chunk_tokens"], tokens)
    memory = device_bytes(stored_bytes((params, besides))) - stored_bytes(besides)
    return choose(memory, options, rough, need)


# ---- the memory of a program


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """The memory of a device while the program runs, as its compiler says.

    It is that of arguments, temporaries, code, and of the results that replace no argument.
    """
    found = compiled.memory_analysis()
    arrays = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return arrays + found.temp_size_in_bytes + found.generated_code_size_in_bytes


def refused_bytes(error: jax.errors.JaxRuntimeError) -> int:
    """The memory of a program that a TPU's compiler refuses as too large. Raises other errors."""
    used = re.search(r"(?:Used |\()([\d.]+)([KMGTPE])\)? (?:of|exceeds) ", str(error))
    if "RESOURCE_EXHAUSTED" not in str(error) or used is None:
        raise error
    return int(float(used[1]) * 1024 ** (1 + "KMGTPE".index(used[2])))


def remembered_bytes(lowered: jax.stages.Lowered, what: str) -> int:
    """The memory of a program: from the disk, or from its compiler if the disk does not know it.

    what: the program's name. The key is the program and what compiles it.
    The processes of a run look up together, or compile together.
    """
    device = jax.local_devices()[0]
    made_by = jax.__version__, device.platform, device.device_kind, device.client.platform_version
    key = repr((made_by, jax.device_count(), os.environ.get("XLA_FLAGS", ""), lowered.as_text()))
    file = cache_folder() / "memory" / f"{blake2b(key.encode(), digest_size=16).hexdigest()}.json"
    known = _read(file)
    if _largest_of_all(MIB if known is None else 0):
        logger.debug("compiling the training step with %s", what)
        try:
            with waiting("compiling the training step", shown=jax.process_index() == 0):
                known = peak_bytes(lowered.compile())
        except jax.errors.JaxRuntimeError as error:
            known = refused_bytes(error)
        known = _largest_of_all(known)
        write_text(file, json.dumps({"bytes": known, "what": what}))
    return known


def _read(file: Path) -> int | None:
    try:
        return int(json.loads(file.read_text(encoding="utf-8"))["bytes"])
    except (OSError, ValueError, KeyError, TypeError):  # absent or torn: it is made again
        return None


def rough_bytes(
    config: DecoderConfig,
    state: Any,
    params: Any,
    remat: str,
    tokens: int,
    itemsize: int,
    tensor: int = 1,
) -> int:
    """An estimate of what a step takes, with which `choose` begins.

    state, params: with shardings; trainable parameters have a gradient and an update beside them.
    tokens: of a device's chunk. itemsize: bytes of an activation. tensor: the ways a product is
    split.
    """
    attention = 2 * config.head_dim * (config.num_heads + config.num_kv_heads) / tensor
    mlp = config.intermediate_size / tensor
    kept_by_layer = {
        "full": 0,
        "attention": attention,
        "gate": attention + mlp,
        "mlp": attention + 2 * mlp,
        "none": 3 * (attention + 2 * mlp),
    }
    kept = config.num_layers * (config.hidden_size + kept_by_layer[remat])
    in_use = 4 * mlp + 8 * config.hidden_size  # of the layer that is computed
    activations = int(tokens * itemsize * (kept + in_use))
    return stored_bytes((params, state)) + 2 * stored_bytes(state["tuned"]) + activations


def stored_bytes(tree: Any) -> int:
    """The bytes that one device stores of the arrays or shapes of a tree."""
    total = 0
    for x in jax.tree.leaves(tree):
        sharding = getattr(x, "sharding", None)
        shape = x.shape if sharding is None else sharding.shard_shape(x.shape)
        total += math.prod(shape) * x.dtype.itemsize
    return total


# ---- the memory of a device


def device_bytes(stored: int) -> int:
    """The memory of a device that a run may fill, the least in any process.

    stored: the bytes of it that the run has filled already.
    """
    device = jax.local_devices()[0]
    total = (device.memory_stats() or {}).get("bytes_limit")  # of a GPU what jax preallocates
    if total is None:  # a CPU: its devices share what is free
        total = stored + free_memory() // jax.local_device_count()
    return -_largest_of_all(-int(total * (1 - MARGIN)))


def _largest_of_all(size: int) -> int:
    """The largest of all processes' sizes, in MiB, since jax's integers have 32 bits."""
    if jax.process_count() == 1:
        return size
    return int(multihost_utils.process_allgather(np.int32(-(-size // MIB))).max()) * MIB


def free_memory(root: Path = Path("/")) -> int:
    """The bytes that this process may still take: of the machine, and of its cgroups."""
    try:
        free = _fields(root / "proc/meminfo")["MemAvailable"] * 1024
    except (OSError, KeyError):  # no Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    for folder in _cgroups(root):
        try:
            limit = int((folder / "memory.max").read_text(encoding="utf-8"))
            used = int((folder / "memory.current").read_text(encoding="utf-8"))
            cached = _fields(folder / "memory.stat").get("inactive_file", 0)
        except (OSError, ValueError):  # it sets no limit ("max"), or we may not read it
            continue
        free = min(free, limit - used + cached)
    return max(free, 0)


def _fields(file: Path) -> dict[str, int]:
    """{name: number} of a file that has a name and a number in each line."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {name.rstrip(":"): int(number) for name, number, *_ in map(str.split, lines)}


def _cgroups(root: Path) -> list[Path]:
    """This process's cgroup (version 2) and those above it; each may set a limit."""
    try:
        text = (root / "proc/self/cgroup").read_text(encoding="utf-8")
    except OSError:
        return []
    name = re.search(r"^0::(.*)", text, re.MULTILINE)
    if name is None:
        return []
    top = root / "sys/fs/cgroup"
    mine = top / name[1].strip("/")
    return [folder for folder in (mine, *mine.parents) if folder.is_relative_to(top)]


# ---- a batch as shapes


def abstract_tokens(
    shape: Shape,
    leading: tuple[int, ...],
    branches: Branches | None,
    sharding: NamedSharding | None = None,
) -> PackedTokens:
    """Streams of `shape` as shapes.

    leading: the axes before a stream's. branches: as `PackedTokens` has them.
    """

    def array(*sizes: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((*leading, *sizes), dtype, sharding=sharding)

    one = array(shape.tokens)
    return PackedTokens(
        input_ids=one,
        position_ids=array(shape.tokens, 3),
        token_keys=array(shape.tokens, dtype=jnp.uint32),
        media_slots=one,
        rows=tuple(array(count, width) for width, count in sorted(shape.rows.items())),
        home=one,
        last_tokens=array(sum(shape.rows.values())),
        branches=branches,
    )


def abstract_batch(
    shape: Shape,
    sides: tuple[int, int],
    branches: Branches,
    mesh: Mesh,
    media: Mapping[str, Any] | None = None,
    teacher: bool = False,
    guide: int = 0,
) -> Batch:
    """A batch as shapes on the mesh.

    sides: [B, 2 + M]. branches: as `PackedTokens` has them. media: as `Batch` has it. teacher:
    whether it has a teacher's scores. guide: the numbers of a guide's vector; 0: there is none.
    """
    sharding = NamedSharding(mesh, PartitionSpec(None, ROWS))
    leading = shape.chunks, row_shards(mesh)
    answers = None
    if shape.answers:
        one = jax.ShapeDtypeStruct((*leading, shape.answers), jnp.int32, sharding=sharding)
        answers = Answers(one, one, one)
    table = jax.ShapeDtypeStruct(sides, jnp.int32, sharding=replicated(mesh))
    processes = jax.process_count()
    if processes > 1:  # the table has a part of each process
        split = sides[0] // processes, row_shards(mesh), sides[1]
        table = jax.ShapeDtypeStruct(split, jnp.int32, sharding=sharding)
    tokens = abstract_tokens(shape, leading, branches, sharding)
    scores = table.update(dtype=jnp.float32) if teacher else None
    vectors = table.update(shape=(*table.shape, guide), dtype=jnp.float32) if guide else None
    return Batch(tokens, table, table, dict(media or {}), answers, table, scores, vectors)


def abstract_media(
    layouts: Mapping[str, Any], floor: Mapping[str, tuple[int, int]], mesh: Mesh
) -> dict[str, Any]:
    """What towers read of a batch as planned, as shapes.

    layouts: `Processor.rows`. floor: the media_floor of a `Layout`.
    """
    shards = row_shards(mesh)
    sharding = NamedSharding(mesh, PartitionSpec(ROWS))

    def of_all_shards(x: np.ndarray) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((len(x) * shards, *x.shape[1:]), x.dtype, sharding=sharding)

    found = {}
    for tower, (width, count) in floor.items():
        empty = layouts[tower].empty(count, width)
        found[tower] = jax.tree.map(of_all_shards, empty)
    return found
