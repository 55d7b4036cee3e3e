"""The main job: contrastive training of a multimodal LLM's decoder, on text or on any modality.

    python -m lco_jax.train --config=configs/base.py [--workdir=runs/base] [--config.KEY=VALUE …]

Any key of the config can be set on the command line, e.g. --config.optimizer.learning_rate=1e-3 or
--config.data.sources.bundled.path=my.jsonl. A workdir given again resumes the run in it. What it leaves there:

    adapter/  merged/          the PEFT adapter (of LoRA) and the merged Hugging Face model
    metrics.jsonl              one line a step
    loss.png  similarity.png   the loss curve; held-out cosines before and after
    results.json               held-out retrieval before and after
    checkpoints/  config.json  what resuming needs
"""

from typing import Any

import jax
from ml_collections import ConfigDict

from lco_jax import job as jobs
from lco_jax.core.buckets import Place
from lco_jax.core.errors import PREEMPTED, LcoError, run_main
from lco_jax.data.records import as_input
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.plots import plot_similarity
from lco_jax.evaluation.retrieval import Retrieval, retrieval
from lco_jax.job import Job, Run, say
from lco_jax.models.model import Model
from lco_jax.training import cli
from lco_jax.training.step import Step, make_train_step
from lco_jax.training.watch import peers


def train(config: ConfigDict, workdir: Place) -> dict[str, Any]:
    """Run or resume; returns results.json's content, or {} when a SIGTERM ended the run early (after saving it)."""
    if config.tune.towers != "none":
        raise LcoError("config.tune.towers goes with lco_jax.pretrain; contrastive training leaves towers as they are")
    job = jobs.open_job(config, workdir)
    before = _evaluate(job, job.params)
    options = {key: config.train[key] for key in ("ignore_duplicates", "candidates", "two_way")}

    def step_of(model: Model) -> Step:
        training, temperature = job.training, config.train.temperature
        given = training.tx, training.lora, temperature, config.seed, job.mesh, training.shardings
        return make_train_step(model, *given, **options)

    run = jobs.begin(job, step_of)
    if not jobs.loop(run, run.train_step):
        return {}
    return _finish(run, before)


def _evaluate(job: Job, params: dict[str, Any]) -> dict[str, Retrieval]:
    """Held-out retrieval by file, if there are any."""
    embedder = OmniEmbedder(job.model, params, job.processor, job.mesh)
    encode = lambda sides: embedder.encode(  # noqa: E731
        list(map(as_input, sides)), job.config.eval.batch_size, max_length=job.config.data.max_length
    )
    found = {}
    for name, records in job.held_out.items():
        found[name] = one = retrieval(encode, records)
        say(f"held out, {name}: {len(records)} anchors, recall@1 {one.recall_at_1:.3f}, MRR {one.mrr:.3f}")
    return found


def _finish(run: Run, before: dict[str, Retrieval]) -> dict[str, Any]:
    """Evaluate again, show the difference, and write everything."""
    after = _evaluate(run.job, run.job.tuned_params(run.state))
    if not after:
        return jobs.finish(run, {}, {})
    picture = run.job.workdir / "similarity.png"
    if jax.process_index() == 0:
        plot_similarity(picture, {name: (before[name].similarity, after[name].similarity) for name in after})
    say(f"\n{'held out':32}{'before':>10}{'after':>10}")
    for name, b, a in ((name, before[name], after[name]) for name in after):
        say(f"{f'{name}, recall@1 of {a.candidates}':32}{b.recall_at_1:10.3f}{a.recall_at_1:10.3f}")
        say(f"{f'{name}, MRR':32}{b.mrr:10.3f}{a.mrr:10.3f}")
    numbers = {
        when: {name: {"recall_at_1": x.recall_at_1, "mrr": x.mrr} for name, x in found.items()}
        for when, found in (("before", before), ("after", after))
    }
    return jobs.finish(run, numbers, {"similarities": picture})


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    arguments = cli.start(__doc__)
    with peers():
        return 0 if train(*arguments) else PREEMPTED


if __name__ == "__main__":
    run_main(main)
