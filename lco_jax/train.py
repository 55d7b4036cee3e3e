"""The main job: contrastive training of a multimodal LLM's decoder, on text or on any modality.

    python -m lco_jax.train --config=base [--data=my.jsonl] [--eval=heldout.jsonl]
        [--output=runs/base] [--config.KEY=VALUE …]

Any key of the config can be set on the command line, e.g. --config.optimizer.learning_rate=1e-3.
Without --eval, a share of --data is held out. A folder that is given again resumes its run,
and if that is finished, says so. It holds

    adapter/  merged/          the PEFT adapter (of LoRA) and the merged Hugging Face model
    metrics.jsonl              one line a step
    loss.png  similarity.png   the loss curve; held-out cosines before and after
    results.json               held-out retrieval before and after
    checkpoints/  config.json  what resuming needs
"""

import os
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import run_main
from lco_jax.data.given import Given
from lco_jax.results import Results
from lco_jax.training import cli


def train(
    config: str | os.PathLike[str] | ConfigDict,
    output: str | os.PathLike[str] | None = None,
    *,
    data: Given | Mapping[str, Any] | None = None,
    eval: Given | None = None,
    **keys: Any,
) -> Results:
    """Run or resume in the folder `output`; the arguments are those of the command line.

        from lco_jax import train

        run = train("qwen2_5_vl_3b", "runs/mine", data="my.jsonl", train__steps=100)
        print(run["before"], run["after"], run.adapter)
        model = run.embedder()

    config: a name (base, base:paper), a file (mine.py) or a ConfigDict, which stays as it is.
    output: the run's folder, by default runs/NAME. data: your own data in the place of the
    configuration's: a file, pattern, folder or dataset, several between commas or in a list, or
    what config.data.sources holds. eval: held-out data, or "none"; by default a share of `data`.
    keys: of the configuration, with __ for each dot. A dict of dotted keys is unpacked likewise:
    **{"train.steps": 100}.

    Returns the content of results.json, which is empty if SIGTERM ended the run early (after saving
    it). Raises `LcoError` for a mistake, and if another trainer works in the folder.
    """
    from lco_jax import contrastive  # heavy, as jax is; help and a finished run do without

    config = cli.configured(config, data, eval, keys)
    return contrastive.train(config, output or f"runs/{config.name}")


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    return cli.run(__doc__, train)


if __name__ == "__main__":
    run_main(main)
