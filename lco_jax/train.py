"""The main job: contrastive LoRA training of a multimodal LLM's decoder, on text or on any modality.

    python -m lco_jax.train --config=configs/base.py [--workdir=runs/base] [--config.KEY=VALUE …]

Any key of the config can be set on the command line, e.g. --config.optimizer.learning_rate=1e-3 or
--config.data.sources.bundled.path=my.jsonl. A workdir given again resumes the run in it. What it leaves there:

    adapter/  merged/          the PEFT adapter and the merged Hugging Face model
    metrics.jsonl              one line a step
    loss.png  similarity.png   the loss curve; held-out cosines before and after
    results.json               held-out retrieval before and after
    checkpoints/  config.json  what resuming needs
"""

import contextlib
import dataclasses
import functools
import math
import signal
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import Checkpoint, load_model, open_checkpoint
from lco_jax.checkpoint.peft import write_peft
from lco_jax.checkpoint.store import RunStore
from lco_jax.core import lora
from lco_jax.core.errors import LcoError, run_main
from lco_jax.core.files import write_json
from lco_jax.core.sharding import make_mesh
from lco_jax.data import pipeline
from lco_jax.data.media import MediaConfig
from lco_jax.data.plan import draw, plan
from lco_jax.data.processor import Processor
from lco_jax.data.records import as_input
from lco_jax.data.scan import ListSource, Source
from lco_jax.data.sources import JsonlSource
from lco_jax.embedder import OmniEmbedder
from lco_jax.evaluation.plots import plot_loss, plot_similarity
from lco_jax.evaluation.retrieval import Retrieval, retrieval
from lco_jax.models.model import Model
from lco_jax.training import cli, memory
from lco_jax.training.metrics import MetricsLog, read_metrics
from lco_jax.training.optimizer import OptimizerConfig, learning_rate
from lco_jax.training.run import Training, check_config, claim_workdir
from lco_jax.training.step import State, make_train_step


def train(config: ConfigDict, workdir: Path) -> dict[str, Any]:
    """Run or resume; returns results.json's content, or {} when a SIGTERM ended the run early (after saving it)."""
    previous_handler, stop = signal.getsignal(signal.SIGTERM), _on_sigterm()
    lead = jax.process_index() == 0

    # ---- what there is: mesh, checkpoint, data
    check_config(config)
    mesh = make_mesh(**config.mesh)
    pipeline.check_mesh(mesh)
    checkpoint = open_checkpoint(config.model.path)
    sources = pipeline.open_sources(config.data)
    records = sum(len(source) for source in sources.values())
    batch_size = config.train.batch_size
    total_steps = config.train.steps or max(int(config.train.epochs * records / batch_size), 1)
    training = Training.build(config, checkpoint, total_steps, mesh)
    _say(f"{config.model.path} on {mesh.size} × {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}")
    skipped = sum(source.skipped for source in sources.values())
    _say(f"{records:,} records, {total_steps:,} steps of {batch_size}, LoRA rank {training.lora.rank}")
    if skipped:
        _say(f"{skipped:,} bad records skipped")

    media = MediaConfig(**config.data.media)
    context = checkpoint.config.max_position_embeddings
    processor = Processor(checkpoint.folder, context, media, modalities=checkpoint.backbone.modalities)
    most = max(source.max_negatives for source in sources.values())
    layout = pipeline.Layout(
        batch_size=batch_size,
        max_negatives=most if config.data.max_negatives < 0 else min(most, config.data.max_negatives),
        head=processor.tokenizer.head,
        chunk_tokens=config.train.chunk_tokens,
        on_bad=config.data.on_bad,
    )

    held_out = JsonlSource(config.eval.path, config.data.on_bad) if config.eval.path else ListSource([])
    towers = _towers(checkpoint, {"held-out data": held_out, **sources}, media)
    settings = {key: config.model[key] for key in ("quantize", "remat", "attention")}
    settings["remat"] = "full" if settings["remat"] == "auto" else settings["remat"]  # until it is chosen
    model, params = load_model(
        checkpoint, mesh, config.model.dtype, towers, config.model.tower_dtype or None, **settings
    )
    evaluate = lambda params: _evaluate(params, model, processor, mesh, list(held_out), config)  # noqa: E731
    before = evaluate(params)

    # ---- where the run stands: state and position in the data
    weights = {name: config.data.sources[name].get("weight", len(source)) for name, source in sources.items()}
    run = batch_size if config.data.batches == "homogeneous" else 1
    stream = pipeline.record_stream(sources, weights, config.seed, run)
    batches = pipeline.local_batches(stream, layout, processor, config.data.max_length)
    sample = draw(batches, layout, media=bool(towers))

    @functools.cache
    def shaped(chunk: int) -> pipeline.Layout:
        unplanned = dataclasses.replace(layout, chunk_tokens=chunk)
        return plan(sample, unplanned, processor, mesh, config.data.max_length)

    chunk_tokens = config.train.chunk_tokens
    if config.model.remat == "auto" or chunk_tokens < 0:
        sides = batch_size, 2 + layout.max_negatives
        chosen = memory.choose_for(config, model, params, training, mesh, sides, lambda chunk: shaped(chunk).floor)
        _say(str(chosen))
        model = dataclasses.replace(model, decoder=model.decoder.clone(remat=chosen.remat))
        chunk_tokens = chosen.chunk_tokens
    planned = shaped(chunk_tokens)
    iterator = pipeline.ahead(batches, config.data.threads)
    store = RunStore(workdir / "checkpoints", config.checkpoint.keep)
    step = store.latest_step() or 0
    claim_workdir(workdir, config, total_steps, begun=step > 0)
    if step:
        state, position = training.restore(store, step)
        iterator.set_state(position)
        _say(f"resuming {workdir} at step {step}")
    else:
        state = training.fresh(seed=config.seed)

    # ---- the loop
    train_step = make_train_step(
        model,
        training.tx,
        training.lora,
        config.train.temperature,
        config.seed,
        mesh,
        training.shardings,
        config.train.ignore_duplicates,
        config.train.candidates,
    )
    log = MetricsLog(workdir, step, config) if lead else None
    watch = _Watch(config, log, total_steps, step)
    with contextlib.closing(store), jax.set_mesh(mesh), watch.progress:  # on any way out, what is begun is saved
        for batch in pipeline.batches(iterator, planned, processor.rows, mesh) if step < total_steps else ():
            state, metrics = train_step(state, params, batch)
            watch.record(step, metrics)
            step += 1
            last = step == total_steps or stop()
            if last or step % config.checkpoint.every == 0:
                watch.flush()
                store.save(step, state, iterator.get_state())
            if last:
                break
        watch.flush()
    signal.signal(signal.SIGTERM, previous_handler)  # from here on there is nothing to save
    if log:
        log.close()
    if step < total_steps:
        _say(f"stopped by SIGTERM; saved at step {step}: the same command resumes")
        return {}

    # ---- what it leaves
    return _finish(config, workdir, state, training, evaluate, before, params)


class _Watch:
    """Metrics to the log and the progress bar, one step late: the next step is under way before these are fetched."""

    def __init__(self, config: ConfigDict, log: MetricsLog | None, total_steps: int, first_step: int):
        self.log, self.batch_size, self.limit = log, config.train.batch_size, config.train.max_nonfinite
        self.rate = learning_rate(OptimizerConfig(**config.optimizer), total_steps)
        self.pending: tuple[int, Mapping[str, Any]] | None = None
        self.skipped, self.in_a_row = log.skipped if log else 0, 0
        self.since = time.perf_counter()
        self.progress = tqdm(
            total=total_steps, initial=first_step, desc="training", unit="step", disable=log is None, mininterval=0.5
        )

    def record(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Queue the metrics of `step`, and write those of the step before."""
        self.flush()
        self.pending = step, metrics

    def flush(self) -> None:
        """Write what is queued. Raises when too many steps in a row were not finite."""
        if self.pending is None:
            return
        step, metrics = self.pending
        self.pending = None
        values = {key: float(value) for key, value in jax.device_get(metrics).items()}
        now, since = time.perf_counter(), self.since
        self.since = now
        finite = bool(values.pop("finite"))
        self.in_a_row = 0 if finite else self.in_a_row + 1
        values = {key: value if math.isfinite(value) else None for key, value in values.items()}  # JSON has no NaN
        values |= {
            "learning_rate": float(self.rate(step - self.skipped)),  # a skipped step does not advance the schedule
            "tokens_per_s": values.pop("tokens") / (now - since),
            "triplets_per_s": self.batch_size / (now - since),
            "skipped_steps": self.skipped + (not finite),
        }
        self.skipped = values["skipped_steps"]
        if self.log:
            self.log.write(step, values)
        self.progress.set_postfix(
            loss="-" if values["loss"] is None else f"{values['loss']:.4f}",
            rate=f"{values['triplets_per_s']:.0f}/s",
            refresh=False,
        )
        self.progress.update()
        if self.in_a_row >= self.limit:
            raise LcoError(
                f"the loss or its gradient was not finite in {self.in_a_row} steps in a row, up to step {step}; lower "
                "config.optimizer.learning_rate, or look at the records of these steps"
            )


def _towers(checkpoint: Checkpoint, sources: Mapping[str, Source], media: MediaConfig) -> list[str]:
    """The towers that the data needs. Raises for data that the checkpoint does not take."""
    backbone = checkpoint.backbone
    for name, source in sources.items():
        if closed := sorted(source.modalities - set(backbone.modalities)):
            raise LcoError(f"{name} holds {closed[0]}, and this checkpoint takes {', '.join(backbone.modalities)}")
    used = frozenset().union(*(source.modalities for source in sources.values()))
    used |= {"audio"} if media.use_audio_in_video and "video" in used else set()
    return [tower for tower, kinds in backbone.reads.items() if used & set(kinds)]


def _evaluate(
    params: dict[str, Any],
    model: Model,
    processor: Processor,
    mesh: Mesh,
    records: list,
    config: ConfigDict,
) -> Retrieval | None:
    if not records:
        return None
    embedder = OmniEmbedder(model, params, processor, mesh)
    encode = lambda sides: embedder.encode(  # noqa: E731
        list(map(as_input, sides)), config.eval.batch_size, max_length=config.data.max_length
    )
    result = retrieval(encode, records)
    _say(f"held-out retrieval ({len(records)} anchors): recall@1 {result.recall_at_1:.3f}, MRR {result.mrr:.3f}")
    return result


def _finish(
    config: ConfigDict,
    workdir: Path,
    state: State,
    training: Training,
    evaluate: Any,
    before: Retrieval | None,
    params: dict[str, Any],
) -> dict[str, Any]:
    """Evaluate again, and let one process write everything."""
    no_dropout = dataclasses.replace(training.lora, dropout=0.0)
    after = evaluate({**params, "decoder": lora.attach(params["decoder"], state["adapters"], no_dropout)})
    adapters = multihost_utils.process_allgather(state["adapters"], tiled=True)
    results = _export(config, workdir, adapters, training, before, after) if jax.process_index() == 0 else {}
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")  # a process that leaves early ends the job for all
    return results


def _export(
    config: ConfigDict,
    workdir: Path,
    adapters: dict[str, Any],
    training: Training,
    before: Retrieval | None,
    after: Retrieval | None,
) -> dict[str, Any]:
    """Adapter, merged model, pictures, results.json; tell what there is."""
    write_peft(workdir / "adapter", adapters, training.lora, config.model.path)
    outputs = {"adapter": str(workdir / "adapter")}
    if config.export.merged:
        export_merged(config.model.path, workdir / "merged", adapters, training.lora, config.export.dtype)
        outputs["merged model"] = str(workdir / "merged")
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["loss"] is not None]
    columns = [[line[key] for line in lines] for key in ("step", "loss", "learning_rate")]
    plot_loss(workdir / "loss.png", *columns)
    outputs["loss curve"] = str(workdir / "loss.png")
    results: dict[str, Any] = {"steps": len(lines), "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}
    if before and after:
        plot_similarity(workdir / "similarity.png", before.similarity, after.similarity)
        outputs["similarities"] = str(workdir / "similarity.png")
        for name, result in (("before", before), ("after", after)):
            results[name] = {"recall_at_1": result.recall_at_1, "mrr": result.mrr}
    write_json(workdir / "results.json", results)
    _say(f"\nloss {results['first_loss']:.3f} at the first step, {results['last_loss']:.3f} at the last")
    if before and after:
        _say(f"\n{'held out':14}{'before':>10}{'after':>10}")
        _say(f"{'recall@1':14}{before.recall_at_1:10.3f}{after.recall_at_1:10.3f}")
        _say(f"{'MRR':14}{before.mrr:10.3f}{after.mrr:10.3f}\n")
    for label, path in outputs.items():
        _say(f"{label:14}{path}")
    return results


def _on_sigterm() -> Callable[[], bool]:
    """A function that tells whether SIGTERM has come (preemption) to any process: the loop then saves and ends."""
    came: list[int] = []

    def handler(number: int, frame: FrameType | None) -> None:
        came.append(number)

    def anywhere() -> bool:
        if jax.process_count() == 1:
            return bool(came)
        return bool(multihost_utils.process_allgather(np.array(bool(came))).any())

    signal.signal(signal.SIGTERM, handler)
    return anywhere


def _say(line: str) -> None:
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    args = cli.parse(sys.argv, __doc__)
    cli.join_processes(args)
    train(args.config, Path(args.workdir or f"runs/{args.config.name}"))
    return 0


if __name__ == "__main__":
    run_main(main)
