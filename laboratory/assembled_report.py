"""The laboratory's page: what held on a real language model, with four figures.

    python -m laboratory.assembled_report --runs=runs/lab_smollm2 --sentences=runs/lab_sentences \\
        --output=docs/lab

It reads the results.json of `lab:smollm2` and of `lab:sentences`.
"""

import argparse
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from laboratory import assembled_plots as plots
from laboratory import statistics as stats
from laboratory.assembled_plots import KINDS, NAMES, PAIRS
from laboratory.claims import AS_GOOD, RULE, VERDICTS, Claim, between
from laboratory.report import cell, guess_of, interval, table
from laboratory.statistics import Estimate, Run, number
from lco_jax.core.errors import run_main
from lco_jax.core.files import read_json, write_json, write_text

WAYS = {
    "none": "before",
    "plain": "LoRA, texts without the classes",
    "classes": "LoRA, texts about the classes",
    "full": "all weights, texts without the classes",
    "projection": "a projection, texts without the classes",
    "pairs": "LoRA, media with their texts",
}
Value = Callable[[Run | None], float | None]


def main() -> int:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, required=True, help="the folder of lab:smollm2")
    parser.add_argument("--sentences", type=Path, required=True, help="of lab:sentences")
    parser.add_argument("--output", type=Path, required=True)
    args = parser.parse_args()
    results = read_json(args.runs / "results.json")
    sentences = read_json(args.sentences / "results.json")
    write(results, sentences, args.output)
    return 0


def write(results: dict[str, Any], sentences: dict[str, Any], folder: Path) -> None:
    """Write report.md, the figures, and both results."""
    runs, guess = results["runs"], partial(guess_of, results["worlds"])
    folder.mkdir(parents=True, exist_ok=True)
    items = 10 * results["config"]["sizes"]["tests"]
    plots.plot_sentences(folder / "sentences", sentences)
    plots.plot_opened(folder / "opened", runs, guess, items)
    plots.plot_law(folder / "law", runs, guess)
    plots.plot_layers(folder / "layers", runs)
    claims = [*_claims(results, sentences)]
    sections = [
        _head(results, claims),
        ["## What held, and what did not", "", *_verdicts(claims)],
        ["## Sentences", "", "![STS-B](sentences.svg)", "", *_sentences(sentences)],
        ["## Media, opened by text", "", "![Before and after](opened.svg)", ""],
        [*_opened(runs, guess)],
        ["## The scaling law", "", "![The law](law.svg)", "", *_law(runs)],
        ["## Ways of tuning, at equal steps", "", *_ways(runs)],
        ["## What tuning costs the generator", "", *_costs(runs)],
        ["## Layer by layer", "", "![Layers](layers.svg)"],
    ]
    write_text(folder / "report.md", "\n\n".join("\n".join(lines) for lines in sections) + "\n")
    write_json(folder / "results.json", results)
    write_json(folder / "sentences.json", sentences)


def _head(results: dict[str, Any], claims: Sequence[Claim]) -> list[str]:
    config, runs = results["config"], results["runs"]
    count = {kind: sum(claim.verdict == kind for claim in claims) for kind in VERDICTS}
    failed = [claim.text for claim in claims if claim.verdict != VERDICTS[0]]
    return [
        "# Generate, then represent: the paper's claim on a real language model",
        "",
        ", ".join(f"**{many} {kind}**" for kind, many in count.items())
        + f", of {len(claims)} claims. Not shown: {'; '.join(failed) or 'none'}.",
        "",
        f"SmolLM2-135M-Instruct with Whisper base's encoder and a fresh vision tower. "
        f"{len(stats.seeds_of(runs))} seeds, {len(runs)} runs, {results['minutes']:.0f} minutes of "
        f"two cores. Generators of {', '.join(map(str, config['stages']))} steps, in which the "
        "language model is frozen. Speakers and photos of the tests occur in no training.",
        "",
        f"```sh\n{results['command']}\n```",
    ]


# ---- what is decided


def _claims(results: dict[str, Any], sentences: dict[str, Any]) -> Iterator[Claim]:
    """Every claim that there are numbers for. "Best" is the generator that was trained longest."""
    found = [*_of_sentences(sentences), *_of_media(results["runs"])]
    for text, quantity, estimate, edge in found:
        if estimate is not None:
            yield Claim(text, quantity, estimate, edge)


def _of_sentences(sentences: dict[str, Any]) -> Iterator[tuple[str, str, Estimate | None, float]]:
    for file, before in sentences["before"].items():
        ours = _scores(sentences, "ours", file)
        theirs = _scores(sentences, "recipe", file)
        name = file.replace("stsb", "STS-B")
        gain = stats.interval([score - before for score in ours.values()]) if ours else None
        yield f"412 triplets improve {name}", "Spearman after less before", gain, 0
        both = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
        yield (
            f"we are at least as good as the recipe in torch on {name}",
            "Spearman, ours less the recipe's, same seed",
            stats.interval(both) if both else None,
            AS_GOOD,
        )


def _of_media(runs: Sequence[Run]) -> Iterator[tuple[str, str, Estimate | None, float]]:
    best = stats.qualities(runs)[-1]
    gain = partial(between, runs, (best, "plain"), (best, "none"))
    for kind in KINDS:
        what = "accuracy and precision after less before, best generator"
        text = f"tuning on texts without the classes improves text ↔ {NAMES[kind]}"
        yield text, what, gain(stats.retrieval(kind)), 0
    text = "it improves written ↔ spoken digits, which nothing ever paired"
    yield text, "accuracy after less before, both ways", gain(crossed), 0
    for kind in KINDS:
        r = stats.correlation(plots.law(runs, kind))
        text = f"the better it says, the better it represents: {NAMES[kind]}"
        yield text, "Pearson, minus the loss before with text ↔ media after", r, 0
    for other in ("full", "projection"):
        value = between(runs, (best, "plain"), (best, other), stats.retrieval(*KINDS))
        text = f"LoRA is at least as good as {'all weights' if other == 'full' else 'a projection'}"
        yield text, f"text ↔ media, LoRA less {other}, equal steps and data", value, AS_GOOD
    value = between(runs, (best, "classes"), (best, "pairs"), stats.retrieval(*KINDS))
    text = "tuning on texts about the classes is at least as good as on pairs of media and text"
    yield text, "text ↔ media, texts less pairs, equal steps and records", value, AS_GOOD
    for kind in KINDS:
        anisotropy = partial(stats.last_layer, measure="anisotropy", kind=kind)
        fall = between(runs, (best, "none"), (best, "plain"), anisotropy)
        text = f"anisotropy of {NAMES[kind]} falls, which tuning never saw"
        yield text, "mean cosine at the last layer, before less after", fall, 0
        rise = gain(partial(stats.last_layer, measure="cka", kind=kind))
        yield f"{NAMES[kind]} align with text", "unbiased CKA, after less before", rise, 0


def crossed(run: Run | None) -> float | None:
    """Written to spoken digits and back, the mean."""
    both = [number(run, "representation", f"{a}_to_{b}") for a, b in (KINDS[:2], KINDS[1::-1])]
    return None if None in both else stats.mean_of(both)


# ---- tables


def _verdicts(claims: Sequence[Claim]) -> list[str]:
    rows = [
        [
            claim.text,
            f"**{claim.verdict}**",
            claim.quantity,
            interval(claim.estimate, 3),
            f"{claim.edge:g}",
            str(claim.estimate.n),
        ]
        for claim in claims
    ]
    return [*RULE, "", *table(["claim", "verdict", "quantity", "value", "edge", "n"], rows)]


def _sentences(sentences: dict[str, Any]) -> list[str]:
    rows = []
    for file, before in sentences["before"].items():
        cells = [
            cell(stats.interval([*scores.values()]) if scores else None)
            for scores in (_scores(sentences, way, file) for way in ("ours", "recipe"))
        ]
        rows.append([file.replace("stsb", "STS-B"), f"{before:.3f}", *cells])
    head = ["Spearman", "before", "after, `lco_jax.train`", "after, the recipe in torch and peft"]
    return table(head, rows)


def _opened(runs: Sequence[Run], guess: Callable[[str], float | None]) -> list[str]:
    best, rows = stats.qualities(runs)[-1], []
    for key in PAIRS:
        ways = ("none", "plain", "classes")
        cells = [cell(plots.mean(runs, best, way, "representation", key)) for way in ways]
        rows.append([key.replace("_to_", " → "), f"{guess(key) or 0:.3f}", *cells])
    head = ["", "chance", "before", "texts without the classes", "texts about the classes"]
    return table(head, rows)


def _law(runs: Sequence[Run]) -> list[str]:
    rows = []
    for steps in stats.qualities(runs):
        for kind in KINDS:
            loss = plots.mean(runs, steps, "none", "generative", kind, "loss")
            exact = plots.mean(runs, steps, "none", "generative", kind, "exact")
            ways = [_over(runs, steps, way, stats.retrieval(kind)) for way in ("none", "plain")]
            rows.append([f"{steps}", NAMES[kind], cell(loss), cell(exact), *map(cell, ways)])
    head = ["steps", "of", "loss", "exact answers", "text ↔ media before", "after"]
    return table(head, rows)


def _ways(runs: Sequence[Run]) -> list[str]:
    best, rows = stats.qualities(runs)[-1], []
    for way, name in WAYS.items():
        if not stats.of_all_seeds(runs, best, way):
            continue
        cells = [cell(_over(runs, best, way, stats.retrieval(kind))) for kind in KINDS]
        cells.append(cell(_over(runs, best, way, crossed)))
        files = dict.fromkeys(key for run in runs for key in run.get("text", {}))
        cells += [cell(plots.mean(runs, best, way, "text", file)) for file in files]
        rows.append([name, *cells])
    head = ["tuned", *(f"text ↔ {NAMES[kind]}" for kind in KINDS), "written ↔ spoken", *files]
    return table(head, rows)


def _costs(runs: Sequence[Run]) -> list[str]:
    best, rows = stats.qualities(runs)[-1], []
    for way, name in WAYS.items():
        cells = []
        for kind in ("text", *KINDS):
            for measure in ("loss", "exact"):
                cells.append(cell(plots.mean(runs, best, way, "generative", kind, measure)))
        if any(cells):
            rows.append([name, *cells])
    head = [f"{kind}: {m}" for kind in ("own answers", *NAMES.values()) for m in ("loss", "exact")]
    return table(["tuned", *head], rows)


def _over(runs: Sequence[Run], steps: int, way: str, value: Value) -> Estimate | None:
    return stats.over_seeds(runs, lambda seed: value(stats.find(runs, seed, steps, way)))


def _scores(sentences: dict[str, Any], way: str, file: str) -> dict[int, float]:
    """{seed: Spearman}."""
    return {run["seed"]: run["scores"][file] for run in sentences["runs"] if run["way"] == way}


if __name__ == "__main__":
    run_main(main)
