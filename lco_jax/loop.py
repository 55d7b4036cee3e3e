"""The training loop: where a run begins or resumes, and its steps."""

import contextlib
import dataclasses
import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import grain
import jax

from lco_jax.checkpoint.store import RunStore
from lco_jax.core.exchange import Exchange
from lco_jax.core.files import reaching
from lco_jax.core.packing import Batch
from lco_jax.core.stream_shapes import Shape
from lco_jax.data import pipeline
from lco_jax.data.layouts import choose_layout, draw
from lco_jax.job import Job, batches_of, fingerprints, say
from lco_jax.models.model import Model
from lco_jax.training import memory, tuning
from lco_jax.training.reports import StepReports
from lco_jax.training.run import claim_workdir
from lco_jax.training.state import State
from lco_jax.training.step import Step
from lco_jax.training.watch import Preemption, Watchdog, peers

MakeStep = Callable[[Model], Step]
logger = logging.getLogger(__name__)


@dataclass
class Loop:
    """Where a job stands.

    iterator: of the data. planned: the layout, with the shapes that nearly every batch fits.
    """

    job: Job
    store: RunStore
    state: State
    step: int
    iterator: grain.DatasetIterator
    planned: pipeline.Layout
    train_step: Step


def begin(job: Job, make_step: MakeStep) -> Loop:
    """Plan the batches' shapes, fit the step to the devices' memory, and begin or resume the run.

    make_step: a model -> the job's training step. Afterwards the job's parameters are those alone
    that the run leaves frozen.
    """
    config = job.config
    batches = batches_of(config, job.sources, job.layout, job.processor)
    sample = draw(batches, job.layout, media=bool(job.model.towers))

    @functools.cache
    def planned(chunk_tokens: int) -> pipeline.Layout:
        layout = dataclasses.replace(job.layout, chunk_tokens=chunk_tokens)
        return choose_layout(sample, layout, job.processor, job.mesh, config.data.max_length)

    if config.model.remat == "auto" or config.train.chunk_tokens < 0:
        train_step, chunk_tokens = _fit_memory(job, planned, make_step)
    else:
        train_step, chunk_tokens = make_step(job.model), config.train.chunk_tokens
    iterator = pipeline.ahead(batches, config.data.threads)
    store = _claim(job)
    step, state, position = _start_or_resume(job, store)
    if position is not None:
        iterator.set_state(position)
    job.params = tuning.frozen(job.params, job.training.tune)
    return Loop(job, store, state, step, iterator, planned(chunk_tokens), train_step)


def _claim(job: Job) -> RunStore:
    """The checkpoints of the run's folder, which gets the configuration."""
    with reaching(job.home):
        store = RunStore(job.home / "checkpoints", job.config.checkpoint.keep)
        found = fingerprints(job.config, job.sources)
        claim_workdir(job.home, job.config, job.total_steps, found, job.layout.objective)
    return store


def _start_or_resume(job: Job, store: RunStore) -> tuple[int, State, dict[str, Any] | None]:
    """(step, state, data position): of the newest checkpoint, or of step 0 without a position."""
    found = job.training.resume(store)
    if found is None:
        return 0, job.training.fresh(job.params, seed=job.config.seed), None
    say(f"resuming {job.home} at step {found[0]}")
    return found


def _fit_memory(
    job: Job, planned: Callable[[int], pipeline.Layout], make_step: MakeStep
) -> tuple[Step, int]:
    """The step under the remat policy that fits the devices' memory, and its chunk_tokens.

    Afterwards the job's model has that policy.
    """
    state = job.training.sharded_abstract
    frozen = tuning.frozen(job.params, job.training.tune)

    @functools.cache
    def made(remat: str) -> tuple[Model, Step]:
        decoder = job.model.decoder.clone(remat=remat)
        model = dataclasses.replace(job.model, decoder=decoder)
        return model, make_step(model)

    def shape_of(chunk_tokens: int) -> Shape:
        return planned(chunk_tokens).floor

    def lower(candidate: memory.Candidate) -> jax.stages.Lowered:
        _, step = made(candidate.remat)
        batch = _abstract_batch(job, planned(candidate.chunk_tokens))
        with jax.set_mesh(job.mesh):
            return step.lower(state, frozen, batch)

    others, towers = _without_frozen_towers(job)
    chosen = memory.choose_for(
        job.config, job.model.decoder.config, others, towers, state, job.mesh, shape_of, lower
    )
    logger.debug("%s", chosen)
    job.model, train_step = made(chosen.remat)
    return train_step, chosen.chunk_tokens


def _without_frozen_towers(job: Job) -> tuple[dict[str, Any], dict[str, Any]]:
    """The parameters that the step takes, and those of towers that run in programs of their own."""
    towers = {} if job.training.tune.trains_towers else job.model.towers
    apart = {name: job.params[name] for name in towers}
    return {name: tree for name, tree in job.params.items() if name not in apart}, apart


def _abstract_batch(job: Job, layout: pipeline.Layout) -> Batch:
    """A batch of a planned layout, as shapes on the mesh."""
    media = memory.abstract_media(job.processor.rows, layout.media_floor, job.mesh)
    sides = layout.batch_size, layout.sides
    branches, teacher = layout.prefix.branches, layout.teacher
    guide = job.training.objective.guide_dimension
    return memory.abstract_batch(layout.floor, sides, branches, job.mesh, media, teacher, guide)


def run(loop: Loop) -> bool:
    """Train to the end, saving on the way. False if SIGTERM ended it early, after saving."""
    job, config, store = loop.job, loop.job.config, loop.store
    with contextlib.ExitStack() as stack:  # closed from the last to the first, on any way out
        stack.callback(job.upload)
        preemption = stack.enter_context(Preemption(store.reached_preemption))
        stack.enter_context(contextlib.closing(store))
        reports = StepReports(config, job.workdir, job.total_steps, loop.step)
        stack.enter_context(contextlib.closing(reports))
        batches = stack.enter_context(_batches(loop))
        watchdog = stack.enter_context(Watchdog(config.train.patience, loop.step))
        stack.enter_context(jax.set_mesh(job.mesh))
        stack.enter_context(peers())
        _train(loop, batches, reports, watchdog, preemption)
    is_done = loop.step == job.total_steps
    if not is_done:
        say(f"stopped by SIGTERM; saved at step {loop.step}: the same command resumes")
    return is_done


def _train(
    loop: Loop,
    batches: Iterator[tuple[Batch, pipeline.Origin]],
    reports: StepReports,
    watchdog: Watchdog,
    preemption: Preemption,
) -> None:
    """Step after step, until the last or until SIGTERM.

    Nothing here waits for the step under way: batches come from a thread, and the metrics are those
    of the step before.
    """
    job = loop.job
    for batch, origin in batches:
        loop.state, metrics = loop.train_step(loop.state, job.params, batch)
        preemption.heed()  # from the first step on there is something to save
        reports.record(loop.step, metrics, origin.where)
        watchdog.ended(loop.step - 1)  # whose metrics have arrived
        loop.step += 1
        is_last = loop.step == job.total_steps or preemption.now(loop.step)
        if is_last or loop.step % job.config.checkpoint.every == 0:
            reports.flush()
            job.upload()  # a checkpoint's metrics arrive before it does
            loop.store.save(loop.step, loop.state, origin.position)
        if is_last:
            break
    reports.flush()


@contextlib.contextmanager
def _batches(loop: Loop) -> Iterator[Iterator[tuple[Batch, pipeline.Origin]]]:
    """The batches that are left, until the block ends."""
    job, exchange = loop.job, Exchange()
    left = job.total_steps - loop.step
    batches = pipeline.batches(
        loop.iterator, loop.planned, job.processor.rows, job.mesh, exchange, left
    )
    with contextlib.closing(batches), contextlib.closing(exchange):
        yield batches
