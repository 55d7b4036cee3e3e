"""Pictures of the laboratory's report, written as PNG. A colour is a modality; before is pale or
dashed, after is full.

Every function says whether it found anything to draw; if not, it writes nothing.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from laboratory import statistics as stats
from laboratory.statistics import METHOD, MODALITIES, Run, number, retrieval_of
from lco_jax.core.pictures import save

COLOURS = {
    "image": "#2b6cb0",
    "video": "#2f855a",
    "audio": "#dd6b20",
    "page": "#805ad5",
    "text": "#4a5568",
}
NAMES = {"image": "images", "video": "clips", "audio": "sounds", "page": "pages", "text": "texts"}
WAYS = {
    "none": "none",
    "lora": "LoRA",
    "full": "all weights",
    "projection": "projection",
    "clip": "CLIP-style",
}
MARKS = ("o", "s", "D", "^", "v", "P", "X")  # a seed's
PALE = 0.35


def plot_headline(path: Path, runs: Sequence[Run], chance: Callable[[str], float | None]) -> bool:
    """Left: retrieval before and after text-only tuning of the best generator. Right: the scaling
    law, all modalities.

    chance: of a modality's retrieval.
    """
    kinds, best = _kinds(runs), stats.qualities(runs)[-1]
    if not kinds:
        return False
    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for at, kind in enumerate(kinds):
        for tune, shift, alpha in (("none", -0.2, PALE), (METHOD, 0.2, 1.0)):
            values = _of_seeds(runs, best, tune, kind)
            if values:
                left.bar(
                    at + shift, np.mean(values), 0.36, color=COLOURS[kind], alpha=alpha, linewidth=0
                )
                left.scatter(
                    [at + shift] * len(values), values, s=14, color="0.15", zorder=3, linewidths=0
                )
                label = f"{np.mean(values):.2f}"
                left.annotate(
                    label,
                    (at + shift, max(values)),
                    (0, 4),
                    textcoords="offset points",
                    ha="center",
                )
        if (level := chance(kind)) is not None:
            left.hlines(
                level, at - 0.42, at + 0.42, color="0.15", linestyle=":", linewidth=1.4, zorder=4
            )
    left.set_xticks(range(len(kinds)), [f"text ↔ {NAMES[kind]}" for kind in kinds])
    left.plot([], [], color="0.15", linestyle=":", label="chance")
    for label, alpha in (("before", PALE), ("after tuning on text alone", 1.0)):
        left.bar(0, 0, color="0.35", alpha=alpha, label=label, linewidth=0)
    left.set(title="Before and after tuning on text alone", ylabel="recall@1", ylim=(0, None))
    drawn = [
        _scatter(right, stats.scaling(runs, stats.exact(kind), stats.retrieval(kind)), kind)
        for kind in kinds
    ]
    right.set(
        title="Generation before it, representation after it",
        ylabel="recall@1, text ↔ media, after",
    )
    right.set(xlabel="share of exact answers before", ylim=(0, None))
    for axes in (left, right) if any(drawn) else (left,):
        axes.legend(
            frameon=False,
            loc="upper center",
            bbox_to_anchor=(0.5, -0.15),
            ncols=4,
            handlelength=1.4,
        )
        _bare(axes)
    save(figure, path)
    return True


def plot_scaling(path: Path, runs: Sequence[Run]) -> bool:
    """Retrieval after tuning over generative quality before it: a column a modality, a row a
    measure of quality.
    """
    kinds = _kinds(runs)
    rows = {
        "share of exact answers before": stats.exact,
        "minus the generative loss before, nats a token": stats.negative_loss,
    }
    points = {
        (row, kind): stats.scaling(runs, x(kind), stats.retrieval(kind))
        for row, x in rows.items()
        for kind in kinds
    }
    if not any(len(found.x) for found in points.values()):
        return False
    figure = Figure(figsize=(1 + 2.9 * len(kinds), 6.4), layout="constrained")
    panels = figure.subplots(2, len(kinds), squeeze=False, sharey=True)
    for axes_row, row in zip(panels, rows, strict=True):
        for axes, kind in zip(axes_row, kinds, strict=True):
            found = points[row, kind]
            _scatter(axes, found, kind)
            r = stats.correlation(found)
            axes.set_title(
                NAMES[kind] + ("" if r is None or r.mean is None else f", r = {r.mean:.2f}")
            )
            axes.set_xlabel(row if len(kinds) < 3 else row.replace(", nats", ",\nnats"))
            _bare(axes)
        axes_row[0].set_ylabel("recall@1 after, text ↔ media")
        axes_row[0].set_ylim(bottom=0)
    save(figure, path)
    return True


def plot_quality(path: Path, runs: Sequence[Run], chance: Callable[[str], float | None]) -> bool:
    """Retrieval before and after text-only tuning over the steps of generative training; points are
    seeds.
    """
    kinds, steps = _kinds(runs), stats.qualities(runs)
    if not kinds:
        return False
    figure = Figure(figsize=(1 + 2.9 * len(kinds), 3.6), layout="constrained")
    for axes, kind in zip(
        figure.subplots(1, len(kinds), sharey=True, squeeze=False).flat, kinds, strict=True
    ):
        for tune, style in (("none", {"linestyle": "--", "alpha": 0.6}), (METHOD, {})):
            values = {
                at: found
                for at, count in enumerate(steps)
                if (found := _of_seeds(runs, count, tune, kind))
            }
            label = "before" if tune == "none" else "after"
            axes.plot(
                [*values],
                [np.mean(x) for x in values.values()],
                color=COLOURS[kind],
                label=label,
                **style,
            )
            each = [(at, x) for at, found in values.items() for x in found]
            if each:
                axes.scatter(
                    *zip(*each, strict=True),
                    s=14,
                    color=COLOURS[kind],
                    alpha=style.get("alpha", 1.0),
                    zorder=3,
                )
        if (level := chance(kind)) is not None:
            axes.axhline(level, color="0.15", linestyle=":", linewidth=1.2, label="chance")
        axes.set_xticks(range(len(steps)), [f"{count:,}" for count in steps])
        axes.set(title=f"text ↔ {NAMES[kind]}", xlabel="steps of generative training")
        _bare(axes)
    figure.axes[0].set(ylabel="recall@1", ylim=(0, None))
    figure.axes[0].legend(frameon=False)
    save(figure, path)
    return True


def plot_tuning(path: Path, runs: Sequence[Run]) -> bool:
    """Ways of tuning the best generator: a column a way, in it every modality's retrieval, and the
    mean of all.
    """
    best, kinds = stats.qualities(runs)[-1], _kinds(runs)
    ways = [way for way in WAYS if any(_of_seeds(runs, best, way, kind) for kind in kinds)]
    if len(ways) < 3:  # before and one way are in the other pictures
        return False
    figure = Figure(figsize=(1.6 + 1.35 * len(ways), 3.8), layout="constrained")
    axes = figure.subplots()
    for at, way in enumerate(ways):
        for kind, shift in zip(kinds, np.linspace(-0.24, 0.24, len(kinds)), strict=True):
            values = _of_seeds(runs, best, way, kind)
            axes.scatter(
                [at + shift] * len(values),
                values,
                s=20,
                color=COLOURS[kind],
                alpha=0.75,
                linewidths=0,
            )
        every = [
            retrieval_of(stats.find(runs, seed, best, way), *kinds) for seed in stats.seeds_of(runs)
        ]
        mean = stats.mean_of(every)
        axes.hlines(mean, at - 0.36, at + 0.36, color="0.15", linewidth=2)
        axes.text(at + 0.38, mean, f"{mean:.2f}", va="center", ha="left", fontsize=9)
    for kind in kinds:
        axes.scatter([], [], s=20, color=COLOURS[kind], label=f"text ↔ {NAMES[kind]}")
    axes.set_xticks(range(len(ways)), [WAYS[way] for way in ways])
    axes.set(ylabel="recall@1", ylim=(0, None), xlim=(-0.6, len(ways) - 0.2))
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _bare(axes)
    save(figure, path)
    return True


def plot_layers(path: Path, runs: Sequence[Run]) -> bool:
    """Anisotropy and kernel alignment of the best generator by layer, mean over seeds: before
    dashed, after solid.
    """
    best = stats.qualities(runs)[-1]
    titles = {
        "anisotropy": "anisotropy",
        "mutual_knn": "mutual kNN with text",
        "cka": "unbiased CKA with text",
    }
    figure, drawn = Figure(figsize=(11, 3.6), layout="constrained"), False
    for axes, (measure, title) in zip(figure.subplots(1, 3), titles.items(), strict=True):
        for kind in COLOURS:
            for tune, style in (("none", {"linestyle": "--", "alpha": 0.6}), (METHOD, {})):
                some = stats.of_all_seeds(runs, best, tune)
                found = [((run.get("layers") or {}).get(measure) or {}).get(kind) for run in some]
                found = [[np.nan if x is None else x for x in layers] for layers in found if layers]
                if found and len({len(layers) for layers in found}) == 1:
                    label = NAMES[kind] if tune == METHOD else None
                    axes.plot(np.mean(found, axis=0), color=COLOURS[kind], label=label, **style)
                    drawn = True
        levels = [number(run, "layers", "chance", kind) for run in runs for kind in MODALITIES]
        if measure == "mutual_knn" and (level := stats.mean_of(levels)) is not None:
            axes.axhline(level, color="0.15", linestyle=":", linewidth=1.2)
        axes.set(title=title, xlabel="layer", ylim=(min(0.0, axes.get_ylim()[0]), None))
        axes.xaxis.get_major_locator().set_params(integer=True)
        _bare(axes)
    if drawn:
        for label, style in (("before", "--"), ("after", "-"), ("chance", ":")):
            figure.axes[0].plot([], [], color="0.4", linestyle=style, label=label)
        figure.legend(
            *figure.axes[0].get_legend_handles_labels(), frameon=False, loc="outside right upper"
        )
        save(figure, path)
    return drawn


def plot_minimal(path: Path, runs: Sequence[Run], chance: float | None) -> bool:
    """Minimal pairs of the best generator by attribute: hollow is before, full after."""
    best = stats.qualities(runs)[-1]
    some = {tune: stats.of_all_seeds(runs, best, tune) for tune in ("none", METHOD)}
    names = {
        name for found in some.values() for run in found for name in run.get("representation") or {}
    }
    attributes = sorted(name for name in names if name.startswith("minimal."))[::-1]
    if not attributes:
        return False
    figure = Figure(figsize=(6.4, 1.2 + 0.42 * len(attributes)), layout="constrained")
    axes = figure.subplots()
    for at, name in enumerate(attributes):
        means = {}
        for tune, face, shift in (("none", "white", -0.12), (METHOD, COLOURS["image"], 0.12)):
            values = [
                x for run in some[tune] if (x := number(run, "representation", name)) is not None
            ]
            axes.scatter(
                values,
                [at + shift] * len(values),
                s=26,
                facecolor=face,
                edgecolor=COLOURS["image"],
                zorder=3,
            )
            means |= {tune: np.mean(values)} if values else {}
        if len(means) == 2:
            axes.plot(
                [means["none"], means[METHOD]],
                [at, at],
                color="0.75",
                linewidth=5,
                solid_capstyle="round",
            )
    if chance is not None:
        axes.axvline(chance, color="0.15", linestyle=":", linewidth=1.2)
        axes.text(chance, len(attributes) - 0.45, " chance", va="bottom", ha="left", fontsize=9)
    axes.set_yticks(range(len(attributes)), [name.removeprefix("minimal.") for name in attributes])
    axes.set(
        xlabel="the right text is nearer than the one that differs in it alone", xlim=(None, 1.02)
    )
    for label, face in (("before", "white"), ("after", COLOURS["image"])):
        axes.scatter([], [], s=26, facecolor=face, edgecolor=COLOURS["image"], label=label)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(1, 1))
    _bare(axes)
    save(figure, path)
    return True


def _scatter(axes: Axes, points: stats.Points, kind: str) -> bool:
    """A mark a run (its shape: the seed), and the least-squares line."""
    if not len(points.x):
        return False
    for mark, seed in zip(MARKS * len(points.x), np.unique(points.seeds), strict=False):
        mine = points.seeds == seed
        axes.scatter(
            points.x[mine],
            points.y[mine],
            s=30,
            marker=mark,
            color=COLOURS[kind],
            alpha=0.8,
            linewidths=0,
        )
    axes.plot([], [], color=COLOURS[kind], linewidth=1.8, label=NAMES[kind])
    if np.ptp(points.x):
        ends = np.array([points.x.min(), points.x.max()])
        slope, offset = np.polyfit(points.x, points.y, 1)
        axes.plot(ends, offset + slope * ends, color=COLOURS[kind], linewidth=1.8)
    return True


def _kinds(runs: Sequence[Run]) -> list[str]:
    """The modalities that any run has retrieval of."""
    return [kind for kind in MODALITIES if any(retrieval_of(run, kind) is not None for run in runs)]


def _of_seeds(runs: Sequence[Run], steps: int, tune: str, kind: str) -> list[float]:
    each = [
        retrieval_of(stats.find(runs, seed, steps, tune), kind) for seed in stats.seeds_of(runs)
    ]
    return [value for value in each if value is not None]


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.2)
