"""What an evaluation found, for people: a table in markdown and a picture."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.files import ASSETS, read_json, write_text
from lco_jax.evaluation.plots import plot_bars, subject_of


class TaskScore(NamedTuple):
    """score: a task's main score in percent, or None with a reason. parts: part -> its score."""

    task: str
    type: str
    score: float | None = None
    reason: str = ""
    parts: Mapping[str, float] = {}


def write_report(
    out: Path,
    model: str,
    benchmark: str,
    found: Sequence[TaskScore],
    notes: Mapping[str, Any],
) -> None:
    """Write `results.md` and `results.png` into `out`.

    benchmark: a name in assets/published.json, or any other. Where our mean is of fewer tasks than
    the published means, its name says so. notes: what a reader must know about the measurement.
    """
    scores = {one.task: one.score for one in found if one.score is not None}
    published = read_json(ASSETS / "published.json").get(benchmark)
    subject = subject_of(model, benchmark, f"{len(scores):,} tasks")
    lines = [f"# {benchmark}: {model}", ""]
    if scores and published:
        complete = len(scores) == len(found) == published["tasks"]
        ours = model if complete else f"{model}, {len(scores)} tasks only"
        means = {**published["models"], ours: np.mean(list(scores.values()))}
        lines += _ranking(means, ours, published)
        plot_bars(out / "results.png", subject, means, [ours], published["what"])
    elif scores:
        plot_bars(out / "results.png", subject, scores, scores.keys(), "score")
    lines += [*_task_rows(found), *_mean_rows(found), "", *_note_lines(notes), ""]
    write_text(out / "results.md", "\n".join(lines))


def _note_lines(notes: Mapping[str, Any]) -> list[str]:
    return [f"- {name}: {note}" for name, note in notes.items()]


def _ranking(
    means: Mapping[str, float],
    ours: str,
    published: Mapping[str, Any],
) -> list[str]:
    """Models by their means, the highest first; ours in bold."""
    lines = [f"| model | {published['what']} |", "|---|---|"]
    for name in sorted(means, key=means.__getitem__, reverse=True):
        bold = "**" if name == ours else ""
        lines.append(f"| {bold}{name}{bold} | {bold}{means[name]:.1f}{bold} |")
    return [
        *lines,
        "",
        f"Published numbers: {published['source']}.",
        "",
    ]


def _task_rows(found: Sequence[TaskScore]) -> list[str]:
    rows = ["| task | type | score |", "|---|---|---|"]
    for one in found:
        score = one.reason if one.score is None else f"{one.score:.1f}"
        rows.append(f"| {one.task} | {one.type} | {score} |")
        rows += [f"| {one.task}, {part} | | {value:.1f} |" for part, value in one.parts.items()]
    return rows


def _mean_rows(found: Sequence[TaskScore]) -> list[str]:
    """Means over the tasks of each type, then over all tasks."""
    scores = defaultdict(list)
    everything = []
    for one in found:
        if one.score is not None:
            scores[one.type].append(one.score)
            everything.append(one.score)
    if everything:
        scores["**all**"] = everything
    return [
        f"| mean of {len(some)} | {kind} | {np.mean(some):.1f} |" for kind, some in scores.items()
    ]
