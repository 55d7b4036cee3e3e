"""Pictures as PNG files: an empty one with its subject above, and how one is written."""

from pathlib import Path

from matplotlib.figure import Figure


def new_figure(subject: str, size: tuple[float, float]) -> Figure:
    """An empty picture with its subject above. size: width and height in inches."""
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(subject, fontsize="medium", color="0.35")
    return figure


def save(figure: Figure, path: Path) -> None:
    """Write a picture under another name, then rename it: a kill leaves no half of a picture."""
    aside = path.with_name(f".{path.name}")
    figure.savefig(aside, dpi=150, format="png")
    aside.replace(path)
