"""The checkpoint that an export was made from, as others find it: its name, place and licence."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import try_to_load_from_cache

from lco_jax.checkpoint import builtin
from lco_jax.checkpoint.parts import fetched_licence
from lco_jax.core.files import expanded, on_bucket
from lco_jax.core.hub_ids import is_hub_id

HUB = "https://huggingface.co"
OUR_LICENCE = "apache-2.0"  # of the built-in checkpoints that programs of this repository made
_LICENCE_KEYS = ("license", "license_name", "license_link")


@dataclass(frozen=True)
class Base:
    """A base model.

    name: as a card shows it, without a path of this machine. given: what opens it here. hub_id:
    None, if it is not on the hub. location: what PEFT and transformers open it by, a hub id or an
    absolute path. revision: the commit of the hub id that was read, where the cache knows it.
    """

    name: str
    given: str
    hub_id: str | None
    location: str
    revision: str | None = None


def base_of(given: str | Path) -> Base:
    """What a checkpoint's name stands for, as `open_checkpoint` takes it.

    A built-in one is a folder of this machine, in the package or in the cache.
    """
    name = str(given)
    if on_bucket(name):
        return Base(name, name, None, name)
    folder = builtin.find(name)
    if folder is not None:
        return Base(name, name, None, str(folder.absolute()))
    hub_id = hub_id_of(name)
    if hub_id is not None:
        return Base(hub_id, hub_id, hub_id, hub_id, _revision(hub_id))
    path = str(expanded(name).absolute()) if expanded(name).is_dir() else name
    return Base(Path(path).name, path, None, path)


def hub_id_of(name: str) -> str | None:
    """A name that is the id of a repository of the hub, and no folder or file of this machine."""
    return name if is_hub_id(name) and not expanded(name).exists() else None


def _revision(hub_id: str) -> str | None:
    """The commit whose files are in the hub's cache."""
    file = try_to_load_from_cache(hub_id, "config.json")
    return Path(file).parent.name if isinstance(file, str) else None


# ---- what its own card says


def licence_keys(
    folder: Path, base: Base, head: Mapping[str, Any], parts: Mapping[str, Mapping[str, Any]]
) -> dict[str, str]:
    """A base's licence, in the keys that the hub's cards have for it; empty if nothing names one.

    folder: of the base's files. head: the front matter of its card. parts: what it is made of.
    """
    found = {key: head[key] for key in _LICENCE_KEYS if isinstance(head.get(key), str)}
    if found:
        link = found.get("license_link")
        if link and "://" not in link and base.hub_id:
            found["license_link"] = f"{HUB}/{base.hub_id}/blob/main/{link}"
        return found
    licences = {part.get("licence") for part in parts.values()} - {None}
    if len(licences) == 1:
        return {"license": str(licences.pop()).lower()}
    if base.name in ("builtin:lab", "builtin:tiny"):
        return {"license": OUR_LICENCE}
    licence = fetched_licence(folder)
    return {"license": licence} if licence else {}
