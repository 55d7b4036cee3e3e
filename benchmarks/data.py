"""Token ids of triplets, the same for both sides: SNLI where it is given, else random ids.

`snli_lengths.json` has the token counts of 412 SNLI triplets (anchor, positive, negative; Qwen's
tokenizer, without template), and the ids of the template around them.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.files import read_json

LENGTHS = Path(__file__).with_name("snli_lengths.json")
SIDES = ("anchor", "positive", "negative")
PROMPT = "\nSummarize the above text in one word:"


def write_triplets(path: Path, count: int, vocab: int, data_dir: str, tokenizer: str) -> str:
    """Write `count` triplets of token ids below `vocab`, one line of JSON each; returns their
    origin."""
    texts = _snli(data_dir, tokenizer) if data_dir else as_long_as_snli()
    triplets = [texts[i % len(texts)] for i in range(count)]
    with open(path, "w", encoding="utf-8") as file:
        for triplet in triplets:
            ids = {
                side: [int(x) % vocab for x in one]
                for side, one in zip(SIDES, triplet, strict=True)
            }
            file.write(json.dumps(ids) + "\n")
    return f"SNLI, {len(texts)} triplets" if data_dir else "random ids, as long as SNLI's"


def read_triplets(path: Path) -> list[list[list[int]]]:
    """[triplet][side] -> token ids."""
    return [
        [json.loads(line)[side] for side in SIDES]
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def as_long_as_snli() -> list[list[list[int]]]:
    table, rng = read_json(LENGTHS), np.random.default_rng(0)
    prefix, suffix = table["prefix"], table["suffix"]

    def draw(n: int) -> list[int]:
        return [*prefix, *rng.integers(100, 100_000, n).tolist(), *suffix]

    return [[draw(n) for n in lengths] for lengths in table["lengths"]]


def _snli(data_dir: str, tokenizer: str) -> list[list[list[int]]]:
    from transformers import PreTrainedTokenizerFast

    from lco_jax.data.sources import open_source

    if not tokenizer:
        raise LcoError("--data-dir needs --tokenizer, a folder with Qwen's tokenizer.json")
    spec: dict[str, Any] = {"kind": "tfds", "name": "snli", "split": "train", "data_dir": data_dir}
    source = open_source("snli", spec, "error")
    tokenize = PreTrainedTokenizerFast(tokenizer_file=str(Path(tokenizer) / "tokenizer.json"))
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
    after = f"{PROMPT}<|im_end|>\n<|im_start|>assistant\n"
    records = (source[i] for i in range(len(source)))
    return [
        [tokenize(before + text + after).input_ids for text in record.sides] for record in records
    ]
