"""Pictures of a run, written as PNG."""

from collections.abc import Container, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

SHOWN = 24  # records in the similarity picture: what a page can show
NAMED = 40  # classes whose names fit beside a confusion matrix


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
    axes.plot(
        steps[width - 1 :],
        np.convolve(losses, kernel, "valid"),
        color="tab:blue",
        label=f"mean of {width}",
    )
    axes.set_xlabel("step")
    axes.set_ylabel("InfoNCE loss")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save(figure, path)


def plot_similarity(path: Path, found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Cosines of held-out anchors with held-out positives before and after; the diagonal holds the right pairs.

    found: what is shown in a row -> (before, after), each [N, N].
    """
    figure = Figure(figsize=(9, 4.2 * len(found)), layout="constrained")
    for pair, name, sides in zip(
        figure.subplots(len(found), 2, squeeze=False), found, found.values(), strict=True
    ):
        lowest = min(0.0, *(float(side[:SHOWN, :SHOWN].min()) for side in sides))
        for axes, side, title in zip(pair, sides, ("before", "after"), strict=True):
            image = axes.imshow(side[:SHOWN, :SHOWN], vmin=lowest, vmax=1.0, cmap="viridis")
            axes.set(title=f"{name}, {title}", xlabel="positive", ylabel="anchor")
        figure.colorbar(image, ax=pair, label="cosine")
    save(figure, path)


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
    save(figure, path)


def plot_ranks(path: Path, best: np.ndarray, documents: int) -> None:
    """The share of queries of which a relevant document is among the first k. best: its rank, of each query."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    first = np.unique(np.geomspace(1, documents, 200).astype(int))
    axes.semilogx(
        first, [(best <= k).mean() for k in first], color="tab:blue", drawstyle="steps-post"
    )
    axes.axvline(
        np.median(best),
        color="0.6",
        linestyle=":",
        label=f"half of the queries: {np.median(best):,.0f}",
    )
    axes.set_xlabel(f"first k of {documents:,} documents")
    axes.set_ylabel(f"share of {len(best):,} queries that find one")
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False)
    save(figure, path)


def plot_scores(path: Path, scores: Sequence[float], cosines: np.ndarray, spearman: float) -> None:
    """A pair a point: people's score, and the cosine."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.scatter(scores, cosines, s=9, alpha=max(0.05, min(1.0, 300 / len(scores))), linewidths=0)
    axes.set_title(f"Spearman {spearman:.3f}, {len(scores):,} pairs")
    axes.set_xlabel("score")
    axes.set_ylabel("cosine")
    save(figure, path)


def plot_confusion(path: Path, counts: np.ndarray, labels: Sequence[str]) -> None:
    """Of each class (a row), which share was taken for which. counts: [C, C]."""
    figure = Figure(figsize=(6, 5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(counts / counts.sum(axis=1, keepdims=True), vmin=0, vmax=1, cmap="viridis")
    if len(labels) <= NAMED:
        axes.set_xticks(range(len(labels)), labels, rotation=90)
        axes.set_yticks(range(len(labels)), labels)
    axes.set_xlabel("taken for")
    axes.set_ylabel("class")
    figure.colorbar(image, ax=axes, label="share of the class")
    save(figure, path)


def plot_spectrum(path: Path, spectra: Mapping[str, np.ndarray], rank: int) -> None:
    """Singular values of every matrix's delta over their number, and the rank that is kept. spectra: by name."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for values in spectra.values():
        axes.semilogy(
            range(1, len(values) + 1),
            np.maximum(values, 1e-12),
            color="tab:blue",
            alpha=0.3,
            linewidth=0.8,
        )
    axes.axvline(rank + 0.5, color="tab:red", label=f"kept: {rank}")
    axes.set_ylim(bottom=max(1e-8, *(values.max() for values in spectra.values())) * 1e-4)
    axes.set_xlabel("number")
    axes.set_ylabel("singular value")
    axes.legend(frameon=False)
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Aside, then renamed: a kill leaves no half of a picture."""
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=150, format="png")
    aside.replace(path)
