"""Which modules an adapter_config.json adapts: `check_target_module_exists` of peft 0.21.

PEFT makes adapters for these modules when it loads a folder, and passes over the other tensors.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lco_jax.core.errors import LcoError, is_number
from lco_jax.data.foreign import matching

ALL = "all-linear"


@dataclass(frozen=True)
class Targets:
    """The keys of an adapter_config.json that choose modules.

    modules, excluded: a regular expression of whole names, or names or their ends; None: all, and
    none. layers: the numbers of layers; None: all. before: regular expressions of what stands
    before such a number; (): anything. where: the file's name in errors.
    """

    where: str
    modules: str | list[str] | None = None
    excluded: str | list[str] | None = None
    layers: list[int] | None = None
    before: list[str] = field(default_factory=list)

    @classmethod
    def read(cls, content: dict[str, Any], file: Path) -> "Targets":
        """From the content of a file. Raises, by key, for other types."""
        layers = content.get("layers_to_transform")
        layers = [layers] if is_number(layers, int) else layers or None
        if layers is not None and not _all_of(layers, int):
            raise LcoError(f"{file}: layers_to_transform is {layers!r:.60}, and must list integers")
        before = _names(content, "layers_pattern", file) or []
        modules = _names(content, "target_modules", file)
        if isinstance(modules, str) and (layers or before):
            raise LcoError(
                f"{file}: layers_to_transform and layers_pattern need a list of target_modules, "
                f"and that is {modules!r:.60}"
            )
        return cls(
            where=str(file),
            modules=modules,
            excluded=_names(content, "exclude_modules", file) or None,
            layers=layers,
            before=[before] if isinstance(before, str) else before,
        )

    def missing(self, modules: Sequence[str]) -> list[str]:
        """Those of the modules, by their names in the file of weights, that PEFT would pass over.

        Raises for what is no regular expression, or takes too long.
        """
        passed_over = set()
        if self.excluded is not None:
            passed_over |= self._named(self.excluded, modules, "exclude_modules")
        if self.modules is not None and self.modules != ALL:
            passed_over |= set(modules) - self._named(self.modules, modules, "target_modules")
        if self.layers is not None:
            layers = self._layers(modules)
            passed_over |= {module for module in modules if layers[module] not in self.layers}
        return sorted(passed_over)

    def _named(self, given: str | list[str], modules: Sequence[str], key: str) -> set[str]:
        if isinstance(given, str):
            matches = matching([given], modules, f"{self.where}: {key}")
            return {module for module, which in zip(modules, matches, strict=True) if which}
        ends = tuple(f".{name}" for name in given)
        return {module for module in modules if f".{module}".endswith(ends)}

    def _layers(self, modules: Sequence[str]) -> dict[str, int | None]:
        """The layer of each module: the first number in its name that may be one."""
        numbers = [(module, i) for module in modules for i in _numbers(module)]
        allowed = [i >= 2 for _, i in numbers]  # as in model.layers.3.mlp
        if self.before:
            starts = [".".join(module.split(".")[:i]) for module, i in numbers]
            patterns = [rf"(?:.*\.)?{pattern}" for pattern in self.before]
            allowed = map(bool, matching(patterns, starts, f"{self.where}: layers_pattern"))
        layers: dict[str, int | None] = dict.fromkeys(modules)
        for (module, i), is_layer in zip(numbers, allowed, strict=True):
            if is_layer and layers[module] is None:
                layers[module] = int(module.split(".")[i])
        return layers


def _numbers(module: str) -> list[int]:
    """Which parts of a dotted name are numbers, but for the last one."""
    parts = module.split(".")[:-1]
    return [i for i, part in enumerate(parts) if re.fullmatch("[0-9]{1,9}", part)]


def _names(content: dict[str, Any], key: str, file: Path) -> str | list[str] | None:
    """A string, a list of strings, or None."""
    given = content.get(key)
    if given is None or isinstance(given, str) or _all_of(given, str):
        return given
    raise LcoError(f"{file}: {key} is {given!r:.60}, and must be a string or a list of strings")


def _all_of(given: Any, kind: type) -> bool:
    return isinstance(given, list) and all(
        isinstance(one, kind) and not isinstance(one, bool) for one in given
    )
