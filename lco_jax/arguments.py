"""What callers pass to `OmniEmbedder`, checked: each mistake is one sentence."""

import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from lco_jax.core.errors import LcoError, check_at_least_1, explained
from lco_jax.data.arrays import as_numpy
from lco_jax.data.media import MediaConfig

# of sentence-transformers' `encode`, or of ours in earlier versions -> what to give in its place
ELSEWHERE = {
    "normalize": "it is normalize_embeddings, as in sentence-transformers",
    "show_progress": "it is show_progress_bar, as in sentence-transformers",
    "pool": "the model's mesh shares the work; give from_pretrained(mesh=…)",
    "chunk_size": "the model's mesh shares the work; give from_pretrained(mesh=…)",
    "processing_kwargs": "caps on media are from_pretrained(media=…), and that on texts max_length",
    "task": "a model here has no tasks; give prompt or prompt_name",
}
PLATFORMS = {"cuda": "gpu", "rocm": "gpu"}  # names of torch -> jax's


def check_types(path_or_id: Any, adapter: Any, mesh: Any, media: Any) -> None:
    """Raise for what `from_pretrained` cannot take, before anything is read."""
    path = str | os.PathLike
    for name, value, kind, give in (
        ("path_or_id", path_or_id, path, "a folder or the id of a checkpoint"),
        ("adapter", adapter, path | None, "an adapter's folder, or None"),
        ("mesh", mesh, Mesh | None, "one from lco_jax.make_mesh, or None"),
        ("media", media, MediaConfig | None, "a MediaConfig, or None"),
    ):
        if not isinstance(value, kind):
            raise LcoError(f"{name} is {value!r:.60}; give {give}")


def check_on_error(on_error: str) -> None:
    """Raise for another value than the two that there are."""
    if on_error not in ("raise", "skip"):
        raise LcoError(f"on_error is {on_error!r:.60}; it is one of: raise, skip")


def check_passes(max_tokens: Any, progress: Any) -> None:
    """Raise for options of forward passes that cannot be."""
    if max_tokens is None:
        raise LcoError("max_tokens is None; it must be a whole number of at least 1")
    check_at_least_1(max_tokens=max_tokens)
    if progress is not None and not hasattr(progress, "update"):
        raise LcoError(
            f"progress is {progress!r:.60}; give a bar of tqdm, or show_progress_bar=True"
        )


def check_options(options: Mapping[str, Any], output_value: Any, device: Any, mesh: Mesh) -> None:
    """Raise for what sentence-transformers' `encode` takes and ours does not, and say what to do.

    options: those without a meaning here, by name.
    """
    for name in options:
        instead = ELSEWHERE.get(name, "see help(OmniEmbedder.encode) for what it takes")
        raise LcoError(f"encode does not take {name}; {instead}")
    if output_value != "sentence_embedding":
        instead = "encode_layers returns the states of each input's last token, layer by layer"
        raise LcoError(
            f"output_value is {output_value!r:.60}, and only sentence_embedding is here; {instead}"
        )
    if device is not None:
        _check_device(device, mesh)


def _check_device(device: Any, mesh: Mesh) -> None:
    """Raise for other devices than those that the model is on.

    device: a kind ("cpu", "gpu", "tpu", or torch's "cuda"), which may have a number, or several.
    """
    given = device if isinstance(device, list | tuple | set) else [device]
    own = {f"{one.platform}:{one.id}" for one in mesh.devices.flat}
    kinds = {name.partition(":")[0] for name in own}
    names = {_device_name(one) for one in given}
    if names and (names <= kinds or names == own):
        return
    there = ", ".join(sorted(own))
    mesh_of = "from_pretrained(mesh=make_mesh(devices=[…]))"
    raise LcoError(f"device is {device!r:.60}, and the model is on {there}; choose with {mesh_of}")


def _device_name(device: Any) -> str:
    """A device of jax, or its name in torch, in jax's words: "gpu:0", or "gpu" for any."""
    if hasattr(device, "platform"):
        return f"{device.platform}:{device.id}"
    kind, colon, number = str(device).partition(":")
    return f"{PLATFORMS.get(kind, kind)}{colon}{number}"


def as_vectors(given: Any, name: str) -> np.ndarray:
    """Vectors as float32 [N, D]; [D] is one row. name: of the argument, for errors."""
    what = f"{name} is a {type(given).__name__}; give vectors"
    with explained(what, TypeError, ValueError, RuntimeError):
        array = np.asarray(as_numpy(given))
    if array.dtype.kind not in "iuf":
        raise LcoError(f"{name} holds {array.dtype}; give vectors of numbers")
    if np.isinf(array).any():
        raise LcoError(f"{name} holds infinity")
    return np.atleast_2d(array.astype(np.float32))
