"""Checkpoint + adapter -> merged model, or a training run -> adapter and merged model.

    python -m lco_jax.convert --workdir=runs/base --out=exports/base
    python -m lco_jax.convert --model=Qwen/Qwen2.5-VL-3B-Instruct --adapter=my/adapter --out=merged --dtype=bfloat16

Writes OUT (merged, Hugging Face layout) and, with --workdir, OUT-adapter (PEFT). Everything written is read back and
compared before it is called done.
"""

import argparse
from pathlib import Path

from lco_jax.checkpoint.export import export_merged
from lco_jax.checkpoint.hf import DTYPES
from lco_jax.checkpoint.peft import read_peft, write_peft
from lco_jax.core.errors import LcoError, run_main
from lco_jax.training.run import adapters_of_run


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m lco_jax.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=Path, help="a training run; its newest checkpoint is exported")
    parser.add_argument("--model", help="a checkpoint folder or hub id (with --workdir: the run's own)")
    parser.add_argument("--adapter", help="a PEFT adapter folder or hub id; none: the model as it is")
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    parser.add_argument("--max-shard-size", type=float, default=5.0, metavar="GB", help="of one file (default 5)")
    return parser.parse_args()


def main() -> int:
    """Export, and say where."""
    args = parse_args()
    if (args.workdir is None) == (args.model is None):
        raise LcoError("give either --workdir (a training run) or --model (a checkpoint), and not both")
    if args.max_shard_size <= 0:
        raise LcoError(f"--max-shard-size is {args.max_shard_size}; it must be positive")
    source, adapters, config = args.model, None, None
    if args.workdir is not None:
        if args.adapter:
            raise LcoError("--adapter goes with --model; a --workdir brings its own")
        source, adapters, config, step = adapters_of_run(args.workdir)
        print(f"{args.workdir}: step {step}, trained from {source}")
    elif args.adapter:
        adapters, config = read_peft(args.adapter)
    export_merged(source, args.out, adapters, config, args.dtype, int(args.max_shard_size * 1e9))
    print(f"merged model ({args.dtype}): {args.out}")
    if args.workdir is not None:
        write_peft(args.out.with_name(f"{args.out.name}-adapter"), adapters, config, source)
        print(f"adapter: {args.out}-adapter")
    return 0


if __name__ == "__main__":
    run_main(main)
