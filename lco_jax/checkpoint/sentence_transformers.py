"""The files that make a merged checkpoint a sentence-transformers model (≥ 6).

Such a model embeds as `OmniEmbedder` does, to the same numbers. Two of the files say how a model
is to be used: its pooling, its prompts, and the length of its vectors. An adapter's folder has
these two, too, where they say something, and so has a model that sentence-transformers does not
load.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from lco_jax.checkpoint.tensors import read_tensors, write_tensors
from lco_jax.core.errors import LcoError, is_number
from lco_jax.core.files import ASSETS, read_json, write_json
from lco_jax.data.instructions import PLACES, Instructions
from lco_jax.data.prompts import PROMPTS

# This stands before the chat template that sentence-transformers applies. It puts our prompt after
# a user's content, as `encode` does for strings, unless the content already ends in one.
# sentence-transformers gives a prompt of its own as a system turn; it is moved to where
# instructions stand. Whoever else uses the checkpoint sees the template as it was.
_PROMPT_JINJA = ASSETS / "prompt.jinja"
_HIDDEN = {"method": "forward", "method_output_name": "last_hidden_state"}
_POOLING = "1_Pooling"  # folders of modules
_DENSE = "2_Dense"
_IDENTITY = "torch.nn.modules.linear.Identity"
_GENERAL = "config_sentence_transformers.json"
_PLACE = "prompt_place"  # our key in it, one of `PLACES`; sentence-transformers ignores it
USAGE_FILES = (_GENERAL, f"{_POOLING}/config.json")
_MODES = {"last": "lasttoken", "mean": "mean"}  # our name of a pooling -> theirs
_OLD_MODES = {"pooling_mode_lasttoken": "lasttoken", "pooling_mode_mean_tokens": "mean"}


@dataclass(frozen=True)
class Usage:
    """How a model is to be used.

    pooling: one of `models.pooling.POOLINGS`. truncate_dim: how many of the first numbers its
    vectors have; None: all.
    """

    pooling: str = "last"
    instructions: Instructions = field(default_factory=Instructions)
    truncate_dim: int | None = None


def write_usage(folder: Path, usage: Usage, hidden_size: int | None = None) -> None:
    """Write the two files. hidden_size: of a model that sentence-transformers loads."""
    size = {} if hidden_size is None else {"word_embedding_dimension": hidden_size}
    pooling = {**size, "pooling_mode": _MODES[usage.pooling], "include_prompt": True}
    (folder / _POOLING).mkdir(exist_ok=True)
    write_json(folder / _POOLING / "config.json", pooling)
    instructions = usage.instructions
    general = {
        "model_type": "SentenceTransformer",
        "prompts": dict(instructions.prompts),
        "default_prompt_name": instructions.default,
        "similarity_fn_name": "cosine",
    }
    if instructions != Instructions():
        general[_PLACE] = instructions.place
    if usage.truncate_dim is not None:
        general["truncate_dim"] = usage.truncate_dim
    write_json(folder / _GENERAL, general)


def read_usage(folder: Path, hidden_size: int, pooling: str | None = None) -> Usage:
    """What the two files of a folder say; the paper's, where they are not there.

    hidden_size: of the model. pooling: in the place of the folder's.
    """
    file = folder / _GENERAL
    general = read_json(file) if file.exists() else {}
    width = _truncate_dim(general, file, hidden_size)
    return Usage(pooling or _pooling(folder), _instructions(general, file), width)


def says_usage(folder: Path) -> bool:
    """Whether a folder has any of the two files."""
    return any((folder / name).exists() for name in USAGE_FILES)


def _pooling(folder: Path) -> str:
    file = folder / _POOLING / "config.json"
    if not file.exists():
        return "last"
    config = read_json(file)
    mode = config.get("pooling_mode")
    if mode is None:  # of a version before 6
        mode = [name for key, name in _OLD_MODES.items() if config.get(key)]
    modes = [mode] if isinstance(mode, str) else mode
    for ours, theirs in _MODES.items():
        if modes == [theirs]:
            return ours
    known = ", ".join(_MODES.values())
    raise LcoError(f"{file}: pooling_mode is {mode!r:.60}, and must be one of: {known}")


def _truncate_dim(config: Mapping[str, Any], file: Path, hidden_size: int) -> int | None:
    width = config.get("truncate_dim")
    if width is None:
        return None
    if not is_number(width, Integral) or not 1 <= width <= hidden_size:
        give = f"give a whole number from 1 to {hidden_size}"
        raise LcoError(f"{file}: truncate_dim is {width!r:.60}; {give}")
    return int(width)


def _instructions(config: Mapping[str, Any], file: Path) -> Instructions:
    """The prompts of an export of ours; those of other models are not read."""
    place = config.get(_PLACE)
    if place is None:
        return Instructions()
    if place not in PLACES:
        known = ", ".join(PLACES)
        raise LcoError(f"{file}: {_PLACE} is {place!r:.60}, and must be one of: {known}")
    prompts, default = config.get("prompts"), config.get("default_prompt_name")
    if not isinstance(prompts, Mapping) or not all(
        isinstance(text, str) for text in prompts.values()
    ):
        raise LcoError(f"{file}: prompts is {prompts!r:.60}, and must be an object of texts")
    if default is not None and not (isinstance(default, str) and default in prompts):
        raise LcoError(f"{file}: default_prompt_name is {default!r:.60}, which prompts lacks")
    return Instructions(dict(prompts), place, default)


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
    projected: bool,
    usage: Usage,
) -> None:
    """Write modules.json and each module's configuration.

    template: the checkpoint's chat template. modalities: what it renders; all of them go through it
    as messages. projected: whether there is a projection (`write_projection`). usage: how the model
    is to be used.
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
    place = usage.instructions.place
    write_json(folder / "sentence_bert_config.json", _transformer(template, modalities, place))
    write_usage(folder, usage, hidden_size)


def _transformer(template: str, modalities: Sequence[str], place: str) -> dict[str, Any]:
    """The configuration of the Transformer module. place: of instructions."""
    prompt = _PROMPT_JINJA.read_text(encoding="utf-8")
    for name in ("text", "mixed"):
        prompt = prompt.replace(f"{name.upper()}_PROMPT", repr(PROMPTS[name]))
    prompt = prompt.replace("PLACE", repr(place))
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
