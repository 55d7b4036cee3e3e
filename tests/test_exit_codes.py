"""Exit codes: docs/exit-codes.md has them all, and programs name them."""

import ast
import re
from pathlib import Path

import pytest

from lco_jax.core import errors

ROOT = Path(__file__).parents[1]
NAMED = {name: value for name, value in vars(errors).items() if isinstance(value, int)}
OF_THE_SYSTEM = {134, 137, 143}  # 128 + the signal


def documented():
    """code -> name, "" where it is not ours."""
    text = (ROOT / "docs" / "exit-codes.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (\d+) \| (?:`(\w+)`)? ?\|", text, re.MULTILINE)
    return {int(code): name for code, name in rows}


def test_the_table_has_every_code():
    assert len(set(NAMED.values())) == len(NAMED)
    ours = {value: name for name, value in NAMED.items()}
    assert documented() == ours | dict.fromkeys(OF_THE_SYSTEM, "")


@pytest.mark.parametrize("page", ["launching", "training"])
def test_other_pages_name_no_code_that_the_table_lacks(page):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    assert "exit-codes.md" in text
    assert not re.search(r"^\| \d+ \|.*\|$", text, re.MULTILINE), "a second table of codes"


def test_no_program_ends_with_a_bare_number():
    for file in (ROOT / "lco_jax").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            ends = []
            if isinstance(node, ast.FunctionDef) and node.name == "main":
                ends = [one.value for one in ast.walk(node) if isinstance(one, ast.Return)]
            elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("sys.exit", "os._exit"):
                ends = node.args
            assert not any(isinstance(end, ast.Constant) for end in ends), file
