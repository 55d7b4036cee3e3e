"""Values that no JSON of a checkpoint should have, and where to put them."""

import json
from pathlib import Path
from typing import Any

import numpy as np

WHOLE_BRANCH = 0.3  # how often a value takes the place of an object or a list


def hostile(rng: np.random.Generator) -> Any:
    """A value of a wrong type or size."""
    deep: Any = []
    for _ in range(400):
        deep = [deep]
    values = [
        *(None, True, False, -1, 0, 1, 3, 7, 10**6, 10**8, 2**63, -(2**70), 0.5, 1e300),
        *(float("nan"), float("inf"), "", "x", "8", "../x", "\n", [], [1], ["x"], {}, {"a": {}}),
        deep,
    ]
    return values[rng.integers(len(values))]


def shown(value: Any) -> str:
    """A value on one short line."""
    return f"{json.dumps(value):.40}"


def replace_any(rng: np.random.Generator, file: Path, value: Any) -> str:
    """Put a value anywhere in a file of JSON. Where it was put."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    inner, at = tree, []
    while True:
        keys = list(inner) if isinstance(inner, dict) else list(range(len(inner)))
        key = keys[rng.integers(len(keys))]
        at.append(str(key))
        branches = isinstance(inner[key], dict | list) and len(inner[key]) > 0
        if not branches or rng.random() < WHOLE_BRANCH:
            break
        inner = inner[key]
    inner[key] = value
    write(file, tree)
    return ".".join(at)


def update(file: Path, **values: Any) -> None:
    """Set keys of an object in a file of JSON."""
    tree = json.loads(file.read_text(encoding="utf-8"))
    write(file, {**tree, **values})


def write(file: Path, tree: Any) -> None:
    """Write JSON, NaN and infinity as Python does it."""
    file.write_text(json.dumps(tree), encoding="utf-8")
