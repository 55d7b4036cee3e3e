"""A stand-in of Cloud Storage for tests: what gcsfs, google-cloud-storage and tensorstore ask of
its JSON API.

Objects have generations, which conditional requests look at, as tensorstore's database needs.
`bucket` is there, `closed` may not be looked at, and others do not exist.
"""

import base64
import hashlib
import itertools
import json
import re
import threading
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

import google_crc32c


class Bucket(ThreadingHTTPServer):
    """While open it answers at `url`. objects: {name: content}, which may be changed."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.objects, self.generations = {}, {}
        self.numbers, self.lock = itertools.count(1), threading.Lock()

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()

    def handle_error(self, *_):  # of a client that is killed, or no longer wants to know
        pass

    def put(self, name, content):
        self.objects[name], self.generations[name] = content, next(self.numbers)
        return self.about(name)

    def about(self, name):
        content, now = self.objects[name], f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"
        generation = str(self.generations.setdefault(name, next(self.numbers)))
        crc, md5 = google_crc32c.Checksum(content).digest(), hashlib.md5(content).digest()
        return {
            "kind": "storage#object",
            "name": name,
            "bucket": "bucket",
            "size": str(len(content)),
            "updated": now,
            "timeCreated": now,
            "generation": generation,
            "metageneration": "1",
            "storageClass": "STANDARD",
            "crc32c": base64.b64encode(crc).decode(),
            "md5Hash": base64.b64encode(md5).decode(),
        }


class Handler(BaseHTTPRequestHandler):
    protocol_version, disable_nagle_algorithm = "HTTP/1.1", True

    def log_message(self, *_):
        pass

    def answer(self, status, content=b"", **headers):
        if not isinstance(content, bytes):
            content, headers = (
                json.dumps(content).encode(),
                {"Content-Type": "application/json", **headers},
            )
        self.send_response(status)
        for name, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(content)

    def handle_call(self):
        body, address = (
            self.rfile.read(int(self.headers.get("Content-Length") or 0)),
            urlsplit(self.path),
        )
        query = {
            key: values[0]
            for key, values in parse_qs(address.query, keep_blank_values=True).items()
        }
        with self.server.lock:
            if address.path.startswith("/batch/"):
                return self.batch(body)
            path = re.fullmatch(
                r"(/upload|/download)?/storage/v1/b/([^/]+)(/o)?(?:/([^/]+)(/.*)?)?", address.path
            )
            kind, bucket, objects, name, more = path.groups()
            name = name and unquote(name)
            if bucket == "closed":
                return self.answer(403, {"error": {"code": 403, "message": "you may not"}})
            if bucket != "bucket" or (name and name not in self.server.objects):
                return self.answer(404, {"error": {"code": 404, "message": "Not Found"}})
            if not objects:
                return self.answer(200, {"kind": "storage#bucket", "name": bucket})
            if kind == "/upload":
                return self.upload(query, body)
            return self.object(name, more, query, kind) if name else self.list(query)

    do_GET = do_POST = do_PUT = do_DELETE = handle_call

    def refused(self, name, query):
        """Whether the conditions of a request do not hold; it is answered then."""
        now = str(self.server.generations.get(name, 0)) if name in self.server.objects else "0"
        if query.get("ifGenerationMatch", now) != now:
            self.answer(412, {"error": {"code": 412, "message": "Precondition Failed"}})
            return True
        if query.get("ifGenerationNotMatch") == now:
            self.answer(304)
            return True
        return False

    def list(self, query):
        prefix, mark, found, folders = query.get("prefix", ""), query.get("delimiter"), [], set()
        for name in sorted(self.server.objects):
            if name.startswith(prefix):
                head, cut, _ = name[len(prefix) :].partition(mark) if mark else ("", "", "")
                folders.add(prefix + head + cut) if cut else found.append(self.server.about(name))
        self.answer(200, {"kind": "storage#objects", "items": found, "prefixes": sorted(folders)})

    def object(self, name, more, query, kind):
        objects = self.server.objects
        if self.refused(name, query):
            return None
        if self.command == "DELETE":
            del objects[name]
            return self.answer(204)
        if more:
            target = unquote(re.fullmatch(r"/moveTo/o/(.+)", more)[1])
            return self.answer(200, self.server.put(target, objects.pop(name)))
        if query.get("alt") != "media" and not kind:
            return self.answer(200, self.server.about(name))
        content, about = objects[name], self.server.about(name)
        headers = {
            "x-goog-generation": about["generation"],
            "x-goog-hash": f"md5={about['md5Hash']}",
        }
        if not (asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return self.answer(200, content, **headers)
        first, last = int(asked[1]), min(int(asked[2] or len(content)), len(content) - 1)
        if first >= len(content):
            return self.answer(416)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return self.answer(206, content[first : last + 1], **headers)

    def upload(self, query, body):
        name = query.get("name")
        if query["uploadType"] == "multipart":  # the name, and the content, between borders
            border = (
                b"--" + re.search('boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
            )
            _, about, rest = body.split(border, 2)
            name = name or json.loads(about[about.index(b"{") :])["name"]
            body = rest.split(b"\n\n", 1)[1].rsplit(b"\n" + border, 1)[0]
        elif query["uploadType"] == "resumable":  # and put there in one piece
            target = f"/upload/storage/v1/b/bucket/o?uploadType=media&name={quote(name, safe='')}"
            return self.answer(200, Location=self.server.url + target)
        return None if self.refused(name, query) else self.answer(200, self.server.put(name, body))

    def batch(self, body):
        answers = []
        for one in re.findall(rb"DELETE /storage/v1/b/bucket/o/([^ ?]+)", body):
            gone = self.server.objects.pop(unquote(one.decode()), None) is not None
            answers.append(
                b"\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 %d X\r\n\r\n"
                % (204 if gone else 404)
            )
        self.answer(
            200, b"--of".join([b"", *answers, b"--"]), Content_Type="multipart/mixed; boundary=of"
        )
