"""Uploads of exports to the Hugging Face hub.

    from lco_jax import push_to_hub
    push_to_hub("runs/base/merged", "owner/name", private=True)

`lco convert --push=owner/name` does the same. The token is huggingface_hub's: HF_TOKEN, or that of
`hf auth login`.
"""

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # of httpx or of httpx2, whichever huggingface_hub takes
)
from huggingface_hub.utils import validate_repo_id

from lco_jax.checkpoint.base import Base, base_of
from lco_jax.checkpoint.card import at_hub
from lco_jax.checkpoint.hf import open_checkpoint
from lco_jax.checkpoint.parts import README
from lco_jax.checkpoint.peft_config import CONFIG
from lco_jax.checkpoint.peft_pairs import WEIGHTS
from lco_jax.core.errors import LcoError, check_bool, explained
from lco_jax.core.files import expanded, read_json

_LEFT_OUT = [README, ".*"]  # the card comes last; our marks are of this machine


def push_to_hub(
    folder: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
) -> str:
    """Upload an exported folder, a merged model or an adapter, and return its address.

    repo_id: "owner/name"; it is made if it is not there. private: None leaves it to the hub, and a
    repository that is there stays as it is. token: by default that of HF_TOKEN, or of `hf auth
    login`. The code of the card that is uploaded names repo_id; the folder stays as it is.

    Raises `LcoError`, before anything is uploaded, for a folder that holds no export, an adapter
    whose base is not on the hub, a bad name, and a token that is absent or refused.
    """
    path = expanded(folder)
    check_export(path)
    api = open_repositories([repo_id], private, token)
    return upload(api, path, repo_id, commit_message)


def check_export(folder: Path) -> None:
    """Raise for a folder that holds no export, or one that would be of no use to others."""
    if (folder / "checkpoints").is_dir():
        raise LcoError(f"{folder} is a training run; its exports are in merged/ and adapter/")
    if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
        base = str(read_json(folder / CONFIG).get("base_model_name_or_path"))
        check_base(base_of(base), str(folder))
    elif (folder / "config.json").is_file():
        open_checkpoint(folder)
    else:
        raise LcoError(
            f"{folder} holds no export, neither a model nor an adapter; lco convert writes them"
        )


def _base_id(folder: Path) -> str:
    """The hub id of an adapter's base; "" for a model."""
    config = folder / CONFIG
    return str(read_json(config)["base_model_name_or_path"]) if config.is_file() else ""


def check_base(base: Base, adapter: str) -> None:
    """Raise for the base of an adapter which only this machine has."""
    if base.hub_id is None:
        raise LcoError(
            f"the base of {adapter} is {base.given}, which others do not have; push the merged "
            f"model, or put the hub id of the base into {CONFIG} as base_model_name_or_path"
        )


def open_repositories(
    repo_ids: Sequence[str], private: bool | None = None, token: str | None = None
) -> HfApi:
    """A client of the hub that may write to these repositories, which are made if they are not
    there.

    Whether a token may write is known for sure only then, so this comes before anything slow.
    """
    for repo_id in repo_ids:
        check_repo_id(repo_id)
    if private is not None:
        check_bool(private=private)
    if not (token or get_token()):
        raise LcoError(
            "there is no token for the hub: run `hf auth login`, or set HF_TOKEN to one that may "
            "write (https://huggingface.co/settings/tokens)"
        )
    api = HfApi(token=token, library_name="lco-jax")
    with _explained("the hub cannot be asked"):
        api.whoami()
    for repo_id in repo_ids:
        with _explained(f"{repo_id} cannot be made or written on the hub"):
            api.create_repo(repo_id, private=private, exist_ok=True)
            api.auth_check(repo_id, write=True)  # it may be there, and another's
    return api


def check_repo_id(repo_id: str) -> None:
    """Raise for what is no owner/name."""
    with explained(f"{repo_id!r:.120} is no name of a repository", HFValidationError):
        validate_repo_id(repo_id)
    if "/" not in repo_id:
        raise LcoError(f"{repo_id!r:.120} names no owner; give owner/name")


def upload(api: HfApi, folder: Path, repo_id: str, message: str | None = None) -> str:
    """Upload a folder, and then its card. Returns the repository's address."""
    message = message or "Upload with lco-jax"
    card = folder / README
    with _explained(f"{folder} was not uploaded completely to {repo_id}; try again"):
        api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=message,
            ignore_patterns=list(_LEFT_OUT),
        )
        if card.is_file():
            content = at_hub(card.read_text(encoding="utf-8"), repo_id, _base_id(folder))
            api.upload_file(
                path_or_fileobj=content.encode(),
                path_in_repo=README,
                repo_id=repo_id,
                commit_message=f"{message}: the model card",
            )
    return f"{api.endpoint}/{repo_id}"


def _explained(what: str) -> AbstractContextManager[None]:
    return explained(what, HfHubHTTPError, HTTPError, OSError)
