"""`OmniEmbedder`: a checkpoint, and perhaps an adapter, as a function from inputs to unit vectors.

Dimensions: N inputs, n inputs of a block, D hidden, L layers.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import chain, pairwise
from typing import Any, Self, TypeVar

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from tqdm import tqdm

from lco_jax.arguments import check_on_error, check_options, check_passes, check_types
from lco_jax.checkpoint import peft
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.checkpoint.usage import usage_of
from lco_jax.core import lora
from lco_jax.core.console import progress_bar
from lco_jax.core.errors import LcoError, check_at_least_1, check_bool
from lco_jax.core.finite import check_results, check_vectors
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import make_mesh, replicated, row_shards
from lco_jax.data.inference import (
    BLOCK_INPUTS,
    MAX_TOKENS,
    EmbeddedBlock,
    InferenceBatch,
    ShapeRule,
    batches_of,
    blocks_of,
    pack_on_mesh,
)
from lco_jax.data.inputs import Preparation, as_list, check_several, named, one_ahead, prepare_ahead
from lco_jax.data.instructions import Instructions
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer, Prompt
from lco_jax.data.tower_rows import Processed
from lco_jax.description import Origin, described
from lco_jax.models.model import MediaPrograms, Model
from lco_jax.models.pooling import pool_or_layers
from lco_jax.processing import processor_of
from lco_jax.sentence_methods import SentenceMethods
from lco_jax.vector_form import VectorForm, unit

logger = logging.getLogger(__name__)
T = TypeVar("T")


class OmniEmbedder(SentenceMethods):
    """Embeds text, images, audio, video and any mix of them. Build one with `from_pretrained`.

    skipped: index -> why, for the inputs that the last `encode(…, on_error="skip")` skipped.
    """

    LOADS_HEAD = False  # whether `from_pretrained` loads the vocabulary head

    def __init__(
        self,
        model: Model,
        params: dict[str, Any],
        processor: Processor,
        mesh: Mesh,
        instructions: Instructions | None = None,
    ):
        super().__init__(instructions)
        self.model, self.params = model, params
        self.processor, self.mesh = processor, mesh
        self.origin: Origin | None = None
        self.skipped: dict[int, str] = {}
        self.shape_of: ShapeRule | None = None  # of passes; a server has its own
        self.towers = MediaPrograms(model, mesh)
        self.decoder_shapes = ShapeLog("decoder")
        pool = partial(pool_or_layers, model.decoder)
        self._pool = jax.jit(pool, static_argnums=3, out_shardings=replicated(mesh))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None = None,
        dtype: Any = "float32",
        mesh: Mesh | None = None,
        *,
        modalities: Iterable[str] | None = None,
        media: MediaConfig | None = None,
        video_positions: str = "4.57",
        quantize: str = "",
        attention: str = "auto",
        pooling: str | None = None,
    ) -> Self:
        """Load a checkpoint folder or hub id; merge a PEFT adapter into it (in float32) if given.

        dtype: "float32" or "bfloat16", or jax's dtype of that name, for weights and activations.
            Embeddings are float32 with both.
        mesh: from `lco_jax.make_mesh`; by default each device of this process has a whole copy.
        modalities: what will be embedded, by default all that the checkpoint takes; ("text",) loads
            no tower.
        media: caps on images, sound and video (`lco_jax.MediaConfig`).
        video_positions: the rule for Qwen2.5-VL's video positions, by version of transformers:
            "4.57", with which LCO was trained, or "5".
        quantize: "int8" or "nf4" stores the decoder's matrices in fewer bits. An adapter is then
            applied beside them.
        attention: the kernel, as `models.attention.attention` has it.
        pooling: "last" or "mean" (`models/pooling.py`); by default as the folder of the adapter or
            checkpoint says, which also has the prompts of its training.
        """
        check_types(path_or_id, adapter, mesh, media)
        checkpoint = open_checkpoint(path_or_id)
        adapted = None
        if adapter is not None:
            adapted = peft.read_adapter(adapter, checkpoint, head=cls.LOADS_HEAD)
        usage = usage_of(checkpoint, adapter, pooling)
        mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
        processor = processor_of(checkpoint, modalities, media, video_positions)
        model, params = load_model(
            checkpoint,
            mesh,
            dtype,
            checkpoint.backbone.towers_for(processor.modalities),
            head=cls.LOADS_HEAD,
            remat="none",
            quantize=quantize,
            attention=attention,
            pooling=usage.pooling,
        )
        if adapted is not None:
            params = lora.with_adapters(params, *adapted, mesh, beside=bool(quantize))
        processor.tokenizer.check_place(usage.instructions.place)
        embedder = cls(model, params, processor, mesh, usage.instructions)
        embedder.truncate_dim = usage.truncate_dim
        merged = None if adapter is None else str(adapter)
        embedder.origin = Origin(str(path_or_id), checkpoint.backbone.model_type, merged, quantize)
        return embedder

    def __repr__(self) -> str:
        return described(self)

    @property
    def dimension(self) -> int:
        """D."""
        return self.model.decoder.config.hidden_size

    @property
    def tokenizer(self) -> ChatTokenizer:
        """The checkpoint's tokenizer and chat template."""
        return self.processor.tokenizer

    @property
    def modalities(self) -> tuple[str, ...]:
        """What can be embedded: "text", and which of "image", "video", "audio" there are."""
        return self.processor.modalities

    def encode(
        self,
        inputs: Any,
        prompt_name: str | None = None,
        prompt: Prompt | None = None,
        batch_size: int | None = None,
        show_progress_bar: bool | None = None,
        output_value: str = "sentence_embedding",
        precision: str | None = "float32",
        convert_to_numpy: bool = True,
        convert_to_tensor: bool = False,
        device: Any = None,
        normalize_embeddings: bool = True,
        truncate_dim: int | None = None,
        *,
        max_length: int | None = None,
        on_error: str = "raise",
        workers: int = 0,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
        names: Sequence[str] | None = None,
        ranges: Any = None,
        **others: Any,
    ) -> Any:
        """Embed a list of inputs of any kinds -> float32 [N, D], in their order; one input -> [D].

        An input is a string, a PIL image, an array, a path or URL of a media file, {"text": …,
        "image": …, "audio": …, "video": …} with any of these, {"array": …, "sampling_rate": …} or
        {"array": …, "fps": …}, or a list of chat messages. Every input but messages gets `prompt`,
        or the one called `prompt_name` in `prompts`, or the default's if there is one. It stands at
        `prompt_place`, by default after the input in the place of the reference's prompt.

        batch_size: the most inputs in a forward pass (None: any number). max_tokens: the most
            tokens of a device in it, unless one input has more. They change the speed, and vectors
            by rounding alone (3e-7 in float32, 3e-3 in bfloat16).
        show_progress_bar: None shows none.
        normalize_embeddings: vectors have unit length; if False, they are the final norm's output.
        precision, ranges, truncate_dim, convert_to_…: as `VectorForm` has them.
        output_value, device: "sentence_embedding", and the devices that the model is on.
        max_length: cut texts to so many tokens before the prompt (the reference's evaluation cuts
            at 300). By default nothing is cut, and an input beyond the model's context raises.
        on_error: "raise", or "skip": a bad input's vector is NaN, and `skipped` says why.
        workers: processes that prepare media while the device computes; 0: threads.
        progress: a bar to advance, instead of a new one.
        names: what errors call the inputs, by default "input 0" and so on.
        """
        check_options(others, output_value, device, self.mesh)
        show = False if show_progress_bar is None else show_progress_bar
        check_bool(show_progress_bar=show)
        width = self.truncate_dim if truncate_dim is None else truncate_dim
        form = VectorForm(
            normalize_embeddings, precision, width, convert_to_numpy, convert_to_tensor, ranges
        )
        items, single = as_list(inputs)
        form.check(len(items), self.dimension, on_error == "skip")
        bar = progress
        if progress is None:
            bar = progress_bar(total=len(items), desc="embedding", unit="input", disable=not show)
        blocks = self.encode_blocks(
            items,
            batch_size,
            normalize_embeddings,
            prompt=prompt,
            prompt_name=prompt_name,
            max_length=max_length,
            on_error=on_error,
            workers=workers,
            max_tokens=max_tokens,
            progress=bar,
            names=names,
        )
        vectors = self._gathered(blocks, len(items))
        if progress is None:
            bar.close()
        return form.of(vectors, single)

    def _gathered(self, blocks: Iterable[EmbeddedBlock], count: int) -> np.ndarray:
        """The vectors of all blocks, [N, D]. Sets `skipped`."""
        vectors = np.zeros((count, self.dimension), np.float32)
        skipped = {}
        for block in blocks:
            vectors[block.first : block.first + len(block.vectors)] = block.vectors
            skipped |= block.skipped
        self.skipped = skipped
        return vectors

    def encode_blocks(
        self,
        inputs: Iterable[Any],
        batch_size: int | None = None,
        normalize_embeddings: bool = True,
        *,
        prompt: Prompt | None = None,
        prompt_name: str | None = None,
        max_length: int | None = None,
        on_error: str = "raise",
        workers: int = 0,
        max_tokens: int = MAX_TOKENS,
        block_inputs: int = BLOCK_INPUTS,
        units: Iterator[int] | None = None,
        progress: tqdm | None = None,
        names: Iterable[str] | None = None,
    ) -> Iterator[EmbeddedBlock]:
        """As `encode`, for any number of inputs in bounded memory: their vectors, block by block.

        block_inputs: the most inputs of a block. units: numbers of inputs; no block has inputs of
            two units, and each number is asked for when the unit's first input is prepared.
        Blocks depend on these and on the inputs, never on time.
        """
        check_at_least_1(batch_size=batch_size, block_inputs=block_inputs)
        check_bool(normalize_embeddings=normalize_embeddings)
        check_passes(max_tokens, progress)
        check_on_error(on_error)
        check_several(inputs)
        preparation = self.preparation(prompt_name, prompt, max_length)
        prepared = prepare_ahead(preparation, named(inputs, names), workers)
        shards = row_shards(self.mesh)
        blocks = blocks_of(prepared, block_inputs, on_error == "raise", units, shards)
        first = 0
        for ready in one_ahead(blocks):
            block = self._embed_block(first, ready, batch_size, max_tokens, progress)
            if normalize_embeddings:
                block.vectors = unit(block.vectors)
            yield block
            first += len(ready)

    def _embed_block(
        self,
        first: int,
        ready: list[Processed | LcoError],
        batch_size: int | None,
        max_tokens: int,
        progress: tqdm | None,
    ) -> EmbeddedBlock:
        """Embed inputs that are ready. first: the index of the first of them."""
        good, skipped = [], {}
        for i, one in enumerate(ready):
            if isinstance(one, LcoError):
                skipped[first + i] = str(one)
                logger.warning("skipped: %s", one)
            else:
                good.append(i)
        vectors = np.full((len(ready), self.dimension), np.nan, np.float32)
        vectors[good] = self.embed([ready[i] for i in good], batch_size, max_tokens, progress)
        if progress is not None:
            progress.update(len(skipped))
        return EmbeddedBlock(first, vectors, skipped)

    def embed(
        self,
        ready: Sequence[Processed],
        batch_size: int | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
        of: str = "pooled",
    ) -> np.ndarray:
        """Inputs, as `processor` returns them -> the final norm's output, pooled, float32 [N, D].

        of: "layers" for the last token's states before and after each layer: [N, L + 1, D].
        """
        layers = (self.model.decoder.config.num_layers + 1,) if of == "layers" else ()
        size = (*layers, self.dimension)
        vectors = np.zeros((len(ready), *size), np.float32)

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            media = self._media_tokens(batch)
            return self._pool(self.params, batch.tokens, media, of), batch.slots

        for inputs, (pooled, slots) in self._run(ready, start, batch_size, max_tokens, progress):
            vectors[inputs] = np.asarray(pooled).reshape(-1, *size)[slots]
        check_results(vectors.reshape(len(ready), -1), self.params, self.model.decoder.dtype)
        check_vectors(vectors[..., -1, :] if layers else vectors)
        return vectors

    def encode_layers(
        self,
        inputs: Sequence[Any],
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
    ) -> np.ndarray:
        """The state of each input's last token before and after each layer: float32 [L + 1, N, D].

        The last is after the final norm, as in transformers' `hidden_states`; none is normalized.
        inputs and options: as `encode` has them.
        """
        check_passes(max_tokens, progress)
        ready = self._prepare(inputs, self.preparation(None, prompt, max_length))
        states = self.embed(ready, None, max_tokens, progress, of="layers")
        return np.moveaxis(states, 1, 0)

    def _prepare(self, inputs: Sequence[Any], preparation: Preparation) -> list[Processed]:
        """Prepare all inputs at once. Raises the error of the first bad one."""
        items, _ = as_list(inputs)
        ready = []
        for one in prepare_ahead(preparation, named(items, None), workers=0):
            if isinstance(one, LcoError):
                raise one
            ready.append(one)
        return ready

    def _run(
        self,
        ready: Sequence[Processed],
        start: Callable[[InferenceBatch], T],
        batch_size: int | None,
        max_tokens: int,
        progress: tqdm | None,
    ) -> Iterator[tuple[list[int], T]]:
        """For each batch: (the indices of its inputs, what `start` returned for it).

        A batch is yielded when the next one is started, so that the devices always have work.
        """
        started = self._started(ready, start, batch_size, max_tokens)
        for one, _ in pairwise(chain(started, [None])):
            yield one
            if progress is not None:
                progress.update(len(one[0]))

    def _started(
        self,
        ready: Sequence[Processed],
        start: Callable[[InferenceBatch], T],
        batch_size: int | None,
        max_tokens: int,
    ) -> Iterator[tuple[list[int], T]]:
        for members in batches_of(ready, batch_size, max_tokens, row_shards(self.mesh)):
            with jax.set_mesh(self.mesh):
                batch = pack_on_mesh(ready, members, self.processor.rows, self.mesh, self.shape_of)
                results = start(batch)
            yield batch.inputs, results

    def _media_tokens(self, batch: InferenceBatch) -> Array | None:
        """Start the towers on a batch's media."""
        media = self.towers(self.params, batch.media)
        self.decoder_shapes.note(batch.tokens, media)
        return media
