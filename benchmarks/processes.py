"""The processes of a command, of which any may end while one looks."""

from contextlib import suppress

import psutil


def family(process: int) -> list[psutil.Process]:
    """A process and all that descend from it; none where it is gone."""
    with suppress(psutil.NoSuchProcess):
        first = psutil.Process(process)
        return [first, *first.children(recursive=True)]
    return []


def command_of(process: psutil.Process) -> list[str]:
    """The command line of a process; empty where it is gone, also before it is waited for."""
    with suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def resident(process: psutil.Process) -> float:
    """MiB of a process; 0 where it is gone."""
    with suppress(psutil.NoSuchProcess):
        return process.memory_info().rss / 2**20
    return 0.0
