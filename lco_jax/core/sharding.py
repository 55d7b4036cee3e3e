"""The mesh (data, fsdp, tensor) and where every array lives on it.

Rows of a batch are split over data × fsdp; weights over fsdp (one axis of a matrix) and tensor (the other); the
compiler inserts the collectives. Every leaf must be named by a rule: nothing is replicated by oversight.
"""

import logging
import math
import re
from collections.abc import Sequence
from types import EllipsisType
from typing import Any

import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import Array
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from lco_jax.core.errors import LcoError

AXES = ("data", "fsdp", "tensor")
ROWS = ("data", "fsdp")  # what the rows of a batch are split over
logger = logging.getLogger(__name__)

_COLUMN = (
    r"(decoder\.)?layers\.(self_attn\.[qkv]_proj|mlp\.(gate|up)_proj)"  # split by output features
)
_ROW = r"(decoder\.)?layers\.(self_attn\.o_proj|mlp\.down_proj)"  # split by input features
_TOWER = r"(visual|audio_tower|vision_tower)"
# (pattern of the whole dotted path, mesh axis of each array axis or ... for a replica everywhere); L is the stacked
# layers' axis. A decoder may stand alone or, beside its towers, under `decoder`.
RULES: tuple[tuple[str, tuple[str | None, ...] | EllipsisType], ...] = (
    (r"((decoder\.)?embed_tokens|head)\.weight", ("tensor", "fsdp")),  # [V, D]
    (r"projection\.weight", ("fsdp", None)),  # [D, D]
    (rf"{_COLUMN}\.weight", (None, "tensor", "fsdp")),  # [L, O, I]
    (rf"{_ROW}\.weight", (None, "fsdp", "tensor")),
    (rf"{_COLUMN}\.bias", (None, "tensor")),  # [L, O]
    (rf"{_COLUMN}\.weight\.a", (None, None, "fsdp")),  # [L, r, I]
    (rf"{_COLUMN}\.weight\.b", (None, "tensor", None)),  # [L, O, r]
    (rf"{_ROW}\.weight\.a", (None, None, "tensor")),
    (rf"{_ROW}\.weight\.b", (None, "fsdp", None)),
    (r"(decoder\.)?layers\.\w+_layernorm\.weight", (None, None)),
    (r"(decoder\.)?norm\.weight", (None,)),
    (
        rf"{_TOWER}\.(blocks|layers)\.(.+\.)?(proj|out_proj|down_proj|fc2)\.weight",
        (None, "fsdp", None),
    ),
    (rf"{_TOWER}\.(blocks|layers)\.(.+\.)?(qkv|[qkv]|\w+_proj|fc1)\.weight", (None, None, "fsdp")),
    (rf"{_TOWER}\..+", ...),  # the rest is small
)


def make_mesh(
    data: int = -1, fsdp: int = 1, tensor: int = 1, devices: Sequence[jax.Device] | None = None
) -> Mesh:
    """A mesh of the given sizes; one of them may be -1: whatever the devices leave. Raises if they do not divide."""
    devices = list(jax.devices() if devices is None else devices)
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    free = [axis for axis, size in sizes.items() if size == -1]
    fixed = math.prod(size for size in sizes.values() if size != -1)
    if len(free) > 1 or fixed < 1 or any(size < 1 and size != -1 for size in sizes.values()):
        raise LcoError(f"mesh {sizes}: sizes are positive, and at most one is -1")
    if free:
        sizes[free[0]] = len(devices) // fixed
    if math.prod(sizes.values()) != len(devices):
        raise LcoError(
            f"mesh {sizes} needs {math.prod(sizes.values())} devices, and there are {len(devices)}"
        )
    shape = tuple(sizes[axis] for axis in AXES)
    return Mesh(np.array(devices).reshape(shape), AXES, axis_types=(AxisType.Auto,) * len(AXES))


def row_shards(mesh: Mesh) -> int:
    """How many ways the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in ROWS)


def current_row_shards() -> int:
    """`row_shards` of the mesh that `jax.set_mesh` made current; 1 without one."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else row_shards(mesh)


def ways(size: int, axis: str) -> int:
    """In how many parts the current mesh splits `size` equal things over an axis; 1 where they do not divide."""
    mesh = jax.sharding.get_abstract_mesh()
    parts = 1 if mesh.empty else mesh.shape[axis]
    return parts if size % parts == 0 else 1


def _fit(
    shape: tuple[int, ...], axes: Sequence[str | tuple[str, ...] | None], mesh: Mesh
) -> PartitionSpec:
    """The spec without those mesh axes that do not divide their array axis (jax has no uneven shards)."""
    ways = [
        math.prod(
            mesh.shape[name]
            for name in (axis if isinstance(axis, tuple) else (axis,) if axis else ())
        )
        for axis in axes
    ]
    return PartitionSpec(
        *(axis if size % n == 0 else None for axis, size, n in zip(axes, shape, ways, strict=True))
    )


def shardings(tree: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """A `NamedSharding` for every array of a tree of arrays or shapes, by `RULES`. Raises for a leaf no rule names.

    Of a leaf that holds several arrays (`core/quantize.py`), those of the matrix's rank follow its rule; the rest is
    small, and replicated.
    """
    specs = {}
    for path, leaf in flatten_dict(tree, sep=".").items():
        rule = next((axes for pattern, axes in RULES if re.fullmatch(pattern, path)), None)
        if rule is None:
            raise LcoError(
                f"no sharding rule names the parameter {path}; add one to lco_jax/core/sharding.py"
            )
        arrays, structure = jax.tree.flatten(leaf)
        of_matrix = [len(array.shape) == len(leaf.shape) for array in arrays]
        placed = [
            _place(path, x.shape, rule if yes else ..., mesh)
            for x, yes in zip(arrays, of_matrix, strict=True)
        ]
        specs[path] = structure.unflatten(placed)
    return unflatten_dict(specs, sep=".")


def _place(
    path: str, shape: tuple[int, ...], rule: Sequence[str | None] | EllipsisType, mesh: Mesh
) -> NamedSharding:
    rule = (None,) * len(shape) if rule is ... else rule
    spec = _fit(shape, rule, mesh)
    lost = [axis for axis, kept in zip(rule, spec, strict=True) if axis and axis != kept]
    if lost:
        logger.warning(
            "%s %s does not divide by mesh axis %s: replicated over it", path, shape, lost
        )
    return NamedSharding(mesh, spec)


def constrain(x: Array, *axes: str | tuple[str, ...] | None) -> Array:
    """Pin x to the mesh that `jax.set_mesh` made current (without one, x as it is); axes not named are replicated."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return x
    return jax.lax.with_sharding_constraint(
        x, _fit(x.shape, (*axes, *[None] * (x.ndim - len(axes))), mesh)
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes with the shardings of another."""
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, shardings
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of what every device holds whole."""
    return NamedSharding(mesh, PartitionSpec())
