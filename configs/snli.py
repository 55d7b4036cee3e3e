"""SNLI from TFDS, as triplets, on `builtin:tiny`: how to train on a TFDS dataset.

    python -m lco_jax.train --config=snli --config.data.sources.snli.data_dir=DIR

DIR holds the dataset as array_record files, which `tfds build snli --file_format=array_record`
writes.
"""

from ml_collections import ConfigDict, config_dict

from lco_jax.configs import tiny


def get_config(recipe: str = "") -> ConfigDict:
    """What differs from tiny."""
    config = tiny.get_config(recipe)
    config.name = "snli"
    config.data.sources = {
        "snli": {
            "kind": "tfds",
            "name": "snli",
            "split": "train",
            "data_dir": config_dict.placeholder(str),
        }
    }
    config.train.batch_size = 64
    config.train.epochs = 10.0
    config.eval.path = ""
    return config
