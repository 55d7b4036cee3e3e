"""An embedder as `mteb` 2.x takes it (its EncoderProtocol): rows of a task's data -> inputs -> cached vectors.

Media are taken as the files that a data set holds, and decoded by `lco_jax.data` under its caps: the frames and samples
do not depend on a decoder of mteb's, and neither torchcodec nor torchaudio is needed. Prompts are the reference's, by
modality, and not the tasks' own: the model was trained with no others.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import mteb
import numpy as np
from datasets import disable_progress_bars
from mteb.abstasks import AbsTask
from mteb.models import ModelMeta
from mteb.models.abs_encoder import AbsEncoder
from tqdm import tqdm

from lco_jax.core.errors import LcoError, reason
from lco_jax.data.media import MediaConfig
from lco_jax.data.prompts import KINDS
from lco_jax.data.video import frames_to_keep, sampled_indices
from lco_jax.evaluation.cache import VectorCache, digest
from lco_jax.evaluation.report import Measured
from lco_jax.evaluation.seadoc import SeaDoc

EncodeBlocks = Callable[
    ..., Iterator[Any]
]  # `OmniEmbedder.encode_blocks`, of inputs, progress= and names=
MTEB_VERSION = mteb.__version__
logger = logging.getLogger(__name__)


def model_meta(name: str, revision: str, settings: Mapping[str, Any], **known: Any) -> ModelMeta:
    """What mteb writes down of a model.

    name: owner/name. revision: of the weights. settings: all that scores depend on beside them, the caps on frames and
    sound among them; they name a folder of the results and stand in its model_meta.json, under experiment_kwargs.
    known: other fields of `ModelMeta`; those not given are None.
    """
    fields = {key: None for key, field in ModelMeta.model_fields.items() if field.is_required()}
    fields |= {
        "name": name,
        "revision": revision,
        "framework": ["JAX"],
        "similarity_fn_name": "cosine",
    }
    return ModelMeta(
        **{**fields, "use_instructions": True, "experiment_kwargs": dict(settings), **known}
    )


def find_tasks(benchmark: str | None, tasks: str | None, seadoc: str | None) -> list[AbsTask]:
    """mteb's tasks that one of these flags names. Raises for an unknown name, with the nearest."""
    if seadoc:
        return [SeaDoc(seadoc)]
    try:
        return list(
            mteb.get_benchmark(benchmark) if benchmark else mteb.get_tasks((tasks or "").split(","))
        )
    except KeyError as error:  # it names the nearest
        flag = "--benchmark" if benchmark else "--tasks"
        raise LcoError(f"{flag}: {error.args[0].removeprefix('KeyError: ')}") from None


def measure(encoder: "Encoder", task: AbsTask, out: Path) -> Measured:
    """Measure a task, or load what `out` has of it. What goes wrong is the task's own, and stands in the answer."""
    about, results, strategy = task.metadata, mteb.ResultCache(out), "always"
    with suppress(ValueError):  # of a file that a kill tore
        held = results.load_task_result(about.name, encoder.mteb_model_meta)
        if held is not None and held.dataset_revision == about.revision:
            strategy = "only-missing"
    options = {
        "cache": results,
        "overwrite_strategy": strategy,
        "show_progress_bar": False,
        "co2_tracker": False,
    }
    disable_progress_bars()  # a bar for each step of each task hides ours
    try:
        measured = mteb.evaluate(
            encoder, task, encode_kwargs={"show_progress_bar": False}, **options
        )
        if not measured.task_results:
            raise LcoError(measured.exceptions[0].exception)
    except Exception as error:
        logger.debug("%s", about.name, exc_info=True)
        return Measured(about.name, about.type, reason=f"not measured: {reason(error)}")
    result, main = measured.task_results[0], f"{about.main_score}_"
    scores = result.scores["test"][0] if about.name == "SeaDoc" else {}
    parts = {key.removeprefix(main): 100 * scores[key] for key in scores if key.startswith(main)}
    return Measured(about.name, about.type, 100 * float(result.get_score()), parts=parts)


class Encoder(AbsEncoder):
    """mteb's encoder around `encode_blocks`; every vector goes through `cache`.

    media: the caps, for videos that come as a decoder. embedded, held: inputs so far that were embedded, and that the
    cache held or that said what another did. One that `encode_blocks` skips has a vector of zeros.
    """

    def __init__(
        self, encode_blocks: EncodeBlocks, meta: ModelMeta, cache: VectorCache, media: MediaConfig
    ):
        self.encode_blocks, self.mteb_model_meta, self.cache, self.media = (
            encode_blocks,
            meta,
            cache,
            media,
        )
        self.embedded = self.held = 0

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
        """mteb's loader of rows, of which its data set is read -> unit vectors, float32 [N, D]."""
        rows = _undecoded(inputs.dataset)
        where = " ".join(
            [
                task_metadata.name,
                hf_subset,
                hf_split,
                prompt_type.value if prompt_type else "inputs",
            ]
        )
        keys, missing = [], dict[bytes, int]()
        for i in tqdm(
            range(len(rows)), desc=f"{where}: reading", unit="input", leave=False, delay=2
        ):
            keys.append(digest(self.content(rows[i])))
            if keys[-1] not in self.cache:
                missing.setdefault(keys[-1], i)
        if missing:
            new, contents = iter(missing), (self.content(rows[i]) for i in missing.values())
            names = (f"{where}, row {i}" for i in missing.values())
            with tqdm(total=len(missing), desc=where, unit="input", leave=False) as progress:
                for block in self.encode_blocks(contents, progress=progress, names=names):
                    self.cache.add(
                        list(islice(new, len(block.vectors))), np.nan_to_num(block.vectors)
                    )
        self.embedded, self.held = (
            self.embedded + len(missing),
            self.held + len(keys) - len(missing),
        )
        return self.cache.vectors(keys)

    def content(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """A row of mteb's as `encode` takes it: {"text": …, "image": …, "video": …, "audio": …}, what there is."""
        return {kind: self._medium(row[kind]) for kind in KINDS if row.get(kind) is not None}

    def _medium(self, value: Any) -> Any:
        if isinstance(value, Mapping) and "array" not in value:  # a file in a data set
            return value["bytes"] or Path(value["path"])
        if isinstance(value, Mapping):  # sound; torch's tensors are arrays to numpy
            return {
                "array": np.asarray(value["array"], np.float32),
                "sampling_rate": int(value["sampling_rate"]),
            }
        if hasattr(value, "get_all_samples"):  # torchcodec's AudioDecoder
            samples = value.get_all_samples()
            return {
                "array": np.asarray(samples.data, np.float32),
                "sampling_rate": int(samples.sample_rate),
            }
        if hasattr(value, "get_frames_at"):  # torchcodec's VideoDecoder
            total, rate = value.metadata.num_frames, float(value.metadata.average_fps)
            indices = sampled_indices(total, frames_to_keep(total, rate, self.media))
            return np.asarray(value.get_frames_at(indices.tolist()).data)
        return np.asarray(value) if type(value).__module__.startswith("torch") else value


def _undecoded(rows: Any) -> Any:
    """A data set whose media are handed over as files. Others (mteb makes some of its own) as they are."""
    if hasattr(rows, "cast_column"):
        for name, feature in rows.features.items():
            if hasattr(feature, "decode"):
                rows = rows.cast_column(name, replace(feature, decode=False))
    return rows
