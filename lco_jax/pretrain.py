"""Generative training: what a checkpoint says about text, images, audio and video, before contrastive training.

    python -m lco_jax.pretrain --config=configs/pretrain.py [--workdir=runs/pretrain] [--config.KEY=VALUE …]

A record's anchor is the prompt, with a question after it where it is media alone; its positive is the answer, whose
tokens, the one that ends its turn among them, the model learns to predict (the paper's continual generative
pretraining). Sources, mixtures, sharding, checkpoints and resuming are those of `lco_jax.train`, which starts from what
this leaves with --config.model.path=WORKDIR/merged. A workdir holds the same files, and in results.json the held-out
loss before and after, in nats a token, and what the model then says to the first held-out prompts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from ml_collections import ConfigDict

from lco_jax import job as jobs
from lco_jax.core.errors import PREEMPTED, run_main
from lco_jax.core.files import AnyPath
from lco_jax.data.records import answer_of, as_input
from lco_jax.generator import OmniGenerator
from lco_jax.job import Job, say
from lco_jax.models.model import Model
from lco_jax.training import cli
from lco_jax.training.step import Step, make_pretrain_step
from lco_jax.training.watch import peers

SAID = 4  # held-out prompts that are answered


def pretrain(config: ConfigDict, workdir: AnyPath) -> dict[str, Any]:
    """Run or resume; returns results.json's content, or {} when a SIGTERM ended the run early (after saving it)."""
    job = jobs.open_job(config, workdir, generative=True)
    generator = OmniGenerator(
        job.model, {}, job.processor, job.mesh
    )  # one: its programs are compiled once
    before = _evaluate(job, generator, job.untrained_params, said=0) if job.held_out else {}

    def step_of(model: Model) -> Step:
        return make_pretrain_step(
            model,
            job.training.tx,
            job.training.lora,
            config.seed,
            job.mesh,
            job.training.shardings,
            tunes_towers=config.tune.towers != "none",
        )

    run = jobs.begin(job, step_of)
    if not jobs.loop(run):
        return {}
    if not job.held_out:
        return jobs.finish(run, {}, {})
    after = _evaluate(job, generator, partial(job.tuned_params, run.state["tuned"]), said=SAID)
    said = after.pop("said")
    for one in said:
        say(f"wanted {one['wanted']!r:.60}\n  said {one['said']!r:.60}")
    return jobs.finish(run, {"before": before, "after": after, "said": said}, {})


def _evaluate(
    job: Job, generator: OmniGenerator, params: Callable[[], dict[str, Any]], said: int
) -> dict[str, Any]:
    """The loss of the held-out answers, in nats a token, and what the model says to the first
    prompts, so many.

    params: makes those that the generator has meanwhile.
    """
    generator.params = params()
    records = [record for some in job.held_out.values() for record in some]
    prompts = [as_input(record.anchor) for record in records]
    answers = [answer_of(record) for record in records]
    max_length = job.config.data.max_length
    losses, counts = generator.token_losses(prompts, answers, max_length=max_length)
    loss = float(losses.sum() / counts.sum())
    say(f"held-out loss ({len(answers)} answers): {loss:.4f} nats a token")
    texts = generator.generate(prompts[:said]) if said else []
    generator.params = {}  # training has the memory
    shown = [
        {"where": record.where, "wanted": record.positive, "said": text}
        for record, text in zip(records[:said], texts, strict=True)
    ]
    return {"loss": loss, **({"said": shown} if said else {})}


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    arguments = cli.start(__doc__)
    with peers():
        return 0 if pretrain(*arguments) else PREEMPTED


if __name__ == "__main__":
    run_main(main)
