"""What a round of mining found: counts, scores, a table and a picture."""

from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.pictures import new_figure, save
from lco_jax.mining.rules import MARGIN, RATIO, RULES, Choice, Rules

BINS = 200  # of a histogram of scores from -1 to 1
POSITIVES, NEGATIVES = "positives", "negatives"
DROPPED = {RATIO: "dropped by max-ratio", MARGIN: "dropped by margin"}
KINDS = (POSITIVES, NEGATIVES, *DROPPED.values())


class Report:
    """Counts and scores of the records so far. state: that of another, as `state` has it."""

    def __init__(self, state: dict[str, Any] | None = None):
        empty = {
            "records": 0,
            "left out": 0,  # an anchor or a positive that could not be read
            "looked at": 0,  # candidates
            **{f"dropped by {rule}": 0 for rule in RULES},
            "negatives": 0,
            "with fewer": 0,  # records
            "with none": 0,
            "positive is not nearest": 0,
        }
        state = state or {"counts": empty, "scores": {kind: _no_scores() for kind in KINDS}}
        self.counts: dict[str, int] = state["counts"]
        self.scores: dict[str, dict[str, Any]] = state["scores"]

    @property
    def state(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return {"counts": self.counts, "scores": self.scores}

    def leave_out(self) -> None:
        """Count a record that is not written."""
        self.counts["records"] += 1
        self.counts["left out"] += 1

    def add(
        self,
        scores: np.ndarray,
        positive: float,
        is_nearest: bool,
        choice: Choice,
        rules: Rules,
    ) -> None:
        """Count a record: its candidates' scores, its positive's, and what `rules.choose` says.

        is_nearest: whether the positive scores above all that were looked at; a record's own
        negatives are among these, and not among `scores` where they are kept.
        """
        chosen, dropped = choice
        counts = self.counts
        counts["records"] += 1
        counts["looked at"] += int(np.isfinite(scores).sum())
        for rule in RULES:
            counts[f"dropped by {rule}"] += int(dropped[rule].sum())
        counts["negatives"] += len(chosen)
        counts["with fewer"] += len(chosen) < rules.negatives
        counts["with none"] += not len(chosen)
        counts["positive is not nearest"] += not is_nearest
        self._add_scores(POSITIVES, np.array([positive]))
        self._add_scores(NEGATIVES, scores[chosen])
        for rule, kind in DROPPED.items():
            self._add_scores(kind, scores[dropped[rule]])

    def _add_scores(self, kind: str, scores: np.ndarray) -> None:
        if not len(scores):
            return
        found, scores = self.scores[kind], scores.astype(np.float64)
        found["count"] += len(scores)
        found["sum"] += float(scores.sum())
        found["squares"] += float((scores**2).sum())
        found["least"] = min(found["least"], float(scores.min()))
        found["most"] = max(found["most"], float(scores.max()))
        bins = np.clip(((scores + 1) / 2 * BINS).astype(int), 0, BINS - 1)
        for one in bins.tolist():
            found["bins"][one] += 1

    def as_json(self) -> dict[str, Any]:
        """Counts, and the mean, deviation and limits of each kind of score."""
        return {**self.counts, "scores": {kind: _summary(self.scores[kind]) for kind in KINDS}}

    def table(self, candidates: int, rules: Rules) -> list[str]:
        """The lines that a person reads. candidates: how many there were."""
        counts = self.counts
        rows = [
            ("records", counts["records"]),
            ("candidates, each content once", candidates),
            (f"looked at, the nearest {rules.range:,} of an anchor", counts["looked at"]),
            *((f"  dropped by --{rule}", counts[f"dropped by {rule}"]) for rule in RULES),
            ("negatives written", counts["negatives"]),
            (f"records with fewer than {rules.negatives:,}", counts["with fewer"]),
            ("records with none", counts["with none"]),
            ("records left out, not readable", counts["left out"]),
            ("records whose positive is not the nearest", counts["positive is not nearest"]),
        ]
        lines = [f"{name:44}{value:>14,}" for name, value in rows]
        for kind in KINDS:
            if self.scores[kind]["count"]:
                found = _summary(self.scores[kind])
                limits = f"{found['least']:.3f} to {found['most']:.3f}"
                lines.append(f"scores of {kind:34}{found['mean']:>14.3f}  ({limits})")
        return lines

    def draw(self, path: Path, subject: str) -> None:
        """Write a histogram of each kind of score."""
        figure = new_figure(subject, (7, 4))
        axes = figure.subplots()
        edges = np.linspace(-1, 1, BINS + 1)
        lowest = 1.0
        for kind in KINDS:
            found = self.scores[kind]
            if found["count"]:
                shares = np.array(found["bins"]) / found["count"]
                axes.stairs(shares, edges, label=f"{kind}, {found['count']:,}", linewidth=1.5)
                lowest = min(lowest, found["least"])
        axes.set(xlabel="score: cosine with the anchor", ylabel="share of each")
        axes.set_xlim(max(-1.0, lowest - 0.05), 1.0)
        figure.legend(loc="outside lower right", ncols=2, frameon=False)
        save(figure, path)


def _no_scores() -> dict[str, Any]:
    limits = {"least": 1.0, "most": -1.0}
    return {"count": 0, "sum": 0.0, "squares": 0.0, **limits, "bins": [0] * BINS}


def _summary(found: dict[str, Any]) -> dict[str, Any]:
    """count, mean, deviation, least, most; of none the count alone."""
    count = found["count"]
    if not count:
        return {"count": 0}
    mean = found["sum"] / count
    deviation = max(found["squares"] / count - mean**2, 0.0) ** 0.5
    limits = {"least": found["least"], "most": found["most"]}
    return {"count": count, "mean": mean, "deviation": deviation, **limits}
