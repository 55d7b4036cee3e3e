"""Photos from TFDS and a caption template, on `builtin:tiny`: how to train on a media dataset.

    python -m lco_jax.train --config=cifar10 --config.data.sources.photos.data_dir=DIR
    python -m lco_jax.train --config=cifar10:mnist --config.data.sources.photos.data_dir=DIR

DIR holds the dataset as array_record files, which `tfds build cifar10 --file_format=array_record`
writes.
"""

from ml_collections import ConfigDict, config_dict

from lco_jax.configs import tiny

LABELS = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SETS = {
    "cifar10": ("a photo of a {label}.", LABELS),
    "mnist": ("the handwritten digit {label}.", DIGITS),
}


def get_config(name: str = "cifar10") -> ConfigDict:
    """What differs from tiny. name: cifar10 or mnist."""
    config = tiny.get_config()
    caption, labels = SETS[name]
    config.name = name
    config.data.sources = {
        "photos": {
            "kind": "tfds",
            "name": name,
            "split": "train",
            "data_dir": config_dict.placeholder(str),
            "caption": caption,
            # a copy of the set without label.labels.txt has numbers for names
            "values": {
                "label": {name: label for i, label in enumerate(labels) for name in (str(i), label)}
            },
        }
    }
    config.train.batch_size = 32
    config.train.steps = 100
    config.train.ignore_duplicates = True  # ten captions: most batches hold each several times
    config.eval.path = ""
    return config
