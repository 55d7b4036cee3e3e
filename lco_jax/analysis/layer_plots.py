"""Pictures of an analysis, as PNG. A colour is a modality; before is dashed, after is solid.

subject, of every picture: the model, the data, and the number of pairs.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lco_jax.analysis.measures import principal
from lco_jax.analysis.token_cost import Losses
from lco_jax.core.pictures import new_figure, save

SIDES = ("tab:blue", "tab:orange")  # colours of the two modalities
BOTH = "tab:green"  # the colour of what they make together
STYLES = {
    "before": {"linestyle": "--", "alpha": 0.7},
    "after": {"linestyle": "-"},
}
TITLES = {
    "mutual_knn": "mutual kNN",
    "cka": "CKA",
    "unbiased_cka": "unbiased CKA",
    "cknna": "CKNNA",
    "cycle_knn": "cycle kNN",
    "svcca": "SVCCA",
    "modality_gap": "modality gap",
}
JOINED = 200  # pairs joined by lines: what an eye can follow


def plot_layers(
    path: Path,
    subject: str,
    runs: Mapping[str, Mapping[str, Any]],
    measures: Sequence[str],
    chance: float | None = None,
) -> None:
    """A panel for each measure: its value at every layer, with gaps where it is not defined.

    Figures 1 and 2 of the paper. runs: "before" and perhaps "after" -> what
    `measures.measure_layers` found. chance: mutual kNN by chance.
    """
    columns = min(len(measures), 3)
    rows = len(measures) // columns
    figure = new_figure(subject, (3 + 2.6 * columns, 1.6 + 2.6 * len(measures) / columns))
    panels = figure.subplots(rows, columns, sharex=True, squeeze=False).flat
    for axes, measure in zip(panels, measures, strict=True):
        for run, found in runs.items():
            _plot_measure(axes, run, found[measure])
        if measure == "mutual_knn" and chance is not None:
            axes.axhline(chance, color="0.5", linestyle=":", label="chance")
        axes.autoscale_view()
        axes.set_title(TITLES.get(measure, measure))
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.25)
    for axes in figure.axes[-columns:]:
        axes.set_xlabel("layer")
    _put_legend(figure, figure.axes[0])
    save(figure, path)


def _plot_measure(axes: Axes, run: str, found: Any) -> None:
    """found: a list over layers, or {side's name: such a list}."""
    lines = found if isinstance(found, dict) else {"": found}
    colours = SIDES if len(lines) > 1 else [BOTH]
    for colour, (name, values) in zip(colours, lines.items(), strict=True):
        shown = [np.nan if value is None else value for value in values]
        label = f"{name} {run}".strip()
        axes.plot(
            shown,
            color=colour,
            marker=".",
            label=label,
            **STYLES[run],
        )
        # all layers, and from 0: otherwise small differences would look large
        axes.update_datalim([(0, 0), (len(values) - 1, 0)])


def plot_space(
    path: Path,
    subject: str,
    runs: Mapping[str, tuple[np.ndarray, np.ndarray]],
    names: Iterable[str],
) -> None:
    """Both sides' embeddings in the two principal directions that they have together.

    runs: "before" and perhaps "after" -> the two sides, each [N, D], of unit length.
    """
    figure = new_figure(subject, (1 + 4.5 * len(runs), 5.4))
    panels = figure.subplots(1, len(runs), squeeze=False).flat
    for axes, (run, sides) in zip(panels, runs.items(), strict=True):
        axes.set_title(run)
        _plot_pairs(axes, np.concatenate(sides), names)
    _put_legend(figure, axes)
    save(figure, path)


def _plot_pairs(axes: Axes, points: np.ndarray, names: Iterable[str]) -> None:
    """points [2 N, D]: one side, then the other."""
    points = points - points.mean(axis=0)
    vectors, values = principal(points, 2)
    sides = np.split(vectors * values, 2)
    lines = np.stack(sides)[:, :JOINED]  # [2, pairs, x and y]
    axes.plot(
        lines[..., 0],
        lines[..., 1],
        color="0.5",
        linewidth=0.4,
        alpha=0.4,
    )
    for colour, name, side in zip(SIDES, names, sides, strict=True):
        axes.scatter(
            *side.T,
            s=10,
            color=colour,
            label=name,
            alpha=0.7,
            linewidths=0,
            zorder=2,
        )
    first, second = values**2 / (points**2).sum()
    axes.set_xlabel(f"{first:.0%} of the variance")
    axes.set_ylabel(f"{second:.0%} of the variance")
    axes.set_aspect("equal", adjustable="datalim")


def plot_generator(
    path: Path,
    subject: str,
    losses: Mapping[str, Losses],
    mean: Mapping[str, float],
) -> None:
    """Captions by how much more their tokens cost than before.

    mean: the mean over all tokens and its interval, the "difference" of `token_cost`.
    """
    before, after = (sums / counts for sums, counts in losses.values())
    label = f"mean {mean['nats_per_token']:+.3f}, 95 % interval"
    figure = new_figure(subject, (6.4, 4.2))
    axes = figure.subplots()
    axes.hist(after - before, bins="sturges", color="0.8")
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.axvline(0, color="0.3", linewidth=1)
    axes.axvspan(
        mean["low"],
        mean["high"],
        color=BOTH,
        alpha=0.3,
        linewidth=0,
    )
    axes.axvline(mean["nats_per_token"], color=BOTH, label=label)
    axes.set_title("what the generator pays")
    axes.set(
        xlabel="after minus before, nats per token",
        ylabel=f"captions ({len(before):,} in all)",
    )
    _put_legend(figure, axes)
    save(figure, path)


def _put_legend(figure: Figure, axes: Axes) -> None:
    """What the lines and colours of one panel mean, below all panels, where it covers nothing."""
    lines, labels = axes.get_legend_handles_labels()
    columns = 2 if len(labels) == 4 else 3
    figure.legend(lines, labels, loc="outside lower center", ncols=columns, frameon=False)
