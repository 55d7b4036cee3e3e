"""Pictures of a training run and of an evaluation, written as PNG."""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

SHOWN = 24  # records in the similarity picture: what a page can show
NAMED = 40  # classes whose names fit beside a confusion matrix


def plot_loss(
    path: Path,
    steps: list[int],
    losses: list[float],
    rates: list[float],
) -> None:
    """The training loss, its running mean, and the learning rate behind it."""
    width = max(len(losses) // 20, 1)
    means = np.convolve(losses, np.ones(width) / width, "valid")
    with _picture(path, (7, 4)) as axes:
        rate_axes = axes.twinx()
        rate_axes.fill_between(steps, rates, color="0.92", zorder=0)
        rate_axes.set_ylabel("learning rate", color="0.6")
        rate_axes.tick_params(colors="0.6")
        axes.set_zorder(1)
        axes.patch.set_visible(False)
        axes.plot(
            steps,
            losses,
            color="tab:blue",
            alpha=0.35,
            label="loss of a step",
        )
        axes.plot(
            steps[width - 1 :],
            means,
            color="tab:blue",
            label=f"mean of {width}",
        )
        axes.set(xlabel="step", ylabel="InfoNCE loss")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False)


def plot_similarity(path: Path, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Cosines of held-out anchors and positives before and after; the right pairs are the diagonal.

    found: the name of a row of panels -> (before, after), each [N, N].
    """
    figure = Figure(figsize=(9, 4.2 * len(found)), layout="constrained")
    rows = figure.subplots(len(found), 2, squeeze=False)
    for panels, (name, both) in zip(rows, found.items(), strict=True):
        shown = [cosines[:SHOWN, :SHOWN] for cosines in both]
        lowest = min(0.0, *(float(cosines.min()) for cosines in shown))
        for axes, cosines, title in zip(panels, shown, ("before", "after"), strict=True):
            image = axes.imshow(cosines, vmin=lowest, vmax=1.0, cmap="viridis")
            axes.set(
                title=f"{name}, {title}",
                xlabel="positive",
                ylabel="anchor",
            )
        figure.colorbar(image, ax=panels, label="cosine")
    save(figure, path)


def plot_bars(
    path: Path,
    scores: Mapping[str, float],
    ours: Container[str],
    label: str,
) -> None:
    """A bar for each score, the highest first; the bars named in `ours` stand out."""
    names = sorted(scores, key=scores.__getitem__)
    colours = ["tab:blue" if name in ours else "0.75" for name in names]
    with _picture(path, (8, 1.2 + 0.3 * len(names))) as axes:
        bars = axes.barh(names, [scores[name] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.1, y=0.01)


def plot_ranks(path: Path, best: np.ndarray, documents: int) -> None:
    """The share of queries with a relevant document among the first k.

    best: the rank of each query's first relevant document, [N]. documents: how many there are.
    """
    first = np.unique(np.geomspace(1, documents, 200).astype(int))
    shares = [(best <= k).mean() for k in first]
    median = np.median(best)
    with _picture(path, (6, 4)) as axes:
        axes.semilogx(first, shares, color="tab:blue", drawstyle="steps-post")
        label = f"half of the queries: {median:,.0f}"
        axes.axvline(median, color="0.6", linestyle=":", label=label)
        axes.set_xlabel(f"first k of {documents:,} documents")
        axes.set_ylabel(f"share of {len(best):,} queries that find one")
        axes.set_ylim(0, 1.02)
        axes.legend(frameon=False)


def plot_scores(
    path: Path,
    scores: Sequence[float],
    cosines: np.ndarray,
    spearman: float,
) -> None:
    """A point for each pair: the score that people gave, and the cosine."""
    alpha = max(0.05, min(1.0, 300 / len(scores)))
    with _picture(path, (6, 4)) as axes:
        axes.scatter(scores, cosines, s=9, alpha=alpha, linewidths=0)
        axes.set_title(f"Spearman {spearman:.3f}, {len(scores):,} pairs")
        axes.set(xlabel="score", ylabel="cosine")


def plot_confusion(path: Path, counts: np.ndarray, labels: Sequence[str]) -> None:
    """The share of each class (a row) that was taken for each class. counts: [C, C]."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _picture(path, (6, 5)) as axes:
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
        if len(labels) <= NAMED:
            axes.set_xticks(range(len(labels)), labels, rotation=90)
            axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="taken for", ylabel="class")
        axes.figure.colorbar(image, ax=axes, label="share of the class")


def plot_spectrum(path: Path, spectra: Mapping[str, np.ndarray], rank: int) -> None:
    """Singular values of each matrix's delta, and the rank that is kept. spectra: by name."""
    highest = max(1e-8, *(values.max() for values in spectra.values()))
    with _picture(path, (6, 4)) as axes:
        for values in spectra.values():
            numbers = range(1, len(values) + 1)
            shown = np.maximum(values, 1e-12)
            axes.semilogy(
                numbers,
                shown,
                color="tab:blue",
                alpha=0.3,
                linewidth=0.8,
            )
        axes.axvline(rank + 0.5, color="tab:red", label=f"kept: {rank}")
        axes.set_ylim(bottom=highest * 1e-4)
        axes.set(xlabel="number", ylabel="singular value")
        axes.legend(frameon=False)


def save(figure: Figure, path: Path) -> None:
    """Write a picture under another name, then rename it: a kill leaves no half of a picture."""
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=150, format="png")
    aside.replace(path)


@contextmanager
def _picture(path: Path, size: tuple[float, float]) -> Iterator[Axes]:
    """Axes to draw into; the picture is written at the end. size: width and height in inches."""
    figure = Figure(figsize=size, layout="constrained")
    yield figure.subplots()
    save(figure, path)
