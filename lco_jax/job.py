"""What training jobs have in common: what they open, where a run stands, and the loop."""

import contextlib
import dataclasses
import functools
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grain
import jax
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import Checkpoint, load_model, open_checkpoint
from lco_jax.checkpoint.peft import has_adapters, write_peft
from lco_jax.checkpoint.store import RunStore
from lco_jax.core.errors import LcoError
from lco_jax.core.exchange import Exchange
from lco_jax.core.files import (
    AnyPath,
    local_copy,
    local_workdir,
    on_bucket,
    reaching,
    upload,
    write_json,
)
from lco_jax.core.sharding import make_mesh
from lco_jax.data import pipeline
from lco_jax.data.layouts import choose_layout, draw
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor
from lco_jax.data.records import Record
from lco_jax.data.scan import Source
from lco_jax.data.sources import JsonlSource
from lco_jax.evaluation.plots import plot_loss
from lco_jax.models.model import Model
from lco_jax.training import memory, tuning
from lco_jax.training.metrics import read_metrics
from lco_jax.training.progress import Progress
from lco_jax.training.run import Training, check_config, claim_workdir
from lco_jax.training.step import State, Step
from lco_jax.training.watch import Preemption, Watchdog, peers


@dataclass
class Job:
    """A run, open. params: the whole model's, as they were before the run. held_out: records, by file.

    home: where the run lives; workdir: where programs write, the home itself unless that is on a bucket.
    """

    config: ConfigDict
    home: AnyPath
    workdir: Path
    mesh: Mesh
    checkpoint: Checkpoint
    sources: dict[str, Source]
    processor: Processor
    layout: pipeline.Layout
    training: Training
    model: Model
    params: dict[str, Any]
    held_out: dict[str, list[Record]]
    total_steps: int

    def tuned_params(self, tuned: dict[str, Any]) -> dict[str, Any]:
        """The model's parameters with what is tuned of them as a state has it, for inference."""
        no_dropout = dataclasses.replace(self.training.lora, dropout=0.0)
        return tuning.attach(self.params, tuned, no_dropout)

    def untrained_params(self) -> dict[str, Any]:
        """As `tuned_params` of step 0: the parameters before the run, for programs that will take
        those after it."""
        return self.tuned_params(self.training.untrained(self.params))

    def keep(self) -> None:
        """Copy to the bucket, if the run lives on one, what this process has written."""
        if on_bucket(self.home) and jax.process_index() == 0:
            upload(self.workdir, self.home)


def open_job(config: ConfigDict, home: AnyPath, generative: bool = False) -> Job:
    """Check and open everything: mesh, checkpoint, data, model; and say what there is.

    generative: records are prompts and answers, and the vocabulary head is loaded, too.
    """
    check_config(config)
    workdir = local_workdir(home, "*.jsonl")
    mesh = make_mesh(**config.mesh)
    pipeline.check_mesh(mesh)
    checkpoint = open_checkpoint(config.model.path)
    sources, processor, layout = open_data(config, checkpoint, generative)
    records = sum(len(source) for source in sources.values())
    batch_size = config.train.batch_size
    total_steps = config.train.steps or max(int(config.train.epochs * records / batch_size), 1)
    training = Training.build(config, checkpoint, total_steps, mesh)
    say(
        f"{config.model.path} on {mesh.size} × {jax.devices()[0].device_kind}, mesh {dict(mesh.shape)}"
    )
    what = (
        f"LoRA rank {training.lora.rank}"
        if training.tune.decoder == "lora"
        else training.tune.decoder
    )
    say(
        f"{records:,} records, {total_steps:,} steps of {batch_size}, {what}: {tuning.count(training.tuned):,} numbers"
    )
    if skipped := sum(source.skipped for source in sources.values()):
        say(f"{skipped:,} bad records skipped")

    files = [
        JsonlSource(local_copy(file), config.data.on_bad)
        for file in config.eval.path.split(",")
        if file
    ]
    held_out = {source.path.stem: source for source in files}
    if len(held_out) < len(files):
        raise LcoError(
            f"config.eval.path={config.eval.path} names two files alike; scores go by their names"
        )
    media = MediaConfig(**config.data.media)
    towers = _towers(
        checkpoint,
        {**{f"held-out data {name}": one for name, one in held_out.items()}, **sources},
        media,
    )
    if training.tune.towers != "none":
        towers = list(checkpoint.towers)
    settings = {key: config.model[key] for key in ("quantize", "remat", "attention")}
    settings["remat"] = (
        "full" if settings["remat"] == "auto" else settings["remat"]
    )  # until it is chosen
    model, params = load_model(
        checkpoint,
        mesh,
        config.model.dtype,
        towers,
        config.model.tower_dtype or None,
        head=generative,
        **settings,
    )
    if training.tune.decoder == "full":
        model = dataclasses.replace(model, decoder=model.decoder.clone(tuned=True))
    return Job(
        config, home, workdir, mesh, checkpoint, sources, processor, layout, training, model, params,
        {name: list(source) for name, source in held_out.items()}, total_steps,
    )  # fmt: skip


def open_data(
    config: ConfigDict, checkpoint: Checkpoint, generative: bool = False
) -> tuple[dict[str, Source], Processor, pipeline.Layout]:
    """What a run reads, what makes inputs of it, and how they are laid into batches, not yet planned."""
    sources = pipeline.open_sources(config.data)
    media, context = MediaConfig(**config.data.media), checkpoint.config.max_position_embeddings
    processor = Processor(
        checkpoint.folder, context, media, modalities=checkpoint.backbone.modalities
    )
    most = max(source.max_negatives for source in sources.values())
    layout = pipeline.Layout(
        batch_size=config.train.batch_size,
        max_negatives=most
        if config.data.max_negatives < 0
        else min(most, config.data.max_negatives),
        prefix=processor.tokenizer.prefix,
        chunk_tokens=config.train.chunk_tokens,
        on_bad=config.data.on_bad,
        generative=generative,
    )
    return sources, processor, layout


def batches_of(
    config: ConfigDict, sources: Mapping[str, Source], layout: pipeline.Layout, processor: Processor
) -> grain.MapDataset:
    """This process's share of each global batch of a run."""
    weights = {
        name: config.data.sources[name].get("weight", len(source))
        for name, source in sources.items()
    }
    run = layout.batch_size if config.data.batches == "homogeneous" else 1
    stream = pipeline.record_stream(sources, weights, config.seed, run)
    return pipeline.local_batches(stream, layout, processor, config.data.max_length)


@dataclass
class Run:
    """Where a job stands: its state, its place in the data, the shapes that its batches are planned to take.

    train_step: what takes them a step further.
    """

    job: Job
    store: RunStore
    state: State
    step: int
    iterator: grain.DatasetIterator
    planned: pipeline.Layout
    train_step: Step


def begin(job: Job, step_of: Callable[[Model], Step]) -> Run:
    """Plan the shapes, choose what is to be chosen for the memory there is, and begin or resume in the workdir.

    step_of: makes the job's step. The job's parameters are afterwards those alone that the run leaves as they are.
    """
    config, layout, training = job.config, job.layout, job.training
    batches = batches_of(config, job.sources, layout, job.processor)
    sample = draw(batches, layout, media=bool(job.model.towers))

    @functools.cache
    def shaped(chunk: int) -> pipeline.Layout:
        unplanned = dataclasses.replace(layout, chunk_tokens=chunk)
        return choose_layout(sample, unplanned, job.processor, job.mesh, config.data.max_length)

    chunk_tokens = config.train.chunk_tokens
    train_step = step_of(job.model)
    if config.model.remat == "auto" or chunk_tokens < 0:
        chosen, train_step = _choose(job, shaped, step_of)
        say(str(chosen))
        chunk_tokens = chosen.chunk_tokens
    planned = shaped(chunk_tokens)
    iterator = pipeline.ahead(batches, config.data.threads)
    with reaching(job.home):
        store = RunStore(job.home / "checkpoints", config.checkpoint.keep)
        claim_workdir(job.home, config, job.total_steps, begun=bool(store.steps()))
    step = 0
    if found := training.resume(store):
        step, state, position = found
        iterator.set_state(position)
        say(f"resuming {job.home} at step {step}")
    else:
        state = training.fresh(job.params, seed=config.seed)
    job.params = tuning.frozen(job.params, training.tune)
    return Run(job, store, state, step, iterator, planned, train_step)


def _choose(
    job: Job, shaped: Callable[[int], pipeline.Layout], step_of: Callable[[Model], Step]
) -> tuple[memory.Choice, Step]:
    """Policy and chunk, and the step that was compiled for them; the job's model is then of that policy."""
    frozen = tuning.frozen(job.params, job.training.tune)

    @functools.cache
    def made(remat: str) -> tuple[Model, Step]:
        model = dataclasses.replace(job.model, decoder=job.model.decoder.clone(remat=remat))
        return model, step_of(model)

    def lower(one: memory.Candidate) -> jax.stages.Lowered:
        layout = shaped(one.chunk_tokens)
        sides = layout.batch_size, layout.sides
        media = memory.abstract_media(job.processor.rows, layout.media_floor, job.mesh)
        batch = memory.abstract_batch(layout.floor, sides, len(layout.prefix), job.mesh, media)
        with jax.set_mesh(job.mesh):
            return made(one.remat)[1].lower(job.training.sharded_abstract, frozen, batch)

    apart = set(job.model.towers) if job.training.tune.towers == "none" else set()
    given, besides = (
        {k: x for k, x in job.params.items() if (k in apart) == aside} for aside in (False, True)
    )
    chosen = memory.choose_for(
        job.config, job.model.decoder.config, given, besides, job.training.sharded_abstract, job.mesh,
        lambda chunk: shaped(chunk).floor, lower,
    )  # fmt: skip
    job.model, train_step = made(chosen.remat)
    return chosen, train_step


def loop(run: Run) -> bool:
    """Train to the end, saving on the way; False where a SIGTERM (preemption) ended it early, after
    saving.

    Nothing here waits for the step under way: batches come from a thread, and metrics are those of
    the step before.
    """
    job, config, store = run.job, run.job.config, run.store
    dog = Watchdog(config.train.patience, run.step)
    progress = Progress(config, job.workdir, job.total_steps, run.step)
    exchange, left = Exchange(), job.total_steps - run.step
    batches = pipeline.batches(
        run.iterator, run.planned, job.processor.rows, job.mesh, exchange, left
    )
    with contextlib.ExitStack() as end:
        end.callback(job.keep)
        preemption = end.enter_context(Preemption(store.reached_preemption))
        for resource in (
            store,
            progress,
            batches,
            exchange,
        ):  # closed from the last to the first, on any way out
            end.enter_context(contextlib.closing(resource))
        for context in (dog, jax.set_mesh(job.mesh), peers()):
            end.enter_context(context)
        for batch, origin in batches:
            run.state, metrics = run.train_step(run.state, job.params, batch)
            preemption.heed()  # from the first step on there is something to save
            progress.record(run.step, metrics, origin.where)
            dog.ended(run.step - 1)  # whose results were awaited
            run.step += 1
            last = run.step == job.total_steps or preemption.now(run.step)
            if last or run.step % config.checkpoint.every == 0:
                progress.flush()
                job.keep()  # a checkpoint's lines are there before it is
                store.save(run.step, run.state, origin.position)
            if last:
                break
        progress.flush()
    if run.step < job.total_steps:
        say(f"stopped by SIGTERM; saved at step {run.step}: the same command resumes")
    return run.step == job.total_steps


def finish(run: Run, numbers: dict[str, Any], pictures: Mapping[str, Path]) -> dict[str, Any]:
    """Let one process write adapter, merged model, loss curve and results.json, and tell what there is.

    numbers: what results.json holds beside the run's own. pictures: {what: where} of those there are already.
    Returns what results.json holds; how many steps there were in the other processes, which wait: one that leaves early
    ends the job for all.
    """
    results = {"steps": run.job.total_steps}
    if jax.process_index() == 0:
        results = _write(run, _tuned_on_host(run), numbers, pictures)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("exported")
    if on_bucket(run.job.home):
        shutil.rmtree(run.job.workdir)
    return results


def _tuned_on_host(run: Run) -> dict[str, Any]:
    """What the run has tuned, for this process alone.

    Where others hold parts of it, it is read from the last checkpoint: no device and no other host
    has to hold it all.
    """
    if jax.process_count() == 1:
        return jax.device_get(run.state["tuned"])
    return run.store.read(run.job.total_steps, {"tuned": run.job.training.tuned})["tuned"]


def _write(
    run: Run, tuned: dict[str, Any], numbers: dict[str, Any], pictures: Mapping[str, Path]
) -> dict[str, Any]:
    job, config, workdir = run.job, run.job.config, run.job.workdir
    outputs: dict[str, Path] = {}
    if has_adapters(tuned.get("decoder", {})):
        write_peft(workdir / "adapter", tuned["decoder"], job.training.lora, config.model.path)
        outputs["adapter"] = workdir / "adapter"
    if config.export.merged:
        export_merged(
            config.model.path, workdir / "merged", tuned, job.training.lora, config.export.dtype
        )
        outputs["merged model"] = workdir / "merged"
    lines = [line for line in read_metrics(workdir / "metrics.jsonl") if line["loss"] is not None]
    columns = [[line[key] for line in lines] for key in ("step", "loss", "learning_rate")]
    plot_loss(workdir / "loss.png", *columns)
    results = {"steps": len(lines), "first_loss": lines[0]["loss"], "last_loss": lines[-1]["loss"]}
    results |= {"trained_parameters": tuning.count(job.training.tuned), **numbers}
    write_json(workdir / "results.json", results)
    job.keep()
    say(
        f"\nloss {results['first_loss']:.3f} at the first step, {results['last_loss']:.3f} at the last\n"
    )
    for label, path in {**outputs, "loss curve": workdir / "loss.png", **pictures}.items():
        say(f"{label:14}{job.home / path.relative_to(workdir)}")
    return results


def _towers(checkpoint: Checkpoint, sources: Mapping[str, Source], media: MediaConfig) -> list[str]:
    """The towers that the data needs. Raises for data that the checkpoint does not take."""
    backbone = checkpoint.backbone
    for name, source in sources.items():
        if closed := sorted(source.modalities - set(backbone.modalities)):
            raise LcoError(
                f"{name} holds {closed[0]}, and this checkpoint takes {', '.join(backbone.modalities)}"
            )
    used = frozenset().union(*(source.modalities for source in sources.values()))
    used |= {"audio"} if media.use_audio_in_video and "video" in used else set()
    return [tower for tower, kinds in backbone.reads.items() if used & set(kinds)]


def say(line: str) -> None:
    """Print for people, once for all processes, beside a progress bar."""
    if jax.process_index() == 0:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()
