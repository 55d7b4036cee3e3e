"""Write the first cell of every notebook, so that it is the same in all of them.

The cell is `notebooks/setup.py`. Its REPOSITORY is the address that pyproject.toml names as
Repository under [project.urls]; while it names none, the notebooks ask for one.

Usage: ``python tools/notebooks.py`` writes the notebooks; ``--check`` writes nothing and exits with
status 1 if one of them would change.
"""

import argparse
import json
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def setup() -> str:
    """The cell."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = json.dumps(project["urls"].get("Repository", ""))
    code = (ROOT / "notebooks" / "setup.py").read_text(encoding="utf-8").rstrip("\n")
    return code.replace('REPOSITORY = ""', f"REPOSITORY = {address}")


def written(notebook: dict) -> str:
    """A notebook's file with the cell in the place of its first one with code."""
    first = next(cell for cell in notebook["cells"] if cell["cell_type"] == "code")
    first["metadata"] = {"tags": ["install"]}
    first["source"] = setup().splitlines(keepends=True)
    return json.dumps(notebook, indent=1, ensure_ascii=False) + "\n"


def main() -> int:
    """Write or compare."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    check = parser.parse_args().check
    changed = []
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        before = path.read_text(encoding="utf-8")
        after = written(json.loads(before))
        if after != before:
            changed.append(path.name)
            if not check:
                path.write_text(after, encoding="utf-8")
    print("changed:", ", ".join(changed) or "none")
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
