"""The command line of training jobs: the configuration, whose keys are flags, and the processes.

What is heavy, as jax is, is imported where it is used: help, mistakes and a finished run need none
of it, and come at once.
"""

import keyword
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from lco_jax.core.console import say, say_all
from lco_jax.core.errors import DONE, PREEMPTED, LcoError, explained
from lco_jax.core.files import AnyPath, as_path, expanded
from lco_jax.data.given import Given
from lco_jax.training.finished import report, results_if_finished
from lco_jax.training.own_data import set_data

CONFIGS = Path(__file__).parents[1] / "configs"
FLAGS = {
    "config": "a configuration: a name (base, base:paper) or a file (configs/base.py, mine.py)",
    "data": "your own data in the place of the configuration's: files of records (.jsonl or "
    ".parquet), patterns, folders, hf://datasets/OWNER/NAME/FILES.parquet, tfds:NAME; with commas",
    "eval": "held-out data, named likewise, or none; by default a share of --data",
    "output": "the run's folder (or gs://…); by default runs/NAME",
    "distributed": "join the processes of a TPU pod or Slurm job",
    "coordinator": "HOST:PORT of process 0, for several processes",
    "num-processes": "how many processes",
    "process-id": "which of them this is",
    "help": "this text",
}
# what absl and ml_collections raise for a value or a key that they cannot take
FLAG_ERRORS = (flags.Error, AttributeError, KeyError, TypeError, ValueError)
EARLIER = {
    "workdir": "output",
    "num_processes": "num-processes",
    "process_id": "process-id",
    "h": "help",
}


def start(doc: str | None) -> tuple[ConfigDict, AnyPath]:
    """This process's (configuration, output folder), after it has joined the other processes."""
    args = parse(sys.argv, doc)
    join_processes(args)
    return args.config, _output(args)


def run(doc: str | None, job: Callable[[ConfigDict, AnyPath], dict[str, Any]]) -> int:
    """Parse the command line and do a job that begins or resumes; a finished one is told of.

    job: (configuration, output folder) -> results; {} if SIGTERM ended it. Returns the exit status.
    """
    args = parse(sys.argv, doc)
    output = _output(args)
    if results := results_if_finished(output, args.config):
        say(f"{output} holds this very run, which is finished; another --output begins a new one")
        say_all(report(results, output, output), results)
        return DONE
    join_processes(args)
    from lco_jax.training.watch import peers

    with peers():
        return DONE if job(args.config, output) else PREEMPTED


def _output(args: flags.FlagValues) -> AnyPath:
    return as_path(args.output or f"runs/{args.config.name}")


def parse(argv: Sequence[str], doc: str | None) -> flags.FlagValues:
    """The flags in argv. --help prints `doc`, the flags and every key of the configuration.

    Raises for what it cannot read.
    """
    wants_help = any(arg in ("--help", "-h", "-help") for arg in argv[1:])
    name, argv = _split_config(argv)
    config = _load("base" if name is None and wants_help else name)
    argv = _take_data(argv, config)
    _check_keys(argv, config)
    argv = _in_brackets(argv, config)
    values = _flags(argv, config)
    with explained("the flags are wrong", *FLAG_ERRORS):
        rest = values(argv)
    if len(rest) > 1:
        raise LcoError(
            f"{rest[1]!r} is no flag; flags look like --output=runs/mine (--help lists them)"
        )
    if wants_help:
        from lco_jax.training.help import help_text

        print(help_text(doc, FLAGS, config, name or "base"))
        sys.exit(DONE)
    return values


def _flags(argv: Sequence[str], config: ConfigDict) -> flags.FlagValues:
    """The flags, not yet parsed. Every key of the configuration that argv sets is a flag."""
    values = flags.FlagValues()
    with explained("the flags are wrong", *FLAG_ERRORS):
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=argv)
    for name in ("output", "coordinator"):
        flags.DEFINE_string(name, None, FLAGS[name], flag_values=values)
    for name in ("num-processes", "process-id"):
        flags.DEFINE_integer(name, None, FLAGS[name], flag_values=values)
    for name in ("distributed", "help"):
        flags.DEFINE_bool(name, False, FLAGS[name], flag_values=values)
    for earlier, name in EARLIER.items():
        flags.DEFINE_alias(earlier, name, flag_values=values)
    return values


# ---- the configuration


def names() -> list[str]:
    """The configurations that come with this package."""
    return sorted(path.stem for path in CONFIGS.glob("*.py") if path.stem != "recipes")


def _split_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """The value of --config, and the other arguments."""
    values, rest = _split(argv, "config")
    return values.config, rest


def _take_data(argv: Sequence[str], config: ConfigDict) -> list[str]:
    """The arguments without --data and --eval, which replace parts of the configuration.

    They come first: other flags may set keys of the sources that --data names.
    """
    values, rest = _split(argv, "data", "eval")
    set_data(config, values.data, values.eval)
    return rest


def _split(argv: Sequence[str], *names: str) -> tuple[flags.FlagValues, list[str]]:
    """Some flags with their values, and the other arguments."""
    values = flags.FlagValues()
    for name in names:
        flags.DEFINE_string(name, None, FLAGS[name], flag_values=values)
    values.set_gnu_getopt()  # these flags may stand behind the value of another
    with explained("the flags are wrong", flags.Error):
        rest = values(argv, known_only=True)
    return values, rest


def _load(name: str | None) -> ConfigDict:
    """The configuration of a name or file (base, base:paper, mine.py), before flags change it."""
    if not name:
        raise LcoError("--config is missing; for a first run: --config=base")
    path, colon, argument = name.partition(":")
    path = str(expanded(path))
    if not Path(path).is_file():
        if path not in names():
            raise LcoError(
                f"--config={name}: there is no such file, and no configuration of that name; "
                f"there are: {', '.join(names())}"
            )
        path = f"{CONFIGS / path}.py"
    parser = config_flags.config_flags.ConfigFileFlagParser("config")
    try:
        config = parser.parse(path + colon + argument)
    except Exception as error:  # the user's code, which can raise anything
        last_line = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise LcoError(f"--config={name} does not load: {last_line}") from error
    if not isinstance(config, ConfigDict):
        kind = type(config).__name__
        raise LcoError(f"--config={name}: get_config() must return a ConfigDict, and not a {kind}")
    return config


def configured(
    config: str | os.PathLike[str] | ConfigDict,
    data: Given | Mapping[str, Any] | None = None,
    evaluation: Given | None = None,
    keys: Mapping[str, Any] | None = None,
) -> ConfigDict:
    """The configuration that a call from Python asks for, as flags do on a command line.

    config: what --config takes, or a configuration, which stays as it is. data, evaluation: as for
    `set_data`. keys: values of keys, spelt train__steps or train.steps. Raises for what a flag
    would be refused for.
    """
    if isinstance(config, ConfigDict):
        config = config.copy_and_resolve_references()
    elif isinstance(config, str | os.PathLike):
        config = _load(os.fspath(config))
    else:
        kind = type(config).__name__
        raise LcoError(f"config is a {kind}; give a name, a file or a ConfigDict")
    set_data(config, data, evaluation)
    for name, value in (keys or {}).items():
        _set_key(config, name, value)
    return config


def _set_key(config: ConfigDict, name: str, value: Any) -> None:
    """Set the key that a keyword argument names."""
    key = name.replace("__", ".")
    known = dotted(config.to_dict())
    below = [one for one in known if one.startswith(f"{key}.")]
    if below:
        example = below[0].replace(".", "__")
        raise LcoError(f"{name} is a section of the config; set its keys, as in {example}=…")
    if key not in known:
        from lco_jax.training.values import hint

        raise LcoError(f"{name}={value!r:.60}: the config has no key {key!r}{hint(key, known)}")
    with explained(f"{name}={value!r:.60} is wrong", *FLAG_ERRORS):
        config.update_from_flattened_dict({key: value})


def _check_keys(argv: Sequence[str], config: ConfigDict) -> None:
    """Raise for a flag that sets a key which the configuration does not have."""
    known = dotted(config.to_dict())
    for arg in argv[1:]:
        flag = arg.lstrip("-").partition("=")[0].removeprefix("no")
        key = flag.removeprefix("config.")
        if not arg.startswith("-") or key == flag:
            continue  # a value, or another flag
        if " " in key:
            raise LcoError(f"--{flag}: no flag has a space; set it in the configuration's file")
        if not any(f"{name}.".startswith(f"{key}.") for name in known):
            from lco_jax.training.values import hint

            raise LcoError(f"--{flag}: the config has no key {key!r}{hint(key, known)}")


def dotted(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Dotted key -> value, of a configuration as a dict."""
    return {".".join(path): value for path, value in _leaves(tree)}


def _leaves(
    tree: Mapping[str, Any], above: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(path, value) of every key that is no section, or an empty one."""
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, (*above, name))
        else:
            yield (*above, name), value


def _in_brackets(argv: Sequence[str], config: ConfigDict) -> list[str]:
    """The arguments with every name in brackets that Python could not read after a dot.

    ml_collections reads keys as Python does; a source may be called my-photos.
    """
    spelt = {}
    for path, _ in _leaves(config.to_dict()):
        for end in range(1, len(path) + 1):
            spelt[".".join(path[:end])] = "".join(map(_as_python, path[:end]))
    return [argv[0], *(_rewritten(arg, spelt) for arg in argv[1:])]


def _as_python(name: str) -> str:
    """A part of a key, as it stands behind the part before."""
    is_plain = name.isidentifier() and not keyword.iskeyword(name)
    return f".{name}" if is_plain else f"[{name!r}]"


def _rewritten(arg: str, spelt: Mapping[str, str]) -> str:
    flag, equals, value = arg.partition("=")
    start, _, key = flag.partition("config.")
    if start.strip("-") not in ("", "no") or key not in spelt:
        return arg
    return f"{start}config{spelt[key]}{equals}{value}"


# ---- processes


def join_processes(args: flags.FlagValues) -> None:
    """Join the other processes, if the flags ask for it, and set this one up."""
    import jax

    from lco_jax.core.shapes import keep_compiled
    from lco_jax.training.watch import leave_on_sigterm, meeting

    explicit = (args.coordinator, args["num-processes"].value, args["process-id"].value)
    asked = [value is not None for value in explicit]
    if any(asked) and not all(asked):
        raise LcoError("--coordinator, --num-processes and --process-id go together")
    if any(asked) or args.distributed:
        patience = int(args.config.get("train", {}).get("patience", 0))
        with meeting() as seconds:
            jax.distributed.initialize(
                *explicit,
                heartbeat_timeout_seconds=patience + 100,  # so that the watchdog acts first
                initialization_timeout=2 * seconds,
            )
    leave_on_sigterm()  # jax's own handler only takes note
    keep_compiled()
