"""Generative training: what a checkpoint says about text, images, audio and video.

    python -m lco_jax.pretrain --config=pretrain [--output=runs/pretrain] [--config.KEY=VALUE …]

It comes before contrastive training (the paper's continual generative pretraining). A record's
anchor is the prompt, followed by a question if it is media alone. Its positive is the answer, whose
tokens the model learns to predict, up to the one that ends its turn. Sources, mixtures, sharding,
checkpoints and resuming are those of `lco_jax.train`, which starts from this result with
--config.model.path=OUTPUT/merged. The folder holds the same files. Its results.json has the
held-out loss before and after, in nats a token, and the trained model's answers to the first
held-out prompts.
"""

from typing import Any

from ml_collections import ConfigDict

from lco_jax.core.errors import run_main
from lco_jax.core.files import AnyPath
from lco_jax.training import cli


def pretrain(config: ConfigDict, output: AnyPath) -> dict[str, Any]:
    """Run or resume in the folder `output`; returns the content of its results.json.

    Returns {} if SIGTERM ended the run early (after saving it). Raises if another trainer works in
    the folder.
    """
    from lco_jax import generative  # heavy, as jax is; help and a finished run do without

    return generative.pretrain(config, output)


def main() -> int:
    """Parse the command line, join the other processes if there are any, train."""
    return cli.run(__doc__, pretrain)


if __name__ == "__main__":
    run_main(main)
