"""Pictures of a run, written as PNG."""

from collections.abc import Container, Mapping
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SHOWN = 24  # records in the similarity picture: what a page can show


def plot_loss(path: Path, steps: list[int], losses: list[float], rates: list[float]) -> None:
    """The training loss, its running mean, and the learning rate behind it."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    rate_axes = axes.twinx()
    rate_axes.fill_between(steps, rates, color="0.92", zorder=0)
    rate_axes.set_ylabel("learning rate", color="0.6")
    rate_axes.tick_params(colors="0.6")
    axes.set_zorder(1)
    axes.patch.set_visible(False)
    axes.plot(steps, losses, color="tab:blue", alpha=0.35, label="loss of a step")
    width = max(len(losses) // 20, 1)
    kernel = np.ones(width) / width
    axes.plot(steps[width - 1 :], np.convolve(losses, kernel, "valid"), color="tab:blue", label=f"mean of {width}")
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def plot_similarity(path: Path, before: np.ndarray, after: np.ndarray) -> None:
    """Cosines of held-out anchors with held-out positives, before and after; the diagonal holds the right pairs."""
    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for axes, matrix, title in zip(figure.subplots(1, 2), (before, after), ("before", "after"), strict=True):
        n = min(SHOWN, len(matrix))
        image = axes.imshow(matrix[:n, :n], vmin=min(0.0, float(after[:n, :n].min())), vmax=1.0, cmap="viridis")
        axes.set_title(title)
        axes.set_xlabel("positive")
        axes.set_ylabel("anchor")
    figure.colorbar(image, ax=figure.axes, label="cosine")
    figure.savefig(path, dpi=150)


def plot_bars(path: Path, scores: Mapping[str, float], ours: Container[str], label: str) -> None:
    """A bar for each score, the highest first; `ours` stand out."""
    names = sorted(scores, key=scores.__getitem__)
    figure = Figure(figsize=(8, 1.2 + 0.3 * len(names)), layout="constrained")
    axes = figure.subplots()
    bars = axes.barh(names, [scores[name] for name in names])
    for name, bar in zip(names, bars, strict=True):
        bar.set_color("tab:blue" if name in ours else "0.75")
    axes.bar_label(bars, fmt="%.1f", padding=3)
    axes.set_xlabel(label)
    axes.margins(x=0.1, y=0.01)
    figure.savefig(path, dpi=150)
