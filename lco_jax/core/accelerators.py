"""An accelerator that this machine has and jax does not see: one line says so, and what to do."""

import logging
import os
import re
from collections.abc import Callable, Mapping
from functools import cache
from importlib import metadata
from pathlib import Path

import jax

GPU_FILES = ("dev/nvidia0", "dev/nvidiactl", "dev/dxg")  # dxg: of Windows' subsystem for Linux
DRIVER = "proc/driver/nvidia/version"
CUDA_13_NEEDS = 580  # of the driver; jax's wheels for CUDA 12 take older ones
HIDDEN = ("", "-1")  # values of CUDA_VISIBLE_DEVICES with which a user hides every GPU
# What a TPU VM's environment has. Files under /dev/vfio alone can be those of other devices.
TPU_VARIABLES = ("TPU_ACCELERATOR_TYPE", "TPU_NAME", "TPU_WORKER_ID", "TPU_WORKER_HOSTNAMES")
logger = logging.getLogger(__name__)


@cache
def warn_of_missed() -> None:
    """Log, once in a process, that jax runs on the CPU of a machine with an accelerator."""
    advice = missed(jax.default_backend(), jax.config.jax_platforms or "")
    if advice:
        logger.warning("%s", advice)


def is_installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def missed(
    backend: str,
    asked: str,
    root: Path = Path("/"),
    environment: Mapping[str, str] = os.environ,
    installed: Callable[[str], bool] = is_installed,
) -> str | None:
    """What to do about an accelerator that jax does not see; None where there is none.

    backend: jax's. asked: the platforms that the user chose (JAX_PLATFORMS), "" if none; who
    chose the CPU gets no advice. root: of the file system. installed: whether a package is.
    """
    if backend != "cpu" or asked == "cpu":
        return None
    if _has_gpu(root, environment):
        advice = _of_gpu(root, installed)
        return f"this machine has an NVIDIA GPU, and jax sees only its CPU: {advice}"
    if _has_tpu(root, environment):
        return f"this machine has a TPU, and jax sees only its CPU: {_of_tpu(installed)}"
    return None


def _has_gpu(root: Path, environment: Mapping[str, str]) -> bool:
    is_hidden = environment.get("CUDA_VISIBLE_DEVICES") in HIDDEN
    return not is_hidden and any((root / name).exists() for name in GPU_FILES)


def _of_gpu(root: Path, installed: Callable[[str], bool]) -> str:
    versions = (12, 13)
    if any(installed(f"jax-cuda{version}-plugin") for version in versions):
        return (
            "its CUDA plugin is installed, so look whether nvidia-smi works, and whether "
            "LD_LIBRARY_PATH names another CUDA"
        )
    driver = _driver(root)
    version = 12 if driver is not None and driver < CUDA_13_NEEDS else 13
    return f"pip install -U 'jax[cuda{version}]'"


def _driver(root: Path) -> int | None:
    """The main number of the NVIDIA driver's version."""
    try:
        text = (root / DRIVER).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\s(\d{3,})\.\d+", text)
    return int(found[1]) if found else None


def _has_tpu(root: Path, environment: Mapping[str, str]) -> bool:
    is_tpu_vm = any(name in environment for name in TPU_VARIABLES)
    return (root / "dev/accel0").exists() or (is_tpu_vm and (root / "dev/vfio").exists())


def _of_tpu(installed: Callable[[str], bool]) -> str:
    if installed("libtpu"):
        return "libtpu is installed, so look whether another process holds the TPU"
    return "pip install -U 'jax[tpu]'"
