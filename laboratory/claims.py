"""What the paper claims, as quantities of the laboratory's runs, and whether each held."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

from laboratory import statistics as stats
from laboratory.statistics import METHOD, MODALITIES, Estimate, Run, number, retrieval_of

AS_GOOD = -0.02  # "at least as good": not worse by two points of recall@1
AT_CHANCE = -0.05  # "at chance": not above it by five points of recall@1
VERDICTS = HELD, FAILED, UNDECIDED = "held", "did not hold", "undecided"
RULE = (
    "One rule decides all: a claim held where the 95 % interval of its quantity is above the edge,",
    "it did not hold where the interval is below, and it is undecided otherwise, or where there is",
    "no interval (one seed). Quantities are such that the claim says they are high. The edge is 0,",
    'except for "at least as good" (at most two points worse) and "at chance" (at most',
    "five above). Intervals of differences are Student's over seeds, paired by seed; intervals of",
    "correlations are a bootstrap's with seeds as clusters. Nothing is corrected for number.",
)


class Claim(NamedTuple):
    """text: the claim. quantity: what is measured. edge: what its interval must lie above."""

    text: str
    quantity: str
    estimate: Estimate
    edge: float

    @property
    def verdict(self) -> str:
        """By `RULE`."""
        _, low, high, _ = self.estimate
        if low is None or high is None:
            return UNDECIDED
        return HELD if low > self.edge else FAILED if high < self.edge else UNDECIDED


def decide(results: dict[str, Any]) -> list[Claim]:
    """Every claim that the runs have numbers for."""
    found = []
    for text, quantity, estimate, edge in _claims(results["runs"], results.get("worlds") or []):
        found += [Claim(text, quantity, estimate, edge)] if estimate is not None else []
    return found


def _claims(
    runs: Sequence[Run], worlds: Sequence[dict[str, Any]]
) -> Iterator[tuple[str, str, Estimate | None, float]]:
    """All claims, with None where a number is missing. "Best" is the generator that was trained
    longest.
    """
    best, least = stats.qualities(runs)[-1], stats.qualities(runs)[0]
    change = partial(_change, runs, best)
    for kind in MODALITIES:
        text = f"text-only contrastive learning lifts text ↔ {kind} retrieval"
        yield (
            text,
            "recall@1 after less before, best generator",
            change(lambda run, m=kind: retrieval_of(run, m)),
            0,
        )
    never = "recall@1 after less before, mean of both directions, best generator"
    yield "it lifts image ↔ audio retrieval, which nothing ever paired", never, change(crossed), 0
    for kind in MODALITIES:
        points = stats.scaling(runs, stats.exact(kind), stats.retrieval(kind), 1)
        what = (
            "Pearson, exact match before with recall@1 after, generators that were trained at all"
        )
        yield (
            f"the better it generates, the better it embeds: {kind}",
            what,
            stats.correlation(points),
            0,
        )
    if least == 0 < best:
        everything = stats.retrieval(*MODALITIES)
        need = between(runs, (best, METHOD), (0, METHOD), everything)
        yield (
            "generative training is needed",
            "recall@1 tuned, best generator less untrained",
            need,
            0,
        )
        guess = {
            world.get("seed"): retrieval_of({"representation": world.get("chance")}, *MODALITIES)
            for world in worlds
        }
        short = stats.over_seeds(
            runs, lambda seed: _less(guess.get(seed), everything(stats.find(runs, seed, 0, METHOD)))
        )
        yield (
            "an untrained base stays at chance when tuned",
            "chance less recall@1 after",
            short,
            AT_CHANCE,
        )
    for other, text, edge in (
        ("full", "LoRA is at least as good as tuning all weights", AS_GOOD),
        ("projection", "LoRA is better than a linear projection", 0),
        ("clip", "text-only LoRA is at least as good as tuning on media and captions", AS_GOOD),
    ):
        value = between(
            runs, (best, METHOD), (best, other), lambda run: retrieval_of(run, *MODALITIES)
        )
        yield text, f"recall@1, LoRA less {other}, best generator", value, edge
    for kind in MODALITIES:
        fall = change(lambda run, m=kind: stats.last_layer(run, "anisotropy", m), sign=-1)
        what = "last layer, before less after, best generator"
        yield f"anisotropy falls, though tuning sees no {kind}", what, fall, 0
    for measure, name in (("mutual_knn", "mutual kNN"), ("cka", "unbiased CKA")):
        for kind in MODALITIES:
            rise = change(lambda run, m=kind, x=measure: stats.last_layer(run, x, m))
            what = f"{name}, last layer, after less before, best generator"
            yield f"the kernels of text and {kind} align", what, rise, 0
    for kind in MODALITIES:

        def bound(run: stats.Run, kind: str = kind) -> float | None:
            return number(run, "theory", "mi_bound", kind)

        shared = stats.correlation(stats.scaling(runs, stats.negative_loss(kind), bound, 1))
        what = (
            "Pearson, minus the generative loss before with the bound after, "
            "generators that were trained at all"
        )
        yield (
            f"the better it generates, the more text and {kind} are known to share",
            what,
            shared,
            0,
        )


def crossed(run: Run | None) -> float | None:
    """Image to audio and back, the mean."""
    both = [number(run, "representation", name) for name in ("image_to_audio", "audio_to_image")]
    return None if None in both else stats.mean_of(both)


def _less(a: float | None, b: float | None) -> float | None:
    return None if a is None or b is None else a - b


def between(
    runs: Sequence[Run],
    one: tuple[int, str],
    other: tuple[int, str],
    value: Callable[[Run | None], float | None],
) -> Estimate | None:
    """The difference of two ways (steps, tune) of the same seed, over seeds."""

    def difference(seed: int) -> float | None:
        first, second = stats.find(runs, seed, *one), stats.find(runs, seed, *other)
        return _less(value(first), value(second))

    return stats.over_seeds(runs, difference)


def _change(
    runs: Sequence[Run], steps: int, value: Callable[[Run | None], float | None], sign: int = 1
) -> Estimate | None:
    """After text-only LoRA less before; sign -1: before less after."""
    ways = [(steps, METHOD), (steps, "none")][::sign]
    return between(runs, ways[0], ways[1], value)
