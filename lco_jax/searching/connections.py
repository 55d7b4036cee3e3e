"""Clients that are slow, silent or too many, and bodies that are longer than they say.

uvicorn waits for ever for the end of a header or of a body, and starlette reads bodies of any
length. Both get their bounds here.
"""

import asyncio
import time
from collections.abc import Callable
from typing import Any

import h11
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

CONNECTIONS = 128  # open at a time; the one that has waited longest makes room for a new one
PATIENCE = 10.0  # seconds for the header of a request, and before its body must flow
BYTES_A_SECOND = 50_000  # the least that a body must bring after that
Answer = Callable[[Scope, int, str], Response]  # (scope, status, a sentence) -> the answer
STALLED_SECONDS = 300.0  # for a client that does not read its answer; players pause


class Connection(H11Protocol):
    """uvicorn's protocol, with an end to waiting for a client. most: connections."""

    most = CONNECTIONS

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for a request; end another connection if there are too many."""
        super().connection_made(transport)
        self._end: asyncio.TimerHandle | None = None
        self._since = time.monotonic()
        self._end_after(PATIENCE)
        if len(self.connections) > self.most:
            waiting = [one for one in self.connections if not one.is_busy]
            min(waiting, key=lambda one: one._since).transport.abort()

    @property
    def is_busy(self) -> bool:
        """Whether the server owes an answer, and the client reads it."""
        answering = self.cycle is not None and not self.cycle.response_complete
        return answering and not self.flow.write_paused

    def data_received(self, data: bytes) -> None:
        """Bytes of a request. The first of a header begin the wait for its end."""
        super().data_received(data)
        if self.is_busy:
            self._stop_waiting()
        elif self._end is None:
            self._end_after(PATIENCE)

    def pause_writing(self) -> None:
        """The client has stopped to read."""
        super().pause_writing()
        self._end_after(STALLED_SECONDS)

    def resume_writing(self) -> None:
        """The client reads again, or is gone."""
        super().resume_writing()
        self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Nothing more to wait for."""
        self._stop_waiting()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP. Where an answer has begun, that cannot be said any more."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()

    def _end_after(self, seconds: float) -> None:
        self._stop_waiting()
        self._since = time.monotonic()
        self._end = self.loop.call_later(seconds, self.transport.abort)

    def _stop_waiting(self) -> None:
        if self._end is not None:
            self._end.cancel()
            self._end = None


class BoundedBody:
    """An application whose requests have a body only where they POST one, in time and of bounded
    length, whatever their header says. most: bytes. answer: of a request that is refused.
    """

    def __init__(self, app: ASGIApp, most: int, answer: Answer | None = None):
        self.app = app
        self.most = most
        self.answer = answer or _as_error

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request."""
        refused = self._refused(scope)
        if refused is None:
            await self.app(scope, _Body(receive, self.most), send)
        else:
            await self.answer(scope, *refused)(scope, receive, send)

    def _refused(self, scope: Scope) -> tuple[int, str] | None:
        """A status and a sentence for a request whose header is enough to refuse it."""
        if scope["type"] != "http":
            return None
        headers: dict[bytes, bytes] = dict(scope["headers"])
        length = headers.get(b"content-length", b"").decode("latin-1")
        chunked = b"transfer-encoding" in headers
        if scope["method"] != "POST":
            return (413, "Such a request has no body.") if chunked or length.strip("0") else None
        if chunked or not _is_at_most(length, self.most):
            return 413, too_long(self.most)
        return None


def _as_error(scope: Scope, status: int, message: str) -> Response:
    return JSONResponse({"error": message}, status)


def too_long(most: int) -> str:
    """The refusal of a query that is too long, or of no stated length."""
    return f"A query states its length, at most {most:,} bytes (--max-upload)."


def _is_at_most(length: str, most: int) -> bool:
    return length.isdecimal() and len(length) <= 20 and int(length) <= most


class _Body:
    """`receive` of a request, which raises once its body is too long or too slow."""

    def __init__(self, receive: Receive, most: int):
        self._receive = receive
        self._most = most
        self._bytes = 0
        self._began = time.monotonic()
        self._ended = False

    async def __call__(self) -> Message:
        if self._ended:  # what comes now is the client's farewell
            return await self._receive()
        allowed = PATIENCE + self._bytes / BYTES_A_SECOND
        left = self._began + allowed - time.monotonic()
        try:
            message: Any = await asyncio.wait_for(self._receive(), max(left, 0.001))
        except TimeoutError as error:
            raise HTTPException(408, "The query came too slowly; try again.") from error
        self._bytes += len(message.get("body", b""))
        self._ended = not message.get("more_body", False)
        if self._bytes > self._most:
            raise HTTPException(413, too_long(self._most))
        return message
