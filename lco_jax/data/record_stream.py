"""The sources of a run -> the endless mixture of their records, drawn by weight."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from numbers import Real
from types import MappingProxyType
from typing import Any

import grain

from lco_jax.core.errors import LcoError, is_number
from lco_jax.data import mixture
from lco_jax.data.instructions import SideInstructions
from lco_jax.data.records import Record
from lco_jax.data.scan import Source
from lco_jax.data.sources import open_source


def open_sources(config: Mapping[str, Any]) -> dict[str, Source]:
    """Open and check every source of `config.data`."""
    if not config["sources"]:
        raise LcoError("config.data.sources is empty; name at least one source")
    return {
        name: open_source(name, spec, config["on_bad"]) for name, spec in config["sources"].items()
    }


def record_stream(
    sources: Mapping[str, Source],
    weights: Mapping[str, float],
    seed: int,
    run: int = 1,
    batch_size: int = 0,
    *,
    instructions: Mapping[str, SideInstructions] | None = None,
    numbers: mixture.NumbersBySource = MappingProxyType({}),
) -> grain.MapDataset:
    """The endless mixture of sources, drawn by weight; each epoch of a source has another order.

    run: how many consecutive records come from one source. A batch's size makes batches
        homogeneous.
    batch_size: no record stands twice in a batch of this size, where the data allow it; 0: all
        stay as they are drawn. numbers: of contents that stand in it once, too.
    instructions: of each source; None: there are none.
    """
    for name in sources:
        _check_weight(name, weights[name])
    opened = list(sources.values())
    keys = mixture.keys(opened, [weights[name] for name in sources], seed, run)
    if batch_size:
        once = mixture.Once(
            keys, opened, seed, batch_size, [numbers[name] for name in sources if numbers]
        )
        keys = grain.MapDataset.range(mixture.ENDLESS).map(once)
    of_source = [instructions[name] for name in sources] if instructions else None
    return keys.map(partial(_read, opened, of_source))


def _read(
    sources: Sequence[Source], instructions: Sequence[SideInstructions] | None, key: mixture.Key
) -> Record:
    source, index = key
    record = sources[source][index]
    if instructions is None:
        return record
    query, document = instructions[source]
    return replace(record, query=query, document=document)


def _check_weight(name: str, weight: Any) -> None:
    if not is_number(weight, Real) or not 0 < weight < math.inf:
        raise LcoError(
            f"config.data.sources.{name}.weight is {weight!r}; it must be a number above 0"
        )
