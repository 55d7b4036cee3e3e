"""Which kind of machine a program is for, which need not be the kind that traces and compiles it."""

import jax


def target_platform() -> str:
    """One of cpu, gpu and tpu: that of the mesh which `jax.set_mesh` made current, or without one jax's default."""
    mesh = jax.sharding.get_abstract_mesh()
    device = None if mesh.empty else mesh.abstract_device
    return jax.default_backend() if device is None else device.platform
