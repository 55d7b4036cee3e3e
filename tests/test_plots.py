"""Pictures say what they show, and nothing in them covers anything else."""

import numpy as np
import pytest
from matplotlib.figure import Figure

from lco_jax.analysis import layer_plots
from lco_jax.evaluation import plots

SUBJECT = plots.subject_of("builtin:lab", "pairs.jsonl", "4 pairs")
RNG = np.random.default_rng(0)
LAYERS = {"anisotropy": {"image": [0.1, 0.2], "text": [None, 0.4]}, "cka": [None, 0.3]}
SIDES = (RNG.normal(size=(8, 4)), RNG.normal(size=(8, 4)))
LOSSES = (RNG.random(8), np.full(8, 4))
PICTURES = {
    "ranks": lambda path: plots.plot_ranks(path, SUBJECT, np.array([1, 2, 2, 9]), 10),
    "spectrum": lambda path: plots.plot_spectrum(path, SUBJECT, {"q": np.array([2, 1, 1e-17])}, 1),
    "loss": lambda path: plots.plot_loss(path, SUBJECT, [1, 2], [2.0, 1.0], [0.0, 1e-3]),
    "layers": lambda path: layer_plots.plot_layers(path, SUBJECT, {"before": LAYERS}, ["cka"], 0.1),
    "sides": lambda path: layer_plots.plot_layers(
        path, SUBJECT, {"before": LAYERS, "after": LAYERS}, ["anisotropy"]
    ),
    "space": lambda path: layer_plots.plot_space(path, SUBJECT, {"after": SIDES}, ["a", "b"]),
    "generator": lambda path: layer_plots.plot_generator(
        path,
        SUBJECT,
        {"before": LOSSES, "after": LOSSES},
        {"nats_per_token": 0.0, "low": -0.1, "high": 0.1},
    ),
}


@pytest.fixture
def drawn(monkeypatch):
    """The figures that are written, with everything at its place."""
    figures = []

    def write(figure, path, **options):
        figure.draw_without_rendering()
        figures.append(figure)
        path.touch()

    monkeypatch.setattr(Figure, "savefig", write)
    return figures


@pytest.mark.parametrize("name", PICTURES)
def test_a_legend_covers_no_panel_and_the_picture_says_of_what_it_is(drawn, tmp_path, name):
    PICTURES[name](tmp_path / "x.png")
    (figure,) = drawn
    assert figure.get_suptitle() == "builtin:lab, pairs.jsonl, 4 pairs"
    (legend,) = figure.legends
    assert not any(axes.get_legend() for axes in figure.axes)
    for axes in figure.axes:
        assert not legend.get_window_extent().overlaps(axes.get_tightbbox()), name


def test_half_of_the_queries(drawn, tmp_path):
    plots.plot_ranks(tmp_path / "x.png", "", np.array([1, 2, 3, 9]), 10)
    (text,) = drawn[0].legends[0].get_texts()
    assert text.get_text() == "half of the queries find one among the first 3"


def test_a_spectrum_shows_the_values_that_there_are(drawn, tmp_path):
    """Beyond a delta's true rank are zeros, which took half of the picture."""
    values = np.array([3.0, 2.0, 1.0, 1e-17, 0.0, 0.0])
    plots.plot_spectrum(tmp_path / "x.png", "", {"q": values}, 2)
    (axes,) = drawn[0].axes
    assert axes.get_xlim()[1] < 4
    assert axes.get_ylim()[0] > 0.5


def test_a_long_name_keeps_its_end():
    subject = plots.subject_of("/data/" + "models/" * 20 + "runs/base/merged", "image.jsonl")
    model, data = subject.split(", ")
    assert len(model) == plots.END
    assert model.startswith("…")
    assert model.endswith("/runs/base/merged")
    assert data == "image.jsonl"
