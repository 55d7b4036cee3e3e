"""Generative training: what a checkpoint says about text, images, audio and video, before contrastive training.

    python -m lco_jax.pretrain --config=configs/pretrain.py [--workdir=runs/pretrain] [--config.KEY=VALUE …]

A record's anchor is the prompt, with a question after it where it is media alone; its positive is the answer, whose
tokens, the one that ends its turn among them, the model learns to predict (the paper's continual generative
pretraining). Sources, mixtures, sharding, checkpoints and resuming are those of `lco_jax.train`, which starts from what
this leaves with --config.model.path=WORKDIR/merged. A workdir holds the same files, and in results.json the held-out
loss before and after, in nats a token, and what the model then says to the first held-out prompts.
"""

import sys
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from lco_jax import job as jobs
from lco_jax.core.errors import run_main
from lco_jax.core.files import write_json
from lco_jax.data.prompts import asked
from lco_jax.data.records import as_input
from lco_jax.generator import OmniGenerator
from lco_jax.job import Job, Run, say
from lco_jax.training import cli
from lco_jax.training.step import make_pretrain_step

SAID = 4  # held-out prompts that are answered


def pretrain(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Run or resume; returns results.json's content, or {} when a SIGTERM ended the run early (after saving it)."""
    job = jobs.open_job(config, workdir, generative=True)
    before = _loss(_generator(job, job.params), job)
    run = jobs.begin(job)
    step = make_pretrain_step(
        job.model,
        job.training.tx,
        job.training.lora,
        config.seed,
        job.mesh,
        job.training.shardings,
        tunes_towers=config.tune.towers != "none",
    )
    if not jobs.loop(run, step):
        return {}
    return _finish(run, before)


def _generator(job: Job, params: dict[str, Any]) -> OmniGenerator:
    return OmniGenerator(job.model, params, job.processor, job.mesh)


def _loss(generator: OmniGenerator, job: Job) -> float | None:
    """Of the held-out answers, in nats a token; None without held-out records."""
    if not job.held_out:
        return None
    prompts, answers = [as_input(one.anchor) for one in job.held_out], [one.positive for one in job.held_out]
    losses, counts = generator.token_losses(prompts, answers, prompt=asked, max_length=job.config.data.max_length)
    loss = float(losses.sum() / counts.sum())
    say(f"held-out loss ({len(answers)} answers): {loss:.4f} nats a token")
    return loss


def _finish(run: Run, before: float | None) -> dict[str, Any]:
    """Evaluate again, and let one process write everything and tell what there is."""
    job, results = run.job, {}
    generator = _generator(job, job.tuned_params(run.state))
    after = _loss(generator, job)
    shown = job.held_out[:SAID]
    said = generator.generate([as_input(one.anchor) for one in shown], prompt=asked) if shown else []
    results, outputs = jobs.export(run)
    if jax.process_index() == 0:
        if shown:
            results |= {"before": {"loss": before}, "after": {"loss": after}}
            results["said"] = [
                {"where": one.where, "wanted": one.positive, "said": text}
                for one, text in zip(shown, said, strict=True)
            ]
            say(f"\nheld-out loss {before:.4f} before, {after:.4f} after\n")
            for one in results["said"]:
                say(f"wanted {one['wanted']!r:.60}\n  said {one['said']!r:.60}")
        write_json(job.workdir / "results.json", results)
        for label, path in outputs.items():
            say(f"{label:14}{path}")
    jobs.together()
    return results


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    args = cli.parse(sys.argv, __doc__)
    cli.join_processes(args)
    pretrain(args.config, Path(args.workdir or f"runs/{args.config.name}"))
    return 0


if __name__ == "__main__":
    run_main(main)
