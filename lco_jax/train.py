"""The main job: contrastive training of a multimodal LLM's decoder, on text or on any modality.

    python -m lco_jax.train --config=base [--output=runs/base] [--config.KEY=VALUE …]

Any key of the config can be set on the command line, e.g. --config.optimizer.learning_rate=1e-3 or
--config.data.sources.bundled.path=my.jsonl. A folder that is given again resumes its run, and if
that is finished, says so. It holds

    adapter/  merged/          the PEFT adapter (of LoRA) and the merged Hugging Face model
    metrics.jsonl              one line a step
    loss.png  similarity.png   the loss curve; held-out cosines before and after
    results.json               held-out retrieval before and after
    checkpoints/  config.json  what resuming needs
"""

from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import run_main
from lco_jax.core.files import AnyPath
from lco_jax.training import cli


def train(config: ConfigDict, output: AnyPath) -> dict[str, Any]:
    """Run or resume in the folder `output`; returns the content of its results.json.

    Returns {} if SIGTERM ended the run early (after saving it). Raises if another trainer works in
    the folder.
    """
    from lco_jax import contrastive  # heavy, as jax is; help and a finished run do without

    return contrastive.train(config, output)


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    return cli.run(__doc__, train)


if __name__ == "__main__":
    run_main(main)
