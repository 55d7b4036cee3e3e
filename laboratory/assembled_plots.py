"""The figures of the report on a real language model, each as SVG and PNG.

Every figure stands alone: what was measured, N, seeds, 95 % intervals, chance. The colours are
those of Okabe and Ito, which people of any colour vision tell apart.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laboratory import statistics as stats
from laboratory.statistics import Estimate, Run, number
from lco_jax.core import pictures

KINDS = ("spoken", "written", "photo")
COLOURS = {"spoken": "#d55e00", "written": "#0072b2", "photo": "#009e73", "text": "#555555"}
NAMES = {"spoken": "spoken digits", "written": "written digits", "photo": "photos"}
PAIRS = {  # what is searched with what -> the colour of what kind
    "spoken_to_text": ("spoken digit\n→ its text", "spoken"),
    "text_to_spoken": ("text → its\nspoken digits", "spoken"),
    "written_to_text": ("written digit\n→ its text", "written"),
    "text_to_written": ("text → its\nwritten digits", "written"),
    "photo_to_text": ("photo\n→ its text", "photo"),
    "text_to_photo": ("text → its\nphotos", "photo"),
    "written_to_spoken": ("written →\nspoken digit", "text"),
    "spoken_to_written": ("spoken →\nwritten digit", "text"),
}
TUNED = {"none": "before", "plain": "tuned on texts without the classes"}
STYLE = {"none": ("white", "o"), "plain": (None, "o"), "classes": (None, "^")}


def save(figure: Figure, path: Path) -> None:
    """Write a figure in both formats. path: without an ending."""
    figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
    pictures.save(figure, path.with_suffix(".png"))


def mean(runs: Sequence[Run], steps: int, way: str, *path: str) -> Estimate | None:
    """A number's mean over seeds, with its interval."""
    return stats.over_seeds(runs, lambda seed: number(stats.find(runs, seed, steps, way), *path))


def plot_opened(
    path: Path, runs: Sequence[Run], chance: Callable[[str], float | None], items: int
) -> None:
    """Every pair of modalities before and after tuning on text. items: of a kind of media."""
    best, seeds = stats.qualities(runs)[-1], len(stats.seeds_of(runs))
    ways = {**TUNED, "classes": "tuned on texts about the classes"}
    ways = {way: name for way, name in ways.items() if stats.of_all_seeds(runs, best, way)}
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    axes = figure.subplots()
    for at, (key, (_, kind)) in enumerate(PAIRS.items()):
        for shift, way in zip(np.linspace(-0.22, 0.22, len(ways)), ways, strict=True):
            found = mean(runs, best, way, "representation", key)
            if found is not None:
                _dot(axes, at + shift, found, COLOURS[kind], way)
        level = chance(key)
        if level is not None:
            axes.hlines(level, at - 0.4, at + 0.4, color="0.2", linestyle=":", linewidth=1.3)
    axes.set_xticks(range(len(PAIRS)), [label for label, _ in PAIRS.values()], fontsize=9)
    for way, name in ways.items():
        _dot(axes, np.nan, Estimate(0.0, 0.0, 0.0, 1), "0.3", way, name)
    axes.plot([], [], color="0.2", linestyle=":", label="chance")
    axes.set(
        ylabel="accuracy (→ one item),\nmean average precision (text → items)",
        ylim=(0, 1),
        title=f"Media that nobody tuned on, found by text and by each other: {items} test items a "
        f"kind, {seeds} seeds, 95 % intervals",
    )
    _finish(axes)
    save(figure, path)


def plot_law(path: Path, runs: Sequence[Run], chance: Callable[[str], float | None]) -> None:
    """How well a generator says what media show, and how well it represents them once tuned."""
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    panels = figure.subplots(1, len(KINDS), sharey=True)
    seeds = len(stats.seeds_of(runs))
    for axes, kind in zip(panels, KINDS, strict=True):
        points = law(runs, kind)
        stages = [
            run["generative_steps"]
            for run in runs
            if run["tune"] == "none" and run["generative_steps"] > 0
        ]
        drawn = axes.scatter(
            points.x, points.y, c=np.log2(stages), cmap="cividis", s=34, edgecolor="0.2"
        )
        r = stats.correlation(points)
        label = "" if r is None or r.mean is None else f"r = {r.mean:.2f}"
        if r is not None and r.low is not None:
            label += f" [{r.low:.2f}, {r.high:.2f}]"
        axes.set_title(f"{NAMES[kind]}: {label}\n{len(points.x)} generators, {seeds} seeds")
        axes.set_xlabel("minus the loss of the right answer,\nnats a token, before tuning")
        levels = [chance(f"{kind}_to_text"), chance(f"text_to_{kind}")]
        level = stats.mean_of(levels)
        if level is not None:
            axes.axhline(level, color="0.2", linestyle=":", linewidth=1.3)
        _bare(axes)
    panels[0].set_ylabel("media ↔ text after tuning on text alone")
    bar = figure.colorbar(drawn, ax=panels, shrink=0.8)
    ticks = sorted(set(stages))
    bar.set_ticks(np.log2(ticks), labels=[str(steps) for steps in ticks])
    bar.set_label("steps of generative training")
    save(figure, path)


def law(runs: Sequence[Run], kind: str) -> stats.Points:
    """x: minus the loss of held-out answers before tuning; y: both directions after it."""
    return stats.scaling(runs, stats.negative_loss(kind), stats.retrieval(kind), 1, method="plain")


def plot_layers(path: Path, runs: Sequence[Run]) -> None:
    """Where in the decoder media and text meet, before and after."""
    best, seeds = stats.qualities(runs)[-1], len(stats.seeds_of(runs))
    rows = {
        "accuracy": "media → text, accuracy",
        "anisotropy": "anisotropy of media\n(mean cosine)",
        "cka": "unbiased CKA\nof media and text",
    }
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    grid = figure.subplots(len(rows), len(KINDS), sharex=True, sharey="row")
    for panels, (measure, label) in zip(grid, rows.items(), strict=True):
        panels[0].set_ylabel(label)
        for axes, kind in zip(panels, KINDS, strict=True):
            for way, name in TUNED.items():
                _line(axes, runs, best, way, kind, measure, name)
            _bare(axes)
    for axes, kind in zip(grid[0], KINDS, strict=True):
        axes.set_title(NAMES[kind])
        axes.axhline(0.1, color="0.2", linestyle=":", linewidth=1.3, label="chance")
    for axes in grid[-1]:
        axes.set_xlabel("layer")
    grid[0, 0].legend(frameon=False, fontsize=8)
    figure.suptitle(f"Layer by layer, {best} steps of generative training, {seeds} seeds, 95 %")
    save(figure, path)


def plot_sentences(path: Path, results: dict) -> None:
    """STS-B before and after: ours, and the recipe in torch."""
    files = sorted(results["before"])
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    counts = []
    for at, file in enumerate(files):
        axes.plot(at - 0.25, results["before"][file], "o", color="#555555", mfc="white", ms=8)
        for shift, way, colour in ((0, "ours", "#0072b2"), (0.25, "recipe", "#d55e00")):
            values = [run["scores"][file] for run in results["runs"] if run["way"] == way]
            counts.append(len(values))
            if values:
                _dot(axes, at + shift, stats.interval(values), colour, "plain")
                axes.scatter([at + shift + 0.06] * len(values), values, s=10, color=colour)
    axes.plot([], [], "o", color="#555555", mfc="white", label="before")
    axes.plot([], [], "o", color="#0072b2", label="after, lco_jax.train")
    axes.plot([], [], "o", color="#d55e00", label="after, the recipe in torch and peft")
    names = {"stsb-dev": "STS-B dev\n1,500 pairs", "stsb-test": "STS-B test\n1,379 pairs"}
    axes.set_xticks(range(len(files)), [names.get(file, file) for file in files])
    axes.set(
        ylabel="Spearman's correlation of cosines with people's scores",
        title=f"SmolLM2-135M tuned on 412 triplets of SNLI\n{max(counts)} seeds, 95 % intervals",
    )
    _finish(axes)
    save(figure, path)


def _line(
    axes: Axes, runs: Sequence[Run], steps: int, way: str, kind: str, measure: str, name: str
) -> None:
    """A measure over layers: the mean over seeds and a band of its interval."""
    rows = []
    for run in stats.of_all_seeds(runs, steps, way):
        values = run["layers"][measure][kind]
        rows.append([np.nan if value is None else value for value in values])
    if not rows:
        return
    table = np.array(rows, float)  # [seeds, L + 1]
    defined = ~np.isnan(table).any(axis=0)
    layers = np.flatnonzero(defined)
    if not layers.size:
        return
    found = [stats.interval(column) for column in table.T[layers]]
    style = "--" if way == "none" else "-"
    axes.plot(layers, [one.mean for one in found], style, color=COLOURS[kind], label=name)
    if found[0].low is not None:
        low, high = [one.low for one in found], [one.high for one in found]
        axes.fill_between(layers, low, high, color=COLOURS[kind], alpha=0.18, linewidth=0)


def _dot(
    axes: Axes, x: float, found: Estimate, colour: str, way: str, label: str | None = None
) -> None:
    """A mean with its interval."""
    fill, mark = STYLE[way]
    axes.plot(x, found.mean, mark, color=colour, mfc=fill or colour, ms=7, label=label)
    if found.low is not None:
        axes.vlines(x, found.low, found.high, color=colour, linewidth=1.6)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9")
    axes.set_axisbelow(True)


def _finish(axes: Axes) -> None:
    _bare(axes)
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=4)
