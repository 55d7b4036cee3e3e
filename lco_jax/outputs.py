"""What a finished run leaves: adapter, merged model, loss curve, results.json."""

import json
import shutil
from typing import Any

import jax
from jax.experimental import multihost_utils

from lco_jax.checkpoint.card import adapter_card
from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.peft import has_adapters, write_peft
from lco_jax.checkpoint.usage import usage_beside
from lco_jax.core.console import say_all
from lco_jax.core.files import on_bucket, write_json
from lco_jax.evaluation.plots import plot_loss, subject_of
from lco_jax.job import Job
from lco_jax.loop import Loop
from lco_jax.training import tuning
from lco_jax.training.card import about_run
from lco_jax.training.finished import report
from lco_jax.training.metrics import read_metrics

CURVE = ("loss", "learning_rate")  # what the curve shows of a line of metrics


def finish(loop: Loop, scores: dict[str, Any]) -> dict[str, Any]:
    """Let one process write the outputs and list them; returns the content of results.json.

    scores: further content of results.json. The other processes wait, because one that leaves early
    ends the job for all; they return the number of steps alone.
    """
    results = {"steps": loop.job.total_steps}
    if jax.process_index() == 0:
        results = _write(loop.job, _tuned_on_host(loop), scores)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")
    if on_bucket(loop.job.home):
        shutil.rmtree(loop.job.workdir)
    return results


def _tuned_on_host(loop: Loop) -> dict[str, Any]:
    """The trained parameters, for this process alone.

    If other processes hold parts of them, they are read from the last checkpoint: no device and no
    other host has to hold them all.
    """
    if jax.process_count() == 1:
        return jax.device_get(loop.state["tuned"])
    found = loop.store.read(loop.job.total_steps, {"tuned": loop.job.training.tuned})
    return found["tuned"]


def _subject(job: Job) -> str:
    config = job.config
    sources = ", ".join(config.data.sources)
    counted = f"{job.total_steps:,} steps of {config.train.batch_size}"
    return subject_of(config.model.path, sources, counted)


def _write(job: Job, tuned: dict[str, Any], scores: dict[str, Any]) -> dict[str, Any]:
    lines = read_metrics(job.workdir / "metrics.jsonl")
    lines = [line for line in lines if all(isinstance(line.get(key), float) for key in CURVE)]
    losses = [line["loss"] for line in lines]
    if lines:  # the file may have been lost, and the training not
        steps = [line["step"] for line in lines]
        rates = [line["learning_rate"] for line in lines]
        what = "nats a token" if job.layout.generative else "training loss"
        plot_loss(job.workdir / "loss.png", _subject(job), steps, losses, rates, what)
    results = _results(job, losses, scores)
    _export(job, tuned, results)
    write_json(job.workdir / "results.json", results)  # the last: it says that all is there
    job.upload()
    say_all(report(results, job.workdir, job.home), results)
    return results


def _results(job: Job, losses: list[float], scores: dict[str, Any]) -> dict[str, Any]:
    """The content of results.json. losses: of the steps."""
    held_out = {**job.held_out, **{name: one.scores for name, one in job.pairs.items()}}
    return {
        "objective": job.layout.objective,
        "steps": job.total_steps,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
        "trained_parameters": tuning.count(job.training.tuned),
        "records": {name: len(source) for name, source in job.sources.items()},
        "held_out": {name: len(one) for name, one in held_out.items()},
        **scores,
    }


def _export(job: Job, tuned: dict[str, Any], results: dict[str, Any]) -> None:
    """Write the trained parameters as files for others."""
    config, lora, base = job.config, job.training.lora, job.config.model.path
    run = json.loads(config.to_json()) | {"total_steps": job.total_steps}
    about = about_run(run, results, job.total_steps)
    usage = job.usage
    if has_adapters(tuned.get("decoder", {})):
        card = adapter_card(job.checkpoint, base, about, lora, usage)
        beside = usage_beside(usage, job.checkpoint)
        write_peft(job.workdir / "adapter", tuned["decoder"], lora, base, card, beside)
    if config.export.merged:
        export_merged(
            base,
            job.workdir / "merged",
            tuned,
            lora,
            config.export.dtype,
            about=about,
            checkpoint=job.checkpoint,
            usage=usage,
        )
