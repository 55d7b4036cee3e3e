import io
import os
import shutil
import subprocess
import sys
from glob import glob
from importlib.metadata import distributions
from importlib.util import find_spec
from pathlib import Path

REPOSITORY = ""  # where this notebook is alone, as on Colab: the address to clone


def run(module: str, *arguments: str) -> None:
    """Run `python -m module` with this kernel's Python; a failure stops the notebook."""
    command = [sys.executable, "-m", module, *arguments]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        for line in io.TextIOWrapper(process.stdout, "utf-8", "replace", newline=""):
            print(line, end="", flush=True)
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)


if not Path("lco_jax").exists():
    folder = Path("..") if Path("../lco_jax").exists() else Path("lco-jax")
    if not folder.exists():
        if not REPOSITORY:
            raise ValueError("Set REPOSITORY above: the address that lco-jax is cloned from.")
        subprocess.run(["git", "clone", "-q", "--depth=1", REPOSITORY, folder], check=True)
    os.chdir(folder)

if not list(distributions(name="lco-jax", path=[path for path in sys.path if path])):
    extra = ""
    if shutil.which("nvidia-smi"):  # the CUDA of the jax that is there, which Colab has
        extra = "[cuda13]" if find_spec("jax_cuda13_plugin") else "[cuda12]"
    elif glob("/dev/accel*") or glob("/dev/vfio/[0-9]*"):
        extra = "[tpu]"
    run("pip", "install", "-q", "-e", f".{extra}")
