"""The page and what it asks for, over HTTP: search, media and thumbnails, and no other file.

Everything that a request names is looked up among the entries; no path comes from outside.
"""

import asyncio
import io
import mimetypes
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

import numpy as np
from PIL import ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Mount, Route
from starlette.staticfiles import StaticFiles

from lco_jax.core.errors import LcoError
from lco_jax.core.files import ASSETS
from lco_jax.data.content import MEDIA, media_kind
from lco_jax.data.images import load_image
from lco_jax.data.media import MediaConfig
from lco_jax.searching.library import Entry, File, Library, mark_of

LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")
RESULTS = 200  # entries of an answer
SOME = 24  # entries that the page shows before a search
THUMBNAIL = 480  # pixels of its longer side
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
# what `encode` takes, and its name in errors -> a unit vector [D]
Encode = Callable[[Any, str], np.ndarray]


class Server:
    """The handlers. about: what the page shows beside the counts; most: bytes of a request."""

    def __init__(
        self,
        library: Library,
        encode: Encode,
        about: Mapping[str, Any],
        most: int,
    ):
        self.library = library
        self.encode = encode
        self.about = about
        self.most = most
        self.model = asyncio.Lock()  # one query at a time; media are served meanwhile

    def app(self, hosts: tuple[str, ...]) -> Starlette:
        """The application. hosts: names by which it may be called; ("*",) for any.

        A page elsewhere whose name points at this machine (DNS rebinding) calls it by another name.
        """
        routes = [
            Route("/about", self.describe),
            Route("/search", self.search, methods=["POST"]),
            Route("/media/{key}/{number:int}", self.medium),
            Route("/thumbnail/{key}/{number:int}", self.thumbnail),
            Mount(
                "/",
                StaticFiles(directory=ASSETS / "search", html=True),
            ),
        ]
        known = Middleware(
            TrustedHostMiddleware,
            allowed_hosts=hosts,
            www_redirect=False,
        )
        refusals = {LcoError: _refuse, HTTPException: _refuse}
        return Starlette(
            routes=routes,
            middleware=[known],
            exception_handlers=refusals,
        )

    async def describe(self, request: Request) -> Response:
        """What the page shows before a search: the model, the counts, and some of the entries."""
        entries = list(self.library.entries.values())
        step = -(-len(entries) // SOME)
        some = [_shown(entry, None) for entry in entries[::step]]
        counts = self.library.counts
        return JSONResponse(
            {
                **self.about,
                "counts": counts,
                "most": self.most,
                "some": some,
            }
        )

    async def search(self, request: Request) -> Response:
        """A form with any of text, file and like (an entry's key), and the kinds to look among.

        like alone is that entry's vector; everything else is embedded, together. By default all
        kinds are looked at.
        """
        self._check(request)
        async with request.form(max_files=1, max_fields=20) as form:
            file = form.get("file")
            name = file.filename if isinstance(file, UploadFile) else "the query"
            parts = [await self._part(file)] if isinstance(file, UploadFile) else []
            text = str(form.get("text", ""))
            entry = self._entry(str(form["like"])) if "like" in form else None
            asked = form.getlist("kind")
        if text.strip():
            parts.append({"type": "text", "text": text})
        if not parts and entry is None:
            empty = "The query is empty; type a text, or give an image, a sound or a clip."
            raise HTTPException(400, empty)
        async with self.model:
            began = time.monotonic()
            vector = await self._vector(parts, entry, name)
        encoded = time.monotonic()
        found = await run_in_threadpool(self._nearest, vector, asked)
        results = [_shown(one, cosine) for one, cosine in found if one is not entry]
        seconds = {
            "encode": encoded - began,
            "search": time.monotonic() - encoded,
        }
        return JSONResponse({"results": results[:RESULTS], "seconds": seconds})

    def _nearest(self, vector: np.ndarray, asked: list[Any]) -> list[tuple[Entry, float]]:
        """One entry more than an answer holds, among the kinds asked for, or all kinds."""
        kinds = [kind for kind in self.library.counts if kind in asked or not asked]
        return self.library.nearest(vector, kinds, RESULTS + 1)

    async def _vector(
        self,
        parts: list[dict[str, Any]],
        entry: Entry | None,
        name: str,
    ) -> np.ndarray:
        """The vector of an entry's parts and a query's parts together."""
        if entry is None:
            return await run_in_threadpool(self.encode, parts, name)
        if not parts:
            return self.library.vector(entry.key)
        return await run_in_threadpool(self.encode, entry.parts + parts, name)

    def _check(self, request: Request) -> None:
        """Refuse another site's queries, and queries that are too long or of no stated length."""
        origin = request.headers.get("origin")
        if origin is not None and urlsplit(origin).netloc != request.headers["host"]:
            raise HTTPException(
                403,
                f"{origin} is another site, and may not search here.",
            )
        length = request.headers.get("content-length", "")
        if not length.isdecimal() or int(length) > self.most:
            raise HTTPException(
                413,
                f"A query states its length, at most {self.most:,} bytes (--max-upload).",
            )

    async def _part(self, file: UploadFile) -> dict[str, Any]:
        """An uploaded file as a part of a query."""
        kind = media_kind(file.filename) or (file.content_type or "").split("/")[0]
        if kind not in MEDIA:
            raise LcoError(f"{file.filename} is no image, sound or clip")
        if kind not in self.about["modalities"]:
            known = ", ".join(self.about["modalities"])
            raise LcoError(f"{file.filename} is {kind}, and this model takes {known}")
        return {"type": kind, kind: await file.read()}

    def _entry(self, key: str) -> Entry:
        if key not in self.library.entries:
            raise HTTPException(
                404,
                "There is no such entry; the index has changed, so load the page again.",
            )
        return self.library.entries[key]

    def _file(self, request: Request) -> File:
        """The file that a request names, as it was when it was indexed."""
        files = self._entry(request.path_params["key"]).files
        if request.path_params["number"] >= len(files):
            raise HTTPException(404, "The entry has no such file.")
        file = files[request.path_params["number"]]
        if file.mark is None or mark_of(file.path) != file.mark:
            raise HTTPException(
                410,
                "The file has changed or is gone since it was indexed; start the search again.",
            )
        return file

    def medium(self, request: Request) -> Response:
        """A file, or a range of it. What browsers might run is sent without its type."""
        file = self._file(request)
        type_ = mimetypes.guess_type(file.path)[0] or ""
        inert = type_.startswith(f"{file.kind}/") and "xml" not in type_
        return FileResponse(
            file.path,
            media_type=type_ if inert else "application/octet-stream",
        )

    def thumbnail(self, request: Request) -> Response:
        """An image as a small WebP, upright, also of formats that browsers do not read."""
        file = self._file(request)
        if file.kind != "image":
            raise HTTPException(404, "Only images have thumbnails.")
        image = ImageOps.exif_transpose(load_image(file.path, "thumbnail", MediaConfig()))
        image.thumbnail((THUMBNAIL, THUMBNAIL))
        content = io.BytesIO()
        image.save(content, "WEBP", quality=90)
        headers = {"cache-control": "private, max-age=86400"}
        return Response(
            content.getvalue(),
            headers=headers,
            media_type="image/webp",
        )


def _shown(entry: Entry, cosine: float | None) -> dict[str, Any]:
    """A result as the page takes it."""
    return {
        "key": entry.key,
        "kind": entry.kind,
        "label": entry.label,
        "text": entry.text,
        "files": [file.kind for file in entry.files],
        "cosine": cosine,
    }


async def _refuse(request: Request, error: Exception) -> Response:
    """An error as one sentence."""
    if isinstance(error, HTTPException):
        return JSONResponse({"error": error.detail}, error.status_code)
    return JSONResponse({"error": str(error)}, 422)
