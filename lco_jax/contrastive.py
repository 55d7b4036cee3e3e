"""Contrastive training, from the opened job to its scores: what `lco_jax.train` runs."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from ml_collections import ConfigDict

from lco_jax import loop
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath
from lco_jax.data.instructions import Instruction, SideInstructions
from lco_jax.data.records import Content, Record, as_input
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.plots import plot_similarity, subject_of
from lco_jax.evaluation.retrieval import Retrieval, retrieval
from lco_jax.evaluation.sts import agreement
from lco_jax.job import Job, held_out_progress, open_job, say
from lco_jax.models.model import Model
from lco_jax.outputs import finish
from lco_jax.results import Results
from lco_jax.training.folder import held
from lco_jax.training.instructions import instructions_of_held_out
from lco_jax.training.run import check_config
from lco_jax.training.step import Step, make_train_step


class Scores(NamedTuple):
    """By file: retrieval of held-out records; Spearman's correlation of scored pairs."""

    retrieval: dict[str, Retrieval]
    spearman: dict[str, float]


def train(config: ConfigDict, output: str | os.PathLike[str]) -> Results:
    """As `lco_jax.train.train`, with the configuration that its arguments make."""
    if config.tune.towers != "none":
        raise LcoError(
            "config.tune.towers goes with lco_jax.pretrain; contrastive training freezes towers"
        )
    check_config(config)
    with held(output) as home:
        return Results(_train(config, home), home, config.model.path)


def _train(config: ConfigDict, home: AnyPath) -> dict[str, Any]:
    job = open_job(config, home)
    embedder = OmniEmbedder(job.model, {}, job.processor, job.mesh)  # its programs serve twice
    embedder.truncate_dim = job.usage.truncate_dim
    before = _evaluate(job, embedder, job.untrained_params, "before")
    started = loop.begin(job, partial(_make_step, job))
    if not loop.run(started):
        return {}
    trained = partial(job.tuned_params, started.state["tuned"])
    after = _evaluate(job, embedder, trained, "after")
    if not any(after):
        return finish(started, {})
    _plot(job, before.retrieval, after.retrieval)
    scores = {"before": _as_json(before), "after": _as_json(after)}
    return finish(started, scores)


def _plot(job: Job, before: dict[str, Retrieval], after: dict[str, Retrieval]) -> None:
    """Draw the held-out cosines, if there are any."""
    if after and jax.process_index() == 0:
        pairs = {name: (before[name].similarity, after[name].similarity) for name in after}
        subject = subject_of(job.config.model.path, "held-out records")
        plot_similarity(job.workdir / "similarity.png", subject, pairs)


def _make_step(job: Job, model: Model) -> Step:
    """The training step: forward pass, InfoNCE, gradients, AdamW."""
    training = job.training
    return make_train_step(
        model,
        training.tx,
        training.lora,
        training.objective,
        job.config.seed,
        job.mesh,
        training.shardings,
    )


def _evaluate(
    job: Job, embedder: OmniEmbedder, make_params: Callable[[], dict[str, Any]], when: str
) -> Scores:
    """Scores of what is held out. The embedder has parameters only meanwhile: memory is short.

    when: "before" or "after", for the progress bar.
    """
    scores = Scores({}, {})
    if not job.held_out and not job.pairs:
        return scores
    config = job.config

    def encode(inputs: list[Any], prompt: Instruction | None = None) -> np.ndarray:
        progress.total += len(inputs)
        return embedder.encode(
            inputs,
            prompt=prompt,
            batch_size=config.eval.batch_size,
            max_length=config.data.max_length,
            progress=progress,
        )

    embedder.params = make_params()
    with held_out_progress(when) as progress:
        for name, records in job.held_out.items():
            scores.retrieval[name] = _retrieval(
                encode, records, instructions_of_held_out(config, name)
            )
        for name, pairs in job.pairs.items():
            _, document = instructions_of_held_out(config, name)
            scores.spearman[name] = agreement(partial(encode, prompt=document), pairs).spearman
    embedder.params = {}
    if when == "before":  # a table says it again, hours later
        say(f"held out, before training: {_in_brief(scores)}", _as_json(scores))
    return scores


def _retrieval(
    encode: Callable[..., np.ndarray], records: Sequence[Record], instructions: SideInstructions
) -> Retrieval:
    """Retrieval of held-out records, with these instructions.

    encode: inputs and an instruction -> unit vectors.
    """
    query, document = instructions

    def encode_contents(prompt: Instruction | None, contents: Sequence[Content]) -> np.ndarray:
        return encode([as_input(content) for content in contents], prompt)

    encode_query = None if query == document else partial(encode_contents, query)
    return retrieval(partial(encode_contents, document), records, encode_query)


def _in_brief(scores: Scores) -> str:
    """One number a file, on one line."""
    recalls = [f"{name} {found.recall_at_1:.3f}" for name, found in scores.retrieval.items()]
    spearmans = [f"{name} {value:.3f}" for name, value in scores.spearman.items()]
    measured = {"recall@1": recalls, "Spearman": spearmans}
    return "; ".join(f"{what} of {', '.join(found)}" for what, found in measured.items() if found)


def _as_json(scores: Scores) -> dict[str, dict[str, float]]:
    numbers = {
        name: {"recall_at_1": x.recall_at_1, "mrr": x.mrr, "candidates": x.candidates}
        for name, x in scores.retrieval.items()
    }
    return numbers | {name: {"spearman": value} for name, value in scores.spearman.items()}
