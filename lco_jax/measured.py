"""What a run is measured on: held-out records, and pairs that people scored."""

import logging
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.console import say
from lco_jax.core.errors import LcoError
from lco_jax.data.given import is_bundled, sources_of
from lco_jax.data.held_out import SMALL, trained_on
from lco_jax.data.records import answer_of
from lco_jax.data.scan import ListSource, Source
from lco_jax.data.sources import open_source
from lco_jax.evaluation import sts
from lco_jax.evaluation.sts import ScoredPairs

logger = logging.getLogger(__name__)


def open_held_out(
    config: ConfigDict,
    share: Mapping[str, ListSource],
    sources: Mapping[str, Source],
    generative: bool,
) -> dict[str, ListSource]:
    """The held-out records by file or source. Those of a generative run have answers.

    share: what is held out of the run's own data. sources: what is trained on.
    """
    _say_share(config, share)
    held_out = dict(share)
    for name, spec in _held_out_specs(config).items():
        source = open_source(name, spec, config.data.on_bad, "config.eval.path")
        if name in held_out:
            both = f"config.eval.path and config.data.sources both have {name!r}"
            raise LcoError(
                f"{both}, and scores go by names; rename one, or set config.eval.share=0"
            )
        held_out[name] = ListSource(list(source), source.skipped, source.digests)
    if generative:
        for source in held_out.values():
            for record in source:
                answer_of(record)  # raises
    _warn_of_shared(held_out, sources)
    return held_out


def _warn_of_shared(held_out: Mapping[str, Source], sources: Mapping[str, Source]) -> None:
    """Warn of held-out records that are trained on, too."""
    for name, source in held_out.items():
        count = trained_on(source, sources)
        if count:
            logger.warning(
                "%s: %s of its %s records are trained on, too, so its scores are too high",
                name,
                f"{count:,}",
                f"{len(source):,}",
            )


def _say_share(config: ConfigDict, share: Mapping[str, ListSource]) -> None:
    """What is held out of the run's own data."""
    count = sum(map(len, share.values()))
    if count:
        why = f"config.eval.share is {config.eval.share:g}"
        say(f"{count:,} of the records are held out, and never trained on ({why})")
    elif config.eval.share:
        few = f"no source has {SMALL} different records, which it takes to hold some out"
        say(f"nothing is held out of the data: {few}; --eval names other records")


def _held_out_specs(config: ConfigDict) -> dict[str, dict[str, Any]]:
    """The sources that `config.eval.path` names.

    Those that ship with the package say nothing of other data, and are left out with them.
    """
    if not config.eval.path.strip():
        return {}
    specs = sources_of(config.eval.path, "config.eval.path")
    if any(map(is_bundled, config.data.sources.values())):
        return specs
    bundled = [name for name, spec in specs.items() if is_bundled(spec)]
    if bundled:
        left_out = f"{', '.join(bundled)} of the package (--eval names other records)"
        say(f"not measured, since the data are your own: {left_out}")
    return {name: specs[name] for name in specs if name not in bundled}


def open_pairs(config: ConfigDict, generative: bool) -> dict[str, ScoredPairs]:
    """The pairs that people scored, by file."""
    given = config.eval.sts
    names = [name.strip() for name in given.split(",") if name.strip()]
    if names and generative:
        raise LcoError("config.eval.sts goes with lco_jax.train; this model makes no embeddings")
    pairs = dict(map(sts.open_pairs, names))
    if len(pairs) < len(names):
        raise LcoError(f"config.eval.sts={given} holds two files of one name; scores go by names")
    return pairs
