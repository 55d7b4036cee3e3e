"""What an evaluation found, for people: a table in markdown and a picture, the published numbers beside ours."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from lco_jax.core.files import ASSETS, read_json, write_text
from lco_jax.evaluation.plots import plot_bars


@dataclass(frozen=True)
class Measured:
    """One task. score: its main score, in percent, or None with the reason why. parts: name -> score, by language."""

    task: str
    type: str
    score: float | None = None
    reason: str = ""
    parts: Mapping[str, float] = field(default_factory=dict)


def write_report(out: Path, model: str, benchmark: str, found: Sequence[Measured], recorded: Mapping[str, str]) -> None:
    """Write `results.md` and `results.png` into `out`.

    benchmark: a name in assets/published.json, or any. recorded: what a reader must know of how it was measured. Ours
    stands beside published numbers only if as many tasks were measured as they are the mean of.
    """
    scores = {one.task: one.score for one in found if one.score is not None}
    mean = float(np.mean([*scores.values()])) if scores else float("nan")
    published = read_json(ASSETS / "published.json").get(benchmark)
    lines = [f"# {benchmark}: {model}", ""]
    bars, ours, label = scores, scores.keys(), "score"
    if published:
        beside = len(scores) == len(found) == published["tasks"]
        bars, ours, label = {**published["models"], **({model: mean} if beside else {})}, {model}, published["what"]
        lines += [f"| model | {label} |", "|---|---|"]
        lines += [
            _row(f"**{name}**" if name == model else name, bars[name]) for name in sorted(bars, key=lambda x: -bars[x])
        ]
        if not beside:
            lines += [_row(f"**{model}**, {len(scores)} of {published['tasks']} tasks: not comparable", mean)]
        lines += ["", f"Published: {published['source']}.", ""]
    lines += ["| task | type | score |", "|---|---|---|"]
    types = defaultdict(list)
    for one in found:
        lines += [f"| {one.task} | {one.type} | {_number(one.score) if one.score is not None else one.reason} |"]
        lines += [f"| {one.task}, {name} | | {_number(score)} |" for name, score in one.parts.items()]
        types[one.type] += [] if one.score is None else [one.score]
    if len(scores) > 1:
        lines += [
            f"| mean of {len(types[kind])} | {kind} | {_number(float(np.mean(types[kind])))} |"
            for kind in types
            if types[kind]
        ]
        lines += [f"| **mean of {len(scores)}** | | **{_number(mean)}** |"]
    lines += ["", *(f"- {name}: {value}" for name, value in recorded.items()), ""]
    write_text(out / "results.md", "\n".join(lines))
    if bars:
        plot_bars(out / ".results.png", bars, ours, label)
        (out / ".results.png").replace(out / "results.png")


def _number(score: float) -> str:
    return f"{score:.1f}"


def _row(name: str, score: float) -> str:
    return f"| {name} | {_number(score)} |"
