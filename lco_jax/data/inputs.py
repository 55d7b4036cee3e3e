"""What `encode` takes -> conversations; conversations -> model inputs, ahead of time, in threads or processes."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from lco_jax.core.errors import LcoError
from lco_jax.data.processor import Processor
from lco_jax.data.prompts import (
    ChatTokenizer,
    Messages,
    Prompt,
    as_messages,
    describe,
    is_media_file,
)
from lco_jax.data.tower_rows import Processed

T = TypeVar("T")
TEXTS_AT_ONCE, MEDIA_AT_ONCE = 256, 4  # inputs that one task prepares


def as_content(item: Any, where: str) -> Any:
    """Anything that `encode` takes as what `as_messages` takes: media by their kind, text as it is.

    A string that ends like a media file is one (as in sentence-transformers), and must then exist; {"text": …} is
    always text. Arrays of 3 axes are images and of 4 axes videos; sound needs its sampling rate.
    """
    if isinstance(item, Image.Image):
        return {"image": item}
    if isinstance(item, str | os.PathLike):
        kind = is_media_file(item)
        remote = str(item).startswith(("data:", "http://", "https://"))
        there = kind is not None and (remote or Path(item).is_file())
        if isinstance(item, str) and not there and (kind is None or any(c.isspace() for c in item)):
            return item  # a text, perhaps one that ends in a file's name
        if kind is None:
            raise LcoError(f"{where}: {item} does not end like an image, video or audio file")
        if not there:
            raise LcoError(
                f'{where}: {item} looks like a media file and is none; text can be given as {{"text": …}}'
            )
        return {kind: item}
    if isinstance(item, dict) and "array" in item:
        if "video_metadata" in item:  # as sentence-transformers spells it
            item = {"array": item["array"], "fps": item["video_metadata"]["fps"]}
        return {"audio" if "sampling_rate" in item else "video": item}
    if isinstance(item, np.ndarray):
        kinds = {3: "image", 4: "video"}
        if item.ndim not in kinds:
            raise LcoError(
                f'{where} is {describe(item)}; give sound as {{"array": …, "sampling_rate": …}}, a grey picture as '
                '{"image": array}'
            )
        return {kinds[item.ndim]: item}
    return item


def conversation(
    item: Any,
    where: str,
    tokenizer: ChatTokenizer,
    prompt: Prompt | None = None,
    max_length: int | None = None,
) -> Messages:
    """`as_messages`, with texts first cut to `max_length` tokens; chat messages stay as long as they are."""
    return as_messages(item, where, prompt, partial(tokenizer.cut, max_length=max_length))


@dataclass(frozen=True)
class Preparation:
    """Raw inputs -> model inputs, an error in the place of each bad one; it can be sent to a process."""

    processor: Processor
    prompt: Prompt | None = None
    max_length: int | None = None

    def __call__(self, items: Sequence[tuple[Any, str]]) -> list[Processed | LcoError]:
        """items: (input, its name in errors)."""
        results: list[Processed | LcoError | None] = [None] * len(items)
        good, conversations = [], []
        for i, (item, name) in enumerate(items):
            try:
                content = as_content(item, name)
                conversations.append(
                    conversation(
                        content, name, self.processor.tokenizer, self.prompt, self.max_length
                    )
                )
                good.append(i)
            except LcoError as error:
                results[i] = error
        for i, result in zip(
            good, self.processor.attempt(conversations, [items[i][1] for i in good]), strict=True
        ):
            results[i] = result
        return results  # type: ignore[return-value]


def prepare_ahead(
    preparation: Preparation, items: Iterable[tuple[Any, str]], workers: int
) -> Iterator[Processed | LcoError]:
    """The prepared inputs in order, a bounded number of them ahead of whoever reads.

    workers: processes; 0 prepares in threads of this one. A process that dies (a codec that crashes on a malicious
    file) costs its own input and no other.
    """
    if workers < 0:
        raise LcoError(f"workers is {workers}; it must be 0 or more")
    pool, prepare = _pool(preparation, workers), _run if workers else preparation
    pending: deque[tuple[list[tuple[Any, str]], Future]] = deque()
    source = _tasks(iter(items))
    try:
        while True:
            while len(pending) < 2 * max(workers, 1) + 1 and (task := next(source, None)):
                try:
                    future = pool.submit(prepare, task)
                except BrokenProcessPool:
                    pool = _pool(preparation, workers)
                    future = pool.submit(prepare, task)
                pending.append((task, future))
            if not pending:
                return
            task, future = pending.popleft()
            try:
                results = future.result()
            except BrokenProcessPool:
                results = [_alone(preparation, item) for item in task]
            except (
                Exception
            ):  # of what cannot be sent to a process, or what no check of ours foresaw
                results = [_here(preparation, item) for item in task]
            yield from results
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _tasks(items: Iterator[tuple[Any, str]]) -> Iterator[list[tuple[Any, str]]]:
    """Groups of inputs: many texts or a few media, whatever comes first."""
    group: list[tuple[Any, str]] = []
    media = 0
    for item in items:
        group.append(item)
        media += not _is_text(item[0])
        if media >= MEDIA_AT_ONCE or len(group) >= TEXTS_AT_ONCE:
            yield group
            group, media = [], 0
    if group:
        yield group


def _is_text(item: Any) -> bool:
    if isinstance(item, str):
        return is_media_file(item) is None
    return isinstance(item, dict) and item.keys() == {"text"}


_in_process: Callable[[Sequence[tuple[Any, str]]], list[Processed | LcoError]]


def _begin(preparation: Preparation) -> None:
    """What a worker does first. Ctrl-C is its parent's to handle, and if that is killed, nobody else would end it."""
    global _in_process
    _in_process = preparation
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with, args=(parent_process(),), daemon=True).start()


def _end_with(parent: BaseProcess) -> None:
    parent.join()
    os._exit(1)


def _run(task: Sequence[tuple[Any, str]]) -> list[Processed | LcoError]:
    return _in_process(task)


def _pool(preparation: Preparation, workers: int) -> Executor:
    if workers == 0:
        return ThreadPoolExecutor(2)
    return ProcessPoolExecutor(
        workers, get_context("spawn"), initializer=_begin, initargs=(preparation,)
    )


def _alone(preparation: Preparation, item: tuple[Any, str]) -> Processed | LcoError:
    """One input in a process of its own, after a crash: whose fault was it?"""
    with _pool(preparation, 1) as pool:
        try:
            return pool.submit(_run, [item]).result()[0]
        except BrokenProcessPool:
            return LcoError(
                f"{item[1]}: the process that decoded it crashed; the file is broken or malicious"
            )


def _here(preparation: Preparation, item: tuple[Any, str]) -> Processed | LcoError:
    """One input in this process, whose failure is its own."""
    try:
        return preparation([item])[0]
    except Exception as error:
        return LcoError(f"{item[1]} cannot be prepared: {type(error).__name__}: {error!s:.200}")


def one_ahead(items: Iterator[T]) -> Iterator[T]:
    """The items, the next of which is made in a thread while the caller has the one before."""
    end = object()
    with ThreadPoolExecutor(1) as pool:
        coming = pool.submit(next, items, end)
        while (item := coming.result()) is not end:
            coming = pool.submit(next, items, end)
            yield item


def named(inputs: Iterable[Any], names: Iterable[str] | None) -> Iterator[tuple[Any, str]]:
    """(input, name) of each; by default "input 0" and so on."""
    if names is None:
        return ((item, f"input {i}") for i, item in enumerate(inputs))
    return zip(inputs, names, strict=True)
