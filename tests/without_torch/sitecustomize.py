"""Python without torch: `conftest.py` puts this on the path of the processes that tests start.

The runtime never imports torch, but transformers does where it is installed, and this takes more
than a second of each start.
"""

import importlib.util
import sys


class Absent:
    """As if it were not installed."""

    def find_spec(self, name, *_):
        if name.split(".")[0] in ("torch", "torchvision"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


find_spec = importlib.util.find_spec
sys.meta_path.insert(0, Absent())
importlib.util.find_spec = lambda name, *a: (
    None if name in ("torch", "torchvision") else find_spec(name, *a)
)
