"""The kind of machine that a program is for. Another kind may trace and compile it."""

import jax


def target_platform() -> str:
    """cpu, gpu or tpu: that of the mesh which `jax.set_mesh` made current, or jax's default."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.abstract_device is None:
        return jax.default_backend()
    return mesh.abstract_device.platform
