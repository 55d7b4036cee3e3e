"""Inputs of `encode` -> what the model reads, prepared ahead of time in threads or processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from concurrent.futures import Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from multiprocessing.reduction import ForkingPickler
from numbers import Integral
from typing import Any, TypeVar

from PIL import Image

from lco_jax.core.errors import LcoError, check_at_least_1, is_number
from lco_jax.data.arrays import decoder_kind, is_table
from lco_jax.data.content import Messages, as_content, check_not_open, describe
from lco_jax.data.instructions import Instruction
from lco_jax.data.lazy import LazyImage, lazy_image
from lco_jax.data.names import media_kind
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import ChatTokenizer, Prompt, as_messages
from lco_jax.data.tower_rows import Processed

T = TypeVar("T")
NamedInput = tuple[Any, str]  # an input, and what errors call it
Prepared = Processed | LcoError  # ready for the model, or why not
TEXTS_AT_ONCE, MEDIA_AT_ONCE = 256, 4  # inputs of one task
THREADS = 2
ONE = str | Mapping | os.PathLike | Image.Image  # what is no list of inputs


def conversation(
    item: Any,
    where: str,
    tokenizer: ChatTokenizer,
    prompt: Prompt | None = None,
    max_length: int | None = None,
) -> Messages:
    """`as_messages`, with texts first cut to `max_length` tokens; chats keep their length."""
    return as_messages(item, where, prompt, partial(tokenizer.cut, max_length=max_length))


@dataclass(frozen=True)
class Preparation:
    """A function from inputs to what the model reads. It can be sent to another process."""

    processor: Processor
    prompt: Prompt | None = None
    max_length: int | None = None

    def __post_init__(self):
        prompt = self.prompt
        if not (prompt is None or isinstance(prompt, str | Instruction) or callable(prompt)):
            raise LcoError(f"prompt is {describe(prompt)}; give a string")
        check_at_least_1(max_length=self.max_length)

    def __call__(self, items: Sequence[NamedInput]) -> list[Prepared]:
        """Each input, prepared, or the error of a bad one."""
        results: dict[int, Prepared] = {}
        chats: dict[int, Messages] = {}
        for i, (item, name) in enumerate(items):
            try:
                chats[i] = self._chat(item, name)
            except LcoError as error:
                results[i] = error
        names = [items[i][1] for i in chats]
        prepared = self.processor.attempt(list(chats.values()), names)
        results |= zip(chats, prepared, strict=True)
        return [results[i] for i in range(len(items))]

    def _chat(self, item: Any, name: str) -> Messages:
        if isinstance(item, LcoError):  # of an input that was malformed where it came from
            raise item
        content, tokenizer = as_content(item, name), self.processor.tokenizer
        return conversation(content, name, tokenizer, self.prompt, self.max_length)


def prepare_ahead(
    preparation: Preparation, items: Iterable[NamedInput], workers: int
) -> Iterator[Prepared]:
    """The prepared inputs in order. A bounded number of them waits for the caller.

    workers: processes; 0 prepares in threads of this one. If a process dies (a codec crashes on a
    malicious file), only the input that killed it becomes an error.
    """
    if not is_number(workers, Integral) or workers < 0:
        raise LcoError(f"workers is {workers!r:.60}; it must be a whole number of 0 or more")
    pool = Processes(preparation, workers) if workers else Threads(preparation)
    most = 2 * max(workers, 1) + 1
    submitted = ((task, pool.submit(task)) for task in _tasks(items))
    try:
        for task, future in _ahead(submitted, most):
            yield from pool.results(task, future)
    finally:
        pool.executor.shutdown(wait=False, cancel_futures=True)


def _ahead(items: Iterable[T], count: int) -> Iterator[T]:
    """The items, of which `count` are taken before the first is given."""
    waiting = deque[T]()
    for item in items:
        waiting.append(item)
        if len(waiting) == count:
            yield waiting.popleft()
    yield from waiting


def _tasks(items: Iterable[NamedInput]) -> Iterator[list[NamedInput]]:
    """Groups of many texts or a few media."""
    task: list[NamedInput] = []
    media = 0
    for item, name in items:
        task.append((item, name))
        media += not _is_text(item)
        if media == MEDIA_AT_ONCE or len(task) == TEXTS_AT_ONCE:
            yield task
            task, media = [], 0
    if task:
        yield task


def _is_text(item: Any) -> bool:
    if isinstance(item, str):
        return media_kind(item) is None
    return isinstance(item, dict) and item.keys() == {"text"}


class Threads:
    """Prepares in threads of this process."""

    def __init__(self, preparation: Preparation):
        self.preparation = preparation
        self.executor = ThreadPoolExecutor(THREADS)

    def submit(self, task: list[NamedInput]) -> Future:
        return self.executor.submit(self.preparation, task)

    def results(self, task: list[NamedInput], future: Future) -> list[Prepared]:
        return future.result()


class _Pickler(ForkingPickler):
    """Sends a PIL image that is not decoded yet as its file. Pickling the image would decode it."""

    def reducer_override(self, value: Any) -> Any:
        lazy = lazy_image(value, "PIL image") if isinstance(value, Image.Image) else None
        if lazy is None:
            return NotImplemented
        return LazyImage, (lazy.label, lazy.content, lazy.opened)


class Processes:
    """Prepares in processes, which are started again when one dies.

    nice: how far behind others they stand for CPUs, as of the command `nice`.
    """

    def __init__(self, preparation: Preparation, workers: int, nice: int = 0):
        self.preparation, self.workers, self.nice = preparation, workers, nice
        self.executor = self._start(workers)

    def _start(self, workers: int) -> ProcessPoolExecutor:
        return ProcessPoolExecutor(
            workers,
            get_context("spawn"),
            initializer=_begin,
            initargs=(self.preparation, self.nice),
        )

    def submit(self, task: list[NamedInput]) -> Future | None:
        """None for a task that cannot be sent to another process."""
        try:
            sent = bytes(_Pickler.dumps(task))
        except Exception:  # an object may raise anything when it is pickled
            return None
        try:
            return self.executor.submit(_run, sent)
        except BrokenProcessPool:
            self.executor = self._start(self.workers)
            return self.executor.submit(_run, sent)

    def results(self, task: list[NamedInput], future: Future | None) -> list[Prepared]:
        try:
            results = None if future is None else future.result()
        except BrokenProcessPool:
            return [self._alone(item) for item in task]
        return self.preparation(task) if results is None else results

    def _alone(self, item: NamedInput) -> Prepared:
        """One input in a new process, to find the input that crashed the last one."""
        sent = bytes(_Pickler.dumps([item]))
        with self._start(1) as executor:
            try:
                return executor.submit(_run, sent).result()[0]
            except BrokenProcessPool:
                crashed = "the process that decoded it crashed; the file is broken or malicious"
                return LcoError(f"{item[1]}: {crashed}")


_in_process: Callable[[Sequence[NamedInput]], list[Prepared]]


def _begin(preparation: Preparation, nice: int) -> None:
    """The first thing a process does. Its parent handles Ctrl-C, and takes it along if killed."""
    global _in_process
    _in_process = preparation
    os.nice(nice)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run(sent: bytes) -> list[Prepared] | None:
    """None for inputs that cannot be made again in this process."""
    try:
        task = ForkingPickler.loads(sent)
    except Exception:  # an object may raise anything when it is made again
        return None
    return _in_process(task)


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items. A thread makes the next one while the caller has the one before."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def named(inputs: Iterable[Any], names: Iterable[str] | None) -> Iterator[NamedInput]:
    """(input, name) of each; by default "input 0" and so on."""
    if names is None:
        return ((item, f"input {i}") for i, item in enumerate(inputs))
    if isinstance(names, str) or not isinstance(names, Iterable):
        raise LcoError(f"names is {names!r:.60}; give a list with a name of each input")
    if isinstance(inputs, Sized) and isinstance(names, Sized) and len(inputs) != len(names):
        raise LcoError(f"there are {len(inputs)} inputs, and {len(names)} names")
    return zip(inputs, names, strict=True)


def as_list(inputs: Any) -> tuple[list[Any], bool]:
    """(the inputs, whether it was a single one). Raises for what is neither."""
    check_inputs(inputs)
    if is_single(inputs):
        return [inputs], True
    return list(inputs), False


def check_several(inputs: Any) -> None:
    """Raise for a single input where several are iterated, and for what `check_inputs` refuses."""
    check_inputs(inputs)
    if isinstance(inputs, ONE) or decoder_kind(inputs):
        raise LcoError(f"inputs is a single {type(inputs).__name__}; give a list of inputs")


def check_inputs(inputs: Any) -> None:
    """Raise for what holds inputs in no order, or in another shape than a list."""
    what = f"inputs is {type(inputs).__name__}"
    if is_table(inputs):
        raise LcoError(
            f'{what}; give a column, as list(table["text"]), or rows, as a list of {{"text": …}}'
        )
    check_not_open(inputs, what)
    if isinstance(inputs, set | frozenset):
        raise LcoError(f"{what}, which has no order; give a list")
    if isinstance(inputs, bytes | bytearray | memoryview):
        raise LcoError(f'{what}; give {{"image": …}}, {{"audio": …}} or {{"video": …}}')
    if getattr(inputs, "shape", None) == () and not isinstance(inputs, str):
        raise LcoError(f"{what} without axes; give a list of inputs, or a single one")
    if not isinstance(inputs, Iterable | ONE) and not decoder_kind(inputs):
        raise LcoError(f"{what}; give a list of inputs, or a single one")


def is_single(inputs: Any) -> bool:
    """Whether this is one input, and not a list of inputs."""
    if hasattr(inputs, "__array__") and hasattr(inputs, "ndim"):
        return inputs.ndim > 1  # with one axis it is a list of strings
    if isinstance(inputs, ONE) or decoder_kind(inputs):
        return True
    return isinstance(inputs, list) and bool(inputs) and all(map(_is_message, inputs))


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and "role" in item
