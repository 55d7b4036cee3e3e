"""A training job, opened: its devices, checkpoint, data and model."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass, fields
from itertools import chain
from pathlib import Path
from typing import Any

import grain
import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict
from tqdm import tqdm

from lco_jax.checkpoint.hf import Checkpoint, open_checkpoint
from lco_jax.checkpoint.sentence_transformers import Usage
from lco_jax.core import console
from lco_jax.core.errors import LcoError, check_keys
from lco_jax.core.files import AnyPath, local_workdir, on_bucket, reaching, upload
from lco_jax.core.sharding import check_mesh, make_mesh
from lco_jax.data import mixture, pipeline, record_stream
from lco_jax.data.guide import open_guide
from lco_jax.data.guide_files import KEY, guide_fingerprint
from lco_jax.data.held_out import Split, split
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor
from lco_jax.data.scan import ListSource, Source, fingerprint
from lco_jax.evaluation.sts import ScoredPairs
from lco_jax.measured import open_held_out, open_pairs
from lco_jax.models.model import Model
from lco_jax.run_model import load, towers_for
from lco_jax.training import tuning
from lco_jax.training.folder import check_outputs
from lco_jax.training.instructions import instructions_by_source, usage_of_run
from lco_jax.training.metrics import check_packages
from lco_jax.training.run import check_dimensions, check_same_run, has_begun
from lco_jax.training.state import Training, warmup_steps

logger = logging.getLogger(__name__)


@dataclass
class Job:
    """What a run works with.

    home: the run's folder. workdir: the folder that programs write to: home itself, or a local copy
    of it if home is on a bucket. params: the model's, without adapters. held_out: the records of
    each held-out file. pairs: those of each file of scored pairs. usage: how what is trained is to
    be used.
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
    held_out: dict[str, ListSource]
    pairs: dict[str, ScoredPairs]
    total_steps: int
    usage: Usage

    def tuned_params(self, tuned: dict[str, Any]) -> dict[str, Any]:
        """The model's parameters for inference, with the trainable parameters of a state."""
        no_dropout = dataclasses.replace(self.training.lora, dropout=0.0)
        return tuning.attach(self.params, tuned, no_dropout)

    def untrained_params(self) -> dict[str, Any]:
        """`tuned_params` of step 0, so that the same programs take those of the last step."""
        return self.tuned_params(self.training.untrained(self.params))

    def upload(self) -> None:
        """Copy the files that this process has written to the bucket, if home is on one."""
        if on_bucket(self.home) and jax.process_index() == 0:
            upload(self.workdir, self.home)


def open_job(config: ConfigDict, home: AnyPath, generative: bool = False) -> Job:
    """Check the configuration, open everything that it names, and print a summary.

    generative: records are prompts and answers, and the vocabulary head is loaded, too.
    """
    media = _media_config(config)
    check_packages(config)
    check_outputs(home, config)
    mesh = make_mesh(**config.mesh)
    check_mesh(mesh)
    sources, share = open_sources(config)
    held_out = open_held_out(config, share, sources, generative)
    pairs = open_pairs(config, generative)
    total_steps = _total_steps(config, sources)
    _check_begun(home, config, total_steps, sources)
    workdir = local_workdir(home, "*.jsonl", jax.process_index())
    checkpoint = open_checkpoint(config.model.path)
    processor, layout = open_layout(config, sources, checkpoint, generative)
    training = Training.build(config, checkpoint, total_steps, mesh)
    check_dimensions(config, checkpoint)
    _print_summary(config, home, mesh, sources, training, total_steps)
    towers = towers_for(checkpoint, sources, held_out, media)
    if training.tune.trains_towers:
        towers = list(checkpoint.towers)
    model, params = load(config, checkpoint, mesh, towers, generative)
    return Job(
        config=config,
        home=home,
        workdir=workdir,
        mesh=mesh,
        checkpoint=checkpoint,
        sources=sources,
        processor=processor,
        layout=layout,
        training=training,
        model=model,
        params=params,
        held_out=held_out,
        pairs=pairs,
        total_steps=total_steps,
        usage=usage_of_run(config, checkpoint),
    )


def _check_begun(
    home: AnyPath, config: ConfigDict, total_steps: int, sources: Mapping[str, Source]
) -> None:
    """Raise if the folder holds another run."""
    with reaching(home):
        if has_begun(home):
            check_same_run(home, config, total_steps, fingerprints(config, sources))


def _total_steps(config: ConfigDict, sources: Mapping[str, Source]) -> int:
    """Those that are given, or those of the epochs."""
    if config.train.steps:
        return config.train.steps
    records = sum(map(len, sources.values()))
    return max(int(config.train.epochs * records / config.train.batch_size), 1)


def _say_warmup(config: ConfigDict, total_steps: int) -> None:
    """That the warm-up is shorter than the configuration has it, if it is."""
    given, taken = config.optimizer.warmup_steps, warmup_steps(config, total_steps)
    if taken < given:
        more = "a smaller config.train.batch_size makes more"
        say(
            f"warm-up of {taken:,} steps and not {given:,}, since there are {total_steps:,}; {more}"
        )


def _media_config(config: ConfigDict) -> MediaConfig:
    """The caps on media. Raises by the key of what is none."""
    given = config.data.media
    check_keys(given, [field.name for field in fields(MediaConfig)], "config.data.media")
    try:
        return MediaConfig(**given)
    except LcoError as error:
        raise LcoError(f"config.data.{error}") from error


def fingerprints(config: ConfigDict, sources: Mapping[str, Source]) -> dict[str, str]:
    """What tells the records of each source, and the guide of the loss by its key, from others."""
    found = {name: fingerprint(source) for name, source in sources.items()}
    if config.loss.guide:
        found[KEY] = guide_fingerprint(config.loss.guide)
    return found


def open_data(
    config: ConfigDict, checkpoint: Checkpoint
) -> tuple[dict[str, Source], Processor, pipeline.Layout]:
    """The sources of a run, and what `open_layout` makes for them."""
    sources = open_sources(config).training
    return sources, *open_layout(config, sources, checkpoint)


def open_sources(config: ConfigDict) -> Split:
    """The sources of a run, and what `config.eval.share` holds out of them.

    Raises where the loss learns from a teacher and no record has its scores.
    """
    found = split(record_stream.open_sources(config.data), config.eval.share)
    teacher = config.loss.teacher
    if teacher and not any(source.has_teacher for source in found.training.values()):
        raise LcoError(
            f"config.loss.teacher is {teacher!r}, and no record has teacher_scores: a "
            "list of numbers, of the positive and of each negative"
        )
    return found


def open_layout(
    config: ConfigDict,
    sources: Mapping[str, Source],
    checkpoint: Checkpoint,
    generative: bool = False,
) -> tuple[Processor, pipeline.Layout]:
    """The processor of a run's inputs, and the layout, without shapes yet."""
    processor = Processor(
        checkpoint.folder,
        checkpoint.config.max_position_embeddings,
        _media_config(config),
        modalities=checkpoint.backbone.modalities,
    )
    max_negatives = max(source.max_negatives for source in sources.values())
    if config.data.max_negatives >= 0:
        max_negatives = min(max_negatives, config.data.max_negatives)
    if config.train.batch_size == 1 and not max_negatives and not generative:
        raise LcoError(
            "config.train.batch_size is 1, and no record has a negative: there is nothing to tell "
            "a positive from; give a larger batch, or records with negatives"
        )
    by_source = instructions_by_source(config)
    instructions = tuple(dict.fromkeys(chain(*by_source.values()))) or (None,)
    if by_source:
        processor.tokenizer.check_place(config.instructions.place)
    layout = pipeline.Layout(
        batch_size=config.train.batch_size,
        max_negatives=max_negatives,
        prefix=processor.tokenizer.prefixes(instructions),
        instructions=instructions,
        chunk_tokens=config.train.chunk_tokens,
        on_bad=config.data.on_bad,
        generative=generative,
        teacher=bool(config.loss.teacher) and not generative,
        guide=None if generative else open_guide(config.loss.guide, sources, config.data.on_bad),
    )
    return processor, layout


def batches_of(
    config: ConfigDict, sources: Mapping[str, Source], layout: pipeline.Layout, processor: Processor
) -> grain.MapDataset:
    """This process's share of each global batch of a run.

    Contrastive training wants a record once in a batch; it logs what the data do not allow.
    """
    weights = mixture.weights_of(config.data, sources)
    one_source = len(sources) == 1 or config.data.batches == "homogeneous"
    run = layout.batch_size if config.data.batches == "homogeneous" else config.data.sub_batch
    once = 0 if layout.generative else layout.batch_size
    instructions = instructions_by_source(config)
    numbers = mixture.content_numbers(sources, config.data.keep_apart if once else "")
    stream = record_stream.record_stream(
        sources, weights, config.seed, run, once, instructions=instructions, numbers=numbers
    )
    if once and jax.process_index() == 0:
        ignores, size = config.train.ignore_duplicates, layout.batch_size
        for line in mixture.repeats(sources, weights, size, one_source, numbers, ignores):
            logger.warning("%s", line)
    return pipeline.local_batches(stream, layout, processor, config.data.max_length)


def say(line: str, metrics: Mapping[str, Any] | None = None) -> None:
    """Tell people something, once for all processes. metrics: as of `console.say`."""
    if jax.process_index() == 0:
        console.say(line, metrics)


def held_out_progress(when: str, total: int = 0) -> tqdm:
    """A bar of inputs that are held out. Whoever finds more of them adds to its total."""
    return console.progress_bar(
        desc=f"held out, {when}",
        total=total,
        unit=" inputs",
        leave=False,
        disable=jax.process_index() != 0,
    )


def _print_summary(
    config: ConfigDict,
    home: AnyPath,
    mesh: Mesh,
    sources: Mapping[str, Source],
    training: Training,
    total_steps: int,
) -> None:
    """The model, how it is trained, the devices and the data."""
    method = config.tune.decoder
    if method == "lora":
        method = f"LoRA of rank {config.lora.rank}"
    trainable = f"{tuning.count(training.tuned):,} trainable parameters"
    say(f"{config.model.path}: {method}, {trainable}")
    records = sum(map(len, sources.values()))
    steps = f"{total_steps:,} steps of {config.train.batch_size}"
    devices = f"{mesh.size} × {jax.devices()[0].device_kind}"
    say(f"{records:,} records, {steps}, on {devices}: {home}")
    logger.debug("mesh %s", dict(mesh.shape))
    skipped = sum(source.skipped for source in sources.values())
    if skipped:
        say(f"{skipped:,} bad records skipped")
    _say_warmup(config, total_steps)
