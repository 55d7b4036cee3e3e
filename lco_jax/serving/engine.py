"""The engine: inputs of all clients -> vectors, in two lanes, so that texts never wait for media.

    texts   one thread prepares all that wait         one thread embeds all that are prepared
    media   a few processes prepare, one input each   one thread embeds them, one a pass

A lane embeds what has come while its last pass ran; it never waits for more. With several devices
the lanes' passes take turns: the collectives of two programs would wait for each other.

Dimensions: N inputs of a job, D numbers of a vector.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from lco_jax.core.errors import LcoError
from lco_jax.core.small_vectors import unit
from lco_jax.data.inputs import Preparation, Processes, conversation
from lco_jax.data.prompts import Prompt
from lco_jax.data.tower_rows import Processed
from lco_jax.embedder import OmniEmbedder
from lco_jax.serving.fair import FairQueue
from lco_jax.serving.metrics import Metrics
from lco_jax.serving.shapes import PassShapes

TEXTS_AT_ONCE = 64  # that are prepared together
NICE = 10  # of the processes that prepare media: texts get the CPUs first
LANES = ("text", "media")
logger = logging.getLogger(__name__)


class Full(Exception):
    """Too many inputs wait. seconds: after which there should be room."""

    def __init__(self, seconds: int):
        super().__init__(seconds)
        self.seconds = seconds


class Content(NamedTuple):
    """An input of a request. name: what errors call it. load: makes what `encode` takes. prompt: in
    the place of the engine's; None: that one.

    `load` runs where the input is prepared; it may fetch, and may raise an `LcoError`.
    """

    name: str
    load: Callable[[], Any]
    has_media: bool
    prompt: Prompt | None = None


class Job:
    """The inputs of a request. vectors: float32 [N, D], unit length; tokens: int [N], their counts.

    is_wanted: False once one input failed, or nobody waits for the answer any more. failed: the
    number of the input that failed. answer: is there once every input has its vector, or with the
    error of the first that failed.
    """

    def __init__(self, count: int, dimension: int):
        self.vectors = np.zeros((count, dimension), np.float32)
        self.tokens = np.zeros(count, np.int64)
        self.is_wanted = True
        self.failed = 0
        self.answer: Future[None] = Future()
        self.answer.set_running_or_notify_cancel()  # who waits for it cannot cancel it
        self._left = count
        self._lock = threading.Lock()

    def abandon(self) -> None:
        """Nobody waits any more: what has not begun is not begun."""
        self.is_wanted = False

    def succeed(self, place: int, vector: np.ndarray, tokens: int) -> None:
        """The vector of an input."""
        self.vectors[place] = vector
        self.tokens[place] = tokens
        with self._lock:
            self._left -= 1
            if self._left == 0 and not self.answer.done():
                self.answer.set_result(None)

    def fail(self, place: int, error: Exception) -> None:
        """An input failed, and with it the request."""
        self.is_wanted = False
        with self._lock:
            if not self.answer.done():
                self.failed = place
                self.answer.set_exception(error)


@dataclass
class _Item:
    """An input on its way. place: its number among the inputs of its job. turn: in its lane."""

    job: Job
    place: int
    content: Content
    turn: int = 0
    ready: Processed | None = None

    @property
    def is_wanted(self) -> bool:
        return self.job.is_wanted


class _Lane:
    """The inputs of a lane.

    accepted: how many are on their way, of at most `most`. room: for how many more may be prepared
    before they are embedded; media are large then. passes: how many there were. pace: seconds of an
    input, lately.

    The n-th input of a request has its turn n passes after the request came, at the latest. So
    requests with few inputs do not wait for those with many, nor these for ever for them.
    """

    def __init__(self, most: int, room: int):
        self.most = most
        self.room = threading.Semaphore(room)
        self.waiting: FairQueue[_Item] = FairQueue(lambda item: None)
        self.prepared: FairQueue[_Item] = FairQueue(lambda item: self.room.release())
        self.accepted = 0
        self.passes = 0
        self.pace = 0.1


class Engine:
    """Embeds the inputs of all clients. Close it at the end.

    workers: processes that prepare media. batch_size: the most inputs of a pass; None: any number.
    most: inputs on their way, by lane.
    """

    def __init__(
        self,
        embedder: OmniEmbedder,
        preparation: Preparation,
        shapes: PassShapes,
        metrics: Metrics,
        *,
        workers: int,
        batch_size: int | None,
        most: dict[str, int],
    ):
        self.embedder, self.preparation, self.shapes = embedder, preparation, shapes
        self.metrics, self.batch_size = metrics, batch_size
        self.lanes = {name: _Lane(most[name], room=workers + 3) for name in LANES}
        self._counts = threading.Lock()
        several = embedder.mesh.size > 1
        self._turn: AbstractContextManager = threading.Lock() if several else nullcontext()
        self._processes = [Processes(preparation, 1, NICE) for _ in range(workers)]
        for one in self._processes:  # they start while the first programs are compiled
            one.submit([({"text": ""}, "the first input")])
        self._threads = [
            threading.Thread(target=target, daemon=True) for target in self._what_threads_do()
        ]
        for thread in self._threads:
            thread.start()

    def _what_threads_do(self) -> list[Callable[[], None]]:
        text, media = self.lanes["text"], self.lanes["media"]
        prepare = [partial(_in_process, one) for one in self._processes] or [self.preparation]
        return [
            self._prepare_texts,
            *(partial(self._prepare_media, one) for one in prepare),
            partial(self._embed_lane, text, "text", self._texts_of_pass),
            partial(self._embed_lane, media, "media", partial(media.prepared.take, 1)),
        ]

    # ---- requests

    def start(self, contents: Sequence[Content]) -> Job:
        """Begin with the inputs of a request. Raises `Full` where too many wait."""
        job = Job(len(contents), self.embedder.dimension)
        by_lane = _by_lane(contents, job)
        with self._counts:
            for name, items in by_lane.items():
                lane = self.lanes[name]
                if items and lane.accepted and lane.accepted + len(items) > lane.most:
                    raise Full(self.seconds_to_wait(name))
            for name, items in by_lane.items():
                self.lanes[name].accepted += len(items)
        for name, items in by_lane.items():
            self.metrics.inputs.labels(name).inc(len(items))
            lane = self.lanes[name]
            for number, item in enumerate(items):
                item.turn = lane.passes + number
            lane.waiting.put(items)
        return job

    def end(self, contents: Sequence[Content], job: Job) -> None:
        """The request of these inputs has its answer, or is given up."""
        job.abandon()
        media = sum(content.has_media for content in contents)
        with self._counts:
            self.lanes["media"].accepted -= media
            self.lanes["text"].accepted -= len(contents) - media

    def seconds_to_wait(self, name: str) -> int:
        """About how long a lane needs for what it has."""
        lane = self.lanes[name]
        return min(max(round(lane.accepted * lane.pace), 1), 60)

    @property
    def is_alive(self) -> bool:
        """Whether every thread still works. One that ended has left a traceback in the log."""
        return all(thread.is_alive() for thread in self._threads)

    def under_way(self, name: str) -> int:
        """How many inputs of a lane are on their way."""
        return self.lanes[name].accepted

    # ---- what the threads do

    def _prepare_texts(self) -> None:
        lane = self.lanes["text"]
        while items := lane.waiting.take(TEXTS_AT_ONCE):
            self._prepare(items, self.preparation)
            lane.prepared.put([item for item in items if item.ready is not None])

    def _prepare_media(self, prepare: Callable[[list[Any]], list[Any]]) -> None:
        lane = self.lanes["media"]
        while True:
            lane.room.acquire()
            items = lane.waiting.take(1)
            if not items:
                return
            self._prepare(items, prepare)
            if items[0].ready is None:
                lane.room.release()
            else:
                lane.prepared.put(items)

    def _prepare(self, items: Sequence[_Item], prepare: Callable[[list[Any]], list[Any]]) -> None:
        """Prepare inputs together; those that fail end their jobs."""
        loaded, tasks = [], []
        for item in items:
            try:
                tasks.append((self._loaded(item.content), item.content.name))
                loaded.append(item)
            except Exception as error:  # it is raised again where the request is answered
                item.job.fail(item.place, error)
        try:
            results = prepare(tasks) if tasks else []
        except Exception as error:  # as above
            _each_alone(loaded, error, lambda one: self._prepare(one, prepare))
            return
        for item, result in zip(loaded, results, strict=True):
            if isinstance(result, LcoError):
                item.job.fail(item.place, result)
            else:
                item.ready = result

    def _loaded(self, content: Content) -> Any:
        """What is prepared: of a content with a prompt of its own, the chat that both make."""
        given = content.load()
        if content.prompt is None:
            return given
        most = self.preparation.max_length
        return conversation(given, content.name, self.embedder.tokenizer, content.prompt, most)

    def _texts_of_pass(self) -> list[_Item]:
        """The texts of the next pass: as wide as the first of them, or less wide."""
        devices = self.embedder.mesh.size

        def width(item: _Item) -> int:
            assert item.ready is not None
            return self.shapes.width(len(item.ready))

        def fits(chosen: list[_Item], one: _Item) -> bool:
            widest = width(chosen[0])
            return width(one) <= widest and len(chosen) < self.shapes.most(widest) * devices

        most = self.batch_size or self.shapes.most(0) * devices
        return self.lanes["text"].prepared.take(most, fits)

    def _embed_lane(self, lane: _Lane, name: str, choose: Callable[[], list[_Item]]) -> None:
        while items := choose():
            lane.passes += 1
            began = time.monotonic()
            self._embed(items)
            seconds = time.monotonic() - began
            lane.pace += (seconds / len(items) - lane.pace) / 8
            self.metrics.passed(name, len(items), seconds)
            if lane is self.lanes["media"]:
                lane.room.release()

    def _embed(self, items: Sequence[_Item]) -> None:
        """One pass. If it fails, each input is tried alone, so that one alone fails."""
        ready = [item.ready for item in items if item.ready is not None]
        try:
            with self._turn:
                vectors = unit(self.embedder.embed(ready, batch_size=len(ready)))
        except Exception as error:  # it is raised again where the request is answered
            if len(items) == 1:
                logger.exception("%s could not be embedded", items[0].content.name)
                error = RuntimeError(f"the model failed: {error}")
            _each_alone(items, error, self._embed)
            return
        for item, one, vector in zip(items, ready, vectors, strict=True):
            item.job.succeed(item.place, vector, len(one))
            item.ready = None

    # ---- the end

    def close(self) -> None:
        """End the threads and the processes. What waits is forgotten."""
        for lane in self.lanes.values():
            lane.waiting.close()
            lane.prepared.close()
            for _ in self._threads:
                lane.room.release()
        for processes in self._processes:
            processes.executor.shutdown(cancel_futures=True)


def _by_lane(contents: Sequence[Content], job: Job) -> dict[str, list[_Item]]:
    by_lane: dict[str, list[_Item]] = {name: [] for name in LANES}
    for place, content in enumerate(contents):
        name = "media" if content.has_media else "text"
        by_lane[name].append(_Item(job, place, content))
    return by_lane


def _in_process(processes: Processes, task: list[Any]) -> list[Any]:
    return processes.results(task, processes.submit(task))


def _each_alone(
    items: Sequence[_Item], error: Exception, attempt: Callable[[Sequence[_Item]], None]
) -> None:
    """Try inputs that failed together one by one. A single one fails for good."""
    if len(items) == 1:
        items[0].job.fail(items[0].place, error)
        return
    for item in items:
        attempt([item])
