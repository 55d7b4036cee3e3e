"""`OmniEmbedder`: a checkpoint, and perhaps an adapter, as a function from inputs to unit vectors.

Dimensions: N inputs, D hidden, R rows, T tokens in a row, S slots.
"""

import os
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from lco_jax.checkpoint.hf import load_decoder, open_checkpoint
from lco_jax.checkpoint.peft import fit, read_peft
from lco_jax.core import lora
from lco_jax.core.errors import LcoError
from lco_jax.core.packing import PackedRows, bucket, fill_rows, place
from lco_jax.core.sharding import ROWS, make_mesh, replicated, row_shards, shardings
from lco_jax.data.prompts import ChatTokenizer, as_messages
from lco_jax.models.decoder import Decoder, pool_rows

MIN_ROW = 256  # tokens; row lengths are this times a power of two


class OmniEmbedder:
    """Embeds text (other modalities come with their towers). Build one with `from_pretrained`."""

    def __init__(self, decoder: Decoder, params: dict[str, Any], tokenizer: ChatTokenizer, mesh: Mesh):
        self.decoder, self.params, self.tokenizer, self.mesh = decoder, params, tokenizer, mesh
        self._pool = jax.jit(lambda params, rows: pool_rows(decoder, params, rows), out_shardings=replicated(mesh))

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | os.PathLike[str],
        adapter: str | os.PathLike[str] | None = None,
        dtype: Any = "float32",
        mesh: Mesh | None = None,
    ) -> "OmniEmbedder":
        """Load a checkpoint folder or hub id, with a PEFT adapter merged in (in float32) if one is given.

        dtype: "float32" or "bfloat16", or jax's dtype of that name: of the weights and the activations; embeddings are
        float32 either way.
        mesh: from `lco_jax.make_mesh`; by default one copy of the model on every device.
        """
        checkpoint = open_checkpoint(path_or_id)
        mesh = make_mesh() if mesh is None else mesh
        decoder, params = load_decoder(checkpoint, mesh, dtype, remat="none")
        if adapter is not None:
            adapters, config = read_peft(adapter)
            merge = jax.jit(lora.merge, static_argnums=2, donate_argnums=0, out_shardings=shardings(params, mesh))
            params = merge(params, fit(adapters, params, str(adapter)), config)
        return cls(decoder, params, ChatTokenizer(checkpoint.folder, decoder.config.max_position_embeddings), mesh)

    @property
    def dimension(self) -> int:
        """D."""
        return self.decoder.config.hidden_size

    def encode(
        self,
        inputs: Any,
        batch_size: int = 32,
        normalize: bool = True,
        show_progress: bool = False,
        *,
        prompt: str | None = None,
        max_length: int | None = None,
        progress: tqdm | None = None,
        names: Sequence[str] | None = None,
    ) -> np.ndarray:
        """Embed strings, {"text": …} or chat-message lists, in any mixture -> float32 [N, D], in input order.

        A single string, mapping or conversation gives [D], as in sentence-transformers. Strings and mappings get the
        reference's prompt (or `prompt`, placed after the text); chat messages are rendered as they are.

        batch_size: the most inputs in one forward pass; it changes the speed and never a vector.
        normalize: unit length; the hidden state as the final norm left it when False.
        max_length: cut texts to so many tokens before the prompt (the reference's evaluation cuts at 300); by
        default nothing is cut, and an input longer than the model's context raises.
        progress: a bar of the caller's to advance, in the place of one of our own.
        names: what errors call the inputs (a file and line, say); by default "input 0" and so on.
        """
        if batch_size < 1:
            raise LcoError(f"batch_size is {batch_size}; it must be at least 1")
        if not isinstance(inputs, Iterable):
            raise LcoError(f"inputs is {type(inputs).__name__}; give a list of inputs, or one string or conversation")
        single = isinstance(inputs, str | dict) or _is_conversation(inputs)
        items = [inputs] if single else list(inputs)
        names = names or [f"input {i}" for i in range(len(items))]
        tokens = self._tokenize(items, names, prompt, max_length)
        vectors = np.zeros((len(items), self.dimension), np.float32)
        order = np.argsort([-len(ids) for ids in tokens], kind="stable")  # neighbours in a batch are alike in length
        bar = progress or tqdm(total=len(items), desc="embedding", unit="input", disable=not show_progress)
        with jax.set_mesh(self.mesh):
            for start in range(0, len(items), batch_size):
                chosen = order[start : start + batch_size]
                vectors[chosen] = self._forward([tokens[i] for i in chosen])
                bar.update(len(chosen))
        if progress is None:
            bar.close()
        if normalize:
            vectors = _unit(vectors)
        return vectors[0] if single else vectors

    @staticmethod
    def similarity(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Cosines of every row of a [N, D] with every row of b [M, D] -> [N, M]; a single vector counts as one row."""
        a, b = (_unit(np.atleast_2d(np.asarray(x, np.float32))) for x in (a, b))
        return a @ b.T

    def _tokenize(
        self, items: Sequence[Any], names: Sequence[str], prompt: str | None, max_length: int | None
    ) -> list[np.ndarray]:
        conversations = []
        for item, name in zip(items, names, strict=True):
            if max_length is not None and isinstance(item, str):
                item = self.tokenizer.cut(item, max_length)
            elif max_length is not None and isinstance(item, dict) and isinstance(item.get("text"), str):
                item = {**item, "text": self.tokenizer.cut(item["text"], max_length)}
            conversations.append(as_messages(item, name, prompt))
        return self.tokenizer(conversations, names)

    def _forward(self, tokens: Sequence[np.ndarray]) -> np.ndarray:
        """Pack, run, and pick each sequence's slot: [N, D]. Row lengths and counts come in a few static sizes."""
        row_length = MIN_ROW
        while row_length < len(tokens[0]):
            row_length *= 2
        placement = place([len(ids) for ids in tokens], row_length)
        shards = row_shards(self.mesh)
        num_rows = bucket(-(-placement.num_rows // shards), 2) * shards
        num_slots = -(-placement.num_slots // 8) * 8
        rows = fill_rows(tokens, range(len(tokens)), placement, num_rows, row_length, num_slots)
        split = NamedSharding(self.mesh, PartitionSpec(ROWS))
        on_mesh: PackedRows = rows.map(lambda x: jax.make_array_from_callback(x.shape, split, lambda index: x[index]))
        slots = np.asarray(self._pool(self.params, on_mesh))
        return slots[placement.row, placement.slot]


def _unit(x: np.ndarray) -> np.ndarray:
    return x / np.maximum(np.linalg.norm(x, axis=-1, keepdims=True), 1e-12)


def _is_conversation(inputs: Iterable[Any]) -> bool:
    return isinstance(inputs, list) and bool(inputs) and all(isinstance(x, dict) and "role" in x for x in inputs)
