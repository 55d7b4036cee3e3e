"""What programs say: lines for people, progress bars and logs, and the flags that choose how much
of it there is, and in which form.

By default, lines for people go to stdout, bars and logs to stderr. With --log-format=json, all of
them are JSON objects on stderr, one a line. What a program is asked for (answers, a plan) goes to
stdout in any case.
"""

import argparse
import json
import logging
import os
import sys
import threading
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import import_module
from typing import Any

from tqdm import tqdm

FORMATS = ("text", "json")
# Libraries whose logs say nothing to a user: orbax, through absl, reports every save, and logs the
# tracebacks of what it raises.
SILENCED = ("absl", "asyncio")
# Libraries whose logs go to handlers of their own, as plain lines, and perhaps no further.
OWN_HANDLERS = ("huggingface_hub", "transformers")
# core/accelerators.py says this better than jax, with what to do about it
KNOWN_BETTER = "may be present on this machine"
# of orbax, where a checkpoint is read without its shardings
IGNORED_WARNINGS = ".*Sharding info not provided.*"
IN_A_TERMINAL, IN_A_FILE = 0.5, 10.0  # seconds between two pictures of a bar
DEBUG_VARIABLE = "LCO_JAX_DEBUG"  # of the environment: --debug for every command


@dataclass(frozen=True)
class Manner:
    """How much is said, and in which form. debug: tracebacks of mistakes, too."""

    quiet: bool = False
    verbose: bool = False
    as_json: bool = False
    debug: bool = False

    @property
    def level(self) -> int:
        """The least level of the logs of this package that are shown."""
        if self.quiet:
            return logging.WARNING
        return logging.DEBUG if self.verbose else logging.INFO


_manner = Manner()


# ---- the flags


def flags() -> argparse.ArgumentParser:
    """The flags that every program takes, as a parent of its parser."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    group = parser.add_argument_group("what is printed")
    group.add_argument("--quiet", action="store_true", help="warnings and errors alone")
    group.add_argument("--verbose", action="store_true", help="also shapes, kernels and the like")
    group.add_argument(
        "--log-format",
        choices=FORMATS,
        default="text",
        help="json: an object a line on stderr, with time, level, logger, message, and metrics",
    )
    group.add_argument("--debug", action="store_true", help="show the traceback of every error")
    return parser


def take_flags(arguments: list[str]) -> Manner:
    """The manner that these arguments ask for; they lose its flags, so that programs never see
    them. Raises `argparse.ArgumentError`.
    """
    given, arguments[:] = flags().parse_known_args(arguments)
    if given.quiet and given.verbose:
        raise argparse.ArgumentError(None, "--quiet and --verbose exclude each other")
    by_environment = os.environ.get(DEBUG_VARIABLE, "") not in ("", "0")
    return Manner(
        quiet=given.quiet,
        verbose=given.verbose,
        as_json=given.log_format == "json",
        debug=given.debug or by_environment,
    )


@contextmanager
def speaking(manner: Manner) -> Iterator[None]:
    """Within, this process speaks in a manner; the logs of libraries are warnings alone."""
    global _manner
    before, _manner = _manner, manner
    handler, root, ours = _Handler(), logging.getLogger(), logging.getLogger("lco_jax")
    loggers = [ours, *map(logging.getLogger, SILENCED)]
    levels = [logger.level for logger in loggers]
    root.addHandler(handler)
    ours.setLevel(manner.level)
    for name in SILENCED:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=IGNORED_WARNINGS)
            logging.captureWarnings(manner.as_json)
            with _all_logs_at_the_root() if manner.as_json else nullcontext():
                yield
    finally:
        logging.captureWarnings(False)
        _manner = before
        root.removeHandler(handler)
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextmanager
def _all_logs_at_the_root() -> Iterator[None]:
    """Within, the logs of `OWN_HANDLERS` go to the root's handler alone."""
    before = []
    for library in OWN_HANDLERS:
        import_module(f"{library}.utils.logging").get_logger()  # its own handler is there now
        logger = logging.getLogger(library)
        before.append((logger, logger.handlers, logger.propagate))
        logger.handlers, logger.propagate = [], True
    try:
        yield
    finally:
        for logger, handlers, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate


def in_json() -> bool:
    """Whether --log-format=json was asked for."""
    return _manner.as_json


# ---- lines


def say(line: str, metrics: Mapping[str, Any] | None = None, aside: bool = False) -> None:
    """Tell people something, beside a progress bar.

    metrics: numbers of it, for JSON alone. aside: on stderr, where stdout is for something else.
    """
    if _manner.quiet:
        return
    if _manner.as_json:
        tqdm.write(_as_json("INFO", _program(), line.strip(), metrics=metrics), file=sys.stderr)
        return
    stream = sys.stderr if aside else sys.stdout
    tqdm.write(line, file=stream)
    stream.flush()


def say_all(lines: Sequence[str], metrics: Mapping[str, Any]) -> None:
    """Tell people several lines. metrics: their numbers, for JSON alone, beside the first line."""
    for line in filter(None, lines) if _manner.as_json else lines:
        say(line, metrics)
        metrics = {}


def say_metrics(message: str, metrics: Mapping[str, Any]) -> None:
    """Numbers for whoever reads JSON; people see them in a progress bar."""
    if _manner.as_json:
        say(message, metrics)


def last_words(message: str) -> None:
    """Say why the process ends, from any thread or handler: without locks, and in any manner."""
    words = _as_json("ERROR", _program(), message.strip()) if _manner.as_json else message
    print(words, file=sys.stderr, flush=True)


def last_traceback() -> None:
    """Show the traceback of the exception that is being handled."""
    if not _manner.as_json:
        traceback.print_exc()
        return
    message = traceback.format_exception_only(sys.exception())[-1].strip()
    words = _as_json("CRITICAL", _program(), message, traceback=traceback.format_exc())
    print(words, file=sys.stderr, flush=True)


class _Handler(logging.Handler):
    """Writes log records to stderr, beside a progress bar."""

    def filter(self, record: logging.LogRecord) -> bool:
        return KNOWN_BETTER not in record.getMessage()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(_written(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def _written(record: logging.LogRecord) -> str:
    """A record as a line."""
    message = record.getMessage()
    cause = logging.Formatter().formatException(record.exc_info) if record.exc_info else None
    if _manner.as_json:
        return _as_json(record.levelname, record.name, message, record.created, traceback=cause)
    is_plain = record.name.startswith("lco_jax") and record.levelno > logging.DEBUG
    where = "" if is_plain else f"{record.name}: "
    return "\n".join(filter(None, (f"{record.levelname.lower()}: {where}{message}", cause)))


def _as_json(
    level: str, logger: str, message: str, created: float | None = None, **more: Any
) -> str:
    """A line of --log-format=json. more: what is None is left out."""
    time = datetime.now(UTC) if created is None else datetime.fromtimestamp(created, UTC)
    line = {
        "time": time.isoformat(timespec="milliseconds"),
        "level": level,
        "logger": logger,
        "message": message,
    }
    line |= {key: value for key, value in more.items() if value not in (None, {})}
    return json.dumps(line, ensure_ascii=False, default=str)


def _program() -> str:
    """The logger's name of what a program says: the module that runs, or that `lco` names."""
    name = sys.argv[0] if sys.argv else ""
    if name.startswith("lco "):
        return f"lco_jax.{name.removeprefix('lco ')}"
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return "lco_jax" if spec is None else spec.name.removesuffix(".__main__")


# ---- progress


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> tqdm:
    """A progress bar of tqdm, which --quiet and JSON hide. options: tqdm's."""
    options["disable"] = options.get("disable", False) or _manner.quiet or _manner.as_json
    options.setdefault("mininterval", IN_A_TERMINAL if _is_terminal() else IN_A_FILE)
    return tqdm(iterable, **options)


@contextmanager
def waiting(what: str, shown: bool = True) -> Iterator[None]:
    """Within, a line says what the user waits for, and for how long already. shown: False in all
    processes of a job but one.
    """
    line = progress_bar(
        desc=what, bar_format="{desc} … {elapsed}", leave=not _is_terminal(), disable=not shown
    )
    with closing(line), ticking(line):
        yield


@contextmanager
def ticking(line: tqdm) -> Iterator[None]:
    """Within, the time that a bar shows goes on in a terminal, although nothing moves the bar."""
    done = threading.Event()

    def tick() -> None:
        while not done.wait(1.0):
            line.refresh()

    clock = threading.Thread(target=tick, daemon=True)
    if _is_terminal() and not line.disable:
        clock.start()
    try:
        yield
    finally:
        done.set()
        if clock.is_alive():
            clock.join()


def _is_terminal() -> bool:
    return bool(sys.stderr) and sys.stderr.isatty()
