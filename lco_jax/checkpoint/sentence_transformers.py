"""The files that make a merged checkpoint a sentence-transformers model (≥ 6) with the numbers of `OmniEmbedder`."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from lco_jax.core.errors import LcoError, explained
from lco_jax.core.files import ASSETS, read_json, write_json
from lco_jax.data.prompts import PROMPTS

# Prepended to the chat template that sentence-transformers applies: it puts our prompt after a user's content, as
# `encode` does for strings, unless the content already ends in one. Other users of the checkpoint see the template
# as it was.
_PROMPT_JINJA = ASSETS / "prompt.jinja"
_HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
_MODULES = ("Transformer", ""), ("Pooling", "1_Pooling"), ("Normalize", "2_Normalize")
_DENSE = "2_Dense"  # the projection's folder
_IDENTITY = "torch.nn.modules.linear.Identity"


def write_projection(folder: Path, matrix: np.ndarray) -> None:
    """A matrix [D, D] that pooled states are multiplied with before they are normalised, as that library's Dense."""
    (folder / _DENSE).mkdir(exist_ok=True)
    sizes = {"out_features": matrix.shape[0], "in_features": matrix.shape[1]}
    write_json(
        folder / _DENSE / "config.json", {**sizes, "bias": False, "activation_function": _IDENTITY}
    )
    tensors = {"linear.weight": np.ascontiguousarray(matrix, np.float32)}
    save_file(tensors, folder / _DENSE / "model.safetensors", metadata={"format": "pt"})


def read_projection(folder: Path, hidden_size: int) -> np.ndarray | None:
    """What `write_projection` has written, float32 [D, D]; None if the folder has none. Raises for another Dense."""
    if not (folder / _DENSE / "config.json").exists():
        return None
    file, config = folder / _DENSE / "model.safetensors", read_json(folder / _DENSE / "config.json")
    if config.get("bias") or config.get("activation_function") != _IDENTITY:
        raise LcoError(
            f"{folder / _DENSE / 'config.json'}: a bias or an activation function is not supported"
        )
    with explained(
        f"{file} is torn or not a safetensors file", SafetensorError, OSError, ValueError
    ):
        matrix = load_file(file).get("linear.weight")
    if matrix is None or matrix.shape != (hidden_size, hidden_size):
        raise LcoError(f"{file} must hold linear.weight of shape ({hidden_size}, {hidden_size})")
    return matrix.astype(np.float32)


def write_modules(
    folder: Path,
    template: str,
    hidden_size: int,
    modalities: Sequence[str],
    projected: bool = False,
) -> None:
    """modules.json and each module's configuration.

    template: the checkpoint's chat template. modalities: what it renders; all of them go through it as messages.
    projected: whether there is a projection (`write_projection`).
    """
    chain = (
        (*_MODULES[:2], ("Dense", _DENSE), ("Normalize", "3_Normalize")) if projected else _MODULES
    )
    modules = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(chain)
    ]
    write_json(folder / "modules.json", modules)
    prompt = _PROMPT_JINJA.read_text(encoding="utf-8")
    for name in ("text", "mixed"):
        prompt = prompt.replace(f"{name.upper()}_PROMPT", repr(PROMPTS[name]))
    transformer = {
        "transformer_task": "feature-extraction",
        "modality_config": {
            **dict.fromkeys(modalities, _HIDDEN),
            "message": {**_HIDDEN, "format": "structured"},
        },
        "module_output_name": "token_embeddings",
        "processing_kwargs": {
            "chat_template": {"add_generation_prompt": True, "chat_template": prompt + template}
        },
    }
    write_json(folder / "sentence_bert_config.json", transformer)
    pooling = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode": "lasttoken",
        "include_prompt": True,
    }
    write_json(folder / "1_Pooling" / "config.json", pooling)
    (folder / chain[-1][1]).mkdir(exist_ok=True)
    general = {"model_type": "SentenceTransformer", "prompts": {}, "default_prompt_name": None}
    write_json(
        folder / "config_sentence_transformers.json", {**general, "similarity_fn_name": "cosine"}
    )
