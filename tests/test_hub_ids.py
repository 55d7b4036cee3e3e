"""What is taken for the id of a repository on the hub."""

import pytest

from lco_jax import LcoError
from lco_jax.checkpoint.base import hub_id_of
from lco_jax.core.files import resolve
from lco_jax.core.hub_ids import is_hub_id
from lco_jax.data.given import sources_of

IDS = ["owner/some-name", "owner_2/some.name_3"]
OTHERS = ["name", "owner/", "/name", "a/b/c", "./name", ".owner/name", "~/name", "a b/c", "ö/name"]


@pytest.mark.parametrize("name", [*IDS, *OTHERS])
def test_models_bases_and_data_take_the_same_ids(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    is_id = name in IDS
    assert is_hub_id(name) == is_id
    assert hub_id_of(name) == (name if is_id else None)
    model = "could not be fetched from the hub" if is_id else "no folder here, and no hub id"
    with pytest.raises(LcoError, match=model):
        resolve(name, ["*.json"])


@pytest.mark.parametrize("name", ["owner/some-name", *OTHERS])
def test_what_is_said_of_data_that_are_not_there(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    data = f"a hub dataset is hf://datasets/{name}/" if name in IDS else "file or folder; give a"
    with pytest.raises(LcoError, match=data):
        sources_of(name, "--data")
