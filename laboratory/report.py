"""results.json of the laboratory's runs -> report.md: the paper's tables and figures in small, and
what held.

A number that a run does not have leaves its row or cell out. docs/laboratory.md says what each
number means, and how results.json is laid out.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from laboratory import claims, report_plots
from laboratory import statistics as stats
from laboratory.statistics import METHOD, MODALITIES, Run, number
from lco_jax.core.errors import LcoError
from lco_jax.core.files import write_json, write_text

Guess = Callable[[str], float | None]  # what chance gives, of a test
Value = Callable[[Run], float | None]
NEEDED = ("seed", "generative_steps", "tune")  # what tells a run from the others


def write(results: dict[str, Any], folder: Path) -> None:
    """Write report.md, its pictures and results.json into `folder`, each aside and then renamed."""
    results = _finite(results)
    runs = results.get("runs") or []
    if not runs:
        raise LcoError("the results hold no runs, and there is nothing to report")
    for i, run in enumerate(runs):
        if missing := [key for key in NEEDED if run.get(key) is None]:
            raise LcoError(
                f"run {i} of the results has no {missing[0]!r}; it needs {', '.join(NEEDED)}"
            )
    names = [tuple(run[key] for key in NEEDED) for run in runs]
    if twice := [name for name in names if names.count(name) > 1]:
        raise LcoError(
            f"the results hold two runs of seed, generative_steps and tune {twice[0]}; keep one"
        )
    folder.mkdir(parents=True, exist_ok=True)
    guess = partial(guess_of, results.get("worlds") or [])

    def kind_guess(kind: str) -> float | None:
        return stats.mean_of([guess(f"text_to_{kind}"), guess(f"{kind}_to_text")])

    minimal = guess("minimal")
    drawn = {
        "headline": report_plots.plot_headline(folder / "headline.png", runs, kind_guess),
        "quality": report_plots.plot_quality(folder / "quality.png", runs, kind_guess),
        "scaling": report_plots.plot_scaling(folder / "scaling.png", runs),
        "tuning": report_plots.plot_tuning(folder / "tuning.png", runs),
        "layers": report_plots.plot_layers(folder / "layers.png", runs),
        "minimal": report_plots.plot_minimal(folder / "minimal.png", runs, minimal),
    }
    sections = [
        ("", "headline", _head(results)),
        ("What held, and what did not", "", _verdicts(results)),
        ("Before and after tuning on text alone", "quality", _before_after(runs, guess)),
        ("How well the models generate before it", "", _generation(runs)),
        ("Generation and representation: the scaling law", "scaling", _scaling(runs)),
        ("Ways of tuning", "tuning", _tuning(runs)),
        ("Layer by layer", "layers", _layers(runs)),
        ("Minimal pairs", "minimal", _minimal(runs, guess)),
        ("The terms of the bound", "", _theory(runs)),
    ]
    for name in (name for name, there in drawn.items() if not there):
        (folder / f"{name}.png").unlink(missing_ok=True)  # an earlier report's
    lines = ["# Generate, then represent: the paper's law in a laboratory", ""]
    for title, picture, body in sections:
        shown = (
            [f"![{title or 'The result in one picture'}]({picture}.png)", ""]
            if drawn.get(picture)
            else []
        )
        if body or shown:
            lines += [f"## {title}", ""] * bool(title) + shown + body + [""] * bool(body)
    write_text(folder / "report.md", "\n".join(lines).rstrip() + "\n")
    write_json(folder / "results.json", results)


def _head(results: dict[str, Any]) -> list[str]:
    runs = results["runs"]
    facts = f"{len(runs)} runs, {len(stats.seeds_of(runs))} seeds, generators trained for "
    facts += ", ".join(f"{steps:,}" for steps in stats.qualities(runs)) + " steps"
    minutes = number(results, "minutes")
    lines = [facts + ("." if minutes is None else f"; {minutes:.1f} minutes.")]
    lines += [
        "Numbers are means over seeds ± their standard deviation; in brackets, 95 % intervals.",
        "",
    ]
    return lines + (["```sh", str(results["command"]), "```", ""] if results.get("command") else [])


def _verdicts(results: dict[str, Any]) -> list[str]:
    decided = claims.decide(results)
    if not decided:
        return []
    count = {kind: sum(claim.verdict == kind for claim in decided) for kind in claims.VERDICTS}
    rows = []
    for claim in decided:
        value, n = interval(claim.estimate, 3), str(claim.estimate.n)
        rows.append(
            [claim.text, f"**{claim.verdict}**", claim.quantity, value, f"{claim.edge:g}", n]
        )
    lines = [
        ", ".join(f"**{many} {kind}**" for kind, many in count.items())
        + f", of {len(decided)} claims.",
        "",
    ]
    return [
        *lines,
        *claims.RULE,
        "",
        *table(["claim", "verdict", "quantity", "value", "edge", "n"], rows),
    ]


def _before_after(runs: Sequence[Run], guess: Guess) -> list[str]:
    """A row a test, a column a generator."""
    steps, names = (
        stats.qualities(runs),
        dict.fromkeys(x for run in runs for x in run.get("representation") or {}),
    )
    rows = []
    for name in names:
        cells = [_change(runs, count, _at("representation", name)) for count in steps]
        if any(cells) and not name.startswith("minimal."):
            rows.append([_spoken(name), _plain(guess(name)), *cells])
    return table(["before → after", "chance", *(f"{count:,} steps" for count in steps)], rows)


def _generation(runs: Sequence[Run]) -> list[str]:
    """Held-out loss, exact match and character error rate of every generator."""
    rows = []
    for count in stats.qualities(runs):
        for kind in MODALITIES:
            cells = [
                _over(runs, count, "none", _at("generative", kind, name))
                for name in ("loss", "exact", "cer")
            ]
            rows += [[f"{count:,}", kind, *cells]] if any(cells) else []
    return table(["steps", "of", "loss, nats a token", "exact", "character error rate"], rows)


def _scaling(runs: Sequence[Run]) -> list[str]:
    """The line and the correlations of every modality, by both measures of quality; the picture
    shows them.
    """
    rows = []
    for kind in MODALITIES:
        for quality, label in ((stats.exact, "exact answers"), (stats.negative_loss, "−loss")):
            for which, least in (("all", 0), ("trained", 1)):
                points = stats.scaling(runs, quality(kind), stats.retrieval(kind), least)
                r, rank = (
                    stats.correlation(points, how) for how in (stats.pearson, stats.spearman)
                )
                if r is not None and rank is not None:
                    slope = "" if r.mean is None else f"{np.polyfit(points.x, points.y, 1)[0]:+.3f}"
                    rows.append(
                        [kind, label, which, str(r.n), slope, interval(r, 2), interval(rank, 2)]
                    )
    return table(["of", "quality before", "generators", "n", "slope", "Pearson", "Spearman"], rows)


def _tuning(runs: Sequence[Run]) -> list[str]:
    """Every way of tuning the best generator, at equal steps and data."""
    best, rows = stats.qualities(runs)[-1], []
    values = {f"text ↔ {kind}": stats.retrieval(kind) for kind in MODALITIES}
    values |= {"image ↔ audio": claims.crossed, "KL, nats": _at("theory", "kl")}
    values |= {"parameters": _at("trained_parameters"), "seconds": _at("seconds", "tune")}
    for way, name in report_plots.WAYS.items():
        cells = [_over(runs, best, way, value) for value in values.values()]
        rows += [[name, *cells]] if any(cells) else []
    return table(["tuned", *values], rows)


def _layers(runs: Sequence[Run]) -> list[str]:
    """The last layer of the best generator, the embedding itself; the picture shows the others."""
    best, rows = stats.qualities(runs)[-1], []
    names = {
        "anisotropy": "anisotropy",
        "mutual_knn": "mutual kNN with text",
        "cka": "unbiased CKA with text",
    }
    for kind in (*MODALITIES, "text"):
        cells = [
            _change(runs, best, partial(stats.last_layer, measure=x, kind=kind)) for x in names
        ]
        rows += [[kind, *cells]] if any(cells) else []
    return table(["last layer, before → after", *names.values()], rows)


def _minimal(runs: Sequence[Run], guess: Guess) -> list[str]:
    best, rows = stats.qualities(runs)[-1], []
    for name in dict.fromkeys(
        x for run in runs for x in run.get("representation") or {} if x.startswith("minimal")
    ):
        cell = _change(runs, best, _at("representation", name))
        rows += (
            [[name.removeprefix("minimal").lstrip(".") or "all", _plain(guess(name)), cell]]
            if cell
            else []
        )
    return table(["attribute", "chance", "before → after"], rows)


def _theory(runs: Sequence[Run]) -> list[str]:
    """A row a generator and modality; the KL term is of the generator's text-only tuning, whatever
    the modality.
    """
    rows = []
    for count in stats.qualities(runs):
        kl = _over(runs, count, METHOD, _at("theory", "kl"))
        for kind in MODALITIES:
            loss = _over(runs, count, "none", _at("generative", kind, "loss"))
            ways = [
                _change(runs, count, _at("theory", name, kind)) for name in ("infonce", "mi_bound")
            ]
            rows += [[f"{count:,}", kind, loss, *ways, kl]] if any(ways) else []
    head = [
        "nats; before → after",
        "of",
        "generative loss",
        "InfoNCE loss",
        "bound on I(medium; text)",
        "KL(Q ‖ P)",
    ]
    return table(head, rows)


def _at(*path: str) -> Value:
    """The number at a path of a run's keys."""
    return lambda run: number(run, *path)


def _change(runs: Sequence[Run], steps: int, value: Value) -> str:
    """Before → after text-only tuning; "" where neither is there."""
    sides = [_over(runs, steps, tune, value) for tune in ("none", METHOD)]
    return " → ".join(side or "–" for side in sides) if any(sides) else ""


def _over(runs: Sequence[Run], steps: int, tune: str, value: Value) -> str:
    """Mean ± standard deviation over seeds, where there are two; "" where there is nothing."""
    each = [value(run) for run in stats.of_all_seeds(runs, steps, tune)]
    there = [one for one in each if one is not None]
    if not there:
        return ""
    form = ",.0f" if max(map(abs, there)) >= 100 else ".3f"
    mean = f"{np.mean(there):{form}}"
    return f"{mean} ± {np.std(there, ddof=1):{form}}" if len(there) > 1 else mean


def guess_of(worlds: Sequence[dict[str, Any]], name: str) -> float | None:
    """What chance gives, the mean over worlds."""
    return stats.mean_of([number(world, "chance", name) for world in worlds])


def _spoken(name: str) -> str:
    """text_to_image -> text → image."""
    return (
        name.replace("_to_", " → ")
        .replace("_ndcg_at_10", ", nDCG@10")
        .replace("_mrr", ", MRR")
        .replace("_", " ")
    )


def _plain(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"


def interval(estimate: stats.Estimate, digits: int) -> str:
    mean, low, high, _ = estimate
    if mean is None:
        return "does not vary"
    return f"{mean:+.{digits}f}" + (
        "" if low is None else f" [{low:+.{digits}f}, {high:+.{digits}f}]"
    )


def cell(found: stats.Estimate | None) -> str:
    """A number, which is no difference, with its interval; empty for None."""
    if found is None or found.mean is None:
        return ""
    interval = "" if found.low is None else f" [{found.low:.3f}, {found.high:.3f}]"
    return f"{found.mean:.3f}{interval}"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """Markdown, without the columns that are empty throughout; nothing where there are no rows."""
    kept = [i for i in range(len(head)) if any(row[i] for row in rows)]
    if not kept:
        return []
    lines = [
        [head[i] for i in kept],
        ["---"] * len(kept),
        *([row[i] for i in kept] for row in rows),
    ]
    return [f"| {' | '.join(cells)} |" for cells in lines]


def _finite(value: Any) -> Any:
    """The same with None in the place of what is not finite, and arrays' numbers as Python's: what
    JSON can hold.
    """
    if isinstance(value, dict):
        return {str(key): _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    if isinstance(value, np.generic | np.ndarray):
        return _finite(value.tolist())
    return None if isinstance(value, float) and not math.isfinite(value) else value
