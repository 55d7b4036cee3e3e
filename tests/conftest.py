"""Checkpoints shared by the tests of a session."""

import functools
import os
import signal
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import reference

from lco_jax import OmniEmbedder, embed
from lco_jax.core.errors import run_main

# Files whose tests take long start first, the longest at the head, so that no worker is left alone
# with one at the end.
FIRST = (
    "test_extras",
    "test_readme",
    "test_embed",
    "test_train",
    "test_laboratory_experiment",
    "test_alive",
    "test_benchmarks",
    "test_pretrain",
    "test_quantize",
    "test_media_training",
    "test_memory",
    "test_cards",
    "test_omnimodal",
    "test_step",
)


def pytest_collection_modifyitems(items):
    items.sort(
        key=lambda item: FIRST.index(item.path.stem) if item.path.stem in FIRST else len(FIRST)
    )


class Case(NamedTuple):
    family: str
    path: Path
    model: object


@pytest.fixture(scope="session", autouse=True)
def cache(tmp_path_factory):
    """The cache is a folder of the session, for child processes, too; these find no torch."""
    os.environ["LCO_JAX_CACHE"] = str(tmp_path_factory.mktemp("cache"))
    given = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parent / "without_torch"), *filter(None, [given])]
    )


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


@pytest.fixture(scope="session")
def load(cache):
    """`OmniEmbedder.from_pretrained` that loads and compiles once."""
    return functools.cache(OmniEmbedder.from_pretrained)


@pytest.fixture(scope="session")
def tiny(load):
    return load("builtin:tiny", None, "float32")


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs an entry point in this process: (exit status, stdout, stderr). Exceptions fail the
    test."""

    def run(entry, *args):
        monkeypatch.setattr(sys, "argv", [entry.__name__, "--model=builtin:tiny", *map(str, args)])
        handler = signal.getsignal(signal.SIGTERM)
        with pytest.raises(SystemExit) as done:
            run_main(entry.main)
        signal.signal(signal.SIGTERM, handler)
        out, err = capsys.readouterr()
        return done.value.code or 0, out, err

    return run


@pytest.fixture
def run_embed(monkeypatch, run_command, load):
    """`embed`, which loads a checkpoint once a session."""
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    return functools.partial(run_command, embed)
