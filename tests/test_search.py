"""`python -m lco_jax.search`: the index, the server and what it refuses, and the page in a real
browser.
"""

import io
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import wave
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import av
import browser
import numpy as np
import pyarrow.parquet
import pytest
from PIL import Image
from processes import with_devices
from starlette.testclient import TestClient

from lco_jax import LcoError, MediaConfig, OmniEmbedder, search
from lco_jax.core.extras import install_line
from lco_jax.core.finite import check_vectors
from lco_jax.data.corpus import Corpus
from lco_jax.data.images import load_image
from lco_jax.data.parts import Unit, VectorParts
from lco_jax.data.vectors import part_table
from lco_jax.searching import connections, nearest
from lco_jax.searching import server as server_module
from lco_jax.searching.library import Entry, File, Library
from lco_jax.searching.nearest import Nearest, with_graph
from lco_jax.searching.server import LOOPBACK, Server, http_server
from lco_jax.searching.thumbnails import Thumbnails

ROOT = Path(__file__).parents[1]


def unit(n, d, seed=0):
    x = np.random.default_rng(seed).standard_normal((n, d)).astype(np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def picture(path, seed, size=(40, 32)):
    """A smooth picture; those of one seed are near duplicates."""
    path.parent.mkdir(parents=True, exist_ok=True)
    small = np.random.default_rng(seed).integers(0, 256, (3, 3, 3), np.uint8)
    Image.fromarray(small).resize(size, Image.Resampling.BICUBIC).save(path)
    return path


def sound(path, hertz):
    t = np.arange(12000) / 16000
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1), file.setsampwidth(2), file.setframerate(16000)
        file.writeframes((12000 * np.sin(2 * np.pi * hertz * t)).astype("<i2").tobytes())
    return path


def clip(path, seed):
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=8, width=64, height=48, pix_fmt="yuv420p")
        for i in range(12):
            pixels = np.roll(
                np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8), 4 * i, axis=1
            )
            file.mux(stream.encode(av.VideoFrame.from_ndarray(pixels)))
        file.mux(stream.encode(None))
    return path


# ---- the index


@pytest.mark.parametrize("k", [1, 7, 500])
def test_exact_search_is_brute_force(k):
    vectors, query = unit(300, 16), unit(1, 16, seed=1)[0]
    rows, cosines = Nearest(vectors)(query, k)
    order = np.argsort(-(vectors.astype(np.float64) @ query))[:k]
    np.testing.assert_array_equal(rows, order)
    np.testing.assert_allclose(cosines, (vectors.astype(np.float64) @ query)[order], atol=1e-6)


def test_a_graph_finds_nearly_all_and_is_kept_until_the_vectors_change(tmp_path, capsys):
    vectors, keys = unit(3000, 24), [f"{i:032x}" for i in range(3000)]
    built = with_graph(vectors, keys, tmp_path, "image")
    said = re.fullmatch(
        r"graph of image: recall@10 (\d\.\d+) against exact search\n", capsys.readouterr().out
    )
    assert 0.9 < float(said[1]) <= 1
    assert nearest.recall(Nearest(vectors)) == 1  # of what is exact
    loaded = with_graph(vectors, keys, tmp_path, "image")
    assert not capsys.readouterr().out, "it was built again"
    for query in unit(8, 24, seed=2):
        rows, cosines = loaded(query, 10)
        np.testing.assert_array_equal(rows, built(query, 10)[0])
        np.testing.assert_allclose(cosines, np.sort(vectors[rows] @ query)[::-1], atol=1e-6)
    first = {file.name for file in tmp_path.iterdir()}
    with_graph(vectors[1:], keys[1:], tmp_path, "image")  # one file was removed
    assert len(first) == 1
    names = {file.name for file in tmp_path.iterdir()}
    assert len(names) == 1
    assert names != first
    assert with_graph(vectors[1:], keys[1:], tmp_path, "image").graph is not None
    other = unit(2999, 24, seed=5)  # of another model
    rows, _ = with_graph(other, keys[1:], tmp_path, "image")(other[7], 1)
    assert rows.tolist() == [7]


@pytest.mark.parametrize("damage", ["bytes", "cut", "grown", "emptied"])
def test_a_damaged_graph_is_made_again(tmp_path, caplog, damage):
    vectors, keys = unit(500, 16), [f"{i:032x}" for i in range(500)]
    with_graph(vectors, keys, tmp_path, "image")
    [path] = tmp_path.iterdir()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 8] = b"\xff" * 8
    damaged = {
        "bytes": content,
        "cut": content[:middle],
        "grown": content + b"more",
        "emptied": b"",
    }
    path.write_bytes(damaged[damage])
    graph = with_graph(vectors, keys, tmp_path, "image")
    assert f"{path} is torn, and is made again" in caplog.text
    assert [graph(vector, 1)[0].tolist() for vector in vectors[:5]] == [[0], [1], [2], [3], [4]]
    assert len(list(tmp_path.iterdir())) == 1


def test_entries_are_of_every_kind_and_their_keys_change_with_their_files(tmp_path):
    lines = [
        "a text",
        {"image": str(picture(tmp_path / "a.png", 0)), "text": "and words"},
        {"video": [str(tmp_path / "a.png"), str(tmp_path / "a.png")]},
        {"audio": "https://example.org/a.wav"},
        [
            {
                "role": "user",
                "content": [{"type": "text", "text": "a"}, {"type": "image", "image": "a.png"}],
            }
        ],
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def read():
        return [Entry.of(item, tmp_path) for item in Corpus(tmp_path / "in.jsonl").items()]

    entries = read()
    assert [entry.kind for entry in entries] == ["text", "image", "video", "audio", "image"]
    assert [len(entry.files) for entry in entries] == [0, 1, 2, 0, 1]
    assert [entry.text for entry in entries] == ["a text", "and words", "", "", "a"]
    assert entries[0].label == "in.jsonl:1"
    assert len({entry.key for entry in entries}) == 5
    assert [entry.key for entry in entries] == [entry.key for entry in read()]
    os.utime(tmp_path / "a.png", (1, 1))
    assert [old.key == new.key for old, new in zip(entries, read(), strict=True)] == [
        True,
        False,
        False,
        True,
        False,
    ]


# ---- the server


class Colours:
    """A model for tests: mean colours, and an axis for text."""

    def prepare(self, parts, name):
        vector = np.full(4, 1e-3, np.float32)
        for part in parts:
            if part["type"] == "image":
                picture = load_image(part["image"], name, MediaConfig())
                vector[:3] += np.asarray(picture).mean((0, 1)) / 255
            else:
                vector[3] += 1
        return vector

    def embed(self, ready):
        return ready / np.linalg.norm(ready)


def colours(parts, name):
    model = Colours()
    return model.embed(model.prepare(parts, name))


def small_library(folder):
    """Two pictures, a text and a page that calls itself a picture."""
    for name, colour in (
        ("red.png", (250, 5, 5)),
        ("blue.png", (5, 5, 250)),
        ("page.html", (5, 250, 5)),
    ):
        Image.new("RGB", (960, 10), colour).save(folder / name, "PNG")
    lines = [{"image": name} for name in ("red.png", "blue.png", "page.html")] + ["a text"]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "secret.png").write_bytes(b"secret")
    entries = [Entry.of(item, folder) for item in Corpus(folder / "in.jsonl").items()]
    vectors = np.stack([colours(entry.parts, entry.label) for entry in entries])
    return Library(entries, vectors, lambda vectors, keys, kind: Nearest(vectors))


def new_server(library, model, media=MediaConfig()):  # noqa: B008
    """Of 64 KiB a query."""
    about = {"model": "colours", "modalities": ["text", "image"]}
    return Server(library, model, about, 65536, media)


@pytest.fixture
def client(tmp_path):
    app = new_server(small_library(tmp_path), Colours()).app(LOOPBACK)
    with TestClient(app, base_url="http://localhost:8765") as client:
        yield client


def ask(client, status=200, **given):
    files = {"file": given.pop("file")} if "file" in given else {"none": ("", b"")}
    headers = given.pop("headers", {})
    answer = client.post("/search", data=given, files=files, headers=headers)
    assert answer.status_code == status, answer.text
    return answer.json()["error"] if status != 200 else answer.json()["results"]


def labels(results):
    return [result["label"] for result in results]


def test_search_by_text_by_file_by_both_and_by_what_was_found(client, tmp_path):
    red = (tmp_path / "red.png").read_bytes()
    results = ask(client, file=("x.png", red, "image/png"))
    assert labels(results)[0] == "in.jsonl:1"
    assert results[0]["cosine"] == pytest.approx(1, abs=1e-5)
    assert [result["cosine"] for result in results] == sorted(
        (r["cosine"] for r in results), reverse=True
    )
    assert labels(ask(client, text="anything"))[0] == "in.jsonl:4"
    both = {
        result["label"]: result["cosine"]
        for result in ask(client, text="words", file=("x.png", red, "image/png"))
    }
    alone = {result["label"]: result["cosine"] for result in results}
    assert both["in.jsonl:4"] > alone["in.jsonl:4"]
    assert both["in.jsonl:1"] < alone["in.jsonl:1"]
    assert labels(ask(client, text="anything", kind="image")) == [
        "in.jsonl:1",
        "in.jsonl:2",
        "in.jsonl:3",
    ]
    like = ask(client, like=results[0]["key"])
    assert labels(like) == labels(results)[1:], "itself is left out"
    mixed = ask(client, like=results[0]["key"], text="words")
    assert {result["label"]: result["cosine"] for result in mixed} == pytest.approx(
        {label: cosine for label, cosine in both.items() if label != "in.jsonl:1"}
    )
    about = client.get("/about").json()
    assert about["counts"] == {"image": 3, "text": 1}
    assert len(about["some"]) == 4


def test_only_what_was_indexed_is_served_and_nothing_runs(client, tmp_path):
    red, _, page = (f"{result['key']}/0" for result in ask(client, text="x", kind="image"))
    whole = client.get(f"/media/{red}")
    assert whole.content == (tmp_path / "red.png").read_bytes()
    assert whole.headers["content-type"] == "image/png"
    part = client.get(f"/media/{red}", headers={"range": "bytes=1-3"})
    assert (part.status_code, part.content) == (206, b"PNG")
    assert client.get(f"/media/{page}").headers["content-type"] == "application/octet-stream"
    thumbnail = client.get(f"/thumbnail/{page}")
    assert thumbnail.headers["content-type"] == "image/webp"
    (tmp_path / "thumbnail.webp").write_bytes(thumbnail.content)
    assert Image.open(tmp_path / "thumbnail.webp").size == (480, 5)
    key = red.split("/")[0]
    for path in (
        "/media/secret.png/0", "/media/..%2fsecret.png/0",
        f"/media/{key}/1", f"/media/{key}/..%2f..%2fsecret.png",
        "/..%2f..%2fembed.py", "/%2e%2e/%2e%2e/embed.py", "//etc/passwd", f"/{tmp_path}/secret.png",
        f"/thumbnail/{key}/7",
    ):  # fmt: skip
        assert client.get(path).status_code == 404, path
    os.remove(tmp_path / "red.png")
    os.symlink(tmp_path / "secret.png", tmp_path / "red.png")
    for door in ("media", "thumbnail"):
        changed = client.get(f"/{door}/{red}")
        assert changed.status_code == 410
        since = "since it was indexed; start the search again."
        assert changed.json()["error"] == f"The file has changed {since}"
    os.remove(tmp_path / "red.png")
    for door in ("media", "thumbnail"):
        gone = client.get(f"/{door}/{red}")
        assert gone.status_code == 410
        assert gone.json()["error"] == f"The file is gone {since}"


@pytest.mark.parametrize(
    ("status", "said", "given"),
    [
        (400, "The query is empty", {}),
        (400, "The query is empty", {"text": "  "}),
        (404, "There is no such entry", {"like": "0" * 32}),
        (413, "65,536 bytes", {"file": ("x.png", b"x" * 65536, "image/png")}),
        (422, r"x\.png: image of 4 bytes is torn", {"file": ("x.png", b"torn", "image/png")}),
        (422, r"x\.svg: image of 5 bytes is torn", {"file": ("x.svg", b"<svg>", "image/svg+xml")}),
        (
            422,
            r"x\.wav is audio, and this model takes text, image",
            {"file": ("x.wav", b"RIFF", "audio/wav")},
        ),
        (
            422,
            r"x\.pdf is no image, sound or clip",
            {"file": ("x.pdf", b"%PDF", "application/pdf")},
        ),
        (
            403,
            "https://evil.example is another site",
            {"text": "a", "headers": {"origin": "https://evil.example"}},
        ),
        (403, "null is another site", {"text": "a", "headers": {"origin": "null"}}),
    ],
)
def test_what_is_refused_is_refused_in_a_sentence(client, status, said, given):
    error = ask(client, status, **given)
    assert re.match(said, error) or said in error
    assert "\n" not in error


def test_other_hosts_and_bodies_of_no_length_are_refused(client):
    assert client.get("/", headers={"host": "evil.example:8765"}).status_code == 400
    assert client.get("/", headers={"host": "[::1]:8765"}).status_code == 200
    assert ask(client, text="a", headers={"origin": "http://localhost:8765"})
    endless = client.post(
        "/search",
        content=iter([b"x" * 1000] * 100),
        headers={"content-type": "multipart/form-data"},
    )
    assert endless.status_code == 413
    assert client.post("/media/a/0").status_code == 405


def test_a_file_is_served_only_while_it_is_the_very_one_that_was_indexed(client, tmp_path):
    red, blue, _ = (f"{result['key']}/0" for result in ask(client, text="x", kind="image"))
    path, outside = tmp_path / "red.png", tmp_path / "outside"
    outside.write_bytes(b"s" * path.stat().st_size)
    os.utime(outside, ns=(1, path.stat().st_mtime_ns))
    key = red.split("/")[0]
    for link in (os.symlink, os.link):
        path.unlink()
        link(outside, path)
        for door in ("media", "thumbnail"):
            gone = client.get(f"/{door}/{red}")
            assert gone.status_code == 410, door
        assert "has changed" in ask(client, 410, like=key, text="x")
    path.unlink()
    os.mkfifo(path)
    assert client.get(f"/media/{red}").status_code == 410
    before = len(os.listdir("/dev/fd"))
    for headers in ({}, {"range": "bytes=9999999-"}, {"range": "bytes=2-3,7-9"}):
        for method in (client.get, client.head):
            assert method(f"/media/{blue}", headers=headers).status_code in (200, 206, 416)
    assert len(os.listdir("/dev/fd")) == before


def test_thumbnails_are_upright_and_within_the_caps(tmp_path):
    pixels = Image.new("RGB", (60, 20), (250, 5, 5))
    pixels.paste((5, 5, 250), (0, 0, 20, 20))  # the left third is blue
    exif = Image.Exif()
    exif[0x0112] = 6  # turn it clockwise: the top third is blue
    pixels.save(tmp_path / "a.png", exif=exif)
    (tmp_path / "in.jsonl").write_text('{"image": "a.png"}\n')
    entries = [Entry.of(item, tmp_path) for item in Corpus(tmp_path / "in.jsonl").items()]
    library = Library(entries, unit(1, 4), lambda vectors, keys, kind: Nearest(vectors))

    def thumbnail(**caps):
        app = new_server(library, Colours(), MediaConfig(**caps)).app(LOOPBACK)
        with TestClient(app, base_url="http://localhost") as client:
            return client.get(f"/thumbnail/{entries[0].key}/0")

    shown = Image.open(io.BytesIO(thumbnail().content)).convert("RGB")
    assert shown.size == (20, 60)
    assert shown.getpixel((10, 5))[2] > 200
    assert shown.getpixel((10, 50))[0] > 200
    for caps in ({"max_image_pixels": 1199}, {"max_file_bytes": 10}):
        refused = thumbnail(**caps)
        assert refused.status_code == 422
        assert next(iter(caps)) in refused.json()["error"]


def test_a_clip_has_a_small_picture_of_a_frame_which_is_made_once(tmp_path):
    path = tmp_path / "clip.webm"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("libvpx", rate=8, width=640, height=320, pix_fmt="yuv420p")
        for level in [0] * 4 + [200] * 12:  # it begins in black
            grey = np.full((320, 640, 3), level, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(grey)))
        file.mux(stream.encode(None))
    file, thumbnails = File.of("video", str(path)), Thumbnails(MediaConfig())
    content = thumbnails(file)
    shown = Image.open(io.BytesIO(content)).convert("L")
    assert shown.size == (480, 240)
    assert np.asarray(shown).mean() == pytest.approx(200, abs=8)
    assert thumbnails(file) is content
    with pytest.raises(LcoError, match="max_image_pixels"):
        Thumbnails(MediaConfig(max_image_pixels=1000))(file)
    os.utime(path, (5, 5))
    with pytest.raises(LcoError, match="The file has changed"):
        thumbnails(file)


@pytest.mark.parametrize("bad", [np.nan, np.inf, 0])
def test_vectors_without_a_direction_are_an_error(tmp_path, bad):
    class Broken(Colours):
        def embed(self, ready):
            check_vectors(np.full((1, 4), bad, np.float32))

    library = small_library(tmp_path)
    with TestClient(new_server(library, Broken()).app(LOOPBACK), base_url="http://[::1]") as client:
        assert "the model made a vector that is not finite" in ask(client, 422, text="x")
    if bad != 0:
        entries = list(library.entries.values())
        with pytest.raises(LcoError, match="not finite"):
            Library(entries, np.full((4, 4), bad), lambda vectors, *_: Nearest(vectors))


# ---- clients that mean no good


@contextmanager
def listening(app):
    """An application on a port of its own: (host, port)."""
    server = http_server(app)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            yield listener.getsockname()
        finally:
            server.should_exit = True
            thread.join(20)
            assert not thread.is_alive()


def talk(address, content, patience=30):
    """What the server says to bytes until it ends the connection, which it has to in time."""
    with socket.create_connection(address, timeout=patience) as client:
        client.sendall(content)
        said = b""
        with suppress(ConnectionResetError):
            while chunk := client.recv(65536):
                said += chunk
    return said


def request(line, *headers, body=b""):
    head = [line, "Host: localhost", "Connection: close", *headers, "", ""]
    return "\r\n".join(head).encode("latin-1") + body


FORM = "Content-Type: application/x-www-form-urlencoded"
CHUNKED = "Transfer-Encoding: chunked"
CHUNKS = b"".join(b"4000\r\n" + b"x" * 0x4000 + b"\r\n" for _ in range(8)) + b"0\r\n\r\n"
POST = "POST /search HTTP/1.1"
DIGITS = "9" * 5000
REFUSED = [
    (413, request(POST, FORM, "Content-Length: 10", CHUNKED, body=CHUNKS)),
    (413, request(POST, FORM, CHUNKED, body=CHUNKS)),
    (413, request(POST, FORM)),
    (413, request(POST, FORM, "Content-Length: 65537", body=b"x" * 65537)),
    (400, request(POST, FORM, "Content-Length: -1", body=b"text=a")),
    (400, request(POST, FORM, "Content-Length: 6, 7", body=b"text=a")),
    (400, request(POST, FORM, "Content-Length: 6", "Content-Length: 7", body=b"text=a")),
    (400, request(POST, FORM, "Content-Length: 0x6", body=b"text=a")),
    (400, request(POST, FORM, f"Content-Length: {DIGITS}", body=b"text=a")),
    (403, request(POST, FORM, "Content-Length: 6", "Origin: http://[bad", body=b"text=a")),
    (403, request(POST, FORM, "Content-Length: 6", "Origin: \xff\xfe", body=b"text=a")),
    (415, request(POST, "Content-Length: 2", body=b"{}")),
    (415, request(POST, "Content-Type: \xff", "Content-Length: 2", body=b"{}")),
    (400, request(POST, "Content-Type: multipart/form-data", "Content-Length: 2", body=b"{}")),
    (413, request(POST, FORM, "Content-Length: 20006", body=b"text=" + b"a" * 20001)),
    (400, request(POST, FORM, "Content-Length: 8", body=b"kind=%00")),
    (404, request(f"GET /media/a/{DIGITS} HTTP/1.1")),
    (404, request("GET /%00 HTTP/1.1")),
    (404, request("GET /a%ff%fe/../..//x?%00=%zz HTTP/1.1")),
    (404, request(f"GET /{'a' * 3000} HTTP/1.1")),
    (413, request("GET /about HTTP/1.1", "Content-Length: 6", body=b"text=a")),
    (405, request("DELETE /about HTTP/1.1")),
    (405, request("PUT /search HTTP/1.1")),
    (400, b"GET /about HTTP/1.1\r\nHost: [::1\r\nConnection: close\r\n\r\n"),
    (400, b"GET /about HTTP/1.0\r\n\r\n"),
    (400, b"\x16\x03\x01\x02\x00\r\n\r\n"),
    (400, b"GET /about HTTP/1.1\r\n" + b"A: b\r\n" * 50000),
]


def test_malformed_requests_are_refused_and_print_nothing(tmp_path, capfd):
    app = new_server(small_library(tmp_path), Colours()).app(LOOPBACK)
    with listening(app) as address:
        for status, content in REFUSED:
            said = talk(address, content)
            assert said.startswith(b"HTTP/1.1 %d " % status), (content[:200], said[:300])
        good = request(POST, FORM, "Content-Length: 6", body=b"text=a")
        assert talk(address, good).startswith(b"HTTP/1.1 200 ")
        upgrade = request("GET /x HTTP/1.1", "Upgrade: websocket", "Sec-WebSocket-Key: x")
        assert b" 404 " in talk(address, upgrade)
        with socket.create_connection(address) as client:  # it is gone in the middle of a query
            client.sendall(request(POST, FORM, "Content-Length: 600", body=b"text=a"))
        torn = request(POST, "Content-Type: multipart/form-data; boundary=x", "Content-Length: 9")
        assert b" 400 " in talk(address, torn + b"--y\r\n\r\n1")
    assert "Traceback" not in "".join(capfd.readouterr())


def test_clients_that_are_slow_or_silent_are_left(tmp_path, monkeypatch):
    monkeypatch.setattr(connections, "PATIENCE", 0.5)
    app = new_server(small_library(tmp_path), Colours()).app(LOOPBACK)
    half = [
        b"",
        b"GET / HT",
        b"GET /about HTTP/1.1\r\nHost: localhost\r\n",
        b"GET /about HTTP/1.1\r\nHost: localhost\r\n\r\nGET /abo",  # on a connection that is kept
        request(POST, FORM, "Content-Length: 600", body=b"text="),
    ]
    with listening(app) as address:
        for content in half:
            said = talk(address, content)
        assert said.startswith(b"HTTP/1.1 408 ")
        with socket.create_connection(address, timeout=5) as client:  # a byte at a time
            began = time.monotonic()
            with suppress(OSError):
                while time.monotonic() - began < 30:
                    client.sendall(b"G")
                    time.sleep(0.05)
            assert time.monotonic() - began < 20


def test_connections_are_bounded_and_those_that_wait_make_room(tmp_path, monkeypatch):
    monkeypatch.setattr(connections.Connection, "most", 8)
    app = new_server(small_library(tmp_path), Colours()).app(LOOPBACK)
    with listening(app) as address, ExitStack() as stack:
        idle = [stack.enter_context(socket.create_connection(address)) for _ in range(30)]
        good = request(POST, FORM, "Content-Length: 6", body=b"text=a")
        assert talk(address, good).startswith(b"HTTP/1.1 200 ")
        assert sum(map(is_open, idle)) <= 8


def is_open(client):
    """Whether the other side has not ended a connection."""
    client.settimeout(0.1)
    try:
        return client.recv(1) != b""
    except TimeoutError:
        return True
    except ConnectionResetError:
        return False


def test_a_slow_upload_keeps_no_text_from_its_answer(tmp_path):
    decoding, go_on = threading.Event(), threading.Event()

    class Slow(Colours):
        def prepare(self, parts, name):
            if any(part["type"] == "image" for part in parts):
                decoding.set()
                assert go_on.wait(30)
            return super().prepare(parts, name)

    app = new_server(small_library(tmp_path), Slow()).app(LOOPBACK)
    red = (tmp_path / "red.png").read_bytes()
    with (
        TestClient(app, base_url="http://localhost") as client,
        ThreadPoolExecutor(8) as pool,
    ):
        uploads = [pool.submit(ask, client, file=("x.png", red, "image/png")) for _ in range(6)]
        assert decoding.wait(30)
        answers = [pool.submit(ask, client, text="anything") for _ in range(2)]
        assert [labels(answer.result(10))[0] for answer in answers] == ["in.jsonl:4"] * 2
        assert not any(upload.done() for upload in uploads)
        go_on.set()
        assert [labels(upload.result(30))[0] for upload in uploads] == ["in.jsonl:1"] * 6


def test_who_waits_too_long_is_told_so(tmp_path, monkeypatch):
    monkeypatch.setattr(server_module, "WAIT_SECONDS", 0.2)
    go_on = threading.Event()

    class Slow(Colours):
        def embed(self, ready):
            assert go_on.wait(30)
            return super().embed(ready)

    app = new_server(small_library(tmp_path), Slow()).app(LOOPBACK)
    with TestClient(app, base_url="http://localhost") as client, ThreadPoolExecutor(2) as pool:
        both = [pool.submit(client.post, "/search", data={"text": "a"}) for _ in range(2)]
        done, _ = wait(both, 20, FIRST_COMPLETED)
        assert "Others are searching" in done.pop().result().json()["error"]
        go_on.set()
        assert sorted(one.result(20).status_code for one in both) == [200, 503]


# ---- the command


@pytest.fixture
def start(monkeypatch, load, tmp_path):
    """`prepare` with a folder: the library, which inputs were embedded, and the notes."""
    monkeypatch.setattr(OmniEmbedder, "from_pretrained", load)
    embedded = []
    embed_units = search.embed_units

    def spied(embedder, units, *args):
        embedded.extend(item for _, items in units for item in items)
        embed_units(embedder, units, *args)

    monkeypatch.setattr(search, "embed_units", spied)

    def start(*args, source="in"):
        embedded.clear()
        flags = [
            "--model=builtin:tiny",
            f"--input={tmp_path / source}",
            f"--index={tmp_path / 'index'}",
            "--workers=0",
        ]
        monkeypatch.setattr(sys, "argv", ["search", *flags, *args])
        library, _, _, notes = search.prepare(search.make_parser().parse_args())
        return library, sorted(item.where for item in embedded), notes

    return start


def by_label(library):
    return {entry.label: library.vector(key) for key, entry in library.entries.items()}


@pytest.mark.slow
def test_a_second_start_embeds_nothing(start, tmp_path, tiny):
    folder = tmp_path / "in"
    pictures = [picture(folder / f"{name}.png", i) for i, name in enumerate("abc")]
    (folder / "torn.png").write_bytes(b"torn")
    for name in ("a.txt", "b.txt", "drawing.svg", ".hidden.png"):
        (folder / name).touch()
    library, embedded, notes = start()
    assert embedded == ["a.png", "b.png", "c.png", "torn.png"]
    reasons = tmp_path / "index" / "vectors.parquet.skipped.jsonl"
    assert notes == (
        f"1 skipped: {reasons} says which inputs were skipped, and why; "
        "left out: .txt 2, .svg 1, hidden 1"
    )
    assert "torn.png" in reasons.read_text()
    expected = tiny.encode(pictures)
    np.testing.assert_allclose([by_label(library)[p.name] for p in pictures], expected, atol=1e-5)

    library, embedded, again = start()
    assert embedded == []  # nor what failed
    assert again == notes
    assert by_label(library).keys() == {"a.png", "b.png", "c.png"}


@pytest.mark.slow
def test_malformed_lines_are_skipped_as_embed_skips_them(start, tmp_path, tiny):
    """With their reasons; others are found. --on-error=raise stops at the first."""
    path = tmp_path / "lines.jsonl"
    good = ['"one"', '{"text": "two"}']
    bad = ['{"text": ', '{"text": 5}', '{"image": "gone.png"}', "[1, 2]", '"\\ud800"']
    path.write_bytes("\n".join([good[0], *bad, good[1]]).encode() + b"\n\xff\n")
    library, embedded, notes = start(source="lines.jsonl")
    assert len(embedded) == 8
    assert notes.startswith("6 skipped: ")
    found = by_label(library)
    assert sorted(found) == ["lines.jsonl:1", "lines.jsonl:7"]
    np.testing.assert_allclose(list(found.values()), tiny.encode(["one", "two"]), atol=1e-5)
    written = (tmp_path / "index" / "vectors.parquet.skipped.jsonl").read_text().splitlines()
    reasons = [json.loads(line)["reason"] for line in written]
    places = [re.search(r"lines\.jsonl:(\d)", reason)[1] for reason in reasons]
    assert sorted(places) == ["2", "3", "4", "5", "6", "8"]

    path.write_bytes(path.read_bytes() + b'"three"\n')
    library, embedded, notes = start(source="lines.jsonl")
    assert len(embedded) == 7  # what failed is tried again beside what is new
    assert len(by_label(library)) == 3
    with pytest.raises(LcoError, match=r"lines\.jsonl:2: not valid JSON"):
        start("--on-error=raise", source="lines.jsonl")


@pytest.mark.slow
def test_a_damaged_index_is_one_sentence(start, tmp_path):
    """It names the file, and what to do; doing that is enough."""
    folder, index = tmp_path / "in", tmp_path / "index"
    picture(folder / "a.png", 1), picture(folder / "b.png", 2)
    start()
    vectors, manifest = index / "vectors.parquet", index / "manifest.json"
    table, work = vectors.read_bytes(), manifest.read_bytes()
    middle = len(table) // 3
    for damaged in (
        b"",
        b"PAR1",
        table[:middle],
        table[:-9],
        table[:middle] + b"\xff" * 16 + table[middle + 16 :],
        b"no parquet at all",
    ):
        vectors.write_bytes(damaged)
        with pytest.raises(LcoError) as error:
            start()
        wanted = f"{vectors} is damaged; remove it, and the same command embeds all again"
        assert str(error.value).startswith(wanted.partition(";")[0])
        assert wanted.partition(";")[2] in str(error.value)
        assert str(error.value).isprintable()
    vectors.unlink()
    library, embedded, _ = start()
    assert embedded == ["a.png", "b.png"]
    for damaged in (b"", work[: len(work) // 2], b"\xff\xfe", b"[1, 2]", b"null", b"[" * 100_000):
        manifest.write_bytes(damaged)
        with pytest.raises(LcoError) as error:
            start()
        assert str(error.value).startswith(f"{manifest} ")
        advice = f"; remove {index}, and the same command embeds all again"
        assert str(error.value).endswith(advice)
        assert str(error.value).isprintable()
    for file in index.iterdir():
        file.unlink()
    library, embedded, _ = start()
    assert embedded == ["a.png", "b.png"]
    assert len(by_label(library)) == 2


@pytest.mark.slow
def test_changed_and_vanished_files_and_a_start_that_was_ended(start, tmp_path, tiny, monkeypatch):
    folder = tmp_path / "in"
    for i, name in enumerate("abc"):
        picture(folder / f"{name}.png", i)
    start()
    changed, new = picture(folder / "a.png", 7), picture(folder / "sub" / "d.png", 9)
    os.utime(changed, (5, 5))
    (folder / "b.png").unlink()
    with monkeypatch.context() as patch:
        patch.setattr(
            search.VectorParts, "join", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt)
        )
        with pytest.raises(KeyboardInterrupt):
            start()
    library, embedded, _ = start()
    assert embedded == []  # the start before had embedded both
    kept = by_label(library)
    assert kept.keys() == {"a.png", "c.png", "sub/d.png"}
    np.testing.assert_allclose(
        [kept["a.png"], kept["sub/d.png"]], tiny.encode([changed, new]), atol=1e-5
    )
    assert pyarrow.parquet.read_table(tmp_path / "index" / "vectors.parquet").num_rows == 3
    assert sorted(file.name for file in (tmp_path / "index").iterdir()) == [
        "manifest.json",
        "vectors.parquet",
    ]
    with pytest.raises(
        LcoError,
        match="index holds other work: --prompt was None and is 'x'; give another --output",
    ):
        start("--prompt=x")
    (tmp_path / "index" / "manifest.json").unlink()
    with pytest.raises(LcoError, match=r"vectors\.parquet is of no index of ours"):
        start()


def test_who_ends_a_start_lets_others_in_once_its_rows_are_there(start, tmp_path, monkeypatch):
    picture(tmp_path / "in" / "a.png", 0), picture(tmp_path / "in" / "b.png", 1)
    kept = []

    def ended(embedder, units, folder, *_):
        other = VectorParts(tmp_path / "index" / "vectors.parquet", {})
        with pytest.raises(LcoError, match="another process writes"), other:
            pass
        folder.write(Unit(0, 1), part_table(["a"], np.ones((1, 4), np.float32), {}))
        kept.extend(folder.units())
        raise KeyboardInterrupt

    monkeypatch.setattr(search, "embed_units", ended)
    with pytest.raises(KeyboardInterrupt):
        start()
    assert kept == [Unit(0, 1)]


def test_mistakes_are_one_sentence(monkeypatch, run_command, tmp_path):
    def said(*args):
        code, _, error = run_command(search, f"--index={tmp_path / 'i'}", *args)
        assert code == 2
        assert error.count("\n") == 1
        return error

    assert "search takes a folder of media" in said("--input=x.parquet")
    assert "cannot be listened on" in said(f"--input={tmp_path}", "--host=192.0.2.1")
    assert "holds no image, video or audio file" in said(f"--input={tmp_path}", "--port=0")
    monkeypatch.setitem(sys.modules, "lco_jax.searching.server", None)
    assert install_line("search") in said(f"--input={tmp_path}")


@contextmanager
def serving(*args):
    """The command in a process of its own: the line with its address."""
    command = [sys.executable, "-m", "lco_jax.search", "--port=0", "--workers=0", *map(str, args)]
    process = subprocess.Popen(
        command, cwd=ROOT, env=with_devices(1), stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if "http://" in line:
                yield line.rstrip("\n")
                return
        raise AssertionError("it ended before it served")
    finally:
        process.terminate()
        process.wait(30)


def address(line):
    return re.search(r"http://\S+", line)[0]


@pytest.mark.slow
def test_the_last_line_of_a_start_says_what_cannot_be_found(tmp_path):
    folder, index = tmp_path / "files", tmp_path / "index"
    picture(folder / "a.png", 0), (folder / "torn.png").write_bytes(b"torn")
    for name in ("a.txt", "b.txt", ".hidden"):
        (folder / name).touch()
    flags = ["--model=builtin:tiny", f"--input={folder}", f"--output={index}"]
    with serving(*flags) as line:
        why = f"{index}/vectors.parquet.skipped.jsonl says which inputs were skipped, and why"
        rest = f"1 skipped: {why}; left out: .txt 2, hidden 1"
        assert line == f"1 image: {address(line)} ({rest})"
        with urllib.request.urlopen(address(line)) as answer:
            assert answer.status == 200
    (folder / "torn.png").unlink()
    for name in ("a.txt", "b.txt", ".hidden"):
        (folder / name).unlink()
    with serving(*flags) as line:
        assert line == f"1 image: {address(line)}"


@pytest.mark.slow
def test_the_page_in_a_browser(cases, tmp_path):
    files = tmp_path / "files"
    pictures = [picture(files / f"picture{i}.png", i) for i in range(4)]
    sound(files / "low.wav", 200), sound(files / "high.wav", 2000), clip(files / "clip.webm", 3)
    almost = picture(tmp_path / "almost.png", 2, (42, 34))
    (tmp_path / "torn.png").write_bytes(b"torn")
    with (
        serving(
            f"--model={cases['omni'].path}", f"--input={files}", f"--index={tmp_path / 'index'}"
        ) as line,
        browser.page(viewport={"width": 1200, "height": 900}) as page,
    ):
        url = address(line)
        with urllib.request.urlopen(url) as answer:
            assert "default-src 'self'" in answer.headers["content-security-policy"]
            assert answer.headers["x-content-type-options"] == "nosniff"
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(url)

        def names():
            return page.locator("#results .label").all_inner_texts()

        def until(condition):  # not Playwright's own, which the page's policy forbids
            for _ in range(200):
                if page.evaluate(condition):
                    return
                page.wait_for_timeout(50)
            raise AssertionError(condition)

        def settle(action, *args):
            with page.expect_response("**/search"):
                action(*args)
            page.wait_for_selector("body:not(.busy)")

        page.wait_for_selector("#results li")
        assert page.locator("fieldset label").all_inner_texts() == [
            "All 7",
            "Clips 1",
            "Sounds 2",
            "Images 4",
        ]
        page.fill("#text", "a low tone")
        settle(page.keyboard.press, "Enter")
        assert sorted(names()) == sorted(file.name for file in files.iterdir())
        cosines = [float(x) for x in page.locator("#results .cosine").all_inner_texts()]
        assert cosines == sorted(cosines, reverse=True)
        assert (
            len(
                set(page.locator("#results li").evaluate_all("all => all.map(x => x.dataset.kind)"))
            )
            == 3
        )
        for name, tag, length in (("low.wav", "audio", 0.75), ("clip.webm", "video", 1.5)):
            page.get_by_role("button", name=f"Play {name}").click()
            item = "[...document.querySelectorAll('#results li')].find(x => x.querySelector"
            item = f"{item}('.label').textContent === '{name}')"
            until(f"{item}.querySelector('{tag}').currentTime > 0.05")
            duration = page.evaluate(f"{item}.querySelector('{tag}').duration")
            assert duration == pytest.approx(length, abs=0.2)
        until("[...document.querySelectorAll('#results img')].every(x => x.naturalWidth > 0)")

        settle(
            page.get_by_role("radio", name="Sounds").check,
        )
        assert sorted(names()) == ["high.wav", "low.wav"]
        settle(page.get_by_role("radio", name="All").check)

        page.fill("#text", "")
        handle = page.evaluate_handle(
            """bytes => {
                const transfer = new DataTransfer();
                const content = [new Uint8Array(bytes)];
                transfer.items.add(new File(content, "almost.png", {type: "image/png"}));
                return transfer;
            }""",
            list(almost.read_bytes()),
        )
        page.dispatch_event("body", "dragover", {"dataTransfer": handle})
        assert page.is_visible("#drop")
        settle(page.dispatch_event, "body", "drop", {"dataTransfer": handle})
        assert names()[0] == "picture2.png"
        assert page.inner_text("#chosen") == "almost.png"

        settle(page.get_by_role("button", name="Search with picture2.png").click)
        assert "picture2.png" not in names()
        assert len(names()) == 6
        page.click("#chosen")
        page.click("#go")
        assert page.inner_text("#said") == "Type a text, or drop an image, a sound or a clip."
        settle(page.set_input_files, "#file", tmp_path / "torn.png")
        assert page.inner_text("#said").startswith("torn.png: image of 4 bytes is torn")
        assert names() == []
        settle(page.set_input_files, "#file", files / "low.wav")
        assert names()[0] == "low.wav"
        assert all(request.startswith((url, "blob:")) for request in requests), requests

        shown = page.locator("img[alt='picture0.png']").get_attribute("src")
        os.utime(pictures[0], (5, 5))
        with pytest.raises(urllib.error.HTTPError, match="410"):
            urllib.request.urlopen(f"{url}/{shown}")


LONG = "photograph of the harbour in the evening, seen from the hill, number {}"


@pytest.fixture
def site(tmp_path):
    """The page of a folder with long names, served: (its address, the folder, whom it serves)."""
    folder = tmp_path / "files"
    picture(folder / f"{LONG.format(1)}.png", 1), picture(folder / f"{LONG.format(2)}.png", 2)
    sound(folder / f"{LONG.format(3)}.wav", 300), sound(folder / "short.wav", 400)
    clip(folder / f"{LONG.format(4)}.webm", 4)
    described = {"image": f"{folder}/{LONG.format(2)}.png", "text": "and its words " * 20}
    lines = [described, "a text " * 80]
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    items = [*Corpus(folder).items(), *Corpus(folder / "in.jsonl").items()]
    entries = [Entry.of(item, folder) for item in items]
    library = Library(entries, unit(len(entries), 4), lambda vectors, *_: Nearest(vectors))
    with listening(new_server(library, Colours()).app(LOOPBACK)) as (host, port):
        yield f"http://{host}:{port}/", folder


def search_for(page, text):
    page.fill("#text", text)
    with page.expect_response("**/search"):
        page.keyboard.press("Enter")
    page.wait_for_selector("body:not(.busy)")


def query_of(page):
    """The address after the path, and what the page searches with."""
    page.wait_for_selector("body:not(.busy)")
    kind = page.locator("fieldset :checked").get_attribute("value")
    chosen = page.text_content("#chosen")
    return page.url.partition("?")[2], page.input_value("#text"), kind, chosen


@pytest.mark.slow
@pytest.mark.parametrize("width", [1200, 400])
def test_controls_and_the_ends_of_names_are_within_their_card(site, width):
    url, _ = site
    with browser.page(viewport={"width": width, "height": 900}) as page:
        page.goto(url)
        page.wait_for_selector("#results li")
        for item in page.locator("#results li").all():
            for inner, outer in ((".player > *", ".media"), (".label", "xpath=."), ("p", ".media")):
                room = item.locator(outer).first.bounding_box()
                for part in item.locator(inner).all():
                    at = part.bounding_box()
                    if at is None:  # the time of what is not loaded
                        continue
                    assert room["x"] <= at["x"]
                    assert at["x"] + at["width"] <= room["x"] + room["width"], (inner, at, room)
                    assert room["y"] <= at["y"]
                    assert at["y"] + at["height"] <= room["y"] + room["height"], (inner, at, room)
            for slider in item.locator(".place").all():
                assert slider.bounding_box()["width"] > 40
        label = page.locator("#results .label", has_text="number 4").first
        head = label.locator(".head")
        assert head.evaluate("x => x.scrollWidth > x.clientWidth"), "it is not cut"
        end = label.evaluate(
            "x => { const r = document.createRange(); r.selectNode(x.lastChild);"
            " return r.getBoundingClientRect().right; }"
        )
        room = label.bounding_box()
        assert end <= room["x"] + room["width"]
        label.evaluate("x => getSelection().selectAllChildren(x)")
        assert page.evaluate("getSelection().toString()") == f"{LONG.format(4)}.webm"
        assert page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.mark.slow
def test_a_sound_has_two_stops_of_the_tab_key_and_is_played_with_keys(site):
    url, _ = site
    with browser.page() as page:
        page.goto(url)
        page.wait_for_selector("#results li")
        item = page.locator("#results li", has_text="short.wav")
        first, last = item.get_by_role("button").all()
        first.focus()
        page.keyboard.press("Tab")
        assert last.evaluate("x => x === document.activeElement")
        page.keyboard.press("Tab")
        assert not item.evaluate("x => x.contains(document.activeElement)")

        page.get_by_role("button", name="Play short.wav").focus()
        heard = item.locator("audio")
        page.keyboard.press("ArrowRight")
        assert heard.evaluate("x => x.currentTime") == pytest.approx(0.075, abs=0.02)
        page.keyboard.press("Space")
        page.get_by_role("button", name="Pause short.wav").wait_for()
        page.keyboard.press("Space")
        page.get_by_role("button", name="Play short.wav").wait_for()


@pytest.mark.slow
def test_each_cause_has_a_message_of_its_own(site):
    url, folder = site
    (folder / f"{LONG.format(1)}.png").unlink()
    os.utime(folder / f"{LONG.format(2)}.png", (5, 5))
    content = (folder / "short.wav").read_bytes()
    about = os.stat(folder / "short.wav")
    (folder / "short.wav").write_bytes(b"x" * len(content))
    os.utime(folder / "short.wav", ns=(about.st_atime_ns, about.st_mtime_ns))
    since = "since it was indexed; start the search again."
    causes = {
        f"{LONG.format(1)}.png": f"The file is gone {since}",
        f"{LONG.format(2)}.png": f"The file has changed {since}",
        "short.wav": "This browser cannot show it.",
    }
    with browser.page() as page:
        page.goto(url)
        for name, cause in causes.items():
            item = page.locator("#results li", has=page.locator(f".label[title='{name}']"))
            assert item.locator(".none").text_content() == cause
        page.goto(f"{url}?like={'0' * 32}")
        page.wait_for_selector("#said.bad")
        assert page.inner_text("#said").startswith("There is no such entry")
        page.route("**/search", lambda route: route.abort())
        page.fill("#text", "a")
        page.keyboard.press("Enter")
        page.wait_for_selector("body:not(.busy)")
        assert page.inner_text("#said") == "The server does not answer; is it still running?"
        page.unroute("**/search")
        failed = {"status": 500, "body": "Internal Server Error"}
        page.route("**/search", lambda route: route.fulfill(**failed))
        page.keyboard.press("Enter")
        page.wait_for_selector("body:not(.busy)")
        assert page.inner_text("#said") == "The server failed; what it printed says why."


@pytest.mark.slow
def test_the_address_has_the_query(site, tmp_path):
    """So that reloads, shared links, and the keys for back and forward work."""
    url, folder = site
    with browser.page() as page:
        page.goto(url)
        page.wait_for_selector("#results li")
        search_for(page, "a ship & 1+1")
        assert query_of(page) == ("text=a+ship+%26+1%2B1", "a ship & 1+1", "", "")
        found = page.locator("#results .label").all_text_contents()
        with page.expect_response("**/search"):
            page.get_by_role("radio", name="Images").check()
        both = ("text=a+ship+%26+1%2B1&kind=image", "a ship & 1+1", "image", "")
        assert query_of(page) == both
        assert page.title() == "a ship & 1+1 · Search · lco-jax"
        images = page.locator("#results .label").all_text_contents()
        assert len(images) < len(found)
        with page.expect_response("**/search"):
            page.reload()
        assert query_of(page) == both
        assert page.locator("#results .label").all_text_contents() == images

        with page.expect_response("**/search"):
            page.get_by_role("button", name=f"Search with {LONG.format(2)}.png").click()
        address, *like = query_of(page)
        assert re.fullmatch(r"like=[0-9a-f]{32}&kind=image", address)
        assert like == ["", "image", f"{LONG.format(2)}.png"]
        with page.expect_response("**/search"):
            page.go_back()
        assert query_of(page) == both
        with page.expect_response("**/search"):
            page.go_forward()
        assert query_of(page) == (address, *like)
        with page.expect_response("**/search"):
            page.goto(f"{url}?{address}")  # a shared link
        assert query_of(page) == (address, *like)

        with page.expect_response("**/search"):
            page.set_input_files("#file", folder / f"{LONG.format(2)}.png")
        name = f"{LONG.format(2)}.png"
        assert query_of(page) == ("kind=image", "", "image", name)
        left = f"{name} is not in the address of this page"
        assert page.inner_text("#hint") == f"{left}: give it again after a reload."
        search_for(page, "b")
        page.click("#chosen")
        search_for(page, "c")
        assert "not in the address" not in page.inner_text("#hint")
        with page.expect_response("**/search"):
            page.go_back()
        assert query_of(page) == ("text=b&kind=image", "b", "image", name)
        page.reload()
        page.wait_for_selector("#said.bad")
        assert page.inner_text("#said") == f"{left}; give it again."
        assert query_of(page) == ("text=b&kind=image", "b", "image", "")

        page.fill("#text", "long " * 3000)
        with page.expect_response("**/search"):
            page.keyboard.press("Enter")
        assert query_of(page)[0] == "kind=image"
        assert page.inner_text("#hint").startswith("The text is not in the address")
