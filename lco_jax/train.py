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

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from lco_jax import job as jobs
from lco_jax.core.errors import PREEMPTED, LcoError, run_main
from lco_jax.core.files import AnyPath
from lco_jax.data.records import Content, as_input
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.plots import plot_similarity
from lco_jax.evaluation.retrieval import Retrieval, retrieval
from lco_jax.job import Job, Run, say
from lco_jax.models.model import Model
from lco_jax.training import cli
from lco_jax.training.step import Step, make_train_step
from lco_jax.training.watch import peers


def train(config: ConfigDict, workdir: AnyPath) -> dict[str, Any]:
    """Run or resume; returns results.json's content, or {} when a SIGTERM ended the run early (after saving it)."""
    if config.tune.towers != "none":
        raise LcoError(
            "config.tune.towers goes with lco_jax.pretrain; contrastive training leaves towers as they are"
        )
    job = jobs.open_job(config, workdir)
    embedder = OmniEmbedder(
        job.model, {}, job.processor, job.mesh
    )  # one: its programs are compiled once
    before = _evaluate(job, embedder, job.untrained_params) if job.held_out else {}

    def step_of(model: Model) -> Step:
        return make_train_step(
            model,
            job.training.tx,
            job.training.lora,
            config.train.temperature,
            config.seed,
            job.mesh,
            job.training.shardings,
            ignore_duplicates=config.train.ignore_duplicates,
            candidates=config.train.candidates,
            two_way=config.train.two_way,
        )

    run = jobs.begin(job, step_of)
    if not jobs.loop(run):
        return {}
    if not job.held_out:
        return jobs.finish(run, {}, {})
    after = _evaluate(job, embedder, partial(job.tuned_params, run.state["tuned"]))
    return _finish(run, before, after)


def _evaluate(
    job: Job, embedder: OmniEmbedder, params: Callable[[], dict[str, Any]]
) -> dict[str, Retrieval]:
    """Held-out retrieval by file. params: makes those that the embedder has meanwhile."""

    def encode(sides: Sequence[Content]) -> np.ndarray:
        inputs = list(map(as_input, sides))
        return embedder.encode(
            inputs, job.config.eval.batch_size, max_length=job.config.data.max_length
        )

    embedder.params, found = params(), {}
    for name, records in job.held_out.items():
        found[name] = one = retrieval(encode, records)
        scores = f"recall@1 {one.recall_at_1:.3f}, MRR {one.mrr:.3f}"
        say(f"held out, {name}: {len(records)} anchors, {scores}")
    embedder.params = {}  # training has the memory
    return found


def _finish(run: Run, before: dict[str, Retrieval], after: dict[str, Retrieval]) -> dict[str, Any]:
    """Show the difference, and write everything."""
    picture = run.job.workdir / "similarity.png"
    if jax.process_index() == 0:
        similarities = {name: (before[name].similarity, after[name].similarity) for name in after}
        plot_similarity(picture, similarities)
    say(f"\n{'held out':32}{'before':>10}{'after':>10}")
    for name, a in after.items():
        b = before[name]
        recall = f"{name}, recall@1 of {a.candidates}"
        say(f"{recall:32}{b.recall_at_1:10.3f}{a.recall_at_1:10.3f}")
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
