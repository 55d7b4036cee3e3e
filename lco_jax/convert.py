"""Checkpoint + adapter -> merged model, or a training run -> adapter and merged model.

    python -m lco_jax.convert --workdir=runs/base --out=exports/base
    python -m lco_jax.convert --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=my/adapter --out=merged --dtype=bfloat16

Writes out/ (merged, Hugging Face layout) and, with --workdir, out/adapter/ (PEFT). Everything written is read back and
compared before it is called done.
"""

import argparse
from pathlib import Path

from lco_jax.checkpoint.export import DTYPES, export_merged
from lco_jax.checkpoint.peft import read_peft
from lco_jax.core.errors import LcoError, run_main
