"""Units shared among Ray actors, any of which may die: what is left is the units without a part.

A driver hands each actor that has started a few units at a time. Where an actor is lost, it starts
another one and hands its units out again. Ray's own restarts would keep units for an actor whose
machine does not come back.
"""

import logging
import os
import signal
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any

from tqdm import tqdm

from lco_jax.core.errors import PEER_LOST, PREEMPTED, LcoError, explained, reason
from lco_jax.core.extras import install_line
from lco_jax.core.files import on_bucket
from lco_jax.data.parts import PartsFolder, Unit

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
with explained(f"--ray needs more packages: {install_line('ray')}", ImportError):
    import ray
    from ray.exceptions import RayActorError, RayError, RayTaskError

MakeParts = Callable[[Sequence[Unit]], None]
Load = Callable[[int], MakeParts]  # from the CPUs that an actor may use
LOSSES = 3  # of every actor, with no part made between, after which the work is given up
UNITS_AT_ONCE = 8  # the most that an actor is handed; it has to start its pipeline for each handful
POLL = 1.0  # seconds between looks at what actors have done
LOOK, LOOK_BUCKET = 1.0, 10.0  # seconds between looks at the parts that are there
START_SECONDS = 1200.0  # the longest time without an actor that has started
OBJECT_STORE = 2**27  # bytes, of a local cluster: next to nothing goes through it
# a process that takes all chips of a host must not wait for the slice's other hosts
TPU_BOUNDS = {4: "2,2,1", 8: "2,4,1"}
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Cluster:
    """address: "local", or of an existing cluster. actors: how many; None: as many as fit.

    resources: what an actor takes, such as {"GPU": 1}; None: a GPU or a TPU chip where there are
    any, else a CPU.
    """

    address: str
    actors: int | None
    resources: Mapping[str, float] | None


class Worker:
    """The actor. load: makes what makes parts of units; cpus: how many it may use."""

    def __init__(self, load: Load, cpus: int, folder: str):
        with suppress(OSError):  # where relative paths start; another machine may not have it
            os.chdir(folder)
        self.load, self.cpus = load, cpus
        self.make_parts: MakeParts | None = None

    def ready(self) -> None:
        """Returns when the actor has started."""

    def run(self, units: Sequence[Unit]) -> str | None:
        """Make the parts of units; the message of the `LcoError` that kept it from that."""
        try:
            if self.make_parts is None:
                self.make_parts = self.load(self.cpus)
            self.make_parts(units)
        except LcoError as error:
            return str(error)
        return None


def run_on_ray(
    cluster: Cluster,
    load: Load,
    folder: PartsFolder,
    units: Sequence[Unit],
    progress: tqdm,
    before: int = 0,
) -> None:
    """Make the parts of units in `folder`. load: is called in every actor that is handed units.

    before: so many of the units are made before others are handed out. Whatever `load` leaves for
    all is then there.

    Raises what an actor raises, and where actors keep dying and nothing is made.
    """
    seconds = LOOK_BUCKET if on_bucket(folder.path) else LOOK
    with _connected(cluster) as stopped:
        driver = _Driver(cluster, load, folder, stopped)
        try:
            next_look = 0.0
            for _ in chain(driver.rounds(units[:before]), driver.rounds(units[before:])):
                if time.monotonic() >= next_look:
                    new = sum(unit.rows for unit in folder.units()) - progress.n
                    if new > 0:
                        progress.update(new)
                    next_look = time.monotonic() + seconds
        except RayTaskError:  # a bug: its traceback
            raise
        except RayError as error:  # Ray itself, or the machine with its head
            logger.warning("Ray was lost: %s", reason(error))
            raise SystemExit(PEER_LOST) from error
        finally:
            driver.stop()


class _Driver:
    """Hands out units to actors, each of which starts, makes units, or is idle."""

    def __init__(self, cluster: Cluster, load: Load, folder: PartsFolder, stopped: threading.Event):
        self.load, self.folder, self.stopped = load, folder, stopped
        self.count, resources = _choose(cluster)
        local = cluster.address == "local"
        cpus = os.cpu_count() if local else ray.cluster_resources().get("CPU")
        self.cpus = int((cpus or 1) // self.count)
        self.actor_class = ray.remote(Worker).options(**_options(resources))
        self.calls: dict[Any, tuple[Any, list[Unit]]] = {}  # call -> actor, its units
        self.idle: list[Any] = []
        for _ in range(self.count):
            self._start()
        self.made, self.losses = 0, 0  # parts at the last loss; actors lost since there were fewer
        self.working = time.monotonic()  # when an actor was last seen at work

    def _start(self) -> None:
        actor = self.actor_class.remote(self.load, self.cpus, os.getcwd())
        self.calls[actor.ready.remote()] = actor, []

    def rounds(self, units: Sequence[Unit]) -> Iterator[None]:
        """Yields every now and then until all units have been made."""
        left = deque(units)
        while left or self._is_working():
            while left and self.idle:
                self._hand_out(left)
            ended, _ = ray.wait(list(self.calls), timeout=POLL)
            for call in ended:
                self._take_back(call, left)
            self._check_start()
            if self.stopped.is_set():
                raise SystemExit(PREEMPTED)
            yield

    def _is_working(self) -> bool:
        return any(units for _, units in self.calls.values())

    def _hand_out(self, left: deque[Unit]) -> None:
        """Give an idle actor units: fewer towards the end, so that all end at about one time."""
        size = max(1, min(UNITS_AT_ONCE, len(left) // (2 * self.count)))
        units = [left.popleft() for _ in range(size)]
        actor = self.idle.pop()
        self.calls[actor.run.remote(units)] = actor, units

    def _take_back(self, call: Any, left: deque[Unit]) -> None:
        """What to do when a call has ended, well or not."""
        actor, units = self.calls.pop(call)
        try:
            failure = ray.get(call)
        except RayActorError as error:
            ray.kill(actor)  # it may live on where it cannot be reached
            self._check_loss(units, error)
            left.extendleft(reversed(units))
            self._start()
            return
        if failure is not None:
            raise LcoError(failure)
        self.idle.append(actor)

    def _check_loss(self, units: Sequence[Unit], error: RayActorError) -> None:
        """Raise where actors are lost again and again, and no part is made."""
        made = len(self.folder.units())
        self.losses = self.losses + 1 if made == self.made else 1
        self.made = made
        if self.losses > LOSSES * self.count:
            at = f"rows {units[0].first:,} to {units[-1].end:,}" if units else "their start"
            why = f"actors die again and again at {at}, and no part is made: {reason(error)}"
            raise LcoError(f"{why}; the logs of Ray say more (by default in /tmp/ray)") from error

    def _check_start(self) -> None:
        """Raise where no actor starts, which Ray would await for ever."""
        now = time.monotonic()
        if self._is_working() or self.idle:
            self.working = now
        if now - self.working > START_SECONDS:
            why = f"no actor has started in {START_SECONDS / 60:.0f} minutes"
            raise LcoError(f"{why}; `ray status` says what the cluster lacks")

    def stop(self) -> None:
        """End all actors."""
        working = [actor for actor, _ in self.calls.values()]
        with suppress(RayError):  # they end with the connection, at the latest
            for actor in (*self.idle, *working):
                ray.kill(actor)


@contextmanager
def _connected(cluster: Cluster) -> Iterator[threading.Event]:
    """Within, a Ray cluster is connected. A local one is started, and ends with this process.

    Yields what SIGTERM sets: an exception that a handler raises does not get through Ray.
    """
    stopped = threading.Event()
    local: dict[str, Any] = {}
    if cluster.address == "local":
        cpus = max(os.cpu_count() or 1, cluster.actors or 1)
        local = {"num_cpus": cpus, "include_dashboard": False, "object_store_memory": OBJECT_STORE}
    at_sigterm = signal.getsignal(signal.SIGTERM)
    cannot = f"--ray={cluster.address}: the cluster cannot be reached or started"
    with explained(cannot, ConnectionError, RuntimeError), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"os\.fork\(\) was called")  # and then exec
        try:
            ray.init(cluster.address, log_to_driver=False, logging_level="ERROR", **local)
        except SystemExit as error:  # Ray's own answer to SIGTERM
            raise SystemExit(PREEMPTED) from error
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    try:
        yield stopped
    finally:
        ray.shutdown()
        signal.signal(signal.SIGTERM, at_sigterm)


def _choose(cluster: Cluster) -> tuple[int, dict[str, float]]:
    """How many actors there are to be, and what each takes."""
    machines = [one["Resources"] for one in ray.nodes() if one["Alive"]]
    accelerators = [kind for kind in ("GPU", "TPU") if any(kind in one for one in machines)]
    kind = (accelerators or ["CPU"])[0]
    resources = {kind: 1.0} if cluster.resources is None else dict(cluster.resources)
    fits = sum(_how_many(resources, machine) for machine in machines)
    more_may_come = cluster.actors is not None and cluster.address != "local"
    if not fits and not more_may_come:
        needed = ", ".join(f"{kind}={amount:g}" for kind, amount in resources.items())
        raise LcoError(f"no machine of the Ray cluster has {needed}, which an actor is to take")
    if cluster.actors is not None:
        return cluster.actors, resources
    one_a_machine = cluster.resources is None and not accelerators
    return len(machines) if one_a_machine else fits, resources


def _how_many(resources: Mapping[str, float], machine: Mapping[str, float]) -> int:
    """How many actors that take these resources find room on a machine."""
    return int(min(machine.get(kind, 0) // amount for kind, amount in resources.items()))


def _options(resources: Mapping[str, float]) -> dict[str, Any]:
    """Ray's options of an actor that takes these resources."""
    others = {kind: x for kind, x in resources.items() if kind not in ("CPU", "GPU")}
    bounds = TPU_BOUNDS.get(int(resources.get("TPU", 0)))
    alone = {"TPU_HOST_BOUNDS": "1,1,1", "TPU_CHIPS_PER_HOST_BOUNDS": bounds}
    return {
        "num_cpus": resources.get("CPU", 0),
        "num_gpus": resources.get("GPU", 0),
        "resources": others,
        "runtime_env": {"env_vars": alone} if bounds else None,
        "scheduling_strategy": "SPREAD",
    }
