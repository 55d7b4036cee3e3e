"""Spearman correlation of a model's cosines with human similarity scores.

    python tools/sts.py --pairs=stsb-en-dev.csv --model=builtin:tiny --adapter=runs/snli/adapter

The file has rows of: sentence, sentence, score.
"""

import argparse
import csv
import json
from pathlib import Path

from scipy.stats import spearmanr

from lco_jax import LcoError, OmniEmbedder
from lco_jax.core.errors import run_main


def main() -> int:
    """Print one line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--adapter")
    args = parser.parse_args()
    with open(args.pairs, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.reader(file) if row]
    if bad := [i for i, row in enumerate(rows, 1) if len(row) != 3]:
        raise LcoError(f"{args.pairs}:{bad[0]}: a row has three columns: sentence, sentence, score")
    embedder = OmniEmbedder.from_pretrained(args.model, args.adapter)
    vectors = embedder.encode([row[0] for row in rows] + [row[1] for row in rows], batch_size=256)
    cosines = (vectors[: len(rows)] * vectors[len(rows) :]).sum(axis=-1)
    spearman = float(spearmanr(cosines, [float(row[2]) for row in rows]).statistic)
    print(
        json.dumps({"pairs": len(rows), "spearman": round(spearman, 4), "model": args.model, "adapter": args.adapter})
    )
    return 0


if __name__ == "__main__":
    run_main(main)
