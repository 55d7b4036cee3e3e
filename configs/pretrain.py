"""Generative training: what differs from tiny.

    python -m lco_jax.pretrain --config=pretrain
    python -m lco_jax.pretrain --config=pretrain:ocr \
        --config.data.sources.pages.path=pages.jsonl \
        --config.data.sources.captions.path=captions.jsonl

The first runs anywhere: `builtin:tiny` learns to answer a sentence with a paraphrase. The second is
the paper's way to better embeddings of pages (SeaDoc): Qwen2.5-VL reads text off pages at high
resolution. General captions are mixed in so that it forgets nothing. An anchor is a page, with or
without a question; its positive is the text on the page. --data=pages.jsonl,captions.jsonl is
shorter, but mixes them by their sizes. Published numbers of this step are not at hand. It was tried
on `builtin:tiny` and tiny random checkpoints, and never on the real weights.
"""

from ml_collections import ConfigDict, config_dict

from lco_jax.configs import tiny


def get_config(kind: str = "") -> ConfigDict:
    """kind: "" or "ocr"."""
    config = tiny.get_config()
    config.name = "pretrain"
    config.train.epochs = 4.0
    config.optimizer.learning_rate = 2e-3
    if kind == "ocr":
        config.name = "pretrain_ocr"
        config.model.path = "Qwen/Qwen2.5-VL-3B-Instruct"
        config.model.dtype = "bfloat16"
        config.model.remat = "auto"
        config.tune.towers = "projectors"
        config.lora.rank, config.lora.alpha = 64, 128.0
        config.data.sources = {
            "pages": {"kind": "jsonl", "path": config_dict.placeholder(str), "weight": 0.7},
            "captions": {"kind": "jsonl", "path": config_dict.placeholder(str), "weight": 0.3},
        }
        config.data.media.image_max_side = 1400  # letters must stay legible
        config.data.max_length = 1024
        config.train.batch_size = 128
        config.train.epochs = 1.0
        config.train.chunk_tokens = -1
        config.optimizer.learning_rate = 1e-4
        config.optimizer.warmup_steps = 100
        config.checkpoint.every = 100
        config.eval.path = ""
        config.export.dtype = "bfloat16"
    elif kind:
        raise ValueError(f"there is no kind {kind!r}; there are: ocr")
    return config
