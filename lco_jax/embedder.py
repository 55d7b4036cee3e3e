"""`OmniEmbedder`: a checkpoint, and perhaps an adapter, as a function from inputs to unit vectors.

Dimensions: N inputs, D hidden, R streams, S sequences of a stream.
"""

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from PIL import Image
from tqdm import tqdm

from lco_jax.checkpoint import peft
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.packing import Shape, bucket, common_length, fill, lay_stream, spread, width_of
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import ROWS, make_mesh, replicated, row_shards, shardings
from lco_jax.data.inputs import Preparation, named, one_ahead, prepare_ahead
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor, lay_media
from lco_jax.data.prompts import ChatTokenizer
from lco_jax.data.tower_rows import Processed
from lco_jax.models.decoder import pool
from lco_jax.models.model import MediaPrograms, Model

MAX_TOKENS = 16_384  # in one forward pass, unless a single input has more
FINE = 4096  # tokens beyond which a pass is padded by an eighth at most, and not by half
BLOCK_INPUTS, BLOCK_BYTES = 8192, 2**27  # inputs sorted by length and embedded together: at most so many, so large
logger = logging.getLogger(__name__)


@dataclass
class Block:
    """Consecutive inputs' vectors. first: index of the first; vectors: float32 [n, D]; skipped: {index: why}.

    A skipped input's vector is NaN.
    """

    first: int
    vectors: np.ndarray
    skipped: dict[int, str] = field(default_factory=dict)


class OmniEmbedder:
    """Embeds text, images, audio, video and any mix of them. Build one with `from_pretrained`.

    skipped: {index: why} of the inputs that the last `encode(…, on_error="skip")` could not embed.
    """

    def __init__(self, model: Model, params: dict[str, Any], processor: Processor, mesh: Mesh):
        self.model, self.params, self.processor, self.mesh = model, params, processor, mesh
        self.skipped: dict[int, str] = {}
        self.towers, self.decoder_shapes = MediaPrograms(model, mesh), ShapeLog("decoder")
        decoder = model.decoder
        self._pool = jax.jit(
            lambda params, tokens, media: pool(decoder, params["decoder"], tokens, media),
            out_shardings=replicated(mesh),
        )

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
    ) -> "OmniEmbedder":
        """Load a checkpoint folder or hub id, with a PEFT adapter merged in (in float32) if one is given.

        dtype: "float32" or "bfloat16", or jax's dtype of that name: of the weights and the activations; embeddings are
        float32 either way.
        mesh: from `lco_jax.make_mesh`; by default one copy of the model on every device.
        modalities: what will be embedded, by default all that the checkpoint takes; ("text",) loads no tower.
        media: caps on images, sound and video (`lco_jax.MediaConfig`).
        video_positions: whose rule Qwen2.5-VL's video positions follow: transformers "4.57", with which LCO was
        trained, or "5".
        quantize: "int8" or "nf4", to hold the decoder's matrices in fewer bits; an adapter then stays beside them.
        attention: the kernel, as of `models.attention.attention`.
        """
        checkpoint = open_checkpoint(path_or_id)
        mesh = make_mesh() if mesh is None else mesh
        known = checkpoint.backbone.modalities
        chosen = known if modalities is None else _chosen(modalities, known)
        context = checkpoint.config.max_position_embeddings
        processor = Processor(checkpoint.folder, context, media, video_positions, chosen)
        towers = [name for name, kinds in checkpoint.backbone.reads.items() if set(kinds) & set(processor.modalities)]
        model, params = load_model(
            checkpoint, mesh, dtype, towers, remat="none", quantize=quantize, attention=attention
        )
        if adapter is not None:
            adapters, config = peft.read_peft(adapter)
            decoder = params["decoder"]
            adapters, config = peft.fit(adapters, decoder, str(adapter)), replace(config, dropout=0.0)
            join = lora.attach if quantize else lora.merge
            places = None if quantize else shardings(decoder, mesh)
            join = jax.jit(join, static_argnums=2, donate_argnums=0, out_shardings=places)
            params["decoder"] = join(decoder, adapters, config)
        return cls(model, params, processor, mesh)

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
        """What can be embedded: "text", and of "image", "video", "audio" what the checkpoint takes."""
        return self.processor.modalities

    def supports(self, modality: str | Sequence[str]) -> bool:
        """Whether a modality, or a mix of several in one input, can be embedded. "message": chat messages can."""
        return set([modality] if isinstance(modality, str) else modality) <= {*self.modalities, "message"}

    def encode(
        self,
        inputs: Any,
        batch_size: int | None = None,
        normalize: bool = True,
        show_progress: bool = False,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        on_error: str = "raise",
        workers: int = 0,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Embed a list of inputs, in any mixture -> float32 [N, D], in input order; a single input gives [D].

        An input is a string, a PIL image, an array, a path or URL of a media file, {"text": …, "image": …, "audio": …,
        "video": …} with any of these, {"array": …, "sampling_rate": …} or {"array": …, "fps": …}, or a list of chat
        messages. All but messages get the reference's prompt for their modality (or `prompt`); messages are rendered as
        they are.

        batch_size, max_tokens: the most inputs (None: any number), and tokens, in one forward pass: they change the
        speed, not a vector.
        normalize: unit length; the hidden state as the final norm left it when False.
        max_length: cut texts to so many tokens before the prompt (the reference's evaluation cuts at 300); by
        default nothing is cut, and an input longer than the model's context raises.
        on_error: "raise", or "skip": a bad input's vector is NaN, and `skipped` says why.
        workers: processes that prepare media while the device computes; 0: threads of this process.
        progress: a bar of the caller's to advance, in the place of one of our own.
        names: what errors call the inputs (a file and line, say); by default "input 0" and so on.
        """
        if not isinstance(inputs, Iterable | os.PathLike | Image.Image):
            raise LcoError(f"inputs is {type(inputs).__name__}; give a list of inputs, or a single one")
        single = _is_single(inputs)
        items = [inputs] if single else list(inputs)
        bar = (
            progress
            if progress is not None
            else tqdm(  # an empty one is false
                total=len(items), desc="embedding", unit="input", disable=not show_progress
            )
        )
        options = {"prompt": prompt, "max_length": max_length, "on_error": on_error, "workers": workers}
        options |= {"max_tokens": max_tokens, "progress": bar, "names": names}
        blocks = self.encode_blocks(items, batch_size, normalize, **options)
        vectors, skipped = np.zeros((len(items), self.dimension), np.float32), {}
        for block in blocks:
            vectors[block.first : block.first + len(block.vectors)] = block.vectors
            skipped |= block.skipped
        self.skipped = skipped
        if progress is None:
            bar.close()
        return vectors[0] if single else vectors

    def encode_blocks(
        self,
        inputs: Iterable[Any],
        batch_size: int | None = None,
        normalize: bool = True,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        on_error: str = "raise",
        workers: int = 0,
        max_tokens: int = MAX_TOKENS,
        block_inputs: int = BLOCK_INPUTS,
        progress: tqdm | None = None,
        names: Iterable[str] | None = None,
    ) -> Iterator[Block]:
        """As `encode`, for any number of inputs in bounded memory: consecutive `Block`s as they are ready.

        block_inputs: the most inputs in a block. Where blocks end depends on it and on the inputs, and not on time.
        """
        for name, value in (("batch_size", batch_size), ("max_tokens", max_tokens), ("block_inputs", block_inputs)):
            if value is not None and value < 1:
                raise LcoError(f"{name} is {value}; it must be at least 1")
        if on_error not in ("raise", "skip"):
            raise LcoError(f"on_error is {on_error!r}; it is one of: raise, skip")
        preparation = Preparation(self.processor, prompt, max_length)
        prepared = prepare_ahead(preparation, named(inputs, names), workers)
        first = 0
        for ready in one_ahead(_gather(prepared, block_inputs, raises=on_error == "raise")):
            yield self._block(first, ready, batch_size, max_tokens, normalize, progress)
            first += len(ready)

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines of every row of a [N, D] with every row of b [M, D] -> [N, M]; a single vector counts as one row."""
        a, b = (_unit(np.atleast_2d(np.asarray(x, np.float32))) for x in (a, b))
        return a @ b.T

    def _block(
        self,
        first: int,
        ready: list[Processed | LcoError],
        batch_size: int | None,
        max_tokens: int,
        normalize: bool,
        progress: tqdm | None,
    ) -> Block:
        """Embed what is ready."""
        vectors = np.full((len(ready), self.dimension), np.nan, np.float32)
        skipped = {first + i: str(one) for i, one in enumerate(ready) if isinstance(one, LcoError)}
        good = [i for i, one in enumerate(ready) if not isinstance(one, LcoError)]
        vectors[good] = self.embed([ready[i] for i in good], batch_size, max_tokens, progress)
        for reason in skipped.values():
            logger.warning("skipped: %s", reason)
        if progress is not None:
            progress.update(len(skipped))
        return Block(first, _unit(vectors) if normalize else vectors, skipped)

    def embed(
        self,
        ready: Sequence[Processed],
        batch_size: int | None = None,
        max_tokens: int = MAX_TOKENS,
        progress: tqdm | None = None,
    ) -> np.ndarray:
        """Inputs as `processor` hands them over -> hidden states as the final norm left them, float32 [N, D]."""
        vectors = np.zeros((len(ready), self.dimension), np.float32)
        order = sorted(range(len(ready)), key=lambda i: (-width_of(len(ready[i])), ready[i].input_ids.tobytes()))
        waiting: tuple[list[int], np.ndarray, Array] | None = None
        with jax.set_mesh(self.mesh):
            for chosen in [*_batches(order, ready, batch_size, max_tokens), None]:
                started = None if chosen is None else (chosen, *self._start([ready[i] for i in chosen]))
                if waiting is not None:
                    indices, which, pooled = waiting
                    vectors[indices] = np.asarray(pooled).reshape(-1, self.dimension)[which]
                    if progress is not None:
                        progress.update(len(indices))
                waiting = started
        return vectors

    def _start(self, batch: list[Processed]) -> tuple[np.ndarray, Array]:
        """Pack a batch and start its forward pass: which sequence each input is, and all vectors [R · S, D] to come.

        Sizes take few values, so that few programs are compiled.
        """
        shards = row_shards(self.mesh)
        bins = spread(map(len, batch), shards)
        members = [np.flatnonzero(bins == shard) for shard in range(shards)]
        media, laid, _ = lay_media(self.processor.rows, [[batch[i] for i in chosen] for chosen in members])
        streams = [lay_stream(sequences, head=None) for sequences in laid]
        length, count = max(one.length for one in streams), max(map(len, members))
        width = width_of(max(map(len, batch)))  # one width for all: fewer programs, and the batch is alike in length
        shape = Shape(bucket(length, 8 if length > FINE else 2), {width: bucket(count, 2)})
        tokens, became = fill(streams, members, shape, head=None)
        which = np.zeros(len(batch), np.int64)
        for shard, (chosen, slots) in enumerate(zip(members, became, strict=True)):
            which[chosen] = shard * tokens.last_tokens.shape[1] + slots
        split = NamedSharding(self.mesh, PartitionSpec(ROWS))
        tokens, media = jax.tree.map(
            lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index]), (tokens, media())
        )
        media = self.towers(self.params, media)
        self.decoder_shapes.note(tokens, media)
        return which, self._pool(self.params, tokens, media)


def _gather(
    prepared: Iterator[Processed | LcoError], block_inputs: int, raises: bool
) -> Iterator[list[Processed | LcoError]]:
    """Blocks of at most so many inputs and, but for a single large one, bytes."""
    ready: list[Processed | LcoError] = []
    held = 0
    for one in prepared:
        if isinstance(one, LcoError) and raises:
            raise one
        ready.append(one)
        held += 0 if isinstance(one, LcoError) else sum(placed.item.values.nbytes for placed in one.media)
        if len(ready) >= block_inputs or held >= BLOCK_BYTES:
            yield ready
            ready, held = [], 0
    if ready:
        yield ready


def _batches(order: list[int], ready: Sequence[Any], batch_size: int | None, max_tokens: int) -> Iterator[list[int]]:
    """Runs of `order` of at most so many inputs and, but for a single long one, tokens that they do not share.

    Short inputs join long ones, whose width their rows of attention then have, only where that costs little.
    """
    batch: list[int] = []
    tokens = width = 0
    for i in order:
        ids, before = ready[i].input_ids, ready[batch[-1]] if batch else None
        shared = common_length(ids, before.input_ids) if before and not (before.media or ready[i].media) else 0
        costly = width_of(len(ids)) < width and (len(batch) + 1) * width > 2 * (tokens + FINE)
        if batch and (len(batch) == batch_size or tokens + len(ids) - shared > max_tokens or costly):
            yield batch
            batch, tokens, shared = [], 0, 0
        width = width if batch else width_of(len(ids))
        batch.append(i)
        tokens += len(ids) - shared
    if batch:
        yield batch


def _chosen(modalities: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = set(modalities) | {"text"}
    if unknown := chosen - set(known):
        raise LcoError(f"modalities has {min(unknown)!r}; this checkpoint takes {', '.join(known)}")
    return tuple(kind for kind in known if kind in chosen)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _is_single(inputs: Any) -> bool:
    """Whether this is one input rather than a list of them."""
    if isinstance(inputs, np.ndarray):
        return inputs.ndim > 1  # else a list of strings
    if isinstance(inputs, str | Mapping | os.PathLike | Image.Image):
        return True
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(x, dict) and "role" in x for x in inputs)
