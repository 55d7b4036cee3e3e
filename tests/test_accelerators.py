"""A machine with an accelerator that jax does not see, made up of files and variables."""

import pytest

from lco_jax.core.accelerators import missed

OLD = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  550.54.15  Tue Mar  5 22:23:56 UTC 2024\n"
NEW = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.65.06  Release Build\n"
DRIVER = "proc/driver/nvidia/version"
VM = {"TPU_WORKER_ID": "0"}


@pytest.fixture
def advice(tmp_path):
    """What is said on a machine: files -> content; variables; packages; jax's backend, and the
    platforms that the user asked for.
    """

    def said(files, environment=None, packages=(), backend="cpu", asked=""):
        for name, content in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(content)
        return missed(backend, asked, tmp_path, environment or {}, set(packages).__contains__)

    return said


@pytest.mark.parametrize(
    ("files", "packages", "says"),
    [
        ({"dev/nvidia0": "", DRIVER: NEW}, [], "pip install -U 'jax[cuda13]'"),
        ({"dev/nvidia0": "", DRIVER: OLD}, [], "pip install -U 'jax[cuda12]'"),
        ({"dev/dxg": ""}, [], "pip install -U 'jax[cuda13]'"),
        ({"dev/nvidia0": "", DRIVER: "?"}, [], "pip install -U 'jax[cuda13]'"),
        ({"dev/nvidia0": "", DRIVER: NEW}, ["jax-cuda12-plugin"], "nvidia-smi"),
    ],
)
def test_a_gpu(advice, files, packages, says):
    line = advice(files, packages=packages)
    assert line.startswith("this machine has an NVIDIA GPU, and jax sees only its CPU: ")
    assert says in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("files", "environment", "packages", "says"),
    [
        ({"dev/accel0": ""}, {}, [], "pip install -U 'jax[tpu]'"),
        ({"dev/vfio/0": ""}, VM, [], "pip install -U 'jax[tpu]'"),
        ({"dev/vfio/0": ""}, VM, ["libtpu"], "another process"),
    ],
)
def test_a_tpu(advice, files, environment, packages, says):
    line = advice(files, environment, packages)
    assert line.startswith("this machine has a TPU, and jax sees only its CPU: ")
    assert says in line


@pytest.mark.parametrize(
    ("files", "environment", "backend", "asked"),
    [
        ({}, {}, "cpu", ""),
        ({"dev/nvidia0": ""}, {}, "gpu", ""),
        ({"dev/nvidia0": ""}, {}, "cpu", "cpu"),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": ""}, "cpu", ""),
        ({"dev/nvidia0": ""}, {"CUDA_VISIBLE_DEVICES": "-1"}, "cpu", ""),
        ({"dev/accel0": ""}, VM, "tpu", "tpu,cpu"),
        ({"dev/vfio/0": ""}, {}, "cpu", ""),  # of another device
    ],
)
def test_nothing_is_said_where_nothing_is_missed(advice, files, environment, backend, asked):
    assert advice(files, environment, backend=backend, asked=asked) is None
