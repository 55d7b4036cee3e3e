"""The notebook, the launcher and the tools: they run as they stand."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_notebook_runs(tmp_path):
    """Every cell but the one that installs."""
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    notebook.cells = [cell for cell in notebook.cells if "install" not in cell.metadata.get("tags", [])]
    for cell in notebook.cells:
        cell.source = cell.source.replace("runs/notebook", str(tmp_path / "run"))
        if cell.source.startswith("!python"):
            cell.source = cell.source.replace("!python", f"!{sys.executable}") + " --config.train.steps=3"
            cell.source += " --config.optimizer.warmup_steps=1"
    resources = {"metadata": {"path": str(ROOT)}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = {
        kind: data
        for cell in notebook.cells
        for out in cell.get("outputs", ())
        for kind, data in out.get("data", {}).items()
    }
    assert "image/png" in shown
    assert "A musician performs outdoors." in shown["text/plain"]


def test_the_launcher_says_how_it_is_used():
    done = subprocess.run([ROOT / "launch" / "local.sh", "many"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh PROCESSES")


def test_shell_scripts_are_clean():
    scripts = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]
    subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], check=True)


def test_the_bundled_triplets_are_what_the_tool_writes():
    subprocess.run([sys.executable, ROOT / "tools" / "make_triplets.py", "--check"], check=True)


@pytest.mark.parametrize("recipe", ["paper", "reference"])
@pytest.mark.parametrize(
    "name", ["qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_omni_3b", "qwen2_5_omni_7b", "llava_next_8b"]
)
def test_configs_hold_the_published_recipes(monkeypatch, name, recipe):
    from lco_jax.training import cli
    from lco_jax.training.run import check_config

    monkeypatch.chdir(ROOT)
    config = cli.parse(["train", f"--config=configs/{name}.py:{recipe}"], "").config
    check_config(config)
    published = {"paper": (16.0, "cosine", 768), "reference": (128.0, "linear", 1056)}[recipe]
    assert (config.lora.alpha, config.optimizer.schedule, config.train.batch_size) == published
    assert (config.lora.rank, config.optimizer.learning_rate, config.train.temperature) == (64, 4e-4, 0.03)
    assert (config.data.max_length, config.train.epochs, config.optimizer.clip_norm) == (650, 2.0, 1.0)
