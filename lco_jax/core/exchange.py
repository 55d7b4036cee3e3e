"""What the processes of a run tell one another: the largest of every process's numbers.

`agree` is a collective of jax. It suits the time before a run, when devices have nothing to do. In
the loop it would wait behind the step that runs, and collectives of two threads may run in another
order on another host. So `Exchange` goes over TCP, beside the devices: process 0 listens, and the
others connect to it once. Messages are numbers as bytes; nothing is unpickled.
"""

import json
import os
import secrets
import socket
import struct
from collections.abc import Iterator
from contextlib import suppress
from multiprocessing import AuthenticationError
from multiprocessing.connection import Connection, answer_challenge, deliver_challenge

import jax
import numpy as np
from jax.experimental import multihost_utils

from lco_jax.core.errors import PeerLost

PATIENCE = 300.0  # seconds that process 0 waits for each of the others
ATTEMPT = 10  # seconds that an attempt to connect, and each answer of a new peer, may take
INVITATION = 1024  # bytes


def agree(numbers: np.ndarray) -> np.ndarray:
    """The largest of every process's numbers, one by one: int64 [n] -> int64 [n]. A collective."""
    if jax.process_count() == 1:
        return numbers
    return multihost_utils.process_allgather(numbers).max(axis=0)


class Exchange:
    """Connections with the other processes, which all open theirs together.

    count: how many times numbers were exchanged.
    """

    def __init__(self) -> None:
        self.count = 0
        self._peers: list[Connection] = []
        if jax.process_count() == 1:
            return
        if jax.process_index() == 0:
            self._peers = _invite(jax.process_count() - 1)
        else:
            self._peers = [_join()]

    def most(self, numbers: np.ndarray) -> np.ndarray:
        """The largest of every process's numbers, one by one: int64 [n] -> int64 [n].

        Every process calls it equally often, with equally many numbers, and from one thread. Raises
        `ConnectionError` if another process is gone.
        """
        self.count += 1
        if not self._peers:
            return numbers
        try:
            return self._most(numbers)
        except (OSError, EOFError) as error:
            why = str(error) or "it was closed"
            raise PeerLost(f"the connection to another process is gone ({why})") from error

    def _most(self, numbers: np.ndarray) -> np.ndarray:
        if jax.process_index() > 0:
            self._peers[0].send_bytes(numbers.tobytes())
            return _receive(self._peers[0])
        everyones = [numbers, *(_receive(peer) for peer in self._peers)]
        largest = np.max(everyones, axis=0)
        for peer in self._peers:
            peer.send_bytes(largest.tobytes())
        return largest

    def close(self) -> None:
        """Disconnect. A thread that waits in `most` gets a `ConnectionError`."""
        for peer in self._peers:
            with suppress(OSError), socket.socket(fileno=os.dup(peer.fileno())) as same:
                same.shutdown(socket.SHUT_RDWR)  # unlike `close`, it wakes a thread that waits
            peer.close()


def _receive(peer: Connection) -> np.ndarray:
    return np.frombuffer(peer.recv_bytes(), np.int64)


def _invite(count: int) -> list[Connection]:
    """In process 0: let the other processes know where to connect, and wait for all of them."""
    key = secrets.token_bytes(32)
    peers: list[Connection] = []
    with _server() as server:
        port = server.getsockname()[1]
        _broadcast({"hosts": list(_addresses()), "port": port, "key": key.hex()})
        while len(peers) < count:
            try:
                peer, _ = server.accept()
            except TimeoutError as error:
                missing = count - len(peers)
                raise PeerLost(f"no connection from {missing} of the processes") from error
            with suppress(OSError, EOFError, AuthenticationError):  # not a process of this run
                peers.append(_handshake(peer, key, listens=True))
    return peers


def _server() -> socket.socket:
    """A socket that listens on a free port, at every address of this host."""
    if socket.has_dualstack_ipv6():
        server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        server = socket.create_server(("", 0))
    server.settimeout(PATIENCE)
    return server


def _join() -> Connection:
    """In any other process: connect to the first of process 0's addresses at which it answers."""
    invitation = _broadcast({})
    port = invitation["port"]
    reasons = []
    for host in invitation["hosts"]:
        try:
            peer = socket.create_connection((host, port), timeout=ATTEMPT)
            return _handshake(peer, bytes.fromhex(invitation["key"]), listens=False)
        except (OSError, EOFError, AuthenticationError) as error:
            reasons.append(f"{host}: {error or type(error).__name__}")
    raise PeerLost(
        f"no connection to process 0 at port {port} of its host ({'; '.join(reasons)}); "
        "machines of one run have to reach each other"
    )


def _handshake(peer: socket.socket, key: bytes, listens: bool) -> Connection:
    """The peer as a connection, after both sides have proved that they know the key."""
    with peer:
        peer.settimeout(None)  # a connection needs a socket that blocks
        connection = Connection(os.dup(peer.fileno()))
        _limit_waiting(peer, ATTEMPT)
        if listens:
            deliver_challenge(connection, key)
            answer_challenge(connection, key)
        else:
            answer_challenge(connection, key)
            deliver_challenge(connection, key)
        _limit_waiting(peer, 0)  # the watchdog limits what a step may take
    return connection


def _limit_waiting(peer: socket.socket, seconds: int) -> None:
    """Let the system end a read after so many seconds; 0: never."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", seconds, 0))


def _addresses() -> Iterator[str]:
    """This host's addresses: the likeliest first, and last the one for processes on the host."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with probe, suppress(OSError):  # a host without a route to others
        probe.connect(("192.0.2.1", 9))  # sends nothing; it chooses the route
        yield probe.getsockname()[0]
    yield socket.gethostname()
    yield "127.0.0.1"


def _broadcast(content: dict) -> dict:
    """Process 0's content, in every process."""
    text = json.dumps(content).encode().ljust(INVITATION, b"\0")
    received = multihost_utils.broadcast_one_to_all(np.frombuffer(text, np.uint8))
    return json.loads(bytes(received.astype(np.uint8)).rstrip(b"\0"))
