"""Generative training, from the opened job to its answers: what `lco_jax.pretrain` runs."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from lco_jax import loop
from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath
from lco_jax.data.records import Record, answer_of, as_input
from lco_jax.generator import OmniGenerator
from lco_jax.job import Job, held_out_progress, open_job, say
from lco_jax.models.model import Model
from lco_jax.outputs import finish
from lco_jax.results import Results
from lco_jax.training.folder import held
from lco_jax.training.instructions import refuse_embedding_keys
from lco_jax.training.objective import LossConfig
from lco_jax.training.run import check_config
from lco_jax.training.step import Step, make_pretrain_step

ANSWERED = 4  # held-out prompts


def pretrain(config: ConfigDict, output: str | os.PathLike[str]) -> Results:
    """As `lco_jax.pretrain.pretrain`, with the configuration that its arguments make."""
    check_config(config)
    if added := LossConfig.of(config).added:
        raise LcoError(f"config.loss.{added[0]} goes with lco_jax.train; this loss is generative")
    refuse_embedding_keys(config)
    with held(output) as home:
        return Results(_pretrain(config, home), home, config.model.path)


def _pretrain(config: ConfigDict, home: AnyPath) -> dict[str, Any]:
    job = open_job(config, home, generative=True)
    generator = OmniGenerator(job.model, {}, job.processor, job.mesh)  # its programs serve twice
    before, _ = _evaluate(job, generator, job.untrained_params, answered=0)
    started = loop.begin(job, partial(_make_step, job))
    if not loop.run(started):
        return {}
    trained = partial(job.tuned_params, started.state["tuned"])
    after, answers = _evaluate(job, generator, trained, answered=ANSWERED)
    if not after:
        return finish(started, {})
    for answer in answers:
        say(f"wanted {answer['wanted']!r:.60}\n  said {answer['said']!r:.60}")
    return finish(started, {"before": before, "after": after, "said": answers})


def _make_step(job: Job, model: Model) -> Step:
    """The training step: forward pass, the answers' log-likelihood, gradients, AdamW."""
    training = job.training
    return make_pretrain_step(
        model,
        training.tx,
        training.lora,
        job.config.seed,
        job.mesh,
        training.shardings,
        trains_towers=training.tune.trains_towers,
    )


def _evaluate(
    job: Job,
    generator: OmniGenerator,
    make_params: Callable[[], dict[str, Any]],
    answered: int,
) -> tuple[dict[str, float], list[dict[str, Any]]]:
    """The loss of the held-out answers, in nats a token, and answers to the first prompts.

    answered: the number of prompts that the model answers. The generator has parameters only
    meanwhile, to save memory.
    """
    records = [record for file in job.held_out.values() for record in file]
    if not records:
        return {}, []
    generator.params = make_params()
    prompts = [as_input(record.anchor) for record in records]
    wanted = [answer_of(record) for record in records]
    max_length = job.config.data.max_length
    with held_out_progress("after" if answered else "before", len(prompts)) as progress:
        losses, counts = generator.token_losses(
            prompts, wanted, max_length=max_length, progress=progress
        )
    loss = float(losses.sum() / counts.sum())
    if not answered:  # a table says it again, hours later
        of = f"held out, before training: {loss:.4f} nats a token of {len(wanted):,} answers"
        say(of, {"loss": loss})
    texts = generator.generate(prompts[:answered]) if answered else []
    generator.params = {}
    return {"loss": loss}, _answers(records, texts)


def _answers(records: Sequence[Record], texts: Sequence[str]) -> list[dict[str, Any]]:
    """What the first records wanted, and what the model said."""
    return [
        {"where": record.where, "wanted": record.positive, "said": text}
        for record, text in zip(records, texts, strict=False)
    ]
