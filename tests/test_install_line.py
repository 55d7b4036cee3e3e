"""What messages say of extras: a line that works for the package as it is installed here."""

import json
import re
from importlib import metadata
from pathlib import Path

import pytest

from lco_jax.core import extras
from lco_jax.core.extras import install_line, line_of

ROOT = Path(__file__).parents[1]
METADATA = """Metadata-Version: 2.4
Name: lco-jax
Version: 0.1.0
Provides-Extra: search
Requires-Dist: jax>=0.10
Requires-Dist: usearch>=2.26; extra == "search"
Requires-Dist: starlette>=1; extra == "search"
Requires-Dist: mteb>=2.26; extra == "eval"
"""


def installed(folder, origin):
    """A distribution, and what pip notes of where it came from."""
    info = folder / "lco_jax-0.1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(METADATA)
    if origin is not None:
        (info / "direct_url.json").write_text(json.dumps(origin))
    return metadata.Distribution.at(info)


def test_a_clone_is_installed_from_where_it_lies(monkeypatch, tmp_path):
    assert install_line("search") == f"pip install -e '{ROOT}[search]'"
    (tmp_path / "pyproject.toml").touch()
    monkeypatch.setattr(extras, "CLONE", tmp_path)
    assert install_line("plan-tpu") == f"pip install -e '{tmp_path}[plan-tpu]'"


@pytest.mark.parametrize(
    ("origin", "line"),
    [
        (None, "pip install 'lco-jax[search]'"),
        (
            {
                "url": "https://example.org/a/lco-jax.git",
                "vcs_info": {"vcs": "git", "commit_id": "0d45b15"},
            },
            "pip install 'lco-jax[search] @ git+https://example.org/a/lco-jax.git@0d45b15'",
        ),
        (
            {"url": "https://example.org/lco_jax-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'lco-jax[search] @ https://example.org/lco_jax-0.1.0-py3-none-any.whl'",
        ),
        (
            {"url": "file:///gone/lco_jax-0.1.0-py3-none-any.whl", "archive_info": {}},
            "pip install 'usearch>=2.26' 'starlette>=1'",
        ),
    ],
)
def test_an_index_an_address_and_a_wheel_that_is_gone(tmp_path, origin, line):
    assert line_of(installed(tmp_path, origin), "search") == line


@pytest.mark.parametrize("name", ["lco_jax-0.1.0-py3-none-any.whl", "my wheels"])
def test_a_wheel_or_folder_that_is_there(tmp_path, name):
    path = tmp_path / name
    path.touch()
    origin = {"url": path.as_uri(), "archive_info": {}}
    assert line_of(installed(tmp_path, origin), "search") == f"pip install '{path}[search]'"


def test_no_other_text_says_how():
    """One place makes the line: the name is not on the index. With an address it works."""
    says = re.compile(r"pip install [^`\n]*lco-jax(?!\[\w+\] @ git)")
    files = [*(ROOT / "lco_jax").rglob("*.py"), *(ROOT / "docs").rglob("*.md"), ROOT / "README.md"]
    assert [str(file) for file in files if says.search(file.read_text())] == []
