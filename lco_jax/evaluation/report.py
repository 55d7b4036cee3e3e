"""What an evaluation found, for people: a table in markdown and a picture, the published numbers beside ours."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.files import ASSETS, read_json, write_text
from lco_jax.evaluation.plots import plot_bars


class Measured(NamedTuple):
    """One task. score: its main score, in percent, or None and the reason why. parts: a part's name -> its score."""

    task: str
    type: str
    score: float | None = None
    reason: str = ""
    parts: Mapping[str, float] = {}


def write_report(
    out: Path, model: str, benchmark: str, found: Sequence[Measured], notes: Mapping[str, Any]
) -> None:
    """Write `results.md` and `results.png` into `out`.

    benchmark: a name in assets/published.json, or any other. A mean of fewer tasks than the published ones says so.
    notes: what a reader must know of how it was measured.
    """
    kinds = defaultdict(list)
    rows = ["| task | type | score |", "|---|---|---|"]
    for one in found:
        rows.append(
            f"| {one.task} | {one.type} | {one.reason if one.score is None else f'{one.score:.1f}'} |"
        )
        rows += [f"| {one.task}, {part} | | {score:.1f} |" for part, score in one.parts.items()]
        kinds[one.type] += [] if one.score is None else [one.score]
    scores = {one.task: one.score for one in found if one.score is not None}
    if scores:
        kinds["**all**"] = [*scores.values()]
        rows += [
            f"| mean of {len(some)} | {kind} | {np.mean(some):.1f} |"
            for kind, some in kinds.items()
            if some
        ]
    bars, ours, label, lines = scores, scores.keys(), "score", [f"# {benchmark}: {model}", ""]
    if scores and (published := read_json(ASSETS / "published.json").get(benchmark)):
        whole = len(scores) == len(found) == published["tasks"]
        ours, label = [model if whole else f"{model}, {len(scores)} tasks only"], published["what"]
        bars = {**published["models"], ours[0]: np.mean(kinds["**all**"])}
        lines += [f"| model | {label} |", "|---|---|"]
        for name in sorted(bars, key=bars.get)[::-1]:
            lines.append(
                f"| **{name}** | **{bars[name]:.1f}** |"
                if name in ours
                else f"| {name} | {bars[name]:.1f} |"
            )
        lines += ["", f"Published numbers: {published['source']}.", ""]
    lines += [*rows, "", *(f"- {name}: {note}" for name, note in notes.items()), ""]
    write_text(out / "results.md", "\n".join(lines))
    if bars:
        plot_bars(out / "results.png", bars, ours, label)
