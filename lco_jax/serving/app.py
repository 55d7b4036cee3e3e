"""The server's application: what each address answers, and whom it refuses."""

import asyncio
import hmac
import json
import logging
import time
from base64 import b64decode
from binascii import Error as Base64Error
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lco_jax.core.errors import LcoError, TooLong
from lco_jax.searching.connections import BoundedBody
from lco_jax.serving import cohere_form, openai_form
from lco_jax.serving.contents import Reader
from lco_jax.serving.engine import LANES, Content, Engine, Full, Job
from lco_jax.serving.metrics import Metrics
from lco_jax.serving.refusals import Refused

SMALL = 1_000_000  # bytes of a request that is always taken in
INLINE = 200_000  # bytes, and numbers, that the loop reads and writes without a thread
VALUES = 1_000_000  # of a request's JSON, about
PATHS = ("/v1/embeddings", "/v2/embed", "/v1/models", "/health", "/metrics")
OPEN = ("/health",)  # without a key, for whoever watches the server
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """Of a request: bytes, inputs, seconds until its answer. bytes_of_all: of all under way."""

    bytes: int
    inputs: int
    seconds: float
    bytes_of_all: int


class Api:
    """The handlers. names: of the model, the first of them the one that answers have.

    is_ending: whether new requests are refused, because the server ends.
    """

    def __init__(
        self,
        engine: Engine,
        reader: Reader,
        metrics: Metrics,
        names: Sequence[str],
        limits: Limits,
        key: str = "",
    ):
        self.engine, self.reader, self.metrics = engine, reader, metrics
        self.names, self.limits, self.key = names, limits, key
        self.created = int(time.time())
        self.is_ending = False
        self.under_way = 0  # requests
        self._held = 0  # bytes of requests that are under way
        for lane in LANES:
            metrics.waiting.labels(lane).set_function(partial(engine.under_way, lane))
        metrics.programs.set_function(lambda: len(engine.embedder.decoder_shapes))

    def app(self, hosts: Sequence[str], page: ASGIApp | None = None) -> Starlette:
        """The application. hosts: as of the search page, by which names it may be called.

        page: what answers every other address, such as the search page.
        """
        routes = [
            Route("/v1/embeddings", self.embeddings, methods=["POST"]),
            Route("/v2/embed", self.embed, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/health", self.health),
            Route("/metrics", self.tell_metrics),
            *([] if page is None else [Mount("/", page)]),
        ]
        handlers = dict.fromkeys((Refused, HTTPException, ClientDisconnect), _refuse)
        return Starlette(
            routes=routes,
            middleware=[
                Middleware(TrustedHostMiddleware, allowed_hosts=hosts, www_redirect=False),
                Middleware(_Gate, api=self),
                Middleware(BoundedBody, most=self.limits.bytes, answer=_answer_of),
            ],
            exception_handlers={**handlers, Exception: _own_fault},
        )

    # ---- what addresses answer

    async def embeddings(self, request: Request) -> Response:
        """OpenAI's and vLLM's form."""
        async with self._body(request) as body:
            asked = openai_form.read(body, self.reader, *self._dimensions)
            model = self._model(body)
            job = await self._embedded(request, asked.contents)
            tokens = int(job.tokens.sum())
            write = partial(openai_form.answer, asked, job.vectors, tokens, model)
            return await _written(write, job)

    async def embed(self, request: Request) -> Response:
        """Cohere's form."""
        async with self._body(request) as body:
            asked = cohere_form.read(body, self.reader, *self._dimensions)
            self._model(body)
            job = await self._embedded(request, asked.contents)
            tokens = int(job.tokens.sum())
            return await _written(partial(cohere_form.answer, asked, job.vectors, tokens), job)

    @property
    def _dimensions(self) -> tuple[int, int | None]:
        """D, and how many numbers of a vector are sent if a request does not say."""
        return self.engine.embedder.dimension, self.engine.embedder.truncate_dim

    async def models(self, request: Request) -> Response:
        """The model, by each of its names."""
        processor = self.engine.embedder.processor
        about = {
            "max_model_len": processor.max_tokens,
            "dimension": self.engine.embedder.get_embedding_dimension(),
            "modalities": list(processor.modalities),
        }
        return JSONResponse(openai_form.models(self.names, self.created, about))

    async def health(self, request: Request) -> Response:
        """200 while requests are taken, 503 once the server ends or a thread of it has failed."""
        well = self.engine.is_alive and not self.is_ending
        return Response(status_code=200 if well else 503)

    async def tell_metrics(self, request: Request) -> Response:
        """For Prometheus."""
        return PlainTextResponse(self.metrics.text(), media_type="text/plain; version=0.0.4")

    # ---- a request

    def _model(self, body: Mapping[str, Any]) -> str:
        """The name that the answer has. Refuses another model's."""
        model = body.get("model")
        if model is None:
            return self.names[0]
        if model not in self.names:
            known = ", ".join(self.names)
            message = f"there is no model {model!r:.100} here; this server has {known}"
            raise Refused(404, message, "model", "model_not_found")
        return model

    @asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[Mapping[str, Any]]:
        """The JSON of a request, whose bytes are counted as long as it is under way."""
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refused(415, "a request has the content type application/json")
        content = bytearray()
        self.under_way += 1
        try:
            async for chunk in request.stream():
                content += chunk
                self._held += len(chunk)
                if len(content) > SMALL and self._held > self.limits.bytes_of_all:
                    raise Refused(429, "large requests fill the server's memory", retry_after=5)
            if len(content) > INLINE:
                body = await run_in_threadpool(_parsed, content)
            else:
                body = _parsed(content)
            yield body
        finally:
            self.under_way -= 1
            self._held -= len(content)

    async def _embedded(self, request: Request, contents: list[Content]) -> Job:
        """The vectors of a request's inputs."""
        if len(contents) > self.limits.inputs:
            key = contents[0].name.partition("[")[0]
            most = f"a request has at most {self.limits.inputs:,}"
            raise Refused(400, f"{key} has {len(contents):,} inputs, and {most}", key)
        try:
            job = self.engine.start(contents)
        except Full as full:
            message = "too many inputs wait already; try again later"
            raise Refused(429, message, retry_after=full.seconds) from full
        try:
            await self._wait(request, job)
        except LcoError as error:
            name = contents[job.failed].name
            code = "context_length_exceeded" if isinstance(error, TooLong) else None
            raise Refused(400, str(error), name, code) from error
        finally:
            self.engine.end(contents, job)
        self.metrics.tokens.inc(int(job.tokens.sum()))
        return job

    async def _wait(self, request: Request, job: Job) -> None:
        """Wait for a job, as long as the client waits for it."""
        done = asyncio.wrap_future(job.answer)
        gone = asyncio.ensure_future(_gone(request))
        ways = asyncio.FIRST_COMPLETED
        try:
            await asyncio.wait((done, gone), timeout=self.limits.seconds, return_when=ways)
            if done.done():
                return done.result()
            if gone.done():
                raise ClientDisconnect()
            seconds = f"{self.limits.seconds:g}"
            raise Refused(504, f"there was no answer after {seconds} seconds", retry_after=5)
        finally:
            done.cancel()
            gone.cancel()

    def is_known(self, headers: Mapping[bytes, bytes]) -> bool:
        """Whether a request brings the key: as a bearer token, or as a browser's password."""
        if not self.key:
            return True
        given = headers.get(b"authorization", b"")
        scheme, _, token = given.partition(b" ")
        if scheme.lower() == b"basic":
            try:
                token = b64decode(token, validate=True).partition(b":")[2]
            except Base64Error:
                return False
        elif scheme.lower() != b"bearer":
            return False
        return hmac.compare_digest(token.strip(), self.key.encode())


class _Gate:
    """Around the application: who may come in, and how long each answer took."""

    def __init__(self, app: ASGIApp, api: Api):
        self.app, self.api = app, api

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        began = time.monotonic()
        path = scope["path"] if scope["path"] in PATHS else "other"
        status = "none"  # for a client that went away

        async def note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self.app(scope, receive, note)
            else:
                await refusal.answer(scope["path"])(scope, receive, note)
        except Exception:  # its answer is written outside of this
            status = "500"
            raise
        finally:
            self.api.metrics.requests.labels(path, status).inc()
            self.api.metrics.seconds.labels(path).observe(time.monotonic() - began)

    def _refusal(self, scope: Scope) -> Refused | None:
        if scope["path"] not in OPEN and not self.api.is_known(dict(scope["headers"])):
            refused = Refused(401, "the API key is missing or wrong", code="invalid_api_key")
            refused.headers["www-authenticate"] = 'Basic realm="lco"'
            return refused
        if self.api.is_ending and scope["method"] == "POST":
            return Refused(503, "the server ends; ask another one", retry_after=5)
        return None


def _parsed(content: bytearray) -> Mapping[str, Any]:
    """The JSON object of a request's body."""
    if content.count(b",") + content.count(b"[") > VALUES:
        raise Refused(400, f"the JSON has more than {VALUES:,} values; send several requests")
    try:
        body = json.loads(content)
    except (ValueError, RecursionError) as error:
        short = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise Refused(400, f"the body is no JSON: {short}") from error
    if not isinstance(body, dict):
        raise Refused(400, "the body must be a JSON object")
    return body


async def _written(write: Callable[[], bytes], job: Job) -> Response:
    """An answer. A long one is written in a thread."""
    content = await run_in_threadpool(write) if job.vectors.size > INLINE else write()
    return Response(content, media_type="application/json")


async def _gone(request: Request) -> None:
    """Wait until the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _refuse(request: Request, error: Exception) -> Response:
    if isinstance(error, ClientDisconnect):
        return Response(status_code=499)  # nobody reads it
    if isinstance(error, HTTPException):
        refused = Refused(error.status_code, error.detail)
        refused.headers.update(error.headers or {})
        error = refused
    assert isinstance(error, Refused)
    return error.answer(request.url.path)


async def _own_fault(request: Request, error: Exception) -> Response:
    """For what no client is to blame for. The log has its traceback."""
    refused = Refused(500, "the server failed; its log says why")
    return refused.answer(request.url.path)


def _answer_of(scope: Scope, status: int, message: str) -> Response:
    return Refused(status, message).answer(scope["path"])
