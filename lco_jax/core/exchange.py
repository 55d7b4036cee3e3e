"""What hosts tell each other while their devices compute: the largest of every process's numbers,
over TCP.

jax's collectives run on devices, where they wait behind the step that is under way, and those of
two threads may meet in another order elsewhere; the store of its coordination service has no public
name. So process 0 listens on a port of its own, the others connect to it once, and whoever waits
here holds up no device and no collective. What is sent is numbers, never code.
"""

import hashlib
import json
import secrets
import socket
from collections.abc import Iterator
from contextlib import suppress

import jax
import numpy as np
from jax.experimental import multihost_utils

from lco_jax.core.errors import PeerLost

PATIENCE = 300.0  # seconds in which all processes are to have connected
ATTEMPT = 10.0  # seconds that one attempt to connect may take
INVITATION = 1024  # bytes


class Exchange:
    """Connects this process with the others, all of which open it together; alone it connects
    nothing.

    count: how often numbers were exchanged.
    """

    def __init__(self) -> None:
        self.count = 0
        self._peers: list[socket.socket] = []
        if jax.process_count() == 1:
            return
        if jax.process_index() == 0:
            self._peers = _invite(jax.process_count() - 1)
        else:
            self._peers = [_join()]

    def most(self, numbers: np.ndarray) -> np.ndarray:
        """The largest of every process's numbers, one by one: int64 [n] -> int64 [n].

        Each process calls it as often, with as many numbers, and from one thread. Raises
        `ConnectionError` where another process is gone.
        """
        self.count += 1
        if not self._peers:
            return numbers
        try:
            return self._most(numbers)
        except OSError as error:
            raise PeerLost(f"the connection to another process is gone ({error})") from error

    def _most(self, numbers: np.ndarray) -> np.ndarray:
        if jax.process_index():
            self._peers[0].sendall(numbers.tobytes())
            return _numbers(self._peers[0], len(numbers))
        told = [_numbers(peer, len(numbers)) for peer in self._peers]
        largest = np.max([numbers, *told], axis=0)
        for peer in self._peers:
            peer.sendall(largest.tobytes())
        return largest

    def close(self) -> None:
        """Disconnect. A thread that waits in `most` gets a `ConnectionError`."""
        for peer in self._peers:
            with suppress(OSError):  # the other side was faster
                peer.shutdown(socket.SHUT_RDWR)  # which, unlike `close`, wakes whoever waits
            peer.close()


def _invite(count: int) -> list[socket.socket]:
    """Process 0: tell the others where to connect, and wait until all have."""
    token = secrets.token_bytes(32)
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    dual = family == socket.AF_INET6
    with socket.create_server(("", 0), family=family, dualstack_ipv6=dual, backlog=count) as server:
        port = server.getsockname()[1]
        _broadcast({"hosts": list(_names()), "port": port, "token": token.hex()})
        server.settimeout(PATIENCE)
        peers: list[socket.socket] = []
        while len(peers) < count:
            try:
                peer, _ = server.accept()
            except TimeoutError as error:
                missing = count - len(peers)
                raise PeerLost(f"no connection from {missing} of the processes") from error
            if _knows(peer, token):
                peers.append(_ready(peer))
            else:
                peer.close()
    return peers


def _join() -> socket.socket:
    """Another process: connect to the first of process 0's addresses at which it is."""
    invitation = _broadcast({})
    token = bytes.fromhex(invitation["token"])
    reasons = []
    for host in invitation["hosts"]:
        try:
            peer = socket.create_connection((host, invitation["port"]), timeout=ATTEMPT)
            peer.sendall(token)
            if _receive(peer, 32) == hashlib.sha256(token).digest():
                return _ready(peer)
            reasons.append(f"{host}: somebody else")
            peer.close()
        except OSError as error:
            reasons.append(f"{host}: {error}")
    raise PeerLost(
        f"no connection to process 0 at port {invitation['port']} of its host ({'; '.join(reasons)}); "
        "machines of one run have to reach each other"
    )


def _names() -> Iterator[str]:
    """What this host may be called by others, the likeliest first; those on it reach it by the
    last."""
    probe = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    with probe, suppress(OSError):  # where no route leads out of here
        probe.connect(("192.0.2.1", 9))  # sends nothing: it only looks for the way out
        yield probe.getsockname()[0]
    yield socket.gethostname()
    yield "127.0.0.1"


def _broadcast(content: dict) -> dict:
    """Process 0's content, in every process."""
    told = np.zeros(INVITATION, np.uint8)
    text = np.frombuffer(json.dumps(content).encode(), np.uint8)
    told[: len(text)] = text
    every = multihost_utils.broadcast_one_to_all(told)
    return json.loads(bytes(every.astype(np.uint8)).rstrip(b"\0"))


def _knows(peer: socket.socket, token: bytes) -> bool:
    """Whether who connected was invited; and say so."""
    peer.settimeout(ATTEMPT)
    try:
        if not secrets.compare_digest(_receive(peer, len(token)), token):
            return False
        peer.sendall(hashlib.sha256(token).digest())
    except OSError:
        return False
    return True


def _ready(peer: socket.socket) -> socket.socket:
    """A connection for short messages that may be waited for as long as a step takes."""
    peer.settimeout(None)  # the watchdog has patience for all that a step waits for
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return peer


def _numbers(peer: socket.socket, count: int) -> np.ndarray:
    return np.frombuffer(_receive(peer, 8 * count), np.int64)


def _receive(peer: socket.socket, size: int) -> bytes:
    """Exactly so many bytes."""
    parts = bytearray()
    while len(parts) < size:
        part = peer.recv(size - len(parts))
        if not part:
            raise ConnectionError("the other side has closed it")
        parts += part
    return bytes(parts)
