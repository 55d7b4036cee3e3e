"""The files that make a merged checkpoint a sentence-transformers model (≥ 6).

Such a model embeds as `OmniEmbedder` does, to the same numbers.
"""

from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.checkpoint.tensors import read_tensors, write_tensors
from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.files import ASSETS, read_json, write_json
from lco_jax.data.prompts import PROMPTS

# This stands before the chat template that sentence-transformers applies. It puts our prompt after
# a user's content, as `encode` does for strings, unless the content already ends in one. Whoever
# else uses the checkpoint sees the template as it was.
_PROMPT_JINJA = ASSETS / "prompt.jinja"
_HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
_POOLING = "1_Pooling"  # folders of modules
_DENSE = "2_Dense"
_GENERAL = "config_sentence_transformers.json"
_IDENTITY = "torch.nn.modules.linear.Identity"


def write_projection(folder: Path, matrix: np.ndarray) -> None:
    """Write as a Dense the matrix [D, D] that multiplies pooled states before normalisation."""
    (folder / _DENSE).mkdir(exist_ok=True)
    config = {
        "out_features": matrix.shape[0],
        "in_features": matrix.shape[1],
        "bias": False,
        "activation_function": _IDENTITY,
    }
    write_json(folder / _DENSE / "config.json", config)
    tensors = {"linear.weight": matrix.astype(np.float32)}
    write_tensors(folder / _DENSE / "model.safetensors", tensors)


def read_projection(folder: Path, hidden_size: int) -> np.ndarray | None:
    """The matrix that `write_projection` wrote, float32 [D, D]; None if the folder has none.

    Raises for a Dense that is no such matrix.
    """
    config_file = folder / _DENSE / "config.json"
    if not config_file.exists():
        return None
    config = read_json(config_file)
    if config.get("bias") or config.get("activation_function") != _IDENTITY:
        raise LcoError(f"{config_file}: a bias or an activation function is not supported")
    file = folder / _DENSE / "model.safetensors"
    matrix = read_tensors(file).get("linear.weight")
    if matrix is None or matrix.shape != (hidden_size, hidden_size):
        raise LcoError(f"{file} must hold linear.weight of shape ({hidden_size}, {hidden_size})")
    return matrix.astype(np.float32)


def write_modules(
    folder: Path,
    template: str,
    hidden_size: int,
    modalities: Sequence[str],
    projected: bool = False,
    truncate_dim: int | None = None,
) -> None:
    """Write modules.json and each module's configuration.

    template: the checkpoint's chat template. modalities: what it renders; all of them go through it
    as messages. projected: whether there is a projection (`write_projection`). truncate_dim: how
    many of the first numbers of its vectors the model is to give; None: all.
    """
    modules = [("Transformer", ""), ("Pooling", _POOLING)]
    if projected:
        modules.append(("Dense", _DENSE))
    normalize = f"{len(modules)}_Normalize"
    modules.append(("Normalize", normalize))
    (folder / normalize).mkdir(exist_ok=True)
    listed = [
        {"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{name}"}
        for i, (name, path) in enumerate(modules)
    ]
    write_json(folder / "modules.json", listed)
    write_json(folder / "sentence_bert_config.json", _transformer(template, modalities))
    pooling = {
        "word_embedding_dimension": hidden_size,
        "pooling_mode": "lasttoken",
        "include_prompt": True,
    }
    write_json(folder / _POOLING / "config.json", pooling)
    general = {
        "model_type": "SentenceTransformer",
        "prompts": {},
        "default_prompt_name": None,
        "similarity_fn_name": "cosine",
    }
    if truncate_dim is not None:
        general["truncate_dim"] = truncate_dim
    write_json(folder / _GENERAL, general)


def read_truncate_dim(folder: Path, hidden_size: int) -> int | None:
    """How many of the first numbers the vectors of a checkpoint are to have, as its file for
    sentence-transformers says; None where it says nothing.
    """
    file = folder / _GENERAL
    if not file.exists():
        return None
    width = read_json(file).get("truncate_dim")
    if width is None:
        return None
    if not is_number(width, Integral) or not 1 <= width <= hidden_size:
        give = f"give a whole number from 1 to {hidden_size}"
        raise LcoError(f"{file}: truncate_dim is {width!r:.60}; {give}")
    return int(width)


def _transformer(template: str, modalities: Sequence[str]) -> dict[str, Any]:
    """The configuration of the Transformer module."""
    prompt = _PROMPT_JINJA.read_text(encoding="utf-8")
    for name in ("text", "mixed"):
        prompt = prompt.replace(f"{name.upper()}_PROMPT", repr(PROMPTS[name]))
    chat_template = {"add_generation_prompt": True, "chat_template": prompt + template}
    modality_config: dict[str, Any] = dict.fromkeys(modalities, _HIDDEN)
    modality_config["message"] = {**_HIDDEN, "format": "structured"}
    return {
        "transformer_task": "feature-extraction",
        "modality_config": modality_config,
        "module_output_name": "token_embeddings",
        "processing_kwargs": {"chat_template": chat_template},
        "processor_kwargs": _resized_by_pil("video" in modalities),
    }


def _resized_by_pil(takes_video: bool) -> dict[str, Any]:
    """What makes a processor resize images with PIL, as ours does, and not with torchvision.

    transformers hands these to each part of a processor. A processor of videos has no backend
    "pil" and raises for it, so there the older spelling is the one that says it of images alone.
    """
    return {"use_fast": False} if takes_video else {"backend": "pil"}
