"""One's own data in the place of a configuration's: what --data and --eval do."""

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import LcoError
from lco_jax.data.given import Given, sources_of

SHARE = 0.05  # of one's own data, held out where nothing else is given
NONE = "none"


def set_data(
    config: ConfigDict,
    data: Given | Mapping[str, Any] | None = None,
    evaluation: Given | None = None,
) -> None:
    """Replace the sources of a configuration, and what is held out, as a whole.

    data: names, as `sources_of` takes them, or what `config.data.sources` holds. evaluation: names
    of held-out data, or "none"; by default a share of `data`. What the configuration itself would
    have measured has nothing to do with other data, and is left out. Raises for what is no data.
    """
    if data is None and evaluation is None:
        return
    if isinstance(data, Mapping | ConfigDict):
        config.data.sources = dict(data)
    elif data is not None:
        config.data.sources = sources_of(data, "--data")
    config.eval.path = config.eval.sts = ""
    config.eval.share = SHARE if evaluation is None else 0.0
    if evaluation not in (None, "", NONE):
        sources_of(evaluation, "--eval")  # raises
        config.eval.path = _joined(evaluation)


def _joined(given: Given) -> str:
    """Names between commas, as `config.eval.path` holds them. Raises for several, one of them with
    a comma.
    """
    if isinstance(given, str | os.PathLike):
        return os.fspath(given)
    names = list(map(os.fspath, given))
    for name in names:
        if "," in name and len(names) > 1:
            raise LcoError(f"--eval={name}: a name with a comma stands alone; rename the file")
    return ",".join(names)
