"""Fetches media for clients, and nothing from the networks that only this machine can see.

The address that a name has is looked up once, checked, and then connected to: a name that is asked
twice may change its answer in between.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from urllib.parse import urljoin, urlsplit

from lco_jax.core.errors import LcoError, explained
from lco_jax.data.media import CHUNK, SOCKET_SECONDS, MediaConfig, check_bytes, took_too_long

REDIRECTS = 5
MOVED = (301, 302, 303, 307, 308)
NAT64 = ipaddress.ip_network("64:ff9b::/96")  # whose last 32 bits are an IPv4 address


class Fetcher:
    """A function (address, what errors call it) -> the bytes that are there.

    media: its caps on bytes and seconds hold. allow_private: also from private addresses.
    """

    def __init__(self, media: MediaConfig, allow_private: bool = False):
        self.media, self.allow_private = media, allow_private

    def __call__(self, address: str, label: str) -> bytes:
        """Raises an `LcoError` for what cannot be fetched, or may not."""
        end = time.monotonic() + self.media.decode_seconds
        # ValueError: no such port, or a name that cannot be encoded
        expected = (OSError, http.client.HTTPException, ValueError)
        with explained(f"{label} cannot be fetched", *expected):
            for _ in range(REDIRECTS + 1):
                connection, target = self._connected(address, label)
                try:
                    connection.request("GET", target, headers={"User-Agent": "lco-jax"})
                    response = connection.getresponse()
                    if response.status not in MOVED:
                        return self._content(response, label, end)
                    address = urljoin(address, response.getheader("location", ""))
                finally:
                    connection.close()
        raise LcoError(f"{label} leads to another address, more than {REDIRECTS} times")

    def _connected(self, address: str, label: str) -> tuple[http.client.HTTPConnection, str]:
        """(a connection to the host of an address, what to ask it for)."""
        parts = urlsplit(address)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise LcoError(f"{label} leads to what is no http or https address")
        secure = parts.scheme == "https"
        port = parts.port or (443 if secure else 80)
        seconds = min(SOCKET_SECONDS, self.media.decode_seconds)
        plain = socket.create_connection(
            (self._checked(parts.hostname, port, label), port), seconds
        )
        connection = http.client.HTTPConnection(parts.hostname, port)
        connection.sock = plain
        if secure:
            context = ssl.create_default_context()
            connection.default_port = 443  # which the Host header leaves out
            connection.sock = context.wrap_socket(plain, server_hostname=parts.hostname)
        target = parts.path or "/"
        return connection, f"{target}?{parts.query}" if parts.query else target

    def _checked(self, host: str, port: int, label: str) -> str:
        """The IP address of a host."""
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        addresses = [str(one[4][0]) for one in found]
        if not self.allow_private:
            for one in addresses:
                if not is_public(one):
                    raise LcoError(f"{label} leads to a private address, which is not fetched")
        return addresses[0]

    def _content(self, response: http.client.HTTPResponse, label: str, end: float) -> bytes:
        if response.status != 200:
            raise LcoError(f"{label} cannot be fetched: its server answers {response.status}")
        promised = response.length or 0
        content = bytearray()
        # read1 returns what has come, so that a slow server cannot outlast the deadline
        while chunk := response.read1(CHUNK):
            content += chunk
            check_bytes(max(len(content), promised), label, self.media)
            if time.monotonic() > end:
                raise LcoError(took_too_long(label, self.media))
        if len(content) < promised:
            sent = f"{len(content)} of {promised} bytes"
            raise LcoError(f"{label} cannot be fetched: its server sent {sent}")
        return bytes(content)


def is_public(address: str) -> bool:
    """Whether an IP address is of a network that everybody sees."""
    found = ipaddress.ip_address(address.partition("%")[0])
    reached = _reached(found) if isinstance(found, ipaddress.IPv6Address) else found
    return reached.is_global and not reached.is_multicast


def _reached(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    """The IPv4 address that an IPv6 address leads to, if it does, or itself."""
    if address in NAT64:
        return ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF)
    return address.ipv4_mapped or address.sixtofour or address
