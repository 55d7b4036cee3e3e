"""Pictures of a training run and of an evaluation, written as PNG.

subject, of every picture: what it shows, as `subject_of` says it.
"""

from collections.abc import Container, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from lco_jax.core.pictures import new_figure, save

SHOWN = 24  # records in the similarity picture: what a page can show
NAMED = 40  # classes whose names fit beside a confusion matrix
END = 44  # letters of a name that a title has room for; a path tells most at its end
LEAST_VALUE = 1e-6  # of the largest singular value: what lies below is rounding


def subject_of(model: str, data: str, counted: str = "") -> str:
    """The line above a picture: the model, the data, and how much of it there is."""
    names = [name if len(name) <= END else f"…{name[1 - END :]}" for name in (model, data)]
    return ", ".join(filter(None, [*names, counted]))


def plot_loss(
    path: Path,
    subject: str,
    steps: list[int],
    losses: list[float],
    rates: list[float],
    what: str = "training loss",
) -> None:
    """The training loss, its running mean, and the learning rate behind it. what: the loss is."""
    width = max(len(losses) // 20, 1)
    means = np.convolve(losses, np.ones(width) / width, "valid")
    with _picture(path, subject, (7, 4)) as axes:
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
        axes.set(xlabel="step", ylabel=what)
        axes.set_ylim(bottom=0)
        axes.figure.legend(loc="outside lower right", ncols=2, frameon=False)


def plot_similarity(
    path: Path, subject: str, found: Mapping[str, tuple[np.ndarray, np.ndarray]]
) -> None:
    """Cosines of held-out anchors and positives before and after; the right pairs are the diagonal.

    found: the name of a row of panels -> (before, after), each [N, N].
    """
    figure = new_figure(subject, (9, 0.4 + 4.2 * len(found)))
    rows = figure.subplots(len(found), 2, squeeze=False)
    for panels, (name, both) in zip(rows, found.items(), strict=True):
        shown = [cosines[:SHOWN, :SHOWN] for cosines in both]
        lowest = min(0.0, *(float(cosines.min()) for cosines in shown))
        for axes, cosines, title in zip(panels, shown, ("before", "after"), strict=True):
            image = axes.imshow(cosines, vmin=lowest, vmax=1.0, cmap="viridis")
            axes.set(
                title=f"{name}, {title}",
                xlabel="positive",
                ylabel=f"anchor, {len(cosines)} of {len(both[0]):,}",
            )
        figure.colorbar(image, ax=panels, label="cosine")
    save(figure, path)


def plot_bars(
    path: Path,
    subject: str,
    scores: Mapping[str, float],
    ours: Container[str],
    label: str,
) -> None:
    """A bar for each score, the highest first; the bars named in `ours` stand out."""
    names = sorted(scores, key=scores.__getitem__)
    colours = ["tab:blue" if name in ours else "0.75" for name in names]
    with _picture(path, subject, (8, 1.5 + 0.3 * len(names))) as axes:
        bars = axes.barh(names, [scores[name] for name in names], color=colours)
        axes.bar_label(bars, fmt="%.1f", padding=3)
        axes.set_xlabel(label)
        axes.margins(x=0.1, y=0.01)


def plot_ranks(path: Path, subject: str, best: np.ndarray, documents: int) -> None:
    """The share of queries with a relevant document among the first k.

    best: the rank of each query's first relevant document, [N]. documents: how many there are.
    """
    first = np.unique(np.geomspace(1, documents, 200).astype(int))
    shares = [(best <= k).mean() for k in first]
    median = int(np.ceil(np.median(best)))
    with _picture(path, subject, (6, 4)) as axes:
        axes.semilogx(first, shares, color="tab:blue", drawstyle="steps-post")
        label = f"half of the queries find one among the first {median:,}"
        axes.axvline(median, color="0.6", linestyle=":", label=label)
        axes.set_xlabel(f"first k of {documents:,} documents")
        axes.set_ylabel(f"share of {len(best):,} queries that find one")
        axes.set_ylim(0, 1.02)
        axes.figure.legend(loc="outside lower right", frameon=False)


def plot_scores(
    path: Path,
    subject: str,
    scores: Sequence[float],
    cosines: np.ndarray,
    spearman: float,
) -> None:
    """A point for each pair: the score that people gave, and the cosine."""
    alpha = max(0.05, min(1.0, 300 / len(scores)))
    with _picture(path, subject, (6, 4)) as axes:
        axes.scatter(scores, cosines, s=9, alpha=alpha, linewidths=0)
        axes.set_xlabel(f"people's score of {len(scores):,} pairs; Spearman {spearman:.3f}")
        axes.set_ylabel("cosine")


def plot_sizes(
    path: Path, subject: str, lines: Mapping[str, Sequence[tuple[int, float]]], score: str
) -> None:
    """A score over the bytes of a vector. lines: name -> (bytes, score) of each size."""
    with _picture(path, subject, (8, 4.5)) as axes:
        for name, points in lines.items():
            sizes, scores = zip(*points, strict=True)
            axes.plot(sizes, scores, marker="o", markersize=4, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel("bytes of a vector")
        axes.set_ylabel(score)
        axes.figure.legend(loc="outside right upper", frameon=False)


def plot_confusion(path: Path, subject: str, counts: np.ndarray, labels: Sequence[str]) -> None:
    """The share of each class (a row) that was taken for each class. counts: [C, C]."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    with _picture(path, subject, (6, 5)) as axes:
        image = axes.imshow(shares, vmin=0, vmax=1, cmap="viridis")
        if len(labels) <= NAMED:
            axes.set_xticks(range(len(labels)), labels, rotation=90)
            axes.set_yticks(range(len(labels)), labels)
        axes.set(xlabel="taken for", ylabel=f"class of {counts.sum():,.0f} items")
        axes.figure.colorbar(image, ax=axes, label="share of the class")


def plot_spectrum(path: Path, subject: str, spectra: Mapping[str, np.ndarray], rank: int) -> None:
    """Singular values of each matrix's delta, and the rank that is kept. spectra: by name."""
    highest = max(values.max(initial=0.0) for values in spectra.values())
    with _picture(path, subject, (6, 4)) as axes:
        for values in spectra.values():
            shown = values[values > highest * LEAST_VALUE]
            axes.plot(
                range(1, len(shown) + 1),
                shown,
                color="tab:blue",
                alpha=0.3,
                linewidth=0.8,
            )
        axes.axvline(rank + 0.5, color="tab:red", label=f"kept: the first {rank}")
        axes.set_yscale("log")
        axes.set(xlabel="number", ylabel=f"singular values of {len(spectra):,} matrices")
        axes.figure.legend(loc="outside lower right", frameon=False)


@contextmanager
def _picture(path: Path, subject: str, size: tuple[float, float]) -> Iterator[Axes]:
    """Axes to draw into; the picture is written at the end. size: as of `new_figure`."""
    figure = new_figure(subject, size)
    yield figure.subplots()
    save(figure, path)
