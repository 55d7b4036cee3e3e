"""The command line of training jobs: --config, any key of which can be set, --workdir, and how processes meet."""

import difflib
import logging
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import jax
from absl import flags
from flax.traverse_util import flatten_dict
from ml_collections import ConfigDict, config_flags

from lco_jax.core.errors import LcoError
from lco_jax.core.files import AnyPath, as_path
from lco_jax.core.shapes import keep_compiled
from lco_jax.training.watch import leave_on_sigterm, meeting


def parse(argv: list[str], doc: str | None) -> flags.FlagValues:
    """The flags in argv; --help prints `doc` and every key of the config. Raises `LcoError` for what it cannot read."""
    values = flags.FlagValues()
    config_flags.DEFINE_config_file(
        "config", None, "the configuration file", flag_values=values, sys_argv=argv
    )
    flags.DEFINE_string(
        "workdir", None, "where the run lives (or gs://…); by default runs/NAME", flag_values=values
    )
    flags.DEFINE_string(
        "coordinator", None, "HOST:PORT of process 0, for several processes", flag_values=values
    )
    flags.DEFINE_integer("num_processes", None, "how many processes", flag_values=values)
    flags.DEFINE_integer("process_id", None, "which of them this is", flag_values=values)
    flags.DEFINE_bool(
        "distributed", False, "join the processes of a TPU pod or Slurm job", flag_values=values
    )
    flags.DEFINE_bool("help", False, "this text", short_name="h", flag_values=values)
    wants_help = any(arg in ("--help", "-h", "-help") for arg in argv[1:])
    config = _load(argv)
    if config is None and not wants_help:
        raise LcoError("--config is missing; for a first run: --config=configs/base.py")
    try:
        rest = values(argv)
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, OSError) as error:
        raise LcoError(_explain(error, argv, values, config)) from None
    if len(rest) > 1:
        raise LcoError(
            f"{rest[1]!r} is no flag; flags look like --workdir=runs/mine (--help lists them)"
        )
    if wants_help:
        print(doc)
        for name in (
            "config",
            "workdir",
            "distributed",
            "coordinator",
            "num_processes",
            "process_id",
        ):
            print(f"  --{name}: {values[name].help}")
        if values.config is not None:
            print(f"\nKeys and values of the configuration:\n\n{values.config}")
        sys.exit(0)
    return values


def start(doc: str | None) -> tuple[ConfigDict, AnyPath]:
    """(configuration, workdir) of this process's command line, after joining the other processes if there are any."""
    args = parse(sys.argv, doc)
    join_processes(args)
    return args.config, as_path(args.workdir or f"runs/{args.config.name}")


def _load(argv: Sequence[str]) -> ConfigDict | None:
    """The configuration that --config names, as its file has it. Raises naming the file if it does not load."""
    for arg, following in zip(argv[1:], [*argv[2:], ""], strict=False):
        if arg.startswith("-") and arg.lstrip("-").split("=")[0] == "config":
            path = arg.split("=", 1)[1] if "=" in arg else following
            break
    else:
        return None
    if not path:
        raise LcoError("--config needs a file; for a first run: --config=configs/base.py")
    if not Path(path.split(":")[0]).is_file():
        raise LcoError(f"--config={path}: there is no such file")
    try:
        config = config_flags.config_flags.ConfigFileFlagParser("config").parse(path)
    except Exception as error:  # a configuration is code, which can raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise LcoError(f"--config={path} does not load: {reason}") from None
    if not isinstance(config, ConfigDict):
        raise LcoError(
            f"--config={path}: get_config() returns a {type(config).__name__}, and must return a ConfigDict"
        )
    return config


def _explain(
    error: Exception, argv: list[str], values: flags.FlagValues, config: ConfigDict | None
) -> str:
    """One sentence for a flag that could not be read, with the nearest key where one was misspelt."""
    for arg in argv[1:]:
        name = arg.lstrip("-").split("=")[0]
        positive = name.removeprefix("no")
        if not arg.startswith("-") or positive in values:
            continue  # a value, or a flag there is
        if positive.startswith("config.") and config is not None:
            key = positive.removeprefix("config.")
            known = flatten_dict(config.to_dict(), keep_empty_nodes=True, sep=".")
            if not any(f"{name}.".startswith(f"{key}.") for name in known):
                near = difflib.get_close_matches(key, sorted(known), n=1, cutoff=0.5)
                return f"--{positive}: the config has no key {key!r}" + (
                    f"; did you mean {near[0]!r}?" if near else ""
                )
        elif name not in values and name not in ("config", "help", "h"):
            near = difflib.get_close_matches(name, list(values), n=1, cutoff=0.5)
            return f"--{name} is no flag" + (
                f"; did you mean --{near[0]}?" if near else " (--help lists them)"
            )
    return str(error).replace("\n", " ")


def join_processes(args: flags.FlagValues) -> None:
    """`jax.distributed`: by the three explicit flags, or as the cluster says with --distributed."""
    explicit = (args.coordinator, args.num_processes, args.process_id)
    heartbeat = 100 + int(
        args.config.get("train", {}).get("patience", 0)
    )  # jax just aborts: the watchdog comes first
    if any(value is not None for value in explicit):
        if any(value is None for value in explicit):
            raise LcoError("--coordinator, --num_processes and --process_id go together")
        with meeting() as seconds:
            jax.distributed.initialize(
                *explicit, heartbeat_timeout_seconds=heartbeat, initialization_timeout=2 * seconds
            )
    elif args.distributed:
        with meeting() as seconds:
            jax.distributed.initialize(
                heartbeat_timeout_seconds=heartbeat, initialization_timeout=2 * seconds
            )
    leave_on_sigterm()  # jax has a handler of its own, which only takes note
    logging.basicConfig(
        level=logging.WARNING, format="%(levelname).1s %(name)s: %(message)s", force=True
    )
    logging.getLogger("absl").setLevel(logging.ERROR)  # orbax narrates every save
    logging.getLogger("lco_jax").setLevel(
        logging.INFO
    )  # which programs are compiled, which kernels are taken
    warnings.filterwarnings("ignore", message=".*Sharding info not provided.*")
    keep_compiled()
