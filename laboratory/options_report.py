"""The page of `lab:options`: which additions to the paper's recipe help, hurt, or show nothing.

    python -m laboratory.options_report --runs=runs/lab_options --output=docs/options

Every number is a difference from the recipe of the same seed. Of two ways to retrieve (media by
text, and text by media) it is the mean.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from laboratory import statistics as stats
from laboratory.assembled_plots import KINDS, NAMES, save
from laboratory.options import OPTIONS, RECIPE
from laboratory.report import cell, interval, table
from laboratory.statistics import Estimate, Run, number
from lco_jax.core.errors import run_main
from lco_jax.core.files import read_json, write_json, write_text

HELPS, HURTS, NOTHING = "helps", "hurts", "no difference seen"
COLOURS = {HELPS: "#009e73", HURTS: "#d55e00", NOTHING: "#555555"}
RULE = (
    "An option helps where the 95 % interval of its difference from the recipe is above 0, hurts",
    "where it is below, and otherwise no difference is seen. Intervals are Student's over seeds,",
    "paired by seed. Nothing is corrected for the number of options and measures.",
)
Value = Callable[[Run], float | None]


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of lab:options")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    write(read_json(args.runs / "results.json"), args.output)
    return 0


def write(results: dict[str, Any], folder: Path) -> None:
    """Write report.md, the figures and the results."""
    runs, names = results["runs"], results["config"]["options"]
    folder.mkdir(parents=True, exist_ok=True)
    measures = dict(_measures(runs))
    plot_options(folder / "options", runs, names, measures)
    plot_sizes(folder / "sizes", runs)
    sections = [
        ["# Additions to the paper's recipe, at equal data and steps", "", *_head(results)],
        ["## What helps, and what does not", "", "![Options](options.svg)", "", *RULE],
        [*_differences(runs, names, measures)],
        ["## The recipe, and each option alone", "", *_means(runs, names, measures)],
        ["## Smaller vectors", "", "![Sizes](sizes.svg)", "", *_sizes(runs)],
    ]
    write_text(folder / "report.md", "\n\n".join("\n".join(lines) for lines in sections) + "\n")
    write_json(folder / "results.json", results)


def verdict(found: Estimate | None) -> str:
    """By `RULE`."""
    if found is None or found.low is None or found.high is None:
        return NOTHING
    return HELPS if found.low > 0 else HURTS if found.high < 0 else NOTHING


def _measures(runs: Sequence[Run]) -> Iterator[tuple[str, Value]]:
    """(name, its number of a run)."""
    for file in dict.fromkeys(key for run in runs for key in run["text"]):
        yield _name_of(file), lambda run, file=file: number(run, "text", file)
    yield "SNLI, held out", lambda run: number(run, "retrieval")
    for kind in KINDS:
        yield f"text ↔ {NAMES[kind]}", stats.retrieval(kind)


def _name_of(file: str) -> str:
    return {"sick": "SICK", "stsb-test": "STS-B test"}.get(file, file)


def _by_seed(runs: Sequence[Run], name: str, value: Value) -> dict[int, float]:
    """{seed: an option's number}."""
    found = {run["seed"]: value(run) for run in runs if run["option"] == name}
    return {seed: one for seed, one in found.items() if one is not None}


def difference(runs: Sequence[Run], name: str, value: Value) -> Estimate | None:
    """An option less the recipe, paired by seed."""
    ours, recipe = _by_seed(runs, name, value), _by_seed(runs, RECIPE, value)
    both = [ours[seed] - recipe[seed] for seed in sorted(ours.keys() & recipe.keys())]
    return stats.interval(both) if both else None


# ---- tables


def _head(results: dict[str, Any]) -> list[str]:
    config, runs = results["config"], results["runs"]
    held_out, training = config["held_out"], config["contrast"]["train"]
    return [
        f"SmolLM2-135M-Instruct with ears and eyes, {len(stats.seeds_of(runs))} seeds. Each option "
        f"is LoRA on the same texts, {training['steps']} steps of {training['batch_size']}, and "
        "differs from the recipe in one value of the configuration. STS-B and SICK: Spearman's "
        f"correlation of {config['pairs']} pairs. SNLI: the share of {held_out} held-out premises "
        "that find their entailed sentence among those and their contradictions. Media: the mean "
        "of accuracy (media → text) and mean average precision (text → media).",
        "",
        f"```sh\n{results['command']}\n```",
    ]


def _differences(
    runs: Sequence[Run], names: Sequence[str], measures: dict[str, Value]
) -> list[str]:
    rows = []
    for name in names:
        if name == RECIPE:
            continue
        cells = []
        for value in measures.values():
            found = difference(runs, name, value)
            cells.append("" if found is None else f"{interval(found, 3)}: {verdict(found)}")
        rows.append([f"`{name}`: {OPTIONS[name].says}", *cells])
    return table(["less the recipe", *measures], rows)


def _means(runs: Sequence[Run], names: Sequence[str], measures: dict[str, Value]) -> list[str]:
    rows = []
    for name in names:
        found = [_by_seed(runs, name, value).values() for value in measures.values()]
        cells = [cell(stats.interval([*values]) if values else None) for values in found]
        rows.append([f"`{name}`", *cells])
    return table(["", *measures], rows)


def _sizes(runs: Sequence[Run]) -> list[str]:
    rows = []
    for name in _sized(runs):
        for file in runs[0]["small"]:
            cells = []
            for form in runs[0]["small"][file]:
                values = _small(runs, name, file, form)
                cells.append(cell(stats.interval(values) if values else None))
            rows.append([f"`{name}`", _name_of(file), *cells])
    return table(["tuned", "pairs", *_forms(runs)], rows)


def _forms(runs: Sequence[Run]) -> list[str]:
    return [*next(iter(runs[0]["small"].values()))]


def _sized(runs: Sequence[Run]) -> list[str]:
    """The options whose small vectors are shown."""
    there = {run["option"] for run in runs}
    return [name for name in (RECIPE, "matryoshka") if name in there]


def _small(runs: Sequence[Run], name: str, file: str, form: str) -> list[float]:
    return [*_by_seed(runs, name, lambda run: number(run, "small", file, form)).values()]


# ---- figures


def plot_options(
    path: Path, runs: Sequence[Run], names: Sequence[str], measures: dict[str, Value]
) -> None:
    """Every option's difference from the recipe, a panel a measure."""
    others = [name for name in names if name != RECIPE]
    figure = Figure(figsize=(2.4 * len(measures) + 2, 0.5 * len(others) + 2), layout="constrained")
    panels = figure.subplots(1, len(measures), sharex=True, sharey=True, squeeze=False)[0]
    for axes, (measure, value) in zip(panels, measures.items(), strict=True):
        for at, name in enumerate(others):
            found = difference(runs, name, value)
            if found is None:
                continue
            colour = COLOURS[verdict(found)]
            axes.plot(found.mean, at, "o", color=colour)
            if found.low is not None:
                axes.hlines(at, found.low, found.high, color=colour, linewidth=1.6)
        axes.axvline(0, color="0.2", linewidth=1)
        axes.set_title(measure, fontsize=10)
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(range(len(others)), [name.replace("_", " ") for name in others])
    panels[0].invert_yaxis()
    figure.supxlabel("difference from the paper's recipe, of the same seed", fontsize=10)
    seeds = len(stats.seeds_of(runs))
    legend = "green: helps; red: hurts"
    figure.suptitle(f"Additions to the recipe: {seeds} seeds, 95 % intervals ({legend})")
    save(figure, path)


def plot_sizes(path: Path, runs: Sequence[Run]) -> None:
    """How much of a correlation is left in smaller vectors, with and without Matryoshka."""
    files, forms = [*runs[0]["small"]], _forms(runs)
    figure = Figure(figsize=(5 * len(files), 4), layout="constrained")
    panels = figure.subplots(1, len(files), squeeze=False)[0]
    marks = {RECIPE: ("o", "#555555"), "matryoshka": ("^", "#0072b2")}
    for axes, file in zip(panels, files, strict=True):
        for shift, name in zip((-0.08, 0.08), _sized(runs), strict=False):
            mark, colour = marks[name]
            places = np.arange(len(forms)) + shift
            found = [stats.interval(_small(runs, name, file, form)) for form in forms]
            axes.plot(places, [one.mean for one in found], mark, color=colour, label=name)
            for at, one in zip(places, found, strict=True):
                if one.low is not None:
                    axes.vlines(at, one.low, one.high, color=colour, linewidth=1.6)
        axes.set_xticks(range(len(forms)), forms)
        axes.set(title=_name_of(file), xlabel="part of the vector that is kept; binary: its signs")
        axes.grid(axis="y", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("Spearman's correlation with people's scores")
    panels[0].legend(frameon=False)
    figure.suptitle(f"Smaller vectors, {len(stats.seeds_of(runs))} seeds, 95 % intervals")
    save(figure, path)


if __name__ == "__main__":
    run_main(main)
