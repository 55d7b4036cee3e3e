"""Pictures of an analysis, written as PNG. Colours are modalities; before is dashed, after solid."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from lco_jax.analysis.generator import Losses
from lco_jax.analysis.measures import principal

SIDES, BOTH = (
    ("tab:blue", "tab:orange"),
    "tab:green",
)  # colours of the two modalities, and of what they make together
STYLES = {"before": {"linestyle": "--", "alpha": 0.7}, "after": {"linestyle": "-"}}
TITLES = {
    "mutual_knn": "mutual kNN",
    "cka": "CKA",
    "unbiased_cka": "unbiased CKA",
    "cknna": "CKNNA",
}
TITLES |= {"cycle_knn": "cycle kNN", "svcca": "SVCCA", "modality_gap": "modality gap"}
JOINED = 200  # pairs joined by lines: what an eye can follow


def plot_layers(
    path: Path,
    runs: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str],
    chance: float | None = None,
) -> None:
    """A panel a measure: its value at every layer, with gaps where it is not defined; figures 1 and 2 of the paper.

    runs: "before" and perhaps "after" -> what `measures.measure_layers` found. chance: what mutual kNN is by chance.
    """
    columns = min(len(measures), 3)
    figure = Figure(
        figsize=(3 + 2.6 * columns, 1 + 2.6 * len(measures) / columns), layout="constrained"
    )
    panels = figure.subplots(len(measures) // columns, columns, sharex=True, squeeze=False).flat
    for axes, measure in zip(panels, measures, strict=True):
        for run, found in runs.items():
            lines = found[measure] if isinstance(found[measure], dict) else {"": found[measure]}
            for colour, (name, values) in zip(
                SIDES if len(lines) > 1 else [BOTH], lines.items(), strict=True
            ):
                shown = [np.nan if value is None else value for value in values]
                axes.plot(
                    shown, color=colour, marker=".", label=f"{name} {run}".strip(), **STYLES[run]
                )
        if measure == "mutual_knn" and chance is not None:
            axes.axhline(chance, color="0.5", linestyle=":", label="chance")
        axes.update_datalim(
            [(0, 0), (len(values) - 1, 0)]
        )  # all layers; from 0, or small differences would look large
        axes.autoscale_view()
        axes.set_title(TITLES.get(measure, measure))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    figure.axes[0].legend(frameon=False)
    figure.supxlabel("layer")
    figure.savefig(path, dpi=150)


def plot_space(
    path: Path, runs: Mapping[str, tuple[np.ndarray, np.ndarray]], names: Iterable[str]
) -> None:
    """Both sides' embeddings, [N, D] of unit length, in the two principal directions they have together."""
    figure = Figure(figsize=(1 + 4.5 * len(runs), 4.8), layout="constrained")
    for axes, (run, sides) in zip(
        figure.subplots(1, len(runs), squeeze=False).flat, runs.items(), strict=True
    ):
        points = np.concatenate(sides)
        points = points - points.mean(axis=0)
        vectors, values = principal(points, 2)
        a, b = np.split(vectors * values, 2)
        axes.plot(
            *np.stack([a[:JOINED], b[:JOINED]]).transpose(2, 0, 1),
            color="0.5",
            linewidth=0.4,
            alpha=0.4,
        )
        for colour, name, side in zip(SIDES, names, (a, b), strict=True):
            axes.scatter(*side.T, s=10, color=colour, label=name, alpha=0.7, linewidths=0, zorder=2)
        first, second = values**2 / (points**2).sum()
        axes.set(
            title=run, xlabel=f"{first:.0%} of the variance", ylabel=f"{second:.0%} of the variance"
        )
        axes.set_aspect("equal", adjustable="datalim")
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_generator(path: Path, losses: Mapping[str, Losses], mean: Mapping[str, float]) -> None:
    """Captions by what a token of theirs costs more than before, and the mean over all tokens with its interval."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    before, after = (sums / counts for sums, counts in losses.values())
    axes.hist(after - before, bins="sturges", color="0.8")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.axvspan(mean["low"], mean["high"], color=BOTH, alpha=0.3, linewidth=0)
    axes.axvline(
        mean["nats_per_token"],
        color=BOTH,
        label=f"mean {mean['nats_per_token']:+.3f}, 95 % interval",
    )
    axes.set(
        title="what the generator pays", xlabel="after less before, nats a token", ylabel="captions"
    )
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
