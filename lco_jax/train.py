"""The main job: contrastive training of a multimodal LLM's decoder, on text or on any modality.

    python -m lco_jax.train --config=base [--output=runs/base] [--config.KEY=VALUE …]

Any key of the config can be set on the command line, e.g. --config.optimizer.learning_rate=1e-3 or
--config.data.sources.bundled.path=my.jsonl. A folder that is given again resumes its run. It holds

    adapter/  merged/          the PEFT adapter (of LoRA) and the merged Hugging Face model
    metrics.jsonl              one line a step
    loss.png  similarity.png   the loss curve; held-out cosines before and after
    results.json               held-out retrieval before and after
    checkpoints/  config.json  what resuming needs
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lco_jax import loop
from lco_jax.core.errors import PREEMPTED, LcoError, run_main
from lco_jax.core.files import AnyPath
from lco_jax.data.records import Content, as_input
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.plots import plot_similarity
from lco_jax.evaluation.retrieval import Retrieval, retrieval
from lco_jax.evaluation.sts import agreement
from lco_jax.job import Job, open_job, say
from lco_jax.models.model import Model
from lco_jax.outputs import finish
from lco_jax.training import cli
from lco_jax.training.folder import held
from lco_jax.training.run import check_config
from lco_jax.training.step import Step, make_train_step
from lco_jax.training.watch import peers


class Scores(NamedTuple):
    """By file: retrieval of held-out records; Spearman's correlation of scored pairs."""

    retrieval: dict[str, Retrieval]
    spearman: dict[str, float]


def train(config: ConfigDict, output: AnyPath) -> dict[str, Any]:
    """Run or resume in the folder `output`; returns the content of its results.json.

    Returns {} if SIGTERM ended the run early (after saving it). Raises if another trainer works in
    the folder.
    """
    if config.tune.towers != "none":
        raise LcoError(
            "config.tune.towers goes with lco_jax.pretrain; contrastive training freezes towers"
        )
    check_config(config)
    with held(output) as home:
        return _train(config, home)


def _train(config: ConfigDict, home: AnyPath) -> dict[str, Any]:
    job = open_job(config, home)
    embedder = OmniEmbedder(job.model, {}, job.processor, job.mesh)  # its programs serve twice
    before = _evaluate(job, embedder, job.untrained_params)
    started = loop.begin(job, partial(_make_step, job))
    if not loop.run(started):
        return {}
    after = _evaluate(job, embedder, partial(job.tuned_params, started.state["tuned"]))
    if not any(after):
        return finish(started, {}, {})
    pictures = _plot(job, before.retrieval, after.retrieval)
    _print_scores(before, after)
    scores = {"before": _as_json(before), "after": _as_json(after)}
    return finish(started, scores, pictures)


def _plot(job: Job, before: dict[str, Retrieval], after: dict[str, Retrieval]) -> dict[str, Path]:
    """Draw the held-out cosines, if there are any; title -> file."""
    if not after:
        return {}
    picture = job.workdir / "similarity.png"
    if jax.process_index() == 0:
        pairs = {name: (before[name].similarity, after[name].similarity) for name in after}
        plot_similarity(picture, pairs)
    return {"similarities": picture}


def _make_step(job: Job, model: Model) -> Step:
    """The training step: forward pass, InfoNCE, gradients, AdamW."""
    config, training = job.config, job.training
    return make_train_step(
        model,
        training.tx,
        training.lora,
        training.objective,
        config.seed,
        job.mesh,
        training.shardings,
    )


def _evaluate(
    job: Job, embedder: OmniEmbedder, make_params: Callable[[], dict[str, Any]]
) -> Scores:
    """Scores of what is held out. The embedder has parameters only meanwhile: memory is short."""
    scores = Scores({}, {})
    if not job.held_out and not job.pairs:
        return scores
    config = job.config

    def encode(inputs: list[Any]) -> np.ndarray:
        return embedder.encode(inputs, config.eval.batch_size, max_length=config.data.max_length)

    def encode_contents(contents: Sequence[Content]) -> np.ndarray:
        return encode([as_input(content) for content in contents])

    embedder.params = make_params()
    for name, records in job.held_out.items():
        found = retrieval(encode_contents, records)
        scores.retrieval[name] = found
        numbers = f"recall@1 {found.recall_at_1:.3f}, MRR {found.mrr:.3f}"
        say(f"held out, {name}: {len(records)} anchors, {numbers}")
    for name, pairs in job.pairs.items():
        spearman = agreement(encode, pairs).spearman
        scores.spearman[name] = spearman
        say(f"held out, {name}: {len(pairs.scores)} pairs, Spearman {spearman:.3f}")
    embedder.params = {}
    return scores


def _print_scores(before: Scores, after: Scores) -> None:
    say(f"\n{'held out':32}{'before':>10}{'after':>10}")
    for name, score in after.retrieval.items():
        first = before.retrieval[name]
        recall = f"{name}, recall@1 of {score.candidates}"
        say(f"{recall:32}{first.recall_at_1:10.3f}{score.recall_at_1:10.3f}")
        say(f"{f'{name}, MRR':32}{first.mrr:10.3f}{score.mrr:10.3f}")
    for name, spearman in after.spearman.items():
        say(f"{f'{name}, Spearman':32}{before.spearman[name]:10.3f}{spearman:10.3f}")


def _as_json(scores: Scores) -> dict[str, dict[str, float]]:
    numbers = {
        name: {"recall_at_1": x.recall_at_1, "mrr": x.mrr} for name, x in scores.retrieval.items()
    }
    return numbers | {name: {"spearman": value} for name, value in scores.spearman.items()}


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    config, output = cli.start(__doc__)
    with peers():
        return 0 if train(config, output) else PREEMPTED


if __name__ == "__main__":
    run_main(main)
