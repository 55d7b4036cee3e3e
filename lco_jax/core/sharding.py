"""The mesh (data, fsdp, tensor), and how every array is split over it.

Rows of a batch are split over data × fsdp. Weights are split over fsdp (one axis of a matrix) and
tensor (the other). The compiler inserts the collectives. A rule must name every parameter, so that
nothing is replicated by oversight.
"""

import logging
import math
import re
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lco_jax.core.accelerators import warn_of_missed
from lco_jax.core.errors import LcoError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # the rows of a batch are split over these
logger = logging.getLogger(__name__)

MeshAxes = str | tuple[str, ...] | None  # what one array axis is split over
Rule = tuple[str | None, ...]  # a mesh axis for each array axis; axes beyond its end are replicated
REPLICATED: Rule = ()

_COLUMN = r"(decoder\.)?layers\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)"  # by output features
_ROW = r"(decoder\.)?layers\.(self_attn\.o_proj|mlp\.down_proj)"  # by input features
_TOWER = r"(visual|audio_tower|vision_tower)"
_TOWER_LAYER = rf"{_TOWER}\.(blocks|layers)\.(.+\.)?"
# (pattern of a parameter's dotted path, its rule). L is the axis of the stacked layers. A decoder
# stands alone or, beside its towers, under `decoder`.
RULES: tuple[tuple[str, Rule], ...] = (
    (r"((decoder\.)?embed_tokens|head)\.weight", ("tensor", "fsdp")),  # [V, D]
    (r"projection\.weight", ("fsdp", None)),  # [D, D]
    (rf"{_COLUMN}\.weight", (None, "tensor", "fsdp")),  # [L, O, I]
    (rf"{_ROW}\.weight", (None, "fsdp", "tensor")),
    (rf"{_COLUMN}\.bias", (None, "tensor")),  # [L, O]
    (rf"{_COLUMN}\.weight\.a", (None, None, "fsdp")),  # [L, r, I]
    (rf"{_COLUMN}\.weight\.b", (None, "tensor", None)),  # [L, O, r]
    (rf"{_ROW}\.weight\.a", (None, None, "tensor")),
    (rf"{_ROW}\.weight\.b", (None, "fsdp", None)),
    (r"(decoder\.)?layers\.\w+_layernorm\.weight", REPLICATED),
    (r"(decoder\.)?norm\.weight", REPLICATED),
    (rf"{_TOWER_LAYER}(proj|out_proj|down_proj|fc2)\.weight", (None, "fsdp", None)),
    (rf"{_TOWER_LAYER}(qkv|[qkv]|\w+_proj|fc1)\.weight", (None, None, "fsdp")),
    (rf"{_TOWER}\..+", REPLICATED),  # the rest is small
    (r"log_temperatures", REPLICATED),
)


def make_mesh(
    data: int = -1,
    fsdp: int = 1,
    tensor: int = 1,
    devices: Sequence[jax.Device] | None = None,
) -> Mesh:
    """A mesh of the given sizes. One of them may be -1: it takes the devices that are left.

    Raises if the sizes do not multiply to the number of devices.
    """
    if devices is None:
        devices = jax.devices()
        warn_of_missed()
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = [size for size in sizes.values() if size != -1]
    if len(free) > 1 or any(size < 1 for size in fixed):
        raise LcoError(f"mesh {sizes}: sizes are positive, and at most one is -1")
    if free:
        sizes[free[0]] = max(len(devices) // math.prod(fixed), 1)
    needed = math.prod(sizes.values())
    if needed != len(devices):
        raise LcoError(f"mesh {sizes} needs {needed} devices, and there are {len(devices)}")
    shape = [sizes[axis] for axis in AXES]
    axis_types = [AxisType.Auto for _ in AXES]
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=tuple(axis_types))


def _parts(mesh: Any, axes: MeshAxes) -> int:
    """In how many parts a mesh splits an array axis."""
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)


def check_mesh(mesh: Mesh) -> None:
    """Raise unless each shard of the rows is on devices of one process."""
    processes = jax.process_count()
    owners = np.vectorize(lambda device: device.process_index)(mesh.devices)
    by_shard = owners.reshape(row_shards(mesh), -1)
    one_owner = (by_shard == by_shard[:, :1]).all()
    in_order = np.repeat(np.arange(processes), row_shards(mesh) // processes or 1)
    if not one_owner or not np.array_equal(by_shard[:, 0], in_order):
        raise LcoError(
            f"mesh {dict(mesh.shape)} over {processes} processes: the tensor axis must stay within "
            "one process, and data × fsdp must be a multiple of the processes"
        )


def row_shards(mesh: Mesh) -> int:
    """In how many parts the rows of a batch are split."""
    return _parts(mesh, ROWS)


def current_row_shards() -> int:
    """`row_shards` of the mesh that `jax.set_mesh` made current; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_shards(mesh)


def current_parts(size: int, axis: str) -> int:
    """In how many parts the current mesh splits an array axis; 1 if they do not divide `size`."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else _parts(mesh, axis)
    return parts if size % parts == 0 else 1


def _spec(shape: tuple[int, ...], rule: Sequence[MeshAxes], mesh: Any) -> PartitionSpec:
    """The spec of an array. Mesh axes that do not divide an array axis are left out.

    jax has no uneven shards.
    """
    padded = [*rule, *[None] * (len(shape) - len(rule))]
    spec = []
    for size, axes in zip(shape, padded, strict=True):
        divides = size % _parts(mesh, axes) == 0
        spec.append(axes if divides else None)
    return PartitionSpec(*spec)


def shardings(tree: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A `NamedSharding` for every array of a tree of arrays or shapes, by `RULES`.

    Raises for a leaf that no rule names.
    """
    leaves = flatten_dict(tree, sep=".")
    found = {path: _leaf_shardings(path, leaf, mesh) for path, leaf in leaves.items()}
    return unflatten_dict(found, sep=".")


def _leaf_shardings(path: str, leaf: Any, mesh: Mesh) -> Any:
    """Of each array of a leaf, which may hold several (`core/quantize.py`).

    Those of the matrix's rank follow its rule. The others are small, and replicated.
    """
    rule = _rule_of(path)

    def sharding_of(array: Any) -> NamedSharding:
        follows = len(array.shape) == len(leaf.shape)
        return _array_sharding(path, array.shape, rule if follows else REPLICATED, mesh)

    return jax.tree.map(sharding_of, leaf)


def _rule_of(path: str) -> Rule:
    for pattern, rule in RULES:
        if re.fullmatch(pattern, path):
            return rule
    raise LcoError(
        f"no sharding rule names the parameter {path}; add one to lco_jax/core/sharding.py"
    )


def _array_sharding(path: str, shape: tuple[int, ...], rule: Rule, mesh: Mesh) -> NamedSharding:
    spec = _spec(shape, rule, mesh)
    lost = [axis for axis, kept in zip(rule, spec, strict=False) if axis != kept]
    if lost:
        logger.warning(
            "%s %s does not divide by mesh axis %s: replicated over it", path, shape, lost
        )
    return NamedSharding(mesh, spec)


def constrain(x: Array, *rule: MeshAxes) -> Array:
    """Split x over the mesh that `jax.set_mesh` made current; without one, x as it is.

    rule: for each axis of x, the mesh axes that it is split over. Axes beyond its end are
    replicated.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(x, _spec(x.shape, rule, mesh))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the shardings of another tree."""

    def with_sharding(x: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

    return jax.tree.map(with_sharding, shapes, shardings)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device has a copy of."""
    return NamedSharding(mesh, PartitionSpec())
