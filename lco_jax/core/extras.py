"""How the package that is installed here gets an extra: the line that works on this machine.

The package may come from a clone, a wheel or an address; pip notes which (PEP 610).
"""

import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

PROJECT = "lco-jax"
CLONE = Path(__file__).parents[2]  # where this file lies in one


def install_line(extra: str) -> str:
    """The command that installs an extra of this package, as one pastes it into a shell."""
    if (CLONE / "pyproject.toml").exists():  # also a clone that is on the path and not installed
        return _pip("-e", f"{CLONE}[{extra}]")
    try:
        installed = metadata.distribution(PROJECT)
    except metadata.PackageNotFoundError:
        return _pip(f"{PROJECT}[{extra}]")
    return line_of(installed, extra)


def line_of(installed: metadata.Distribution, extra: str) -> str:
    """The same for an installed distribution."""
    note = installed.read_text("direct_url.json")
    if note is None:  # it comes from an index
        return _pip(f"{PROJECT}[{extra}]")
    origin = json.loads(note)
    path = _path_of(origin["url"])
    if path is not None and not path.exists():  # a wheel that was removed after it was installed
        return _pip(*_requirements(installed, extra))
    if path is not None:
        return _pip(f"{path}[{extra}]")
    return _pip(f"{PROJECT}[{extra}] @ {_address(origin)}")


def _pip(*arguments: str) -> str:
    return shlex.join(["pip", "install", *arguments])


def _path_of(url: str) -> Path | None:
    """The file or folder of a file: address, and None for any other."""
    parts = urlsplit(url)
    return Path(unquote(parts.path)) if parts.scheme == "file" else None


def _address(origin: dict[str, Any]) -> str:
    """Where the package came from, as pip takes it behind an @."""
    version_control = origin.get("vcs_info")
    if version_control is None:
        return origin["url"]
    return f"{version_control['vcs']}+{origin['url']}@{version_control['commit_id']}"


def _requirements(installed: metadata.Distribution, extra: str) -> list[str]:
    """The packages of an extra."""
    split = [requirement.partition(";") for requirement in installed.requires or []]
    wanted = f'extra == "{extra}"'
    return [name.strip() for name, _, condition in split if condition.strip() == wanted]
