"""Checkpoints shared by the tests of a session."""

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import reference


class Case(NamedTuple):
    family: str
    path: Path
    model: object


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The built-in checkpoint goes to a folder of the session's, also for child processes."""
    os.environ["LCO_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def cases(tmp_path_factory, cache):
    """family -> Case, built when first asked for."""

    class Cases(dict):
        def __missing__(self, family):
            path = tmp_path_factory.mktemp(family)
            path.rmdir()
            self[family] = Case(family, path, reference.build(family, path))
            return self[family]

    return Cases()


@pytest.fixture(params=reference.FAMILIES)
def case(request, cases):
    """Each family in turn."""
    return cases[request.param]
