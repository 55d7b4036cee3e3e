"""The training loop waits for nothing, and moves nothing to or from devices unasked.

A stand-in of a step (that of `benchmarks loop`) takes its time on the device, and a batch takes as
long on the host.
"""

import threading
import traceback

import jax
import pytest

from benchmarks import loop as bench
from lco_jax import LcoError, loop
from lco_jax.core.sharding import make_mesh

SECONDS, STEPS = 0.15, 12


@pytest.fixture
def run(tmp_path, cache, monkeypatch):
    monkeypatch.setattr("lco_jax.make_mesh", lambda: make_mesh(devices=jax.devices()[:1]))
    return bench.stand_in(tmp_path, SECONDS, STEPS)


@pytest.fixture
def step(run):
    return bench.slow_step(run.job.mesh, bench.rounds_of(SECONDS))


def test_while_a_step_runs_the_next_batch_is_made_and_only_then_its_metrics_are_read(
    run, step, monkeypatch
):
    """By the order of events. The saved position is that of the batches used, not of those read."""
    positions, fetched, iterator = [], [], run.iterator.iterator
    save, get, read = run.store.save, jax.device_get, threading.Semaphore(0)
    next_batch = run.iterator.__class__.__next__

    class Counted(run.iterator.__class__):
        def __next__(self):
            read.release()
            return next_batch(self)

    def dispatched(*arguments):
        """Here nothing but another thread can read the batch after the next."""
        wanted = 3 if run.step == 0 else 1  # this batch, the next, and the one after
        assert run.step + 2 >= STEPS or all(read.acquire(timeout=60) for _ in range(wanted))
        assert len(fetched) == max(
            run.step - 1, 0
        )  # those of the step before wait for this dispatch
        return step(*arguments)

    def fetch(tree):
        fetched.extend([tree] if "loss" in tree else [])
        return get(tree)

    run.iterator.__class__ = Counted
    run.store.save = lambda step, state, position: (
        positions.append(position),
        save(step, state, position),
    )
    monkeypatch.setattr(jax, "device_get", fetch)
    run.train_step = dispatched
    assert loop.run(run)
    (position,) = positions
    iterator.set_state(position)
    assert next(iterator).where == tuple(f"mem:{i}" for i in numbers_of(run, STEPS))


def numbers_of(run, batch):
    """The records of a batch, read anew."""
    fresh = bench.stand_in(run.job.workdir / "again", 0.0, 1)
    for _ in range(batch):
        next(fresh.iterator)
    return [int(where.split(":")[1]) for where in next(fresh.iterator).where]


def test_nothing_moves_between_host_and_device_unasked(run, step):
    """In any thread, from the third step to the last but one."""
    jax.block_until_ready(run.state)

    def guarded(*arguments):
        if run.step in (2, STEPS - 1):
            jax.config.update("jax_transfer_guard", "disallow" if run.step == 2 else "allow")
        return step(*arguments)

    try:
        run.train_step = guarded
        assert loop.run(run)
    finally:
        jax.config.update("jax_transfer_guard", "allow")


def test_the_guard_sees_what_the_loop_once_did(run, step):
    def guarded(*arguments):
        with jax.transfer_guard("disallow"):
            jax.numpy.cos(run.step)  # as a schedule would be evaluated
        return step(*arguments)

    run.train_step = guarded
    with pytest.raises(Exception, match="Disallowed host-to-device transfer"):
        loop.run(run)


def test_an_error_in_the_thread_is_raised_in_the_loop_and_the_thread_ends(run, step):
    read, seen = run.iterator.__class__.__next__, []

    class Failing(run.iterator.__class__):
        def __next__(self):
            if len(seen) == 4:
                raise LcoError("a.jsonl:7: bad")
            seen.append(threading.current_thread())
            return read(self)

    run.iterator.__class__ = Failing
    steps = []
    run.train_step = lambda *arguments: steps.append(1) or step(*arguments)
    with pytest.raises(LcoError, match=r"a\.jsonl:7") as raised:
        loop.run(run)
    names = [frame.name for frame in traceback.extract_tb(raised.value.__traceback__)]
    assert {"run", "__next__"} <= set(names)
    assert 1 <= len(steps) <= 4
    assert seen[-1] is not threading.current_thread()
    assert not seen[-1].is_alive()
