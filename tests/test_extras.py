"""The notebooks, the launcher and the tools: they run as they stand."""

import ast
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from processes import with_devices

from configs.lab import get_config
from laboratory.run import experiment
from lco_jax import LcoError

ROOT = Path(__file__).parent.parent


NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def run_notebook(monkeypatch, name, **parameters):
    """Run a notebook in its folder with other parameters; returns its outputs by kind of data."""
    one_device = with_devices(1)["XLA_FLAGS"]  # as a reader has, and not eight
    monkeypatch.setenv("XLA_FLAGS", one_device)
    monkeypatch.setenv("PATH", "/usr/bin:/bin")  # the kernel's Python is not on it
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    tagged = next(
        i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])
    )
    given = "\n".join(f"{key} = {value!r}" for key, value in parameters.items())
    notebook.cells.insert(tagged + 1, nbformat.v4.new_code_cell(given))
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources=resources).execute()
    shown = defaultdict(list)
    for out in (out for cell in notebook.cells for out in cell.get("outputs", ())):
        shown["text"].append(out.get("text", ""))
        for kind, data in out.get("data", {}).items():
            shown[kind].append(data)
    return shown


@pytest.mark.slow
def test_the_notebook_that_searches_runs(monkeypatch, tmp_path, cases):
    """On a checkpoint that hears, so that no cell is passed over."""
    shown = run_notebook(
        monkeypatch,
        "embed_and_search",
        MODEL=str(cases["omni"].path),
        STEPS=2,
        OUT=str(tmp_path / "run"),
    )
    assert len(shown["image/png"]) == 4  # the pictures, the cosines, what was found, the sounds
    assert "<audio" in "".join(shown["text/html"])
    assert re.search(
        r"the nearest of 18 captions is right for \d+ of 36 pictures", "".join(shown["text"])
    )


@pytest.mark.slow
def test_the_notebook_that_trains_runs(monkeypatch, tmp_path):
    given = {"MODEL": "builtin:tiny", "STEPS": 2, "OUT": str(tmp_path / "run")}
    shown = run_notebook(monkeypatch, "train", **given)
    assert len(shown["image/png"]) == 2
    assert "When do you open?" in shown["text/plain"][-1]
    numbers = [
        json.loads((tmp_path / "run" / name / "results.json").read_text())
        for name in ("run", "measured")
    ]
    assert numbers[0]["after"]["held_out"]["recall_at_1"] == numbers[1]["recall_at_1"]
    assert (tmp_path / "run" / "export-adapter" / "adapter_model.safetensors").exists()


@pytest.mark.slow
def test_the_laboratory_runs_in_its_notebook_and_goes_on(monkeypatch, tmp_path):
    """A second start writes the report again, and measures only the run that is missing."""
    out = tmp_path / "lab"
    shown = run_notebook(monkeypatch, "laboratory", OUT=str(out))
    words = "".join(shown["text/markdown"])
    for claim in (
        "text-only contrastive learning lifts text ↔ image",
        "The terms of the bound",
        "undecided",
    ):
        assert claim in words
    assert len(shown["image/png"]) == len(list(out.glob("*.png"))) >= 4
    runs = {
        (run["tune"], run["generative_steps"]): run
        for run in json.loads((out / "results.json").read_text())["runs"]
    }
    assert len(runs) == 6
    assert runs["lora", 8]["theory"]["kl"] > 0
    assert {"image", "video", "audio", "page"} <= set(runs["none", 8]["generative"])
    assert 0 < runs["projection", 8]["trained_parameters"] < runs["lora", 8]["trained_parameters"]
    before = {path: path.stat().st_mtime_ns for path in (out / "seed-0" / "runs").iterdir()}
    gone = out / "seed-0" / "runs" / "projection-8.json"
    was = json.loads(gone.read_text())
    gone.unlink()
    command = [
        sys.executable,
        "-m",
        "laboratory",
        "--config=configs/lab.py:short",
        f"--workdir={out}",
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    again = json.loads((out / "results.json").read_text())
    assert (
        again["runs"][4]["representation"] == was["representation"]
    )  # its training was there and is only measured
    assert {path for path in before if path.stat().st_mtime_ns != before[path]} == {gone}
    other = get_config("short")
    other.contrast.train.steps = 5
    with pytest.raises(LcoError, match="another configuration"):
        experiment(other, out, "")


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("stages", (4, 2), "in ascending order"),
        ("stages", (0, 12), "there is no checkpoint of it"),
        ("ways", ("magic",), "magic"),
        ("world", "other", "made, real"),
        ("world", "real", "data_dir"),
    ],
)
def test_an_experiment_that_cannot_be_says_so(tmp_path, key, value, says):
    config = get_config("short")
    config[key] = value
    with pytest.raises(LcoError, match=says):
        experiment(config, tmp_path, "")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_install_first_define_nothing_and_hold_no_output(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.metadata for cell in code[:2]] == [{"tags": ["install"]}, {"tags": ["parameters"]}]
    assert not any(
        cell.metadata
        for cell in [*code[2:], *(cell for cell in notebook.cells if cell not in code)]
    )
    assert not any(cell.outputs or cell.execution_count for cell in code)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    defined = []
    for cell in code:  # plain Python: a line for a shell that fails would stop nothing
        for node in ast.walk(ast.parse(cell.source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda):
                defined.append(getattr(node, "name", "lambda"))
    assert defined == ["run"]


def test_notebooks_begin_with_the_same_cell():
    """With the address of pyproject.toml, if there is one."""
    command = [sys.executable, ROOT / "tools" / "notebooks.py", "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}; run python tools/notebooks.py"


@pytest.fixture
def opened_alone(tmp_path):
    """Runs the first cell in an empty folder, with no packages and a pip that writes what it is
    asked for: (the process, what pip was asked for).
    """
    programs, modules, folder = (tmp_path / name for name in ("programs", "modules", "empty"))
    repository = tmp_path / "repository"
    for path in (programs, modules, folder, repository / "lco_jax"):
        path.mkdir(parents=True)
    (repository / "lco_jax" / "__init__.py").touch()
    git = ["git", "-C", repository, "-c", "user.name=a", "-c", "user.email=a@example.org"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *words], check=True)
    (programs / "git").symlink_to(shutil.which("git"))
    asked = tmp_path / "asked"
    record = f"import sys; open({str(asked)!r}, 'a').write(' '.join(sys.argv[1:]))"
    (modules / "pip.py").write_text(record)
    cell = (ROOT / "notebooks" / "setup.py").read_text()

    def run(address=f"file://{repository}"):
        code = cell.replace('REPOSITORY = ""', f"REPOSITORY = {address!r}")
        environment = {"PATH": str(programs), "PYTHONPATH": str(modules)}
        command = [sys.executable, "-S", "-c", code]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
        return done, asked.read_text() if asked.exists() else None

    return run


@pytest.mark.parametrize(
    ("has_gpu", "plugin", "extra"),
    [
        (False, "jax_cuda12_plugin", ""),
        (True, None, "[cuda12]"),
        (True, "jax_cuda12_plugin", "[cuda12]"),
        (True, "jax_cuda13_plugin", "[cuda13]"),
    ],
)
def test_a_notebook_alone_clones_and_installs(opened_alone, tmp_path, has_gpu, plugin, extra):
    """Beside the plugin of the jax that is there, as on Colab, no other is installed."""
    if has_gpu:
        program = tmp_path / "programs" / "nvidia-smi"
        program.touch()
        program.chmod(0o755)
    if plugin:
        (tmp_path / "modules" / plugin).mkdir()
    for _ in range(2):  # the second time, the clone is there
        done, asked = opened_alone()
        assert done.returncode == 0, done.stderr
    assert asked == f"install -q -e .{extra}" * 2
    assert (tmp_path / "empty" / "lco-jax" / "lco_jax").is_dir()


@pytest.mark.parametrize(
    ("address", "says"),
    [
        ("", "ValueError: Set REPOSITORY above: the address that lco-jax is cloned from."),
        ("file:///nowhere", "CalledProcessError: Command '['git', 'clone'"),
    ],
)
def test_a_notebook_alone_asks_for_an_address(opened_alone, address, says):
    done, asked = opened_alone(address)
    assert done.returncode == 1
    assert says in done.stderr.splitlines()[-1]
    assert asked is None


def test_a_command_that_fails_stops_a_notebook(tmp_path):
    setup = (ROOT / "notebooks" / "setup.py").read_text()
    cells = [setup, 'run("json.tool", "no such file")', "print('reached')"]
    notebook = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, cells)))
    resources = {"metadata": {"path": str(ROOT / "notebooks")}}
    client = NotebookClient(notebook, timeout=60, kernel_name="python3", resources=resources)
    with pytest.raises(CellExecutionError, match="CalledProcessError"):
        client.execute()
    _, failed, last = notebook.cells
    printed = "".join(output.get("text", "") for output in failed.outputs)
    assert "No such file or directory: 'no such file'" in printed
    assert not last.outputs


def test_the_launcher_says_how_it_is_used():
    done = subprocess.run([ROOT / "launch" / "local.sh", "many"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh PROCESSES")


def test_shell_scripts_are_clean():
    scripts = [*(ROOT / "launch").glob("*.sh"), ROOT / ".ci" / "run"]
    subprocess.run([Path(sys.executable).parent / "shellcheck", *scripts], check=True)


@pytest.mark.slow
def test_the_bundled_triplets_are_what_the_tool_writes():
    subprocess.run([sys.executable, ROOT / "tools" / "make_triplets.py", "--check"], check=True)


@pytest.mark.parametrize("recipe", ["paper", "reference"])
@pytest.mark.parametrize(
    "name",
    ["qwen2_5_vl_3b", "qwen2_5_vl_7b", "qwen2_5_omni_3b", "qwen2_5_omni_7b", "llava_next_8b"],
)
def test_configs_hold_the_published_recipes(monkeypatch, name, recipe):
    from lco_jax.training import cli
    from lco_jax.training.run import check_config

    monkeypatch.chdir(ROOT)
    config = cli.parse(["train", f"--config=configs/{name}.py:{recipe}"], "").config
    check_config(config)
    published = {"paper": (16.0, "cosine", 768), "reference": (128.0, "linear", 1056)}[recipe]
    assert (config.lora.alpha, config.optimizer.schedule, config.train.batch_size) == published
    assert (config.lora.rank, config.optimizer.learning_rate, config.train.temperature) == (
        64,
        4e-4,
        0.03,
    )
    assert (config.data.max_length, config.train.epochs, config.optimizer.clip_norm) == (
        650,
        2.0,
        1.0,
    )
