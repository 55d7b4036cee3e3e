"""An embedder as `mteb` 2.x takes it (its EncoderProtocol), and the tasks that it is measured on.

Media are taken as the files that a data set holds, and `lco_jax.data` decodes them under its caps.
So frames and samples do not depend on mteb's decoders, and neither torchcodec nor torchaudio is
needed. Prompts are the reference's, by modality, and those that the model was trained with, for
queries and documents. The tasks' own prompts in mteb are not used, because the model was trained
without them; a user may give some.
"""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import disable_progress_bars
from mteb.abstasks import AbsTask
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder

from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError, reason
from lco_jax.data.arrays import decoder_kind
from lco_jax.data.media import MediaConfig
from lco_jax.data.prompts import KINDS
from lco_jax.data.video import frames_of_decoder
from lco_jax.evaluation.report import TaskScore
from lco_jax.evaluation.seadoc import SeaDoc
from lco_jax.evaluation.stored_vectors import StoredVectors, digest

# `OmniEmbedder.encode_blocks`, of contents, progress=, names= and prompt=
EncodeBlocks = Callable[..., Iterator[Any]]
MTEB_VERSION = mteb.__version__


def model_meta(
    name: str,
    revision: str,
    settings: Mapping[str, Any],
    **known: Any,
) -> ModelMeta:
    """What mteb records about a model.

    name: owner/name. revision: of the weights. settings: all else that scores depend on, such as
    the caps on frames and sound; they name a folder of the results, and model_meta.json has them
    under experiment_kwargs. known: other fields of `ModelMeta`; those not given are None.
    """
    fields = {key: None for key, field in ModelMeta.model_fields.items() if field.is_required()}
    fields |= {
        "name": name,
        "revision": revision,
        "framework": ["JAX"],
    }
    fields |= {
        "similarity_fn_name": "cosine",
        "use_instructions": True,
    }
    return ModelMeta(**{**fields, "experiment_kwargs": dict(settings), **known})


def find_tasks(benchmark: str | None, tasks: str | None, seadoc: str | None) -> list[AbsTask]:
    """The tasks that one of these flags names. Raises for an unknown name, with the nearest one."""
    if seadoc:
        return [SeaDoc(seadoc)]
    try:
        if benchmark:
            return list(mteb.get_benchmark(benchmark))
        return list(mteb.get_tasks((tasks or "").split(",")))
    except KeyError as error:  # it names the nearest
        flag = "--benchmark" if benchmark else "--tasks"
        raise LcoError(f"{flag}: {error.args[0].removeprefix('KeyError: ')}") from error


def run_task(encoder: "Encoder", task: AbsTask, out: Path) -> TaskScore:
    """Evaluate a task, or load what `out` has of it. The score of a task that fails is None."""
    about = task.metadata
    disable_progress_bars()  # one for each step of each task would hide ours
    try:
        found = mteb.evaluate(
            encoder,
            task,
            encode_kwargs={"show_progress_bar": False},
            cache=mteb.ResultCache(out),
            overwrite_strategy=_overwrite_strategy(encoder, task, out),
            show_progress_bar=False,
            co2_tracker=False,
        )
        if not found.task_results:
            raise LcoError(found.exceptions[0].exception)
    except Exception as error:  # mteb, the data sets and their libraries raise whatever they like
        if encoder.running and not isinstance(error, LcoError):
            traceback.print_exc()  # a bug of ours, or of jax
        return TaskScore(
            about.name,
            about.type,
            reason=f"not measured: {reason(error)}",
        )
    (result,) = found.task_results
    parts = {}
    if about.name == "SeaDoc":
        prefix = f"{about.main_score}_"
        scores = result.scores["test"][0].items()
        parts = {key[len(prefix) :]: 100 * x for key, x in scores if key.startswith(prefix)}
    return TaskScore(
        about.name,
        about.type,
        100 * float(result.get_score()),
        parts=parts,
    )


def _overwrite_strategy(encoder: "Encoder", task: AbsTask, out: Path) -> str:
    """mteb's: results of the same data are completed, all others are made again."""
    with suppress(ValueError):  # a kill tore the file
        result = mteb.ResultCache(out).load_task_result(task.metadata.name, encoder.mteb_model_meta)
        if result is not None and result.dataset_revision == task.metadata.revision:
            return "only-missing"
    return "always"


class Encoder(AbsEncoder):
    """mteb's encoder around `encode_blocks`; every vector is stored in `stored`.

    media: the caps, for videos that come as a decoder. embedded: how many inputs were embedded so
    far. found: how many were stored already, or equal to another one. running: whether `encode`
    runs, or ended in an exception. An input that `encode_blocks` skips has a vector of zeros.
    prompts: name -> text, by mteb's names: a task or a type of tasks, perhaps with -query or
    -document, or one of these alone. The first in this order is used.
    """

    def __init__(
        self,
        encode_blocks: EncodeBlocks,
        meta: ModelMeta,
        stored: StoredVectors,
        media: MediaConfig,
        prompts: Mapping[str, str] | None = None,
    ):
        self.encode_blocks = encode_blocks
        self.mteb_model_meta = meta
        self.stored = stored
        self.media = media
        self.model_prompts = dict(prompts or {})
        self.embedded = self.found = 0
        self.running = False

    def encode(
        self,
        inputs: Any,
        *,
        task_metadata: Any,
        hf_split: str,
        hf_subset: str,
        prompt_type: Any = None,
        **_: Any,
    ) -> np.ndarray:
        """mteb's loader of rows -> unit vectors, float32 [N, D]."""
        self.running = True
        role = prompt_type.value if prompt_type else "inputs"
        where = f"{task_metadata.name} {hf_subset} {hf_split} {role}"
        name = self.get_prompt_name(task_metadata, prompt_type)
        prompt = None if name is None else self.model_prompts[name]
        rows = _undecoded(inputs.dataset)
        keys = []
        missing: dict[bytes, int] = {}  # digest -> row
        bar = progress_bar(
            range(len(rows)),
            desc=f"{where}: reading",
            unit="input",
            leave=False,
            delay=2,
        )
        for i in bar:
            extra = {} if prompt is None else {"prompt": prompt}
            key = digest(self.content(rows[i]) | extra)
            keys.append(key)
            if key not in missing and key not in self.stored:
                missing[key] = i
        if missing:
            self._embed(rows, missing, where, prompt)
        self.embedded += len(missing)
        self.found += len(keys) - len(missing)
        self.running = False
        return self.stored.vectors(keys)

    def _embed(
        self, rows: Any, missing: Mapping[bytes, int], where: str, prompt: str | None
    ) -> None:
        """Embed rows and store their vectors. missing: digest -> row."""
        keys, numbers = list(missing), list(missing.values())
        contents = (self.content(rows[i]) for i in numbers)
        names = (f"{where}, row {i}" for i in numbers)
        with progress_bar(
            total=len(missing),
            desc=where,
            unit="input",
            leave=False,
        ) as progress:
            options = {"progress": progress, "names": names, "prompt": prompt}
            for block in self.encode_blocks(contents, **options):
                end = block.first + len(block.vectors)
                self.stored.add(
                    keys[block.first : end],
                    np.nan_to_num(block.vectors),
                )

    def content(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of mteb's as `encode` takes it: what there is of text, image, video and audio."""
        return {kind: self._value(row[kind]) for kind in KINDS if row.get(kind) is not None}

    def _value(self, value: Any) -> Any:
        if isinstance(value, Mapping) and "array" not in value:  # a file in a data set
            return value["bytes"] or Path(value["path"])
        if isinstance(value, Mapping):
            return _sound(value["array"], value["sampling_rate"])
        kind = decoder_kind(value)
        if kind == "audio":
            samples = value.get_all_samples()
            return _sound(samples.data, samples.sample_rate)
        if kind == "video":
            return frames_of_decoder(value, self.media, "a video")
        return np.asarray(value) if type(value).__module__.startswith("torch") else value


def _sound(samples: Any, rate: float) -> dict[str, Any]:
    """samples: an array, or a tensor of torch's, which is an array to numpy."""
    return {
        "array": np.asarray(samples, np.float32),
        "sampling_rate": int(rate),
    }


def _undecoded(rows: Any) -> Any:
    """A data set that returns its media as files. Other rows (mteb makes some) stay as they are."""
    if hasattr(rows, "cast_column"):
        for name, feature in rows.features.items():
            if hasattr(feature, "decode"):
                rows = rows.cast_column(name, replace(feature, decode=False))
    return rows
