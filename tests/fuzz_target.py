"""A stand-in for the model of `benchmarks fuzz`, which does what its input says."""

import os
import signal
import time

import numpy as np

from lco_jax.core.errors import LcoError


class Fake:
    """A vector, an error or worse, by the word that is its input."""

    def __call__(self, job):
        asked = job["input"]
        if asked == "sentence":
            raise LcoError("input 0: no such thing")
        if asked == "sentences":
            raise LcoError("one\nand two")
        if asked == "traceback":
            raise KeyError("fps")
        if asked == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if asked == "exit":
            os._exit(3)
        if asked == "hang":
            time.sleep(1000)
        if asked == "memory":
            self.held = b"\1" * 300_000_000
            time.sleep(1000)
        while asked == "slow":
            pass
        print("what a library prints is no reply")
        vectors = {"nan": [np.nan, 1.0], "long": [2.0, 0.0], "other": [0.0, 1.0]}
        return np.array(vectors.get(asked, [1.0, 0.0]), np.float32)
