"""The command line of training jobs: --config with every key overridable, --workdir, and how processes find each other."""

import difflib
import logging
import sys
import warnings
from pathlib import Path

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from lco_jax.core.errors import LcoError


def parse(argv: list[str], doc: str | None) -> flags.FlagValues:
    """The flags in argv; --help prints `doc` and every key of the config. Raises `LcoError` for what it cannot read."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file("config", None, "the configuration file", flag_values=values)
    flags.DEFINE_string("workdir", None, "where the run lives; by default runs/NAME", flag_values=values)
    flags.DEFINE_string("coordinator", None, "HOST:PORT of process 0, for several processes", flag_values=values)
    flags.DEFINE_integer("num_processes", None, "how many processes", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is", flag_values=values)
    flags.DEFINE_bool("distributed", False, "join the processes of a TPU pod or Slurm job", flag_values=values)
    flags.DEFINE_bool("help", False, "this text", short_name="h", flag_values=values)
    wants_help = any(arg in ("--help", "-h", "-help") for arg in argv[1:])
    if not wants_help and not any(arg.lstrip("-").split("=")[0] == "config" for arg in argv[1:]):
        raise LcoError("--config is missing; for a first run: --config=configs/base.py")
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise LcoError(_explain(error, argv, values)) from None
    if len(rest) > 1:
        raise LcoError(f"{rest[1]!r} is no flag; flags look like --workdir=runs/mine (--help lists them)")
    if wants_help:
        print(doc)
        for name in ("config", "workdir", "distributed", "coordinator", "num_processes", "process_id"):
            print(f"  --{name}: {values[name].help}")
        if values.config is not None:
            print(f"\nKeys and values of the configuration:\n\n{values.config}")
        sys.exit(0)
    return values


def _explain(error: Exception, argv: list[str], values: flags.FlagValues) -> str:
    """One sentence for a flag that could not be read, with the nearest key where one was misspelt."""
    for arg in argv[1:]:
        name = arg.lstrip("-").split("=")[0]
        if name == "config" and "=" in arg:
            path = arg.split("=", 1)[1].split(":")[0]
            if not Path(path).exists():
                return f"--config={path}: there is no such file"
        if name.startswith("config.") and values["config"].value is not None:
            known = sorted(_keys(values["config"].value))
            key = name.removeprefix("config.")
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
                return f"--{name}: the config has no key {key!r}" + (f"; did you mean {near[0]!r}?" if near else "")
        elif name not in values and name not in ("config", "help", "h"):
            near = difflib.get_close_matches(name, list(values), n=1, cutoff=0.5)
            return f"--{name} is no flag" + (f"; did you mean --{near[0]}?" if near else " (--help lists them)")
    return str(error).replace("\n", " ")


def _keys(config: ConfigDict, prefix: str = "") -> list[str]:
    keys = []
    for key, value in config.items():
        keys += [prefix + key, *(_keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else ())]
    return keys


def join_processes(args: flags.FlagValues) -> None:
    """`jax.distributed`: by the three explicit flags, or as the cluster says with --distributed."""
    explicit = (args.coordinator, args.num_processes, args.process_id)
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise LcoError("--coordinator, --num_processes and --process_id go together")
        jax.distributed.initialize(args.coordinator, args.num_processes, args.process_id)
    elif args.distributed:
        jax.distributed.initialize()
    logging.basicConfig(level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s")
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
    warnings.filterwarnings("ignore", message=".*Sharding info not provided.*")
