"""The inputs that were skipped, listed beside an output: a line of JSON each, with the reason."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from lco_jax.core.files import AnyPath, replace


def list_of_skipped(output: AnyPath) -> AnyPath:
    """The path of an output's list: `<output>.skipped.jsonl`."""
    return output.with_name(f"{output.name}.skipped.jsonl")


def write_skipped(
    output: AnyPath, rows: Iterable[Mapping[str, Any]], aside: AnyPath | None = None
) -> int:
    """Write an output's list of skipped inputs -> how many lines it has. None: there is no list.

    rows: {"index": from 0, "id": …, "reason": …} each; reasons alone where inputs have no number.
    The list appears when it is complete. aside: where it grows, by default beside the output.
    """
    path = list_of_skipped(output)
    aside = aside or path.with_name(f".{path.name}.tmp")
    count = 0
    try:
        with aside.open("wb") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                count += 1
        if count:
            replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)
    if not count and path.exists():  # of an earlier output
        path.unlink()
    return count


def skipped_in_words(output: AnyPath, count: int, what: str = "of them are empty") -> str:
    """A line about the inputs of an output that have no result; "" if all have one."""
    if not count:
        return ""
    which = f"{list_of_skipped(output)} says which inputs were skipped, and why"
    return f"{count:,} {what}: {which}"
