"""Generative training: what a checkpoint says about text, images, audio and video.

    python -m lco_jax.pretrain --config=pretrain [--output=runs/pretrain] [--config.KEY=VALUE …]

It comes before contrastive training (the paper's continual generative pretraining). A record's
anchor is the prompt, followed by a question if it is media alone. Its positive is the answer, whose
tokens the model learns to predict, up to the one that ends its turn. Sources, mixtures, sharding,
checkpoints and resuming are those of `lco_jax.train`, which starts from this result with
--config.model.path=OUTPUT/merged. The folder holds the same files. Its results.json has the
held-out loss before and after, in nats a token, and the trained model's answers to the first
held-out prompts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from lco_jax import loop
from lco_jax.core.errors import PREEMPTED, LcoError, run_main
from lco_jax.core.files import AnyPath
from lco_jax.data.records import answer_of, as_input
from lco_jax.generator import OmniGenerator
from lco_jax.job import Job, open_job, say
from lco_jax.models.model import Model
from lco_jax.outputs import finish
from lco_jax.training import cli
from lco_jax.training.folder import held
from lco_jax.training.objective import LossConfig
from lco_jax.training.run import check_config
from lco_jax.training.step import Step, make_pretrain_step
from lco_jax.training.watch import peers

ANSWERED = 4  # held-out prompts


def pretrain(config: ConfigDict, output: AnyPath) -> dict[str, Any]:
    """Run or resume in the folder `output`; returns the content of its results.json.

    Returns {} if SIGTERM ended the run early (after saving it). Raises if another trainer works in
    the folder.
    """
    check_config(config)
    if added := LossConfig.of(config).added:
        raise LcoError(f"config.loss.{added[0]} goes with lco_jax.train; this loss is generative")
    with held(output) as home:
        return _pretrain(config, home)


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
        return finish(started, {}, {})
    for answer in answers:
        say(f"wanted {answer['wanted']!r:.60}\n  said {answer['said']!r:.60}")
    return finish(started, {"before": before, "after": after, "said": answers}, {})


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
    losses, counts = generator.token_losses(prompts, wanted, max_length=max_length)
    loss = float(losses.sum() / counts.sum())
    say(f"held-out loss ({len(wanted)} answers): {loss:.4f} nats a token")
    texts = generator.generate(prompts[:answered]) if answered else []
    generator.params = {}
    answers = [
        {"where": record.where, "wanted": record.positive, "said": text}
        for record, text in zip(records, texts, strict=False)
    ]
    return {"loss": loss}, answers


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    config, output = cli.start(__doc__)
    with peers():
        return 0 if pretrain(config, output) else PREEMPTED


if __name__ == "__main__":
    run_main(main)
