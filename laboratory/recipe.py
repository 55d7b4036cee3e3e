"""The published recipe in PyTorch and peft, on the triplets of `lco_jax.train`.

    python -m laboratory.recipe --config=smollm2 --output=runs/recipe

It reads the configuration that `lco_jax.train` reads, and does what that does with the means of
torch: transformers' model of the same checkpoint, peft's adapter, left padding, every text whole,
one-way InfoNCE over positives and hard negatives, AdamW under the same schedule. It writes the
adapter in peft's files. Order of the data and first values are torch's own.
"""

import time
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch.nn import functional
from tqdm import tqdm

from benchmarks.peer import LINEARS, embed, import_torchvision

import_torchvision()  # before transformers looks for it

from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import Qwen2_5OmniThinkerForConditionalGeneration as Thinker  # noqa: E402

from lco_jax.checkpoint.hf import open_checkpoint  # noqa: E402
from lco_jax.core.errors import run_main  # noqa: E402
from lco_jax.core.files import write_json  # noqa: E402
from lco_jax.data.processor import Processor  # noqa: E402
from lco_jax.data.prompts import as_messages  # noqa: E402
from lco_jax.data.record_stream import open_sources  # noqa: E402
from lco_jax.training import cli  # noqa: E402
from lco_jax.training.optimizer import OptimizerConfig, learning_rate  # noqa: E402

MICRO = 16  # texts in one pass


def main() -> int:
    """Train, and write the adapter."""
    config, output = cli.start(__doc__)
    torch.manual_seed(config.seed)
    checkpoint = open_checkpoint(config.model.path)
    triplets = read_triplets(config, Processor(checkpoint.folder))
    model = load(config, checkpoint.folder)
    began = time.perf_counter()
    losses = fit(model, triplets, config)
    model.save_pretrained(str(output / "adapter"))
    seconds = time.perf_counter() - began
    write_json(Path(output) / "results.json", {"losses": losses, "seconds": seconds})
    return 0


def load(config: ConfigDict, folder: Path) -> Any:
    """The model with a fresh adapter."""
    model = Thinker.from_pretrained(folder, dtype=torch.float32, attn_implementation="sdpa")
    model.requires_grad_(False)
    model.config.use_cache = model.config.text_config.use_cache = False
    settings = LoraConfig(
        r=config.lora.rank,
        lora_alpha=config.lora.alpha,
        lora_dropout=config.lora.dropout,
        target_modules=LINEARS,
        bias="none",
    )
    return get_peft_model(model, settings).train()


def read_triplets(config: ConfigDict, processor: Processor) -> list[list[list[int]]]:
    """The token ids of each record's anchor, positive and negative."""
    (source,) = open_sources(config.data).values()
    tokenizer = processor.tokenizer

    def ids(text: str) -> list[int]:
        cut = tokenizer.cut(text, config.data.max_length)
        return tokenizer([as_messages(cut, "")])[0].tolist()

    records = map(source.__getitem__, range(len(source)))
    return [
        [ids(str(text)) for text in (record.anchor, record.positive, record.negatives[0])]
        for record in records
    ]


def fit(model: Any, triplets: list[list[list[int]]], config: ConfigDict) -> list[float]:
    """Train; the loss of every step."""
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    settings = config.optimizer
    optimizer = torch.optim.AdamW(
        trainable,
        settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.eps,
        weight_decay=settings.weight_decay,
    )
    steps = config.train.steps
    rate = learning_rate(OptimizerConfig(**settings), steps)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: float(rate(step)) / settings.learning_rate
    )
    losses = []
    order: list[int] = []
    for _ in tqdm(range(steps), desc="recipe", unit="step"):
        while len(order) < config.train.batch_size:
            order += torch.randperm(len(triplets)).tolist()
        batch = [triplets[i] for i in order[: config.train.batch_size]]
        order = order[config.train.batch_size :]
        optimizer.zero_grad(set_to_none=True)
        losses.append(gradient(model, batch, config.train.temperature))
        torch.nn.utils.clip_grad_norm_(trainable, settings.clip_norm)
        optimizer.step()
        schedule.step()
    return losses


def gradient(model: Any, batch: list[list[list[int]]], temperature: float) -> float:
    """The loss of a batch, with its gradient in place. Small passes have little padding."""
    texts = [triplet[side] for side in range(3) for triplet in batch]
    passes = [texts[i : i + MICRO] for i in range(0, len(texts), MICRO)]
    vectors = torch.cat([embed(model, some) for some in passes])
    size = len(batch)
    logits = vectors[:size] @ vectors[size:].T / temperature
    loss = functional.cross_entropy(logits, torch.arange(size))
    loss.backward()
    return loss.item()


if __name__ == "__main__":
    run_main(main)
