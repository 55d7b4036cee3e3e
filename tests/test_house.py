"""The house rules that a test can hold."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent / "lco_jax"
# imports run one way: a branch may import those named, itself, and nothing else of the package
ALLOWED = {
    "core": set(),
    "configs": set(),
    "models": {"core"},
    "data": {"core"},
    "checkpoint": {"core", "models", "data"},
    "evaluation": {"core", "data"},
    "analysis": {"core", "data"},
    "mining": {"core", "data"},
    "searching": {"core", "data"},
    "serving": {"core", "data", "searching", "embedder", "vector_form"},
    "training": {"core", "models", "checkpoint", "data"},
    "cost_model": {"core", "models", "checkpoint", "training"},
}


def imports(file: Path):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def test_imports_run_one_way():
    for file in ROOT.glob("*/*.py"):
        branch = file.parent.name
        for name in imports(file):
            parts = name.split(".")
            if parts[0] == "lco_jax":
                assert parts[1:2], f"{file} imports the whole package"
                assert parts[1] in ALLOWED[branch] | {branch}, f"{file} imports {name}"


def test_the_runtime_knows_no_torch_and_no_tensorflow():
    for file in ROOT.rglob("*.py"):
        roots = {name.split(".")[0] for name in imports(file)}
        assert not roots & {"torch", "tensorflow", "pickle"}, file
        # its classes of configurations have the defaults that a config.json leaves out
        if file.parent.name not in ("checkpoint", "data") and file.name != "hf_config.py":
            assert "transformers" not in roots, file


def test_it_runs_where_torch_and_tensorflow_are_not():
    code = """
import importlib.util, sys

class Absent:  # as if neither were installed
    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "torchvision", "tensorflow"):
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
absent = ("torch", "torchvision", "tensorflow")
importlib.util.find_spec = lambda name, *a: None if name in absent else find_spec(name, *a)
from lco_jax import LcoError, OmniEmbedder
model = OmniEmbedder.from_pretrained("builtin:tiny")
vectors = model.encode(["one", {"text": "two"}])
assert vectors.shape == (2, 128) and abs((vectors**2).sum(1) - 1).max() < 1e-5
try:
    model.encode(["one"], convert_to_tensor=True)
except LcoError as error:
    assert str(error).startswith("torch is not installed; leave convert_to_tensor")
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_files_are_short():
    sizes = {
        file: len(file.read_text(encoding="utf-8").splitlines()) for file in ROOT.rglob("*.py")
    }
    assert max(sizes.values()) <= 400, max(sizes, key=sizes.get)
