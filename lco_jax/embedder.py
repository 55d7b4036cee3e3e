"""`OmniEmbedder`: a checkpoint, and perhaps an adapter, as a function from inputs to unit vectors.

Dimensions: N inputs, D hidden, L layers.
"""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
import numpy as np
from jax import Array
from jax.sharding import Mesh
from PIL import Image
from tqdm import tqdm

from lco_jax.checkpoint import peft
from lco_jax.checkpoint.hf import load_model, open_checkpoint
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.packing import PackedTokens
from lco_jax.core.shapes import ShapeLog
from lco_jax.core.sharding import make_mesh, replicated, row_shards, shardings
from lco_jax.data.inference import (
    BLOCK_INPUTS,
    MAX_TOKENS,
    InferenceBatch,
    batches_of,
    blocks_of,
    pack_on_mesh,
)
from lco_jax.data.inputs import Preparation, named, one_ahead, prepare_ahead
from lco_jax.data.media import MediaConfig
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer
from lco_jax.data.tower_rows import Processed
from lco_jax.models.decoder import Decoder, pool, project
from lco_jax.models.model import MediaPrograms, Model

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

    HEAD = (
        False  # whether `from_pretrained` loads the vocabulary head, unless it is the embeddings'
    )

    def __init__(self, model: Model, params: dict[str, Any], processor: Processor, mesh: Mesh):
        self.model, self.params, self.processor, self.mesh = model, params, processor, mesh
        self.skipped: dict[int, str] = {}
        self.towers, self.decoder_shapes = MediaPrograms(model, mesh), ShapeLog("decoder")
        decoder = model.decoder
        self._pool = jax.jit(
            lambda params, tokens, media, of: _pooled(decoder, params, tokens, media, of),
            static_argnums=3,
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
    ) -> Self:
        """Load a checkpoint folder or hub id, with a PEFT adapter merged in (in float32) if one is given.

        dtype: "float32" or "bfloat16", or jax's dtype of that name: of the weights and the activations; embeddings are
        float32 either way.
        mesh: from `lco_jax.make_mesh`; by default one copy of the model on every device of this process.
        modalities: what will be embedded, by default all that the checkpoint takes; ("text",) loads no tower.
        media: caps on images, sound and video (`lco_jax.MediaConfig`).
        video_positions: whose rule Qwen2.5-VL's video positions follow: transformers "4.57", with which LCO was
        trained, or "5".
        quantize: "int8" or "nf4", to hold the decoder's matrices in fewer bits; an adapter then stays beside them.
        attention: the kernel, as of `models.attention.attention`.
        """
        checkpoint = open_checkpoint(path_or_id)
        mesh = make_mesh(devices=jax.local_devices()) if mesh is None else mesh
        known = checkpoint.backbone.modalities
        chosen = known if modalities is None else _chosen(modalities, known)
        context = checkpoint.config.max_position_embeddings
        processor = Processor(checkpoint.folder, context, media, video_positions, chosen)
        towers = [
            name
            for name, kinds in checkpoint.backbone.reads.items()
            if set(kinds) & set(processor.modalities)
        ]
        model, params = load_model(
            checkpoint,
            mesh,
            dtype,
            towers,
            head=cls.HEAD,
            remat="none",
            quantize=quantize,
            attention=attention,
        )
        if adapter is not None:
            adapters, config = peft.read_peft(adapter)
            decoder = params["decoder"]
            adapters, config = (
                peft.match_adapters(adapters, decoder, str(adapter)),
                replace(config, dropout=0.0),
            )
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
        return set([modality] if isinstance(modality, str) else modality) <= {
            *self.modalities,
            "message",
        }

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

        batch_size: the most inputs in one forward pass (None: any number). max_tokens: the most tokens of a device in
        it, unless a single input has more. They change the speed, not a vector.
        normalize: unit length; the hidden state as the final norm left it when False.
        max_length: cut texts to so many tokens before the prompt (the reference's evaluation cuts at 300); by
        default nothing is cut, and an input longer than the model's context raises.
        on_error: "raise", or "skip": a bad input's vector is NaN, and `skipped` says why.
        workers: processes that prepare media while the device computes; 0: threads of this process.
        progress: a bar of the caller's to advance, in the place of one of our own.
        names: what errors call the inputs (a file and line, say); by default "input 0" and so on.
        """
        if not isinstance(inputs, Iterable | os.PathLike | Image.Image):
            raise LcoError(
                f"inputs is {type(inputs).__name__}; give a list of inputs, or a single one"
            )
        single = is_single(inputs)
        items = [inputs] if single else list(inputs)
        bar = (
            progress
            if progress is not None
            else tqdm(  # an empty one is false
                total=len(items), desc="embedding", unit="input", disable=not show_progress
            )
        )
        options = {
            "prompt": prompt,
            "max_length": max_length,
            "on_error": on_error,
            "workers": workers,
        }
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
        units: Iterator[int] | None = None,
        progress: tqdm | None = None,
        names: Iterable[str] | None = None,
    ) -> Iterator[Block]:
        """As `encode`, for any number of inputs in bounded memory: consecutive `Block`s as they are ready.

        block_inputs: the most inputs in a block. units: how many inputs follow that no block may share with those after
        them; each number is asked for when the first of its inputs is prepared. Where blocks end depends on these and
        on the inputs, and not on time.
        """
        for name, value in (
            ("batch_size", batch_size),
            ("max_tokens", max_tokens),
            ("block_inputs", block_inputs),
        ):
            if value is not None and value < 1:
                raise LcoError(f"{name} is {value}; it must be at least 1")
        if on_error not in ("raise", "skip"):
            raise LcoError(f"on_error is {on_error!r}; it is one of: raise, skip")
        preparation = Preparation(self.processor, prompt, max_length)
        prepared = prepare_ahead(preparation, named(inputs, names), workers)
        first = 0
        shards = row_shards(self.mesh)
        for ready in one_ahead(
            blocks_of(prepared, block_inputs, on_error == "raise", units, shards)
        ):
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
        of: str = "last",
    ) -> np.ndarray:
        """Inputs as `processor` hands them over -> hidden states as the final norm left them, float32 [N, D].

        of: "layers" for those before the first layer and after each one: [N, L + 1, D].
        """
        layers = (self.model.decoder.config.num_layers + 1,) if of == "layers" else ()
        vectors = np.zeros((len(ready), *layers, self.dimension), np.float32)

        def start(batch: InferenceBatch) -> tuple[Array, np.ndarray]:
            return self._pool(self.params, batch.tokens, self._media(batch), of), batch.sequences

        for indices, (pooled, sequences) in self._run(
            ready, start, batch_size, max_tokens, progress
        ):
            vectors[indices] = np.asarray(pooled).reshape(-1, *vectors.shape[1:])[sequences]
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
        """The hidden state of each input's last token, before the first layer and after each -> float32 [L + 1, N, D].

        The last is after the final norm, as transformers' `hidden_states` has them; none is normalised. inputs and
        options: as of `encode`.
        """
        ready = self._prepare(inputs, prompt, max_length)
        return np.moveaxis(self.embed(ready, None, max_tokens, progress, of="layers"), 1, 0)

    def _prepare(
        self, inputs: Sequence[Any], prompt: str | None, max_length: int | None
    ) -> list[Processed]:
        """Inputs, ready for the model, all at once. Raises for the first that is bad."""
        ready = list(
            prepare_ahead(Preparation(self.processor, prompt, max_length), named(inputs, None), 0)
        )
        if errors := [one for one in ready if isinstance(one, LcoError)]:
            raise errors[0]
        return ready  # type: ignore[return-value]

    def _run(
        self,
        ready: Sequence[Processed],
        start: Callable[[InferenceBatch], Any],
        batch_size: int | None,
        max_tokens: int,
        progress: tqdm | None,
    ) -> Iterator[tuple[list[int], Any]]:
        """(which inputs, what `start` began for their batch); the next is begun before one is read."""
        waiting: tuple[list[int], Any] | None = None
        batches = batches_of(ready, batch_size, max_tokens, row_shards(self.mesh))
        with jax.set_mesh(self.mesh):
            for members in [*batches, None]:
                begun = None
                if members is not None:
                    batch = pack_on_mesh(ready, members, self.processor.rows, self.mesh)
                    begun = batch.inputs, start(batch)
                if waiting is not None:
                    yield waiting
                    if progress is not None:
                        progress.update(len(waiting[0]))
                waiting = begun

    def _media(self, batch: InferenceBatch) -> Array | None:
        """The media tokens of a batch, to come."""
        media = self.towers(self.params, batch.media)
        self.decoder_shapes.note(batch.tokens, media)
        return media


def _pooled(
    decoder: Decoder, params: dict[str, Any], tokens: PackedTokens, media: Array | None, of: str
) -> Array:
    """`pool`; last states are projected, where the model has a projection."""
    pooled = pool(decoder, params["decoder"], tokens, media, of)
    return project(pooled, params) if of == "last" else pooled


def _chosen(modalities: Iterable[str], known: tuple[str, ...]) -> tuple[str, ...]:
    chosen = set(modalities) | {"text"}
    if unknown := chosen - set(known):
        raise LcoError(f"modalities has {min(unknown)!r}; this checkpoint takes {', '.join(known)}")
    return tuple(kind for kind in known if kind in chosen)


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def is_single(inputs: Any) -> bool:
    """Whether this is one input rather than a list of them."""
    if isinstance(inputs, np.ndarray):
        return inputs.ndim > 1  # else a list of strings
    if isinstance(inputs, str | Mapping | os.PathLike | Image.Image):
        return True
    return (
        isinstance(inputs, list)
        and bool(inputs)
        and all(isinstance(x, dict) and "role" in x for x in inputs)
    )
