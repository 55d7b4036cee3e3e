"""The numbers that hosts exchange beside the devices; strangers, and processes that are gone."""

import socket
import threading

import numpy as np
import pytest
from processes import run_two

from lco_jax.core import exchange
from lco_jax.core.exchange import Exchange


def opened(monkeypatch, count=3):
    """Let `count` threads be the processes: (the index of each, the invitation, its event)."""
    local, invitation, invited = threading.local(), {}, threading.Event()

    def broadcast(content):
        if local.index == 0:
            invitation.update(content)
            invited.set()
        invited.wait(10)
        return invitation

    monkeypatch.setattr(exchange.jax, "process_count", lambda: count)
    monkeypatch.setattr(exchange.jax, "process_index", lambda: local.index)
    monkeypatch.setattr(exchange, "_broadcast", broadcast)
    return local, invitation, invited


def in_threads(local, jobs):
    """Run each job in a thread that is the process of its number; what each returned or raised."""
    results = {}

    def run(index, job):
        local.index = index
        try:
            results[index] = job(index)
        except Exception as error:
            results[index] = error

    threads = [threading.Thread(target=run, args=pair, daemon=True) for pair in enumerate(jobs)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(results) == len(jobs), results
    return [results[i] for i in range(len(jobs))]


def test_every_process_gets_the_largest_of_all_numbers(monkeypatch):
    local, *_ = opened(monkeypatch)

    def job(index):
        one = Exchange()
        rounds = [one.most(np.array([index, -index, 7 * k + index % 2])) for k in range(5)]
        assert one.count == 5
        one.close()
        return np.array(rounds)

    for got in in_threads(local, [job] * 3):
        assert got.tolist() == [[2, 0, 7 * k + 1] for k in range(5)]


def test_alone_nothing_is_sent():
    alone = Exchange()
    assert alone.most(np.array([3, 4])).tolist() == [3, 4]
    alone.close()


@pytest.mark.parametrize("sends", [b"x" * 32, b"", None])
def test_a_stranger_is_not_let_in(monkeypatch, sends):
    """Whether it sends nonsense, leaves, or says nothing, the processes still meet."""
    monkeypatch.setattr(exchange, "ATTEMPT", 1)
    local, invitation, invited = opened(monkeypatch, count=2)
    silent = []

    def call(_):
        invited.wait(10)
        stranger = socket.create_connection(("127.0.0.1", invitation["port"]))
        if sends is None:
            silent.append(stranger)
            stranger.settimeout(10)
            while stranger.recv(100):  # until process 0 gives it up
                pass
        with stranger:
            stranger.sendall(sends or b"")
        return Exchange().most(np.array([2]))

    def first(_):
        return Exchange().most(np.array([1]))

    assert [int(x[0]) for x in in_threads(local, [first, call])] == [2, 2]


@pytest.mark.parametrize("gone", [0, 1])
def test_a_process_that_is_gone_is_noticed_by_who_waits(monkeypatch, gone):
    local, *_ = opened(monkeypatch, count=2)

    def job(index):
        one = Exchange()
        one.most(np.array([1]))
        if index == gone:
            return one.close()
        return one.most(np.array([2]))

    other = in_threads(local, [job] * 2)[1 - gone]
    assert isinstance(other, ConnectionError)


def test_closing_wakes_the_thread_that_waits(monkeypatch):
    local, *_ = opened(monkeypatch, count=2)

    def first(_):
        one = Exchange()
        threading.Timer(0.3, one.close).start()
        return one.most(np.array([1]))

    assert isinstance(in_threads(local, [first, lambda _: Exchange()])[0], OSError)


def test_two_real_processes():
    code = """
import sys, jax, numpy as np
jax.distributed.initialize(f"127.0.0.1:{sys.argv[2]}", 2, int(sys.argv[1]))
from lco_jax.core.exchange import Exchange
one = Exchange()
print(one.most(np.array([int(sys.argv[1]), 5 - int(sys.argv[1])])).tolist())
one.close()
"""
    for _, out, err in run_two(code):
        assert "[1, 5]" in out.splitlines(), err  # gloo prints lines of its own
