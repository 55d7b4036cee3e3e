"""The page and what it asks for, over HTTP: search, media and thumbnails, and no other file.

Everything that a request names is looked up among the entries; no path comes from outside.
"""

import asyncio
import logging
import mimetypes
import os
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, nullcontext
from typing import Any

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from lco_jax.core.errors import LcoError, printable
from lco_jax.core.files import ASSETS
from lco_jax.data.content import MEDIA
from lco_jax.data.media import MediaConfig
from lco_jax.data.names import media_kind
from lco_jax.searching.connections import BoundedBody, Connection
from lco_jax.searching.library import Entry, File, Library, NotAsListed
from lco_jax.searching.queries import Queries
from lco_jax.searching.thumbnails import Thumbnails

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
RESULTS = 200  # entries of an answer
SOME = 24  # entries that the page shows before a search
QUERY_LETTERS = 20_000  # of a query's text: the model would embed it for minutes
SMALL = 1_000_000  # bytes of a query that is kept in memory
# at a time: larger queries that arrive, queries with media on their way, thumbnails
ARRIVING, WITH_MEDIA, THUMBNAILS = 16, 2, 2
WAIT_SECONDS = 60.0  # for the model, or for one's turn
POLICY = (
    "default-src 'self'; img-src 'self' blob:; media-src 'self' blob:; object-src 'none'; "
    "base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
)
HEADERS = [  # of every answer
    ("content-security-policy", POLICY),
    ("cross-origin-resource-policy", "same-origin"),
    ("referrer-policy", "no-referrer"),
    ("x-content-type-options", "nosniff"),
]
FORMS = ("multipart/form-data", "application/x-www-form-urlencoded")
BUSY = "Others are searching; try again in a minute."


class Server:
    """The handlers. about: what the page shows beside the counts; most: bytes of a request; media:
    the caps on thumbnails.

    The model embeds one query at a time, in the order of their coming. Few queries with media are
    on their way at once, so that a query of text waits for no more than these.
    """

    def __init__(
        self,
        library: Library,
        queries: Queries,
        about: Mapping[str, Any],
        most: int,
        media: MediaConfig,
    ):
        self.library = library
        self.queries = queries
        self.about = about
        self.most = most
        self.small_picture = Thumbnails(media)
        self.model = asyncio.Lock()
        self.arriving = asyncio.Semaphore(ARRIVING)
        self.with_media = asyncio.Semaphore(WITH_MEDIA)
        self.thumbnails = asyncio.Semaphore(THUMBNAILS)

    def app(self, hosts: tuple[str, ...]) -> Starlette:
        """The application. hosts: names by which it may be called; ("*",) for any.

        A page elsewhere whose name points at this machine (DNS rebinding) calls it by another name.
        """
        routes = [
            Route("/about", self.describe),
            Route("/search", self.search, methods=["POST"]),
            Route("/media/{key}/{number}", self.medium),
            Route("/thumbnail/{key}/{number}", self.thumbnail),
            Mount("/", StaticFiles(directory=ASSETS / "search", html=True)),
        ]
        known = Middleware(
            TrustedHostMiddleware,
            allowed_hosts=hosts,
            www_redirect=False,
        )
        bounded = Middleware(BoundedBody, most=self.most)
        refusals = dict.fromkeys((LcoError, HTTPException, ClientDisconnect), _refuse)
        return Starlette(
            routes=routes,
            middleware=[known, bounded],
            exception_handlers=refusals,
        )

    async def describe(self, request: Request) -> Response:
        """What the page shows before a search: the model, the counts, and some of the entries."""
        entries = list(self.library.entries.values())
        step = -(-len(entries) // SOME)
        some = [_shown(entry, None) for entry in entries[::step]]
        return JSONResponse(
            {
                **self.about,
                "counts": self.library.counts,
                "most": self.most,
                "some": some,
            }
        )

    async def search(self, request: Request) -> Response:
        """A form with any of text, file and like (an entry's key), and the kinds to look among.

        like alone is that entry's vector; everything else is embedded, together. By default all
        kinds are looked at. The answer has the entry of like, too.
        """
        self._check(request)
        async with self._form(request) as form:
            entry = self._entry(str(form["like"])) if "like" in form else None
            kinds = self._kinds(form.getlist("kind"))
            vector, seconds = await self._vector_of_form(request, form, entry)
        began = time.monotonic()
        found = await run_in_threadpool(self.library.nearest, vector, kinds, RESULTS + 1)
        results = [_shown(one, cosine) for one, cosine in found if one is not entry]
        took = {"encode": seconds, "search": time.monotonic() - began}
        like = None if entry is None else _shown(entry, None)
        return JSONResponse({"results": results[:RESULTS], "like": like, "seconds": took})

    async def _vector_of_form(
        self, request: Request, form: FormData, entry: Entry | None
    ) -> tuple[np.ndarray, float]:
        """The vector of a form's text, file and entry together, and the seconds that it took."""
        text, file = _text_of(form.get("text", "")), form.get("file")
        words = [{"type": "text", "text": text}] if text.strip() else []
        if isinstance(file, UploadFile):
            kind, name = self._kind_of(file), _shown_name(file.filename)
            async with _turn(self.with_media):
                medium = {"type": kind, kind: await file.read()}
                return await self._vector(request, [medium, *words], entry, name)
        has_media = bool(words and entry is not None and entry.files)
        async with _turn(self.with_media) if has_media else nullcontext():
            return await self._vector(request, words, entry, "the query")

    @asynccontextmanager
    async def _form(self, request: Request) -> AsyncIterator[FormData]:
        """The fields of a query. Few large ones arrive at once."""
        type_ = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if type_ not in FORMS:
            raise HTTPException(415, f"A query is a form: {' or '.join(FORMS)}.")
        large = int(request.headers["content-length"]) > SMALL
        if large and self.arriving.locked():
            raise HTTPException(503, BUSY)
        async with self.arriving if large else nullcontext():
            form = await request.form(max_files=1, max_fields=20)
        try:
            yield form
        finally:
            await form.close()

    async def _vector(
        self, request: Request, parts: list[dict[str, Any]], entry: Entry | None, name: str
    ) -> tuple[np.ndarray, float]:
        """The vector of an entry's parts and a query's parts together, and the model's seconds."""
        if not parts and entry is None:
            empty = "The query is empty; type a text, or give an image, a sound or a clip."
            raise HTTPException(400, empty)
        if entry is not None and not parts:
            return self.library.vector(entry.key), 0.0
        if entry is not None:
            for file in entry.files:
                file.check()
            parts = entry.parts + parts
        ready = await run_in_threadpool(self.queries.prepare, parts, name)
        async with _turn(self.model):
            if await request.is_disconnected():  # the page gives up a search for the next one
                raise ClientDisconnect()
            began = time.monotonic()
            vector = await run_in_threadpool(self.queries.embed, ready)
        return vector, time.monotonic() - began

    def _check(self, request: Request) -> None:
        """Refuse another site's queries."""
        origin = request.headers.get("origin")
        if origin is None:
            return
        if origin.partition("://")[2] != request.headers.get("host"):
            site = _shown_name(origin)
            raise HTTPException(403, f"{site} is another site, and may not search here.")

    def _kinds(self, asked: list[Any]) -> list[str]:
        """The kinds to look among: those asked for, or all."""
        known = list(self.library.counts)
        wanted = [kind for kind in asked if kind]
        if not all(kind in known for kind in wanted):
            raise HTTPException(400, f"kind is one of {', '.join(known)}.")
        return [kind for kind in known if kind in wanted or not wanted]

    def _kind_of(self, file: UploadFile) -> str:
        """The kind of an uploaded file, by its name, else by its type."""
        kind = media_kind(file.filename) or (file.content_type or "").split("/")[0]
        name = _shown_name(file.filename)
        if kind not in MEDIA:
            raise LcoError(f"{name} is no image, sound or clip")
        if kind not in self.about["modalities"]:
            known = ", ".join(self.about["modalities"])
            raise LcoError(f"{name} is {kind}, and this model takes {known}")
        return kind

    def _entry(self, key: str) -> Entry:
        if key not in self.library.entries:
            raise HTTPException(
                404,
                "There is no such entry; the index has changed, so load the page again.",
            )
        return self.library.entries[key]

    def _file(self, request: Request) -> File:
        """The file that a request names."""
        files = self._entry(request.path_params["key"]).files
        number = request.path_params["number"]
        if number not in map(str, range(len(files))):
            raise HTTPException(404, "The entry has no such file.")
        return files[int(number)]

    def medium(self, request: Request) -> Response:
        """A file, or a range of it. What browsers might run is sent without its type."""
        file = self._file(request)
        type_ = mimetypes.guess_type(file.path)[0] or ""
        inert = type_.startswith(f"{file.kind}/") and "xml" not in type_
        return _OpenFile(file.open(), type_ if inert else "application/octet-stream")

    async def thumbnail(self, request: Request) -> Response:
        """A small picture of an image, or of a clip."""
        file = self._file(request)
        if file.kind == "audio":
            raise HTTPException(404, "Sounds have no thumbnails.")
        async with _turn(self.thumbnails):
            content = await run_in_threadpool(self.small_picture, file)
        headers = {"cache-control": "private, max-age=86400"}
        return Response(content, headers=headers, media_type="image/webp")


class _OpenFile(FileResponse):
    """A file that is open, so that nothing can take its place. It is closed at the end."""

    def __init__(self, descriptor: int, media_type: str):
        self._descriptor = descriptor
        about = os.fstat(descriptor)
        super().__init__(f"/dev/fd/{descriptor}", media_type=media_type, stat_result=about)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send it."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            os.close(self._descriptor)


@asynccontextmanager
async def _turn(gate: asyncio.Lock | asyncio.Semaphore) -> AsyncIterator[None]:
    """One's turn, in the order of coming. Refuses who has waited too long."""
    try:
        await asyncio.wait_for(gate.acquire(), WAIT_SECONDS)
    except TimeoutError as error:
        raise HTTPException(503, BUSY) from error
    try:
        yield
    finally:
        gate.release()


def _text_of(field: Any) -> str:
    """The text of a query."""
    if not isinstance(field, str):
        raise HTTPException(400, "The field text is a text, not a file.")
    if len(field) > QUERY_LETTERS:
        long = f"The text has {len(field):,} letters, and may have {QUERY_LETTERS:,}."
        raise HTTPException(413, long)
    return field


def _shown_name(name: str | None) -> str:
    """What a client calls something, on one line."""
    return printable((name or "the file")[:200])


def _shown(entry: Entry, cosine: float | None) -> dict[str, Any]:
    """A result as the page takes it."""
    return {
        "key": entry.key,
        "kind": entry.kind,
        "label": entry.label.encode(errors="replace").decode(),
        "text": entry.text,
        "files": [file.kind for file in entry.files],
        "cosine": cosine,
    }


async def _refuse(request: Request, error: Exception) -> Response:
    """An error as one sentence."""
    if isinstance(error, ClientDisconnect):
        return Response(status_code=400)  # nobody reads it
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code, error.headers)
    return JSONResponse({"error": str(error)}, 410 if isinstance(error, NotAsListed) else 422)


def http_server(app: Starlette) -> uvicorn.Server:
    """What answers on sockets: its method `run` does until Ctrl-C."""
    return uvicorn.Server(http_config(app, Connection, timeout_graceful_shutdown=3))


def http_config(app: Starlette, connection: type[Connection], **options: Any) -> uvicorn.Config:
    """uvicorn's settings for an application. connection: its protocol. options: others."""
    # a client's torn form is no news of the server
    logging.getLogger("python_multipart").setLevel(logging.ERROR)
    return uvicorn.Config(
        app,
        http=connection,
        ws="none",
        lifespan="off",
        log_config=None,  # its own would close the handlers that a program has
        log_level="error",
        access_log=False,
        server_header=False,
        headers=HEADERS,
        **options,
    )
